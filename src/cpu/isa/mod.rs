//! One file an instruction set, each nothing but its intrinsics behind [`Simd`](super::simd::Simd).

pub mod scalar;

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
