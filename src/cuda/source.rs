//! The CUDA C++ texts, embedded in the library. A text is its pieces one after the other: there is no `#include`.

/// Element types of every kernel, chosen by `-D DTYPE`, and their conversions.
const TYPES: &str = include_str!("kernels/types.cuh");

/// Layout of modality ids.
const IDS: &str = include_str!("kernels/ids.cuh");

/// Reading and checking the caller's ids.
const READ_IDS: &str = include_str!("kernels/read_ids.cuh");

/// One compilation unit of `kernels/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The two softmaxes of "split" added.
    AttendSum,
    /// Codes and summaries of modality ids.
    Ids,
    /// Pseudo-scores and their backward.
    Sink,
}

impl Source {
    /// Every unit.
    pub const ALL: &[Self] = &[Self::AttendSum, Self::Ids, Self::Sink];

    /// Name of the unit in messages of the compiler.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AttendSum => "attend_sum.cu",
            Self::Ids => "ids.cu",
            Self::Sink => "sink.cu",
        }
    }

    const fn pieces(self) -> &'static [&'static str] {
        match self {
            Self::AttendSum => &[TYPES, include_str!("kernels/attend_sum.cu")],
            Self::Ids => &[TYPES, IDS, READ_IDS, include_str!("kernels/ids.cu")],
            Self::Sink => &[TYPES, IDS, READ_IDS, include_str!("kernels/sink.cu")],
        }
    }

    /// The whole text.
    pub fn text(self) -> String {
        self.pieces().concat()
    }
}
