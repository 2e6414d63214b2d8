//! The operators' inputs, outputs and gradients on a device. Nothing here reads memory: ids are checked by a kernel.

use super::tensor::DeviceTensor;
use super::valid::{self, Given};
use crate::dtype::DType;
use crate::error::Result;
use crate::problem::{Basis, Combine, MassBy};
use crate::shapes::{AlignShapes, AttendShapes, SinkShapes, check_eps, check_scale};

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

/// Where kernels report ids out of range: one word a device in mapped host memory, [`IdsRecord::NONE`] at first. A kernel
/// treats such a token as padding and lowers the word to its place and value by an atomic minimum, so that the first
/// offender stays whatever order threads run in. The host reads the word at a later call, raises and puts `NONE` back.
///
/// Bits from the top: argument 1, batch 14, token 24, id + 2^16 17, M 8. A number too large for its field is stored as the
/// largest one the field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct IdsRecord(pub u64);

/// An id out of range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offender {
    /// Where it was given.
    pub argument: IdsArgument,
    /// Its batch row.
    pub batch: usize,
    /// Its token.
    pub token: usize,
    /// The id, clamped to -2^16 .. 2^16 - 1.
    pub given: i64,
    /// The largest id that would have been right.
    pub largest: i64,
}

impl IdsRecord {
    /// Nothing to report.
    pub const NONE: Self = Self(u64::MAX);

    /// What was reported.
    pub const fn offender(self) -> Option<Offender> {
        let Self(word) = self;
        if word == Self::NONE.0 {
            return None;
        }
        Some(Offender {
            argument: if word >> 63 == 0 { IdsArgument::Modality } else { IdsArgument::QueryModality },
            batch: (word >> 49 & 0x3fff) as usize,
            token: (word >> 25 & 0xff_ffff) as usize,
            given: (word >> 8 & 0x1_ffff) as i64 - (1 << 16),
            largest: (word & 0xff) as i64 - 1,
        })
    }
}

/// The arguments that hold ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum IdsArgument {
    /// `modality`
    Modality = 0,
    /// `query_modality`
    QueryModality = 1,
}

impl IdsArgument {
    /// The public name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Modality => "modality",
            Self::QueryModality => "query_modality",
        }
    }
}

/// Modular masked attention.
#[derive(Debug, Clone, Copy)]
pub struct AttendProblem {
    /// The device.
    pub target: Target,
    /// Device address of the [`IdsRecord`].
    pub record: u64,
    /// q (B, Hq, Nq, D): bfloat16, float16, float32 or float64; rows contiguous, 16-byte aligned.
    pub query: DeviceTensor<4>,
    /// k' (B, Hkv, Nk, D), of the query's dtype, rows as its.
    pub key: DeviceTensor<4>,
    /// v (B, Hkv, Nk, D), of the query's dtype, rows as its.
    pub value: DeviceTensor<4>,
    /// Modality of every key (B, Nk), any integer dtype and strides.
    pub modality: DeviceTensor<2>,
    /// Modality of every query (B, Nq), any integer dtype and strides; where none was given the last entries of `modality`.
    pub query_modality: DeviceTensor<2>,
    /// Sink logit z (B, Hq, Nq, parts), any strides, [`arithmetic`] dtype; batch and heads may be 1 before validation.
    pub sink: Option<DeviceTensor<4>>,
    /// Modality bias (B, Hq, M, M), any strides, [`arithmetic`] dtype; batch and heads may be 1 before validation.
    pub bias: Option<DeviceTensor<4>>,
    /// First visible key and one past the last (B, Nq, 2), any integer dtype and strides, not clamped; batch may be 1
    /// before validation.
    pub key_range: Option<DeviceTensor<3>>,
    /// Key j is visible to query i only where j <= i + (Nk - Nq).
    pub causal: bool,
    /// Factor on q . k'.
    pub scale: f64,
    /// One softmax or two.
    pub combine: Combine,
    /// Number of modalities M, where it is given.
    pub num_modalities: Option<usize>,
}

impl AttendProblem {
    /// Checks dtypes, shapes and rows, and repeats sink, bias and ranges over batch and heads; returns the problem itself.
    pub fn validated(mut self) -> Result<Self> {
        let [b, hq, nq, _] = self.query.shape;
        let dtype = valid::float("query", &self.query)?;
        valid::dtype("key", &self.key, dtype)?;
        valid::dtype("value", &self.value, dtype)?;
        valid::integer("modality", &self.modality)?;
        valid::integer("query_modality", &self.query_modality)?;
        self.sink.given("sink", |name, sink| valid::dtype(name, sink, arithmetic(dtype)))?;
        self.bias.given("modality_bias", |name, bias| valid::dtype(name, bias, arithmetic(dtype)))?;
        self.key_range.given("key_range", valid::integer)?;
        self.shapes().check()?;
        check_scale(self.scale)?;
        valid::modalities("num_modalities", self.num_modalities.or(self.bias.map(|bias| bias.shape[2])))?;
        for (name, tensor) in [("query", &self.query), ("key", &self.key), ("value", &self.value)] {
            valid::rows(name, tensor)?;
        }
        let repeated = |table: DeviceTensor<4>| table.broadcast([b, hq, table.shape[2], table.shape[3]]);
        (self.sink, self.bias) = (self.sink.and_then(repeated), self.bias.and_then(repeated));
        self.key_range = self.key_range.and_then(|range| range.broadcast([b, nq, 2]));
        Ok(self)
    }

    fn shapes(&self) -> AttendShapes {
        AttendShapes {
            query: self.query.shape,
            key: self.key.shape,
            value: self.value.shape,
            modality: self.modality.shape,
            query_modality: self.query_modality.shape,
            sink: self.sink.map(|sink| sink.shape),
            bias: self.bias.map(|bias| bias.shape),
            key_range: self.key_range.map(|DeviceTensor { shape: [rows, queries, _], .. }| [rows, queries]),
            combine: self.combine,
            num_modalities: self.num_modalities,
        }
    }

    /// Checks where forward writes: shapes, dtypes, contiguous.
    pub fn check_outputs(&self, outputs: &AttendOutputs) -> Result<()> {
        let AttendOutputs { out, logsumexp, parts, mass } = outputs;
        let shape_of_mass = mass.map(|(by, mass)| (by, mass.shape));
        let shape_of_parts = parts.map(|parts| parts.shape);
        let logsumexp_shape = Some(logsumexp.shape);
        self.shapes().check_outputs(out.shape, logsumexp_shape, shape_of_parts, shape_of_mass, self.modalities())?;
        let work = arithmetic(self.query.dtype);
        valid::written("out", out, self.query.dtype)?;
        valid::written("logsumexp", logsumexp, work)?;
        parts.given("parts", |name, parts| valid::written(name, parts, work))?;
        mass.map(|(_, mass)| mass).given("mass", |name, mass| valid::written(name, mass, work))
    }

    /// Checks what backward starts from.
    pub fn check_upstream(&self, upstream: &AttendUpstream) -> Result<()> {
        let AttendUpstream { out_gradient, out, logsumexp, parts } = upstream;
        let shape_of_parts = parts.map(|parts| parts.shape);
        self.shapes().check_upstream([out_gradient.shape, out.shape, logsumexp.shape], shape_of_parts)?;
        let work = arithmetic(self.query.dtype);
        valid::dtype("d out", out_gradient, self.query.dtype)?;
        valid::rows("d out", out_gradient)?;
        valid::written("out", out, self.query.dtype)?;
        valid::written("logsumexp", logsumexp, work)?;
        parts.given("parts", |name, parts| valid::written(name, parts, work))
    }

    /// Checks where backward writes: shapes, dtypes, contiguous.
    pub fn check_gradients(&self, gradients: &AttendGradients) -> Result<()> {
        let AttendGradients { query, key, value, sink, bias } = gradients;
        let shape = |tensor: DeviceTensor<4>| tensor.shape;
        let always = [query, key, value].map(|tensor| tensor.shape);
        self.shapes().check_gradients(always, sink.map(shape), bias.map(shape), self.modalities())?;
        let (dtype, work) = (self.query.dtype, arithmetic(self.query.dtype));
        for (name, tensor) in [("d query", query), ("d key", key), ("d value", value)] {
            valid::written(name, tensor, dtype)?;
        }
        sink.given("d sink", |name, sink| valid::written(name, sink, work))?;
        bias.given("d bias", |name, bias| valid::written(name, bias, work))
    }

    /// Number of modalities M: the given one or the bias table's, else as many as there can be: ids are not read here.
    pub fn modalities(&self) -> usize {
        self.num_modalities.or(self.bias.map(|bias| bias.shape[2])).unwrap_or(MAX_MODALITIES)
    }

    /// Query heads that read one key head.
    pub fn group(&self) -> usize {
        self.query.shape[1].checked_div(self.key.shape[1]).unwrap_or(0)
    }
}

/// Where attention writes; everything is contiguous and overwritten.
#[derive(Debug, Clone, Copy)]
pub struct AttendOutputs {
    /// o (B, Hq, Nq, D), the query's dtype.
    pub out: DeviceTensor<4>,
    /// L (B, Hq, parts, Nq), natural logarithm, sink included; +inf for a row that sees nothing.
    pub logsumexp: DeviceTensor<4>,
    /// o_self and o_cross (B, Hq, 2, Nq, D) in the [`arithmetic`] dtype; there for "split" only.
    pub parts: Option<DeviceTensor<5>>,
    /// Attention mass (B, Hq, Nq, columns) and what its columns are, where it is wanted.
    pub mass: Option<(MassBy, DeviceTensor<4>)>,
}

/// What backward of attention starts from.
#[derive(Debug, Clone, Copy)]
pub struct AttendUpstream {
    /// Gradient of o (B, Hq, Nq, D), the query's dtype, rows contiguous, 16-byte aligned.
    pub out_gradient: DeviceTensor<4>,
    /// o as forward wrote it.
    pub out: DeviceTensor<4>,
    /// L as forward wrote it.
    pub logsumexp: DeviceTensor<4>,
    /// o_self and o_cross as forward wrote them, for "split".
    pub parts: Option<DeviceTensor<5>>,
}

/// Where backward of attention writes; everything is contiguous and overwritten.
#[derive(Debug, Clone, Copy)]
pub struct AttendGradients {
    /// (B, Hq, Nq, D)
    pub query: DeviceTensor<4>,
    /// (B, Hkv, Nk, D)
    pub key: DeviceTensor<4>,
    /// (B, Hkv, Nk, D)
    pub value: DeviceTensor<4>,
    /// (B, Hq, Nq, parts), [`arithmetic`] dtype.
    pub sink: Option<DeviceTensor<4>>,
    /// (B, Hq, M, M), [`arithmetic`] dtype.
    pub bias: Option<DeviceTensor<4>>,
}

/// Duplex alignment.
#[derive(Debug, Clone, Copy)]
pub struct AlignProblem {
    /// The device.
    pub target: Target,
    /// Device address of the [`IdsRecord`].
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

/// Pseudo-scores: position and modality of every query row, decay and base a modality and head.
#[derive(Debug, Clone, Copy)]
pub struct SinkProblem {
    /// The device.
    pub target: Target,
    /// Device address of the [`IdsRecord`].
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_of_ids_tells_what_the_kernels_put_into_it() {
        assert_eq!(IdsRecord::NONE.offender(), None);
        let word = 1 << 63 | 3 << 49 | 70_000 << 25 | ((1 << 16) - 2) << 8 | 0xfe;
        let offender =
            Offender { argument: IdsArgument::QueryModality, batch: 3, token: 70_000, given: -2, largest: 253 };
        assert_eq!(IdsRecord(word).offender(), Some(offender));
    }
}
