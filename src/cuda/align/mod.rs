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
