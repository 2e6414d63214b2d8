//! Duplex attention alignment (paper, equations 5 and 6): `k'_j = k_j keep_a + k^_j (T^a mix_a)`.

use super::linear::{
    Matrix, add_matrix, add_outer, add_scaled, block, head, matrix, normalised, normalised_backward, product,
    product_transposed, row_times, row_times_transposed, write_matrix, write_row, zeros,
};
use crate::dtype::{Element, Real};
use crate::problem::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, Basis};
use crate::view::View;

/// Aligned keys k' (B, H, N, D) and the bases G (B, H, M, D, D).
///
/// A padding key passes through unchanged and feeds no basis. A key with k + eps = 0 has no direction: its unit key is
/// zero, as a zero row of G stays zero in the row norm.
pub fn forward<T: Element>(problem: &AlignProblem<'_, T>, outputs: &mut AlignOutputs<'_, T>) {
    let [batch, heads, tokens, _] = problem.key.shape();
    let keep = matrices(&problem.keep);
    let mix = matrices(&problem.mix);
    for b in 0..batch {
        for h in 0..heads {
            let keys = Keys::read(problem, b, h);
            let basis = match problem.basis {
                Some(_) => given_basis(problem, b, h),
                None => computed_basis(problem, b, &keys),
            };
            let mapping = Mapping::new(&basis, &mix);
            for j in 0..tokens {
                let mut aligned = keys.raw[j].clone();
                if let Ok(a) = usize::try_from(problem.modality.row(b)[j]) {
                    aligned = row_times(&keys.raw[j], &keep[a]);
                    add_scaled(&mut aligned, T::Acc::ONE, &row_times(&keys.unit[j], &mapping.fused[a]));
                }
                write_row(block(&mut outputs.aligned, [b, h, j]), &aligned);
            }
            if let (None, Some(target)) = (problem.basis, &mut outputs.basis) {
                for (m, basis) in basis.iter().enumerate() {
                    write_matrix(block(target, [b, h, m]), basis);
                }
            }
        }
    }
}

/// Gradients of [`forward`] for key, value, keep, mix and a given basis, exact through fusion, row norm, basis and unit
/// keys.
///
/// `problem.basis` is G as forward used it; `upstream.computed` tells whether it came from the keys.
pub fn backward<T: Element>(
    problem: &AlignProblem<'_, T>,
    upstream: &AlignUpstream<'_, T>,
    gradients: &mut AlignGradients<'_, T>,
) {
    let [batch, heads, tokens, dim] = problem.key.shape();
    let modalities = problem.modalities();
    let keep = matrices(&problem.keep);
    let mix = matrices(&problem.mix);
    let mut d_keep = vec![zeros(dim, dim); modalities];
    let mut d_mix = vec![zeros(dim, dim); modalities];
    for b in 0..batch {
        for h in 0..heads {
            let keys = Keys::read(problem, b, h);
            let mapping = Mapping::new(&given_basis(problem, b, h), &mix);
            let d_aligned = head(&upstream.aligned, b, h);
            let mut d_key = d_aligned.clone(); // what a padding key, passed through, keeps
            let mut d_value = zeros(tokens, dim);
            let mut d_unit = zeros(tokens, dim);
            let mut d_fused = vec![zeros(dim, dim); modalities];

            // k' = k keep + k^ F with F = T mix
            for j in 0..tokens {
                if let Ok(a) = usize::try_from(problem.modality.row(b)[j]) {
                    d_key[j] = row_times_transposed(&d_aligned[j], &keep[a]);
                    d_unit[j] = row_times_transposed(&d_aligned[j], &mapping.fused[a]);
                    add_outer(&mut d_keep[a], &keys.raw[j], &d_aligned[j]);
                    add_outer(&mut d_fused[a], &keys.unit[j], &d_aligned[j]);
                }
            }

            let mut d_basis = mapping.backward(&mix, &d_fused, &mut d_mix);
            if let Some(d_returned) = upstream.basis {
                for (m, d_basis) in d_basis.iter_mut().enumerate() {
                    add_matrix(d_basis, &matrix(dim, dim, |r, c| d_returned.get([b, h, m, r, c])));
                }
            }

            if upstream.computed {
                // G = sum of k^^T w
                for j in 0..tokens {
                    if let Ok(m) = usize::try_from(problem.sources.row(b)[j]) {
                        let d_weight = row_times(&keys.unit[j], &d_basis[m]);
                        let through_basis = row_times_transposed(keys.weight(problem.kind, j), &d_basis[m]);
                        add_scaled(&mut d_unit[j], T::Acc::ONE, &through_basis);
                        match problem.kind {
                            Basis::Gram => add_scaled(&mut d_unit[j], T::Acc::ONE, &d_weight),
                            Basis::Covariance => d_value[j] = d_weight,
                        }
                    }
                }
            }
            if let Some(target) = gradients.basis.as_mut() {
                for (m, d_basis) in d_basis.iter().enumerate() {
                    write_matrix(block(target, [b, h, m]), d_basis);
                }
            }

            for j in 0..tokens {
                if problem.modality.row(b)[j] >= 0 {
                    let through_unit = normalised_backward(&keys.unit[j], keys.norm[j], &d_unit[j]);
                    add_scaled(&mut d_key[j], T::Acc::ONE, &through_unit);
                }
            }
            write_matrix(block(&mut gradients.key, [b, h]), &d_key);
            write_matrix(block(&mut gradients.value, [b, h]), &d_value);
        }
    }
    for a in 0..modalities {
        write_matrix(block(&mut gradients.keep, [a]), &d_keep[a]);
        write_matrix(block(&mut gradients.mix, [a]), &d_mix[a]);
    }
}

/// Keys and values of one batch row and head, N x D.
struct Keys<R> {
    /// k
    raw: Matrix<R>,
    /// k^ = (k + eps) / ‖k + eps‖
    unit: Matrix<R>,
    /// ‖k + eps‖
    norm: Vec<R>,
    /// v
    value: Matrix<R>,
}

impl<R: Real> Keys<R> {
    fn read<T: Element<Acc = R>>(problem: &AlignProblem<'_, T>, b: usize, h: usize) -> Self {
        let raw = head(&problem.key, b, h);
        let shifted = raw.iter().map(|k| k.iter().map(|&k| k + problem.eps).collect::<Vec<_>>());
        let (unit, norm) = shifted.map(|k| normalised(&k)).unzip();
        Self { raw, unit, norm, value: head(&problem.value, b, h) }
    }

    /// `w_j`, what unit key j is paired with in the basis.
    fn weight(&self, kind: Basis, j: usize) -> &[R] {
        match kind {
            Basis::Gram => &self.unit[j],
            Basis::Covariance => &self.value[j],
        }
    }
}

/// What a head's bases do to its unit keys.
struct Mapping<R> {
    /// ‖G^m‖, rows of length 1 or 0.
    normed: Vec<Matrix<R>>,
    /// Lengths of the rows of G^m.
    norms: Vec<Vec<R>>,
    /// `T^a = Σ ‖G^m‖` over m ≠ a.
    others: Vec<Matrix<R>>,
    /// `F^a = T^a mix_a`.
    fused: Vec<Matrix<R>>,
}

impl<R: Real> Mapping<R> {
    fn new(basis: &[Matrix<R>], mix: &[Matrix<R>]) -> Self {
        let (normed, norms): (Vec<Matrix<R>>, Vec<Vec<R>>) =
            basis.iter().map(|g| g.iter().map(|row| normalised(row)).unzip()).unzip();
        let others = sums_of_others(&normed);
        let fused = others.iter().zip(mix).map(|(t, mix)| product(t, mix)).collect();
        Self { normed, norms, others, fused }
    }

    /// Gradient of every G^m from that of every F^a; adds this head's part to that of mix.
    fn backward(&self, mix: &[Matrix<R>], d_fused: &[Matrix<R>], d_mix: &mut [Matrix<R>]) -> Vec<Matrix<R>> {
        for ((d_mix, others), d_fused) in d_mix.iter_mut().zip(&self.others).zip(d_fused) {
            for (t, d_f) in others.iter().zip(d_fused) {
                add_outer(d_mix, t, d_f); // T^T dF, row by row of T
            }
        }
        let d_others: Vec<_> = d_fused.iter().zip(mix).map(|(d_f, mix)| product_transposed(d_f, mix)).collect();
        // ‖G^m‖ is in the T of every other modality, so its gradient is the same sum over the others.
        let d_normed = sums_of_others(&d_others);
        let d_basis = |m: usize| {
            let rows = self.normed[m].iter().zip(&self.norms[m]).zip(&d_normed[m]);
            rows.map(|((unit, &norm), d_unit)| normalised_backward(unit, norm, d_unit)).collect()
        };
        (0..d_normed.len()).map(d_basis).collect()
    }
}

/// For every modality the sum of the other ones' matrices.
fn sums_of_others<R: Real>(matrices: &[Matrix<R>]) -> Vec<Matrix<R>> {
    let sum_without = |a: usize| {
        let mut sum = zeros(matrices[a].len(), matrices[a].len());
        for (m, matrix) in matrices.iter().enumerate() {
            if m != a {
                add_matrix(&mut sum, matrix);
            }
        }
        sum
    };
    (0..matrices.len()).map(sum_without).collect()
}

/// `G^m = Σ k^_jᵀ w_j` over the context tokens j of modality m.
fn computed_basis<T: Element>(problem: &AlignProblem<'_, T>, b: usize, keys: &Keys<T::Acc>) -> Vec<Matrix<T::Acc>> {
    let [_, _, tokens, dim] = problem.key.shape();
    let mut basis = vec![zeros(dim, dim); problem.modalities()];
    for j in 0..tokens {
        if let Ok(m) = usize::try_from(problem.sources.row(b)[j]) {
            add_outer(&mut basis[m], &keys.unit[j], keys.weight(problem.kind, j));
        }
    }
    basis
}

fn given_basis<T: Element>(problem: &AlignProblem<'_, T>, b: usize, h: usize) -> Vec<Matrix<T::Acc>> {
    let basis = problem.basis.expect("backward needs G as forward used it");
    let [_, _, modalities, dim, _] = basis.shape();
    (0..modalities).map(|m| matrix(dim, dim, |r, c| basis.get([b, h, m, r, c]))).collect()
}

/// keep or mix (M, D, D), one matrix a modality.
fn matrices<R: Real>(tensor: &View<'_, R, 3>) -> Vec<Matrix<R>> {
    let [modalities, dim, _] = tensor.shape();
    (0..modalities).map(|m| matrix(dim, dim, |r, c| tensor.get([m, r, c]))).collect()
}
