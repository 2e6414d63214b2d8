//! Plan of forward for few tokens with a basis given, as in a decoding step: one launch, no workspace.

use super::plan::{Plan, row_strides};
use crate::cuda::ids::integer_kind;
use crate::cuda::launch::Launch;
use crate::cuda::problem::{AlignOutputs, AlignProblem};
use crate::cuda::source::Source;
use crate::dtype::DType;
use crate::error::Result;

/// Most tokens of a row that come this way: a warp of the kernel takes each, and their rows fit into its shared memory.
fn most_tokens(problem: &AlignProblem) -> usize {
    if problem.key.dtype == DType::Float64 { 4 } else { 8 }
}

crate::parameters! {
    /// Argument of `align_few`.
    pub struct AlignFewParams {
        /// (B, H, N, D)
        pub key: u64,
        /// (B, H, N, D), contiguous.
        pub aligned: u64,
        /// Ids (B, N) of any integer dtype.
        pub ids: u64,
        /// (B, H, M, D, D)
        pub bases: u64,
        /// (M, D, D)
        pub keep: u64,
        /// (M, D, D)
        pub mix: u64,
        /// The device's record of ids out of range.
        pub record: u64,
        /// Strides of batch, head, token of the key.
        pub strides: [i64; 3],
        /// Strides of the ids.
        pub ids_strides: [i64; 2],
        /// H.
        pub heads: i64,
        /// N.
        pub tokens: i64,
        /// M.
        pub modalities: i64,
        /// Real components of a key.
        pub dim: i64,
        /// Added to each of them.
        pub eps: f64,
        /// Integer dtype of the ids.
        pub kind: i64,
    }
}

/// Whether a problem comes this way.
pub(super) fn suits(problem: &AlignProblem) -> bool {
    problem.basis.is_some() && problem.key.shape[2] <= most_tokens(problem)
}

/// The aligned keys.
pub(super) fn forward(problem: &AlignProblem, outputs: &AlignOutputs) -> Result<Vec<Launch>> {
    let mut plan = Plan::new(problem, 0);
    let sizes = plan.sizes;
    let params = AlignFewParams {
        key: problem.key.pointer,
        aligned: outputs.aligned.pointer,
        ids: problem.modality.pointer,
        bases: problem.basis.map_or(0, |basis| basis.pointer),
        keep: problem.keep.pointer,
        mix: problem.mix.pointer,
        record: problem.record,
        strides: row_strides(problem.key.long_strides()),
        ids_strides: problem.modality.long_strides(),
        heads: sizes.heads as i64,
        tokens: sizes.tokens as i64,
        modalities: sizes.modalities as i64,
        dim: problem.dim as i64,
        eps: problem.eps,
        kind: i64::from(integer_kind(problem.modality.dtype)),
    };
    let count = if outputs.aligned.count() == 0 { 0 } else { sizes.all_heads() };
    let options = [("COUNT", sizes.tokens.next_power_of_two() as i64)];
    plan.launch((Source::AlignFew, "align_few"), &options, count, &params)?;
    Ok(plan.launches)
}
