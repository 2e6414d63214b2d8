//! The operators on NVIDIA GPUs: kernels in CUDA C++, compiled at first use, launched on the caller's stream.
//!
//! Everything but `driver` is plain arithmetic on shapes and addresses and runs without a GPU:
//!
//! | file | what |
//! |---|---|
//! | `tensor` | [`DeviceTensor`]: an address on a device with dtype, shape and strides |
//! | `problem` | the operators' inputs, outputs and gradients as device tensors |
//! | `valid` | what problems on a device are held to beside their shapes |
//! | `launch` | [`Kernel`] (a source and its defines) and [`Launch`] (a kernel, its grid and the bytes of its argument) |
//! | `workspace` | where in one allocation each intermediate result lies |
//! | `source` | the CUDA C++ texts under `kernels/`, assembled |
//! | `ids` | modality ids prepared for the kernels |
//! | `attend`, `align` | plans: from a problem to the launches that solve it |
//! | `nvrtc` | the run-time compiler: found, loaded, called |
//! | `cache` | compiled kernels, in memory and on disk |
//! | `driver` | the GPU itself: contexts, modules, launches |
//!
//! A plan is pure: the same launches go to the driver and, in the tests, to an interpreter of the compiled code.

pub mod align;
pub mod attend;
pub mod cache;
pub mod driver;
pub mod ids;
pub mod launch;
pub mod nvrtc;
pub mod problem;
pub mod source;
pub mod tensor;
mod valid;
pub mod workspace;

pub use launch::{Kernel, Launch, Parameters};
pub use source::Source;
pub use tensor::DeviceTensor;
pub use workspace::{Region, Workspace};
