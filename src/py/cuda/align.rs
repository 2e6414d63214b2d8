//! Duplex alignment on CUDA, forward and backward.

use super::{Call, Place};
use crate::cuda::align;
use crate::cuda::problem::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream};
use crate::problem::Basis;
use pyo3::prelude::*;

type Tensor<'a, 'py> = &'a Bound<'py, PyAny>;

/// What forward and backward read, as Python gives it.
struct Inputs<'a, 'py> {
    rows: [Tensor<'a, 'py>; 2],
    modality: Tensor<'a, 'py>,
    tables: [Tensor<'a, 'py>; 2],
    context: Option<Tensor<'a, 'py>>,
    basis: Option<Tensor<'a, 'py>>,
    kind: &'a str,
    eps: f64,
    dim: usize,
}

impl<'py> Inputs<'_, 'py> {
    fn problem(&self, call: &mut Call<'py>) -> PyResult<AlignProblem> {
        let ([key, value], [keep, mix]) = (self.rows, self.tables);
        let problem = AlignProblem {
            target: call.gpu.target(),
            record: call.gpu.record(),
            key: call.read("key", key, "(B, Hkv, Nk, D)")?,
            value: call.read("value", value, "(B, Hkv, Nk, D)")?,
            modality: call.read("modality", self.modality, "(B, N): one id a token")?,
            context: call.read_if("context", self.context, "(B, N)")?,
            keep: call.read("keep", keep, "(M, D, D)")?,
            mix: call.read("mix", mix, "(M, D, D)")?,
            basis: call.read_if("basis", self.basis, "(B, Hkv, M, D, D)")?,
            kind: Basis::parse(self.kind)?,
            eps: self.eps,
            dim: self.dim,
        };
        Ok(problem.validated()?)
    }
}

/// Writes k' into `aligned` and, where no basis is given, G into `basis_out`. `dim` components of a key are real; the
/// others fill its row up with zeros.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, then where it writes")]
pub(in crate::py) fn cuda_align_forward<'py>(
    key: &Bound<'py, PyAny>,
    value: &Bound<'py, PyAny>,
    modality: &Bound<'py, PyAny>,
    keep: &Bound<'py, PyAny>,
    mix: &Bound<'py, PyAny>,
    kind: &str,
    context: Option<&Bound<'py, PyAny>>,
    basis: Option<&Bound<'py, PyAny>>,
    eps: f64,
    dim: usize,
    aligned: &Bound<'py, PyAny>,
    basis_out: Option<&Bound<'py, PyAny>>,
    place: Place<'py>,
) -> PyResult<()> {
    let mut call = Call::new("key", key, place)?;
    let inputs = Inputs { rows: [key, value], modality, tables: [keep, mix], context, basis, kind, eps, dim };
    let problem = inputs.problem(&mut call)?;
    let outputs = AlignOutputs {
        aligned: call.write("aligned", aligned, "(B, Hkv, Nk, D)")?,
        basis: call.write_if("basis_out", basis_out, "(B, Hkv, M, D, D)")?,
    };
    problem.check_outputs(&outputs)?;
    let bytes = align::forward_workspace(&problem);
    call.run(bytes, |workspace| align::forward(&problem, &outputs, workspace))
}

/// Writes the gradients. `basis` is G as forward used it; `computed` says that forward made it from the keys.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, what backward starts from, where it writes")]
pub(in crate::py) fn cuda_align_backward<'py>(
    key: &Bound<'py, PyAny>,
    value: &Bound<'py, PyAny>,
    modality: &Bound<'py, PyAny>,
    keep: &Bound<'py, PyAny>,
    mix: &Bound<'py, PyAny>,
    kind: &str,
    context: Option<&Bound<'py, PyAny>>,
    basis: &Bound<'py, PyAny>,
    computed: bool,
    eps: f64,
    dim: usize,
    d_aligned: &Bound<'py, PyAny>,
    d_basis: Option<&Bound<'py, PyAny>>,
    d_key: &Bound<'py, PyAny>,
    d_value: &Bound<'py, PyAny>,
    d_keep: &Bound<'py, PyAny>,
    d_mix: &Bound<'py, PyAny>,
    d_basis_given: Option<&Bound<'py, PyAny>>,
    place: Place<'py>,
) -> PyResult<()> {
    let mut call = Call::new("key", key, place)?;
    let (tables, basis) = ([keep, mix], Some(basis));
    let inputs = Inputs { rows: [key, value], modality, tables, context, basis, kind, eps, dim };
    let problem = inputs.problem(&mut call)?;
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
