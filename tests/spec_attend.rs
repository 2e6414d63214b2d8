//! The specification of attention: exact gradients, and small values worked out by hand.
#![allow(clippy::float_cmp, reason = "exact zeros and results that must not change by a bit")]

mod common;

use common::{
    AttendCase, AttendOptions, BiasTable, Layout, Padding, Ranges, Rng, Sinks, Storage, Tensor, assert_close,
    assert_close_for_size, derivative,
};
use moda_attn::dtype::Element;
use moda_attn::ids::PADDING;
use moda_attn::problem::{Combine, MassBy};
use moda_attn::range::KeyRanges;
use moda_attn::spec;

/// Σ out · out_gradient, whose gradients backward gives.
fn loss(case: &AttendCase<f64>) -> f64 {
    let out = case.forward(spec::attend::forward).out.values();
    out.iter().zip(case.out_gradient.values()).map(|(out, gradient)| out * gradient).sum()
}

/// The derivative of the loss along every finite element of one input; zero along the others.
fn differences<const R: usize>(
    case: &AttendCase<f64>,
    input: impl Fn(&mut AttendCase<f64>) -> &mut Tensor<f64, R>,
) -> Vec<f64> {
    let mut case = case.clone();
    let at = |case: &mut AttendCase<f64>, flat: usize, value: f64| input(case).set_flat(flat, value);
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

fn check_gradients(case: &AttendCase<f64>) {
    let gradients = case.backward(&case.forward(spec::attend::forward), spec::attend::backward);
    let close = |name: &str, got: &[f64], truth: &[f64]| {
        assert_close_for_size(&format!("{name} of {:?}", case.options), got, truth, 1e-9, 1.0);
    };
    close("d query", &gradients.query.values(), &differences(case, |case| &mut case.query));
    close("d key", &gradients.key.values(), &differences(case, |case| &mut case.key));
    close("d value", &gradients.value.values(), &differences(case, |case| &mut case.value));
    if let Some(sink) = &gradients.sink {
        close("d sink", &sink.values(), &differences(case, |case| case.sink.as_mut().unwrap()));
    }
    if let Some(bias) = &gradients.bias {
        close("d bias", &bias.values(), &differences(case, |case| case.bias.as_mut().unwrap()));
    }
}

#[test]
fn gradients_are_the_differences_of_the_output() {
    let mut rng = Rng::new(1);
    for combine in [Combine::Joint, Combine::Split] {
        for causal in [false, true] {
            for (queries, keys) in [(6, 6), (3, 7), (7, 4), (1, 5)] {
                for padding in Padding::ALL {
                    let options = AttendOptions {
                        queries,
                        keys,
                        padding,
                        causal,
                        combine,
                        dim: 3,
                        modalities: 1 + rng.below(3),
                        layout: rng.pick(&Layout::ALL),
                        sinks: rng.pick(&[Sinks::Absent, Sinks::Usual]),
                        bias: rng.pick(&[BiasTable::Absent, BiasTable::Finite, BiasTable::Forbidding]),
                        ranges: rng.pick(&Ranges::ALL),
                        storage: rng.pick(&Storage::ALL),
                        ..Default::default()
                    };
                    check_gradients(&AttendCase::new(&mut rng, options));
                }
            }
        }
    }
}

/// One head, one row of ids for queries and keys, all scores zero, `value[j] = j + 1`.
fn uniform(ids: &[i32], options: AttendOptions) -> AttendCase<f64> {
    let tokens = ids.len();
    let options = AttendOptions {
        batch: 1,
        heads: 1,
        key_heads: 1,
        queries: tokens,
        keys: tokens,
        dim: 1,
        bias: BiasTable::Absent,
        ..options
    };
    let mut case = AttendCase::new(&mut Rng::new(2), options);
    let ids = moda_attn::ids::Ids::new(ids, [1, tokens]).unwrap();
    (case.modality, case.query_modality) = (ids.clone(), ids);
    for j in 0..tokens {
        case.query.set_flat(j, 0.0);
        case.key.set_flat(j, 1.0);
        case.value.set_flat(j, j as f64 + 1.0);
    }
    case
}

fn with_sink(mut case: AttendCase<f64>, z: &[f64]) -> AttendCase<f64> {
    case.sink = Some(Tensor::new(z.to_vec(), [1, 1, case.options.queries, case.options.combine.parts()]));
    case
}

const JOINT: AttendOptions = AttendOptions {
    batch: 1,
    heads: 1,
    key_heads: 1,
    queries: 1,
    keys: 1,
    dim: 1,
    modalities: 2,
    padding: Padding::None,
    layout: Layout::Absent,
    causal: true,
    combine: Combine::Joint,
    sinks: Sinks::Absent,
    bias: BiasTable::Absent,
    ranges: Ranges::Absent,
    mass: MassBy::Relation,
    storage: Storage::Contiguous,
    spread: 1.0,
};
const SPLIT: AttendOptions = AttendOptions { combine: Combine::Split, ..JOINT };

#[test]
fn equal_scores_average_the_visible_values() {
    let causal = uniform(&[0, 0, 0, 0], JOINT).truth();
    assert_close("causal", &causal.out.values(), &[1.0, 1.5, 2.0, 2.5], 1e-15);
    assert_close("L", &causal.logsumexp.values(), &[1.0f64, 2.0, 3.0, 4.0].map(f64::ln), 1e-15);
    let full = uniform(&[0, 0, 0, 0], AttendOptions { causal: false, ..JOINT }).truth();
    assert_close("full", &full.out.values(), &[2.5; 4], 1e-15);
}

#[test]
fn a_sink_as_large_as_the_scores_together_takes_half_the_mass() {
    let z = [1.0f64, 2.0, 3.0, 4.0].map(f64::ln);
    let result = with_sink(uniform(&[0, 1, 1, 0], JOINT), &z).truth();
    assert_close("out", &result.out.values(), &[0.5, 0.75, 1.0, 1.25], 1e-15);
    let mass = [0.5, 0.0, 0.5, 0.25, 0.25, 0.5, 2.0 / 6.0, 1.0 / 6.0, 0.5, 0.25, 0.25, 0.5];
    assert_close("mass", &result.mass.values(), &mass, 1e-15);
}

#[test]
fn split_normalises_self_and_cross_apart() {
    let case = with_sink(uniform(&[0, 1, 0], SPLIT), &[f64::NEG_INFINITY, 0.0, 0.0, 0.0, 2.0f64.ln(), 0.0]);
    let result = case.truth();
    // Row 0: self {1}, cross empty. Row 1: self {2} + sink 1, cross {1} + sink 1. Row 2: self {1, 3} + sink 2, cross {2} + 1.
    assert_close("out", &result.out.values(), &[1.0, 1.0 + 0.5, 1.0 + 1.0], 1e-15);
    let parts = result.parts.unwrap().values();
    assert_close("parts", &parts, &[1.0, 1.0, 1.0, 0.0, 0.5, 1.0], 1e-15);
    let mass = [1.0, 0.0, 0.0, 0.5, 0.5, 1.0, 0.5, 0.5, 1.0];
    assert_close("mass", &result.mass.values(), &mass, 1e-15);
    let logsumexp = [0.0, 2.0f64.ln(), 4.0f64.ln(), f64::INFINITY, 2.0f64.ln(), 2.0f64.ln()];
    assert_close("L", &result.logsumexp.values(), &logsumexp, 1e-15);
}

/// The columns of mass by modality, added up by the query's modality, are those of mass by relation.
#[test]
fn mass_by_modality_is_mass_by_relation_in_detail() {
    let z = [1.0f64, 2.0, 3.0, 4.0].map(f64::ln);
    let case = with_sink(uniform(&[0, 1, 1, 0], AttendOptions { mass: MassBy::Modality, modalities: 3, ..JOINT }), &z);
    let wanted = [0.5, 0.0, 0.0, 0.5, 0.25, 0.25, 0.0, 0.5, 1.0 / 6.0, 2.0 / 6.0, 0.0, 0.5, 0.25, 0.25, 0.0, 0.5];
    assert_close("by modality", &case.truth().mass.values(), &wanted, 1e-15);
    let mut rng = Rng::new(9);
    for _ in 0..50 {
        let mut case = AttendCase::<f64>::random(&mut rng);
        case.options.mass = MassBy::Relation;
        let relation = case.truth().mass;
        case.options.mass = MassBy::Modality;
        let (modality, m) = (case.truth().mass, case.options.modalities);
        let [batch, heads, queries, _] = relation.shape;
        for (b, h, i) in
            (0..batch * heads * queries).map(|at| (at / queries / heads, at / queries % heads, at % queries))
        {
            let own = case.query_modality.row(b)[i];
            let column = |column: usize| modality.get([b, h, i, column]);
            let on_self = if own == PADDING { 0.0 } else { column(own as usize) };
            let every: f64 = (0..m).map(column).sum();
            let wanted = [0, 1, 2].map(|column| relation.get([b, h, i, column]));
            assert_close("by relation", &[on_self, every - on_self, column(m)], &wanted, 1e-14);
        }
    }
}

#[test]
fn bias_moves_mass_between_modalities() {
    let mut case = uniform(&[0, 1], JOINT);
    case.bias = Some(Tensor::new(vec![0.0, 0.0, 3.0f64.ln(), 0.0], [1, 1, 2, 2]));
    assert_close("text 3 : 1", &case.truth().out.values(), &[1.0, (3.0 * 1.0 + 2.0) / 4.0], 1e-15);
    case.bias = Some(Tensor::new(vec![0.0, 0.0, f64::NEG_INFINITY, 0.0], [1, 1, 2, 2]));
    assert_close("text forbidden", &case.truth().out.values(), &[1.0, 2.0], 1e-15);
}

#[test]
fn the_causal_limit_is_aligned_at_the_bottom_right() {
    let options = AttendOptions { queries: 2, keys: 5, sinks: Sinks::Absent, ..Default::default() };
    let case = AttendCase::<f64>::new(&mut Rng::new(3), options);
    assert_eq!([0, 1].map(|i| case.problem().visible(0, i)), [0..4, 0..5]);
    let options = AttendOptions { queries: 5, keys: 2, sinks: Sinks::Usual, ..Default::default() };
    let case = AttendCase::<f64>::new(&mut Rng::new(3), options);
    let result = case.truth();
    for i in 0..3 {
        assert_eq!(result.out.get([0, 0, i, 0]), 0.0);
        assert_eq!(result.logsumexp.get([0, 0, 0, i]), f64::INFINITY);
        assert_eq!(result.mass.get([0, 0, i, 2]), 0.0);
        assert_eq!(case.true_gradients().sink.unwrap().get([0, 0, i, 0]), 0.0);
    }
    assert!(result.out.get([0, 0, 3, 0]) != 0.0);
}

#[test]
fn a_query_sees_its_range_within_the_causal_limit() {
    let ranged = |pairs: &[[i64; 2]], options: AttendOptions| {
        let mut case = uniform(&[0; 5], options);
        case.ranges = Some(KeyRanges::from_slice(pairs, [1, 5], 5));
        case
    };
    // A window of two keys.
    let case = ranged(&[[-1, 9], [0, 9], [1, 9], [2, 9], [3, 9]], JOINT);
    assert_close("window", &case.truth().out.values(), &[1.0, 1.5, 2.5, 3.5, 4.5], 1e-15);
    // Two sequences packed in a row, one bidirectional, and a query that sees nothing.
    let free = AttendOptions { causal: false, ..JOINT };
    let case = with_sink(ranged(&[[0, 2], [0, 2], [2, 5], [4, 4], [3, 1]], free), &[f64::NEG_INFINITY; 5]);
    let (result, gradients) = (case.truth(), case.true_gradients());
    assert_close("packed", &result.out.values(), &[1.5, 1.5, 4.0, 0.0, 0.0], 1e-15);
    assert_eq!(result.logsumexp.values()[3..], [f64::INFINITY; 2]);
    assert_eq!(result.mass.values()[9..], [0.0; 6]);
    assert_eq!(gradients.query.values()[3..], [0.0; 2]);
    assert_eq!(gradients.sink.unwrap().values()[3..], [0.0; 2]);
}

#[test]
fn masses_of_a_joint_row_that_sees_anything_sum_to_one() {
    let mut rng = Rng::new(4);
    for _ in 0..50 {
        let options = AttendOptions { combine: Combine::Joint, ..AttendOptions::random(&mut rng) };
        let case = AttendCase::<f64>::new(&mut rng, options);
        let (mass, logsumexp) = (case.truth().mass.values(), case.truth().logsumexp.values());
        let columns = options.mass.columns(options.modalities);
        let sees = |row: usize| logsumexp[row] != f64::INFINITY || mass[columns * (row + 1) - 1] == 1.0;
        for (row, mass) in mass.chunks(columns).enumerate() {
            let wanted = if sees(row) { 1.0 } else { 0.0 };
            assert!((mass.iter().sum::<f64>() - wanted).abs() < 1e-14, "{mass:?} in {options:?}");
        }
    }
}

#[test]
fn a_sink_far_above_every_score_takes_all_and_one_far_below_nothing() {
    for z in [1e30, f64::INFINITY] {
        let case = with_sink(uniform(&[0, 1, 0], JOINT), &[z; 3]);
        let (result, gradients) = (case.truth(), case.true_gradients());
        assert_eq!(result.out.values(), [0.0; 3]);
        assert_eq!(result.logsumexp.values(), [z; 3]);
        assert_eq!(result.mass.values(), [0.0, 0.0, 1.0].repeat(3));
        for gradient in [gradients.query, gradients.key, gradients.value, gradients.sink.unwrap()] {
            assert!(gradient.values().iter().all(|&gradient| gradient == 0.0));
        }
    }
    for z in [-1e30, f64::NEG_INFINITY] {
        let plain = uniform(&[0, 1, 0], JOINT);
        let case = with_sink(plain.clone(), &[z; 3]);
        assert_eq!(case.truth().out.values(), plain.truth().out.values());
        assert_eq!(case.true_gradients().sink.unwrap().values(), [0.0; 3]);
    }
}

#[test]
fn a_query_that_is_not_finite_spoils_its_own_row_only() {
    for (combine, poison) in [(Combine::Joint, f64::NAN), (Combine::Split, f64::INFINITY), (Combine::Joint, -1.0 / 0.0)]
    {
        let case = AttendCase::<f64>::new(&mut Rng::new(5), AttendOptions { combine, ..Default::default() });
        let mut spoiled = case.clone();
        let dim = case.options.dim;
        spoiled.query.set_flat(4 * dim + 2, poison); // row (0, 0, 4)
        let (clean, got) = (case.truth().out.values(), spoiled.truth().out.values());
        for (row, (got, clean)) in got.chunks(dim).zip(clean.chunks(dim)).enumerate() {
            assert!(if row == 4 { got.iter().all(|x| x.is_nan()) } else { got == clean }, "row {row}");
        }
    }
}

#[test]
fn padding_is_neither_read_nor_answered() {
    for combine in [Combine::Joint, Combine::Split] {
        let options = AttendOptions { padding: Padding::Left, combine, causal: false, ..Default::default() };
        let case = AttendCase::<f64>::new(&mut Rng::new(6), options);
        let (result, gradients) = (case.truth(), case.true_gradients());
        let every = [&result.out, &result.mass, &gradients.query, &gradients.key, &gradients.value];
        assert!(every.iter().all(|tensor| tensor.values().iter().all(|x| x.is_finite())));
        let mut padded = 0;
        for b in 0..2 {
            for (i, _) in case.query_modality.row(b).iter().enumerate().filter(|&(_, &id)| id == PADDING) {
                padded += 1;
                assert_eq!(result.out.get([b, 1, i, 0]), 0.0);
                assert_eq!(result.logsumexp.get([b, 1, combine.parts() - 1, i]), f64::INFINITY);
                assert_eq!(gradients.query.get([b, 1, i, 0]), 0.0);
                assert_eq!(gradients.key.get([b, 1, i, 0]), 0.0);
            }
        }
        assert!(padded > 0);
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    for (batch, queries, keys) in [(0, 3, 3), (1, 0, 3), (1, 3, 0)] {
        let options = AttendOptions { batch, queries, keys, ..Default::default() };
        let case = AttendCase::<f64>::new(&mut Rng::new(7), options);
        assert!(case.truth().out.values().iter().all(|&x| x == 0.0));
        let gradients = case.true_gradients();
        assert!(gradients.key.values().iter().chain(&gradients.query.values()).all(|&x| x == 0.0));
    }
}

/// A plain loop over every dtype stays within its tolerance: what the rule allows can be met.
#[test]
fn every_dtype_meets_its_tolerance() {
    fn check<T: Element>() {
        let mut rng = Rng::new(8);
        for _ in 0..100 {
            let case = AttendCase::<T>::random(&mut rng);
            let forward = case.forward(spec::attend::forward);
            case.check_forward(&forward);
            case.check_backward(&case.backward(&forward, spec::attend::backward));
        }
    }
    check::<f64>();
    check::<f32>();
    check::<half::bf16>();
    check::<half::f16>();
}
