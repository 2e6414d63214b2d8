//! How a problem is cut: row blocks that share a key head, and key blocks. The cut depends on the problem alone, never
//! on the number of threads.

use crate::cpu::dot::Dot;
use crate::cpu::simd::Simd;
use crate::dtype::Element;
use crate::problem::AttendProblem;
use std::ops::Range;

/// Most rows of a block.
pub(super) const ROWS: usize = 96;
/// Keys of a block.
pub(super) const KEYS: usize = 128;

/// Rows of one block: all of `queries` for each of `heads`, head by head. More than one head only where the queries are
/// few, so that short sequences and decoding still fill a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowBlock {
    /// Query heads, counted inside the group.
    pub(super) heads: Range<usize>,
    /// Queries.
    pub(super) queries: Range<usize>,
}

impl RowBlock {
    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.heads.len() * self.queries.len()
    }

    /// Head (inside the group) and query of a row.
    pub(super) fn row(&self, row: usize) -> (usize, usize) {
        let n = self.queries.len();
        (self.heads.start + row / n, self.queries.start + row % n)
    }
}

/// The row blocks of one key head; the ones that see the most keys first.
pub(super) fn row_blocks(group: usize, queries: usize) -> Vec<RowBlock> {
    if group == 0 || queries == 0 {
        return Vec::new();
    }
    if queries <= ROWS {
        let heads = ROWS / queries;
        return (0..group)
            .step_by(heads)
            .map(|first| RowBlock { heads: first..(first + heads).min(group), queries: 0..queries })
            .collect();
    }
    let cut = |head: usize| {
        let starts = (0..queries).step_by(ROWS);
        starts.map(move |i| RowBlock { heads: head..head + 1, queries: i..(i + ROWS).min(queries) })
    };
    let mut blocks: Vec<RowBlock> = (0..group).flat_map(cut).collect();
    blocks.sort_by_key(|block| std::cmp::Reverse(block.queries.start));
    blocks
}

/// Sizes that every kernel needs at hand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) kv_heads: usize,
    pub(super) group: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) depth: usize,
    /// D in units of an operand.
    pub(super) units: usize,
    /// D in whole registers.
    pub(super) vectors: usize,
    /// Row stride of a tile of D columns: D in whole registers and one more, so that rows do not share cache sets.
    pub(super) stride: usize,
    /// Row stride of a tile of scores, likewise.
    pub(super) score_stride: usize,
    pub(super) modalities: usize,
    pub(super) parts: usize,
}

impl Sizes {
    pub(super) fn new<D: Dot<Real = T::Acc>, T: Element>(_: D, problem: &AttendProblem<'_, T>) -> Self {
        let [batch, _, queries, depth] = problem.query.shape();
        let [_, kv_heads, keys, _] = problem.key.shape();
        let lanes = D::Simd::LANES;
        let vectors = depth.div_ceil(lanes);
        Self {
            batch,
            kv_heads,
            group: problem.group(),
            queries,
            keys,
            depth,
            units: depth.div_ceil(D::DEPTH),
            vectors,
            stride: (vectors + 1) * lanes,
            score_stride: KEYS + lanes,
            modalities: problem.modalities(),
            parts: problem.combine.parts(),
        }
    }

    /// Number of key blocks.
    pub(super) fn key_blocks(&self) -> usize {
        self.keys.div_ceil(KEYS)
    }

    /// The keys of a block.
    pub(super) fn key_block(&self, block: usize) -> Range<usize> {
        block * KEYS..((block + 1) * KEYS).min(self.keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_in_one_block() {
        for (group, queries) in [(1, 1), (4, 1), (8, 30), (3, 96), (2, 97), (1, 1000), (200, 1)] {
            let mut seen = vec![0; group * queries];
            for block in row_blocks(group, queries) {
                assert!(block.len() <= ROWS);
                for row in 0..block.len() {
                    let (head, query) = block.row(row);
                    seen[head * queries + query] += 1;
                }
            }
            assert!(seen.iter().all(|&times| times == 1), "group {group}, {queries} queries");
        }
        assert!(row_blocks(0, 5).is_empty() && row_blocks(5, 0).is_empty());
    }
}
