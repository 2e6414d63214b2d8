//! The plan of backward: delta and d sink, then dK and dV by blocks of keys, dQ by blocks of queries, d bias from its row sums.

use super::inputs::{AttendInputs, Prepared, defines, fits, fitting, tile_bytes};
use super::rows::{self, Pass, RowsParams};
use crate::cuda::launch::{Kernel, Launch, Parameters, blocks};
use crate::cuda::problem::{AttendGradients, AttendProblem, AttendUpstream, arithmetic};
use crate::cuda::source::Source;
use crate::cuda::tensor::dtype_code;
use crate::cuda::workspace::{Region, Workspace};
use crate::dtype::DType;
use crate::error::Result;
use crate::problem::Combine;

/// Rows of which a warp takes one each in `attend_delta`.
const DELTA_WARPS: u32 = 4;

crate::parameters! {
    /// Argument of `attend_delta`.
    pub struct DeltaParams {
        /// What all kernels read.
        pub inputs: AttendInputs,
        /// (B, Hq, Nq, D)
        pub out_gradient: u64,
        /// (B, Hq, Nq, D)
        pub out: u64,
        /// (B, Hq, 2, Nq, D)
        pub parts: u64,
        /// (B, Hq, parts, Nq)
        pub logsumexp: u64,
        /// (B, Hq, parts, Nq)
        pub delta: u64,
        /// (B, Hq, Nq, parts)
        pub sink_gradient: u64,
        /// Of batch, head and query.
        pub out_gradient_strides: [i64; 3],
        /// B Hq Nq
        pub count: i64,
    }
}

crate::parameters! {
    /// Argument of `attend_keys`.
    pub struct KeysParams {
        /// What all kernels read.
        pub inputs: AttendInputs,
        /// (B, Hq, Nq, D)
        pub out_gradient: u64,
        /// (B, Hq, parts, Nq)
        pub logsumexp: u64,
        /// (B, Hq, parts, Nq)
        pub delta: u64,
        /// (B, Hkv, Nk, D)
        pub key_gradient: u64,
        /// (B, Hkv, Nk, D)
        pub value_gradient: u64,
        /// Of batch, head and query.
        pub out_gradient_strides: [i64; 3],
    }
}

crate::parameters! {
    /// Argument of `attend_bias`.
    pub struct BiasParams {
        /// (B, Hq, Nq, M)
        pub sums: u64,
        /// Codes of the queries.
        pub codes: u64,
        /// (B, Hq, M, M)
        pub bias_gradient: u64,
        /// Nq
        pub queries: i64,
        /// M
        pub modalities: i64,
        /// Hq
        pub heads: i64,
    }
}

/// The regions of backward's workspace.
struct Plan {
    prepared: Prepared,
    /// delta (B, Hq, parts, Nq)
    delta: Region,
    /// Sums of dS (B, Hq, Nq, M); nothing without a bias table.
    sums: Region,
    bytes: usize,
}

impl Plan {
    fn new(problem: &AttendProblem) -> Self {
        let [b, hq, nq, _] = problem.query.shape;
        let (rows, size) = (b * hq * nq, arithmetic(problem.query.dtype).size());
        let mut workspace = Workspace::new();
        let prepared = Prepared::new(&mut workspace, problem);
        let delta = workspace.region(problem.combine.parts() * rows, size);
        let sums = workspace.region(problem.bias.map_or(0, |bias| bias.shape[2]) * rows, size);
        Self { prepared, delta, sums, bytes: workspace.bytes() }
    }
}

/// Bytes of the workspace that [`backward`] needs.
pub fn backward_workspace(problem: &AttendProblem) -> usize {
    Plan::new(problem).bytes
}

/// Gradients of a validated problem, in a workspace of [`backward_workspace`] bytes. The same bits every time.
pub fn backward(
    problem: &AttendProblem,
    upstream: &AttendUpstream,
    gradients: &AttendGradients,
    workspace: u64,
) -> Result<Vec<Launch>> {
    let plan = Plan::new(problem);
    let mut launches = plan.prepared.launches(problem, workspace);
    let inputs = plan.prepared.inputs(problem, workspace);
    let delta = plan.delta.at(workspace);
    if upstream.out.count() > 0 {
        launches.extend(deltas(problem, upstream, gradients, (inputs, delta)));
    }
    if gradients.key.count() > 0 {
        keys(problem, upstream, gradients, (inputs, delta), &mut launches)?;
    }
    let [d0, d1, d2, _] = upstream.out_gradient.long_strides();
    if upstream.out.count() > 0 {
        let params = RowsParams {
            inputs,
            out_gradient: upstream.out_gradient.pointer,
            logsumexp: upstream.logsumexp.pointer,
            delta,
            query_gradient: gradients.query.pointer,
            sums: plan.sums.at(workspace),
            out_gradient_strides: [d0, d1, d2],
            columns: gradients.bias.map_or(0, |bias| bias.shape[2] as i64),
        };
        let pass = if gradients.bias.is_some() { Pass::GradientAndSums } else { Pass::Gradient };
        launches.push(rows::launch(problem, &params, pass)?);
    }
    if let Some(bias) = gradients.bias.filter(|bias| bias.count() > 0) {
        let [b, hq, m, _] = bias.shape;
        let params = BiasParams {
            sums: plan.sums.at(workspace),
            codes: plan.prepared.query_codes(workspace),
            bias_gradient: bias.pointer,
            queries: problem.query.shape[2] as i64,
            modalities: m as i64,
            heads: hq as i64,
        };
        let defines = vec![("DTYPE", dtype_code(bias.dtype))];
        launches.push(Launch {
            kernel: Kernel { source: Source::AttendBias, entry: "attend_bias", defines },
            grid: [(b * hq * m) as u32, 1, 1],
            block: 128,
            shared: 0,
            params: params.bytes(),
        });
    }
    Ok(launches)
}

/// delta and d sink of every softmax.
fn deltas(
    problem: &AttendProblem,
    upstream: &AttendUpstream,
    gradients: &AttendGradients,
    (inputs, delta): (AttendInputs, u64),
) -> Vec<Launch> {
    let [d0, d1, d2, _] = upstream.out_gradient.long_strides();
    let [b, hq, nq, dim] = problem.query.shape;
    let params = DeltaParams {
        inputs,
        out_gradient: upstream.out_gradient.pointer,
        out: upstream.out.pointer,
        parts: upstream.parts.map_or(0, |parts| parts.pointer),
        logsumexp: upstream.logsumexp.pointer,
        delta,
        sink_gradient: gradients.sink.map_or(0, |sink| sink.pointer),
        out_gradient_strides: [d0, d1, d2],
        count: (b * hq * nq) as i64,
    };
    let parts: &[i64] = match problem.combine {
        Combine::Joint => &[0],
        Combine::Split => &[1, 2],
    };
    let launch = |&part: &i64| {
        let (dtype, warps) = (dtype_code(problem.query.dtype), i64::from(DELTA_WARPS));
        let defines = vec![("DTYPE", dtype), ("HEAD_DIM", dim as i64), ("PART", part), ("WARPS", warps)];
        Launch {
            kernel: Kernel { source: Source::AttendDelta, entry: "attend_delta", defines },
            grid: [blocks(b * hq * nq, DELTA_WARPS as usize), 1, 1],
            block: 32 * DELTA_WARPS,
            shared: 0,
            params: params.bytes(),
        }
    };
    parts.iter().map(launch).collect()
}

/// dK and dV: in one launch where the registers hold the sums of both, else one after the other.
fn keys(
    problem: &AttendProblem,
    upstream: &AttendUpstream,
    gradients: &AttendGradients,
    (inputs, delta): (AttendInputs, u64),
    launches: &mut Vec<Launch>,
) -> Result<()> {
    let [d0, d1, d2, _] = upstream.out_gradient.long_strides();
    let [b, hkv, nk, dim] = problem.key.shape;
    let (dtype, parts) = (problem.query.dtype, problem.combine.parts());
    let (warps, queries, most_for_both) = match dtype {
        DType::Float64 => (if dim <= 128 { 2 } else { 1 }, 16, 64),
        DType::Float32 => (if dim <= 128 { 4 } else { 2 }, 32, 128),
        _ => (4, 64, 128),
    };
    let shared = |stages: usize, queries: usize| {
        let numbers = 2 * stages * parts * queries * arithmetic(dtype).size();
        tile_bytes(2 * (16 * warps + stages * queries), dtype, dim) + numbers
    };
    let two_stages = dtype.size() == 2 && dim <= 128 && shared(2, queries) <= problem.target.shared_limit as usize;
    let stages = if two_stages { 2 } else { 1 };
    let queries = fitting(problem, queries, |queries| shared(stages, queries));
    let params = KeysParams {
        inputs,
        out_gradient: upstream.out_gradient.pointer,
        logsumexp: upstream.logsumexp.pointer,
        delta,
        key_gradient: gradients.key.pointer,
        value_gradient: gradients.value.pointer,
        out_gradient_strides: [d0, d1, d2],
    };
    let outputs: &[i64] = if dim <= most_for_both { &[3] } else { &[1, 2] };
    for &output in outputs {
        let mut defines = defines(problem);
        defines.extend([
            ("PARTS", parts as i64),
            ("WARPS", warps as i64),
            ("KEYS", 16 * warps as i64),
            ("QUERIES", queries as i64),
            ("STAGES", stages as i64),
            ("OUTPUT", output),
        ]);
        launches.push(fits(
            problem,
            Launch {
                kernel: Kernel { source: Source::AttendKeys, entry: "attend_keys", defines },
                grid: [(b * hkv) as u32, blocks(nk, 16 * warps), 1],
                block: 32 * warps as u32,
                shared: shared(stages, queries) as u32,
                params: params.bytes(),
            },
        )?);
    }
    Ok(())
}
