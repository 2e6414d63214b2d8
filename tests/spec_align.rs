//! The specification of alignment: exact gradients, and small values worked out by hand.
#![allow(clippy::float_cmp, reason = "exact zeros and results that must not change by a bit")]

mod common;

use common::{
    AlignCase, AlignOptions, Context, Layout, Padding, Rng, Storage, Tensor, assert_close, assert_close_for_size,
    derivative,
};
use moda_attn::dtype::Element;
use moda_attn::ids::{Ids, PADDING};
use moda_attn::problem::Basis;
use moda_attn::spec;

/// Σ k' · its gradient + Σ G · its gradient, whose gradients backward gives.
fn loss(case: &AlignCase<f64>) -> f64 {
    let result = case.forward(spec::align::forward);
    let tokens = case.modality.shape()[1];
    let dim = case.options.dim;
    let is_real = |flat: usize| {
        let token = flat / dim;
        case.modality.row(token / tokens / case.options.heads)[token % tokens] != PADDING
    };
    let through = |values: Vec<f64>, gradients: Vec<f64>, counts: &dyn Fn(usize) -> bool| -> f64 {
        let products = values.iter().zip(gradients).map(|(value, gradient)| value * gradient);
        products.enumerate().filter(|&(flat, _)| counts(flat)).map(|(_, product)| product).sum()
    };
    // Padding keys are so large that they would drown the differences; they have a test of their own.
    let aligned = through(result.aligned.values(), case.aligned_gradient.values(), &is_real);
    let basis = |gradient: &Tensor<f64, 5>| through(result.basis.values(), gradient.values(), &|_| true);
    aligned + case.basis_gradient.as_ref().map_or(0.0, basis)
}

/// The derivative of the loss along every finite element of one input; zero along the others.
fn differences<const R: usize>(
    case: &AlignCase<f64>,
    input: impl Fn(&mut AlignCase<f64>) -> &mut Tensor<f64, R>,
) -> Vec<f64> {
    let mut case = case.clone();
    let at = |case: &mut AlignCase<f64>, flat: usize, value: f64| input(case).set_flat(flat, value);
    let values = input(&mut case).values();
    let mut slope = |(flat, &value): (usize, &f64)| {
        if !value.is_finite() {
            return 0.0;
        }
        let slope = derivative(|step| {
            at(&mut case, flat, value + step);
            loss(&case)
        });
        at(&mut case, flat, value);
        slope
    };
    values.iter().enumerate().map(&mut slope).collect()
}

fn check_gradients(case: &AlignCase<f64>) {
    let mut gradients = case.backward(&case.forward(spec::align::forward), spec::align::backward);
    let [batch, heads, tokens, _] = case.key.shape;
    for b in 0..batch {
        for j in (0..tokens).filter(|&j| case.modality.row(b)[j] == PADDING) {
            (0..heads).for_each(|h| gradients.key.fill([b, h, j], 0.0)); // left out of the loss
        }
    }
    let close = |name: &str, got: &[f64], truth: &[f64]| {
        assert_close_for_size(&format!("{name} of {:?}", case.options), got, truth, 1e-8, 1.0);
    };
    close("d key", &gradients.key.values(), &differences(case, |case| &mut case.key));
    close("d value", &gradients.value.values(), &differences(case, |case| &mut case.value));
    close("d keep", &gradients.keep.values(), &differences(case, |case| &mut case.keep));
    close("d mix", &gradients.mix.values(), &differences(case, |case| &mut case.mix));
    if let Some(basis) = &gradients.basis {
        close("d basis", &basis.values(), &differences(case, |case| case.basis.as_mut().unwrap()));
    }
}

#[test]
fn gradients_are_the_differences_of_the_aligned_keys_and_the_bases() {
    let mut rng = Rng::new(1);
    for kind in [Basis::Gram, Basis::Covariance] {
        for given in [false, true] {
            for basis_used in [false, true] {
                for context in [Context::All, Context::Prompt, Context::Empty] {
                    for padding in Padding::ALL {
                        let options = AlignOptions {
                            kind,
                            given,
                            basis_used,
                            context,
                            padding,
                            dim: 3,
                            tokens: 8,
                            modalities: 2 + rng.below(2),
                            layout: rng.pick(&Layout::ALL),
                            storage: rng.pick(&Storage::ALL),
                            ..Default::default()
                        };
                        check_gradients(&AlignCase::new(&mut rng, options));
                    }
                }
            }
        }
    }
}

fn identity(modalities: usize, dim: usize, factor: f64) -> Tensor<f64, 3> {
    let element = |flat: usize| if flat / dim % dim == flat % dim { factor } else { 0.0 };
    Tensor::new((0..modalities * dim * dim).map(element).collect(), [modalities, dim, dim])
}

/// Two text tokens and one image token in two dimensions, eps 0, keep = I, mix = I.
///
/// Text: k = (3, 4), (0, 2), so k^ = (0.6, 0.8), (0, 1), with values (1, 0), (0, 3). Image: k = (0, 5), k^ = (0, 1), v = (1, 1).
fn by_hand(kind: Basis) -> AlignCase<f64> {
    let options = AlignOptions { batch: 1, heads: 1, tokens: 3, dim: 2, kind, ..Default::default() };
    let mut case = AlignCase::new(&mut Rng::new(2), options);
    case.key = Tensor::new(vec![3.0, 4.0, 0.0, 2.0, 0.0, 5.0], [1, 1, 3, 2]);
    case.value = Tensor::new(vec![1.0, 0.0, 0.0, 3.0, 1.0, 1.0], [1, 1, 3, 2]);
    (case.modality, case.sources) = (Ids::new(&[0, 0, 1], [1, 3]).unwrap(), Ids::new(&[0, 0, 1], [1, 3]).unwrap());
    (case.keep, case.mix, case.eps) = (identity(2, 2, 1.0), identity(2, 2, 1.0), 0.0);
    case
}

#[test]
fn the_covariance_basis_pairs_unit_keys_with_values() {
    let result = by_hand(Basis::Covariance).truth();
    let text = [0.6, 0.0, 0.8, 3.0];
    let image = [0.0, 0.0, 1.0, 1.0];
    assert_close("G", &result.basis.values(), &[text, image].concat(), 1e-15);
    // Text is mapped by the image's normed rows (0, 0), (1, 1)/√2; the image by (1, 0), (0.8, 3)/‖(0.8, 3)‖.
    let (half, length) = (0.5f64.sqrt(), 9.64f64.sqrt());
    let aligned = [3.0 + 0.8 * half, 4.0 + 0.8 * half, half, 2.0 + half, 0.8 / length, 5.0 + 3.0 / length];
    assert_close("k'", &result.aligned.values(), &aligned, 1e-15);
}

#[test]
fn the_gram_basis_pairs_unit_keys_with_themselves() {
    let result = by_hand(Basis::Gram).truth();
    let text = [0.36, 0.48, 0.48, 1.64];
    let image = [0.0, 0.0, 0.0, 1.0];
    assert_close("G", &result.basis.values(), &[text, image].concat(), 1e-15);
    let length = 0.48f64.hypot(1.64);
    let aligned = [3.0, 4.8, 0.0, 3.0, 0.48 / length, 5.0 + 1.64 / length];
    assert_close("k'", &result.aligned.values(), &aligned, 1e-15);
}

#[test]
fn a_modality_is_mapped_by_all_the_other_ones() {
    let options = AlignOptions { modalities: 3, layout: Layout::Interleaved, tokens: 30, ..Default::default() };
    let case = AlignCase::<f64>::new(&mut Rng::new(3), options);
    let full = case.forward(spec::align::forward);
    // The map is additive over the other modalities: text through 1 and 2 is text through 1 plus text through 2.
    let only = |kept: usize| {
        let mut one = case.clone();
        let mut basis = full.basis.clone();
        for (b, h) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            (0..3).filter(|&m| m != kept).for_each(|m| basis.fill([b, h, m], 0.0));
        }
        (one.basis, one.keep) = (Some(basis), identity(3, options.dim, 0.0));
        one.forward(spec::align::forward).aligned
    };
    let mut alone = case.clone();
    alone.keep = identity(3, options.dim, 0.0);
    let (through, alone) = ([0, 1, 2].map(only), alone.truth().aligned);
    for (b, j) in (0..2).flat_map(|b| (0..30).map(move |j| (b, j))) {
        let own = case.modality.row(b)[j] as usize;
        let others = (0..3).filter(|&m| m != own).map(|m| through[m].get([b, 1, j, 2])).sum::<f64>();
        assert!((alone.get([b, 1, j, 2]) - others).abs() < 1e-14);
        assert_eq!(through[own].get([b, 1, j, 2]), 0.0);
    }
}

/// The default fusion at its start: a patched model is unchanged bit for bit.
#[test]
fn keep_identity_and_mix_zero_leave_every_key_as_it_was() {
    fn check<T: Element>() {
        let mut rng = Rng::new(4);
        for _ in 0..20 {
            let mut case = AlignCase::<T>::random(&mut rng);
            let AlignOptions { modalities, dim, .. } = case.options;
            let as_stored = |tensor: Tensor<f64, 3>| {
                let shape = tensor.shape;
                Tensor::new(tensor.values().into_iter().map(moda_attn::dtype::Real::from_f64).collect(), shape)
            };
            case.keep = as_stored(identity(modalities, dim, 1.0));
            case.mix = as_stored(identity(modalities, dim, 0.0));
            assert_close("k'", &case.forward(spec::align::forward).aligned.values(), &case.key.widened().values(), 0.0);
        }
    }
    check::<f64>();
    check::<f32>();
    check::<half::bf16>();
    check::<half::f16>();
}

#[test]
fn padding_passes_through_and_feeds_nothing() {
    let options = AlignOptions { padding: Padding::Right, tokens: 20, ..Default::default() };
    let mut case = AlignCase::<f64>::new(&mut Rng::new(5), options);
    let (before, gradients) = (case.truth(), case.true_gradients());
    let padded: Vec<(usize, usize)> = (0..2)
        .flat_map(|b| (0..20).map(move |j| (b, j)))
        .filter(|&(b, j)| case.modality.row(b)[j] == PADDING)
        .collect();
    assert!(!padded.is_empty());
    for &(b, j) in &padded {
        assert_eq!(before.aligned.get([b, 1, j, 0]), 1e3);
        assert_eq!(gradients.key.get([b, 1, j, 0]), case.aligned_gradient.get([b, 1, j, 0]));
        assert_eq!(gradients.value.get([b, 1, j, 0]), 0.0);
        (0..2).for_each(|h| case.key.fill([b, h, j], f64::NAN));
    }
    let (after, after_gradients) = (case.truth(), case.true_gradients());
    assert_eq!(after.basis.values(), before.basis.values());
    assert!(padded.iter().all(|&(b, j)| after.aligned.get([b, 1, j, 0]).is_nan()));
    assert_eq!(after_gradients.key.values(), gradients.key.values());
    assert_eq!(after_gradients.keep.values(), gradients.keep.values());
}

#[test]
fn only_the_context_feeds_the_bases() {
    let options = AlignOptions { context: Context::Prompt, tokens: 12, ..Default::default() };
    let mut case = AlignCase::<f64>::new(&mut Rng::new(6), options);
    let before = case.truth();
    for (b, h) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        case.key.fill([b, h, 11], 7.0);
        case.value.fill([b, h, 11], 7.0);
    }
    let after = case.truth();
    assert_eq!(after.basis.values(), before.basis.values());
    let unchanged = |j: usize| (0..5).all(|c| after.aligned.get([1, 1, j, c]) == before.aligned.get([1, 1, j, c]));
    assert!((0..11).all(unchanged) && !unchanged(11));

    let empty = AlignCase::<f64>::new(&mut Rng::new(6), AlignOptions { context: Context::Empty, ..options });
    let (result, gradients) = (empty.truth(), empty.true_gradients());
    assert!(result.basis.values().iter().all(|&g| g == 0.0));
    assert!(gradients.value.values().iter().chain(&gradients.mix.values()).all(|&g| g == 0.0));
    assert!(gradients.key.values().iter().all(|g| g.is_finite()));
}

#[test]
fn a_key_without_direction_has_a_zero_unit_key() {
    let mut case = by_hand(Basis::Covariance);
    case.key.fill([0, 0, 1], 0.0);
    let (result, gradients) = (case.truth(), case.true_gradients());
    assert_eq!([result.aligned.get([0, 0, 1, 0]), result.aligned.get([0, 0, 1, 1])], [0.0, 0.0]);
    assert!(gradients.key.values().iter().all(|g| g.is_finite()));
}

#[test]
fn nothing_in_gives_nothing_out() {
    for (batch, tokens) in [(0, 3), (1, 0)] {
        let case = AlignCase::<f64>::new(&mut Rng::new(7), AlignOptions { batch, tokens, ..Default::default() });
        let (result, gradients) = (case.truth(), case.true_gradients());
        assert_eq!(result.aligned.len(), 0);
        assert!(result.basis.values().iter().chain(&gradients.keep.values()).all(|&g| g == 0.0));
    }
}

/// A plain loop over every dtype stays within its tolerance: what the rule allows can be met.
#[test]
fn every_dtype_meets_its_tolerance() {
    fn check<T: Element>() {
        let mut rng = Rng::new(8);
        for _ in 0..100 {
            let case = AlignCase::<T>::random(&mut rng);
            let forward = case.forward(spec::align::forward);
            case.check_forward(&forward);
            case.check_backward(&case.backward(&forward, spec::align::backward));
        }
    }
    check::<f64>();
    check::<f32>();
    check::<half::bf16>();
    check::<half::f16>();
}
