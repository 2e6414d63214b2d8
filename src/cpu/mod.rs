//! CPU kernels: tiled, recomputing backward, memory linear in N, bitwise the same result for any number of threads.
//!
//! [`simd`] is the trait an instruction set implements, [`isa`] the implementations, [`kernel`] the inner loops written
//! once over the trait, [`align`] and [`attend`] the two operators.

pub mod align;
pub mod attend;
mod buffer;
pub mod isa;
pub mod kernel;
pub mod parallel;
mod real;
pub mod simd;

use crate::dispatch::Isa;
pub use real::CpuReal;

/// How a call runs: which instruction set, on how many threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exec {
    /// The instruction set; it must be available.
    pub isa: Isa,
    /// Number of threads, at least 1.
    pub threads: usize,
}

/// Calls a generic function with the token of the instruction set that `exec` names.
macro_rules! with_token {
    ($exec:expr, $real:ty, $s:ident => $body:expr) => {{
        #[allow(unused_imports, reason = "not every architecture has every set")]
        use $crate::cpu::CpuReal as _;
        let unavailable = "dispatch only chooses what the machine has";
        let _ = unavailable;
        match $exec.isa {
            #[cfg(target_arch = "x86_64")]
            $crate::dispatch::Isa::Avx512 => {
                let $s = <$real>::avx512().expect(unavailable);
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::dispatch::Isa::Avx2 => {
                let $s = <$real>::avx2().expect(unavailable);
                $body
            }
            _ => {
                let $s = $crate::cpu::isa::scalar::Scalar::<$real>::new();
                $body
            }
        }
    }};
}
pub(crate) use with_token;
