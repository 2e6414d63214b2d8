//! The CUDA C++ texts, embedded in the library. A text is its pieces one after the other: there is no `#include`.

/// Element types of every kernel, chosen by `-D DTYPE`, and their conversions.
const TYPES: &str = include_str!("kernels/types.cuh");

/// Layout of modality ids.
const IDS: &str = include_str!("kernels/ids.cuh");

/// Reading and checking the caller's ids.
const READ_IDS: &str = include_str!("kernels/read_ids.cuh");

/// Tiles in shared memory.
const TILE: &str = include_str!("kernels/tile.cuh");

/// Products of tiles.
const PRODUCT: &str = include_str!("kernels/product.cuh");

/// Inputs of attention, visible pairs.
const ATTEND: &str = include_str!("kernels/attend.cuh");

/// Rows of queries.
const ROWS: &str = include_str!("kernels/rows.cuh");

/// The end of a softmax.
const SOFTMAX: &str = include_str!("kernels/softmax.cuh");

/// Columns of queries.
const COLUMNS: &str = include_str!("kernels/columns.cuh");

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
        }
    }

    const fn pieces(self) -> &'static [&'static str] {
        match self {
            Self::AttendBias => &[TYPES, IDS, include_str!("kernels/attend_bias.cu")],
            Self::AttendCombine => {
                &[TYPES, IDS, TILE, PRODUCT, ATTEND, SOFTMAX, include_str!("kernels/attend_combine.cu")]
            }
            Self::AttendDelta => &[TYPES, IDS, TILE, PRODUCT, ATTEND, include_str!("kernels/attend_delta.cu")],
            Self::AttendForward => {
                &[TYPES, IDS, TILE, PRODUCT, ATTEND, ROWS, SOFTMAX, include_str!("kernels/attend_forward.cu")]
            }
            Self::AttendKeys => &[TYPES, IDS, TILE, PRODUCT, ATTEND, COLUMNS, include_str!("kernels/attend_keys.cu")],
            Self::AttendRows => &[TYPES, IDS, TILE, PRODUCT, ATTEND, ROWS, include_str!("kernels/attend_rows.cu")],
            Self::AttendSum => &[TYPES, include_str!("kernels/attend_sum.cu")],
            Self::Ids => &[TYPES, IDS, READ_IDS, include_str!("kernels/ids.cu")],
            Self::Ranges => &[TYPES, IDS, READ_IDS, include_str!("kernels/ranges.cu")],
            Self::Sink => &[TYPES, IDS, READ_IDS, include_str!("kernels/sink.cu")],
        }
    }

    /// The whole text.
    pub fn text(self) -> String {
        self.pieces().concat()
    }
}
