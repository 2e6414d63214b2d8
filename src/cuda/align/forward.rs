//! Plan of forward: unit keys' lengths, bases, maps, aligned keys.

use super::few;
use super::outer::{Cut, Operand};
use super::plan::{Plan, Sizes, THREADS, row_strides};
use crate::cuda::ids::Codes;
use crate::cuda::launch::Launch;
use crate::cuda::problem::{AlignOutputs, AlignProblem, IdsArgument};
use crate::cuda::source::Source;
use crate::cuda::workspace::{Region, Workspace};
use crate::dtype::DType;
use crate::error::Result;
use crate::problem::Basis;

crate::parameters! {
    /// Argument of `unit_norms`.
    pub struct UnitNormsParams {
        /// (B, H, N, D)
        pub key: u64,
        /// 1 / ||k + eps|| (B, H, N).
        pub inverse: u64,
        /// Strides of batch, head, token.
        pub strides: [i64; 3],
        /// H.
        pub heads: i64,
        /// N.
        pub tokens: i64,
        /// B H N.
        pub rows: i64,
        /// Real components of a key.
        pub dim: i64,
        /// Added to each of them.
        pub eps: f64,
    }
}

crate::parameters! {
    /// Argument of `finish_basis`.
    pub struct FinishBasisParams {
        /// (B H, parts, M, D, D)
        pub partials: u64,
        /// (B H, M, D, D); 0: not wanted.
        pub basis: u64,
        /// 1 / ||row of G|| (B H, M, D).
        pub inverse: u64,
        /// Parts of a head.
        pub parts: i64,
        /// B H M D.
        pub rows: i64,
        /// M D.
        pub head_rows: i64,
    }
}

crate::parameters! {
    /// Argument of `maps`.
    pub struct MapsParams {
        /// (B H, M, D, D)
        pub bases: u64,
        /// 1 / ||row of G|| (B H, M, D).
        pub inverse: u64,
        /// (M, D, D)
        pub mix: u64,
        /// (B H, M, D, D)
        pub maps: u64,
        /// M.
        pub modalities: i64,
    }
}

crate::parameters! {
    /// Argument of `align_keys`.
    pub struct AlignKeysParams {
        /// (B, H, N, D)
        pub key: u64,
        /// (B, H, N, D), contiguous.
        pub aligned: u64,
        /// 1 / ||k + eps|| (B, H, N).
        pub inverse: u64,
        /// (M, D, D)
        pub keep: u64,
        /// (B, H, M, D, D)
        pub maps: u64,
        /// Codes of the tokens.
        pub codes: u64,
        /// Strides of batch, head, token of the key.
        pub strides: [i64; 3],
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

/// Intermediate results that forward and backward both have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Common {
    /// Codes of all tokens.
    pub(super) codes: Codes,
    /// Those of the tokens that feed a basis, where they differ.
    pub(super) context: Option<Codes>,
    /// 1 / ||k + eps||
    pub(super) key_norms: Region,
    /// 1 / ||row of G||
    pub(super) row_norms: Region,
    /// X^a
    pub(super) maps: Region,
}

impl Common {
    pub(super) fn new(problem: &AlignProblem, sizes: &Sizes, workspace: &mut Workspace) -> Self {
        let shape = [sizes.batch, sizes.tokens];
        Self {
            codes: Codes::new(workspace, shape),
            context: problem.context.map(|_| Codes::new(workspace, shape)),
            key_norms: workspace.region(sizes.all_heads() * sizes.tokens, sizes.real),
            row_norms: workspace.region(sizes.all_heads() * sizes.modalities * sizes.depth, sizes.real),
            maps: workspace.region(sizes.all_heads() * sizes.squares(), sizes.real),
        }
    }

    /// The codes of the tokens that feed a basis.
    pub(super) fn sources(&self) -> Codes {
        self.context.unwrap_or(self.codes)
    }
}

/// Workspace of forward.
struct Rooms {
    common: Common,
    partials: Region,
    bytes: usize,
}

impl Rooms {
    fn new(problem: &AlignProblem, sizes: &Sizes) -> Self {
        let mut workspace = Workspace::new();
        let common = Common::new(problem, sizes, &mut workspace);
        let matrices = if problem.basis.is_some() { 0 } else { Cut::by_head(problem, sizes).matrices() };
        let partials = workspace.region(matrices * sizes.squares(), sizes.real);
        Self { common, partials, bytes: workspace.bytes() }
    }
}

/// Bytes of workspace that [`forward`] needs.
pub fn forward_workspace(problem: &AlignProblem) -> usize {
    if few::suits(problem) { 0 } else { Rooms::new(problem, &Sizes::new(problem)).bytes }
}

/// Aligned keys and, where none was given, the bases. `workspace` is the address of [`forward_workspace`] bytes.
pub fn forward(problem: &AlignProblem, outputs: &AlignOutputs, workspace: u64) -> Result<Vec<Launch>> {
    if few::suits(problem) {
        return few::forward(problem, outputs);
    }
    let mut plan = Plan::new(problem, workspace);
    let sizes = plan.sizes;
    if sizes.depth == 0 || sizes.all_heads() == 0 {
        return Ok(plan.launches);
    }
    let Rooms { common, partials, .. } = Rooms::new(problem, &sizes);
    plan.tokens(&common)?;
    let bases = match (problem.basis, outputs.basis) {
        (None, Some(basis)) => {
            let key = Operand { tensor: problem.key, unit: true };
            let weight = match problem.kind {
                Basis::Gram => key,
                Basis::Covariance => Operand { tensor: problem.value, unit: false },
            };
            let cut = Cut::by_head(problem, &sizes);
            let sources = common.sources();
            let sources = [sources.codes(workspace), sources.summaries(workspace)];
            let rooms = [common.key_norms.at(workspace), partials.at(workspace)];
            plan.outer_sums([key, weight], cut, sources, rooms)?;
            plan.finish_basis(&common, partials.at(workspace), basis.pointer, cut.parts)?;
            basis.pointer
        }
        (Some(basis), _) => {
            plan.finish_basis(&common, basis.pointer, 0, 1)?;
            basis.pointer
        }
        (None, None) => unreachable!("outputs are checked: there is a basis to write where none is given"),
    };
    plan.maps(&common, bases)?;
    let params = AlignKeysParams {
        key: problem.key.pointer,
        aligned: outputs.aligned.pointer,
        inverse: common.key_norms.at(workspace),
        keep: problem.keep.pointer,
        maps: common.maps.at(workspace),
        codes: common.codes.codes(workspace),
        strides: row_strides(problem.key.long_strides()),
        heads: sizes.heads as i64,
        tokens: sizes.tokens as i64,
        blocks: common.codes.blocks() as i64,
        modalities: sizes.modalities as i64,
        dim: problem.dim as i64,
        eps: problem.eps,
    };
    let count = plan.token_tiles();
    plan.launch((Source::AlignKeys, "align_keys"), &[], count, &params)?;
    Ok(plan.launches)
}

impl Plan<'_> {
    /// What is known of the tokens: codes of their ids, lengths of their keys.
    pub(super) fn tokens(&mut self, common: &Common) -> Result<()> {
        let Self { problem, sizes, base, .. } = *self;
        let argument = (IdsArgument::Modality, problem.modality);
        let contexts = [(Some(common.codes), None), (common.context, problem.context)];
        for (codes, context) in contexts {
            let encode = |codes: Codes| codes.encode(argument, context, sizes.modalities, (problem.record, base));
            self.launches.extend(codes.and_then(encode));
        }
        let rows = sizes.all_heads() * sizes.tokens;
        let params = UnitNormsParams {
            key: problem.key.pointer,
            inverse: common.key_norms.at(base),
            strides: row_strides(problem.key.long_strides()),
            heads: sizes.heads as i64,
            tokens: sizes.tokens as i64,
            rows: rows as i64,
            dim: problem.dim as i64,
            eps: problem.eps,
        };
        self.launch((Source::Basis, "unit_norms"), &[], rows.div_ceil(THREADS as usize / 32), &params)
    }

    /// Parts of bases added, to `basis` where it is not 0, and the norms of their rows.
    pub(super) fn finish_basis(&mut self, common: &Common, partials: u64, basis: u64, parts: usize) -> Result<()> {
        let sizes = self.sizes;
        let head_rows = sizes.modalities * sizes.depth;
        let rows = sizes.all_heads() * head_rows;
        let params = FinishBasisParams {
            partials,
            basis,
            inverse: common.row_norms.at(self.base),
            parts: parts as i64,
            rows: rows as i64,
            head_rows: head_rows as i64,
        };
        self.launch((Source::Basis, "finish_basis"), &[], rows.div_ceil(THREADS as usize / 32), &params)
    }

    /// X^a of every head.
    pub(super) fn maps(&mut self, common: &Common, bases: u64) -> Result<()> {
        let sizes = self.sizes;
        let params = MapsParams {
            bases,
            inverse: common.row_norms.at(self.base),
            mix: self.problem.mix.pointer,
            maps: common.maps.at(self.base),
            modalities: sizes.modalities as i64,
        };
        let count = sizes.all_heads() * sizes.modalities * sizes.tiles();
        self.launch((Source::Maps, "maps"), &[], count, &params)
    }

    /// Tiles of tokens of all heads: `ROWS` of `kernels/tokens.cuh`.
    pub(super) fn token_tiles(&self) -> usize {
        let rows = match self.problem.key.dtype {
            DType::BFloat16 | DType::Float16 if self.sizes.depth > 128 => 64,
            DType::BFloat16 | DType::Float16 => 128,
            _ => 32,
        };
        self.sizes.all_heads() * self.sizes.tokens.div_ceil(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_problem;
    use super::*;
    use crate::cuda::tensor::DeviceTensor;

    fn plan(shape: [usize; 4], given: bool) -> (Vec<&'static str>, usize) {
        let [batch, heads, _, dim] = shape;
        let mut problem = test_problem(shape, 2);
        let basis = DeviceTensor::contiguous(0x1000, DType::Float32, [batch, heads, 2, dim, dim]);
        problem.basis = given.then_some(basis);
        let outputs = AlignOutputs { aligned: problem.key, basis: (!given).then_some(basis) };
        let launches = forward(&problem.validated().unwrap(), &outputs, 0).unwrap();
        (launches.iter().map(|launch| launch.kernel.entry).collect(), forward_workspace(&problem))
    }

    #[test]
    fn what_is_not_needed_is_not_launched() {
        let all = ["encode_ids", "unit_norms", "outer_sums", "finish_basis", "maps", "align_keys"];
        assert_eq!(plan([2, 4, 300, 64], false).0, all);
        assert_eq!(plan([2, 4, 0, 64], false).0, ["outer_sums", "finish_basis", "maps"]);
        assert_eq!(plan([0, 4, 300, 64], false).0, [""; 0]);
        assert_eq!(plan([2, 4, 1, 64], true), (vec!["align_few"], 0));
        let given = plan([2, 4, 300, 64], true);
        assert_eq!(given.0, ["encode_ids", "unit_norms", "finish_basis", "maps", "align_keys"]);
        assert!(given.1 < plan([2, 4, 300, 64], false).1);
    }

    #[test]
    fn a_grid_that_no_launch_can_have_is_an_error() {
        let problem = test_problem([1 << 20, 1 << 10, 8, 8], 254);
        let basis = DeviceTensor::contiguous(0x1000, DType::Float32, [1 << 20, 1 << 10, 254, 8, 8]);
        let outputs = AlignOutputs { aligned: problem.key, basis: Some(basis) };
        let error = forward(&problem, &outputs, 0).unwrap_err().to_string();
        assert!(error.contains("outer_sums") && error.contains("2147483647"), "{error}");
    }
}
