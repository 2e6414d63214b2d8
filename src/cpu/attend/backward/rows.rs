//! Rows of a block in backward: their operands, and from scores to probabilities and score gradients.

use crate::cpu::attend::plan::Sizes;
use crate::cpu::buffer::Buffer;
use crate::cpu::dot::Dot;
use crate::cpu::kernel::exp2::exp2;
use crate::cpu::kernel::pack;
use crate::cpu::kernel::softmax::Added;
use crate::cpu::simd::Simd;
use crate::dtype::Real;
use crate::error::Result;
use std::ops::Range;

/// Rows of a block (queries, output gradients) as a left operand and as a right one.
pub(super) struct Rows<D: Dot> {
    /// Numbers until [`Self::pack`], then the left operand; also the right one where a unit is one number.
    pub(super) left: Buffer<D::Real>,
    right: Buffer<D::Real>,
}

impl<D: Dot> Rows<D> {
    pub(super) fn new(length: usize, what: &'static str) -> Result<Self> {
        let right = if D::DEPTH == 1 { 0 } else { length };
        Ok(Self { left: Buffer::new(length, what)?, right: Buffer::new(right, what)? })
    }

    /// Makes both operands of the first `count` rows.
    #[inline(always)]
    pub(super) fn pack(&mut self, d: D, sizes: &Sizes, count: usize) {
        if D::DEPTH == 1 {
            return;
        }
        // SAFETY: both buffers hold every row of a block.
        unsafe {
            let rows = self.left.as_mut_ptr();
            pack::right(d, rows, sizes.stride, [count, sizes.vectors], self.right.as_mut_ptr().cast());
            for row in 0..count {
                pack::left(d, rows.add(row * sizes.stride), sizes.vectors);
            }
        }
    }

    pub(super) fn left(&self) -> *const D::Unit {
        self.left.as_ptr().cast()
    }

    pub(super) fn right(&self) -> *const D::Unit {
        let right = if D::DEPTH == 1 { &self.left } else { &self.right };
        right.as_ptr().cast()
    }
}

/// One softmax of a row: its logsumexp in log2 units and delta = dO . o.
#[derive(Debug, Clone, Copy)]
pub(super) struct Closed<R> {
    pub(super) logsumexp: R,
    /// What the logsumexp lost to rounding: an error that all keys of the row would share.
    pub(super) rest: R,
    pub(super) delta: R,
}

/// A row in one softmax.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinePart<R> {
    pub(super) added: Added<R>,
    pub(super) closed: Closed<R>,
}

/// A row of a unit: sees the keys `first .. visible` of the block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line<R> {
    pub(super) first: usize,
    pub(super) visible: usize,
    pub(super) parts: [LinePart<R>; 2],
}

impl<R: Real> Default for Line<R> {
    fn default() -> Self {
        let closed = Closed { logsumexp: R::ZERO, rest: R::ZERO, delta: R::ZERO };
        Self { first: 0, visible: 0, parts: [LinePart { added: Added::Same(R::ZERO), closed }; 2] }
    }
}

/// Where the rows of a unit lie.
#[derive(Debug, Clone)]
pub(super) struct UnitTiles<D: Dot> {
    /// Scores; overwritten by probabilities as one row of a right operand.
    pub(super) p: *mut D::Real,
    /// Gradients of probabilities; overwritten by those of scores as one row of a right operand.
    pub(super) d: *mut D::Real,
    /// The same as rows of a left operand, if that is another thing.
    pub(super) d_left: *mut D::Unit,
    pub(super) score_stride: usize,
    /// Keys that are written, from a whole register on; those that are not visible as zeros.
    pub(super) near: Range<usize>,
}

/// Probabilities P and score gradients P (dP - delta) of the rows of one unit.
///
/// # Safety
/// All rows, and the tables of the lines, must be valid for the keys `near` rounded up to whole registers. What is added must
/// be of one kind for every line that sees a key, and for its parts.
#[inline(always)]
pub(super) unsafe fn differentiate<D: Dot, const PARTS: usize>(
    d: D,
    tiles: &UnitTiles<D>,
    factor: D::Real,
    lines: &[Line<D::Real>; 2],
) {
    let s = d.simd();
    let same = |line: &Line<D::Real>| matches!(line.parts[0].added, Added::Same(_));
    // SAFETY: the same contract.
    unsafe {
        if lines.iter().all(same) {
            let mut offsets = [[s.zero(); PARTS]; 2];
            for (offsets, line) in offsets.iter_mut().zip(lines) {
                for (offset, part) in offsets.iter_mut().zip(&line.parts) {
                    if let Added::Same(added) = part.added {
                        *offset = s.splat(added - part.closed.rest);
                    }
                }
            }
            differentiate_with::<D, PARTS>(d, tiles, factor, lines, |i, part, _| offsets[i][part]);
        } else {
            differentiate_with::<D, PARTS>(d, tiles, factor, lines, |i, part, at| {
                let LinePart { added, closed } = lines[i].parts[part];
                match added {
                    Added::Each(added) => s.sub(s.load(added.add(at)), s.splat(closed.rest)),
                    Added::Same(added) => s.splat(added - closed.rest),
                }
            });
        }
    }
}

/// [`differentiate`] with what is added to the scaled products by row, part and position, less the rest of
/// the logsumexp.
///
/// # Safety
/// As [`differentiate`].
#[inline(always)]
unsafe fn differentiate_with<D: Dot, const PARTS: usize>(
    d: D,
    tiles: &UnitTiles<D>,
    factor: D::Real,
    lines: &[Line<D::Real>; 2],
    offset: impl Fn(usize, usize, usize) -> <D::Simd as Simd>::Vector,
) {
    let s = d.simd();
    let lanes = D::Simd::LANES;
    let factor = s.splat(factor);
    for at in tiles.near.clone().step_by(lanes) {
        let mut p = [s.zero(); 2];
        let mut d_score = [s.zero(); 2];
        for (i, line) in lines.iter().enumerate().take(D::DEPTH) {
            if at >= line.visible || at + lanes <= line.first {
                continue;
            }
            // SAFETY: a register that holds a visible key.
            let (score, d_p) = unsafe {
                let row = i * tiles.score_stride + at;
                (s.load(tiles.p.add(row)), s.load(tiles.d.add(row)))
            };
            for part in 0..PARTS {
                let Closed { logsumexp, delta, .. } = line.parts[part].closed;
                // Subtracted last: near the logsumexp that is exact, while a sum with the mask rounds for the whole row.
                let x = s.sub(s.mul_add(score, factor, offset(i, part, at)), s.splat(logsumexp));
                let x = exp2(s, x);
                p[i] = s.add(p[i], x);
                d_score[i] = s.mul_add(x, s.sub(d_p, s.splat(delta)), d_score[i]);
            }
            let inside = line.visible - at;
            if inside < lanes {
                p[i] = s.first(inside, p[i], s.zero());
                d_score[i] = s.first(inside, d_score[i], s.zero());
            }
            if at < line.first {
                let outside = line.first - at;
                p[i] = s.first(outside, s.zero(), p[i]);
                d_score[i] = s.first(outside, s.zero(), d_score[i]);
            }
        }
        // SAFETY: registers of the keys `near`, each written after it was read.
        unsafe {
            d.store_right(tiles.p.cast::<D::Unit>().add(at), p);
            d.store_right(tiles.d.cast::<D::Unit>().add(at), d_score);
            if D::DEPTH > 1 {
                for (i, &d_score) in d_score.iter().enumerate() {
                    d.store_left(tiles.d_left.add(i * tiles.score_stride), at, d_score);
                }
            }
        }
    }
}
