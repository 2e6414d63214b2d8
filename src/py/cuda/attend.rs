//! Modular attention on CUDA, forward and backward.

use super::{Call, Place};
use crate::cuda::problem::{AttendGradients, AttendOutputs, AttendProblem, AttendUpstream};
use crate::cuda::{DeviceTensor, attend};
use crate::problem::{Combine, MassBy};
use crate::py::arguments::keys_before;
use pyo3::prelude::*;

/// What forward and backward read.
#[derive(FromPyObject)]
pub(in crate::py) struct Inputs<'py> {
    #[pyo3(item(0))]
    query: Bound<'py, PyAny>,
    #[pyo3(item(1))]
    key: Bound<'py, PyAny>,
    #[pyo3(item(2))]
    value: Bound<'py, PyAny>,
    #[pyo3(item(3))]
    modality: Bound<'py, PyAny>,
    #[pyo3(item(4))]
    query_modality: Option<Bound<'py, PyAny>>,
    #[pyo3(item(5))]
    causal: bool,
    #[pyo3(item(6))]
    scale: f64,
    #[pyo3(item(7))]
    sink: Option<Bound<'py, PyAny>>,
    #[pyo3(item(8))]
    bias: Option<Bound<'py, PyAny>>,
    #[pyo3(item(9))]
    key_range: Option<Bound<'py, PyAny>>,
    #[pyo3(item(10))]
    combine: String,
    #[pyo3(item(11))]
    num_modalities: Option<usize>,
}

impl<'py> Inputs<'py> {
    /// The call and its problem. Python's tuple keeps the tensors alive until the call ends.
    fn problem(self, place: Place<'py>) -> PyResult<(Call<'py>, AttendProblem)> {
        let (mut call, query): (_, DeviceTensor<4>) = Call::new("query", &self.query, "(B, Hq, Nq, D)", place)?;
        let (nq, combine) = (query.shape[2], Combine::parse(&self.combine)?);
        let ids = "(B, N): one id a token";
        let modality: DeviceTensor<2> = call.read("modality", &self.modality, ids)?;
        let query_modality = match &self.query_modality {
            Some(given) => call.read("query_modality", given, ids)?,
            None => modality.skip(1, keys_before(modality.shape, nq)?),
        };
        let sink = match (&self.sink, combine) {
            (None, _) => None,
            (Some(sink), Combine::Joint) => Some(call.read::<3>("sink", sink, "(B|1, Hq|1, Nq)")?.with_last()),
            (Some(sink), Combine::Split) => Some(call.read("sink", sink, "(B|1, Hq|1, Nq, 2)")?),
        };
        let range = format!("(B|1, Nq, 2) = ({}|1, {nq}, 2)", query.shape[0]);
        let problem = AttendProblem {
            target: call.gpu.target(),
            record: call.gpu.record(),
            query,
            key: call.read("key", &self.key, "(B, Hkv, Nk, D)")?,
            value: call.read("value", &self.value, "(B, Hkv, Nk, D)")?,
            modality,
            query_modality,
            sink,
            bias: call.read_if("modality_bias", self.bias.as_ref(), "(B|1, Hq|1, M, M)")?,
            key_range: call.read_if("key_range", self.key_range.as_ref(), &range)?,
            causal: self.causal,
            scale: self.scale,
            combine,
            num_modalities: self.num_modalities,
        };
        Ok((call, problem.validated()?))
    }
}

/// Writes o into `out`, L into `lse` and, where they are given, the two parts of "split" and the attention mass.
#[pyfunction]
pub(in crate::py) fn cuda_attend_forward<'py>(
    inputs: Inputs<'py>,
    mass_by: &str,
    out: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
    parts: Option<&Bound<'py, PyAny>>,
    mass: Option<&Bound<'py, PyAny>>,
    place: Place<'py>,
) -> PyResult<()> {
    let (mut call, problem) = inputs.problem(place)?;
    let mass = call.write_if("mass", mass, "(B, Hq, Nq, columns)")?;
    let outputs = AttendOutputs {
        out: call.write("out", out, "(B, Hq, Nq, D)")?,
        logsumexp: call.write("lse", lse, "(B, Hq, parts, Nq)")?,
        parts: call.write_if("parts", parts, "(B, Hq, 2, Nq, D)")?,
        mass: MassBy::parse(mass_by)?.zip(mass),
    };
    problem.check_outputs(&outputs)?;
    let bytes = attend::forward_workspace(&problem);
    call.run(bytes, |workspace| attend::forward(&problem, &outputs, workspace))
}

/// Writes the gradients; those of sink (B, Hq, Nq, softmaxes) and bias (B, Hq, M, M) in full size, before any broadcast
/// is summed away.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "what backward reads, what it starts from, where it writes")]
pub(in crate::py) fn cuda_attend_backward<'py>(
    inputs: Inputs<'py>,
    d_out: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
    parts: Option<&Bound<'py, PyAny>>,
    d_query: &Bound<'py, PyAny>,
    d_key: &Bound<'py, PyAny>,
    d_value: &Bound<'py, PyAny>,
    d_sink: Option<&Bound<'py, PyAny>>,
    d_bias: Option<&Bound<'py, PyAny>>,
    place: Place<'py>,
) -> PyResult<()> {
    let (mut call, problem) = inputs.problem(place)?;
    let upstream = AttendUpstream {
        out_gradient: call.read("d_out", d_out, "(B, Hq, Nq, D)")?,
        out: call.read("out", out, "(B, Hq, Nq, D)")?,
        logsumexp: call.read("lse", lse, "(B, Hq, parts, Nq)")?,
        parts: call.read_if("parts", parts, "(B, Hq, 2, Nq, D)")?,
    };
    problem.check_upstream(&upstream)?;
    let gradients = AttendGradients {
        query: call.write("d_query", d_query, "(B, Hq, Nq, D)")?,
        key: call.write("d_key", d_key, "(B, Hkv, Nk, D)")?,
        value: call.write("d_value", d_value, "(B, Hkv, Nk, D)")?,
        sink: call.write_if("d_sink", d_sink, "(B, Hq, Nq, parts)")?,
        bias: call.write_if("d_bias", d_bias, "(B, Hq, M, M)")?,
    };
    problem.check_gradients(&gradients)?;
    let bytes = attend::backward_workspace(&problem);
    call.run(bytes, |workspace| attend::backward(&problem, &upstream, &gradients, workspace))
}
