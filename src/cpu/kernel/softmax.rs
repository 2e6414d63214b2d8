//! One row of scores against one key block: online softmax in powers of two.

use super::exp2::{exp2, exp2_one};
use crate::cpu::simd::Simd;
use crate::dtype::Real;

/// A row's scores for one key block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span<R> {
    /// The scores in log2 units; overwritten by the probabilities, not yet divided by the row's total.
    pub(crate) scores: *mut R,
    /// What the modular mask adds to them: bias, or minus infinity.
    pub(crate) added: *const R,
    /// Keys `first .. visible` of the span may be seen; at least one.
    pub(crate) first: usize,
    pub(crate) visible: usize,
    /// Keys `0 .. reach` are used by the product with the values: those that may not be seen get probability 0.
    pub(crate) reach: usize,
}

/// The softmax of one row so far, in log2 units.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Running<R> {
    /// Largest score, sink included.
    pub(crate) top: R,
    /// Sum of 2^(score - top), sink included.
    pub(crate) total: R,
    /// Its part on keys of the query's modality, and on other keys; kept only where mass is wanted.
    pub(crate) own: R,
    pub(crate) cross: R,
    /// Whether any key was visible.
    pub(crate) seen: bool,
}

impl<R: Real> Running<R> {
    /// A row with its sink as the only entry.
    pub(crate) fn new(sink: R) -> Self {
        let total = if sink == R::NEG_INFINITY { R::ZERO } else { R::ONE };
        Self { top: sink, total, own: R::ZERO, cross: R::ZERO, seen: false }
    }
}

/// Takes a block of scores into the running softmax and turns them into probabilities relative to its new maximum.
/// The row's weighted sum so far, `vectors` registers at `sums`, is rescaled where the maximum rose. Returns the sum of
/// the block's probabilities.
///
/// # Safety
/// `scores` and `added` must be valid for `reach` rounded up to whole registers, `sums` for `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn softmax<S: Simd>(
    s: S,
    span: Span<S::Real>,
    running: &mut Running<S::Real>,
    (sums, vectors): (*mut S::Real, usize),
) -> S::Real {
    let Span { scores, added, first, visible, reach } = span;
    let hidden = s.splat(S::Real::NEG_INFINITY);
    let registers = first / S::LANES..visible.div_ceil(S::LANES);
    // SAFETY: whole registers up to `reach`, by the contract.
    unsafe {
        let mut top = hidden;
        for v in registers.clone() {
            let at = v * S::LANES;
            let mut x = s.add(s.load(scores.add(at)), s.load(added.add(at)));
            if visible - at < S::LANES {
                x = s.first(visible - at, x, hidden);
            }
            if at < first {
                x = s.first(first - at, hidden, x);
            }
            s.store(scores.add(at), x);
            top = s.max(top, x);
        }
        let tops = top;
        let top = s.largest(tops);
        if top == S::Real::NEG_INFINITY {
            // `largest` may lose a NaN beside lanes that are hidden; their sum cannot. Such a row is NaN, not unseen.
            let sum = s.sum(tops);
            if sum != S::Real::NEG_INFINITY {
                running.seen = true;
                running.total += sum;
            }
            clear(s, scores, 0, reach);
            return S::Real::ZERO;
        }
        running.seen = true;
        if top > running.top {
            let factor = exp2_one(s, running.top - top);
            running.top = top;
            running.total *= factor;
            running.own *= factor;
            running.cross *= factor;
            let factor = s.splat(factor);
            for v in 0..vectors {
                let sum = sums.add(v * S::LANES);
                s.store(sum, s.mul(s.load(sum), factor));
            }
        }
        let top = s.splat(running.top);
        let mut total = s.zero();
        clear(s, scores, 0, registers.start * S::LANES);
        for v in registers {
            let at = scores.add(v * S::LANES);
            let p = exp2(s, s.sub(s.load(at), top));
            s.store(at, p);
            total = s.add(total, p);
        }
        clear(s, scores, visible.next_multiple_of(S::LANES), reach);
        let total = s.sum(total);
        running.total += total;
        total
    }
}

/// Takes the softmax of a row over other keys, `other`, and its weighted sum into a running one.
///
/// # Safety
/// Both sums must be valid for `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn join<S: Simd>(
    s: S,
    (running, sums): (&mut Running<S::Real>, *mut S::Real),
    (other, other_sums): (&Running<S::Real>, *const S::Real),
    vectors: usize,
) {
    if !other.seen {
        return;
    }
    running.seen = true;
    let mut before = S::Real::ONE;
    if other.top > running.top {
        before = exp2_one(s, running.top - other.top);
        running.top = other.top;
    }
    let share = if other.top == running.top { S::Real::ONE } else { exp2_one(s, other.top - running.top) };
    running.total = running.total * before + other.total * share;
    running.own = running.own * before + other.own * share;
    running.cross = running.cross * before + other.cross * share;
    for v in 0..vectors {
        // SAFETY: the caller's contract.
        unsafe {
            let at = sums.add(v * S::LANES);
            let kept = s.mul(s.load(at), s.splat(before));
            s.store(at, s.mul_add(s.load(other_sums.add(v * S::LANES)), s.splat(share), kept));
        }
    }
}

/// Zeros from `from`, a whole number of registers, up to `to`.
///
/// # Safety
/// `scores` must be writable up to `to` rounded up to whole registers.
#[inline(always)]
pub(crate) unsafe fn clear<S: Simd>(s: S, scores: *mut S::Real, from: usize, to: usize) {
    for at in (from..to).step_by(S::LANES) {
        // SAFETY: the caller's contract.
        unsafe { s.store(scores.add(at), s.zero()) };
    }
}

/// Sum of `p * w` and of `p * (1 - w)` over `count` keys; what lies past them in the last register must be 0 in `p`.
///
/// # Safety
/// Both must be readable for `count` rounded up to whole registers.
#[inline(always)]
pub(crate) unsafe fn split_sum<S: Simd>(
    s: S,
    p: *const S::Real,
    w: *const S::Real,
    count: usize,
) -> (S::Real, S::Real) {
    let (mut inside, mut outside) = (s.zero(), s.zero());
    let one = s.splat(S::Real::ONE);
    for at in (0..count).step_by(S::LANES) {
        // SAFETY: the caller's contract.
        let (p, w) = unsafe { (s.load(p.add(at)), s.load(w.add(at))) };
        inside = s.mul_add(p, w, inside);
        outside = s.mul_add(p, s.sub(one, w), outside);
    }
    (s.sum(inside), s.sum(outside))
}
