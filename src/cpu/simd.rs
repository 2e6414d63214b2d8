//! The small trait between the algorithms and an instruction set: an algorithm is written once over [`Simd`], and an
//! instruction-set file holds no algorithm.
//!
//! A token of an implementing type is the proof that the machine has the instructions (it can only be made after
//! asking the CPU, or by an `unsafe` promise), so the register-only methods are safe. Methods on pointers are not.
//! Everything is `#[inline(always)]` so that it lands inside [`Simd::vectorize`], where the instructions are enabled.

use super::CpuReal;
use crate::dtype::{DType, Element};
use half::{bf16, f16};

/// What runs inside [`Simd::vectorize`]. A trait and not a closure, since only a method can be `#[inline(always)]`: a
/// closure of any size would stay a function of its own, without the instructions.
pub trait Task {
    /// What it returns.
    type Output;
    /// Runs it. Implementations are `#[inline(always)]`, and so is every function with vectors that they call.
    fn run(self) -> Self::Output;
}

/// Vectors of one instruction set.
#[allow(clippy::missing_safety_doc, reason = "the pointer methods share one contract, in the comment above them")]
pub trait Simd: Copy + Send + Sync + 'static {
    /// The element the arithmetic runs in.
    type Real: CpuReal;
    /// A register of `LANES` of them.
    type Vector: Copy;
    /// Elements a register holds.
    const LANES: usize;
    /// Rows of the register block of the matrix product: `TALL` rows of two vectors use the register file up.
    const TALL: usize;

    /// Runs a task with the instructions enabled; whatever is inlined into [`Task::run`] is compiled for them.
    fn vectorize<K: Task>(self, task: K) -> K::Output;

    /// Every lane the same.
    fn splat(self, value: Self::Real) -> Self::Vector;
    /// a + b
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a - b
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a * b
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// a * b + c, rounded once.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::Vector) -> Self::Vector;
    /// a * 2^n for integral n at most 0, a in [0.5, 2]; results below the smallest normal number may flush to zero, and
    /// are exactly zero from n = `Real::EXP2_FLUSH` down.
    fn scale_by_power(self, a: Self::Vector, n: Self::Vector) -> Self::Vector;
    /// Lanes below `count` from `a`, the others from `b`.
    fn first(self, count: usize, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Sum of the lanes, in an order fixed by the instruction set.
    fn sum(self, a: Self::Vector) -> Self::Real;
    /// Largest lane (of numbers).
    fn largest(self, a: Self::Vector) -> Self::Real;
    /// Transposes `LANES` registers as the rows of a square.
    fn transpose(self, rows: &mut [Self::Vector]);
    /// Lane l is the sum of register l, of `LANES` registers: much cheaper than a `sum` of each.
    #[inline(always)]
    fn sum_each(self, registers: &[Self::Vector]) -> Self::Vector {
        let mut columns = [self.zero(); 16];
        let columns = &mut columns[..Self::LANES];
        columns.copy_from_slice(&registers[..Self::LANES]);
        self.transpose(columns);
        let mut half = Self::LANES / 2;
        while half > 0 {
            for l in 0..half {
                columns[l] = self.add(columns[l], columns[l + half]);
            }
            half /= 2;
        }
        columns[0]
    }

    /// Asks for the cache line at an address, which need not be readable: a hint.
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}

    // Contract of the pointer methods: `LANES` elements from `pointer` on are readable (writable), any alignment.

    /// Reads a vector.
    unsafe fn load(self, pointer: *const Self::Real) -> Self::Vector;
    /// Writes a vector.
    unsafe fn store(self, pointer: *mut Self::Real, value: Self::Vector);
    /// Reads and widens. Only reached where `Real` is float32.
    unsafe fn load_bf16(self, pointer: *const bf16) -> Self::Vector;
    /// Reads and widens. Only reached where `Real` is float32.
    unsafe fn load_f16(self, pointer: *const f16) -> Self::Vector;
    /// Rounds to nearest even and writes. Only reached where `Real` is float32.
    unsafe fn store_bf16(self, pointer: *mut bf16, value: Self::Vector);
    /// Rounds to nearest even and writes. Only reached where `Real` is float32.
    unsafe fn store_f16(self, pointer: *mut f16, value: Self::Vector);

    /// Reads a vector of any storage type whose arithmetic type is `Real`.
    #[inline(always)]
    unsafe fn load_as<T: Element<Acc = Self::Real>>(self, pointer: *const T) -> Self::Vector {
        // SAFETY: the caller's contract; the casts are identities, as DTYPE says what T is.
        unsafe {
            match T::DTYPE {
                DType::BFloat16 => self.load_bf16(pointer.cast()),
                DType::Float16 => self.load_f16(pointer.cast()),
                _ => self.load(pointer.cast()),
            }
        }
    }

    /// Writes a vector as any storage type whose arithmetic type is `Real`.
    #[inline(always)]
    unsafe fn store_as<T: Element<Acc = Self::Real>>(self, pointer: *mut T, value: Self::Vector) {
        // SAFETY: the caller's contract; the casts are identities, as DTYPE says what T is.
        unsafe {
            match T::DTYPE {
                DType::BFloat16 => self.store_bf16(pointer.cast(), value),
                DType::Float16 => self.store_f16(pointer.cast(), value),
                _ => self.store(pointer.cast(), value),
            }
        }
    }

    /// Every lane 0.
    #[inline(always)]
    fn zero(self) -> Self::Vector {
        self.splat(<Self::Real as crate::dtype::Real>::ZERO)
    }
}
