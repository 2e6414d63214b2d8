//! What every attention kernel reads, and how it is prepared: modality codes of queries and keys, key ranges.

use crate::cuda::ids::{Codes, TOKENS, integer_kind};
use crate::cuda::launch::{Kernel, Launch, Parameters};
use crate::cuda::problem::{AttendProblem, IdsArgument};
use crate::cuda::source::Source;
use crate::cuda::tensor::dtype_code;
use crate::cuda::workspace::{Region, Workspace};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::print_shape;

crate::parameters! {
    /// `attend_inputs` of `attend.cuh`, which documents the fields.
    pub struct AttendInputs {
        /// (B, Hq, Nq, D)
        pub query: u64,
        /// (B, Hkv, Nk, D)
        pub key: u64,
        /// (B, Hkv, Nk, D)
        pub value: u64,
        /// (B, Hq, Nq, parts), 0 where there is none.
        pub sink: u64,
        /// (B, Hq, M, M), 0 where there is none.
        pub bias: u64,
        /// Codes of the queries.
        pub query_codes: u64,
        /// Codes of the keys.
        pub key_codes: u64,
        /// Summaries of the queries.
        pub query_summaries: u64,
        /// Summaries of the keys.
        pub key_summaries: u64,
        /// Key ranges (B|1, Nq).
        pub ranges: u64,
        /// Key ranges of blocks of queries.
        pub spans: u64,
        /// Of batch, head and query.
        pub query_strides: [i64; 3],
        /// The same of the keys.
        pub key_strides: [i64; 3],
        /// The same of the values.
        pub value_strides: [i64; 3],
        /// Of all dimensions.
        pub sink_strides: [i64; 4],
        /// Of all dimensions.
        pub bias_strides: [i64; 4],
        /// Factor on q . k.
        pub scale: f64,
        /// Hq
        pub heads: i32,
        /// Hkv
        pub key_heads: i32,
        /// Query heads of a key head.
        pub group: i32,
        /// Nq
        pub queries: i32,
        /// Nk
        pub keys: i32,
        /// Batch rows of the ranges.
        pub range_rows: i32,
        /// 0.
        pub unused: [i32; 2],
    }
}

crate::parameters! {
    /// Argument of `encode_ranges`.
    pub struct EncodeRangesParams {
        /// (B|1, Nq, 2) of any integer dtype.
        pub given: u64,
        /// Where the ranges go.
        pub ranges: u64,
        /// Where the spans go.
        pub spans: u64,
        /// Strides of what is given.
        pub strides: [i64; 3],
        /// Nq
        pub queries: i64,
        /// Nk
        pub keys: i64,
        /// Integer dtype of the ranges.
        pub kind: i64,
    }
}

/// Where in the workspace the prepared inputs lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prepared {
    queries: Codes,
    keys: Codes,
    /// Ranges and spans.
    ranges: Option<[Region; 2]>,
}

impl Prepared {
    pub(super) fn new(workspace: &mut Workspace, problem: &AttendProblem) -> Self {
        let queries = Codes::new(workspace, problem.query_modality.shape);
        let keys = Codes::new(workspace, problem.modality.shape);
        let ranges = problem.key_range.map(|ranges| {
            let [rows, count, _] = ranges.shape;
            [workspace.region(rows * count, 8), workspace.region(rows * count.div_ceil(TOKENS), 16)]
        });
        Self { queries, keys, ranges }
    }

    /// The launches that prepare the inputs of a problem in the workspace at `base`.
    pub(super) fn launches(&self, problem: &AttendProblem, base: u64) -> Vec<Launch> {
        let (m, place) = (problem.modalities(), (problem.record, base));
        let mut launches = Vec::new();
        launches.extend(self.queries.encode((IdsArgument::QueryModality, problem.query_modality), None, m, place));
        launches.extend(self.keys.encode((IdsArgument::Modality, problem.modality), None, m, place));
        if let (Some(given), Some([ranges, spans])) = (problem.key_range, self.ranges) {
            let [rows, count, _] = given.shape;
            let params = EncodeRangesParams {
                given: given.pointer,
                ranges: ranges.at(base),
                spans: spans.at(base),
                strides: given.long_strides(),
                queries: count as i64,
                keys: problem.key.shape[2] as i64,
                kind: integer_kind(given.dtype).into(),
            };
            let kernel = Kernel { source: Source::Ranges, entry: "encode_ranges", defines: vec![("DTYPE", 0)] };
            let grid = [(rows * count.div_ceil(TOKENS)) as u32, 1, 1];
            if grid[0] > 0 {
                launches.push(Launch { kernel, grid, block: TOKENS as u32, shared: 0, params: params.bytes() });
            }
        }
        launches
    }

    /// The kernels' inputs.
    pub(super) fn inputs(&self, problem: &AttendProblem, base: u64) -> AttendInputs {
        let [_, hq, nq, _] = problem.query.shape;
        let [_, hkv, nk, _] = problem.key.shape;
        let first = |strides: [i64; 4]| [strides[0], strides[1], strides[2]];
        AttendInputs {
            query: problem.query.pointer,
            key: problem.key.pointer,
            value: problem.value.pointer,
            sink: problem.sink.map_or(0, |sink| sink.pointer),
            bias: problem.bias.map_or(0, |bias| bias.pointer),
            query_codes: self.queries.codes(base),
            key_codes: self.keys.codes(base),
            query_summaries: self.queries.summaries(base),
            key_summaries: self.keys.summaries(base),
            ranges: self.ranges.map_or(0, |[ranges, _]| ranges.at(base)),
            spans: self.ranges.map_or(0, |[_, spans]| spans.at(base)),
            query_strides: first(problem.query.long_strides()),
            key_strides: first(problem.key.long_strides()),
            value_strides: first(problem.value.long_strides()),
            sink_strides: problem.sink.map_or([0; 4], |sink| sink.long_strides()),
            bias_strides: problem.bias.map_or([0; 4], |bias| bias.long_strides()),
            scale: problem.scale,
            heads: hq as i32,
            key_heads: hkv as i32,
            group: problem.group() as i32,
            queries: nq as i32,
            keys: nk as i32,
            range_rows: problem.key_range.map_or(0, |ranges| ranges.shape[0] as i32),
            unused: [0; 2],
        }
    }

    /// Address of the codes of the queries.
    pub(super) fn query_codes(&self, base: u64) -> u64 {
        self.queries.codes(base)
    }
}

/// The defines of every attention kernel that follow from the problem.
pub(super) fn defines(problem: &AttendProblem) -> Vec<(&'static str, i64)> {
    let [_, _, nq, dim] = problem.query.shape;
    vec![
        ("DTYPE", dtype_code(problem.query.dtype)),
        ("HEAD_DIM", dim as i64),
        // A single query is the last: it sees every key.
        ("CAUSAL", i64::from(problem.causal && nq != 1)),
        ("BIAS", i64::from(problem.bias.is_some())),
        ("RANGE", i64::from(problem.key_range.is_some())),
    ]
}

/// Bytes of so many rows of a tile in shared memory: `PITCH` of `tile.cuh`.
pub(super) fn tile_bytes(rows: usize, dtype: DType, dim: usize) -> usize {
    rows * (dim.next_multiple_of(16) * dtype.size() + 16)
}

/// The largest size of a tile, `most` or a half of it and so on, with which a block asks for no more shared memory than the
/// device has; the products want steps of 16 on tensor cores, of 8 elsewhere.
pub(super) fn fitting(problem: &AttendProblem, most: usize, bytes: impl Fn(usize) -> usize) -> usize {
    let least = if problem.query.dtype.size() == 2 { 16 } else { 8 };
    let mut size = most;
    while size / 2 >= least && bytes(size) > problem.target.shared_limit as usize {
        size /= 2;
    }
    size
}

/// The most blocks in the second dimension of a grid.
const MOST_BLOCKS: usize = 65_535;

/// What a kernel cannot do on the device is an error before anything is launched.
pub(super) fn fits(problem: &AttendProblem, launch: Launch) -> Result<Launch> {
    let [b, hq, nq, dim] = problem.query.shape;
    let nk = problem.key.shape[2];
    // Kernels count queries and keys in 32 bits, the last tile of them whole.
    let most = i32::MAX as usize - TOKENS;
    if dim == 0 {
        let wanted = "a head dimension D of at least 8 on CUDA".to_owned();
        return Err(Error::Shape { argument: "query", given: print_shape(&[b, hq, nq, dim]), wanted });
    }
    if b.saturating_mul(hq.max(problem.key.shape[1])) > most || launch.grid[1] as usize > MOST_BLOCKS || nk > most {
        let wanted = format!("fewer than 2^31 heads in all and {} queries and keys", MOST_BLOCKS * 16);
        return Err(Error::Shape { argument: "query", given: print_shape(&[b, hq, nq, dim]), wanted });
    }
    if launch.shared > problem.target.shared_limit {
        let wanted = format!(
            "a smaller head dimension: its tiles take {} bytes of shared memory, this device has {}",
            launch.shared, problem.target.shared_limit
        );
        return Err(Error::Shape { argument: "query", given: print_shape(&[b, hq, nq, dim]), wanted });
    }
    Ok(launch)
}
