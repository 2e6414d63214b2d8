//! Attention mass by key modality, beside the running softmaxes of a row block: M numbers a row.

use super::mask::{Block, Content, Tables};
use crate::cpu::CpuReal;
use crate::cpu::buffer::Buffer;
use crate::cpu::kernel::exp2::exp2_one;
use crate::cpu::kernel::softmax::split_sum;
use crate::cpu::simd::Simd;
use crate::dtype::Real;
use crate::error::Result;
use crate::ids::PADDING;

/// For every row the sums of its probabilities on the keys of each modality, relative to the row's maximum so far.
#[derive(Debug)]
pub(super) struct Masses<R: Real> {
    sums: Buffer<R>,
    /// M; 0 where this mass is not wanted.
    modalities: usize,
    /// The modalities among the keys of the current block.
    present: Vec<i32>,
}

/// A row's probabilities for one key block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scored<R> {
    /// The row's maximum before the block and with it.
    pub(super) tops: [R; 2],
    /// Sum of the block's probabilities.
    pub(super) total: R,
    /// The probabilities of keys `from ..` of the block, `count` of them; those that the row does not see are 0.
    pub(super) probabilities: *const R,
    pub(super) from: usize,
    pub(super) count: usize,
}

impl<R: CpuReal> Masses<R> {
    pub(super) fn new(rows: usize, modalities: usize) -> Result<Self> {
        let sums = Buffer::new(rows * modalities, "attention mass by modality")?;
        Ok(Self { sums, modalities, present: Vec::with_capacity(modalities) })
    }

    /// Starts the next softmax of every row.
    pub(super) fn start(&mut self) {
        self.sums.fill(R::ZERO);
    }

    /// Starts the next key block.
    pub(super) fn block(&mut self, ids: &[i32]) {
        self.present.clear();
        if self.modalities == 0 {
            return;
        }
        for &id in ids {
            if id != PADDING && !self.present.contains(&id) {
                self.present.push(id);
            }
        }
    }

    /// A row's sums, one a modality; empty where this mass is not wanted.
    pub(super) fn row(&self, row: usize) -> &[R] {
        &self.sums[row * self.modalities..][..self.modalities]
    }

    /// Adds the probabilities of one row for the current key block.
    ///
    /// # Safety
    /// The probabilities must be readable for `count` rounded up to whole registers.
    #[inline(always)]
    pub(super) unsafe fn add<S: Simd<Real = R>>(
        &mut self,
        s: S,
        row: usize,
        scored: Scored<R>,
        (tables, keys): (&mut Tables<R>, Block<'_>),
    ) {
        let sums = &mut self.sums[row * self.modalities..][..self.modalities];
        let [before, top] = scored.tops;
        if before < top {
            let factor = exp2_one(s, before - top);
            for sum in &mut *sums {
                *sum *= factor;
            }
        }
        if let Content::Uniform(key) = keys.content {
            sums[key as usize] += scored.total;
            return;
        }
        for &key in &self.present {
            // SAFETY: the caller's contract; a table has the length of a whole block of keys.
            let (inside, _) = unsafe {
                let own = tables.own(keys, key).add(scored.from);
                split_sum(s, scored.probabilities, own, scored.count)
            };
            sums[key as usize] += inside;
        }
    }
}
