//! The operators' inputs, outputs and gradients on a device. Nothing here reads memory: ids are checked by a kernel.

mod align;
mod attend;
mod record;
mod sink;

pub use align::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream};
pub use attend::{AttendGradients, AttendOutputs, AttendProblem, AttendUpstream};
pub use record::{IdsArgument, IdsRecord, Offender};
pub use sink::SinkProblem;

use crate::dtype::DType;

/// Modality ids that a kernel can tell apart: a token's code is a byte, 255 for padding and 254 kept free.
pub const MAX_MODALITIES: usize = 254;

/// What plans need to know of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Target {
    /// Compute capability, major and minor: (8, 0) is sm_80.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most bytes of shared memory that a block may ask for.
    pub shared_limit: u32,
}

impl Target {
    /// An A100: what tests plan for.
    pub const SM_80: Self = Self { capability: (8, 0), multiprocessors: 108, shared_limit: 166_912 };
    /// A GeForce RTX 4090: of the devices that the kernels run on, those of its kind have the least shared memory.
    pub const SM_89: Self = Self { capability: (8, 9), multiprocessors: 128, shared_limit: 101_376 };
    /// An H100.
    pub const SM_90: Self = Self { capability: (9, 0), multiprocessors: 132, shared_limit: 232_448 };
}

/// The type that arithmetic on `dtype` runs in, and that logsumexp, mass, sinks and tables are stored in.
pub const fn arithmetic(dtype: DType) -> DType {
    match dtype {
        DType::Float64 => DType::Float64,
        _ => DType::Float32,
    }
}
