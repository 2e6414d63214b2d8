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

/// Tiles in shared memory.
const TILE: Piece = piece!("tile.cuh");

/// Products of tiles.
const PRODUCT: Piece = piece!("product.cuh");

/// Inputs of attention, visible pairs.
const ATTEND: Piece = piece!("attend.cuh");

/// Rows of queries.
const ROWS: Piece = piece!("rows.cuh");

/// The end of a softmax.
const SOFTMAX: Piece = piece!("softmax.cuh");

/// Columns of queries.
const COLUMNS: Piece = piece!("columns.cuh");

/// Products of panels in shared memory.
const SUMS: Piece = piece!("sums.cuh");

/// Unit keys.
const UNIT_KEYS: Piece = piece!("unit_keys.cuh");

/// The D x D matrices of a head.
const MATRICES: Piece = piece!("matrices.cuh");

/// Tiles of tokens.
const TOKENS: Piece = piece!("tokens.cuh");

/// One compilation unit of `kernels/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// Gradient of the bias table.
    AttendBias,
    /// Splits of the keys, joined.
    AttendCombine,
    /// delta and the gradient of the sinks.
    AttendDelta,
    /// Forward.
    AttendForward,
    /// Gradients of keys and values.
    AttendKeys,
    /// Gradients of queries, mass by modality.
    AttendRows,
    /// The two softmaxes of "split" added.
    AttendSum,
    /// Codes and summaries of modality ids.
    Ids,
    /// Key ranges.
    Ranges,
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
    /// Alignment of few tokens.
    AlignFew,
    /// Alignment: gradients of mix and the bases.
    MapGradients,
    /// Alignment: gradients of keys and values.
    TokenGradients,
}

impl Source {
    /// Every unit.
    pub const ALL: &[Self] = &[
        Self::AttendBias,
        Self::AttendCombine,
        Self::AttendDelta,
        Self::AttendForward,
        Self::AttendKeys,
        Self::AttendRows,
        Self::AttendSum,
        Self::Ids,
        Self::Ranges,
        Self::Sink,
        Self::OuterSums,
        Self::Basis,
        Self::Maps,
        Self::AlignKeys,
        Self::AlignFew,
        Self::MapGradients,
        Self::TokenGradients,
    ];

    /// Name of the unit in messages of the compiler.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AttendBias => "attend_bias.cu",
            Self::AttendCombine => "attend_combine.cu",
            Self::AttendDelta => "attend_delta.cu",
            Self::AttendForward => "attend_forward.cu",
            Self::AttendKeys => "attend_keys.cu",
            Self::AttendRows => "attend_rows.cu",
            Self::AttendSum => "attend_sum.cu",
            Self::Ids => "ids.cu",
            Self::Ranges => "ranges.cu",
            Self::Sink => "sink.cu",
            Self::OuterSums => "outer_sums.cu",
            Self::Basis => "basis.cu",
            Self::Maps => "maps.cu",
            Self::AlignKeys => "align_keys.cu",
            Self::AlignFew => "align_few.cu",
            Self::MapGradients => "map_gradients.cu",
            Self::TokenGradients => "token_gradients.cu",
        }
    }

    /// What it is made of, in order.
    pub const fn pieces(self) -> &'static [Piece] {
        match self {
            Self::AttendBias => &[TYPES, IDS, piece!("attend_bias.cu")],
            Self::AttendCombine => &[TYPES, IDS, TILE, PRODUCT, ATTEND, SOFTMAX, piece!("attend_combine.cu")],
            Self::AttendDelta => &[TYPES, IDS, TILE, PRODUCT, ATTEND, piece!("attend_delta.cu")],
            Self::AttendForward => &[TYPES, IDS, TILE, PRODUCT, ATTEND, ROWS, SOFTMAX, piece!("attend_forward.cu")],
            Self::AttendKeys => &[TYPES, IDS, TILE, PRODUCT, ATTEND, COLUMNS, piece!("attend_keys.cu")],
            Self::AttendRows => &[TYPES, IDS, TILE, PRODUCT, ATTEND, ROWS, piece!("attend_rows.cu")],
            Self::AttendSum => &[TYPES, piece!("attend_sum.cu")],
            Self::Ids => &[TYPES, IDS, READ_IDS, piece!("ids.cu")],
            Self::Ranges => &[TYPES, IDS, READ_IDS, piece!("ranges.cu")],
            Self::Sink => &[TYPES, IDS, READ_IDS, piece!("sink.cu")],
            Self::OuterSums => &[TYPES, IDS, SUMS, UNIT_KEYS, piece!("outer_sums.cu")],
            Self::Basis => &[TYPES, piece!("basis.cu")],
            Self::Maps => &[TYPES, SUMS, MATRICES, piece!("maps.cu")],
            Self::AlignKeys => &[TYPES, IDS, SUMS, UNIT_KEYS, TOKENS, piece!("align_keys.cu")],
            Self::AlignFew => &[TYPES, IDS, READ_IDS, SUMS, piece!("align_few.cu")],
            Self::MapGradients => &[TYPES, SUMS, MATRICES, piece!("map_gradients.cu")],
            Self::TokenGradients => &[TYPES, IDS, SUMS, UNIT_KEYS, TOKENS, piece!("token_gradients.cu")],
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
