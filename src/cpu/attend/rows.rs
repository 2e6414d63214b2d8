//! The rows of a row block, and how far along a key block each tile of them has to go.

use super::mask::Row;
use super::plan::{RowBlock, Sizes};
use crate::dtype::Element;
use crate::ids::PADDING;
use crate::problem::AttendProblem;
use std::ops::Range;

/// A row block's row.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowInfo {
    pub(super) row: Row,
    pub(super) query: usize,
    /// Keys `0 .. visible` may be seen; 0 for padding.
    pub(super) visible: usize,
}

impl RowInfo {
    /// How many keys of a key block may be seen; they are its first ones.
    pub(super) fn sees(&self, keys: &Range<usize>) -> usize {
        self.visible.saturating_sub(keys.start).min(keys.len())
    }
}

/// The rows of a block whose heads belong to key head `h` of batch row `b`.
pub(super) fn infos<T: Element>(
    problem: &AttendProblem<'_, T>,
    sizes: &Sizes,
    block: &RowBlock,
    [b, h]: [usize; 2],
) -> impl Iterator<Item = RowInfo> {
    let modality = problem.query_modality.row(b);
    let first_head = h * sizes.group;
    (0..block.len()).map(move |row| {
        let (head_in_group, query) = block.row(row);
        let id = modality[query];
        let visible = if id == PADDING { 0 } else { problem.visible(query) };
        RowInfo { row: Row { head: first_head + head_in_group, head_in_group, modality: id }, query, visible }
    })
}

/// A run of rows and the number of keys of the block that any of them sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) rows: Range<usize>,
    pub(super) reach: usize,
}

/// All rows in one tile where every row sees the whole key block; on the diagonal tiles of `tall` rows, each going only
/// as far as its rows see.
pub(super) fn tiles(infos: &[RowInfo], keys: &Range<usize>, tall: usize) -> impl Iterator<Item = Tile> {
    let whole = infos.iter().all(|info| info.sees(keys) == keys.len());
    let step = if whole { infos.len().max(1) } else { tall };
    (0..infos.len()).step_by(step).map(move |first| {
        let rows = first..(first + step).min(infos.len());
        let reach = infos[rows.clone()].iter().map(|info| info.sees(keys)).max().unwrap_or(0);
        Tile { rows, reach }
    })
}
