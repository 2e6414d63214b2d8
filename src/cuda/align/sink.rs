//! Plans of the pseudo-scores (paper, equation 10).

use crate::cuda::ids::integer_kind;
use crate::cuda::launch::{Kernel, Launch, Parameters, blocks};
use crate::cuda::problem::SinkProblem;
use crate::cuda::source::Source;
use crate::cuda::tensor::{DeviceTensor, dtype_code};

/// Threads of a block.
const BLOCK: u32 = 256;

crate::parameters! {
    /// Argument of `pseudo_sink`.
    pub struct SinkParams {
        /// (B, Nq)
        pub position: u64,
        /// (B, Nq)
        pub modality: u64,
        /// (M, Hq)
        pub decay: u64,
        /// (M, Hq)
        pub base: u64,
        /// (B, Hq, Nq), contiguous.
        pub sink: u64,
        /// The device's record of ids out of range.
        pub record: u64,
        /// Strides of the tensors above.
        pub position_strides: [i64; 2],
        /// The same.
        pub modality_strides: [i64; 2],
        /// The same.
        pub decay_strides: [i64; 2],
        /// The same.
        pub base_strides: [i64; 2],
        /// B.
        pub batch: i64,
        /// Hq.
        pub heads: i64,
        /// Nq.
        pub queries: i64,
        /// The model's context window.
        pub span: i64,
        /// Integer dtype of the positions.
        pub position_kind: i32,
        /// Integer dtype of the ids.
        pub modality_kind: i32,
        /// M.
        pub modalities: i32,
        /// 0.
        pub unused: i32,
    }
}

crate::parameters! {
    /// Argument of `pseudo_sink_backward`.
    pub struct SinkBackwardParams {
        /// (B, Nq)
        pub position: u64,
        /// (B, Nq)
        pub modality: u64,
        /// (M, Hq)
        pub decay: u64,
        /// (B, Hq, Nq)
        pub d_sink: u64,
        /// (M, Hq), contiguous.
        pub d_decay: u64,
        /// (M, Hq), contiguous.
        pub d_base: u64,
        /// The device's record of ids out of range.
        pub record: u64,
        /// Strides of the tensors above.
        pub position_strides: [i64; 2],
        /// The same.
        pub modality_strides: [i64; 2],
        /// The same.
        pub decay_strides: [i64; 2],
        /// The same.
        pub d_sink_strides: [i64; 3],
        /// B.
        pub batch: i64,
        /// Hq.
        pub heads: i64,
        /// Nq.
        pub queries: i64,
        /// The model's context window.
        pub span: i64,
        /// Integer dtype of the positions.
        pub position_kind: i32,
        /// Integer dtype of the ids.
        pub modality_kind: i32,
        /// M.
        pub modalities: i32,
        /// 0.
        pub unused: i32,
    }
}

/// Sink logits log Z (B, Hq, Nq), contiguous, of decay's dtype.
pub fn pseudo_sink(problem: &SinkProblem, sink: DeviceTensor<3>) -> Vec<Launch> {
    let [batch, heads, queries] = problem.shape();
    if sink.count() == 0 {
        return Vec::new();
    }
    let params = SinkParams {
        position: problem.position.pointer,
        modality: problem.query_modality.pointer,
        decay: problem.decay.pointer,
        base: problem.base.pointer,
        sink: sink.pointer,
        record: problem.record,
        position_strides: problem.position.long_strides(),
        modality_strides: problem.query_modality.long_strides(),
        decay_strides: problem.decay.long_strides(),
        base_strides: problem.base.long_strides(),
        batch: batch as i64,
        heads: heads as i64,
        queries: queries as i64,
        span: problem.span,
        position_kind: integer_kind(problem.position.dtype),
        modality_kind: integer_kind(problem.query_modality.dtype),
        modalities: problem.decay.shape[0] as i32,
        unused: 0,
    };
    vec![launch(problem, "pseudo_sink", blocks(sink.count(), BLOCK as usize), params.bytes())]
}

/// Gradients of decay and base (M, Hq), contiguous, from that of the sink (B, Hq, Nq) of any strides.
pub fn pseudo_sink_backward(
    problem: &SinkProblem,
    d_sink: DeviceTensor<3>,
    [d_decay, d_base]: [DeviceTensor<2>; 2],
) -> Vec<Launch> {
    let [batch, heads, queries] = problem.shape();
    if d_decay.count() == 0 {
        return Vec::new();
    }
    let params = SinkBackwardParams {
        position: problem.position.pointer,
        modality: problem.query_modality.pointer,
        decay: problem.decay.pointer,
        d_sink: d_sink.pointer,
        d_decay: d_decay.pointer,
        d_base: d_base.pointer,
        record: problem.record,
        position_strides: problem.position.long_strides(),
        modality_strides: problem.query_modality.long_strides(),
        decay_strides: problem.decay.long_strides(),
        d_sink_strides: d_sink.long_strides(),
        batch: batch as i64,
        heads: heads as i64,
        queries: queries as i64,
        span: problem.span,
        position_kind: integer_kind(problem.position.dtype),
        modality_kind: integer_kind(problem.query_modality.dtype),
        modalities: problem.decay.shape[0] as i32,
        unused: 0,
    };
    vec![launch(problem, "pseudo_sink_backward", blocks(d_decay.count(), 1), params.bytes())]
}

fn launch(problem: &SinkProblem, entry: &'static str, grid: u32, params: Vec<u8>) -> Launch {
    let defines = vec![("DTYPE", dtype_code(problem.decay.dtype))];
    Launch {
        kernel: Kernel { source: Source::Sink, entry, defines },
        grid: [grid, 1, 1],
        block: BLOCK,
        shared: 0,
        params,
    }
}
