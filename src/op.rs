//! The public operators: a problem in, results written. Each checks every shape, picks the kernel ([`crate::dispatch`])
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

/// Multiply-adds that one more thread must have to do, about 80 us of them: it takes several microseconds to be woken, and
/// longer where another library's threads still spin on its core.
const WORTH_A_THREAD: usize = 1 << 23;

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
    let problem = &problem.validated()?;
    problem.shapes().check_outputs(outputs.aligned.shape(), outputs.basis.as_ref().map(ViewMut::shape))?;
    T::align(exec(threads, problem.multiply_adds())?, problem, outputs)
}

/// Gradients of [`duplex_align`].
pub fn duplex_align_backward<T: CpuElement>(
    problem: &AlignProblem<'_, T>,
    upstream: &AlignUpstream<'_, T>,
    gradients: &mut AlignGradients<'_, T>,
    threads: usize,
) -> Result<()> {
    let problem = &problem.validated()?;
    let shapes = problem.shapes();
    shapes.check_upstream(upstream.aligned.shape(), upstream.basis.map(|basis| basis.shape()))?;
    shapes.check_gradients(
        [gradients.key.shape(), gradients.value.shape()],
        [gradients.keep.shape(), gradients.mix.shape()],
        gradients.basis.as_ref().map(ViewMut::shape),
    )?;
    T::align_backward(exec(threads, problem.multiply_adds().saturating_mul(3))?, problem, upstream, gradients)
}

/// Modular masked attention (paper, equations 7 to 10).
pub fn modular_attention<T: CpuElement>(
    problem: &AttendProblem<'_, T>,
    outputs: &mut AttendOutputs<'_, T>,
    threads: usize,
) -> Result<()> {
    let problem = &problem.validated()?;
    let mass = outputs.mass.as_ref().map(|mass| (mass.by, mass.values.shape()));
    let parts = outputs.parts.as_ref().map(ViewMut::shape);
    let logsumexp = outputs.logsumexp.as_ref().map(ViewMut::shape);
    problem.shapes().check_outputs(outputs.out.shape(), logsumexp, parts, mass, problem.modalities())?;
    T::attend(exec(threads, problem.multiply_adds())?, problem, outputs)
}

/// Gradients of [`modular_attention`], recomputed from its output and logsumexp.
pub fn modular_attention_backward<T: CpuElement>(
    problem: &AttendProblem<'_, T>,
    upstream: &AttendUpstream<'_, T>,
    gradients: &mut AttendGradients<'_, T>,
    threads: usize,
) -> Result<()> {
    let problem = &problem.validated()?;
    let shapes = problem.shapes();
    shapes.check_upstream(
        [upstream.out_gradient.shape(), upstream.out.shape(), upstream.logsumexp.shape()],
        upstream.parts.map(|parts| parts.shape()),
    )?;
    shapes.check_gradients(
        [gradients.query.shape(), gradients.key.shape(), gradients.value.shape()],
        gradients.sink.as_ref().map(ViewMut::shape),
        gradients.bias.as_ref().map(ViewMut::shape),
        problem.modalities(),
    )?;
    T::attend_backward(exec(threads, problem.multiply_adds().saturating_mul(2))?, problem, upstream, gradients)
}

/// Pseudo-scores: the sink logit (B, Hq, Nq) of every query row (paper, equation 10).
pub fn pseudo_sink<R: Real>(problem: &SinkProblem<'_, R>, sink: &mut ViewMut<'_, R, 3>) -> Result<()> {
    let problem = &problem.validated()?;
    problem.shapes().check_outputs(sink.shape())?;
    spec::mask::pseudo_sink(problem, sink);
    Ok(())
}

/// Gradients (M, Hq) of [`pseudo_sink`] for decay and base.
pub fn pseudo_sink_backward<R: Real>(
    problem: &SinkProblem<'_, R>,
    sink_gradient: View<'_, R, 3>,
    decay: &mut ViewMut<'_, R, 2>,
    base: &mut ViewMut<'_, R, 2>,
) -> Result<()> {
    let problem = &problem.validated()?;
    problem.shapes().check_gradients(sink_gradient.shape(), [decay.shape(), base.shape()])?;
    spec::mask::pseudo_sink_backward(problem, sink_gradient, decay, base);
    Ok(())
}

/// Floating point operations a second of a register loop of the products that [`modular_attention`] on this dtype is made
/// of: what its speed is measured against.
pub fn product_rate<T: CpuElement>(threads: usize, duration: Duration) -> Result<f64> {
    Ok(T::product_rate(exec(threads, usize::MAX)?, duration))
}
