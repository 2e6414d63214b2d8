//! The CUDA C++ texts, embedded in the library. A text is its pieces one after the other: there is no `#include`.

/// Element types of every kernel, chosen by `-D DTYPE`, and their conversions.
const TYPES: &str = include_str!("kernels/types.cuh");

/// One compilation unit of `kernels/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The two softmaxes of "split" added.
    AttendSum,
}

impl Source {
    /// Every unit.
    pub const ALL: &[Self] = &[Self::AttendSum];

    /// Name of the unit in messages of the compiler.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AttendSum => "attend_sum.cu",
        }
    }

    const fn pieces(self) -> &'static [&'static str] {
        match self {
            Self::AttendSum => &[TYPES, include_str!("kernels/attend_sum.cu")],
        }
    }

    /// The whole text.
    pub fn text(self) -> String {
        self.pieces().concat()
    }
}
