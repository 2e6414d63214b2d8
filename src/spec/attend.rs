//! Modular masked attention (paper, equations 7 to 10): softmax over self and cross keys with a sink beside them.

use super::linear::{Matrix, add_scaled, block, dot, head, write_matrix, write_row, zeros};
use crate::dtype::{Element, Real};
use crate::ids::PADDING;
use crate::problem::{AttendGradients, AttendOutputs, AttendProblem, AttendUpstream, Combine, MassBy};

/// Output o (B, Hq, Nq, D), logsumexp L (B, Hq, parts, Nq) and, where wanted, the parts of o and the mass.
///
/// A row of padding, or one that no key is visible to, gives zeros and L = +inf; so does an empty part of "split". A
/// sink of -inf stands for no pseudo-scores, one of +inf takes all the mass. A query that is not finite makes its own
/// row NaN, whatever the keys.
pub fn forward<T: Element>(problem: &AttendProblem<'_, T>, outputs: &mut AttendOutputs<'_, T>) {
    let [batch, query_heads, queries, dim] = problem.query.shape();
    for b in 0..batch {
        for h in 0..query_heads {
            let row = Head::read(problem, b, h);
            for i in 0..queries {
                let pairs = row.pairs(i);
                let mut out = vec![T::Acc::ZERO; dim];
                let by = outputs.mass.as_ref().map_or(MassBy::Relation, |mass| mass.by);
                let mut mass = vec![T::Acc::ZERO; by.columns(problem.modalities())];
                for part in 0..problem.combine.parts() {
                    let pairs: Vec<&Pair<_>> = pairs.iter().filter(|pair| pair.part == part).collect();
                    let softmax = Softmax::new(&pairs, row.sink(i, part));
                    let mut part_out = vec![T::Acc::ZERO; dim];
                    for (pair, &probability) in pairs.iter().zip(&softmax.probabilities) {
                        add_scaled(&mut part_out, probability, &row.value[pair.key]);
                        let column = match by {
                            MassBy::Relation => usize::from(pair.is_cross),
                            MassBy::Modality => problem.modality.row(b)[pair.key] as usize,
                        };
                        mass[column] += probability;
                    }
                    *mass.last_mut().expect("a column for the pseudo-scores") += softmax.sink_probability;
                    add_scaled(&mut out, T::Acc::ONE, &part_out);
                    if let Some(logsumexp) = &mut outputs.logsumexp {
                        block(logsumexp, [b, h, part])[i] = softmax.logsumexp;
                    }
                    if let Some(parts) = &mut outputs.parts {
                        write_row(block(parts, [b, h, part, i]), &part_out);
                    }
                }
                write_row(block(&mut outputs.out, [b, h, i]), &out);
                if let Some(target) = &mut outputs.mass {
                    write_row(block(&mut target.values, [b, h, i]), &mass);
                }
            }
        }
    }
}

/// Gradients of [`forward`] for query, key, value, sink and bias, from its output and logsumexp.
pub fn backward<T: Element>(
    problem: &AttendProblem<'_, T>,
    upstream: &AttendUpstream<'_, T>,
    gradients: &mut AttendGradients<'_, T>,
) {
    let [batch, query_heads, queries, dim] = problem.query.shape();
    let [_, key_heads, keys, _] = problem.key.shape();
    let modalities = gradients.bias.as_ref().map_or(0, |bias| bias.shape()[2]);
    for b in 0..batch {
        let mut d_key = vec![zeros(keys, dim); key_heads];
        let mut d_value = vec![zeros(keys, dim); key_heads];
        for h in 0..query_heads {
            let row = Head::read(problem, b, h);
            let (d_key, d_value) = (&mut d_key[row.source], &mut d_value[row.source]);
            let mut d_query = zeros(queries, dim);
            let mut d_bias = zeros(modalities, modalities);
            let d_out = head(&upstream.out_gradient, b, h);
            for i in 0..queries {
                let delta = delta(problem, upstream, [b, h, i], &d_out[i]);
                let logsumexp = |part| upstream.logsumexp.get([b, h, part, i]);
                let pairs = row.pairs(i);
                for pair in &pairs {
                    // P = exp(s - L), dP = dO · v, dS = P (dP - delta)
                    let probability = (pair.score - logsumexp(pair.part)).exp();
                    let d_score = probability * (dot(&d_out[i], &row.value[pair.key]) - delta[pair.part]);
                    add_scaled(&mut d_value[pair.key], probability, &d_out[i]);
                    add_scaled(&mut d_query[i], problem.scale * d_score, &row.key[pair.key]);
                    add_scaled(&mut d_key[pair.key], problem.scale * d_score, &row.query[i]);
                    if modalities > 0 {
                        let (m_i, m_j) = row.modalities(i, pair.key);
                        d_bias[m_i][m_j] += d_score;
                    }
                }
                if let Some(target) = &mut gradients.sink {
                    for (part, d_sink) in block(target, [b, h, i]).iter_mut().enumerate() {
                        // L = +inf: an empty part, or a sink that took it all. The output is zero wherever that sink goes.
                        let (z, l) = (row.sink(i, part), logsumexp(part));
                        *d_sink = if l == T::Acc::INFINITY { T::Acc::ZERO } else { -((z - l).exp() * delta[part]) };
                    }
                }
            }
            write_matrix(block(&mut gradients.query, [b, h]), &d_query);
            if let Some(target) = &mut gradients.bias {
                write_matrix(block(target, [b, h]), &d_bias);
            }
        }
        for h in 0..key_heads {
            write_matrix(block(&mut gradients.key, [b, h]), &d_key[h]);
            write_matrix(block(&mut gradients.value, [b, h]), &d_value[h]);
        }
    }
}

/// delta = dO · o of every part.
fn delta<T: Element>(
    problem: &AttendProblem<'_, T>,
    upstream: &AttendUpstream<'_, T>,
    [b, h, i]: [usize; 3],
    d_out: &[T::Acc],
) -> Vec<T::Acc> {
    let along = |out: &dyn Fn(usize) -> T::Acc| {
        d_out.iter().enumerate().fold(T::Acc::ZERO, |sum, (c, &d_out)| sum + d_out * out(c))
    };
    match problem.combine {
        Combine::Joint => vec![along(&|c| upstream.out.get([b, h, i, c]).widen())],
        Combine::Split => {
            let parts = upstream.parts.expect("backward of \"split\" needs the parts of forward's output");
            (0..2).map(|part| along(&|c| parts.get([b, h, part, i, c]))).collect()
        }
    }
}

/// A key that a query sees.
struct Pair<R> {
    /// j
    key: usize,
    /// Whether j is of another modality than the query.
    is_cross: bool,
    /// The softmax it takes part in.
    part: usize,
    /// s
    score: R,
}

/// A query head of one batch row and the keys and values it reads.
struct Head<'p, 'a, T: Element> {
    problem: &'p AttendProblem<'a, T>,
    b: usize,
    h: usize,
    /// The key head it reads.
    source: usize,
    query: Matrix<T::Acc>,
    key: Matrix<T::Acc>,
    value: Matrix<T::Acc>,
}

impl<'p, 'a, T: Element> Head<'p, 'a, T> {
    fn read(problem: &'p AttendProblem<'a, T>, b: usize, h: usize) -> Self {
        let source = h / problem.group();
        let (query, key, value) =
            (head(&problem.query, b, h), head(&problem.key, b, source), head(&problem.value, b, source));
        Self { problem, b, h, source, query, key, value }
    }

    /// m(i), m(j) of a pair without padding.
    fn modalities(&self, i: usize, j: usize) -> (usize, usize) {
        (self.problem.query_modality.row(self.b)[i] as usize, self.problem.modality.row(self.b)[j] as usize)
    }

    /// z
    fn sink(&self, i: usize, part: usize) -> T::Acc {
        self.problem.sink.map_or(T::Acc::NEG_INFINITY, |sink| sink.get([self.b, self.h, i, part]))
    }

    /// Every key that query i sees, with its score: not padding, within its range and the causal limit, not forbidden by
    /// the bias.
    fn pairs(&self, i: usize) -> Vec<Pair<T::Acc>> {
        let (own, others) = (self.problem.query_modality.row(self.b)[i], self.problem.modality.row(self.b));
        let mut pairs = Vec::new();
        if own == PADDING {
            return pairs;
        }
        let query_is_finite = self.query[i].iter().all(|q| q.is_finite());
        for j in self.problem.visible(self.b, i).filter(|&j| others[j] != PADDING) {
            let (m_i, m_j) = self.modalities(i, j);
            let bias = self.problem.bias.map_or(T::Acc::ZERO, |bias| bias.get([self.b, self.h, m_i, m_j]));
            if bias == T::Acc::NEG_INFINITY {
                continue;
            }
            let score = if query_is_finite {
                self.problem.scale * dot(&self.query[i], &self.key[j]) + bias
            } else {
                T::Acc::from_f64(f64::NAN)
            };
            let is_cross = m_i != m_j;
            let part = match self.problem.combine {
                Combine::Joint => 0,
                Combine::Split => usize::from(is_cross),
            };
            pairs.push(Pair { key: j, is_cross, part, score });
        }
        pairs
    }
}

/// Probabilities of the keys of one part and of its sink.
struct Softmax<R> {
    probabilities: Vec<R>,
    sink_probability: R,
    logsumexp: R,
}

impl<R: Real> Softmax<R> {
    fn new(pairs: &[&Pair<R>], sink: R) -> Self {
        if pairs.is_empty() {
            return Self { probabilities: Vec::new(), sink_probability: R::ZERO, logsumexp: R::INFINITY };
        }
        // The maximum includes the sink, so no exponential overflows however far it lies above the scores.
        let highest = pairs.iter().map(|pair| pair.score).fold(sink, |a, b| if b > a { b } else { a });
        let weights: Vec<R> = pairs.iter().map(|pair| (pair.score - highest).exp()).collect();
        // inf - inf is not a number; an infinite sink is simply the whole row.
        let sink_weight = if sink == R::INFINITY { R::ONE } else { (sink - highest).exp() };
        let sum = weights.iter().fold(sink_weight, |sum, &weight| sum + weight);
        Self {
            probabilities: weights.iter().map(|&weight| weight / sum).collect(),
            sink_probability: sink_weight / sum,
            logsumexp: highest + sum.ln(),
        }
    }
}
