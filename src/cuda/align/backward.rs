//! Plan of backward: maps, then keys and values, through the row norms and the bases.

use super::forward::Common;
use super::outer::{Cut, Operand};
use super::plan::{Plan, Sizes, THREADS, row_strides};
use crate::cuda::launch::Launch;
use crate::cuda::problem::{AlignGradients, AlignProblem, AlignUpstream};
use crate::cuda::source::Source;
use crate::cuda::workspace::{Region, Workspace};
use crate::error::Result;
use crate::problem::Basis;

crate::parameters! {
    /// Argument of `mix_gradient`.
    pub struct MixGradientParams {
        /// (B H, M, D, D)
        pub bases: u64,
        /// 1 / ||row of G|| (B H, M, D).
        pub inverse: u64,
        /// Gradient of the maps (B H, M, D, D).
        pub d_maps: u64,
        /// (parts, M, D, D)
        pub partials: u64,
        /// B H.
        pub heads: i64,
        /// Heads of a part.
        pub part_heads: i64,
        /// M.
        pub modalities: i64,
    }
}

crate::parameters! {
    /// Argument of `others_gradient`.
    pub struct OthersGradientParams {
        /// Gradient of the maps (B H, M, D, D).
        pub d_maps: u64,
        /// (M, D, D)
        pub mix: u64,
        /// Gradient of T^a (B H, M, D, D).
        pub d_others: u64,
        /// M.
        pub modalities: i64,
    }
}

crate::parameters! {
    /// Argument of `basis_gradient`.
    pub struct BasisGradientParams {
        /// (B H, M, D, D)
        pub bases: u64,
        /// 1 / ||row of G|| (B H, M, D).
        pub inverse: u64,
        /// Gradient of T^a (B H, M, D, D).
        pub d_others: u64,
        /// Gradient of the returned basis (B H, M, D, D); 0: none.
        pub d_returned: u64,
        /// Gradient of G (B H, M, D, D).
        pub d_bases: u64,
        /// B H M D.
        pub rows: i64,
        /// M.
        pub modalities: i64,
    }
}

crate::parameters! {
    /// Argument of `token_gradients`.
    pub struct TokenGradientsParams {
        /// (B, H, N, D)
        pub key: u64,
        /// (B, H, N, D)
        pub value: u64,
        /// (B, H, N, D)
        pub d_aligned: u64,
        /// 1 / ||k + eps|| (B, H, N).
        pub inverse: u64,
        /// (M, D, D)
        pub keep: u64,
        /// (B, H, M, D, D)
        pub maps: u64,
        /// Gradient of G (B, H, M, D, D).
        pub d_bases: u64,
        /// Codes of all tokens.
        pub codes: u64,
        /// Codes of those that feed a basis.
        pub sources: u64,
        /// (B, H, N, D), contiguous.
        pub d_key: u64,
        /// (B, H, N, D), contiguous.
        pub d_value: u64,
        /// Strides of batch, head, token.
        pub key_strides: [i64; 3],
        /// The same.
        pub value_strides: [i64; 3],
        /// The same.
        pub d_aligned_strides: [i64; 3],
        /// H.
        pub heads: i64,
        /// N.
        pub tokens: i64,
        /// Blocks of codes in a row.
        pub blocks: i64,
        /// M.
        pub modalities: i64,
        /// Real components of a key.
        pub dim: i64,
        /// Added to each of them.
        pub eps: f64,
    }
}

/// Workspace of backward.
struct Rooms {
    common: Common,
    /// dX^a
    d_maps: Region,
    /// dT^a
    d_others: Region,
    /// dG^m
    d_bases: Region,
    /// What is summed in parts, one sum after the other.
    partials: Region,
    bytes: usize,
}

impl Rooms {
    fn new(problem: &AlignProblem, sizes: &Sizes) -> Self {
        let mut workspace = Workspace::new();
        let common = Common::new(problem, sizes, &mut workspace);
        let mut squares = |matrices: usize| workspace.region(matrices * sizes.squares(), sizes.real);
        let heads = sizes.all_heads();
        let (d_maps, d_others, d_bases) = (squares(heads), squares(heads), squares(heads));
        let cuts = [Cut::by_head(problem, sizes), Cut::whole(problem, sizes)];
        let most = cuts.iter().map(Cut::matrices).chain([mix_parts(problem, sizes).0]).max();
        let partials = squares(most.unwrap_or(0));
        Self { common, d_maps, d_others, d_bases, partials, bytes: workspace.bytes() }
    }
}

/// How many parts the gradient of mix is summed in, and the heads of a part.
fn mix_parts(problem: &AlignProblem, sizes: &Sizes) -> (usize, usize) {
    let wanted = problem.target.multiprocessors as usize;
    let parts = wanted.div_ceil((sizes.modalities * sizes.tiles()).max(1)).min(sizes.all_heads()).max(1);
    let part_heads = sizes.all_heads().div_ceil(parts).max(1);
    (sizes.all_heads().div_ceil(part_heads).max(1), part_heads)
}

/// Bytes of workspace that [`backward`] needs.
pub fn backward_workspace(problem: &AlignProblem) -> usize {
    Rooms::new(problem, &Sizes::new(problem)).bytes
}

/// Gradients of key, value, keep, mix and a given basis. The problem's basis is G as forward used it; `workspace` is the
/// address of [`backward_workspace`] bytes.
pub fn backward(
    problem: &AlignProblem,
    upstream: &AlignUpstream,
    gradients: &AlignGradients,
    workspace: u64,
) -> Result<Vec<Launch>> {
    let mut plan = Plan::new(problem, workspace);
    if plan.sizes.depth == 0 {
        return Ok(plan.launches);
    }
    let rooms = Rooms::new(problem, &plan.sizes);
    let bases = problem.basis.map_or(0, |basis| basis.pointer);
    plan.tokens(&rooms.common)?;
    plan.finish_basis(&rooms.common, bases, 0, 1)?;
    plan.maps(&rooms.common, bases)?;
    plan.parameter_gradients(&rooms, upstream, gradients)?;
    plan.basis_gradient(&rooms, upstream, gradients)?;
    plan.token_gradients(&rooms, upstream, gradients)?;
    Ok(plan.launches)
}

impl Plan<'_> {
    /// d keep, dX and from it d mix.
    fn parameter_gradients(
        &mut self,
        rooms: &Rooms,
        upstream: &AlignUpstream,
        gradients: &AlignGradients,
    ) -> Result<()> {
        let Self { problem, sizes, base, .. } = *self;
        let (common, partials, size) = (rooms.common, rooms.partials.at(base), sizes.squares());
        let codes = [common.codes.codes(base), common.codes.summaries(base)];
        let at = [common.key_norms.at(base), partials];
        let operand = |tensor, unit| Operand { tensor, unit };

        let cut = Cut::whole(problem, &sizes);
        self.outer_sums([operand(problem.key, false), operand(upstream.aligned, false)], cut, codes, at)?;
        self.add_parts([1, cut.parts, size], partials, gradients.keep.pointer)?;

        let cut = Cut::by_head(problem, &sizes);
        let d_maps = rooms.d_maps.at(base);
        self.outer_sums([operand(problem.key, true), operand(upstream.aligned, false)], cut, codes, at)?;
        self.add_parts([cut.groups, cut.parts, size], partials, d_maps)?;

        let (parts, part_heads) = mix_parts(problem, &sizes);
        let params = MixGradientParams {
            bases: problem.basis.map_or(0, |basis| basis.pointer),
            inverse: common.row_norms.at(base),
            d_maps,
            partials,
            heads: sizes.all_heads() as i64,
            part_heads: part_heads as i64,
            modalities: sizes.modalities as i64,
        };
        let count = parts * sizes.modalities * sizes.tiles();
        self.launch((Source::MapGradients, "mix_gradient"), &[], count, &params)?;
        self.add_parts([1, parts, size], partials, gradients.mix.pointer)
    }

    /// dT and from it dG, which goes to the caller where the basis was given.
    fn basis_gradient(&mut self, rooms: &Rooms, upstream: &AlignUpstream, gradients: &AlignGradients) -> Result<()> {
        let Self { problem, sizes, base, .. } = *self;
        let d_others = rooms.d_others.at(base);
        let modalities = sizes.modalities as i64;
        let params =
            OthersGradientParams { d_maps: rooms.d_maps.at(base), mix: problem.mix.pointer, d_others, modalities };
        let count = sizes.all_heads() * sizes.modalities * sizes.tiles();
        self.launch((Source::MapGradients, "others_gradient"), &[], count, &params)?;

        let rows = sizes.all_heads() * sizes.modalities * sizes.depth;
        let params = BasisGradientParams {
            bases: problem.basis.map_or(0, |basis| basis.pointer),
            inverse: rooms.common.row_norms.at(base),
            d_others,
            d_returned: upstream.basis.map_or(0, |basis| basis.pointer),
            d_bases: gradients.basis.map_or(rooms.d_bases.at(base), |basis| basis.pointer),
            rows: rows as i64,
            modalities,
        };
        self.launch((Source::MapGradients, "basis_gradient"), &[], rows.div_ceil(THREADS as usize / 32), &params)
    }

    /// dk and dv.
    fn token_gradients(&mut self, rooms: &Rooms, upstream: &AlignUpstream, gradients: &AlignGradients) -> Result<()> {
        let Self { problem, sizes, base, .. } = *self;
        let params = TokenGradientsParams {
            key: problem.key.pointer,
            value: problem.value.pointer,
            d_aligned: upstream.aligned.pointer,
            inverse: rooms.common.key_norms.at(base),
            keep: problem.keep.pointer,
            maps: rooms.common.maps.at(base),
            d_bases: rooms.d_bases.at(base),
            codes: rooms.common.codes.codes(base),
            sources: rooms.common.sources().codes(base),
            d_key: gradients.key.pointer,
            d_value: gradients.value.pointer,
            key_strides: row_strides(problem.key.long_strides()),
            value_strides: row_strides(problem.value.long_strides()),
            d_aligned_strides: row_strides(upstream.aligned.long_strides()),
            heads: sizes.heads as i64,
            tokens: sizes.tokens as i64,
            blocks: rooms.common.codes.blocks() as i64,
            modalities: sizes.modalities as i64,
            dim: problem.dim as i64,
            eps: problem.eps,
        };
        let options = [("GRAM", (problem.kind == Basis::Gram).into()), ("COMPUTED", upstream.computed.into())];
        let count = self.token_tiles();
        self.launch((Source::TokenGradients, "token_gradients"), &options, count, &params)
    }
}
