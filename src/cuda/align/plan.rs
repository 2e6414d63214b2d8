//! What the plans of forward and backward share: sizes, addresses, launches in the making.

use crate::cuda::launch::{Kernel, Launch, Parameters};
use crate::cuda::problem::{AlignProblem, arithmetic};
use crate::cuda::source::Source;
use crate::cuda::tensor::dtype_code;
use crate::error::{Error, Result};
use crate::layout::print_shape;

/// Threads of a block: `THREADS` of `kernels/sums.cuh`.
pub(super) const THREADS: u32 = 256;

/// Side of the tiles of a D x D matrix: `TILE` of `kernels/matrices.cuh`.
pub(super) const TILE: usize = 64;

/// Sizes of a problem.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) tokens: usize,
    pub(super) depth: usize,
    pub(super) modalities: usize,
    /// Bytes of a number that arithmetic runs in.
    pub(super) real: usize,
}

impl Sizes {
    pub(super) fn new(problem: &AlignProblem) -> Self {
        let [batch, heads, tokens, depth] = problem.key.shape;
        let real = arithmetic(problem.key.dtype).size();
        Self { batch, heads, tokens, depth, modalities: problem.modalities(), real }
    }

    /// Heads of all batch rows.
    pub(super) const fn all_heads(&self) -> usize {
        self.batch * self.heads
    }

    /// Numbers of a square matrix for every modality.
    pub(super) const fn squares(&self) -> usize {
        self.modalities * self.depth * self.depth
    }

    /// Tiles of a square matrix.
    pub(super) const fn tiles(&self) -> usize {
        let side = self.depth.div_ceil(TILE);
        side * side
    }
}

/// A plan in the making.
#[derive(Debug)]
pub(super) struct Plan<'p> {
    pub(super) problem: &'p AlignProblem,
    pub(super) sizes: Sizes,
    /// Where the workspace begins.
    pub(super) base: u64,
    pub(super) launches: Vec<Launch>,
}

impl<'p> Plan<'p> {
    pub(super) fn new(problem: &'p AlignProblem, base: u64) -> Self {
        Self { problem, sizes: Sizes::new(problem), base, launches: Vec::new() }
    }

    /// Adds a launch of so many blocks, with defines beside the dtype and the head dimension; none where there is no block.
    pub(super) fn launch<P: Parameters>(
        &mut self,
        (source, entry): (Source, &'static str),
        options: &[(&'static str, i64)],
        count: usize,
        params: &P,
    ) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let grid = i32::try_from(count).map_err(|_| Error::Shape {
            argument: "key",
            given: print_shape(&self.problem.key.shape),
            wanted: format!("a problem of fewer blocks: {entry} would need {count}, a launch has at most {}", i32::MAX),
        })?;
        let mut defines = vec![("DTYPE", dtype_code(self.problem.key.dtype)), ("HEAD_DIM", self.sizes.depth as i64)];
        defines.extend(options);
        self.launches.push(Launch {
            kernel: Kernel { source, entry, defines },
            grid: [grid.unsigned_abs(), 1, 1],
            block: THREADS,
            shared: 0,
            params: params.bytes(),
        });
        Ok(())
    }
}

/// The strides of batch, head and token.
pub(super) fn row_strides(strides: [i64; 4]) -> [i64; 3] {
    [strides[0], strides[1], strides[2]]
}
