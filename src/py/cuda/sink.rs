//! Pseudo-scores on CUDA, forward and backward.

use super::{Call, Place};
use crate::cuda::align;
use crate::cuda::problem::SinkProblem;
use pyo3::prelude::*;

/// What forward and backward read.
fn problem<'py>(
    call: &mut Call<'py>,
    [position, query_modality, decay, base]: [&Bound<'py, PyAny>; 4],
    span: i64,
) -> PyResult<SinkProblem> {
    let problem = SinkProblem {
        target: call.gpu.target(),
        record: call.gpu.record(),
        position: call.read("position", position, "(B, Nq)")?,
        query_modality: call.read("query_modality", query_modality, "(B, N): one id a token")?,
        span,
        decay: call.read("decay", decay, "(M, Hq)")?,
        base: call.read("base", base, "(M, Hq)")?,
    };
    Ok(problem.validated()?)
}

/// Writes the sink logits (B, Hq, Nq) into `sink`.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, then where it writes")]
pub(in crate::py) fn cuda_sink_forward<'py>(
    position: &Bound<'py, PyAny>,
    query_modality: &Bound<'py, PyAny>,
    span: i64,
    decay: &Bound<'py, PyAny>,
    base: &Bound<'py, PyAny>,
    sink: &Bound<'py, PyAny>,
    place: Place<'py>,
) -> PyResult<()> {
    let mut call = Call::new("position", position, place)?;
    let problem = problem(&mut call, [position, query_modality, decay, base], span)?;
    let sink = call.write("sink", sink, "(B, Hq, Nq)")?;
    problem.check_outputs(&sink)?;
    call.run(0, |_| Ok(align::pseudo_sink(&problem, sink)))
}

/// Writes the gradients (M, Hq) of decay and base.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, what backward starts from, where it writes")]
pub(in crate::py) fn cuda_sink_backward<'py>(
    position: &Bound<'py, PyAny>,
    query_modality: &Bound<'py, PyAny>,
    span: i64,
    decay: &Bound<'py, PyAny>,
    base: &Bound<'py, PyAny>,
    d_sink: &Bound<'py, PyAny>,
    d_decay: &Bound<'py, PyAny>,
    d_base: &Bound<'py, PyAny>,
    place: Place<'py>,
) -> PyResult<()> {
    let mut call = Call::new("position", position, place)?;
    let problem = problem(&mut call, [position, query_modality, decay, base], span)?;
    let d_sink = call.read("d_sink", d_sink, "(B, Hq, Nq)")?;
    let (d_decay, d_base) = (call.write("d_decay", d_decay, "(M, Hq)")?, call.write("d_base", d_base, "(M, Hq)")?);
    problem.check_gradients(&d_sink, [&d_decay, &d_base])?;
    call.run(0, |_| Ok(align::pseudo_sink_backward(&problem, d_sink, [d_decay, d_base])))
}
