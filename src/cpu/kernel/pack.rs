//! Tensors of any dtype and stride become tiles in the type the arithmetic runs in, and back.

use crate::cpu::dot::Dot;
use crate::cpu::simd::Simd;
use crate::dtype::{Element, Real};
use crate::ids::PADDING;
use crate::view::View;

/// Row `index` of a tensor, times `factor`, into `target`: D numbers, then zeros up to a whole register.
///
/// # Safety
/// `index` must lie inside the view and `target` be writable for D rounded up to whole registers.
#[inline(always)]
pub(crate) unsafe fn row<S: Simd, T: Element<Acc = S::Real>>(
    s: S,
    view: &View<'_, T, 4>,
    index: [usize; 3],
    factor: S::Real,
    target: *mut S::Real,
) {
    let [.., depth] = view.shape();
    let [.., stride] = view.strides();
    let [b, h, n] = index;
    let source = view.pointer_at([b, h, n, 0]);
    let scale = s.splat(factor);
    let mut d = 0;
    // SAFETY: columns below D of an existing row; the target holds D rounded up to whole registers.
    unsafe {
        if stride == 1 {
            while d + S::LANES <= depth {
                s.store(target.add(d), s.mul(s.load_as(source.add(d)), scale));
                d += S::LANES;
            }
        }
        while d < depth {
            *target.add(d) = (*source.offset(d as isize * stride)).widen() * factor;
            d += 1;
        }
        while d < depth.next_multiple_of(S::LANES) {
            *target.add(d) = S::Real::ZERO;
            d += 1;
        }
    }
}

/// Makes a packed row NaN throughout if anything in it is infinite or NaN, so that such a row can give nothing but NaN.
///
/// # Safety
/// `target` must hold `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn poison<S: Simd>(s: S, target: *mut S::Real, vectors: usize) {
    let mut poison = s.zero();
    // SAFETY: the caller's contract.
    unsafe {
        for v in 0..vectors {
            poison = s.mul_add(s.load(target.add(v * S::LANES)), s.zero(), poison);
        }
        let poison = s.sum(poison);
        if poison != S::Real::ZERO {
            for v in 0..vectors {
                s.store(target.add(v * S::LANES), s.splat(poison));
            }
        }
    }
}

/// Rows `0 .. ids.len()` of head (b, h) into a row-major tile; padding rows become zeros, so that whatever they hold
/// reaches nothing.
///
/// # Safety
/// `target` must be writable for every row, `row_stride` apart, each D rounded up to whole registers.
#[inline(always)]
pub(crate) unsafe fn rows<S: Simd, T: Element<Acc = S::Real>>(
    s: S,
    view: &View<'_, T, 4>,
    [b, h]: [usize; 2],
    ids: &[i32],
    target: *mut S::Real,
    row_stride: usize,
) {
    let width = view.shape()[3].next_multiple_of(S::LANES);
    for (n, &id) in ids.iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe {
            let target = target.add(n * row_stride);
            if id == PADDING {
                for d in 0..width {
                    *target.add(d) = S::Real::ZERO;
                }
            } else {
                row(s, view, [b, h, n], S::Real::ONE, target);
            }
        }
    }
}

/// A tile row, in place, becomes a row of a left operand.
///
/// # Safety
/// `row` must hold `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn left<D: Dot>(d: D, row: *mut D::Real, vectors: usize) {
    if D::DEPTH == 1 {
        return;
    }
    for v in 0..vectors {
        let at = v * D::Simd::LANES;
        // SAFETY: the caller's contract; units pack numbers more densely, so that none is overwritten before it is read.
        unsafe { d.store_left(row.cast(), at, d.simd().load(row.add(at))) };
    }
}

/// `count` rows of a tile become a right operand: as many neighbouring rows side by side as a unit is deep, missing ones
/// zero. Both have the same row stride.
///
/// # Safety
/// `source` must be readable for `count` rows of `vectors` registers, `target` writable for the units of as many.
#[inline(always)]
pub(crate) unsafe fn right<D: Dot>(
    d: D,
    source: *const D::Real,
    row_stride: usize,
    [count, vectors]: [usize; 2],
    target: *mut D::Unit,
) {
    let s = d.simd();
    for first in (0..count).step_by(D::DEPTH) {
        for v in 0..vectors {
            let at = v * D::Simd::LANES;
            // SAFETY: rows below `count`, registers below `vectors`.
            unsafe {
                let mut rows = [s.zero(); 2];
                for (i, row) in rows.iter_mut().enumerate().take(D::DEPTH.min(count - first)) {
                    *row = s.load(source.add((first + i) * row_stride + at));
                }
                d.store_right(target.add(first / D::DEPTH * row_stride + at), rows);
            }
        }
    }
}

/// The transpose of rows of units in panels of two vectors: panel p holds, for every unit of a row, that unit of the
/// rows `2 LANES p ..`; rows past the last are zeros.
///
/// # Safety
/// `source` must be readable for `count` rows of `depth` units, `target` writable for all panels.
#[inline(always)]
unsafe fn transpose<D: Dot>(
    d: D,
    source: *const D::Unit,
    row_stride: usize,
    [count, depth]: [usize; 2],
    target: *mut D::Unit,
) {
    let (s, lanes) = (d.simd(), D::Simd::LANES);
    let width = 2 * lanes;
    for first in (0..count.next_multiple_of(width)).step_by(lanes) {
        let column = first / width * width * depth + first % width;
        for p in (0..depth).step_by(lanes) {
            let mut square = [s.zero(); 16];
            // SAFETY: rows below `count`, in whole registers; units below `depth` of existing panels. A unit has the size of
            // a number, and a transpose only moves it.
            unsafe {
                for (row, units) in square.iter_mut().enumerate().take(lanes.min(count.saturating_sub(first))) {
                    *units = s.load(source.add((first + row) * row_stride + p).cast());
                }
                s.transpose(&mut square[..lanes]);
                for (unit, &rows) in square.iter().enumerate().take(lanes.min(depth - p)) {
                    s.store(target.add(column + (p + unit) * width).cast(), rows);
                }
            }
        }
    }
}

/// A tile of `count` rows, which becomes a left operand in place, transposed in panels: a right operand of `units` rows.
///
/// # Safety
/// `tile` must hold `count` rows of `row_stride`, a whole number of registers; `target` must be writable for all panels.
#[inline(always)]
pub(crate) unsafe fn panels<D: Dot>(
    d: D,
    tile: *mut D::Real,
    row_stride: usize,
    [count, vectors, units]: [usize; 3],
    target: *mut D::Real,
) {
    // SAFETY: the caller's contract.
    unsafe {
        for row in 0..count {
            left(d, tile.add(row * row_stride), vectors);
        }
        transpose(d, tile.cast_const().cast(), row_stride, [count, units], target.cast());
    }
}

/// A row of `depth` numbers, times `factor`, rounded into a contiguous row of storage type.
///
/// # Safety
/// `source` must be readable and `target` writable for `depth` elements.
#[inline(always)]
pub(crate) unsafe fn unpack<S: Simd, T: Element<Acc = S::Real>>(
    s: S,
    source: *const S::Real,
    factor: S::Real,
    depth: usize,
    target: *mut T,
) {
    let scale = s.splat(factor);
    let mut d = 0;
    // SAFETY: columns below `depth`.
    unsafe {
        while d + S::LANES <= depth {
            s.store_as(target.add(d), s.mul(s.load(source.add(d)), scale));
            d += S::LANES;
        }
        while d < depth {
            *target.add(d) = T::narrow(*source.add(d) * factor);
            d += 1;
        }
    }
}

/// `target` = (`target` +) `source` times `factor`, over whole registers.
///
/// # Safety
/// Both must be valid for `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn accumulate<S: Simd>(
    s: S,
    source: *const S::Real,
    factor: S::Real,
    target: *mut S::Real,
    (vectors, add): (usize, bool),
) {
    let scale = s.splat(factor);
    for v in 0..vectors {
        // SAFETY: the caller's contract.
        unsafe {
            let at = target.add(v * S::LANES);
            let before = if add { s.load(at) } else { s.zero() };
            s.store(at, s.mul_add(s.load(source.add(v * S::LANES)), scale, before));
        }
    }
}

/// `depth` contiguous numbers into a tile row, then zeros up to a whole register.
///
/// # Safety
/// `source` must be readable for `depth` numbers, `target` writable for `depth` rounded up to whole registers.
#[inline(always)]
pub(crate) unsafe fn copy<S: Simd>(_: S, source: *const S::Real, depth: usize, target: *mut S::Real) {
    // SAFETY: the caller's contract.
    unsafe {
        target.copy_from_nonoverlapping(source, depth);
        for d in depth..depth.next_multiple_of(S::LANES) {
            *target.add(d) = S::Real::ZERO;
        }
    }
}

/// Sum of products of two tile rows.
///
/// # Safety
/// Both must be readable for `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn dot<S: Simd>(s: S, a: *const S::Real, b: *const S::Real, vectors: usize) -> S::Real {
    let mut sum = s.zero();
    for v in 0..vectors {
        // SAFETY: the caller's contract.
        sum = unsafe { s.mul_add(s.load(a.add(v * S::LANES)), s.load(b.add(v * S::LANES)), sum) };
    }
    s.sum(sum)
}
