//! The one matrix product of every kernel: C (+)= A B on tiles that lie in a worker's cache.
//!
//! A is read element by element through two strides, so it may be transposed; B is read in vectors along its rows.
//! Every product is one chain of fused multiply-adds over the depth, whatever the tile it falls in, then added to C.

use crate::cpu::simd::{Simd, Task};

/// The left operand: element (row, p) lies at `pointer + row * row_stride + p * depth_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Left<R> {
    pub(crate) pointer: *const R,
    pub(crate) row_stride: usize,
    pub(crate) depth_stride: usize,
}

/// The right operand in panels of two vectors: row p of panel n lies at `pointer + n * panel_stride + p * row_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Right<R> {
    pub(crate) pointer: *const R,
    pub(crate) row_stride: usize,
    pub(crate) panel_stride: usize,
}

impl<R> Right<R> {
    /// A plain row-major matrix, whose panels stand side by side.
    pub(crate) fn rows<S: Simd<Real = R>>(_: S, pointer: *const R, row_stride: usize) -> Self {
        Self { pointer, row_stride, panel_stride: 2 * S::LANES }
    }

    /// A matrix packed in panels: each `depth` rows of two vectors.
    pub(crate) fn panels<S: Simd<Real = R>>(_: S, pointer: *const R, depth: usize) -> Self {
        Self { pointer, row_stride: 2 * S::LANES, panel_stride: 2 * S::LANES * depth }
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

/// Size of a product: `rows` x `depth` times `depth` x (`vectors` registers).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) rows: usize,
    pub(crate) vectors: usize,
    pub(crate) depth: usize,
}

/// C (+)= A B, as a function of its own: the only copy of these loops for an instruction set and type.
///
/// # Safety
/// A must be readable for rows x depth, B for depth x (vectors registers), C writable for rows x (vectors registers),
/// with the strides given, and C must overlap neither.
#[inline(always)]
pub(crate) unsafe fn gemm<S: Simd>(s: S, size: Size, a: Left<S::Real>, b: Right<S::Real>, c: Target<S::Real>) {
    s.vectorize(Product { s, size, a, b, c });
}

/// Made by [`gemm`] alone, whose contract holds for it.
struct Product<S: Simd> {
    s: S,
    size: Size,
    a: Left<S::Real>,
    b: Right<S::Real>,
    c: Target<S::Real>,
}

impl<S: Simd> Task for Product<S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { s, size, a, b, c } = self;
        for panel in 0..size.vectors.div_ceil(2) {
            // SAFETY: a panel below the number of panels, and its columns of C.
            unsafe {
                let b = Right { pointer: b.pointer.add(panel * b.panel_stride), ..b };
                let c = Target { pointer: c.pointer.add(panel * 2 * S::LANES), ..c };
                if size.vectors - 2 * panel >= 2 {
                    columns::<S, 2>(s, size, a, b, c);
                } else {
                    columns::<S, 1>(s, size, a, b, c);
                }
            }
        }
    }
}

/// All rows of one panel, in tall blocks, then short ones.
#[inline(always)]
unsafe fn columns<S: Simd, const VECTORS: usize>(
    s: S,
    size: Size,
    a: Left<S::Real>,
    b: Right<S::Real>,
    c: Target<S::Real>,
) {
    let mut row = 0;
    while row < size.rows {
        // SAFETY: `row` is below the number of rows, and a block takes no more rows than are left.
        unsafe {
            let a = Left { pointer: a.pointer.add(row * a.row_stride), ..a };
            let c = Target { pointer: c.pointer.add(row * c.row_stride), ..c };
            row += match size.rows - row {
                12.. if S::TALL == 12 => block::<S, 12, VECTORS>(s, size.depth, a, b, c),
                6.. if S::TALL == 6 => block::<S, 6, VECTORS>(s, size.depth, a, b, c),
                4.. => block::<S, 4, VECTORS>(s, size.depth, a, b, c),
                _ => block::<S, 1, VECTORS>(s, size.depth, a, b, c),
            };
        }
    }
}

/// One register block; returns its number of rows.
#[inline(always)]
unsafe fn block<S: Simd, const ROWS: usize, const VECTORS: usize>(
    s: S,
    depth: usize,
    a: Left<S::Real>,
    b: Right<S::Real>,
    c: Target<S::Real>,
) -> usize {
    // SAFETY: all pointers stay inside the operands, by the contract of `gemm`.
    unsafe {
        let mut sums = [[s.zero(); VECTORS]; ROWS];
        for p in 0..depth {
            let mut right = [s.zero(); VECTORS];
            for (v, right) in right.iter_mut().enumerate() {
                *right = s.load(b.pointer.add(p * b.row_stride + v * S::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let left = s.splat(*a.pointer.add(row * a.row_stride + p * a.depth_stride));
                for (sum, &right) in sums.iter_mut().zip(&right) {
                    *sum = s.mul_add(left, right, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let at = c.pointer.add(row * c.row_stride + v * S::LANES);
                // Added last: a long sum made of short ones rounds less than one long chain.
                s.store(at, if c.accumulate { s.add(s.load(at), sum) } else { sum });
            }
        }
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
