//! Sums of outer products over tokens, in parts that are added in a fixed order.

use super::plan::{Plan, Sizes, row_strides};
use crate::cuda::ids::TOKENS;
use crate::cuda::problem::AlignProblem;
use crate::cuda::source::Source;
use crate::cuda::tensor::DeviceTensor;
use crate::dtype::DType;
use crate::error::Result;

/// A part has at least so many blocks of tokens.
const LEAST_BLOCKS: usize = 2;

/// Blocks of threads that a multiprocessor is given.
const OCCUPANCY: usize = 2;

crate::parameters! {
    /// Argument of `outer_sums`.
    pub struct OuterSumsParams {
        /// (B, H, N, D)
        pub left: u64,
        /// (B, H, N, D)
        pub right: u64,
        /// 1 / ||k + eps|| (B, H, N).
        pub inverse: u64,
        /// Codes of the tokens.
        pub codes: u64,
        /// Their summaries.
        pub summaries: u64,
        /// (groups, parts, M, D, D)
        pub partials: u64,
        /// Strides of batch, head, token.
        pub left_strides: [i64; 3],
        /// The same.
        pub right_strides: [i64; 3],
        /// H.
        pub heads: i64,
        /// N.
        pub tokens: i64,
        /// Blocks of tokens in a row.
        pub blocks: i64,
        /// Blocks of a group, those of all heads one after the other.
        pub group_blocks: i64,
        /// Blocks of a part.
        pub part_blocks: i64,
        /// Parts of a group.
        pub parts: i64,
        /// M.
        pub modalities: i64,
        /// Real components of a key.
        pub dim: i64,
        /// Added to each of them.
        pub eps: f64,
    }
}

crate::parameters! {
    /// Argument of `add_parts`.
    pub struct AddPartsParams {
        /// (groups, parts, size)
        pub partials: u64,
        /// (groups, size)
        pub sums: u64,
        /// Parts of a group.
        pub parts: i64,
        /// Numbers of a part.
        pub size: i64,
        /// Numbers of all groups.
        pub count: i64,
    }
}

/// How a sum over blocks of tokens is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) groups: usize,
    pub(super) group_blocks: usize,
    pub(super) part_blocks: usize,
    pub(super) parts: usize,
}

impl Cut {
    /// A sum for every head.
    pub(super) fn by_head(problem: &AlignProblem, sizes: &Sizes) -> Self {
        Self::new(problem, sizes, [sizes.all_heads(), sizes.tokens.div_ceil(TOKENS)])
    }

    /// One sum over all heads.
    pub(super) fn whole(problem: &AlignProblem, sizes: &Sizes) -> Self {
        Self::new(problem, sizes, [1, sizes.all_heads() * sizes.tokens.div_ceil(TOKENS)])
    }

    fn new(problem: &AlignProblem, sizes: &Sizes, [groups, group_blocks]: [usize; 2]) -> Self {
        let wanted = OCCUPANCY * problem.target.multiprocessors as usize;
        let of_a_part = (groups * sizes.modalities * tiles(problem, sizes)).max(1);
        let parts = wanted.div_ceil(of_a_part).min(group_blocks / LEAST_BLOCKS).max(1);
        let part_blocks = group_blocks.div_ceil(parts).max(1);
        Self { groups, group_blocks, part_blocks, parts: group_blocks.div_ceil(part_blocks).max(1) }
    }

    /// Square matrices of all parts, for one modality.
    pub(super) const fn matrices(&self) -> usize {
        self.groups * self.parts
    }
}

/// Tiles that `outer_sums` cuts a square matrix into.
fn tiles(problem: &AlignProblem, sizes: &Sizes) -> usize {
    let tensor_cores = matches!(problem.key.dtype, DType::BFloat16 | DType::Float16);
    let side = sizes.depth.div_ceil(if tensor_cores && sizes.depth > 64 { 128 } else { 64 });
    side * side
}

/// A factor of the outer products.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    pub(super) tensor: DeviceTensor<4>,
    /// Whether its unit key stands for it.
    pub(super) unit: bool,
}

impl Plan<'_> {
    /// partials = sums of left^T right over the tokens of each modality.
    pub(super) fn outer_sums(
        &mut self,
        [left, right]: [Operand; 2],
        cut: Cut,
        [codes, summaries]: [u64; 2],
        [inverse, partials]: [u64; 2],
    ) -> Result<()> {
        let sizes = self.sizes;
        let params = OuterSumsParams {
            left: left.tensor.pointer,
            right: right.tensor.pointer,
            inverse,
            codes,
            summaries,
            partials,
            left_strides: row_strides(left.tensor.long_strides()),
            right_strides: row_strides(right.tensor.long_strides()),
            heads: sizes.heads as i64,
            tokens: sizes.tokens as i64,
            blocks: sizes.tokens.div_ceil(TOKENS) as i64,
            group_blocks: cut.group_blocks as i64,
            part_blocks: cut.part_blocks as i64,
            parts: cut.parts as i64,
            modalities: sizes.modalities as i64,
            dim: self.problem.dim as i64,
            eps: self.problem.eps,
        };
        let count = cut.matrices() * sizes.modalities * tiles(self.problem, &sizes);
        let options = [("LEFT_UNIT", left.unit.into()), ("RIGHT_UNIT", right.unit.into())];
        self.launch((Source::OuterSums, "outer_sums"), &options, count, &params)
    }

    /// sums (groups, size) = the parts of partials (groups, parts, size), added in order.
    pub(super) fn add_parts(&mut self, [groups, parts, size]: [usize; 3], partials: u64, sums: u64) -> Result<()> {
        let count = groups * size;
        let params = AddPartsParams { partials, sums, parts: parts as i64, size: size as i64, count: count as i64 };
        self.launch((Source::Basis, "add_parts"), &[], count.div_ceil(super::plan::THREADS as usize), &params)
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_problem;
    use super::*;

    #[test]
    fn parts_cover_every_block() {
        for tokens in [0, 1, 64, 65, 4096, 100_000] {
            for [batch, heads] in [[0, 4], [1, 1], [1, 8], [16, 8]] {
                let problem = test_problem([batch, heads, tokens, 128], 2);
                let sizes = Sizes::new(&problem);
                for cut in [Cut::by_head(&problem, &sizes), Cut::whole(&problem, &sizes)] {
                    assert!(cut.parts >= 1 && cut.part_blocks * cut.parts >= cut.group_blocks, "{cut:?}");
                    assert!(cut.part_blocks * (cut.parts - 1) <= cut.group_blocks, "{cut:?}");
                    assert_eq!(cut.groups * cut.group_blocks, batch * heads * tokens.div_ceil(TOKENS));
                }
            }
        }
    }
}
