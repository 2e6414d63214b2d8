//! AVX512-BF16: products of bfloat16 pairs summed in float32, twice the multiply-adds of an AVX-512 FMA. Everything but
//! the products is [`Avx512`].

use super::avx512::Avx512;
use crate::cpu::dot::Dot;
use crate::cpu::simd::{Simd, Task};
use half::bf16;
use std::arch::x86_64::{
    __cpuid, __m256bh, __m256i, __m512, __m512bh, __m512i, _mm256_storeu_si256, _mm512_cvtne2ps_pbh,
    _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_permutexvar_epi16, _mm512_set1_epi32,
    _mm512_storeu_si512,
};
use std::mem::transmute;

/// Two neighbouring numbers.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(4))]
pub struct Pair([bf16; 2]);

/// The token: whoever holds one runs on a CPU with these instructions.
#[derive(Debug, Clone, Copy)]
pub struct Avx512Bf16(Avx512<f32>);

impl Avx512Bf16 {
    /// A token where the CPU has the instructions.
    pub fn new() -> Option<Self> {
        let simd = Avx512::new()?;
        is_x86_feature_detected!("avx512bf16").then_some(Self(simd))
    }

    /// A token on the caller's word.
    ///
    /// # Safety
    /// The CPU must have AVX-512 F, BW, DQ, VL and BF16, FMA and F16C.
    #[cfg(test)]
    pub const unsafe fn new_unchecked() -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { Avx512::new_unchecked() })
    }

    /// Whether the CPU has the instructions.
    pub fn is_available() -> bool {
        Self::new().is_some()
    }

    /// Whether a bfloat16 product is faster than widening to float32: on AMD `vdpbf16ps` issues as often as an FMA and
    /// does twice the work; on Intel it takes four times as long.
    pub fn is_fast() -> bool {
        let vendor = __cpuid(0);
        Self::is_available() && [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
    }
}

/// A function of its own for every task, so that big tasks are compiled once.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")]
unsafe fn with_instructions<K: Task>(task: K) -> K::Output {
    task.run()
}

/// Brings the lower and the upper half of a register of 16-bit numbers side by side.
const INTERLEAVE: [u16; 32] = {
    let mut order = [0; 32];
    let mut lane = 0;
    while lane < 16 {
        order[2 * lane] = lane as u16;
        order[2 * lane + 1] = 16 + lane as u16;
        lane += 1;
    }
    order
};

// SAFETY (every block of this impl): the token proves the instructions; pointers are the callers' contract. Registers
// of the same size are transmuted, of which every bit pattern is valid.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all, above")]
#[allow(clippy::cast_ptr_alignment, reason = "the unaligned loads and stores take any address")]
impl Dot for Avx512Bf16 {
    type Real = f32;
    type Simd = Avx512<f32>;
    type Unit = Pair;
    type Units = __m512i;
    const DEPTH: usize = 2;

    #[inline(always)]
    fn simd(self) -> Avx512<f32> {
        self.0
    }
    #[inline(always)]
    fn enter<K: Task>(self, task: K) -> K::Output {
        unsafe { with_instructions(task) }
    }
    #[inline(always)]
    unsafe fn repeat(self, pointer: *const Pair) -> __m512i {
        unsafe { _mm512_set1_epi32(*pointer.cast::<i32>()) }
    }
    #[inline(always)]
    unsafe fn units(self, pointer: *const Pair) -> __m512i {
        unsafe { _mm512_loadu_si512(pointer.cast::<__m512i>()) }
    }
    #[inline(always)]
    fn dot(self, a: __m512i, b: __m512i, sum: __m512) -> __m512 {
        unsafe { _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)) }
    }
    #[inline(always)]
    unsafe fn store_left(self, row: *mut Pair, at: usize, numbers: __m512) {
        unsafe {
            let target = row.cast::<bf16>().add(at).cast::<__m256i>();
            _mm256_storeu_si256(target, transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers)));
        }
    }
    #[inline(always)]
    unsafe fn load_left(self, row: *const Pair, at: usize) -> __m512 {
        unsafe { self.0.load_bf16(row.cast::<bf16>().add(at)) }
    }
    #[inline(always)]
    unsafe fn store_right(self, units: *mut Pair, rows: [__m512; 2]) {
        unsafe {
            let order = _mm512_loadu_si512(INTERLEAVE.as_ptr().cast::<__m512i>());
            let halves = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(rows[1], rows[0]));
            _mm512_storeu_si512(units.cast::<__m512i>(), _mm512_permutexvar_epi16(order, halves));
        }
    }
}
