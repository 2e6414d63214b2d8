//! Duplex alignment on CUDA, forward and backward.

use super::{Call, Place};
use crate::cuda::align;
use crate::cuda::problem::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream};
use crate::problem::Basis;
use pyo3::prelude::*;

/// What forward and backward read.
#[derive(FromPyObject)]
pub(in crate::py) struct Inputs<'py> {
    #[pyo3(item(0))]
    key: Bound<'py, PyAny>,
    #[pyo3(item(1))]
    value: Bound<'py, PyAny>,
    #[pyo3(item(2))]
    modality: Bound<'py, PyAny>,
    #[pyo3(item(3))]
    keep: Bound<'py, PyAny>,
    #[pyo3(item(4))]
    mix: Bound<'py, PyAny>,
    #[pyo3(item(5))]
    kind: String,
    #[pyo3(item(6))]
    context: Option<Bound<'py, PyAny>>,
    #[pyo3(item(7))]
    basis: Option<Bound<'py, PyAny>>,
    #[pyo3(item(8))]
    eps: f64,
    /// Components of a key that are real; the others fill its row up with zeros.
    #[pyo3(item(9))]
    dim: usize,
}

impl<'py> Inputs<'py> {
    /// The call and its problem. Python's tuple keeps the tensors alive until the call ends.
    fn problem(self, place: Place<'py>) -> PyResult<(Call<'py>, AlignProblem)> {
        let (mut call, key) = Call::new("key", &self.key, "(B, Hkv, Nk, D)", place)?;
        let problem = AlignProblem {
            target: call.gpu.target(),
            record: call.gpu.record(),
            key,
            value: call.read("value", &self.value, "(B, Hkv, Nk, D)")?,
            modality: call.read("modality", &self.modality, "(B, N): one id a token")?,
            context: call.read_if("context", self.context.as_ref(), "(B, N)")?,
            keep: call.read("keep", &self.keep, "(M, D, D)")?,
            mix: call.read("mix", &self.mix, "(M, D, D)")?,
            basis: call.read_if("basis", self.basis.as_ref(), "(B, Hkv, M, D, D)")?,
            kind: Basis::parse(&self.kind)?,
            eps: self.eps,
            dim: self.dim,
        };
        Ok((call, problem.validated()?))
    }
}

/// Writes k' into `aligned` and, where no basis is given, G into `basis_out`.
#[pyfunction]
pub(in crate::py) fn cuda_align_forward<'py>(
    inputs: Inputs<'py>,
    aligned: &Bound<'py, PyAny>,
    basis_out: Option<&Bound<'py, PyAny>>,
    place: Place<'py>,
) -> PyResult<()> {
    let (mut call, problem) = inputs.problem(place)?;
    let outputs = AlignOutputs {
        aligned: call.write("aligned", aligned, "(B, Hkv, Nk, D)")?,
        basis: call.write_if("basis_out", basis_out, "(B, Hkv, M, D, D)")?,
    };
    problem.check_outputs(&outputs)?;
    let bytes = align::forward_workspace(&problem);
    call.run(bytes, |workspace| align::forward(&problem, &outputs, workspace))
}

/// Writes the gradients. The basis is G as forward used it; `computed` says that forward made it from the keys.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "what backward reads, what it starts from, where it writes")]
pub(in crate::py) fn cuda_align_backward<'py>(
    inputs: Inputs<'py>,
    computed: bool,
    d_aligned: &Bound<'py, PyAny>,
    d_basis: Option<&Bound<'py, PyAny>>,
    d_key: &Bound<'py, PyAny>,
    d_value: &Bound<'py, PyAny>,
    d_keep: &Bound<'py, PyAny>,
    d_mix: &Bound<'py, PyAny>,
    d_basis_given: Option<&Bound<'py, PyAny>>,
    place: Place<'py>,
) -> PyResult<()> {
    let (mut call, problem) = inputs.problem(place)?;
    let upstream = AlignUpstream {
        aligned: call.read("d_aligned", d_aligned, "(B, Hkv, Nk, D)")?,
        basis: call.read_if("d_basis", d_basis, "(B, Hkv, M, D, D)")?,
        computed,
    };
    problem.check_upstream(&upstream)?;
    let gradients = AlignGradients {
        key: call.write("d_key", d_key, "(B, Hkv, Nk, D)")?,
        value: call.write("d_value", d_value, "(B, Hkv, Nk, D)")?,
        keep: call.write("d_keep", d_keep, "(M, D, D)")?,
        mix: call.write("d_mix", d_mix, "(M, D, D)")?,
        basis: call.write_if("d_basis_given", d_basis_given, "(B, Hkv, M, D, D)")?,
    };
    problem.check_gradients(&gradients)?;
    let bytes = align::backward_workspace(&problem);
    call.run(bytes, |workspace| align::backward(&problem, &upstream, &gradients, workspace))
}
