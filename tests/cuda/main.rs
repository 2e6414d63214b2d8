//! The CUDA kernels as NVRTC compiles them, run by an interpreter against the specification in float64. Needs NVRTC (from
//! torch, from the package nvidia-cuda-nvrtc, or named by MODA_ATTN_NVRTC), not a GPU.

#[path = "../common/mod.rs"]
mod common;
#[path = "../emulator/mod.rs"]
mod emulator;

mod align;
mod arithmetic;
mod attend;
mod budget;
mod checks;
mod device;
mod ids;
mod kernel;
mod sink;
mod sum;
mod warps;
