//! Modular masked attention on the CPU: forward and backward over tiles of rows and keys.

mod backward;
mod decode;
mod finish;
mod forward;
mod mask;
mod mass;
mod plan;
mod rows;

use super::{CpuReal, Exec, with_token};
use crate::dtype::Element;
use crate::error::Result;
use crate::problem::{AttendGradients, AttendOutputs, AttendProblem, AttendUpstream};

pub(super) fn forward<T: Element<Acc: CpuReal>>(
    exec: Exec,
    problem: &AttendProblem<'_, T>,
    outputs: &mut AttendOutputs<'_, T>,
) -> Result<()> {
    with_token!(exec, T::Acc, s => forward::run(s, exec.threads, problem, outputs))
}

pub(super) fn backward<T: Element<Acc: CpuReal>>(
    exec: Exec,
    problem: &AttendProblem<'_, T>,
    upstream: &AttendUpstream<'_, T>,
    gradients: &mut AttendGradients<'_, T>,
) -> Result<()> {
    with_token!(exec, T::Acc, s => backward::run(s, exec.threads, problem, upstream, gradients))
}
