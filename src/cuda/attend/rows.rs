//! Launches of `attend_rows`, the second pass over query rows: gradients of queries, or mass by modality.

use super::inputs::{AttendInputs, defines, fits, fitting, tile_bytes};
use crate::cuda::launch::{Kernel, Launch, Parameters, blocks};
use crate::cuda::problem::AttendProblem;
use crate::cuda::source::Source;
use crate::cuda::tensor::DeviceTensor;
use crate::dtype::DType;
use crate::error::Result;

crate::parameters! {
    /// Argument of `attend_rows`.
    pub struct RowsParams {
        /// What all kernels read.
        pub inputs: AttendInputs,
        /// (B, Hq, Nq, D)
        pub out_gradient: u64,
        /// (B, Hq, parts, Nq)
        pub logsumexp: u64,
        /// (B, Hq, parts, Nq)
        pub delta: u64,
        /// (B, Hq, Nq, D)
        pub query_gradient: u64,
        /// (B, Hq, Nq, columns)
        pub sums: u64,
        /// Of batch, head and query.
        pub out_gradient_strides: [i64; 3],
        /// Columns of the sums.
        pub columns: i64,
    }
}

/// What a pass writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// Gradients of the queries.
    Gradient,
    /// The same, and sums of dS by the modality of the key.
    GradientAndSums,
    /// Sums of P by the modality of the key.
    Mass,
}

/// The launch of one pass.
pub(super) fn launch(problem: &AttendProblem, params: &RowsParams, pass: Pass) -> Result<Launch> {
    let [b, hq, nq, dim] = problem.query.shape;
    let dtype = problem.query.dtype;
    let is_mass = pass == Pass::Mass;
    let (warps, row_tiles, keys) = match dtype {
        DType::Float64 => (if dim <= 128 { 2 } else { 1 }, 1, 16),
        DType::Float32 => (if dim <= 128 { 4 } else { 2 }, 1, 32),
        // 32 rows a warp halve the traffic of the key tiles in shared memory; half as many keys leave registers for them.
        _ if dim <= 128 && nq > 64 => (4, 2, 32),
        _ => (4, 1, 64),
    };
    let rows = 16 * warps * row_tiles;
    let tiles = if is_mass { 1 } else { 2 };
    let shared = |stages: usize, keys: usize| tile_bytes(tiles * (rows + stages * keys), dtype, dim);
    let two_stages = dtype.size() == 2 && dim <= 128 && shared(2, keys) <= problem.target.shared_limit as usize;
    let stages = if two_stages { 2 } else { 1 };
    let keys = fitting(problem, keys, |keys| shared(stages, keys));
    let mut defines = defines(problem);
    defines.extend([
        ("PARTS", problem.combine.parts() as i64),
        ("MASS", i64::from(is_mass)),
        ("BIAS_SUMS", i64::from(pass == Pass::GradientAndSums)),
        ("WARPS", warps as i64),
        ("ROW_TILES", row_tiles as i64),
        ("KEYS", keys as i64),
        ("STAGES", stages as i64),
    ]);
    fits(
        problem,
        Launch {
            kernel: Kernel { source: Source::AttendRows, entry: "attend_rows", defines },
            grid: [(b * hq) as u32, blocks(nq, rows), 1],
            block: 32 * warps as u32,
            shared: shared(stages, keys) as u32,
            params: params.bytes(),
        },
    )
}

/// Attention mass (B, Hq, Nq, M + 1) by the modality of the key, from the logsumexp.
pub(super) fn mass(
    problem: &AttendProblem,
    inputs: &AttendInputs,
    logsumexp: DeviceTensor<4>,
    mass: DeviceTensor<4>,
) -> Result<Launch> {
    let params = RowsParams {
        inputs: *inputs,
        out_gradient: 0,
        logsumexp: logsumexp.pointer,
        delta: 0,
        query_gradient: 0,
        sums: mass.pointer,
        out_gradient_strides: [0; 3],
        columns: mass.shape[3] as i64,
    };
    launch(problem, &params, Pass::Mass)
}
