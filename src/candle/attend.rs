//! Modular masked attention as a custom operator over (query, [key, value], [sink, bias]).

use super::storage::{Number, for_dtype, on_cpu, result, slice, table_dtype, tensor, view, wrapped};
use crate::dtype::Real;
use crate::ids::Ids;
use crate::op;
use crate::problem::{AttendGradients, AttendOutputs, AttendProblem, AttendUpstream, Combine, Mass, MassBy};
use crate::range::KeyRanges;
use crate::view::{View, ViewMut};
use candle_core::backend::BackendStorage;
use candle_core::utils::get_num_threads;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use std::sync::{Arc, Mutex};

/// What [`modular_attention`] needs beside query, key and value; only the modality has no default.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Modality of every key (B, Nk).
    pub modality: &'a Ids,
    /// Modality of every query (B, Nq); None: the last Nq entries of `modality`.
    pub query_modality: Option<&'a Ids>,
    /// Key j is visible to query i only where j <= i + (Nk - Nq). Default: true.
    pub causal: bool,
    /// Factor on q . k'. Default: D^-1/2.
    pub scale: Option<f64>,
    /// Pseudo-scores (B|1, Hq|1, Nq), for [`Combine::Split`] (B|1, Hq|1, Nq, 2). Default: none.
    pub sink: Option<&'a Tensor>,
    /// Added to the scores (B|1, Hq|1, M, M) by query and key modality. Default: none.
    pub bias: Option<&'a Tensor>,
    /// The interval of keys that each query may see (windows, blocks that see both ways, packed rows). Default: all.
    pub key_range: Option<&'a KeyRanges>,
    /// One softmax (the default) or two.
    pub combine: Combine,
}

impl<'a> Attention<'a> {
    /// Causal attention over keys of these modalities.
    pub fn new(modality: &'a Ids) -> Self {
        let combine = Combine::Joint;
        let (sink, bias, key_range) = (None, None, None);
        Self { modality, query_modality: None, causal: true, scale: None, sink, bias, key_range, combine }
    }
}

/// Modular masked attention (paper, equations 7 to 10): query (B, Hq, Nq, D), key and value (B, Hkv, Nk, D) to
/// (B, Hq, Nq, D). Differentiable in query, key, value, sink and bias.
pub fn modular_attention(query: &Tensor, key: &Tensor, value: &Tensor, options: &Attention<'_>) -> Result<Tensor> {
    Ok(apply(query, key, value, options, false)?.0)
}

/// The same, and the attention mass (B, Hq, Nq, 3) on self keys, on cross keys and on the pseudo-scores, which is not
/// differentiated.
pub fn modular_attention_with_mass(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    options: &Attention<'_>,
) -> Result<(Tensor, Tensor)> {
    let (out, saved) = apply(query, key, value, options, true)?;
    let (b, hq, nq, _) = query.dims4()?;
    let saved = saved.lock().expect("nobody panics while holding what forward left");
    let mass = saved.as_ref().map(|saved| for_dtype!(query.dtype(), T => saved.mass::<T>([b, hq, nq, 3])));
    Ok((out, mass.expect("forward has run")?))
}

fn apply(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    options: &Attention<'_>,
    wants_mass: bool,
) -> Result<(Tensor, Saved)> {
    let (b, hq, nq, _) = query.dims4()?;
    if [key.dtype(), value.dtype()].iter().any(|&dtype| dtype != query.dtype()) {
        let given = [query.dtype(), key.dtype(), value.dtype()];
        candle_core::bail!("query, key and value have dtypes {given:?}; wanted the same for all");
    }
    let query_modality = match options.query_modality {
        Some(given) => given.clone(),
        None => options.modality.last(nq).ok_or_else(|| {
            let nk = options.modality.shape()[1];
            candle_core::Error::msg(format!("Nq = {nq} and Nk = {nk}; with more queries give query_modality"))
        })?,
    };
    let parts = options.combine.parts();
    let dtype = table_dtype(query.dtype());
    let sink = options.sink.map(|sink| {
        let shape = if parts == 1 { vec![b, hq, nq] } else { vec![b, hq, nq, parts] };
        sink.to_dtype(dtype)?.broadcast_as(shape)?.flatten_all()
    });
    let bias = options.bias.map(|bias| {
        let m = bias.dims4()?.2;
        Ok::<_, candle_core::Error>((m, bias.to_dtype(dtype)?.broadcast_as((b, hq, m, m))?.flatten_all()?))
    });
    let (sink, bias) = (sink.transpose()?, bias.transpose()?);
    let saved = Saved::default();
    let operator = Operator {
        modality: options.modality.clone(),
        query_modality,
        causal: options.causal,
        scale: options.scale,
        combine: options.combine,
        key_range: options.key_range.cloned(),
        sink: sink.is_some(),
        modalities: bias.as_ref().map(|(m, _)| *m),
        wants_mass,
        saved: Arc::clone(&saved),
    };
    // A tensor of no elements is no tensor to candle: one zero stands for no tables.
    let none = Tensor::zeros(1, dtype, query.device())?;
    let tables: Vec<Tensor> = sink.into_iter().chain(bias.map(|(_, table)| table)).collect();
    let tables = if tables.is_empty() { none } else { Tensor::cat(&tables, 0)? };
    let out = query.apply_op3(&Tensor::stack(&[key, value], 0)?, &tables, operator)?;
    Ok((out, saved))
}

/// What forward leaves for backward, and the mass.
type Saved = Arc<Mutex<Option<Left>>>;

struct Left {
    logsumexp: CpuStorage,
    parts: Option<CpuStorage>,
    mass: Option<CpuStorage>,
}

impl Left {
    fn mass<T: Number>(&self, shape: [usize; 4]) -> Result<Tensor> {
        let mass = self.mass.as_ref().expect("mass was asked for");
        tensor(mass.as_slice::<T::Acc>()?.to_vec(), shape.to_vec())
    }
}

struct Operator {
    modality: Ids,
    query_modality: Ids,
    causal: bool,
    scale: Option<f64>,
    combine: Combine,
    key_range: Option<KeyRanges>,
    /// Whether the tables begin with a sink.
    sink: bool,
    /// M where the tables end with a bias.
    modalities: Option<usize>,
    wants_mass: bool,
    saved: Saved,
}

impl Operator {
    fn problem<'a, T: Number>(
        &'a self,
        query: View<'a, T, 4>,
        pair: &View<'a, T, 5>,
        tables: &'a [T::Acc],
    ) -> Result<AttendProblem<'a, T>> {
        let [b, hq, nq, _] = query.shape();
        let parts = self.combine.parts();
        let (sink, bias) = tables.split_at(if self.sink { b * hq * nq * parts } else { 0 });
        let mut problem =
            AttendProblem::new(query, [pair.index([0]), pair.index([1])], &self.modality, &self.query_modality);
        problem.sink = self.sink.then(|| View::from_slice(sink, [b, hq, nq, parts]));
        problem.bias = self.modalities.map(|m| View::from_slice(bias, [b, hq, m, m]));
        problem.key_range = self.key_range.as_ref();
        problem.causal = self.causal;
        problem.scale = self.scale.map_or(problem.scale, T::Acc::from_f64);
        problem.combine = self.combine;
        problem.validated().map_err(wrapped)
    }

    fn forward<T: Number>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Result<(CpuStorage, Shape)> {
        let [query, pair, tables] = inputs;
        let query = view::<T, 4>(query.0, query.1)?;
        let pair = view::<T, 5>(pair.0, pair.1)?;
        let problem = self.problem(query, &pair, slice(tables.0, tables.1)?)?;
        let [b, hq, nq, d] = query.shape();
        let softmaxes = self.combine.parts();
        let zeros = |count: usize| vec![T::Acc::ZERO; count];
        let mut out = vec![T::default(); b * hq * nq * d];
        let mut logsumexp = zeros(b * hq * softmaxes * nq);
        let mut parts = (softmaxes == 2).then(|| zeros(b * hq * 2 * nq * d));
        let mut mass = self.wants_mass.then(|| zeros(b * hq * nq * 3));
        let mut outputs = AttendOutputs {
            out: ViewMut::from_slice(&mut out, [b, hq, nq, d]),
            logsumexp: Some(ViewMut::from_slice(&mut logsumexp, [b, hq, softmaxes, nq])),
            parts: parts.as_mut().map(|parts| ViewMut::from_slice(parts, [b, hq, 2, nq, d])),
            mass: mass
                .as_mut()
                .map(|mass| Mass { by: MassBy::Relation, values: ViewMut::from_slice(mass, [b, hq, nq, 3]) }),
        };
        op::modular_attention(&problem, &mut outputs, get_num_threads()).map_err(wrapped)?;
        let stored = |values: Vec<T::Acc>| result(values, ()).0;
        *self.saved.lock().expect("nobody panics while holding what forward left") =
            Some(Left { logsumexp: stored(logsumexp), parts: parts.map(stored), mass: mass.map(stored) });
        Ok(result(out, (b, hq, nq, d)))
    }

    /// Gradients of query, of [key, value] and of the tables.
    fn backward<T: Number>(&self, inputs: [&Tensor; 3], out: &Tensor, d_out: &Tensor) -> Result<[Tensor; 3]> {
        let saved = self.saved.lock().expect("nobody panics while holding what forward left");
        let Some(left) = saved.as_ref() else { candle_core::bail!("backward before forward") };
        let [query, pair, tables] = inputs.map(Tensor::storage_and_layout);
        let [out, d_out] = [out, d_out].map(Tensor::storage_and_layout);
        let [query, out, d_out] = [&query, &out, &d_out].map(|(data, layout)| view::<T, 4>(on_cpu(data)?, layout));
        let (query, pair) = (query?, view::<T, 5>(on_cpu(&pair.0)?, pair.1)?);
        let tables: &[T::Acc] = slice(on_cpu(&tables.0)?, tables.1)?;
        let problem = self.problem(query, &pair, tables)?;
        let ([b, hq, nq, d], [_, _, hkv, nk, _]) = (query.shape(), pair.shape());
        let softmaxes = self.combine.parts();
        let parts = left.parts.as_ref().map(CpuStorage::as_slice::<T::Acc>).transpose()?;
        let upstream = AttendUpstream {
            out_gradient: d_out?,
            out: out?,
            logsumexp: View::from_slice(left.logsumexp.as_slice()?, [b, hq, softmaxes, nq]),
            parts: parts.map(|parts| View::from_slice(parts, [b, hq, 2, nq, d])),
        };
        let size = b * hkv * nk * d;
        let mut d_query = vec![T::default(); b * hq * nq * d];
        let mut d_pair = vec![T::default(); 2 * size];
        let mut d_tables = vec![T::Acc::ZERO; tables.len()];
        let (d_key, d_value) = d_pair.split_at_mut(size);
        let (d_sink, d_bias) = d_tables.split_at_mut(if self.sink { b * hq * nq * softmaxes } else { 0 });
        let mut gradients = AttendGradients {
            query: ViewMut::from_slice(&mut d_query, [b, hq, nq, d]),
            key: ViewMut::from_slice(d_key, [b, hkv, nk, d]),
            value: ViewMut::from_slice(d_value, [b, hkv, nk, d]),
            sink: self.sink.then(|| ViewMut::from_slice(d_sink, [b, hq, nq, softmaxes])),
            bias: self.modalities.map(|m| ViewMut::from_slice(d_bias, [b, hq, m, m])),
        };
        op::modular_attention_backward(&problem, &upstream, &mut gradients, get_num_threads()).map_err(wrapped)?;
        let count = d_tables.len();
        Ok([tensor(d_query, (b, hq, nq, d))?, tensor(d_pair, (2, b, hkv, nk, d))?, tensor(d_tables, count)?])
    }
}

impl CustomOp3 for Operator {
    fn name(&self) -> &'static str {
        "moda-modular-attention"
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        query_layout: &Layout,
        pair: &CpuStorage,
        pair_layout: &Layout,
        tables: &CpuStorage,
        tables_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(query, query_layout), (pair, pair_layout), (tables, tables_layout)];
        for_dtype!(query.dtype(), T => self.forward::<T>(inputs))
    }

    fn bwd(
        &self,
        query: &Tensor,
        pair: &Tensor,
        tables: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let inputs = [query, pair, tables];
        let [query, pair, tables] = for_dtype!(query.dtype(), T => self.backward::<T>(inputs, out, d_out))?;
        Ok((Some(query), Some(pair), Some(tables)))
    }
}
