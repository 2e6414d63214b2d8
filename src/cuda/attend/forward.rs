//! The plan of forward: one kernel over blocks of query rows, or over shares of the keys where the queries are few.

use super::inputs::{AttendInputs, Prepared, defines, fits, fitting, tile_bytes};
use super::rows;
use super::sum::sum;
use crate::cuda::launch::{Kernel, Launch, Parameters, blocks};
use crate::cuda::problem::{AttendOutputs, AttendProblem, arithmetic};
use crate::cuda::source::Source;
use crate::cuda::workspace::{Region, Workspace};
use crate::dtype::DType;
use crate::error::Result;
use crate::problem::{Combine, MassBy};

/// Most queries of a problem whose keys are split: a decoding step, a few tokens drafted or prompted.
const FEW_QUERIES: usize = 16;

/// Blocks of one split problem for each multiprocessor: what it can hold at once.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// Rows of which a warp writes one each in `attend_combine`.
const COMBINE_WARPS: u32 = 4;

crate::parameters! {
    /// Argument of `attend_forward`.
    pub struct ForwardParams {
        /// What all kernels read.
        pub inputs: AttendInputs,
        /// o (B, Hq, Nq, D)
        pub out: u64,
        /// (B, Hq, 2, Nq, D)
        pub parts: u64,
        /// (B, Hq, parts, Nq)
        pub logsumexp: u64,
        /// (B, Hq, Nq, 3)
        pub mass: u64,
        /// (B, Hkv, splits, rows, D)
        pub partial_sums: u64,
        /// (B, Hkv, splits, rows, 3)
        pub partial_totals: u64,
        /// Key tiles of a split.
        pub tiles: i64,
    }
}

crate::parameters! {
    /// Argument of `attend_combine`.
    pub struct CombineParams {
        /// What all kernels read.
        pub inputs: AttendInputs,
        /// (B, Hkv, splits, rows, D)
        pub partial_sums: u64,
        /// (B, Hkv, splits, rows, 3)
        pub partial_totals: u64,
        /// o (B, Hq, Nq, D)
        pub out: u64,
        /// (B, Hq, 2, Nq, D)
        pub parts: u64,
        /// (B, Hq, parts, Nq)
        pub logsumexp: u64,
        /// (B, Hq, Nq, 3)
        pub mass: u64,
        /// Splits of the keys.
        pub splits: i64,
        /// B Hkv rows
        pub count: i64,
    }
}

/// How rows and keys are cut into blocks and tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    warps: usize,
    /// Tiles of 16 rows that a warp has.
    row_tiles: usize,
    /// Keys of a tile.
    keys: usize,
    /// Key tiles of a split, and how many splits there are; `None`: keys are not split.
    split: Option<(usize, usize)>,
}

impl Cut {
    fn new(problem: &AttendProblem) -> Self {
        let [b, _, nq, dim] = problem.query.shape;
        let [_, hkv, nk, _] = problem.key.shape;
        let dtype = problem.query.dtype;
        let (most_warps, keys) = match dtype {
            DType::Float64 => (2, 16),
            DType::Float32 => (4, 32),
            _ => (4, 64),
        };
        let rows = problem.group() * nq;
        if nq <= FEW_QUERIES && nk > keys {
            let warps = rows.div_ceil(16).clamp(1, most_warps);
            let keys = fitting(problem, keys, |keys| shared_bytes(problem, 16 * warps, keys));
            let tiles = nk.div_ceil(keys);
            let units = (b * hkv * rows.div_ceil(16 * warps)).max(1);
            let wanted = (problem.target.multiprocessors as usize * BLOCKS_PER_MULTIPROCESSOR).div_ceil(units);
            let each = tiles.div_ceil(wanted.min(tiles)).max(2);
            return Self { warps, row_tiles: 1, keys, split: Some((each, tiles.div_ceil(each))) };
        }
        // 32 rows a warp halve the traffic of the key tiles in shared memory; beyond 128 columns registers do not hold their sums.
        let row_tiles = if dtype.size() == 2 && dim <= 128 && nq > 64 { 2 } else { 1 };
        let keys = fitting(problem, keys, |keys| shared_bytes(problem, 16 * most_warps * row_tiles, keys));
        Self { warps: most_warps, row_tiles, keys, split: None }
    }

    const fn rows(&self) -> usize {
        16 * self.warps * self.row_tiles
    }
}

/// Shared memory of a block: its queries, a tile of keys, one of values.
fn shared_bytes(problem: &AttendProblem, rows: usize, keys: usize) -> usize {
    tile_bytes(rows + 2 * keys, problem.query.dtype, problem.query.shape[3])
}

/// The regions of forward's workspace.
struct Plan {
    prepared: Prepared,
    cut: Cut,
    /// Sums and totals of the splits.
    partial: Option<[Region; 2]>,
    bytes: usize,
}

impl Plan {
    fn new(problem: &AttendProblem) -> Self {
        let mut workspace = Workspace::new();
        let prepared = Prepared::new(&mut workspace, problem);
        let cut = Cut::new(problem);
        let partial = cut.split.map(|(_, splits)| {
            let [b, hq, nq, dim] = problem.query.shape;
            let (rows, size) = (splits * b * hq * nq, arithmetic(problem.query.dtype).size());
            [workspace.region(rows * dim, size), workspace.region(3 * rows, size)]
        });
        Self { prepared, cut, partial, bytes: workspace.bytes() }
    }
}

/// Bytes of the workspace that [`forward`] needs.
pub fn forward_workspace(problem: &AttendProblem) -> usize {
    Plan::new(problem).bytes
}

/// o, logsumexp and mass of a validated problem, in a workspace of [`forward_workspace`] bytes.
pub fn forward(problem: &AttendProblem, outputs: &AttendOutputs, workspace: u64) -> Result<Vec<Launch>> {
    if outputs.logsumexp.count() == 0 {
        return Ok(Vec::new());
    }
    let plan = Plan::new(problem);
    let mut launches = plan.prepared.launches(problem, workspace);
    let inputs = plan.prepared.inputs(problem, workspace);
    let parts: &[i64] = match problem.combine {
        Combine::Joint => &[0],
        Combine::Split => &[1, 2],
    };
    for &part in parts {
        softmax(problem, outputs, (&plan, workspace), (inputs, part), &mut launches)?;
    }
    if let Some(parts) = outputs.parts {
        launches.extend(sum(parts, outputs.out));
    }
    if let Some((MassBy::Modality, mass)) = outputs.mass {
        launches.push(rows::mass(problem, &inputs, outputs.logsumexp, mass)?);
    }
    Ok(launches)
}

/// The launches of one softmax.
fn softmax(
    problem: &AttendProblem,
    outputs: &AttendOutputs,
    (plan, workspace): (&Plan, u64),
    (inputs, part): (AttendInputs, i64),
    launches: &mut Vec<Launch>,
) -> Result<()> {
    let [b, hq, nq, _] = problem.query.shape;
    let (hkv, rows) = (problem.key.shape[1], problem.group() * nq);
    let cut = plan.cut;
    let mass = match outputs.mass {
        Some((MassBy::Relation, mass)) => mass.pointer,
        _ => 0,
    };
    let parts = outputs.parts.map_or(0, |parts| parts.pointer);
    let [partial_sums, partial_totals] =
        plan.partial.map_or([0; 2], |regions| regions.map(|region| region.at(workspace)));
    let (tiles, splits) = cut.split.unwrap_or((0, 1));
    let params = ForwardParams {
        inputs,
        out: outputs.out.pointer,
        parts,
        logsumexp: outputs.logsumexp.pointer,
        mass,
        partial_sums,
        partial_totals,
        tiles: tiles as i64,
    };
    let mut shared_defines = defines(problem);
    shared_defines.extend([("PART", part), ("MASS", i64::from(mass != 0))]);
    let mut defines = shared_defines.clone();
    defines.extend([
        ("WARPS", cut.warps as i64),
        ("ROW_TILES", cut.row_tiles as i64),
        ("KEYS", cut.keys as i64),
        ("SPLIT", i64::from(cut.split.is_some())),
    ]);
    let grid = match cut.split {
        None => [(b * hq) as u32, blocks(nq, cut.rows()), 1],
        Some(_) => [(b * hkv) as u32, blocks(rows, cut.rows()), splits as u32],
    };
    launches.push(fits(
        problem,
        Launch {
            kernel: Kernel { source: Source::AttendForward, entry: "attend_forward", defines },
            grid,
            block: 32 * cut.warps as u32,
            shared: shared_bytes(problem, cut.rows(), cut.keys) as u32,
            params: params.bytes(),
        },
    )?);
    if cut.split.is_some() {
        let count = b * hkv * rows;
        let params = CombineParams {
            inputs,
            partial_sums,
            partial_totals,
            out: outputs.out.pointer,
            parts,
            logsumexp: outputs.logsumexp.pointer,
            mass,
            splits: splits as i64,
            count: count as i64,
        };
        let mut defines = shared_defines;
        defines.extend([("WARPS", i64::from(COMBINE_WARPS)), ("KEYS", cut.keys as i64)]);
        launches.push(Launch {
            kernel: Kernel { source: Source::AttendCombine, entry: "attend_combine", defines },
            grid: [blocks(count, COMBINE_WARPS as usize), 1, 1],
            block: 32 * COMBINE_WARPS,
            shared: 0,
            params: params.bytes(),
        });
    }
    Ok(())
}
