//! The last step of "split": the outputs of its two softmaxes added.

use crate::cuda::launch::{Kernel, Launch, Parameters, blocks};
use crate::cuda::source::Source;
use crate::cuda::tensor::{DeviceTensor, dtype_code};

/// Threads of a block.
const BLOCK: u32 = 256;

/// Beyond so many blocks every thread adds several elements.
const MOST_BLOCKS: u32 = 1 << 16;

crate::parameters! {
    /// Argument of `attend_sum`.
    pub struct SumParams {
        /// parts (B, Hq, 2, Nq, D), contiguous.
        pub parts: u64,
        /// out (B, Hq, Nq, D), contiguous.
        pub out: u64,
        /// Elements of out.
        pub count: i64,
        /// Nq D.
        pub row: i64,
    }
}

/// out = parts\[.., 0, ..] + parts\[.., 1, ..]; `None` where there is nothing to add.
pub fn sum(parts: DeviceTensor<5>, out: DeviceTensor<4>) -> Option<Launch> {
    let [_, _, nq, d] = out.shape;
    let (count, row) = (out.count(), nq * d);
    if count == 0 {
        return None;
    }
    let params = SumParams { parts: parts.pointer, out: out.pointer, count: count as i64, row: row as i64 };
    Some(Launch {
        kernel: Kernel {
            source: Source::AttendSum,
            entry: "attend_sum",
            defines: vec![("DTYPE", dtype_code(out.dtype))],
        },
        grid: [blocks(count, BLOCK as usize).min(MOST_BLOCKS), 1, 1],
        block: BLOCK,
        shared: 0,
        params: params.bytes(),
    })
}
