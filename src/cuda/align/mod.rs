//! Plans of duplex alignment and of the pseudo-scores.

mod sink;

pub use sink::{SinkBackwardParams, SinkParams, pseudo_sink, pseudo_sink_backward};
