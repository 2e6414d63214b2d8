//! How large the terms are that a gradient of attention is the sum of: what its rounding errors are measured by.

use super::attend::{AttendBuffers, AttendCase};
use moda_attn::ids::PADDING;
use moda_attn::problem::Combine;

/// For every gradient the root of the summed squares of its terms, with dP - delta counted as if nothing cancelled.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sizes {
    pub(super) query: f64,
    pub(super) key: f64,
    pub(super) sink: f64,
    pub(super) bias: f64,
}

impl Sizes {
    pub(super) fn of(case: &AttendCase<f64>, forward: &AttendBuffers<f64>) -> Self {
        let problem = case.problem();
        let [batch, heads, queries, dim] = problem.query.shape();
        let combine = case.options.combine;
        let mut squares = Self::default();
        for (b, h, i) in indices(batch, heads, queries) {
            let own = problem.query_modality.row(b)[i];
            let key_head = h / problem.group();
            let d_out = |c| case.out_gradient.get([b, h, i, c]);
            let logsumexp = |part| forward.logsumexp.get([b, h, part, i]);
            let out = |part, c| match &forward.parts {
                Some(parts) => parts.get([b, h, part, i, c]),
                None => forward.out.get([b, h, i, c]),
            };
            let delta = |part| rss(dim, |c| d_out(c) * out(part, c));
            if let Some(sink) = problem.sink {
                for part in (0..combine.parts()).filter(|&part| logsumexp(part).is_finite()) {
                    squares.sink += ((sink.get([b, h, i, part]) - logsumexp(part)).exp() * delta(part)).powi(2);
                }
            }
            for j in problem.visible(b, i) {
                let other = problem.modality.row(b)[j];
                if own == PADDING || other == PADDING {
                    continue;
                }
                let part = usize::from(combine == Combine::Split && own != other);
                let (q, k) = (|c| problem.query.get([b, h, i, c]), |c| problem.key.get([b, key_head, j, c]));
                let bias = problem.bias.map_or(0.0, |bias| bias.get([b, h, own as usize, other as usize]));
                let score = case.scale * (0..dim).map(|c| q(c) * k(c)).sum::<f64>() + bias;
                let probability = (score - logsumexp(part)).exp();
                if probability > 0.0 {
                    let d_probability = rss(dim, |c| d_out(c) * problem.value.get([b, key_head, j, c]));
                    let d_score = probability * (d_probability + delta(part));
                    squares.query += (case.scale * d_score * rss(dim, k)).powi(2);
                    squares.key += (case.scale * d_score * rss(dim, q)).powi(2);
                    squares.bias += d_score.powi(2);
                }
            }
        }
        let Self { query, key, sink, bias } = squares;
        Self { query: query.sqrt(), key: key.sqrt(), sink: sink.sqrt(), bias: bias.sqrt() }
    }
}

fn indices(batch: usize, heads: usize, queries: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..batch * heads * queries).map(move |flat| (flat / queries / heads, flat / queries % heads, flat % queries))
}

/// Root of the sum of squares.
fn rss(dim: usize, term: impl Fn(usize) -> f64) -> f64 {
    (0..dim).map(|c| term(c).powi(2)).sum::<f64>().sqrt()
}
