//! The CUDA C++ texts, embedded in the library. A text is its pieces one after the other: there is no `#include`.

/// Element types of every kernel, chosen by `-D DTYPE`, and their conversions.
const TYPES: &str = include_str!("kernels/types.cuh");

/// Layout of modality ids.
const IDS: &str = include_str!("kernels/ids.cuh");

/// Reading and checking the caller's ids.
const READ_IDS: &str = include_str!("kernels/read_ids.cuh");

/// Products of panels in shared memory.
const SUMS: &str = include_str!("kernels/sums.cuh");

/// The D x D matrices of a head.
const MATRICES: &str = include_str!("kernels/matrices.cuh");

/// Tiles of tokens.
const TOKENS: &str = include_str!("kernels/tokens.cuh");

/// One compilation unit of `kernels/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The two softmaxes of "split" added.
    AttendSum,
    /// Codes and summaries of modality ids.
    Ids,
    /// Pseudo-scores and their backward.
    Sink,
    /// Alignment: sums of outer products over tokens.
    OuterSums,
    /// Alignment: what is summed in parts, and norms.
    Basis,
    /// Alignment: T mix.
    Maps,
    /// Alignment: the aligned keys.
    AlignKeys,
    /// Alignment: gradients of mix and the bases.
    MapGradients,
    /// Alignment: gradients of keys and values.
    TokenGradients,
}

impl Source {
    /// Every unit.
    pub const ALL: &[Self] = &[
        Self::AttendSum,
        Self::Ids,
        Self::Sink,
        Self::OuterSums,
        Self::Basis,
        Self::Maps,
        Self::AlignKeys,
        Self::MapGradients,
        Self::TokenGradients,
    ];

    /// Name of the unit in messages of the compiler.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AttendSum => "attend_sum.cu",
            Self::Ids => "ids.cu",
            Self::Sink => "sink.cu",
            Self::OuterSums => "outer_sums.cu",
            Self::Basis => "basis.cu",
            Self::Maps => "maps.cu",
            Self::AlignKeys => "align_keys.cu",
            Self::MapGradients => "map_gradients.cu",
            Self::TokenGradients => "token_gradients.cu",
        }
    }

    const fn pieces(self) -> &'static [&'static str] {
        match self {
            Self::AttendSum => &[TYPES, include_str!("kernels/attend_sum.cu")],
            Self::Ids => &[TYPES, IDS, READ_IDS, include_str!("kernels/ids.cu")],
            Self::Sink => &[TYPES, IDS, READ_IDS, include_str!("kernels/sink.cu")],
            Self::OuterSums => &[TYPES, IDS, SUMS, include_str!("kernels/outer_sums.cu")],
            Self::Basis => &[TYPES, include_str!("kernels/basis.cu")],
            Self::Maps => &[TYPES, SUMS, MATRICES, include_str!("kernels/maps.cu")],
            Self::AlignKeys => &[TYPES, IDS, SUMS, TOKENS, include_str!("kernels/align_keys.cu")],
            Self::MapGradients => &[TYPES, SUMS, MATRICES, include_str!("kernels/map_gradients.cu")],
            Self::TokenGradients => &[TYPES, IDS, SUMS, TOKENS, include_str!("kernels/token_gradients.cu")],
        }
    }

    /// The whole text.
    pub fn text(self) -> String {
        self.pieces().concat()
    }
}
