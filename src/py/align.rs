//! Duplex alignment for Python, forward and backward.

use super::arguments::{Table, gradient, ids, output};
use super::call::{compute, for_element};
use crate::cpu::CpuElement;
use crate::dlpack::Imported;
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::Ids;
use crate::op;
use crate::problem::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, Basis};
use crate::view::RawView;
use pyo3::prelude::*;

/// What forward and backward read.
struct Inputs<'a> {
    key: &'a RawView<'a>,
    value: &'a RawView<'a>,
    modality: &'a RawView<'a>,
    keep: &'a RawView<'a>,
    mix: &'a RawView<'a>,
    context: Option<&'a RawView<'a>>,
    basis: Option<&'a RawView<'a>>,
    kind: Basis,
    eps: f64,
}

/// What must be converted before a problem can borrow it.
struct Converted<'a, R> {
    modality: Ids,
    sources: Ids,
    keep: Table<'a, R, 3>,
    mix: Table<'a, R, 3>,
}

impl<'a> Inputs<'a> {
    fn convert<T: Element>(&self) -> Result<Converted<'a, T::Acc>> {
        let [b, _, n, d] = self.key.typed::<T, 4>("key", "(B, Hkv, Nk, D)")?.shape();
        let keep = Table::square::<T>("keep", self.keep, d)?;
        let mix = Table::square::<T>("mix", self.mix, d)?;
        let modality = ids("modality", self.modality, [b, n], "(B, Nk)", keep.view().shape()[0])?;
        let sources = self.context.map_or_else(|| Ok(modality.clone()), |context| modality.within(context))?;
        Ok(Converted { modality, sources, keep, mix })
    }

    /// The problem; [`op`] checks what it holds.
    fn problem<'s, T: Element>(&'s self, converted: &'s Converted<'s, T::Acc>) -> Result<AlignProblem<'s, T>> {
        Ok(AlignProblem {
            key: self.key.typed("key", "(B, Hkv, Nk, D)")?,
            value: self.value.typed("value", "(B, Hkv, Nk, D)")?,
            modality: &converted.modality,
            sources: &converted.sources,
            keep: converted.keep.view(),
            mix: converted.mix.view(),
            basis: self.basis.map(|basis| basis.typed("basis", "(B, Hkv, M, D, D)")).transpose()?,
            kind: self.kind,
            eps: T::Acc::from_f64(self.eps),
        })
    }
}

/// Writes k' into `aligned` and, where no basis is given, G into `basis_out`.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, then where it writes")]
pub(super) fn align_forward(
    py: Python<'_>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    modality: &Bound<'_, PyAny>,
    keep: &Bound<'_, PyAny>,
    mix: &Bound<'_, PyAny>,
    kind: &str,
    context: Option<&Bound<'_, PyAny>>,
    basis: Option<&Bound<'_, PyAny>>,
    eps: f64,
    aligned: &Bound<'_, PyAny>,
    basis_out: Option<&Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<()> {
    let (key, value) = (Imported::new("key", key)?, Imported::new("value", value)?);
    let modality = Imported::new("modality", modality)?;
    let (keep, mix) = (Imported::new("keep", keep)?, Imported::new("mix", mix)?);
    let (context, basis) = (Imported::optional("context", context)?, Imported::optional("basis", basis)?);
    let aligned = Imported::writable("aligned", aligned)?;
    let basis_out = basis_out.map(|basis| Imported::writable("basis_out", basis)).transpose()?;
    let inputs = Inputs {
        key: key.view(),
        value: value.view(),
        modality: modality.view(),
        keep: keep.view(),
        mix: mix.view(),
        context: context.as_ref().map(Imported::view),
        basis: basis.as_ref().map(Imported::view),
        kind: Basis::parse(kind)?,
        eps,
    };
    let (aligned, basis_out) = (aligned.view(), basis_out.as_ref().map(Imported::view));
    compute(py, || for_element!(inputs.key, "key", forward(&inputs, aligned, basis_out, threads)))
}

fn forward<T: CpuElement>(
    inputs: &Inputs<'_>,
    aligned: &RawView<'_>,
    basis: Option<&RawView<'_>>,
    threads: usize,
) -> Result<()> {
    let converted = inputs.convert::<T>()?;
    let problem = inputs.problem::<T>(&converted)?;
    let [b, h, n, d] = problem.key.shape();
    let shape = [b, h, problem.modalities(), d, d];
    let mut outputs = AlignOutputs {
        // SAFETY: Python has just allocated the outputs and shares them with nobody before this call returns.
        aligned: unsafe { output("aligned", aligned, [b, h, n, d])? },
        // SAFETY: as above.
        basis: basis.map(|basis| unsafe { output("basis_out", basis, shape) }).transpose()?,
    };
    op::duplex_align(&problem, &mut outputs, threads)
}

/// What backward starts from and where it writes.
struct Backward<'a> {
    d_aligned: &'a RawView<'a>,
    d_basis: Option<&'a RawView<'a>>,
    computed: bool,
    d_key: &'a RawView<'a>,
    d_value: &'a RawView<'a>,
    d_keep: &'a RawView<'a>,
    d_mix: &'a RawView<'a>,
    d_basis_given: Option<&'a RawView<'a>>,
}

/// Writes the gradients. `basis` is G as forward used it; `computed` says that forward made it from the keys.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, what backward starts from, where it writes")]
pub(super) fn align_backward(
    py: Python<'_>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    modality: &Bound<'_, PyAny>,
    keep: &Bound<'_, PyAny>,
    mix: &Bound<'_, PyAny>,
    kind: &str,
    context: Option<&Bound<'_, PyAny>>,
    basis: &Bound<'_, PyAny>,
    computed: bool,
    eps: f64,
    d_aligned: &Bound<'_, PyAny>,
    d_basis: Option<&Bound<'_, PyAny>>,
    d_key: &Bound<'_, PyAny>,
    d_value: &Bound<'_, PyAny>,
    d_keep: &Bound<'_, PyAny>,
    d_mix: &Bound<'_, PyAny>,
    d_basis_given: Option<&Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<()> {
    let (key, value) = (Imported::new("key", key)?, Imported::new("value", value)?);
    let modality = Imported::new("modality", modality)?;
    let (keep, mix) = (Imported::new("keep", keep)?, Imported::new("mix", mix)?);
    let (context, basis) = (Imported::optional("context", context)?, Imported::new("basis", basis)?);
    let (d_aligned, d_basis) = (Imported::new("d_aligned", d_aligned)?, Imported::optional("d_basis", d_basis)?);
    let (d_key, d_value) = (Imported::writable("d_key", d_key)?, Imported::writable("d_value", d_value)?);
    let (d_keep, d_mix) = (Imported::writable("d_keep", d_keep)?, Imported::writable("d_mix", d_mix)?);
    let d_basis_given = d_basis_given.map(|basis| Imported::writable("d_basis_given", basis)).transpose()?;
    let inputs = Inputs {
        key: key.view(),
        value: value.view(),
        modality: modality.view(),
        keep: keep.view(),
        mix: mix.view(),
        context: context.as_ref().map(Imported::view),
        basis: Some(basis.view()),
        kind: Basis::parse(kind)?,
        eps,
    };
    let work = Backward {
        d_aligned: d_aligned.view(),
        d_basis: d_basis.as_ref().map(Imported::view),
        computed,
        d_key: d_key.view(),
        d_value: d_value.view(),
        d_keep: d_keep.view(),
        d_mix: d_mix.view(),
        d_basis_given: d_basis_given.as_ref().map(Imported::view),
    };
    compute(py, || for_element!(inputs.key, "key", backward(&inputs, &work, threads)))
}

fn backward<T: CpuElement>(inputs: &Inputs<'_>, work: &Backward<'_>, threads: usize) -> Result<()> {
    let converted = inputs.convert::<T>()?;
    let problem = inputs.problem::<T>(&converted)?;
    let [b, h, n, d] = problem.key.shape();
    let m = problem.modalities();
    let upstream = AlignUpstream::<T> {
        aligned: gradient("d_aligned", work.d_aligned, [b, h, n, d])?,
        basis: work.d_basis.map(|basis| gradient("d_basis", basis, [b, h, m, d, d])).transpose()?,
        computed: work.computed,
    };
    // SAFETY: Python has just allocated the gradients and shares them with nobody before this call returns.
    let mut gradients = unsafe {
        AlignGradients::<T> {
            key: output("d_key", work.d_key, [b, h, n, d])?,
            value: output("d_value", work.d_value, [b, h, n, d])?,
            keep: output("d_keep", work.d_keep, [m, d, d])?,
            mix: output("d_mix", work.d_mix, [m, d, d])?,
            basis: work.d_basis_given.map(|basis| output("d_basis_given", basis, [b, h, m, d, d])).transpose()?,
        }
    };
    op::duplex_align_backward(&problem, &upstream, &mut gradients, threads)
}
