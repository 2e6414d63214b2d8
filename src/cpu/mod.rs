//! CPU kernels: tiled, recomputing backward, memory linear in N, bitwise the same result for any number of threads.
//!
//! `simd` is the trait an instruction set implements, `isa` the implementations, `kernel` the inner loops written once
//! over the trait, `align` and `attend` the two operators.

#![allow(unreachable_pub, reason = "`pub` in these modules is for the crate; what users see is named here")]

mod align;
mod attend;
mod buffer;
mod dot;
mod isa;
mod kernel;
mod pages;
mod parallel;
mod rate;
mod real;
mod simd;

use crate::dtype::Element;
use crate::error::Result;
use crate::problem::{
    AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, AttendGradients, AttendOutputs, AttendProblem,
    AttendUpstream,
};
use half::{bf16, f16};
pub use isa::Isa;
use pages::prefer_large_under;
pub use real::CpuReal;
use std::time::Duration;

/// Calls a generic function with the token of the instruction set that `exec` names; the machine must have it, which
/// dispatch sees to.
macro_rules! with_token {
    ($exec:expr, $real:ty, $s:ident => $body:expr) => {
        match $exec.isa {
            $crate::cpu::Isa::Scalar => {
                let $s = $crate::cpu::isa::scalar::Scalar::<$real>::new();
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx2 => {
                let $s = <$real as $crate::cpu::CpuReal>::avx2().expect("this machine has AVX2");
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx512 | $crate::cpu::Isa::Avx512Bf16 | $crate::cpu::Isa::Amx => {
                let $s = <$real as $crate::cpu::CpuReal>::avx512().expect("this machine has AVX-512");
                $body
            }
            #[cfg(not(target_arch = "x86_64"))]
            other => unreachable!("{other:?} belongs to another architecture"),
        }
    };
}
pub(crate) use with_token;

/// Calls a generic function with the products that an operator on a dtype is to use: those of bfloat16 pairs where the
/// instruction set has them and the tensors are bfloat16, else those of plain numbers.
macro_rules! with_dot {
    ($exec:expr, bf16, $dot:ident => $body:expr) => {
        match $exec.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                let $dot = isa::avx512bf16::Avx512Bf16::new().expect("this machine has AVX512-BF16");
                $body
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => {
                let $dot = isa::amx::Amx::new().expect("this process may use AMX");
                $body
            }
            _ => with_token!($exec, f32, $dot => $body),
        }
    };
    ($exec:expr, $type:ident, $dot:ident => $body:expr) => {
        with_token!($exec, <$type as Element>::Acc, $dot => $body)
    };
}

/// How a call runs: which instruction set, on how many threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exec {
    /// The instruction set; it must be available.
    pub isa: Isa,
    /// Number of threads, at least 1.
    pub threads: usize,
}

/// A storage dtype with its kernels. They are methods, and so compiled once, here, and not again in every crate that
/// calls a generic function.
pub trait CpuElement: Element<Acc: CpuReal> {
    /// Aligned keys and the bases (paper, equations 5 and 6).
    fn align(exec: Exec, problem: &AlignProblem<'_, Self>, outputs: &mut AlignOutputs<'_, Self>) -> Result<()>;

    /// Gradients through unit keys, basis, row norm and fusion.
    fn align_backward(
        exec: Exec,
        problem: &AlignProblem<'_, Self>,
        upstream: &AlignUpstream<'_, Self>,
        gradients: &mut AlignGradients<'_, Self>,
    ) -> Result<()>;

    /// Output, logsumexp and mass (paper, equations 7 to 10).
    fn attend(exec: Exec, problem: &AttendProblem<'_, Self>, outputs: &mut AttendOutputs<'_, Self>) -> Result<()>;

    /// Gradients, the probabilities recomputed from the logsumexp.
    fn attend_backward(
        exec: Exec,
        problem: &AttendProblem<'_, Self>,
        upstream: &AttendUpstream<'_, Self>,
        gradients: &mut AttendGradients<'_, Self>,
    ) -> Result<()>;

    /// Floating point operations a second of a register loop of the products that attention on this dtype is made of.
    fn product_rate(exec: Exec, duration: Duration) -> f64;
}

macro_rules! cpu_element {
    ($($type:ident),*) => {
        $(impl CpuElement for $type {
            fn align(exec: Exec, problem: &AlignProblem<'_, Self>, outputs: &mut AlignOutputs<'_, Self>) -> Result<()> {
                prefer_large_under(&mut outputs.aligned);
                with_dot!(exec, $type, dot => align::forward(dot, exec.threads, problem, outputs))
            }

            fn align_backward(
                exec: Exec,
                problem: &AlignProblem<'_, Self>,
                upstream: &AlignUpstream<'_, Self>,
                gradients: &mut AlignGradients<'_, Self>,
            ) -> Result<()> {
                [&mut gradients.key, &mut gradients.value].into_iter().for_each(prefer_large_under);
                align::backward(exec, problem, upstream, gradients)
            }

            fn attend(exec: Exec, problem: &AttendProblem<'_, Self>, outputs: &mut AttendOutputs<'_, Self>) -> Result<()> {
                prefer_large_under(&mut outputs.out);
                with_dot!(exec, $type, dot => attend::forward(dot, exec.threads, problem, outputs))
            }

            fn attend_backward(
                exec: Exec,
                problem: &AttendProblem<'_, Self>,
                upstream: &AttendUpstream<'_, Self>,
                gradients: &mut AttendGradients<'_, Self>,
            ) -> Result<()> {
                let results = [&mut gradients.query, &mut gradients.key, &mut gradients.value];
                results.into_iter().for_each(prefer_large_under);
                with_dot!(exec, $type, dot => attend::backward(dot, exec.threads, problem, upstream, gradients))
            }

            fn product_rate(exec: Exec, duration: Duration) -> f64 {
                with_dot!(exec, $type, dot => rate::rate(dot, exec.threads, duration))
            }
        })*
    };
}

cpu_element!(f32, f64, bf16, f16);
