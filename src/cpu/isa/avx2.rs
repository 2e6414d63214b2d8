//! AVX2 with FMA and F16C: 8 float32 or 4 float64 a register, 16 registers.

use crate::cpu::simd::{Simd, Task};
use half::{bf16, f16};
use std::arch::x86_64::{
    __m128i, __m256, __m256d, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _mm_add_pd,
    _mm_add_ps, _mm_add_sd, _mm_add_ss, _mm_cvtsd_f64, _mm_cvtss_f32, _mm_loadu_si128, _mm_max_pd, _mm_max_ps,
    _mm_max_sd, _mm_max_ss, _mm_movehl_ps, _mm_packus_epi32, _mm_prefetch, _mm_shuffle_ps, _mm_storeu_si128,
    _mm_unpackhi_pd, _mm256_add_epi32, _mm256_add_epi64, _mm256_add_pd, _mm256_add_ps, _mm256_and_si256,
    _mm256_blendv_pd, _mm256_blendv_ps, _mm256_castpd_ps, _mm256_castpd256_pd128, _mm256_castps_pd,
    _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_pd, _mm256_castsi256_ps, _mm256_castsi256_si128,
    _mm256_cmp_ps, _mm256_cmpgt_epi32, _mm256_cmpgt_epi64, _mm256_cvtepi32_epi64, _mm256_cvtepu16_epi32,
    _mm256_cvtpd_epi32, _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_cvtps_ph, _mm256_extractf128_pd,
    _mm256_extractf128_ps, _mm256_extracti128_si256, _mm256_fmadd_pd, _mm256_fmadd_ps, _mm256_loadu_pd,
    _mm256_loadu_ps, _mm256_max_pd, _mm256_max_ps, _mm256_mul_pd, _mm256_mul_ps, _mm256_or_si256,
    _mm256_permute2f128_pd, _mm256_permute2f128_ps, _mm256_round_pd, _mm256_round_ps, _mm256_set1_epi32,
    _mm256_set1_epi64x, _mm256_set1_pd, _mm256_set1_ps, _mm256_setr_epi32, _mm256_setr_epi64x, _mm256_slli_epi32,
    _mm256_slli_epi64, _mm256_srli_epi32, _mm256_storeu_pd, _mm256_storeu_ps, _mm256_sub_pd, _mm256_sub_ps,
    _mm256_unpackhi_pd, _mm256_unpackhi_ps, _mm256_unpacklo_pd, _mm256_unpacklo_ps,
};
use std::marker::PhantomData;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// The token: whoever holds one runs on a CPU with these instructions.
#[derive(Debug, Clone, Copy)]
pub struct Avx2<R>(PhantomData<R>);

impl<R> Avx2<R> {
    /// A token where the CPU has the instructions.
    pub fn new() -> Option<Self> {
        Self::is_available().then_some(Self(PhantomData))
    }

    /// A token on the caller's word.
    ///
    /// # Safety
    /// The CPU must have AVX2, FMA and F16C.
    pub const unsafe fn new_unchecked() -> Self {
        Self(PhantomData)
    }

    /// Whether the CPU has the instructions.
    pub fn is_available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }
}

/// A function of its own for every task, so that big tasks are compiled once.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn with_instructions<K: Task>(task: K) -> K::Output {
    task.run()
}

// SAFETY (every block of this file): the token proves the instructions; pointers are the callers' contract.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all, above")]
#[allow(clippy::cast_ptr_alignment, reason = "the unaligned loads and stores take any address")]
impl Simd for Avx2<f32> {
    type Real = f32;
    type Vector = __m256;
    const LANES: usize = 8;
    const TALL: usize = 6;

    #[inline(always)]
    fn vectorize<K: Task>(self, task: K) -> K::Output {
        unsafe { with_instructions(task) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<NEAREST>(a) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m256, n: __m256) -> __m256 {
        unsafe {
            // 2^n from its exponent bits; n = -127 gives the bits of zero.
            let floor = _mm256_max_ps(_mm256_set1_ps(-127.0), n);
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(floor), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    fn first(self, count: usize, a: __m256, b: __m256) -> __m256 {
        unsafe {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let below = _mm256_cmpgt_epi32(_mm256_set1_epi32(count.min(8) as i32), lane);
            _mm256_blendv_ps(b, a, _mm256_castsi256_ps(below))
        }
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn largest(self, a: __m256) -> f32 {
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [__m256]) {
        let mut other = [self.zero(); 8];
        unsafe {
            // Squares of four in every half register, then the halves.
            for i in (0..8).step_by(2) {
                other[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
                other[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
            }
            for i in [0, 4] {
                let low = [_mm256_castps_pd(other[i]), _mm256_castps_pd(other[i + 2])];
                let high = [_mm256_castps_pd(other[i + 1]), _mm256_castps_pd(other[i + 3])];
                rows[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low[0], low[1]));
                rows[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low[0], low[1]));
                rows[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high[0], high[1]));
                rows[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high[0], high[1]));
            }
            other.copy_from_slice(&rows[..8]);
            for i in 0..4 {
                rows[i] = _mm256_permute2f128_ps::<0x20>(other[i], other[i + 4]);
                rows[i + 4] = _mm256_permute2f128_ps::<0x31>(other[i], other[i + 4]);
            }
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, pointer: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(pointer.cast()) }
    }
    #[inline(always)]
    unsafe fn load(self, pointer: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(pointer) }
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut f32, value: __m256) {
        unsafe { _mm256_storeu_ps(pointer, value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, pointer: *const bf16) -> __m256 {
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(pointer.cast::<__m128i>()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, pointer: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(pointer.cast::<__m128i>())) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, pointer: *mut bf16, value: __m256) {
        unsafe {
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            // A NaN would round to infinity: keep its upper half and make it quiet.
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value);
            let kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
            let upper = _mm256_srli_epi32::<16>(_mm256_castps_si256(kept));
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
            _mm_storeu_si128(pointer.cast::<__m128i>(), packed);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, pointer: *mut f16, value: __m256) {
        unsafe { _mm_storeu_si128(pointer.cast::<__m128i>(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all, above")]
impl Simd for Avx2<f64> {
    type Real = f64;
    type Vector = __m256d;
    const LANES: usize = 4;
    const TALL: usize = 6;

    #[inline(always)]
    fn vectorize<K: Task>(self, task: K) -> K::Output {
        unsafe { with_instructions(task) }
    }
    #[inline(always)]
    fn splat(self, value: f64) -> __m256d {
        unsafe { _mm256_set1_pd(value) }
    }
    #[inline(always)]
    fn add(self, a: __m256d, b: __m256d) -> __m256d {
        unsafe { _mm256_add_pd(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256d, b: __m256d) -> __m256d {
        unsafe { _mm256_sub_pd(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256d, b: __m256d) -> __m256d {
        unsafe { _mm256_mul_pd(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256d, b: __m256d, c: __m256d) -> __m256d {
        unsafe { _mm256_fmadd_pd(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256d, b: __m256d) -> __m256d {
        unsafe { _mm256_max_pd(a, b) }
    }
    #[inline(always)]
    fn round(self, a: __m256d) -> __m256d {
        unsafe { _mm256_round_pd::<NEAREST>(a) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m256d, n: __m256d) -> __m256d {
        unsafe {
            // 2^n from its exponent bits; n = -1023 gives the bits of zero.
            let floor = _mm256_max_pd(_mm256_set1_pd(-1023.0), n);
            let integers = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(floor));
            let exponent = _mm256_add_epi64(integers, _mm256_set1_epi64x(1023));
            _mm256_mul_pd(a, _mm256_castsi256_pd(_mm256_slli_epi64::<52>(exponent)))
        }
    }
    #[inline(always)]
    fn first(self, count: usize, a: __m256d, b: __m256d) -> __m256d {
        unsafe {
            let lane = _mm256_setr_epi64x(0, 1, 2, 3);
            let below = _mm256_cmpgt_epi64(_mm256_set1_epi64x(count.min(4) as i64), lane);
            _mm256_blendv_pd(b, a, _mm256_castsi256_pd(below))
        }
    }
    #[inline(always)]
    fn sum(self, a: __m256d) -> f64 {
        unsafe {
            let two = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd::<1>(a));
            _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }
    #[inline(always)]
    fn largest(self, a: __m256d) -> f64 {
        unsafe {
            let two = _mm_max_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd::<1>(a));
            _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [__m256d]) {
        unsafe {
            let low = [_mm256_unpacklo_pd(rows[0], rows[1]), _mm256_unpacklo_pd(rows[2], rows[3])];
            let high = [_mm256_unpackhi_pd(rows[0], rows[1]), _mm256_unpackhi_pd(rows[2], rows[3])];
            rows[0] = _mm256_permute2f128_pd::<0x20>(low[0], low[1]);
            rows[1] = _mm256_permute2f128_pd::<0x20>(high[0], high[1]);
            rows[2] = _mm256_permute2f128_pd::<0x31>(low[0], low[1]);
            rows[3] = _mm256_permute2f128_pd::<0x31>(high[0], high[1]);
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, pointer: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(pointer.cast()) }
    }
    #[inline(always)]
    unsafe fn load(self, pointer: *const f64) -> __m256d {
        unsafe { _mm256_loadu_pd(pointer) }
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut f64, value: __m256d) {
        unsafe { _mm256_storeu_pd(pointer, value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, _: *const bf16) -> __m256d {
        unreachable!("bfloat16 computes in float32")
    }
    #[inline(always)]
    unsafe fn load_f16(self, _: *const f16) -> __m256d {
        unreachable!("float16 computes in float32")
    }
    #[inline(always)]
    unsafe fn store_bf16(self, _: *mut bf16, _: __m256d) {
        unreachable!("bfloat16 computes in float32")
    }
    #[inline(always)]
    unsafe fn store_f16(self, _: *mut f16, _: __m256d) {
        unreachable!("float16 computes in float32")
    }
}
