//! The modular mask's pseudo-scores (paper, equation 10): what the masked positions behind a query hold of its mass.
//!
//! With e masked positions, decay d and base β: `log Z = β + f(d, e)`, `f(d, e) = log Σ exp(-t d)` over t = 0 .. e-1.
//! Both functions are quick enough to be the operators themselves: f depends only on (modality, head, e), and a batch
//! holds far fewer different (modality, e) than rows.

use super::linear::block;
use crate::dtype::Real;
use crate::problem::SinkProblem;
use crate::view::{View, ViewMut};

/// Sink logits log Z (B, Hq, Nq); -inf for a row of padding or one with no masked position. Computed in float64.
pub fn pseudo_sink<R: Real>(problem: &SinkProblem<'_, R>, sink: &mut ViewMut<'_, R, 3>) {
    let [batch, queries] = problem.position.shape();
    let rows = Rows::new(problem);
    let mut values = vec![R::NEG_INFINITY; rows.kinds.len()];
    for h in 0..problem.decay.shape()[1] {
        for (value, &Kind { modality, masked }) in values.iter_mut().zip(&rows.kinds) {
            let [decay, base] = [&problem.decay, &problem.base].map(|table| table.get([modality, h]).to_f64());
            *value = R::from_f64(base + log_sum(decay, masked));
        }
        for b in 0..batch {
            for (sink, kind) in block(sink, [b, h]).iter_mut().zip(&rows.kind[b * queries..]) {
                *sink = kind.map_or(R::NEG_INFINITY, |kind| values[kind]);
            }
        }
    }
}

/// Gradients (M, Hq) of [`pseudo_sink`] for decay and base from that of the sink (B, Hq, Nq). Summed in float64, always
/// in the same order.
pub fn pseudo_sink_backward<R: Real>(
    problem: &SinkProblem<'_, R>,
    sink_gradient: View<'_, R, 3>,
    decay: &mut ViewMut<'_, R, 2>,
    base: &mut ViewMut<'_, R, 2>,
) {
    let [batch, queries] = problem.position.shape();
    let [modalities, heads] = problem.decay.shape();
    let rows = Rows::new(problem);
    for h in 0..heads {
        let mut upstream = vec![0.0; rows.kinds.len()];
        for b in 0..batch {
            for i in 0..queries {
                if let Some(kind) = rows.kind[b * queries + i] {
                    upstream[kind] += sink_gradient.get([b, h, i]).to_f64();
                }
            }
        }
        let mut d_decay = vec![0.0; modalities];
        let mut d_base = vec![0.0; modalities];
        for (upstream, &Kind { modality, masked }) in upstream.into_iter().zip(&rows.kinds) {
            d_decay[modality] += upstream * log_sum_slope(problem.decay.get([modality, h]).to_f64(), masked);
            d_base[modality] += upstream;
        }
        for m in 0..modalities {
            decay.as_mut_slice()[m * heads + h] = R::from_f64(d_decay[m]);
            base.as_mut_slice()[m * heads + h] = R::from_f64(d_base[m]);
        }
    }
}

/// All that log Z of a row depends on beside the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    modality: usize,
    /// e, at least 1.
    masked: i64,
}

/// The different kinds of row in a problem and which one every row is.
struct Rows {
    kinds: Vec<Kind>,
    /// Index into `kinds` of row (b, i); None where there are no pseudo-scores.
    kind: Vec<Option<usize>>,
}

impl Rows {
    fn new<R: Real>(problem: &SinkProblem<'_, R>) -> Self {
        let [batch, queries] = problem.position.shape();
        let kind_of = |b: usize, i: usize| {
            let modality = usize::try_from(problem.query_modality.row(b)[i]).ok()?;
            let masked = problem.span.saturating_sub(1).saturating_sub(problem.position.get([b, i]));
            (masked > 0).then_some(Kind { modality, masked })
        };
        let every: Vec<_> = (0..batch).flat_map(|b| (0..queries).map(move |i| kind_of(b, i))).collect();
        let mut kinds: Vec<Kind> = every.iter().copied().flatten().collect();
        kinds.sort_unstable();
        kinds.dedup();
        let kind = every.into_iter().map(|row| row.and_then(|row| kinds.binary_search(&row).ok())).collect();
        Self { kinds, kind }
    }
}

/// f(d, e) = log Σ exp(-t d) over t = 0 .. e-1, for e >= 1.
///
/// A closed form of the geometric sum; expm1 keeps it accurate where d is tiny. For d < 0 the sum is turned around:
/// its largest term is the last one, exp(|d| (e-1)).
fn log_sum(decay: f64, masked: i64) -> f64 {
    let e = masked as f64;
    if decay == 0.0 {
        e.ln()
    } else if decay < 0.0 {
        log_sum(-decay, masked) - decay * (e - 1.0)
    } else {
        ((-decay * e).exp_m1() / (-decay).exp_m1()).ln()
    }
}

/// ∂f/∂d = e / expm1(d e) - 1 / expm1(d): minus the mean of t under the weights exp(-t d).
///
/// With g(x) = x / expm1(x) that is (g(d e) - g(d)) / d, a difference of nearly equal numbers where d e is small; there
/// the series g(x) = 1 - x/2 + Σ B₂ₖ x²ᵏ / (2k)! (B the Bernoulli numbers) is subtracted term by term.
fn log_sum_slope(decay: f64, masked: i64) -> f64 {
    let e = masked as f64;
    if decay < 0.0 {
        return -(e - 1.0) - log_sum_slope(-decay, masked);
    }
    let x = decay * e;
    if x < SERIES_BELOW {
        // With d² factored out of the powers: Σ Bₖ d²ᵏ⁻¹ (e²ᵏ - 1), in x = d e.
        let (x2, d2) = (x * x, decay * decay);
        let (mut x_power, mut d_power) = (x * e, decay); // d²ᵏ⁻¹ e²ᵏ and d²ᵏ⁻¹
        let mut slope = -0.5 * (e - 1.0);
        for coefficient in BERNOULLI {
            slope += coefficient * (x_power - d_power);
            x_power *= x2;
            d_power *= d2;
        }
        return slope;
    }
    (bernoulli_quotient(x) - bernoulli_quotient(decay)) / decay
}

/// g(x) = x / expm1(x) for x > 0.
fn bernoulli_quotient(x: f64) -> f64 {
    if x == f64::INFINITY { 0.0 } else { x / x.exp_m1() }
}

/// Below this d e the series is the more accurate: five terms leave a relative error under 1e-17.
const SERIES_BELOW: f64 = 0.1;

/// B₂ₖ / (2k)! for k = 1 .. 5.
const BERNOULLI: [f64; 5] = [1.0 / 12.0, -1.0 / 720.0, 1.0 / 30240.0, -1.0 / 1_209_600.0, 1.0 / 47_900_160.0];
