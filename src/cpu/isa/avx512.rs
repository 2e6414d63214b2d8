//! AVX-512 (F, BW, DQ, VL): 16 float32 or 8 float64 a register, 32 registers.

use crate::cpu::simd::{Simd, Task};
use half::{bf16, f16};
use std::arch::x86_64::{
    __m256i, __m512, __m512d, __mmask16, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0,
    _mm_prefetch, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_epi32, _mm512_add_pd, _mm512_add_ps,
    _mm512_and_si512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_cvtps_ph, _mm512_fmadd_pd, _mm512_fmadd_ps,
    _mm512_loadu_pd, _mm512_loadu_ps, _mm512_mask_blend_epi32, _mm512_mask_blend_pd, _mm512_mask_blend_ps,
    _mm512_max_pd, _mm512_max_ps, _mm512_mul_pd, _mm512_mul_ps, _mm512_or_si512, _mm512_reduce_add_pd,
    _mm512_reduce_add_ps, _mm512_reduce_max_pd, _mm512_reduce_max_ps, _mm512_roundscale_pd, _mm512_roundscale_ps,
    _mm512_scalef_pd, _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_pd, _mm512_set1_ps, _mm512_shuffle_f32x4,
    _mm512_shuffle_f64x2, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_pd, _mm512_storeu_ps, _mm512_sub_pd,
    _mm512_sub_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::marker::PhantomData;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// The token: whoever holds one runs on a CPU with these instructions.
#[derive(Debug, Clone, Copy)]
pub struct Avx512<R>(PhantomData<R>);

impl<R> Avx512<R> {
    /// A token where the CPU has the instructions.
    pub fn new() -> Option<Self> {
        Self::is_available().then_some(Self(PhantomData))
    }

    /// A token on the caller's word.
    ///
    /// # Safety
    /// The CPU must have AVX-512 F, BW, DQ and VL, FMA and F16C.
    pub const unsafe fn new_unchecked() -> Self {
        Self(PhantomData)
    }

    /// Whether the CPU has the instructions.
    pub fn is_available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }
}

/// A function of its own for every task, so that big tasks are compiled once.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
unsafe fn with_instructions<K: Task>(task: K) -> K::Output {
    task.run()
}

/// Lanes 0 .. count of a 16-lane mask.
#[inline(always)]
fn lanes(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

// SAFETY (every block of this file): the token proves the instructions; pointers are the callers' contract.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all, above")]
#[allow(clippy::cast_ptr_alignment, reason = "the unaligned loads and stores take any address")]
impl Simd for Avx512<f32> {
    type Real = f32;
    type Vector = __m512;
    const LANES: usize = 16;
    const TALL: usize = 12;

    #[inline(always)]
    fn vectorize<K: Task>(self, task: K) -> K::Output {
        unsafe { with_instructions(task) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<NEAREST>(a) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn first(self, count: usize, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(lanes(count), b, a) }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [__m512]) {
        let mut other = [self.zero(); 16];
        unsafe {
            // Squares of four in every quarter register, then the quarters: first of row pairs 4 apart, then 8 apart.
            for i in (0..16).step_by(2) {
                other[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
                other[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
            }
            for i in (0..16).step_by(4) {
                let low = [_mm512_castps_pd(other[i]), _mm512_castps_pd(other[i + 2])];
                let high = [_mm512_castps_pd(other[i + 1]), _mm512_castps_pd(other[i + 3])];
                rows[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
                rows[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
                rows[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
                rows[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
            }
            for i in [0, 1, 2, 3, 8, 9, 10, 11] {
                other[i] = _mm512_shuffle_f32x4::<0x88>(rows[i], rows[i + 4]);
                other[i + 4] = _mm512_shuffle_f32x4::<0xdd>(rows[i], rows[i + 4]);
            }
            for i in 0..8 {
                rows[i] = _mm512_shuffle_f32x4::<0x88>(other[i], other[i + 8]);
                rows[i + 8] = _mm512_shuffle_f32x4::<0xdd>(other[i], other[i + 8]);
            }
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, pointer: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(pointer.cast()) }
    }
    #[inline(always)]
    unsafe fn load(self, pointer: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(pointer) }
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(pointer, value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, pointer: *const bf16) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(pointer.cast::<__m256i>()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, pointer: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(pointer.cast::<__m256i>())) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, pointer: *mut bf16, value: __m512) {
        unsafe {
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            // A NaN would round to infinity: keep its upper half and make it quiet.
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let kept = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet));
            _mm256_storeu_si256(pointer.cast::<__m256i>(), _mm512_cvtepi32_epi16(kept));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, pointer: *mut f16, value: __m512) {
        unsafe { _mm256_storeu_si256(pointer.cast::<__m256i>(), _mm512_cvtps_ph::<NEAREST>(value)) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all, above")]
impl Simd for Avx512<f64> {
    type Real = f64;
    type Vector = __m512d;
    const LANES: usize = 8;
    const TALL: usize = 12;

    #[inline(always)]
    fn vectorize<K: Task>(self, task: K) -> K::Output {
        unsafe { with_instructions(task) }
    }
    #[inline(always)]
    fn splat(self, value: f64) -> __m512d {
        unsafe { _mm512_set1_pd(value) }
    }
    #[inline(always)]
    fn add(self, a: __m512d, b: __m512d) -> __m512d {
        unsafe { _mm512_add_pd(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512d, b: __m512d) -> __m512d {
        unsafe { _mm512_sub_pd(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512d, b: __m512d) -> __m512d {
        unsafe { _mm512_mul_pd(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512d, b: __m512d, c: __m512d) -> __m512d {
        unsafe { _mm512_fmadd_pd(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512d, b: __m512d) -> __m512d {
        unsafe { _mm512_max_pd(a, b) }
    }
    #[inline(always)]
    fn round(self, a: __m512d) -> __m512d {
        unsafe { _mm512_roundscale_pd::<NEAREST>(a) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m512d, n: __m512d) -> __m512d {
        unsafe { _mm512_scalef_pd(a, n) }
    }
    #[inline(always)]
    fn first(self, count: usize, a: __m512d, b: __m512d) -> __m512d {
        unsafe { _mm512_mask_blend_pd(lanes(count) as u8, b, a) }
    }
    #[inline(always)]
    fn sum(self, a: __m512d) -> f64 {
        unsafe { _mm512_reduce_add_pd(a) }
    }
    #[inline(always)]
    fn largest(self, a: __m512d) -> f64 {
        unsafe { _mm512_reduce_max_pd(a) }
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [__m512d]) {
        let mut other = [self.zero(); 8];
        unsafe {
            for i in (0..8).step_by(2) {
                other[i] = _mm512_unpacklo_pd(rows[i], rows[i + 1]);
                other[i + 1] = _mm512_unpackhi_pd(rows[i], rows[i + 1]);
            }
            for i in [0, 1, 4, 5] {
                rows[i] = _mm512_shuffle_f64x2::<0x88>(other[i], other[i + 2]);
                rows[i + 2] = _mm512_shuffle_f64x2::<0xdd>(other[i], other[i + 2]);
            }
            other.copy_from_slice(&rows[..8]);
            for i in 0..4 {
                rows[i] = _mm512_shuffle_f64x2::<0x88>(other[i], other[i + 4]);
                rows[i + 4] = _mm512_shuffle_f64x2::<0xdd>(other[i], other[i + 4]);
            }
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, pointer: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(pointer.cast()) }
    }
    #[inline(always)]
    unsafe fn load(self, pointer: *const f64) -> __m512d {
        unsafe { _mm512_loadu_pd(pointer) }
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut f64, value: __m512d) {
        unsafe { _mm512_storeu_pd(pointer, value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, _: *const bf16) -> __m512d {
        unreachable!("bfloat16 computes in float32")
    }
    #[inline(always)]
    unsafe fn load_f16(self, _: *const f16) -> __m512d {
        unreachable!("float16 computes in float32")
    }
    #[inline(always)]
    unsafe fn store_bf16(self, _: *mut bf16, _: __m512d) {
        unreachable!("bfloat16 computes in float32")
    }
    #[inline(always)]
    unsafe fn store_f16(self, _: *mut f16, _: __m512d) {
        unreachable!("float16 computes in float32")
    }
}
