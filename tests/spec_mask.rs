//! The pseudo-scores: values against the explicit sum, gradients against differences of it.
#![allow(clippy::float_cmp, reason = "exact zeros and results that must not change by a bit")]

mod common;

use common::{Rng, Tensor, assert_close, assert_each_close};
use moda_attn::dtype::Real;
use moda_attn::ids::Ids;
use moda_attn::problem::SinkProblem;
use moda_attn::spec::mask::{pseudo_sink, pseudo_sink_backward};
use moda_attn::view::{View, ViewMut};

/// A problem that owns its buffers.
struct Case<R> {
    position: Vec<i64>,
    ids: Ids,
    span: i64,
    decay: Tensor<R, 2>,
    base: Tensor<R, 2>,
}

impl<R: Real> Case<R> {
    /// One row of text queries, one head.
    fn row(position: &[i64], span: i64, decay: f64, base: f64) -> Self {
        let ids = Ids::new(&vec![0; position.len()], [1, position.len()]).unwrap();
        let table = |value: f64| Tensor::new(vec![R::from_f64(value)], [1, 1]);
        Self { position: position.to_vec(), ids, span, decay: table(decay), base: table(base) }
    }

    fn problem(&self) -> SinkProblem<'_, R> {
        let position = View::from_slice(&self.position, self.ids.shape());
        let [decay, base] = [&self.decay, &self.base].map(Tensor::view);
        SinkProblem { position, query_modality: &self.ids, span: self.span, decay, base }.validated().unwrap()
    }

    fn shape(&self) -> [usize; 3] {
        let [batch, queries] = self.ids.shape();
        [batch, self.decay.shape[1], queries]
    }

    fn sink(&self) -> Tensor<R, 3> {
        let mut sink = Tensor::poisoned(self.shape());
        pseudo_sink(&self.problem(), &mut ViewMut::from_slice(sink.slice_mut(), self.shape()));
        sink
    }

    /// (d decay, d base)
    fn gradients(&self, upstream: &Tensor<R, 3>) -> (Tensor<R, 2>, Tensor<R, 2>) {
        let shape = self.decay.shape;
        let (mut decay, mut base) = (Tensor::poisoned(shape), Tensor::poisoned(shape));
        let mut decay_view = ViewMut::from_slice(decay.slice_mut(), shape);
        let mut base_view = ViewMut::from_slice(base.slice_mut(), shape);
        pseudo_sink_backward(&self.problem(), upstream.view(), &mut decay_view, &mut base_view);
        (decay, base)
    }

    /// d log Z / d decay of a single row.
    fn slope(&self) -> f64 {
        self.gradients(&Tensor::new(vec![R::ONE], [1, 1, 1])).0.flat(0).to_f64()
    }
}

/// log Σ exp(-t d) and its derivative by adding up, the largest term factored out.
fn explicit(decay: f64, masked: i64) -> (f64, f64) {
    let highest = (-decay * (masked - 1) as f64).max(0.0);
    let weight = |t: i64| (-(t as f64) * decay - highest).exp();
    let sum: f64 = (0..masked).map(weight).sum();
    let moment: f64 = (0..masked).map(|t| t as f64 * weight(t)).sum();
    (highest + sum.ln(), -moment / sum)
}

#[test]
fn log_z_is_the_explicit_sum_for_every_decay() {
    for size in [0.0, 1e-300, 1e-17, 1e-12, 1e-8, 1e-5, 1e-4, 3e-3, 0.05, 0.11, 0.5, 1.0, 2.5, 40.0, 800.0] {
        for decay in [size, -size] {
            for masked in [1, 2, 3, 10, 1000, 4095] {
                let case = Case::<f64>::row(&[4095 - masked], 4096, decay, 0.25);
                let (value, slope) = explicit(decay, masked);
                let name = format!("decay {decay:e}, {masked} masked");
                assert_each_close(&name, &case.sink().values(), &[value + 0.25], 4e-15);
                let (got, allowed) = (case.slope(), 1e-13 * (1.0 + slope.abs()));
                assert!((got - slope).abs() <= allowed, "{name}: slope {got:e}, not {slope:e}");
            }
        }
    }
}

#[test]
fn the_slope_is_continuous_where_its_formula_changes() {
    for masked in [2, 7, 1000] {
        let slopes =
            [0.1 - 1e-12, 0.1 + 1e-12].map(|x| Case::<f64>::row(&[0], masked + 1, x / masked as f64, 0.0).slope());
        assert!((slopes[0] / slopes[1] - 1.0).abs() < 1e-11, "{slopes:?}");
    }
}

#[test]
fn small_values_by_hand() {
    let halving = 2.0f64.ln(); // weights 1, 1/2, 1/4, ...
    let case = Case::<f64>::row(&[0, 1, 2, 3, 4], 4, halving, 0.0);
    let wanted = [1.75f64.ln(), 1.5f64.ln(), 0.0, f64::NEG_INFINITY, f64::NEG_INFINITY];
    assert_close("decay log 2", &case.sink().values(), &wanted, 1e-15);
    let fixed = Case::<f64>::row(&[0, 2, 3], 4, 0.0, -4.0);
    assert_close("fixed", &fixed.sink().values(), &[3.0f64.ln() - 4.0, -4.0, f64::NEG_INFINITY], 1e-15);
}

#[test]
fn every_row_reads_its_own_modality_and_head() {
    let mut rng = Rng::new(1);
    let (batch, queries, modalities, heads, span) = (3, 11, 3, 4, 9);
    let ids: Vec<i32> = (0..batch * queries).map(|_| rng.below(modalities + 1) as i32 - 1).collect();
    let position = (0..batch * queries).map(|_| rng.below(12) as i64).collect();
    let mut table = || Tensor::new(rng.normals::<f64>(modalities * heads, 1.0), [modalities, heads]);
    let (decay, base) = (table(), table());
    let case = Case { position, ids: Ids::new(&ids, [batch, queries]).unwrap(), span, decay, base };
    let (sink, upstream) = (case.sink(), Tensor::new(rng.normals(batch * heads * queries, 1.0), case.shape()));
    let (mut d_decay, mut d_base) = (vec![0.0; modalities * heads], vec![0.0; modalities * heads]);
    for (b, h, i) in (0..batch * heads * queries).map(|at| (at / queries / heads, at / queries % heads, at % queries)) {
        let masked = span - 1 - case.position[b * queries + i];
        let got = sink.get([b, h, i]);
        let Ok(m) = usize::try_from(case.ids.row(b)[i]) else {
            assert_eq!(got, f64::NEG_INFINITY);
            continue;
        };
        if masked <= 0 {
            assert_eq!(got, f64::NEG_INFINITY);
            continue;
        }
        let (value, slope) = explicit(case.decay.get([m, h]), masked);
        assert!((got - case.base.get([m, h]) - value).abs() < 1e-13);
        d_decay[m * heads + h] += slope * upstream.get([b, h, i]);
        d_base[m * heads + h] += upstream.get([b, h, i]);
    }
    let gradients = case.gradients(&upstream);
    assert_close("d decay", &gradients.0.values(), &d_decay, 1e-13);
    assert_close("d base", &gradients.1.values(), &d_base, 1e-13);
}

#[test]
fn rows_without_pseudo_scores_move_nothing() {
    let mut case = Case::<f64>::row(&[3, 4, 100], 4, 0.5, -4.0);
    let upstream = Tensor::new(vec![f64::NAN; 3], [1, 1, 3]);
    assert_eq!(case.gradients(&upstream).0.values(), [0.0]);
    assert_eq!(case.gradients(&upstream).1.values(), [0.0]);
    case.ids = Ids::new(&[-1; 3], [1, 3]).unwrap();
    case.position = vec![0, i64::MIN, i64::MAX];
    assert_eq!(case.sink().values(), [f64::NEG_INFINITY; 3]);
    assert_eq!(case.gradients(&upstream).0.values(), [0.0]);
}

#[test]
fn float32_tables_are_computed_in_float64() {
    for decay in [1e-7, 0.01, -0.3] {
        let narrow = Case::<f32>::row(&[0], 4096, decay, -4.0);
        let wide = Case::<f64>::row(&[0], 4096, f64::from(decay as f32), -4.0);
        assert_eq!(narrow.sink().flat(0), wide.sink().flat(0) as f32);
        assert_eq!(narrow.slope(), f64::from(wide.slope() as f32));
    }
}
