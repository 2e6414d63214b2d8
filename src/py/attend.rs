//! Modular attention for Python, forward and backward.

use super::arguments::{gradient, ids, key_range, keys_before, output};
use super::call::{compute, for_element};
use crate::cpu::CpuElement;
use crate::dlpack::Imported;
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::{Ids, MAX_MODALITIES};
use crate::op;
use crate::problem::{
    AttendGradients, AttendOutputs, AttendProblem, AttendUpstream, Combine, Mass, MassBy, check_modalities,
};
use crate::range::KeyRanges;
use crate::view::{RawView, View};
use pyo3::prelude::*;

/// What forward and backward read.
struct Inputs<'a> {
    query: &'a RawView<'a>,
    key: &'a RawView<'a>,
    value: &'a RawView<'a>,
    modality: &'a RawView<'a>,
    query_modality: Option<&'a RawView<'a>>,
    causal: bool,
    scale: Option<f64>,
    sink: Option<&'a RawView<'a>>,
    bias: Option<&'a RawView<'a>>,
    key_range: Option<&'a RawView<'a>>,
    combine: Combine,
    num_modalities: Option<usize>,
}

/// The ids of keys and queries and the ranges of the queries, read before a problem can borrow them.
struct Tokens {
    keys: Ids,
    queries: Ids,
    ranges: Option<KeyRanges>,
}

impl Inputs<'_> {
    fn query<T: Element>(&self) -> Result<View<'_, T, 4>> {
        self.query.typed("query", "(B, Hq, Nq, D)")
    }

    fn key<T: Element>(&self) -> Result<View<'_, T, 4>> {
        self.key.typed("key", "(B, Hkv, Nk, D)")
    }

    fn sink<T: Element>(&self) -> Result<Option<View<'_, T::Acc, 4>>> {
        let Some(sink) = self.sink else { return Ok(None) };
        Ok(Some(match self.combine {
            Combine::Joint => sink.typed::<T::Acc, 3>("sink", "(B|1, Hq|1, Nq)")?.with_last(),
            Combine::Split => sink.typed("sink", "(B|1, Hq|1, Nq, 2)")?,
        }))
    }

    fn bias<T: Element>(&self) -> Result<Option<View<'_, T::Acc, 4>>> {
        self.bias.map(|bias| bias.typed("modality_bias", "(B|1, Hq|1, M, M)")).transpose()
    }

    fn tokens<T: Element>(&self) -> Result<Tokens> {
        let table = self.bias::<T>()?.map(|bias| bias.shape()[2]);
        if let Some(given) = self.num_modalities {
            check_modalities(given, table)?;
        }
        let modalities = self.num_modalities.or(table).unwrap_or(MAX_MODALITIES);
        let [b, _, nq, _] = self.query::<T>()?.shape();
        let nk = self.key::<T>()?.shape()[2];
        let keys = ids("modality", self.modality, [b, nk], "(B, Nk)", modalities)?;
        let queries = if let Some(given) = self.query_modality {
            ids("query_modality", given, [b, nq], "(B, Nq)", modalities)?
        } else {
            keys_before(keys.shape(), nq)?;
            keys.last(nq).expect("as many keys as queries")
        };
        let ranges = self.key_range.map(|given| key_range(given, [b, nq], nk)).transpose()?;
        Ok(Tokens { keys, queries, ranges })
    }

    /// The problem; [`op`] checks what it holds.
    fn problem<'s, T: Element>(&'s self, tokens: &'s Tokens) -> Result<AttendProblem<'s, T>> {
        let query = self.query::<T>()?;
        let dim = query.shape()[3].max(1) as f64;
        Ok(AttendProblem {
            query,
            key: self.key::<T>()?,
            value: self.value.typed("value", "(B, Hkv, Nk, D)")?,
            modality: &tokens.keys,
            query_modality: &tokens.queries,
            sink: self.sink::<T>()?,
            bias: self.bias::<T>()?,
            key_range: tokens.ranges.as_ref(),
            causal: self.causal,
            scale: T::Acc::from_f64(self.scale.unwrap_or_else(|| dim.sqrt().recip())),
            combine: self.combine,
            num_modalities: self.num_modalities,
        })
    }
}

/// Where forward writes.
struct Forward<'a> {
    out: &'a RawView<'a>,
    logsumexp: Option<&'a RawView<'a>>,
    parts: Option<&'a RawView<'a>>,
    mass: Option<(MassBy, &'a RawView<'a>)>,
}

/// Writes o into `out` and, where they are given, L into `lse`, the two parts of "split" and the attention mass.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, then where it writes")]
pub(super) fn attend_forward(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    modality: &Bound<'_, PyAny>,
    query_modality: Option<&Bound<'_, PyAny>>,
    is_causal: bool,
    scale: Option<f64>,
    sink: Option<&Bound<'_, PyAny>>,
    bias: Option<&Bound<'_, PyAny>>,
    key_range: Option<&Bound<'_, PyAny>>,
    combine: &str,
    num_modalities: Option<usize>,
    mass_by: &str,
    out: &Bound<'_, PyAny>,
    lse: Option<&Bound<'_, PyAny>>,
    parts: Option<&Bound<'_, PyAny>>,
    mass: Option<&Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<()> {
    let query = Imported::new("query", query)?;
    let (key, value) = (Imported::new("key", key)?, Imported::new("value", value)?);
    let modality = Imported::new("modality", modality)?;
    let query_modality = Imported::optional("query_modality", query_modality)?;
    let (sink, bias) = (Imported::optional("sink", sink)?, Imported::optional("modality_bias", bias)?);
    let key_range = Imported::optional("key_range", key_range)?;
    let out = Imported::writable("out", out)?;
    let lse = lse.map(|lse| Imported::writable("lse", lse)).transpose()?;
    let parts = parts.map(|parts| Imported::writable("parts", parts)).transpose()?;
    let mass = mass.map(|mass| Imported::writable("mass", mass)).transpose()?;
    let inputs = Inputs {
        query: query.view(),
        key: key.view(),
        value: value.view(),
        modality: modality.view(),
        query_modality: query_modality.as_ref().map(Imported::view),
        causal: is_causal,
        scale,
        sink: sink.as_ref().map(Imported::view),
        bias: bias.as_ref().map(Imported::view),
        key_range: key_range.as_ref().map(Imported::view),
        combine: Combine::parse(combine)?,
        num_modalities,
    };
    let by = MassBy::parse(mass_by)?;
    let work = Forward {
        out: out.view(),
        logsumexp: lse.as_ref().map(Imported::view),
        parts: parts.as_ref().map(Imported::view),
        mass: by.zip(mass.as_ref().map(Imported::view)),
    };
    compute(py, || for_element!(inputs.query, "query", forward(&inputs, &work, threads)))
}

fn forward<T: CpuElement>(inputs: &Inputs<'_>, work: &Forward<'_>, threads: usize) -> Result<()> {
    let tokens = inputs.tokens::<T>()?;
    let problem = inputs.problem::<T>(&tokens)?;
    let [b, hq, nq, d] = problem.query.shape();
    let softmaxes = problem.combine.parts();
    // SAFETY: Python has just allocated the outputs and shares them with nobody before this call returns.
    let mass = work.mass.map(|(by, mass)| unsafe {
        output("mass", mass, [b, hq, nq, by.columns(problem.modalities())]).map(|values| Mass { by, values })
    });
    // SAFETY: as above.
    let mut outputs = unsafe {
        AttendOutputs::<T> {
            out: output("out", work.out, [b, hq, nq, d])?,
            logsumexp: work.logsumexp.map(|lse| output("lse", lse, [b, hq, softmaxes, nq])).transpose()?,
            parts: work.parts.map(|parts| output("parts", parts, [b, hq, 2, nq, d])).transpose()?,
            mass: mass.transpose()?,
        }
    };
    op::modular_attention(&problem, &mut outputs, threads)
}

/// What backward starts from and where it writes.
struct Backward<'a> {
    d_out: &'a RawView<'a>,
    out: &'a RawView<'a>,
    logsumexp: &'a RawView<'a>,
    parts: Option<&'a RawView<'a>>,
    d_query: &'a RawView<'a>,
    d_key: &'a RawView<'a>,
    d_value: &'a RawView<'a>,
    d_sink: Option<&'a RawView<'a>>,
    d_bias: Option<&'a RawView<'a>>,
}

/// Writes the gradients; those of sink (B, Hq, Nq, softmaxes) and bias (B, Hq, M, M) in full size, before any broadcast
/// is summed away.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "the operator's arguments, what backward starts from, where it writes")]
pub(super) fn attend_backward(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    modality: &Bound<'_, PyAny>,
    query_modality: Option<&Bound<'_, PyAny>>,
    is_causal: bool,
    scale: Option<f64>,
    sink: Option<&Bound<'_, PyAny>>,
    bias: Option<&Bound<'_, PyAny>>,
    key_range: Option<&Bound<'_, PyAny>>,
    combine: &str,
    d_out: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
    parts: Option<&Bound<'_, PyAny>>,
    d_query: &Bound<'_, PyAny>,
    d_key: &Bound<'_, PyAny>,
    d_value: &Bound<'_, PyAny>,
    d_sink: Option<&Bound<'_, PyAny>>,
    d_bias: Option<&Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<()> {
    let query = Imported::new("query", query)?;
    let (key, value) = (Imported::new("key", key)?, Imported::new("value", value)?);
    let modality = Imported::new("modality", modality)?;
    let query_modality = Imported::optional("query_modality", query_modality)?;
    let (sink, bias) = (Imported::optional("sink", sink)?, Imported::optional("modality_bias", bias)?);
    let key_range = Imported::optional("key_range", key_range)?;
    let (d_out, out) = (Imported::new("d_out", d_out)?, Imported::new("out", out)?);
    let (lse, parts) = (Imported::new("lse", lse)?, Imported::optional("parts", parts)?);
    let d_query = Imported::writable("d_query", d_query)?;
    let (d_key, d_value) = (Imported::writable("d_key", d_key)?, Imported::writable("d_value", d_value)?);
    let d_sink = d_sink.map(|sink| Imported::writable("d_sink", sink)).transpose()?;
    let d_bias = d_bias.map(|bias| Imported::writable("d_bias", bias)).transpose()?;
    let inputs = Inputs {
        query: query.view(),
        key: key.view(),
        value: value.view(),
        modality: modality.view(),
        query_modality: query_modality.as_ref().map(Imported::view),
        causal: is_causal,
        scale,
        sink: sink.as_ref().map(Imported::view),
        bias: bias.as_ref().map(Imported::view),
        key_range: key_range.as_ref().map(Imported::view),
        combine: Combine::parse(combine)?,
        num_modalities: None,
    };
    let work = Backward {
        d_out: d_out.view(),
        out: out.view(),
        logsumexp: lse.view(),
        parts: parts.as_ref().map(Imported::view),
        d_query: d_query.view(),
        d_key: d_key.view(),
        d_value: d_value.view(),
        d_sink: d_sink.as_ref().map(Imported::view),
        d_bias: d_bias.as_ref().map(Imported::view),
    };
    compute(py, || for_element!(inputs.query, "query", backward(&inputs, &work, threads)))
}

fn backward<T: CpuElement>(inputs: &Inputs<'_>, work: &Backward<'_>, threads: usize) -> Result<()> {
    let tokens = inputs.tokens::<T>()?;
    let problem = inputs.problem::<T>(&tokens)?;
    let ([b, hq, nq, d], [_, hkv, nk, _]) = (problem.query.shape(), problem.key.shape());
    let (softmaxes, m) = (problem.combine.parts(), problem.modalities());
    let upstream = AttendUpstream::<T> {
        out_gradient: gradient("d_out", work.d_out, [b, hq, nq, d])?,
        out: gradient("out", work.out, [b, hq, nq, d])?,
        logsumexp: gradient("lse", work.logsumexp, [b, hq, softmaxes, nq])?,
        parts: work.parts.map(|parts| gradient("parts", parts, [b, hq, 2, nq, d])).transpose()?,
    };
    // SAFETY: Python has just allocated the gradients and shares them with nobody before this call returns.
    let mut gradients = unsafe {
        AttendGradients::<T> {
            query: output("d_query", work.d_query, [b, hq, nq, d])?,
            key: output("d_key", work.d_key, [b, hkv, nk, d])?,
            value: output("d_value", work.d_value, [b, hkv, nk, d])?,
            sink: work.d_sink.map(|sink| output("d_sink", sink, [b, hq, nq, softmaxes])).transpose()?,
            bias: work.d_bias.map(|bias| output("d_bias", bias, [b, hq, m, m])).transpose()?,
        }
    };
    op::modular_attention_backward(&problem, &upstream, &mut gradients, threads)
}
