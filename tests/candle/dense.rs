//! The formulas of the paper in candle's own tensor operations, dense and slow: what autograd makes of them is the oracle.

use candle_core::{D, Result, Tensor};
use moda_attn::problem::Basis;

/// Which entries of `ids` are `id`, as 1 and 0 in float64 with the shape of `ids`.
pub(crate) fn is(ids: &Tensor, id: i64) -> Result<Tensor> {
    ids.eq(id)?.to_dtype(candle_core::DType::F64)
}

/// One-hot modality (B, N, M); zeros for padding.
fn one_hot(ids: &Tensor, modalities: usize) -> Result<Tensor> {
    let columns = (0..modalities).map(|m| is(ids, m as i64)).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&columns, D::Minus1)
}

fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let squares = x.sqr()?.sum_keepdim(D::Minus1)?;
    let safe = squares.eq(0.0)?.where_cond(&squares.ones_like()?, &squares)?;
    x.broadcast_div(&safe.sqrt()?)
}

/// Aligned keys and bases (equations 5 and 6); `modality` and `sources` are (B, N) int64.
pub(crate) fn duplex_align(
    [key, value, keep, mix]: [&Tensor; 4],
    [modality, sources]: [&Tensor; 2],
    given: Option<&Tensor>,
    kind: Basis,
) -> Result<(Tensor, Tensor)> {
    let modalities = keep.dim(0)?;
    let unit = unit_rows(&(key + 1e-6)?)?;
    let weights = if kind == Basis::Gram { &unit } else { value };
    let mask = |ids: &Tensor, m: usize| is(ids, m as i64)?.unsqueeze(1)?.unsqueeze(3);
    let bases = (0..modalities).map(|m| unit.broadcast_mul(&mask(sources, m)?)?.t()?.contiguous()?.matmul(weights));
    let basis = match given {
        Some(basis) => basis.clone(),
        None => Tensor::stack(&bases.collect::<Result<Vec<_>>>()?, 2)?,
    };
    let normed = unit_rows(&basis)?;
    let mut aligned = key.broadcast_mul(&is(modality, -1)?.unsqueeze(1)?.unsqueeze(3)?)?;
    for a in 0..modalities {
        let mut others = normed.get_on_dim(2, a)?.zeros_like()?;
        for m in (0..modalities).filter(|&m| m != a) {
            others = (others + normed.get_on_dim(2, m)?)?;
        }
        let mapped = unit.matmul(&others.broadcast_matmul(&mix.get(a)?)?)?;
        let fused = (key.broadcast_matmul(&keep.get(a)?)? + mapped)?;
        aligned = (aligned + fused.broadcast_mul(&mask(modality, a)?)?)?;
    }
    Ok((aligned, basis))
}

/// Everything that attention is given, in float64; sink (B, Hq, Nq, parts).
pub(crate) struct Attention<'a> {
    pub(crate) query: &'a Tensor,
    pub(crate) key: &'a Tensor,
    pub(crate) value: &'a Tensor,
    pub(crate) modality: &'a Tensor,
    pub(crate) query_modality: &'a Tensor,
    pub(crate) sink: Option<&'a Tensor>,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) causal: bool,
    pub(crate) split: bool,
}

/// Output and mass (equations 7 to 10).
pub(crate) fn modular_attention(a: &Attention<'_>) -> Result<(Tensor, Tensor)> {
    let (b, hq, nq, d) = a.query.dims4()?;
    let (_, hkv, nk, _) = a.key.dims4()?;
    let group = hq / hkv;
    let repeat = |x: &Tensor| {
        x.reshape((b, hkv, 1, nk, d))?.broadcast_as((b, hkv, group, nk, d))?.contiguous()?.reshape((b, hq, nk, d))
    };
    let (key, value) = (repeat(a.key)?, repeat(a.value)?);
    let mut scores = (a.query.matmul(&key.t()?)? * (d as f64).powf(-0.5))?;
    if let Some(bias) = a.bias {
        let m = bias.dim(2)?;
        let (rows, columns) = (one_hot(a.query_modality, m)?.unsqueeze(1)?, one_hot(a.modality, m)?.unsqueeze(1)?);
        scores = (scores + rows.broadcast_matmul(bias)?.broadcast_matmul(&columns.t()?.contiguous()?)?)?;
    }
    let (columns, rows) = (a.modality.unsqueeze(1)?, a.query_modality.unsqueeze(2)?);
    let real = (1.0 - is(&columns, -1)?)?.broadcast_mul(&(1.0 - is(&rows, -1)?)?)?;
    let own = columns.broadcast_eq(&rows)?.to_dtype(candle_core::DType::F64)?;
    let causal: Vec<f64> =
        (0..nq * nk).map(|at| f64::from(!a.causal || (at % nk + nq) as i64 <= (at / nk + nk) as i64)).collect();
    let visible = real.broadcast_mul(&Tensor::from_vec(causal, (1, nq, nk), a.query.device())?)?;
    let part = |which: &Tensor, index: usize| softmax(&scores, which, (a.sink, index), &value);
    let (cross, own) = ((&visible * (1.0 - &own)?)?, (&visible * &own)?);
    let (out, weights, pseudo) = if a.split {
        let ((first, p, z), (second, r, y)) = (part(&own, 0)?, part(&cross, 1)?);
        ((first + second)?, (p + r)?, (z + y)?)
    } else {
        part(&visible, 0)?
    };
    let mass = |keys: &Tensor| weights.broadcast_mul(&keys.unsqueeze(1)?)?.sum_keepdim(D::Minus1);
    Ok((out, Tensor::cat(&[mass(&own)?, mass(&cross)?, pseudo], D::Minus1)?))
}

/// One softmax over the keys of `visible` (B, Nq, Nk) and the sink: output, weights and the pseudo-scores' weight.
fn softmax(
    scores: &Tensor,
    visible: &Tensor,
    (sink, index): (Option<&Tensor>, usize),
    value: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let visible = visible.unsqueeze(1)?.broadcast_as(scores.shape())?;
    // Scores of the tests are small, so that no maximum needs to be taken out.
    let weights = (scores.exp()? * &visible)?;
    let mut total = weights.sum_keepdim(D::Minus1)?;
    let seen = total.ne(0.0)?.to_dtype(candle_core::DType::F64)?;
    let mut pseudo = total.zeros_like()?;
    if let Some(sink) = sink {
        pseudo = sink.narrow(D::Minus1, index, 1)?.exp()?;
        total = (total + &pseudo)?;
    }
    let safe = total.eq(0.0)?.where_cond(&total.ones_like()?, &total)?;
    let weights = weights.broadcast_div(&safe)?;
    Ok((weights.matmul(value)?, weights, (pseudo.div(&safe)? * seen)?))
}

/// log Z (B, Hq, Nq) as the sum it is defined by (equation 10).
pub(crate) fn pseudo_sink(
    position: &[i64],
    query_modality: &Tensor,
    span: i64,
    [decay, base]: [&Tensor; 2],
) -> Result<Tensor> {
    let (m, heads) = decay.dims2()?;
    let (b, nq) = query_modality.dims2()?;
    let hot = one_hot(query_modality, m)?.reshape((b * nq, m))?;
    let pick = |table: &Tensor| hot.matmul(table)?.reshape((b, nq, heads))?.transpose(1, 2);
    let (decay, base) = (pick(decay)?, pick(base)?);
    let steps = Tensor::arange(0, span, decay.device())?.to_dtype(candle_core::DType::F64)?;
    let terms = decay.unsqueeze(3)?.broadcast_mul(&steps.neg()?)?.exp()?;
    let inside: Vec<f64> =
        position.iter().flat_map(|&p| (0..span).map(move |t| f64::from(t < (span - 1 - p).max(0)))).collect();
    let inside = Tensor::from_vec(inside, (b, 1, nq, span as usize), decay.device())?;
    base + terms.broadcast_mul(&inside)?.sum(D::Minus1)?.log()?
}
