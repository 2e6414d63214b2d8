//! Random alignment problems.

use super::attend::writable;
use super::close::{assert_close, tolerance};
use super::rng::{Rng, narrow};
use super::tensor::{Storage, Tensor};
use super::tokens::{self, Layout, Padding};
use moda_attn::dtype::{Element, Real};
use moda_attn::ids::{Ids, PADDING};
use moda_attn::problem::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, Basis};
use moda_attn::spec;

/// The tokens that may feed a basis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Context {
    All,
    /// The first half of every row.
    Prompt,
    /// No token: every basis is zero.
    Empty,
}

/// What a random case looks like; change what matters with `..Default::default()`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AlignOptions {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) tokens: usize,
    pub(crate) dim: usize,
    pub(crate) modalities: usize,
    pub(crate) padding: Padding,
    pub(crate) layout: Layout,
    pub(crate) kind: Basis,
    pub(crate) context: Context,
    /// Whether the basis is given instead of computed.
    pub(crate) given: bool,
    /// Whether a gradient also enters through the returned basis.
    pub(crate) basis_used: bool,
    pub(crate) storage: Storage,
}

impl Default for AlignOptions {
    fn default() -> Self {
        Self {
            batch: 2,
            heads: 2,
            tokens: 9,
            dim: 5,
            modalities: 2,
            padding: Padding::None,
            layout: Layout::Middle,
            kind: Basis::Covariance,
            context: Context::All,
            given: false,
            basis_used: false,
            storage: Storage::Contiguous,
        }
    }
}

impl AlignOptions {
    /// Every option at random, sizes small.
    pub(crate) fn random(rng: &mut Rng) -> Self {
        Self {
            batch: 1 + rng.below(3),
            heads: 1 + rng.below(3),
            tokens: rng.pick(&[1, 2, 7, 16, 33, 63]),
            dim: rng.pick(&[1, 3, 8, 16, 40, 64]),
            modalities: 1 + rng.below(4),
            padding: rng.pick(&Padding::ALL),
            layout: rng.pick(&Layout::ALL),
            kind: rng.pick(&[Basis::Gram, Basis::Covariance]),
            context: rng.pick(&[Context::All, Context::Prompt, Context::Empty]),
            given: rng.flip(),
            basis_used: rng.flip(),
            storage: rng.pick(&Storage::ALL),
        }
    }
}

/// A random alignment problem that owns its buffers, with a random gradient of what it returns. The values of padding
/// tokens are NaN and must never be read; their keys, which pass through, are large.
#[derive(Debug, Clone)]
pub(crate) struct AlignCase<T: Element> {
    pub(crate) options: AlignOptions,
    pub(crate) key: Tensor<T, 4>,
    pub(crate) value: Tensor<T, 4>,
    pub(crate) modality: Ids,
    pub(crate) sources: Ids,
    pub(crate) keep: Tensor<T::Acc, 3>,
    pub(crate) mix: Tensor<T::Acc, 3>,
    pub(crate) basis: Option<Tensor<T::Acc, 5>>,
    pub(crate) eps: T::Acc,
    pub(crate) aligned_gradient: Tensor<T, 4>,
    pub(crate) basis_gradient: Option<Tensor<T::Acc, 5>>,
}

impl<T: Element> AlignCase<T> {
    pub(crate) fn new(rng: &mut Rng, options: AlignOptions) -> Self {
        let AlignOptions { batch, heads, tokens, dim, modalities, storage, .. } = options;
        let modality = tokens::ids(rng, [batch, tokens], modalities, options.layout, options.padding);
        let sources = sources(&modality, options.context);
        let shape = [batch, heads, tokens, dim];
        let mut key = Tensor::new(rng.normals(shape.iter().product(), 1.0), shape);
        let mut value = Tensor::new(rng.normals(shape.iter().product(), 1.0), shape);
        for b in 0..batch {
            for (j, _) in modality.row(b).iter().enumerate().filter(|&(_, &id)| id == PADDING) {
                for h in 0..heads {
                    key.fill([b, h, j], narrow(1e3));
                    value.fill([b, h, j], narrow(f64::NAN));
                }
            }
        }
        let spread = (dim as f64).powf(-0.5);
        let mut parameter = || Tensor::new(rng.normals(modalities * dim * dim, spread), [modalities, dim, dim]);
        let (keep, mix) = (parameter(), parameter());
        let bases = [batch, heads, modalities, dim, dim];
        let mut table = || Tensor::new(rng.normals(bases.iter().product(), 1.0), bases);
        let (basis, basis_gradient) = (options.given.then(&mut table), options.basis_used.then(&mut table));
        let aligned_gradient = Tensor::new(rng.normals(key.len(), 1.0), shape).stored(storage);
        let (key, value, eps) = (key.stored(storage), value.stored(storage), T::Acc::from_f64(1e-6));
        Self { options, key, value, modality, sources, keep, mix, basis, eps, aligned_gradient, basis_gradient }
    }

    pub(crate) fn random(rng: &mut Rng) -> Self {
        let options = AlignOptions::random(rng);
        Self::new(rng, options)
    }

    pub(crate) fn problem(&self) -> AlignProblem<'_, T> {
        let problem = AlignProblem {
            key: self.key.view(),
            value: self.value.view(),
            modality: &self.modality,
            sources: &self.sources,
            keep: self.keep.view(),
            mix: self.mix.view(),
            basis: self.basis.as_ref().map(Tensor::view),
            kind: self.options.kind,
            eps: self.eps,
        };
        problem.validated().unwrap()
    }

    /// The same problem in float64, on exactly the values this one stores.
    pub(crate) fn widened(&self) -> AlignCase<f64> {
        AlignCase {
            options: self.options,
            key: self.key.widened(),
            value: self.value.widened(),
            modality: self.modality.clone(),
            sources: self.sources.clone(),
            keep: self.keep.widened(),
            mix: self.mix.widened(),
            basis: self.basis.as_ref().map(Tensor::widened),
            eps: self.eps.to_f64(),
            aligned_gradient: self.aligned_gradient.widened(),
            basis_gradient: self.basis_gradient.as_ref().map(Tensor::widened),
        }
    }

    /// Runs a forward kernel into buffers that were all NaN.
    pub(crate) fn forward(
        &self,
        kernel: impl FnOnce(&AlignProblem<'_, T>, &mut AlignOutputs<'_, T>),
    ) -> AlignBuffers<T> {
        let AlignOptions { batch, heads, dim, modalities, .. } = self.options;
        let mut aligned = Tensor::poisoned(self.key.shape);
        let mut basis = Tensor::poisoned([batch, heads, modalities, dim, dim]);
        let computed = self.basis.is_none().then(|| writable(&mut basis));
        kernel(&self.problem(), &mut AlignOutputs { aligned: writable(&mut aligned), basis: computed });
        AlignBuffers { aligned, basis: self.basis.clone().unwrap_or(basis) }
    }

    /// Runs a backward kernel, from the basis a forward kernel used, into buffers that were all NaN.
    pub(crate) fn backward(
        &self,
        forward: &AlignBuffers<T>,
        kernel: impl FnOnce(&AlignProblem<'_, T>, &AlignUpstream<'_, T>, &mut AlignGradients<'_, T>),
    ) -> AlignGradientBuffers<T> {
        let mut result = AlignGradientBuffers {
            key: Tensor::poisoned(self.key.shape),
            value: Tensor::poisoned(self.value.shape),
            keep: Tensor::poisoned(self.keep.shape),
            mix: Tensor::poisoned(self.mix.shape),
            basis: self.basis.as_ref().map(|basis| Tensor::poisoned(basis.shape)),
        };
        let problem = AlignProblem { basis: Some(forward.basis.view()), ..self.problem() };
        let upstream = AlignUpstream {
            aligned: self.aligned_gradient.view(),
            basis: self.basis_gradient.as_ref().map(Tensor::view),
            computed: self.basis.is_none(),
        };
        kernel(&problem, &upstream, &mut result.views());
        result
    }

    /// The specification's forward, in float64.
    pub(crate) fn truth(&self) -> AlignBuffers<f64> {
        self.widened().forward(spec::align::forward)
    }

    /// The specification's gradients, in float64 from a float64 forward.
    pub(crate) fn true_gradients(&self) -> AlignGradientBuffers<f64> {
        let wide = self.widened();
        wide.backward(&wide.forward(spec::align::forward), spec::align::backward)
    }

    /// Holds everything a forward kernel wrote to the tolerance of `T`.
    #[track_caller]
    pub(crate) fn check_forward(&self, got: &AlignBuffers<T>) {
        let (truth, (allowed, _)) = (self.truth(), tolerance::<T>());
        let name = |what: &str| format!("{what} ({:?}) of {:?}", T::DTYPE, self.options);
        assert_close(&name("aligned"), &got.aligned.values(), &truth.aligned.values(), allowed);
        assert_close(&name("basis"), &got.basis.values(), &truth.basis.values(), allowed);
    }

    /// Holds everything a backward kernel wrote to the tolerance of `T`.
    #[track_caller]
    pub(crate) fn check_backward(&self, got: &AlignGradientBuffers<T>) {
        let (truth, (_, allowed)) = (self.true_gradients(), tolerance::<T>());
        let name = |what: &str| format!("{what} ({:?}) of {:?}", T::DTYPE, self.options);
        assert_close(&name("d key"), &got.key.values(), &truth.key.values(), allowed);
        assert_close(&name("d value"), &got.value.values(), &truth.value.values(), allowed);
        assert_close(&name("d keep"), &got.keep.values(), &truth.keep.values(), allowed);
        assert_close(&name("d mix"), &got.mix.values(), &truth.mix.values(), allowed);
        if let (Some(got), Some(truth)) = (&got.basis, &truth.basis) {
            assert_close(&name("d basis"), &got.values(), &truth.values(), allowed);
        }
    }
}

fn sources(modality: &Ids, context: Context) -> Ids {
    let [batch, tokens] = modality.shape();
    let inside = |j: usize| match context {
        Context::All => true,
        Context::Prompt => j < tokens.div_ceil(2),
        Context::Empty => false,
    };
    let row = |b: usize| modality.row(b).iter().enumerate().map(move |(j, &id)| if inside(j) { id } else { PADDING });
    Ids::new(&(0..batch).flat_map(row).collect::<Vec<_>>(), [batch, tokens]).unwrap()
}

/// What a forward kernel wrote; `basis` is the given one where there was one.
#[derive(Debug, Clone)]
pub(crate) struct AlignBuffers<T: Element> {
    pub(crate) aligned: Tensor<T, 4>,
    pub(crate) basis: Tensor<T::Acc, 5>,
}

/// What a backward kernel wrote.
#[derive(Debug, Clone)]
pub(crate) struct AlignGradientBuffers<T: Element> {
    pub(crate) key: Tensor<T, 4>,
    pub(crate) value: Tensor<T, 4>,
    pub(crate) keep: Tensor<T::Acc, 3>,
    pub(crate) mix: Tensor<T::Acc, 3>,
    pub(crate) basis: Option<Tensor<T::Acc, 5>>,
}

impl<T: Element> AlignGradientBuffers<T> {
    pub(crate) fn views(&mut self) -> AlignGradients<'_, T> {
        AlignGradients {
            key: writable(&mut self.key),
            value: writable(&mut self.value),
            keep: writable(&mut self.keep),
            mix: writable(&mut self.mix),
            basis: self.basis.as_mut().map(writable),
        }
    }
}
