//! One row of scores against one key block: online softmax in powers of two.
//!
//! A row's maximum is looked for in the first block that it sees. Later blocks are weighed against it as it stands, for
//! the maximum need not be exact: it must only be near enough that nothing overflows ([`follow`]). Where the sum of a
//! block shows that it is not, the caller computes the scores again and the maximum moves ([`settle`]).

use super::exp2::{exp2, exp2_one};
use crate::cpu::dot::Dot;
use crate::cpu::simd::{Simd, Task};
use crate::dtype::Real;
use std::ops::Range;

/// A block whose probabilities, relative to the standing maximum, sum up to more than this moves the maximum.
const FAR: f64 = 1e12;

/// What the modular mask adds to a row's scores, in log2 units: bias, or minus infinity.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Added<R> {
    /// The same for every key of the block.
    Same(R),
    /// A number for each key of a block.
    Each(*const R),
}

impl<R> Added<R> {
    /// What is added from a key of the block on.
    ///
    /// # Safety
    /// The block must have the key.
    #[inline(always)]
    pub(crate) unsafe fn after(self, key: usize) -> Self {
        match self {
            // SAFETY: the caller's contract.
            Self::Each(added) => Self::Each(unsafe { added.add(key) }),
            same @ Self::Same(_) => same,
        }
    }
}

/// A row's scores for one key block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span<R> {
    /// Products of query and keys; overwritten by the probabilities, not yet divided by the row's total, as a row of a
    /// left operand.
    pub(crate) scores: *mut R,
    /// What turns a product into a score in log2 units.
    pub(crate) factor: R,
    /// What is added to it then.
    pub(crate) added: Added<R>,
    /// Where the probabilities go as numbers too, for those who need them unrounded.
    pub(crate) numbers: Option<*mut R>,
    /// Keys `first .. visible` of the span may be seen; at least one.
    pub(crate) first: usize,
    pub(crate) visible: usize,
    /// Keys `0 .. reach` are used by the product with the values: those that may not be seen get probability 0.
    pub(crate) reach: usize,
}

impl<R: Copy> Span<R> {
    /// Where the first register with a visible key begins.
    #[inline(always)]
    fn start<S: Simd<Real = R>>(&self, _: S) -> usize {
        self.first / S::LANES * S::LANES
    }

    /// The register at `at` with `other` where keys are not visible.
    #[inline(always)]
    fn visible_of<S: Simd<Real = R>>(&self, s: S, at: usize, mut x: S::Vector, other: S::Vector) -> S::Vector {
        if self.visible - at < S::LANES {
            x = s.first(self.visible - at, x, other);
        }
        if at < self.first {
            x = s.first(self.first - at, other, x);
        }
        x
    }
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

/// The softmax of some rows over one key block: rows that the mask adds the same to. A task, and so a function of its own:
/// its constants stay in registers, which they do not in the midst of everything else that a block takes.
pub(crate) struct Rows<'r, D: Dot> {
    pub(crate) d: D,
    /// Of the first row; which of its keys are visible is left to `keys`.
    pub(crate) span: Span<D::Real>,
    /// From one row's scores to the next one's.
    pub(crate) score_stride: usize,
    /// The first key of the span.
    pub(crate) from: usize,
    /// The keys that each row may see.
    pub(crate) keys: &'r [Range<usize>],
    pub(crate) running: &'r mut [Running<D::Real>],
    /// The rows' weighted sums so far, `vectors` registers each.
    pub(crate) sums: *mut D::Real,
    pub(crate) sum_stride: usize,
    pub(crate) vectors: usize,
    /// Whether the first row's maximum is known to be too far below its scores.
    pub(crate) far: bool,
}

impl<D: Dot> Task for Rows<'_, D> {
    /// How many rows are done, and the sum of the last one's probabilities. Where that is not all of them, the maximum of the
    /// next row is too far below its scores, which are lost.
    type Output = (usize, D::Real);

    #[inline(always)]
    fn run(self) -> (usize, D::Real) {
        match self.span.added {
            Added::Same(_) => self.weigh::<false>(),
            Added::Each(_) => self.weigh::<true>(),
        }
    }
}

impl<D: Dot> Rows<'_, D> {
    #[inline(always)]
    fn weigh<const EACH: bool>(self) -> (usize, D::Real) {
        let far = D::Real::from_f64(FAR);
        let mut total = D::Real::ZERO;
        for (row, (keys, running)) in self.keys.iter().zip(self.running).enumerate() {
            // SAFETY: whoever made this vouches for every row's scores and sums.
            unsafe {
                let scores = self.span.scores.add(row * self.score_stride);
                let first = keys.start.saturating_sub(self.from);
                let visible = keys.end.saturating_sub(self.from).min(self.span.reach);
                let span = Span { scores, first, visible, ..self.span };
                if first >= visible {
                    clear_left(self.d, scores, 0, span.reach);
                } else if running.seen && !(self.far && row == 0) {
                    total = weigh::<D, EACH>(self.d, span, running.top);
                    // A NaN is no reason to try again.
                    if total > far {
                        return (row, total);
                    }
                    running.total += total;
                } else {
                    let sums = self.sums.add(row * self.sum_stride);
                    total = settle_with::<D, EACH>(self.d, span, running, (sums, self.vectors));
                }
            }
        }
        (self.keys.len(), total)
    }
}

/// Turns a block of scores into probabilities relative to the running maximum, which is raised to the block's first where
/// that is higher; returns their sum. The row's weighted sum so far, `vectors` registers at `sums`, is rescaled with it.
///
/// # Safety
/// `scores`, and what `added` and `numbers` point at, must be valid for `reach` rounded up to whole registers, `sums` for
/// `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn settle<D: Dot>(
    d: D,
    span: Span<D::Real>,
    running: &mut Running<D::Real>,
    sums: (*mut D::Real, usize),
) -> D::Real {
    // SAFETY: the same contract.
    unsafe {
        match span.added {
            Added::Same(_) => settle_with::<D, false>(d, span, running, sums),
            Added::Each(_) => settle_with::<D, true>(d, span, running, sums),
        }
    }
}

/// [`settle`], `EACH` where what is added differs from key to key.
///
/// # Safety
/// As [`settle`].
#[inline(always)]
unsafe fn settle_with<D: Dot, const EACH: bool>(
    d: D,
    span: Span<D::Real>,
    running: &mut Running<D::Real>,
    (sums, vectors): (*mut D::Real, usize),
) -> D::Real {
    let s = d.simd();
    // SAFETY: the same contract.
    let tops = unsafe { highest::<D::Simd, EACH>(s, span) };
    let top = s.largest(tops);
    if top == D::Real::NEG_INFINITY {
        // `largest` may lose a NaN beside lanes that are hidden; their sum cannot. Such a row is NaN, not unseen.
        let sum = s.sum(tops);
        if sum != D::Real::NEG_INFINITY {
            running.seen = true;
            running.total += sum;
        }
        // SAFETY: the same contract.
        unsafe {
            clear_left(d, span.scores, 0, span.reach);
            if let Some(numbers) = span.numbers {
                clear(s, numbers, 0, span.visible);
            }
        }
        return D::Real::ZERO;
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
            // SAFETY: a register of the row's weighted sum.
            unsafe {
                let sum = sums.add(v * D::Simd::LANES);
                s.store(sum, s.mul(s.load(sum), factor));
            }
        }
    }
    // SAFETY: the same contract.
    let total = unsafe { weigh::<D, EACH>(d, span, running.top) };
    running.total += total;
    total
}

/// The highest score of every lane, minus infinity where there is none.
///
/// # Safety
/// As [`settle`].
#[inline(always)]
unsafe fn highest<S: Simd, const EACH: bool>(s: S, span: Span<S::Real>) -> S::Vector {
    let hidden = s.splat(S::Real::NEG_INFINITY);
    let relative = Relative::new(s, &span, S::Real::ZERO);
    let mut top = hidden;
    for at in (span.start(s)..span.visible).step_by(S::LANES) {
        // SAFETY: registers that begin below `visible`.
        let x = unsafe { relative.score::<S, EACH>(s, &span, at) };
        top = s.max(top, span.visible_of(s, at, x, hidden));
    }
    top
}

/// Probabilities relative to `top` in place of the scores, and their sum.
///
/// # Safety
/// As [`settle`].
#[inline(always)]
unsafe fn weigh<D: Dot, const EACH: bool>(d: D, span: Span<D::Real>, top: D::Real) -> D::Real {
    let s = d.simd();
    let lanes = D::Simd::LANES;
    let relative = Relative::new(s, &span, top);
    let start = span.start(s);
    let mut total = s.zero();
    let mut at = start;
    // SAFETY: registers that begin below `visible`; then the same contract.
    unsafe {
        // The first register and the last may hold keys that are not visible.
        if start < span.first {
            total = s.add(total, weigh_register::<D, EACH, true>(d, span, &relative, at));
            at += lanes;
        }
        while at + lanes <= span.visible {
            total = s.add(total, weigh_register::<D, EACH, false>(d, span, &relative, at));
            at += lanes;
        }
        if at < span.visible {
            total = s.add(total, weigh_register::<D, EACH, true>(d, span, &relative, at));
            at += lanes;
        }
        clear_left(d, span.scores, 0, start);
        clear_left(d, span.scores, at, span.reach);
        if let Some(numbers) = span.numbers {
            clear(s, numbers, 0, start);
        }
    }
    s.sum(total)
}

/// What turns products into powers of two, in every lane.
struct Relative<V> {
    factor: V,
    top: V,
    same: V,
}

impl<V> Relative<V> {
    #[inline(always)]
    fn new<S: Simd<Vector = V>>(s: S, span: &Span<S::Real>, top: S::Real) -> Self {
        let same = if let Added::Same(added) = span.added { added } else { S::Real::ZERO };
        Self { factor: s.splat(span.factor), top: s.splat(top), same: s.splat(same) }
    }

    /// The scores of one register of keys, in log2 units.
    ///
    /// # Safety
    /// As [`settle`]; the register must begin below `visible`.
    #[inline(always)]
    unsafe fn score<S: Simd<Vector = V>, const EACH: bool>(&self, s: S, span: &Span<S::Real>, at: usize) -> V
    where
        V: Copy,
    {
        // SAFETY: the caller's contract.
        unsafe {
            let added = match span.added {
                Added::Each(added) if EACH => s.load(added.add(at)),
                _ => self.same,
            };
            s.mul_add(s.load(span.scores.add(at)), self.factor, added)
        }
    }
}

/// The probabilities of one register of keys, `EDGE` where some of them may not be visible, in place of their scores.
///
/// # Safety
/// As [`settle`]; the register must begin below `visible`.
#[inline(always)]
unsafe fn weigh_register<D: Dot, const EACH: bool, const EDGE: bool>(
    d: D,
    span: Span<D::Real>,
    relative: &Relative<<D::Simd as Simd>::Vector>,
    at: usize,
) -> <D::Simd as Simd>::Vector {
    let s = d.simd();
    // SAFETY: the caller's contract. Probabilities take no more room than the scores they come from, and what is before
    // them is cleared last.
    unsafe {
        // Subtracted last: near the maximum that is exact, while a sum with the mask rounds for the whole row.
        let x = s.sub(relative.score::<D::Simd, EACH>(s, &span, at), relative.top);
        let mut p = exp2(s, x);
        if EDGE {
            p = span.visible_of(s, at, p, s.zero());
        }
        d.store_left(span.scores.cast(), at, p);
        if let Some(numbers) = span.numbers {
            s.store(numbers.add(at), p);
        }
        p
    }
}

/// Zeros as a row of a left operand from number `from`, a whole number of registers, up to `to`.
///
/// # Safety
/// `row` must be writable up to `to` rounded up to whole registers.
#[inline(always)]
pub(crate) unsafe fn clear_left<D: Dot>(d: D, row: *mut D::Real, from: usize, to: usize) {
    for at in (from..to).step_by(D::Simd::LANES) {
        // SAFETY: the caller's contract.
        unsafe { d.store_left(row.cast(), at, d.simd().zero()) };
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

/// Sum of `p * w` over some keys, `p` a row of a left operand; what else is in their registers must be 0 in `p`.
///
/// # Safety
/// Both must be readable for the whole registers of `keys`.
#[inline(always)]
pub(crate) unsafe fn sum_where<D: Dot>(d: D, p: *const D::Unit, w: *const D::Real, keys: Range<usize>) -> D::Real {
    let s = d.simd();
    let mut sum = s.zero();
    for at in (keys.start / D::Simd::LANES * D::Simd::LANES..keys.end).step_by(D::Simd::LANES) {
        // SAFETY: the caller's contract.
        sum = unsafe { s.mul_add(d.load_left(p, at), s.load(w.add(at)), sum) };
    }
    s.sum(sum)
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
