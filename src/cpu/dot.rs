//! What the matrix products of attention multiply: the trait between the algorithm and the instructions of its products.
//!
//! Every [`Simd`] forms products of its own numbers. An instruction that takes several numbers at once (bfloat16 pairs)
//! is another [`Dot`] beside it: operands are packed in its units, results and softmax stay in `Real`.

use super::CpuReal;
use super::kernel::gemm::{Left, Right, Size, Target, multiply};
use super::simd::{Simd, Task};

/// Operands and products. A left operand has its units along its rows; a right operand has in every unit numbers of
/// neighbouring rows of one column. Both so that a unit is one step along the depth of the product.
#[allow(clippy::missing_safety_doc, reason = "the pointer methods say what they touch; it must be valid")]
pub(crate) trait Dot: Copy + Send + Sync + 'static {
    /// What products are summed up in, and everything else is computed in.
    type Real: CpuReal;
    /// The vectors of everything else.
    type Simd: Simd<Real = Self::Real>;
    /// One step along the depth: a number, or neighbours that one instruction multiplies and sums. As large as a `Real`,
    /// so that operands can take the place of the tiles they are made from.
    type Unit: Copy + Default + Send + Sync;
    /// A register of `LANES` units.
    type Units: Copy;
    /// Numbers in a unit: 1 or 2.
    const DEPTH: usize;

    /// The token of the vectors.
    fn simd(self) -> Self::Simd;

    /// [`Simd::vectorize`] with the instructions of the products enabled as well.
    fn enter<K: Task>(self, task: K) -> K::Output;

    /// Every lane the unit at `pointer`.
    unsafe fn repeat(self, pointer: *const Self::Unit) -> Self::Units;

    /// A register of units.
    unsafe fn units(self, pointer: *const Self::Unit) -> Self::Units;

    /// `sum` plus, lane by lane, the products of the numbers of two units.
    fn dot(self, a: Self::Units, b: Self::Units, sum: <Self::Simd as Simd>::Vector) -> <Self::Simd as Simd>::Vector;

    /// Writes `LANES` numbers of a left operand's row, from number `at` on.
    unsafe fn store_left(self, row: *mut Self::Unit, at: usize, numbers: <Self::Simd as Simd>::Vector);

    /// Reads them back.
    unsafe fn load_left(self, row: *const Self::Unit, at: usize) -> <Self::Simd as Simd>::Vector;

    /// Writes `LANES` units of a right operand: numbers of `DEPTH` neighbouring rows (with `DEPTH` 1 of the first).
    unsafe fn store_right(self, units: *mut Self::Unit, rows: [<Self::Simd as Simd>::Vector; 2]);

    /// C (+)= A B.
    ///
    /// # Safety
    /// A must be readable for rows x depth units, B for depth x (vectors registers), C writable for rows x (vectors
    /// registers), with the strides given, and C must overlap neither.
    #[inline(always)]
    unsafe fn product(self, size: Size, a: Left<Self::Unit>, b: Right<Self::Unit>, c: Target<Self::Real>) {
        // SAFETY: the same contract.
        unsafe { multiply(self, size, a, b, c) };
    }
}

/// Products of single numbers by fused multiply-adds: an operand's rows are rows.
impl<S: Simd> Dot for S {
    type Real = S::Real;
    type Simd = S;
    type Unit = S::Real;
    type Units = S::Vector;
    const DEPTH: usize = 1;

    #[inline(always)]
    fn simd(self) -> S {
        self
    }
    #[inline(always)]
    fn enter<K: Task>(self, task: K) -> K::Output {
        self.vectorize(task)
    }
    #[inline(always)]
    unsafe fn repeat(self, pointer: *const S::Real) -> S::Vector {
        // SAFETY: the caller's contract.
        self.splat(unsafe { *pointer })
    }
    #[inline(always)]
    unsafe fn units(self, pointer: *const S::Real) -> S::Vector {
        // SAFETY: the caller's contract.
        unsafe { self.load(pointer) }
    }
    #[inline(always)]
    fn dot(self, a: S::Vector, b: S::Vector, sum: S::Vector) -> S::Vector {
        self.mul_add(a, b, sum)
    }
    #[inline(always)]
    unsafe fn store_left(self, row: *mut S::Real, at: usize, numbers: S::Vector) {
        // SAFETY: the caller's contract.
        unsafe { self.store(row.add(at), numbers) };
    }
    #[inline(always)]
    unsafe fn load_left(self, row: *const S::Real, at: usize) -> S::Vector {
        // SAFETY: the caller's contract.
        unsafe { self.load(row.add(at)) }
    }
    #[inline(always)]
    unsafe fn store_right(self, units: *mut S::Real, rows: [S::Vector; 2]) {
        // SAFETY: the caller's contract.
        unsafe { self.store(units, rows[0]) };
    }
}
