//! An interpreter of PTX, the assembly that NVRTC compiles CUDA C++ to: kernels run as compiled, on a machine without a GPU.
//!
//! What a GPU would let pass in silence is an error here, with the line of the kernel that made it: an access outside of a
//! buffer or misaligned, memory read that was never written, an input written, two warps or two blocks that touch the same
//! bytes without a barrier between them, two lanes of a warp without a `__syncwarp`, a copy read before it was waited for, a
//! barrier or a collective instruction that not all lanes reach.
//!
//! | file | what |
//! |---|---|
//! | `scan`, `parse`, `lower`, `lower_warp` | text to statements, kernels, instructions |
//! | `instruction` | what a parsed kernel is made of |
//! | `integer`, `float`, `half`, `convert`, `matrix` | arithmetic |
//! | `memory`, `touch`, `shared`, `access` | global and shared memory with their checks, and what a warp does with them |
//! | `warp`, `collective`, `block` | lanes, their divergence, barriers |
//! | `gpu` | buffers and launches: what tests use |

mod access;
mod block;
mod collective;
mod convert;
mod float;
mod gpu;
mod half;
mod instruction;
mod integer;
mod lower;
mod lower_warp;
mod matrix;
mod memory;
mod parse;
mod scan;
mod shared;
mod touch;
mod warp;

pub(crate) use gpu::{Fault, Gpu, Plain, Program, Shape, Source};
