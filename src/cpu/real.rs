//! float32 and float64 as the kernels see them.

#![allow(clippy::approx_constant, reason = "a minimax coefficient is near ln 2, not ln 2")]

#[cfg(target_arch = "x86_64")]
use super::isa;
use super::simd::Simd;
use crate::dtype::Real;

/// float32 and float64 with what the kernels need to know of them.
pub trait CpuReal: Real {
    /// Coefficients of the polynomial that approximates 2^x on [-1/2, 1/2], constant term first.
    const EXP2: &'static [Self];
    /// 2^n is zero from here down for every instruction set.
    const EXP2_LOWEST: Self;
    /// log2 e
    const LOG2_E: Self;
    /// ln 2
    const LN_2: Self;
    /// The vectors of AVX-512.
    #[cfg(target_arch = "x86_64")]
    type Avx512: Simd<Real = Self>;
    /// The vectors of AVX2.
    #[cfg(target_arch = "x86_64")]
    type Avx2: Simd<Real = Self>;
    /// A token for AVX-512, if the machine has it.
    #[cfg(target_arch = "x86_64")]
    fn avx512() -> Option<Self::Avx512>;
    /// A token for AVX2, if the machine has it.
    #[cfg(target_arch = "x86_64")]
    fn avx2() -> Option<Self::Avx2>;
    /// 2^n for integral n <= 0; 0 below the normal numbers.
    fn power_of_two(n: Self) -> Self;
    /// To the nearest integer.
    fn round(self) -> Self;
    /// For storage in a narrower type.
    fn to_f32(self) -> f32;
    /// From a narrower type.
    fn from_f32(value: f32) -> Self;
}

macro_rules! cpu_real {
    ($type:ident, $bits:ident, $mantissa:literal, $bias:literal, $lowest:literal, [$($coefficient:literal),* $(,)?]) => {
        impl CpuReal for $type {
            const EXP2: &'static [Self] = &[$($coefficient),*];
            const EXP2_LOWEST: Self = $lowest;
            const LOG2_E: Self = std::$type::consts::LOG2_E;
            const LN_2: Self = std::$type::consts::LN_2;
            #[cfg(target_arch = "x86_64")]
            type Avx512 = isa::avx512::Avx512<$type>;
            #[cfg(target_arch = "x86_64")]
            type Avx2 = isa::avx2::Avx2<$type>;
            #[cfg(target_arch = "x86_64")]
            fn avx512() -> Option<Self::Avx512> {
                isa::avx512::Avx512::new()
            }
            #[cfg(target_arch = "x86_64")]
            fn avx2() -> Option<Self::Avx2> {
                isa::avx2::Avx2::new()
            }
            #[inline(always)]
            fn power_of_two(n: Self) -> Self {
                let exponent = n as i64 + $bias;
                if exponent <= 0 { 0.0 } else { $type::from_bits((exponent as $bits) << $mantissa) }
            }
            #[inline(always)]
            fn round(self) -> Self {
                self.round_ties_even()
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                self as f32
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                Self::from(value)
            }
        }
    };
}

// Minimax polynomials in relative error (Remez): 1.9e-9 and 3.1e-18, both below half a unit in the last place.
cpu_real!(
    f32,
    u32,
    23,
    127,
    -256.0,
    [1.0, 0.693_147_2, 0.240_226_47, 0.055_503_286, 0.009_618_489, 0.001_339_993_1, 0.000_153_458_11,]
);
cpu_real!(
    f64,
    u64,
    52,
    1023,
    -2048.0,
    [
        1.0,
        0.693_147_180_559_945_3,
        0.240_226_506_959_101_56,
        0.055_504_108_664_819_92,
        0.009_618_129_107_588_335,
        0.001_333_355_814_678_993_5,
        0.000_154_035_304_625_144_5,
        0.000_015_252_733_489_975_453,
        0.000_001_321_543_308_967_195_5,
        1.017_819_802_711_265_9e-7,
        7.074_105_613_499_429e-9,
        4.435_281_892_117_942e-10,
    ]
);
