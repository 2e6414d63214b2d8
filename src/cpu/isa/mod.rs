//! One file an instruction set, each nothing but its intrinsics behind [`Simd`](super::simd::Simd).

pub mod scalar;

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "x86_64")]
pub mod avx512bf16;

/// An instruction set the CPU kernels are compiled for, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, any machine.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same, and attention on bfloat16 tensors multiplies bfloat16 pairs (AVX512-BF16).
    Avx512Bf16,
    /// The same, by tiles (AMX).
    Amx,
}

impl Isa {
    /// Every instruction set this crate knows, weakest first.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// The name `MODA_ATTN_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::<f32>::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::<f32>::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => avx512bf16::Avx512Bf16::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => amx::Amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Whether attention on bfloat16 tensors multiplies bfloat16 numbers; everything else is float32 then as well.
    pub const fn multiplies_bfloat16(self) -> bool {
        matches!(self, Self::Avx512Bf16 | Self::Amx)
    }

    /// Whether it is faster here than the weaker ones: an instruction may be there and not pay.
    pub fn pays(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => avx512bf16::Avx512Bf16::is_fast(),
            _ => self.is_available(),
        }
    }
}
