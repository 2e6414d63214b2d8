//! Pseudo-scores of the modular mask for Python, forward and backward.

use super::arguments::{gradient, ids, integers, output};
use super::call::{compute, for_real};
use crate::dlpack::Imported;
use crate::dtype::Real;
use crate::error::Result;
use crate::op;
use crate::problem::SinkProblem;
use crate::view::{RawView, View};
use pyo3::prelude::*;

/// What forward and backward read.
struct Inputs<'a> {
    position: &'a RawView<'a>,
    query_modality: &'a RawView<'a>,
    span: i64,
    decay: &'a RawView<'a>,
    base: &'a RawView<'a>,
}

impl Inputs<'_> {
    /// Runs `work` on the validated problem.
    fn with<R: Real>(&self, work: impl FnOnce(&SinkProblem<'_, R>) -> Result<()>) -> Result<()> {
        let decay: View<'_, R, 2> = self.decay.typed("decay", "(M, Hq)")?;
        let base = self.base.typed("base", "(M, Hq)")?;
        let (positions, shape) = integers("position", self.position, "(B, Nq)")?;
        let meaning = "(B, Nq), the shape of position";
        let query_modality = ids("query_modality", self.query_modality, shape, meaning, decay.shape()[0])?;
        let position = View::from_slice(&positions, shape);
        let problem = SinkProblem { position, query_modality: &query_modality, span: self.span, decay, base };
        work(&problem.validated()?)
    }
}

/// Writes the sink logits (B, Hq, Nq) into `sink`.
#[pyfunction]
pub(super) fn sink_forward(
    py: Python<'_>,
    position: &Bound<'_, PyAny>,
    query_modality: &Bound<'_, PyAny>,
    span: i64,
    decay: &Bound<'_, PyAny>,
    base: &Bound<'_, PyAny>,
    sink: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let position = Imported::new("position", position)?;
    let query_modality = Imported::new("query_modality", query_modality)?;
    let (decay, base) = (Imported::new("decay", decay)?, Imported::new("base", base)?);
    let sink = Imported::writable("sink", sink)?;
    let (position, query_modality) = (position.view(), query_modality.view());
    let inputs = Inputs { position, query_modality, span, decay: decay.view(), base: base.view() };
    let sink = sink.view();
    compute(py, || for_real!(inputs.decay, "decay", forward(&inputs, sink)))
}

fn forward<R: Real>(inputs: &Inputs<'_>, sink: &RawView<'_>) -> Result<()> {
    inputs.with::<R>(|problem| {
        let ([b, nq], [_, hq]) = (problem.position.shape(), problem.decay.shape());
        // SAFETY: Python has just allocated it and shares it with nobody before this call returns.
        let mut sink = unsafe { output("sink", sink, [b, hq, nq])? };
        op::pseudo_sink(problem, &mut sink)
    })
}

/// Writes the gradients (M, Hq) of decay and base.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, what backward starts from, where it writes")]
pub(super) fn sink_backward(
    py: Python<'_>,
    position: &Bound<'_, PyAny>,
    query_modality: &Bound<'_, PyAny>,
    span: i64,
    decay: &Bound<'_, PyAny>,
    base: &Bound<'_, PyAny>,
    d_sink: &Bound<'_, PyAny>,
    d_decay: &Bound<'_, PyAny>,
    d_base: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let position = Imported::new("position", position)?;
    let query_modality = Imported::new("query_modality", query_modality)?;
    let (decay, base) = (Imported::new("decay", decay)?, Imported::new("base", base)?);
    let d_sink = Imported::new("d_sink", d_sink)?;
    let (d_decay, d_base) = (Imported::writable("d_decay", d_decay)?, Imported::writable("d_base", d_base)?);
    let (position, query_modality) = (position.view(), query_modality.view());
    let inputs = Inputs { position, query_modality, span, decay: decay.view(), base: base.view() };
    let (d_sink, d_decay, d_base) = (d_sink.view(), d_decay.view(), d_base.view());
    compute(py, || for_real!(inputs.decay, "decay", backward(&inputs, d_sink, d_decay, d_base)))
}

fn backward<R: Real>(
    inputs: &Inputs<'_>,
    d_sink: &RawView<'_>,
    d_decay: &RawView<'_>,
    d_base: &RawView<'_>,
) -> Result<()> {
    inputs.with::<R>(|problem| {
        let [m, hq] = problem.decay.shape();
        let [b, nq] = problem.position.shape();
        let upstream = gradient("d_sink", d_sink, [b, hq, nq])?;
        // SAFETY: Python has just allocated both and shares them with nobody before this call returns.
        let (mut decay, mut base) =
            unsafe { (output("d_decay", d_decay, [m, hq])?, output("d_base", d_base, [m, hq])?) };
        op::pseudo_sink_backward(problem, upstream, &mut decay, &mut base)
    })
}
