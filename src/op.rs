//! The public operators: a problem in, results written. Each checks every shape, picks the kernel ([`crate::dispatch`])
//! and runs it on `threads` threads; the result is bitwise the same for every number of them.

use crate::cpu::{CpuElement, Exec};
use crate::dispatch;
use crate::dtype::Real;
use crate::error::{Error, Result};
use crate::layout::print_shape;
use crate::problem::{
    AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, AttendGradients, AttendOutputs, AttendProblem,
    AttendUpstream, SinkProblem,
};
use crate::spec;
use crate::view::{View, ViewMut};
use std::time::Duration;

/// Where results go must have exactly their shape.
fn fits<const R: usize>(argument: &'static str, given: [usize; R], wanted: [usize; R]) -> Result<()> {
    if given == wanted {
        return Ok(());
    }
    Err(Error::Shape { argument, given: print_shape(&given), wanted: print_shape(&wanted) })
}

/// Optional results are there exactly where they are wanted, and of the right shape.
fn fits_if<const R: usize>(
    argument: &'static str,
    given: Option<[usize; R]>,
    wanted: Option<[usize; R]>,
) -> Result<()> {
    let print = |shape: Option<[usize; R]>| shape.map_or_else(|| "nothing".to_owned(), |shape| print_shape(&shape));
    if given == wanted {
        return Ok(());
    }
    Err(Error::Shape { argument, given: print(given), wanted: print(wanted) })
}

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
    let ([b, h, n, d], m) = (problem.key.shape(), problem.modalities());
    fits("aligned", outputs.aligned.shape(), [b, h, n, d])?;
    if let Some(basis) = &outputs.basis {
        fits("basis", basis.shape(), [b, h, m, d, d])?;
    }
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
    let ([b, h, n, d], m) = (problem.key.shape(), problem.modalities());
    let basis = [b, h, m, d, d];
    fits_if("basis", problem.basis.map(|basis| basis.shape()), Some(basis))?;
    fits("d aligned", upstream.aligned.shape(), [b, h, n, d])?;
    if let Some(d_basis) = &upstream.basis {
        fits("d basis", d_basis.shape(), basis)?;
    }
    fits("d key", gradients.key.shape(), [b, h, n, d])?;
    fits("d value", gradients.value.shape(), [b, h, n, d])?;
    fits("d keep", gradients.keep.shape(), [m, d, d])?;
    fits("d mix", gradients.mix.shape(), [m, d, d])?;
    if let Some(d_basis) = &gradients.basis {
        fits("d basis", d_basis.shape(), basis)?;
    }
    T::align_backward(exec(threads, problem.multiply_adds().saturating_mul(3))?, problem, upstream, gradients)
}

/// Modular masked attention (paper, equations 7 to 10).
pub fn modular_attention<T: CpuElement>(
    problem: &AttendProblem<'_, T>,
    outputs: &mut AttendOutputs<'_, T>,
    threads: usize,
) -> Result<()> {
    let problem = &problem.validated()?;
    let ([b, hq, nq, d], parts) = (problem.query.shape(), problem.combine.parts());
    fits("out", outputs.out.shape(), [b, hq, nq, d])?;
    fits("logsumexp", outputs.logsumexp.shape(), [b, hq, parts, nq])?;
    if let Some(both) = &outputs.parts {
        fits("parts", both.shape(), [b, hq, 2, nq, d])?;
    }
    if let Some(mass) = &outputs.mass {
        fits("mass", mass.values.shape(), [b, hq, nq, mass.by.columns(problem.modalities())])?;
    }
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
    let ([b, hq, nq, d], [_, hkv, nk, _]) = (problem.query.shape(), problem.key.shape());
    let (parts, m) = (problem.combine.parts(), problem.modalities());
    fits("d out", upstream.out_gradient.shape(), [b, hq, nq, d])?;
    fits("out", upstream.out.shape(), [b, hq, nq, d])?;
    fits("logsumexp", upstream.logsumexp.shape(), [b, hq, parts, nq])?;
    let both = upstream.parts.map(|both| both.shape());
    fits_if("parts", both, (parts == 2).then_some([b, hq, 2, nq, d]))?;
    fits("d query", gradients.query.shape(), [b, hq, nq, d])?;
    fits("d key", gradients.key.shape(), [b, hkv, nk, d])?;
    fits("d value", gradients.value.shape(), [b, hkv, nk, d])?;
    if let Some(d_sink) = &gradients.sink {
        fits("d sink", d_sink.shape(), [b, hq, nq, parts])?;
    }
    if let Some(d_bias) = &gradients.bias {
        fits("d bias", d_bias.shape(), [b, hq, m, m])?;
    }
    T::attend_backward(exec(threads, problem.multiply_adds().saturating_mul(2))?, problem, upstream, gradients)
}

/// Pseudo-scores: the sink logit (B, Hq, Nq) of every query row (paper, equation 10).
pub fn pseudo_sink<R: Real>(problem: &SinkProblem<'_, R>, sink: &mut ViewMut<'_, R, 3>) -> Result<()> {
    let problem = &problem.validated()?;
    fits("sink", sink.shape(), problem.shape())?;
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
    fits("d sink", sink_gradient.shape(), problem.shape())?;
    fits("d decay", decay.shape(), problem.decay.shape())?;
    fits("d base", base.shape(), problem.decay.shape())?;
    spec::mask::pseudo_sink_backward(problem, sink_gradient, decay, base);
    Ok(())
}

/// Floating point operations a second of a register loop of the products that [`modular_attention`] on this dtype is made
/// of: what its speed is measured against.
pub fn product_rate<T: CpuElement>(threads: usize, duration: Duration) -> Result<f64> {
    Ok(T::product_rate(exec(threads, usize::MAX)?, duration))
}
