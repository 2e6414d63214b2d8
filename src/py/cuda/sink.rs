//! Pseudo-scores on CUDA, forward and backward.

use super::{Call, Place};
use crate::cuda::align;
use crate::cuda::problem::SinkProblem;
use pyo3::prelude::*;

/// What forward and backward read: position, query modality, span, decay, base.
type Inputs<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, i64, Bound<'py, PyAny>, Bound<'py, PyAny>);

fn problem<'py>(inputs: Inputs<'py>, place: Place<'py>) -> PyResult<(Call<'py>, SinkProblem)> {
    let (position, query_modality, span, decay, base) = inputs;
    let (mut call, position) = Call::new("position", &position, "(B, Nq)", place)?;
    let problem = SinkProblem {
        target: call.gpu.target(),
        record: call.gpu.record(),
        position,
        query_modality: call.read("query_modality", &query_modality, "(B, N): one id a token")?,
        span,
        decay: call.read("decay", &decay, "(M, Hq)")?,
        base: call.read("base", &base, "(M, Hq)")?,
    };
    Ok((call, problem.validated()?))
}

/// Writes the sink logits (B, Hq, Nq) into `sink`.
#[pyfunction]
pub(in crate::py) fn cuda_sink_forward<'py>(
    inputs: Inputs<'py>,
    sink: &Bound<'py, PyAny>,
    place: Place<'py>,
) -> PyResult<()> {
    let (mut call, problem) = problem(inputs, place)?;
    let sink = call.write("sink", sink, "(B, Hq, Nq)")?;
    problem.check_outputs(&sink)?;
    call.run(0, |_| Ok(align::pseudo_sink(&problem, sink)))
}

/// Writes the gradients (M, Hq) of decay and base.
#[pyfunction]
pub(in crate::py) fn cuda_sink_backward<'py>(
    inputs: Inputs<'py>,
    d_sink: &Bound<'py, PyAny>,
    d_decay: &Bound<'py, PyAny>,
    d_base: &Bound<'py, PyAny>,
    place: Place<'py>,
) -> PyResult<()> {
    let (mut call, problem) = problem(inputs, place)?;
    let d_sink = call.read("d_sink", d_sink, "(B, Hq, Nq)")?;
    let (d_decay, d_base) = (call.write("d_decay", d_decay, "(M, Hq)")?, call.write("d_base", d_base, "(M, Hq)")?);
    problem.check_gradients(&d_sink, [&d_decay, &d_base])?;
    call.run(0, |_| Ok(align::pseudo_sink_backward(&problem, d_sink, [d_decay, d_base])))
}
