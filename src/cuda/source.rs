//! The CUDA C++ texts, embedded in the library. A text is its pieces one after the other: there is no `#include`.

/// A file of `kernels/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Its name there.
    pub name: &'static str,
    /// What it holds.
    pub text: &'static str,
}

macro_rules! piece {
    ($name:literal) => {
        Piece { name: $name, text: include_str!(concat!("kernels/", $name)) }
    };
}

/// Element types of every kernel, chosen by `-D DTYPE`, and their conversions.
const TYPES: Piece = piece!("types.cuh");

/// Layout of modality ids.
const IDS: Piece = piece!("ids.cuh");

/// Reading and checking the caller's ids.
const READ_IDS: Piece = piece!("read_ids.cuh");

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

    /// What it is made of, in order.
    pub const fn pieces(self) -> &'static [Piece] {
        match self {
            Self::AttendSum => &[TYPES, piece!("attend_sum.cu")],
            Self::Ids => &[TYPES, IDS, READ_IDS, piece!("ids.cu")],
            Self::Sink => &[TYPES, IDS, READ_IDS, piece!("sink.cu")],
        }
    }

    /// The whole text.
    pub fn text(self) -> String {
        joined(self.pieces().iter().map(|piece| (piece.name, piece.text)))
    }
}

/// One text of several, in which the compiler still names each by its own name and lines.
pub fn joined<'a>(pieces: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let lines = pieces.into_iter().map(|(name, text)| format!("#line 1 \"{name}\"\n{text}\n"));
    lines.collect::<Vec<_>>().concat()
}
