//! Plans of duplex alignment and of the pseudo-scores.

mod backward;
mod few;
mod forward;
mod outer;
mod plan;
mod sink;

pub use backward::{
    BasisGradientParams, MixGradientParams, OthersGradientParams, TokenGradientsParams, backward, backward_workspace,
};
pub use few::AlignFewParams;
pub use forward::{AlignKeysParams, FinishBasisParams, MapsParams, UnitNormsParams, forward, forward_workspace};
pub use outer::{AddPartsParams, OuterSumsParams};
pub use sink::{SinkBackwardParams, SinkParams, pseudo_sink, pseudo_sink_backward};

/// Keys of a shape, nothing else of interest.
#[cfg(test)]
fn test_problem(shape: [usize; 4], modalities: usize) -> crate::cuda::problem::AlignProblem {
    use crate::cuda::problem::{AlignProblem, Target};
    use crate::cuda::tensor::DeviceTensor;
    use crate::dtype::DType;

    let [batch, _, tokens, dim] = shape;
    let key = DeviceTensor::contiguous(0x1000, DType::BFloat16, shape);
    let table = DeviceTensor::contiguous(0x1000, DType::Float32, [modalities, dim, dim]);
    AlignProblem {
        target: Target::SM_90,
        record: 0x1000,
        key,
        value: key,
        modality: DeviceTensor::contiguous(0x1000, DType::Int64, [batch, tokens]),
        context: None,
        keep: table,
        mix: table,
        basis: None,
        kind: crate::problem::Basis::Covariance,
        eps: 1e-6,
        dim,
    }
}
