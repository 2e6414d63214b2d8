//! The operators' inputs, outputs and gradients on a device. Nothing here reads memory: ids are checked by a kernel.

use super::tensor::DeviceTensor;
use crate::dtype::DType;
use crate::problem::{Basis, Combine, MassBy};

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
    /// Added to every component of a key before it is normalised.
    pub eps: f64,
}

impl AlignProblem {
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
    /// The shape (B, Hq, Nq) of the sink.
    pub fn shape(&self) -> [usize; 3] {
        let [b, nq] = self.position.shape;
        [b, self.decay.shape[1], nq]
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
