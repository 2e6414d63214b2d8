//! The public operators: a validated problem in, results written. Each picks the kernel ([`crate::dispatch`])
//! and runs it on `threads` threads; the result is bitwise the same for every number of them.

use crate::cpu::{CpuElement, Exec};
use crate::dispatch;
use crate::dtype::Real;
use crate::error::Result;
use crate::problem::{
    AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, AttendGradients, AttendOutputs, AttendProblem,
    AttendUpstream, SinkProblem,
};
use crate::spec;
use crate::view::{View, ViewMut};
use std::time::Duration;

/// Multiply-adds that one more thread must have to do: it takes several microseconds to be woken.
const WORTH_A_THREAD: usize = 1 << 20;

/// How a call of so many multiply-adds runs: on no more threads than are worth waking.
fn exec(threads: usize, multiply_adds: usize) -> Result<Exec> {
    let worth = 1 + multiply_adds / WORTH_A_THREAD;
    Ok(Exec { isa: dispatch::choice()?.isa, threads: threads.min(worth).max(1) })
}

/// Duplex attention alignment (paper, equations 5 and 6): aligned keys and the bases.
pub fn duplex_align<T: CpuElement>(
    problem: &AlignProblem<'_, T>,
    outputs: &mut AlignOutputs<'_, T>,
    threads: usize,
) -> Result<()> {
    T::align(exec(threads, problem.multiply_adds())?, problem, outputs)
}

/// Gradients of [`duplex_align`].
pub fn duplex_align_backward<T: CpuElement>(
    problem: &AlignProblem<'_, T>,
    upstream: &AlignUpstream<'_, T>,
    gradients: &mut AlignGradients<'_, T>,
    threads: usize,
) -> Result<()> {
    T::align_backward(exec(threads, problem.multiply_adds().saturating_mul(3))?, problem, upstream, gradients)
}

/// Modular masked attention (paper, equations 7 to 10).
pub fn modular_attention<T: CpuElement>(
    problem: &AttendProblem<'_, T>,
    outputs: &mut AttendOutputs<'_, T>,
    threads: usize,
) -> Result<()> {
    T::attend(exec(threads, problem.multiply_adds())?, problem, outputs)
}

/// Gradients of [`modular_attention`], recomputed from its output and logsumexp.
pub fn modular_attention_backward<T: CpuElement>(
    problem: &AttendProblem<'_, T>,
    upstream: &AttendUpstream<'_, T>,
    gradients: &mut AttendGradients<'_, T>,
    threads: usize,
) -> Result<()> {
    T::attend_backward(exec(threads, problem.multiply_adds().saturating_mul(2))?, problem, upstream, gradients)
}

/// Pseudo-scores: the sink logit (B, Hq, Nq) of every query row (paper, equation 10).
pub fn pseudo_sink<R: Real>(problem: &SinkProblem<'_, R>, sink: &mut ViewMut<'_, R, 3>) {
    spec::mask::pseudo_sink(problem, sink);
}

/// Gradients (M, Hq) of [`pseudo_sink`] for decay and base.
pub fn pseudo_sink_backward<R: Real>(
    problem: &SinkProblem<'_, R>,
    sink_gradient: View<'_, R, 3>,
    decay: &mut ViewMut<'_, R, 2>,
    base: &mut ViewMut<'_, R, 2>,
) {
    spec::mask::pseudo_sink_backward(problem, sink_gradient, decay, base);
}

/// Floating point operations a second of a register loop of the products that [`modular_attention`] on this dtype is made
/// of: what its speed is measured against.
pub fn product_rate<T: CpuElement>(threads: usize, duration: Duration) -> Result<f64> {
    Ok(T::product_rate(exec(threads, usize::MAX)?, duration))
}
