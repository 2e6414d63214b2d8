//! Random attention problems.

use super::close::{assert_close, assert_close_for_size, assert_each_close, tolerance};
use super::ranges::Ranges;
use super::rng::{Rng, narrow};
use super::sizes::Sizes;
use super::tensor::{Storage, Tensor};
use super::tokens::{self, Layout, Padding};
use moda_attn::dtype::{Element, Real};
use moda_attn::ids::{Ids, PADDING};
use moda_attn::problem::{AttendGradients, AttendOutputs, AttendProblem, AttendUpstream, Combine, Mass, MassBy};
use moda_attn::range::KeyRanges;
use moda_attn::spec;
use moda_attn::view::ViewMut;

/// The sink logits of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sinks {
    /// No sink at all.
    Absent,
    /// About as large as a score; now and then -inf.
    Usual,
    /// One (1, 1, Nq) table for all batch rows and heads.
    Shared,
    /// Far above or below every score, infinite too.
    Extreme,
}

/// The modality bias of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BiasTable {
    Absent,
    Finite,
    /// One (1, 1, M, M) table for all batch rows and heads.
    Shared,
    /// Some pairs are forbidden.
    Forbidding,
}

/// What a random case looks like; change what matters with `..Default::default()`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttendOptions {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) key_heads: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) dim: usize,
    pub(crate) modalities: usize,
    pub(crate) padding: Padding,
    pub(crate) layout: Layout,
    pub(crate) causal: bool,
    pub(crate) combine: Combine,
    pub(crate) sinks: Sinks,
    pub(crate) bias: BiasTable,
    pub(crate) ranges: Ranges,
    pub(crate) mass: MassBy,
    pub(crate) storage: Storage,
    /// Standard deviation of queries and keys.
    pub(crate) spread: f64,
}

impl Default for AttendOptions {
    fn default() -> Self {
        Self {
            batch: 2,
            heads: 4,
            key_heads: 2,
            queries: 9,
            keys: 9,
            dim: 8,
            modalities: 2,
            padding: Padding::None,
            layout: Layout::Middle,
            causal: true,
            combine: Combine::Joint,
            sinks: Sinks::Usual,
            bias: BiasTable::Finite,
            ranges: Ranges::Absent,
            mass: MassBy::Relation,
            storage: Storage::Contiguous,
            spread: 1.0,
        }
    }
}

impl AttendOptions {
    /// Every option at random, `keys` and `dim` included but small.
    pub(crate) fn random(rng: &mut Rng) -> Self {
        let key_heads = 1 + rng.below(3);
        let keys = rng.pick(&[1, 2, 7, 16, 33, 63]);
        let queries = match rng.below(4) {
            0 => 1 + rng.below(keys),
            1 => keys + rng.below(5),
            _ => keys,
        };
        Self {
            batch: 1 + rng.below(3),
            heads: key_heads * (1 + rng.below(3)),
            key_heads,
            queries,
            keys,
            dim: rng.pick(&[1, 3, 8, 16, 40, 64]),
            modalities: 1 + rng.below(4),
            padding: rng.pick(&Padding::ALL),
            layout: rng.pick(&Layout::ALL),
            causal: rng.flip(),
            combine: rng.pick(&[Combine::Joint, Combine::Split]),
            sinks: rng.pick(&[Sinks::Absent, Sinks::Usual, Sinks::Shared, Sinks::Extreme]),
            bias: rng.pick(&[BiasTable::Absent, BiasTable::Finite, BiasTable::Shared, BiasTable::Forbidding]),
            storage: rng.pick(&Storage::ALL),
            spread: rng.pick(&[0.1, 1.0, 2.0]),
            ranges: rng.pick(&Ranges::ALL),
            mass: rng.pick(&[MassBy::Relation, MassBy::Modality]),
        }
    }
}

/// A random attention problem that owns its buffers, with a random gradient of its output. Rows of padding are NaN in
/// query, key and value: whoever reads them is found out.
#[derive(Debug, Clone)]
pub(crate) struct AttendCase<T: Element> {
    pub(crate) options: AttendOptions,
    pub(crate) query: Tensor<T, 4>,
    pub(crate) key: Tensor<T, 4>,
    pub(crate) value: Tensor<T, 4>,
    pub(crate) modality: Ids,
    pub(crate) query_modality: Ids,
    pub(crate) sink: Option<Tensor<T::Acc, 4>>,
    pub(crate) bias: Option<Tensor<T::Acc, 4>>,
    pub(crate) ranges: Option<KeyRanges>,
    pub(crate) scale: T::Acc,
    pub(crate) out_gradient: Tensor<T, 4>,
}

impl<T: Element> AttendCase<T> {
    pub(crate) fn new(rng: &mut Rng, options: AttendOptions) -> Self {
        let AttendOptions { batch, heads, key_heads, queries, keys, dim, modalities, storage, spread, .. } = options;
        let tokens = keys.max(queries);
        let every = tokens::ids(rng, [batch, tokens], modalities, options.layout, options.padding);
        let [modality, query_modality] = [keys, queries].map(|count| every.last(count).unwrap());
        let mut tensor = |shape: [usize; 4], spread: f64, ids: &Ids| {
            let mut tensor = Tensor::new(rng.normals(shape.iter().product(), spread), shape);
            for b in 0..shape[0] {
                for (j, _) in ids.row(b).iter().enumerate().filter(|&(_, &id)| id == PADDING) {
                    (0..shape[1]).for_each(|h| tensor.fill([b, h, j], narrow(f64::NAN)));
                }
            }
            tensor.stored(storage)
        };
        let query = tensor([batch, heads, queries, dim], spread, &query_modality);
        let key = tensor([batch, key_heads, keys, dim], spread, &modality);
        let value = tensor([batch, key_heads, keys, dim], 1.0, &modality);
        let out_gradient = Tensor::new(rng.normals(query.len(), 1.0), query.shape).stored(storage);
        let (sink, bias) = (sinks(rng, options), bias(rng, options));
        let ranges = options.ranges.draw(rng, [batch, queries, keys]);
        let scale = T::Acc::from_f64((dim as f64).powf(-0.5));
        Self { options, query, key, value, modality, query_modality, sink, bias, ranges, scale, out_gradient }
    }

    pub(crate) fn random(rng: &mut Rng) -> Self {
        let options = AttendOptions::random(rng);
        Self::new(rng, options)
    }

    pub(crate) fn problem(&self) -> AttendProblem<'_, T> {
        let problem = AttendProblem {
            query: self.query.view(),
            key: self.key.view(),
            value: self.value.view(),
            modality: &self.modality,
            query_modality: &self.query_modality,
            sink: self.sink.as_ref().map(Tensor::view),
            bias: self.bias.as_ref().map(Tensor::view),
            key_range: self.ranges.as_ref(),
            causal: self.options.causal,
            scale: self.scale,
            combine: self.options.combine,
            num_modalities: Some(self.options.modalities),
        };
        problem.validated().unwrap()
    }

    /// The same problem in float64, on exactly the values this one stores.
    pub(crate) fn widened(&self) -> AttendCase<f64> {
        AttendCase {
            options: self.options,
            query: self.query.widened(),
            key: self.key.widened(),
            value: self.value.widened(),
            modality: self.modality.clone(),
            query_modality: self.query_modality.clone(),
            sink: self.sink.as_ref().map(Tensor::widened),
            bias: self.bias.as_ref().map(Tensor::widened),
            ranges: self.ranges.clone(),
            scale: self.scale.to_f64(),
            out_gradient: self.out_gradient.widened(),
        }
    }

    /// Runs a forward kernel into buffers that were all NaN.
    pub(crate) fn forward(
        &self,
        kernel: impl FnOnce(&AttendProblem<'_, T>, &mut AttendOutputs<'_, T>),
    ) -> AttendBuffers<T> {
        let AttendOptions { batch, heads, queries, dim, modalities, combine, mass, .. } = self.options;
        let mut result = AttendBuffers {
            out: Tensor::poisoned([batch, heads, queries, dim]),
            logsumexp: Tensor::poisoned([batch, heads, combine.parts(), queries]),
            parts: (combine == Combine::Split).then(|| Tensor::poisoned([batch, heads, 2, queries, dim])),
            mass: Tensor::poisoned([batch, heads, queries, mass.columns(modalities)]),
        };
        kernel(&self.problem(), &mut result.views(mass));
        result
    }

    /// Runs a backward kernel, from what a forward kernel wrote, into buffers that were all NaN.
    pub(crate) fn backward(
        &self,
        forward: &AttendBuffers<T>,
        kernel: impl FnOnce(&AttendProblem<'_, T>, &AttendUpstream<'_, T>, &mut AttendGradients<'_, T>),
    ) -> AttendGradientBuffers<T> {
        let problem = self.problem();
        let AttendOptions { batch, heads, queries, combine, .. } = self.options;
        let m = problem.modalities();
        let mut result = AttendGradientBuffers {
            query: Tensor::poisoned(self.query.shape),
            key: Tensor::poisoned(self.key.shape),
            value: Tensor::poisoned(self.value.shape),
            sink: self.sink.as_ref().map(|_| Tensor::poisoned([batch, heads, queries, combine.parts()])),
            bias: self.bias.as_ref().map(|_| Tensor::poisoned([batch, heads, m, m])),
        };
        let upstream = AttendUpstream {
            out_gradient: self.out_gradient.view(),
            out: forward.out.view(),
            logsumexp: forward.logsumexp.view(),
            parts: forward.parts.as_ref().map(Tensor::view),
        };
        kernel(&problem, &upstream, &mut result.views());
        result
    }

    /// The specification's forward, in float64.
    pub(crate) fn truth(&self) -> AttendBuffers<f64> {
        self.widened().forward(spec::attend::forward)
    }

    /// The specification's gradients, in float64 from a float64 forward.
    pub(crate) fn true_gradients(&self) -> AttendGradientBuffers<f64> {
        let wide = self.widened();
        wide.backward(&wide.forward(spec::attend::forward), spec::attend::backward)
    }

    /// Holds everything a forward kernel wrote to the tolerance of `T`.
    #[track_caller]
    pub(crate) fn check_forward(&self, got: &AttendBuffers<T>) {
        let (truth, (allowed, _)) = (self.truth(), tolerance::<T>());
        let name = |what: &str| format!("{what} ({:?}) of {:?}", T::DTYPE, self.options);
        assert_close(&name("out"), &got.out.values(), &truth.out.values(), allowed);
        assert_close(&name("mass"), &got.mass.values(), &truth.mass.values(), allowed);
        assert_each_close(&name("logsumexp"), &got.logsumexp.values(), &truth.logsumexp.values(), allowed);
        if let (Some(got), Some(truth)) = (&got.parts, &truth.parts) {
            assert_close(&name("parts"), &got.values(), &truth.values(), allowed);
        }
    }

    /// Holds everything a backward kernel wrote to the tolerance of `T`.
    #[track_caller]
    pub(crate) fn check_backward(&self, got: &AttendGradientBuffers<T>) {
        let wide = self.widened();
        let forward = wide.forward(spec::attend::forward);
        let truth = wide.backward(&forward, spec::attend::backward);
        let (size, (_, allowed)) = (Sizes::of(&wide, &forward), tolerance::<T>());
        let name = |what: &str| format!("{what} ({:?}) of {:?}", T::DTYPE, self.options);
        assert_close_for_size(&name("d query"), &got.query.values(), &truth.query.values(), allowed, size.query);
        assert_close_for_size(&name("d key"), &got.key.values(), &truth.key.values(), allowed, size.key);
        assert_close(&name("d value"), &got.value.values(), &truth.value.values(), allowed);
        if let (Some(got), Some(truth)) = (&got.sink, &truth.sink) {
            assert_close_for_size(&name("d sink"), &got.values(), &truth.values(), allowed, size.sink);
        }
        if let (Some(got), Some(truth)) = (&got.bias, &truth.bias) {
            assert_close_for_size(&name("d bias"), &got.values(), &truth.values(), allowed, size.bias);
        }
    }
}

fn sinks<R: Real>(rng: &mut Rng, options: AttendOptions) -> Option<Tensor<R, 4>> {
    let AttendOptions { batch, heads, queries, combine, sinks, .. } = options;
    let shape = match sinks {
        Sinks::Absent => return None,
        Sinks::Shared => [1, 1, queries, combine.parts()],
        Sinks::Usual | Sinks::Extreme => [batch, heads, queries, combine.parts()],
    };
    let extremes = [f64::NEG_INFINITY, f64::INFINITY, 1e30, -1e30, 1e4, -1e4];
    let value = |rng: &mut Rng| match sinks {
        Sinks::Extreme => rng.pick(&extremes),
        _ if rng.below(8) == 0 => f64::NEG_INFINITY,
        _ => rng.normal(),
    };
    let values = (0..shape.iter().product()).map(|_| narrow(value(rng))).collect();
    Some(Tensor::new(values, shape))
}

fn bias<R: Real>(rng: &mut Rng, options: AttendOptions) -> Option<Tensor<R, 4>> {
    let AttendOptions { batch, heads, modalities, bias, .. } = options;
    let shape = match bias {
        BiasTable::Absent => return None,
        BiasTable::Shared => [1, 1, modalities, modalities],
        BiasTable::Finite | BiasTable::Forbidding => [batch, heads, modalities, modalities],
    };
    let value = |rng: &mut Rng| match bias {
        BiasTable::Forbidding if rng.below(3) == 0 => f64::NEG_INFINITY,
        _ => rng.normal(),
    };
    let values = (0..shape.iter().product()).map(|_| narrow(value(rng))).collect();
    Some(Tensor::new(values, shape))
}

/// What a forward kernel wrote.
#[derive(Debug, Clone)]
pub(crate) struct AttendBuffers<T: Element> {
    pub(crate) out: Tensor<T, 4>,
    pub(crate) logsumexp: Tensor<T::Acc, 4>,
    pub(crate) parts: Option<Tensor<T::Acc, 5>>,
    pub(crate) mass: Tensor<T::Acc, 4>,
}

impl<T: Element> AttendBuffers<T> {
    pub(crate) fn views(&mut self, by: MassBy) -> AttendOutputs<'_, T> {
        AttendOutputs {
            out: writable(&mut self.out),
            logsumexp: Some(writable(&mut self.logsumexp)),
            parts: self.parts.as_mut().map(writable),
            mass: Some(Mass { by, values: writable(&mut self.mass) }),
        }
    }
}

/// What a backward kernel wrote.
#[derive(Debug, Clone)]
pub(crate) struct AttendGradientBuffers<T: Element> {
    pub(crate) query: Tensor<T, 4>,
    pub(crate) key: Tensor<T, 4>,
    pub(crate) value: Tensor<T, 4>,
    pub(crate) sink: Option<Tensor<T::Acc, 4>>,
    pub(crate) bias: Option<Tensor<T::Acc, 4>>,
}

impl<T: Element> AttendGradientBuffers<T> {
    pub(crate) fn views(&mut self) -> AttendGradients<'_, T> {
        AttendGradients {
            query: writable(&mut self.query),
            key: writable(&mut self.key),
            value: writable(&mut self.value),
            sink: self.sink.as_mut().map(writable),
            bias: self.bias.as_mut().map(writable),
        }
    }
}

pub(super) fn writable<T: Element, const R: usize>(tensor: &mut Tensor<T, R>) -> ViewMut<'_, T, R> {
    let shape = tensor.shape;
    ViewMut::from_slice(tensor.slice_mut(), shape)
}
