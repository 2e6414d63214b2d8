//! Pseudo-scores on a device.

use super::Target;
use crate::cuda::tensor::DeviceTensor;
use crate::cuda::valid;
use crate::error::Result;
use crate::shapes::SinkShapes;

/// Pseudo-scores: position and modality of every query row, decay and base a modality and head.
#[derive(Debug, Clone, Copy)]
pub struct SinkProblem {
    /// The device.
    pub target: Target,
    /// Device address of the [`IdsRecord`](super::IdsRecord).
    pub record: u64,
    /// 0-based position among the row's real tokens (B, Nq), any integer dtype and strides.
    pub position: DeviceTensor<2>,
    /// Modality of every query (B, Nq), any integer dtype and strides.
    pub query_modality: DeviceTensor<2>,
    /// The "fixed n" of the paper: the model's context window.
    pub span: i64,
    /// Decay (M, Hq), float32 or float64, any strides.
    pub decay: DeviceTensor<2>,
    /// Base (M, Hq), of decay's dtype, any strides.
    pub base: DeviceTensor<2>,
}

impl SinkProblem {
    /// Checks dtypes and shapes; returns the problem itself.
    pub fn validated(self) -> Result<Self> {
        valid::integer("position", &self.position)?;
        valid::integer("query_modality", &self.query_modality)?;
        valid::real("decay", &self.decay)?;
        valid::dtype("base", &self.base, self.decay.dtype)?;
        self.shapes().check(self.span)?;
        valid::modalities("decay", Some(self.decay.shape[0]))?;
        Ok(self)
    }

    fn shapes(&self) -> SinkShapes {
        SinkShapes {
            position: self.position.shape,
            query_modality: self.query_modality.shape,
            decay: self.decay.shape,
            base: self.base.shape,
        }
    }

    /// Checks where forward writes: shape, dtype, contiguous.
    pub fn check_outputs(&self, sink: &DeviceTensor<3>) -> Result<()> {
        self.shapes().check_outputs(sink.shape)?;
        valid::written("sink", sink, self.decay.dtype)
    }

    /// Checks what backward starts from, of any strides, and where it writes: shapes, dtypes, contiguous.
    pub fn check_gradients(&self, sink: &DeviceTensor<3>, [decay, base]: [&DeviceTensor<2>; 2]) -> Result<()> {
        self.shapes().check_gradients(sink.shape, [decay.shape, base.shape])?;
        valid::dtype("d sink", sink, self.decay.dtype)?;
        valid::written("d decay", decay, self.decay.dtype)?;
        valid::written("d base", base, self.decay.dtype)
    }

    /// The shape (B, Hq, Nq) of the sink.
    pub fn shape(&self) -> [usize; 3] {
        self.shapes().sink()
    }
}
