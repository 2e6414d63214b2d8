//! Duplex alignment on a device.

use super::{Target, arithmetic};
use crate::cuda::tensor::DeviceTensor;
use crate::cuda::valid::{self, Given};
use crate::dtype::DType;
use crate::error::Result;
use crate::problem::Basis;
use crate::shapes::{AlignShapes, check_eps};

/// Duplex alignment.
#[derive(Debug, Clone, Copy)]
pub struct AlignProblem {
    /// The device.
    pub target: Target,
    /// Device address of the [`IdsRecord`](super::IdsRecord).
    pub record: u64,
    /// k (B, H, N, D), after rotary embedding; rows contiguous, 16-byte aligned.
    pub key: DeviceTensor<4>,
    /// v (B, H, N, D), of the key's dtype, rows as its.
    pub value: DeviceTensor<4>,
    /// Modality of every token (B, N), any integer dtype and strides.
    pub modality: DeviceTensor<2>,
    /// Tokens that may feed a basis (B, N), bool, any strides; `None`: every real token.
    pub context: Option<DeviceTensor<2>>,
    /// keep (M, D, D), contiguous, [`arithmetic`] dtype.
    pub keep: DeviceTensor<3>,
    /// mix (M, D, D), contiguous, [`arithmetic`] dtype.
    pub mix: DeviceTensor<3>,
    /// G (B, H, M, D, D) to use instead of computing one: contiguous, [`arithmetic`] dtype.
    pub basis: Option<DeviceTensor<5>>,
    /// Gram or covariance.
    pub kind: Basis,
    /// Added to every one of the first `dim` components of a key before it is normalised.
    pub eps: f64,
    /// Components that a key really has. Those from here to D are zeros that fill its row up: no eps is added to them, and
    /// rows and columns of the tables there are zeros too.
    pub dim: usize,
}

impl AlignProblem {
    /// Checks dtypes, shapes and rows; returns the problem itself.
    pub fn validated(self) -> Result<Self> {
        let dtype = valid::float("key", &self.key)?;
        valid::dtype("value", &self.value, dtype)?;
        valid::integer("modality", &self.modality)?;
        self.context.given("context", |name, context| valid::dtype(name, context, DType::Bool))?;
        self.shapes().check()?;
        check_eps(self.eps)?;
        valid::modalities("keep", Some(self.modalities()))?;
        valid::rows("key", &self.key)?;
        valid::rows("value", &self.value)?;
        valid::written("keep", &self.keep, arithmetic(dtype))?;
        valid::written("mix", &self.mix, arithmetic(dtype))?;
        self.basis.given("basis", |name, basis| valid::written(name, basis, arithmetic(dtype)))?;
        Ok(self)
    }

    fn shapes(&self) -> AlignShapes {
        AlignShapes {
            key: self.key.shape,
            value: self.value.shape,
            modality: self.modality.shape,
            context: self.context.map_or(self.modality.shape, |context| context.shape),
            keep: self.keep.shape,
            mix: self.mix.shape,
            basis: self.basis.map(|basis| basis.shape),
        }
    }

    /// Checks where forward writes: shapes, dtypes, contiguous.
    pub fn check_outputs(&self, outputs: &AlignOutputs) -> Result<()> {
        let AlignOutputs { aligned, basis } = outputs;
        self.shapes().check_outputs(aligned.shape, basis.map(|basis| basis.shape))?;
        valid::written("aligned", aligned, self.key.dtype)?;
        basis.given("basis", |name, basis| valid::written(name, basis, arithmetic(self.key.dtype)))
    }

    /// Checks what backward starts from.
    pub fn check_upstream(&self, upstream: &AlignUpstream) -> Result<()> {
        let AlignUpstream { aligned, basis, computed: _ } = upstream;
        self.shapes().check_upstream(aligned.shape, basis.map(|basis| basis.shape))?;
        valid::dtype("d aligned", aligned, self.key.dtype)?;
        valid::rows("d aligned", aligned)?;
        basis.given("d basis", |name, basis| valid::written(name, basis, arithmetic(self.key.dtype)))
    }

    /// Checks where backward writes: shapes, dtypes, contiguous.
    pub fn check_gradients(&self, gradients: &AlignGradients) -> Result<()> {
        let AlignGradients { key, value, keep, mix, basis } = gradients;
        let shape_of_basis = basis.map(|basis| basis.shape);
        self.shapes().check_gradients([key.shape, value.shape], [keep.shape, mix.shape], shape_of_basis)?;
        let (dtype, work) = (self.key.dtype, arithmetic(self.key.dtype));
        valid::written("d key", key, dtype)?;
        valid::written("d value", value, dtype)?;
        valid::written("d keep", keep, work)?;
        valid::written("d mix", mix, work)?;
        basis.given("d basis", |name, basis| valid::written(name, basis, work))
    }

    /// Number of modalities M.
    pub fn modalities(&self) -> usize {
        self.keep.shape[0]
    }
}

/// Where alignment writes; everything is contiguous and overwritten.
#[derive(Debug, Clone, Copy)]
pub struct AlignOutputs {
    /// k' (B, H, N, D).
    pub aligned: DeviceTensor<4>,
    /// G (B, H, M, D, D), [`arithmetic`] dtype; there exactly where the problem gives no basis.
    pub basis: Option<DeviceTensor<5>>,
}

/// What backward of alignment starts from. `basis` of the problem is set: G as forward used it.
#[derive(Debug, Clone, Copy)]
pub struct AlignUpstream {
    /// Gradient of k' (B, H, N, D), the key's dtype, rows contiguous, 16-byte aligned.
    pub aligned: DeviceTensor<4>,
    /// Gradient of G itself (B, H, M, D, D), contiguous, for those who use the returned basis.
    pub basis: Option<DeviceTensor<5>>,
    /// Whether forward computed G from the keys; otherwise it was given and its gradient is wanted.
    pub computed: bool,
}

/// Where backward of alignment writes; everything is contiguous and overwritten.
#[derive(Debug, Clone, Copy)]
pub struct AlignGradients {
    /// (B, H, N, D)
    pub key: DeviceTensor<4>,
    /// (B, H, N, D); zero where the value has no part in the basis.
    pub value: DeviceTensor<4>,
    /// (M, D, D), [`arithmetic`] dtype.
    pub keep: DeviceTensor<3>,
    /// (M, D, D), [`arithmetic`] dtype.
    pub mix: DeviceTensor<3>,
    /// (B, H, M, D, D), only for a given basis.
    pub basis: Option<DeviceTensor<5>>,
}
