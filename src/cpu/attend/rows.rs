//! The rows of a row block, and how far along a key block each tile of them has to go.

use super::mask::Row;
use super::plan::{KEYS, RowBlock, Sizes};
use crate::cpu::simd::Simd;
use crate::dtype::Element;
use crate::ids::PADDING;
use crate::problem::AttendProblem;
use std::ops::Range;

/// A row block's row.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowInfo {
    pub(super) row: Row,
    pub(super) query: usize,
    /// Keys `first .. visible` may be seen; none (0 .. 0) for padding.
    pub(super) first: usize,
    pub(super) visible: usize,
}

impl RowInfo {
    /// The keys of a key block that may be seen, counted inside the block; 0 .. 0 where there are none.
    pub(super) fn sees(&self, keys: &Range<usize>) -> Range<usize> {
        let (first, last) = (self.first.max(keys.start), self.visible.min(keys.end));
        if first < last { first - keys.start..last - keys.start } else { 0..0 }
    }
}

/// The key blocks that rows have to go through: those that any of them sees.
pub(super) fn key_blocks(infos: &[RowInfo], sizes: &Sizes) -> impl Iterator<Item = usize> {
    let seeing = || infos.iter().filter(|info| info.visible > 0);
    let first = seeing().map(|info| info.first).min().unwrap_or(0);
    let last = seeing().map(|info| info.visible).max().unwrap_or(0);
    let any = |&block: &usize| infos.iter().any(|info| !info.sees(&sizes.key_block(block)).is_empty());
    (first / KEYS..last.div_ceil(KEYS)).filter(any)
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
        let seen = if id == PADDING { 0..0 } else { problem.visible(b, query) };
        let row = Row { head: first_head + head_in_group, head_in_group, modality: id };
        RowInfo { row, query, first: seen.start, visible: seen.end }
    })
}

/// The keys that every row sees.
pub(super) fn common(infos: &[RowInfo]) -> Range<usize> {
    let first = infos.iter().map(|info| info.first).max().unwrap_or(0);
    first..infos.iter().map(|info| info.visible).min().unwrap_or(0)
}

/// Whether all of some keys are among others.
pub(super) fn holds(all: &Range<usize>, keys: &Range<usize>) -> bool {
    all.start <= keys.start && keys.end <= all.end
}

/// A run of rows and the keys of the block that any of them sees, from a whole panel on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) rows: Range<usize>,
    pub(super) keys: Range<usize>,
}

/// All rows in one tile where every row sees the whole key block, as `whole` says; else, on the diagonal and at the ends of
/// windows, tiles of the register block's height, each over only the keys that its rows see.
pub(super) fn tiles<S: Simd>(_: S, infos: &[RowInfo], keys: &Range<usize>, whole: bool) -> impl Iterator<Item = Tile> {
    let step = if whole { infos.len().max(1) } else { S::TALL };
    (0..infos.len()).step_by(step).map(move |first| {
        let rows = first..(first + step).min(infos.len());
        let keys = if whole { 0..keys.len() } else { seen(&infos[rows.clone()], keys, 2 * S::LANES) };
        Tile { rows, keys }
    })
}

/// The keys of a block that any row sees, counted inside the block, from a whole panel of `panel` keys on.
pub(super) fn seen(infos: &[RowInfo], keys: &Range<usize>, panel: usize) -> Range<usize> {
    let each = || infos.iter().map(|info| info.sees(keys)).filter(|seen| !seen.is_empty());
    let first = each().map(|seen| seen.start).min().unwrap_or(0);
    first / panel * panel..each().map(|seen| seen.end).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(first: usize, visible: usize) -> RowInfo {
        RowInfo { row: Row { head: 0, head_in_group: 0, modality: 0 }, query: 0, first, visible }
    }

    #[test]
    fn a_row_sees_its_part_of_a_block() {
        assert_eq!(row(0, 300).sees(&(128..256)), 0..128);
        assert_eq!(row(130, 140).sees(&(128..256)), 2..12);
        assert_eq!(row(130, 140).sees(&(0..128)), 0..0);
        assert_eq!(row(0, 0).sees(&(0..128)), 0..0);
    }

    #[test]
    fn what_all_rows_see_is_what_no_row_lacks() {
        let rows = [row(0, 300), row(10, 200)];
        assert_eq!(common(&rows), 10..200);
        assert!(holds(&common(&rows), &(10..200)) && !holds(&common(&rows), &(9..128)));
        assert!(!holds(&common(&[row(0, 300), row(0, 0)]), &(0..128)));
    }

    #[test]
    fn rows_are_bounded_by_the_keys_that_any_of_them_sees() {
        let rows = [row(0, 0), row(170, 200), row(150, 180)];
        assert_eq!(seen(&rows, &(128..256), 16), 16..72);
        assert_eq!(seen(&rows, &(0..128), 16), 0..0);
    }
}
