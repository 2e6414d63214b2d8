//! Plain Rust: runs on any machine, and is what a machine without a wider set gets.

use crate::cpu::CpuReal;
use crate::cpu::simd::{Simd, Task};
use crate::dtype::Element;
use half::{bf16, f16};
use std::marker::PhantomData;

const LANES: usize = 4;

/// The token; every machine has plain Rust.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scalar<R>(PhantomData<R>);

impl<R> Scalar<R> {
    /// Always possible.
    pub const fn new() -> Self {
        Self(PhantomData)
    }
}

#[inline(always)]
fn map<R: Copy>(f: impl Fn(usize) -> R) -> [R; LANES] {
    [f(0), f(1), f(2), f(3)]
}

impl<R: CpuReal> Simd for Scalar<R> {
    type Real = R;
    type Vector = [R; LANES];
    const LANES: usize = LANES;
    const TALL: usize = 4;

    #[inline(never)]
    fn vectorize<K: Task>(self, task: K) -> K::Output {
        task.run()
    }
    #[inline(always)]
    fn splat(self, value: R) -> [R; LANES] {
        [value; LANES]
    }
    #[inline(always)]
    fn add(self, a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        map(|l| a[l] + b[l])
    }
    #[inline(always)]
    fn sub(self, a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        map(|l| a[l] - b[l])
    }
    #[inline(always)]
    fn mul(self, a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        map(|l| a[l] * b[l])
    }
    #[inline(always)]
    fn mul_add(self, a: [R; LANES], b: [R; LANES], c: [R; LANES]) -> [R; LANES] {
        // Without an FMA instruction a fused multiply-add is a slow library call; two roundings are as good here.
        map(|l| a[l] * b[l] + c[l])
    }
    #[inline(always)]
    fn max(self, a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        map(|l| if a[l] > b[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    fn round(self, a: [R; LANES]) -> [R; LANES] {
        map(|l| a[l].round())
    }
    #[inline(always)]
    fn scale_by_power(self, a: [R; LANES], n: [R; LANES]) -> [R; LANES] {
        map(|l| a[l] * R::power_of_two(n[l]))
    }
    #[inline(always)]
    fn first(self, count: usize, a: [R; LANES], b: [R; LANES]) -> [R; LANES] {
        map(|l| if l < count { a[l] } else { b[l] })
    }
    #[inline(always)]
    fn sum(self, a: [R; LANES]) -> R {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn largest(self, a: [R; LANES]) -> R {
        a.into_iter().fold(R::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [[R; LANES]]) {
        let column = |c: usize| map(|r| rows[r][c]);
        let columns = [column(0), column(1), column(2), column(3)];
        rows.copy_from_slice(&columns);
    }
    #[inline(always)]
    unsafe fn load(self, pointer: *const R) -> [R; LANES] {
        // SAFETY: the caller's contract.
        map(|l| unsafe { *pointer.add(l) })
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut R, value: [R; LANES]) {
        for (l, x) in value.into_iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe { *pointer.add(l) = x };
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, pointer: *const bf16) -> [R; LANES] {
        // SAFETY: the caller's contract.
        map(|l| R::from_f32(unsafe { *pointer.add(l) }.widen()))
    }
    #[inline(always)]
    unsafe fn load_f16(self, pointer: *const f16) -> [R; LANES] {
        // SAFETY: the caller's contract.
        map(|l| R::from_f32(unsafe { *pointer.add(l) }.widen()))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, pointer: *mut bf16, value: [R; LANES]) {
        for (l, x) in value.into_iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe { *pointer.add(l) = bf16::narrow(x.to_f32()) };
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, pointer: *mut f16, value: [R; LANES]) {
        for (l, x) in value.into_iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe { *pointer.add(l) = f16::narrow(x.to_f32()) };
        }
    }
}
