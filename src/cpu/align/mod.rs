//! Duplex alignment on the CPU: bases, their row norms and mixes, and the aligned keys; forward and backward.

mod backward;
mod basis;
mod few;
mod forward;

use super::dot::Dot;
use super::{CpuReal, Exec, with_token};
use crate::dtype::Element;
use crate::error::Result;
use crate::problem::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream};

/// Tokens that are packed and multiplied at a time.
const TOKENS: usize = 128;

pub(super) fn forward<D: Dot<Real = T::Acc>, T: Element<Acc: CpuReal>>(
    d: D,
    threads: usize,
    problem: &AlignProblem<'_, T>,
    outputs: &mut AlignOutputs<'_, T>,
) -> Result<()> {
    if few::suits(d.simd(), problem) {
        few::run(d.simd(), threads, problem, outputs)
    } else {
        forward::run(d, threads, problem, outputs)
    }
}

pub(super) fn backward<T: Element<Acc: CpuReal>>(
    exec: Exec,
    problem: &AlignProblem<'_, T>,
    upstream: &AlignUpstream<'_, T>,
    gradients: &mut AlignGradients<'_, T>,
) -> Result<()> {
    with_token!(exec, T::Acc, s => backward::run(s, exec.threads, problem, upstream, gradients))
}
