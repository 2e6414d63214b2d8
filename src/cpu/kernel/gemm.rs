//! The one matrix product of every kernel: C (+)= A B on tiles that lie in a worker's cache.
//!
//! A is read unit by unit ([`Dot::Unit`]) through two strides, so it may be transposed; B is read in vectors along its
//! rows. Every product is one chain of multiply-adds over the depth, whatever the tile it falls in, then added to C.

use crate::cpu::dot::Dot;
use crate::cpu::simd::{Simd, Task};

/// The left operand: unit (row, p) lies at `pointer + row * row_stride + p * depth_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Left<U> {
    pub(crate) pointer: *const U,
    pub(crate) row_stride: usize,
    pub(crate) depth_stride: usize,
}

/// The right operand in panels of two vectors: row p of panel n lies at `pointer + n * panel_stride + p * row_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Right<U> {
    pub(crate) pointer: *const U,
    pub(crate) row_stride: usize,
    pub(crate) panel_stride: usize,
}

impl<U> Right<U> {
    /// A plain row-major matrix, whose panels stand side by side.
    pub(crate) fn rows<D: Dot<Unit = U>>(_: D, pointer: *const U, row_stride: usize) -> Self {
        Self { pointer, row_stride, panel_stride: 2 * D::Simd::LANES }
    }

    /// A matrix packed in panels: each `depth` rows of two vectors.
    pub(crate) fn panels<D: Dot<Unit = U>>(_: D, pointer: *const U, depth: usize) -> Self {
        let width = 2 * D::Simd::LANES;
        Self { pointer, row_stride: width, panel_stride: width * depth }
    }
}

/// The result, row-major.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<R> {
    pub(crate) pointer: *mut R,
    pub(crate) row_stride: usize,
    /// Add to what is there instead of overwriting it.
    pub(crate) accumulate: bool,
}

/// Size of a product: `rows` x `depth` units times `depth` units x (`vectors` registers).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) rows: usize,
    pub(crate) vectors: usize,
    pub(crate) depth: usize,
}

/// C (+)= A B in plain numbers.
///
/// # Safety
/// As [`Dot::product`].
#[inline(always)]
pub(crate) unsafe fn gemm<S: Simd>(s: S, size: Size, a: Left<S::Real>, b: Right<S::Real>, c: Target<S::Real>) {
    // SAFETY: the same contract.
    unsafe { s.product(size, a, b, c) };
}

/// The products of vectors, as a function of its own: the only copy of these loops for an instruction set and type.
///
/// # Safety
/// As [`Dot::product`].
#[inline(always)]
pub(crate) unsafe fn multiply<D: Dot>(d: D, size: Size, a: Left<D::Unit>, b: Right<D::Unit>, c: Target<D::Real>) {
    d.enter(Product { d, size, a, b, c });
}

/// Made by [`multiply`] alone, whose contract holds for it.
struct Product<D: Dot> {
    d: D,
    size: Size,
    a: Left<D::Unit>,
    b: Right<D::Unit>,
    c: Target<D::Real>,
}

impl<D: Dot> Task for Product<D> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { d, size, a, b, c } = self;
        for panel in 0..size.vectors.div_ceil(2) {
            // SAFETY: a panel below the number of panels, and its columns of C.
            unsafe {
                let b = Right { pointer: b.pointer.add(panel * b.panel_stride), ..b };
                let c = Target { pointer: c.pointer.add(panel * 2 * D::Simd::LANES), ..c };
                if size.vectors - 2 * panel >= 2 {
                    columns::<D, 2>(d, size, a, b, c);
                } else {
                    columns::<D, 1>(d, size, a, b, c);
                }
            }
        }
    }
}

/// All rows of one panel, in tall blocks, then short ones.
#[inline(always)]
unsafe fn columns<D: Dot, const VECTORS: usize>(
    d: D,
    size: Size,
    a: Left<D::Unit>,
    b: Right<D::Unit>,
    c: Target<D::Real>,
) {
    let tall = D::Simd::TALL;
    let mut row = 0;
    while row < size.rows {
        // SAFETY: `row` is below the number of rows, and a block takes no more rows than are left.
        unsafe {
            let a = Left { pointer: a.pointer.add(row * a.row_stride), ..a };
            let c = Target { pointer: c.pointer.add(row * c.row_stride), ..c };
            row += match size.rows - row {
                12.. if tall == 12 => block::<D, 12, VECTORS>(d, size.depth, a, b, c),
                6.. if tall == 6 => block::<D, 6, VECTORS>(d, size.depth, a, b, c),
                4.. => block::<D, 4, VECTORS>(d, size.depth, a, b, c),
                _ => block::<D, 1, VECTORS>(d, size.depth, a, b, c),
            };
        }
    }
}

/// A loop over the rows or vectors of a register block, written out: the sums stay in registers only if every index is
/// a constant, and whether the compiler unrolls a loop depends on what is around it.
macro_rules! each {
    ($index:ident below $count:ident $body:block) => { each!(@ $index $count $body 0 1 2 3 4 5 6 7 8 9 10 11) };
    (@ $index:ident $count:ident $body:block $($number:literal)*) => {
        $(if $number < $count {
            let $index = $number;
            $body
        })*
    };
}

/// One register block of at most 12 rows and 2 vectors; returns its number of rows.
#[inline(always)]
unsafe fn block<D: Dot, const ROWS: usize, const VECTORS: usize>(
    d: D,
    depth: usize,
    a: Left<D::Unit>,
    b: Right<D::Unit>,
    c: Target<D::Real>,
) -> usize {
    let s = d.simd();
    let second = (VECTORS - 1) * D::Simd::LANES;
    let mut sums = [[s.zero(); 2]; 12];
    // SAFETY: all pointers stay inside the operands, by the contract of `multiply`.
    unsafe {
        for p in 0..depth {
            let right = b.pointer.add(p * b.row_stride);
            let right = [d.units(right), d.units(right.add(second))];
            each!(row below ROWS {
                let left = d.repeat(a.pointer.add(row * a.row_stride + p * a.depth_stride));
                sums[row][0] = d.dot(left, right[0], sums[row][0]);
                if VECTORS == 2 {
                    sums[row][1] = d.dot(left, right[1], sums[row][1]);
                }
            });
        }
        // Added last: a long sum made of short ones rounds less than one long chain.
        each!(row below ROWS {
            let at = c.pointer.add(row * c.row_stride);
            let [mut first, mut last] = sums[row];
            if c.accumulate {
                first = s.add(s.load(at), first);
                last = s.add(s.load(at.add(second)), last);
            }
            s.store(at, first);
            if VECTORS == 2 {
                s.store(at.add(second), last);
            }
        });
    }
    ROWS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use crate::cpu::{CpuReal, Exec, with_token};

    fn check<R: CpuReal>(exec: Exec) {
        with_token!(exec, R, s => {
            for (rows, vectors, depth) in [(1, 1, 1), (5, 3, 7), (12, 2, 33), (29, 4, 3), (3, 2, 0)] {
                let columns = vectors * lanes(s);
                let value = |i: usize| R::from_f64(((i * 37) % 19) as f64 - 9.0);
                let a: Vec<R> = (0..rows * depth).map(value).collect();
                let b: Vec<R> = (0..depth * columns).map(|i| value(i + 5)).collect();
                let mut c: Vec<R> = (0..rows * columns).map(|i| value(i + 11)).collect();
                let before = c.clone();
                let size = Size { rows, vectors, depth };
                let left = Left { pointer: a.as_ptr(), row_stride: depth, depth_stride: 1 };
                let right = Right::rows(s, b.as_ptr(), columns);
                let target = Target { pointer: c.as_mut_ptr(), row_stride: columns, accumulate: true };
                // SAFETY: buffers of exactly these sizes.
                unsafe { gemm(s, size, left, right, target) };
                for i in 0..rows {
                    for j in 0..columns {
                        let products = (0..depth).map(|p| (a[i * depth + p] * b[p * columns + j]).to_f64());
                        let wanted = before[i * columns + j].to_f64() + products.sum::<f64>();
                        let got = c[i * columns + j].to_f64();
                        assert!((got - wanted).abs() < 0.5, "{:?} ({i}, {j}): {got}, not {wanted}", exec.isa);
                    }
                }
            }
        });
    }

    fn lanes<S: Simd>(_: S) -> usize {
        S::LANES
    }

    #[test]
    fn products_of_integers_are_exact_for_every_instruction_set() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            check::<f32>(Exec { isa, threads: 1 });
            check::<f64>(Exec { isa, threads: 1 });
        }
    }
}
