//! MODA attention as a candle module, with projections.

use super::align::{Alignment, duplex_align};
use super::attend::{Attention, modular_attention, modular_attention_with_mass};
use super::sink::pseudo_sink;
use super::storage::table_dtype;
use crate::ids::{Ids, PADDING};
use crate::problem::{Basis, Combine};
use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{Init, Linear, Module, VarBuilder, VarMap, linear_no_bias};

/// What a [`ModaAttention`] computes: the paper's method, every key aligned by a free fuser ("concat").
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModaConfig {
    /// E, size of the hidden states.
    pub embed_dim: usize,
    /// Hq.
    pub num_heads: usize,
    /// Hkv, a divisor of Hq. Default: Hq.
    pub num_kv_heads: usize,
    /// D. Default: E / Hq.
    pub head_dim: usize,
    /// M; 0 is text, 1 vision. Default: 2.
    pub num_modalities: usize,
    /// What the basis of a modality is. Default: covariance.
    pub kind: Basis,
    /// One softmax (the default) or one each over self and cross keys.
    pub combine: Combine,
    /// Positions that the pseudo-scores fill up to, a constant of the model; None: no pseudo-scores. Default: 4096.
    pub span: Option<usize>,
    /// Level at which the pseudo-scores start. Default: -4.
    pub base: f64,
    /// A learned bias between modalities from the likeness of their bases (paper, section 3.3). Default: true.
    pub location_prior: bool,
    /// Base of the rotary embedding. Default: none.
    pub rope_theta: Option<f64>,
}

impl ModaConfig {
    /// The default for a size of hidden states and a number of heads.
    pub fn new(embed_dim: usize, num_heads: usize) -> Self {
        Self {
            embed_dim,
            num_heads,
            num_kv_heads: num_heads,
            head_dim: embed_dim.checked_div(num_heads).unwrap_or(0),
            num_modalities: 2,
            kind: Basis::Covariance,
            combine: Combine::Joint,
            span: Some(4096),
            base: -4.0,
            location_prior: true,
            rope_theta: None,
        }
    }

    /// Starting values of MODA's own parameters: every key stays as it is, decay at the ALiBi slopes, no prior.
    fn start(&self, dtype: DType, device: &Device) -> Result<Vec<(&'static str, Tensor)>> {
        let (sets, m, heads, d) = (self.combine.parts(), self.num_modalities, self.num_heads, self.head_dim);
        let eye = Tensor::eye(d, dtype, device)?;
        let mut values = vec![
            ("moda.aligner.fuser.keep", Tensor::stack(&vec![eye; m], 0)?),
            ("moda.aligner.fuser.mix", Tensor::zeros((m, d, d), dtype, device)?),
        ];
        if self.span.is_some() {
            let slopes: Vec<f64> = (1..=heads).map(|h| (-8.0 * h as f64 / heads as f64).exp2()).collect();
            let slopes = Tensor::from_vec(slopes, heads, device)?.to_dtype(dtype)?;
            let base = Tensor::full(self.base, (sets, m, heads), device)?.to_dtype(dtype)?;
            values.push(("moda.mask.base", base));
            values.push(("moda.mask.decay", slopes.broadcast_as((sets, m, heads))?.contiguous()?));
        }
        if self.location_prior {
            values.push(("moda.prior.strength", Tensor::zeros(heads, dtype, device)?));
        }
        Ok(values)
    }
}

/// Causal multi-head attention with duplex alignment and modular masking. The names of its parameters are those of the
/// Python module of the same name, so weights go from one to the other.
#[derive(Debug, Clone)]
pub struct ModaAttention {
    config: ModaConfig,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    keep: Tensor,
    mix: Tensor,
    /// Decay and base (sets, M, Hq) of the pseudo-scores.
    mask: Option<[Tensor; 2]>,
    strength: Option<Tensor>,
}

/// Aligned keys and values of the tokens so far, grown by every call that is given it; the bases stay those of the first.
#[derive(Debug, Clone, Default)]
pub struct ModaCache {
    tokens: Option<(Tensor, Tensor, Ids)>,
    basis: Option<Tensor>,
}

impl ModaAttention {
    /// The module with the weights of `vb`.
    #[allow(clippy::needless_pass_by_value, reason = "as every candle module takes it")]
    pub fn new(config: ModaConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let ModaConfig { embed_dim, num_heads, num_kv_heads, head_dim, num_modalities, .. } = config;
        if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) || head_dim * embed_dim * num_modalities == 0 {
            candle_core::bail!("{config:?}; wanted positive sizes and num_heads a multiple of num_kv_heads");
        }
        if config.rope_theta.is_some() && head_dim % 2 == 1 {
            candle_core::bail!("head_dim {head_dim}; a rotary embedding wants an even one");
        }
        let square = (num_modalities, head_dim, head_dim);
        let table = (config.combine.parts(), num_modalities, num_heads);
        let [fuser, mask] = [vb.pp("moda.aligner.fuser"), vb.pp("moda.mask")];
        let read = |name| mask.get_with_hints(table, name, Init::Const(0.0));
        let strength = || vb.pp("moda.prior").get_with_hints(num_heads, "strength", Init::Const(0.0));
        Ok(Self {
            query: linear_no_bias(embed_dim, num_heads * head_dim, vb.pp("q_proj"))?,
            key: linear_no_bias(embed_dim, num_kv_heads * head_dim, vb.pp("k_proj"))?,
            value: linear_no_bias(embed_dim, num_kv_heads * head_dim, vb.pp("v_proj"))?,
            out: linear_no_bias(num_heads * head_dim, embed_dim, vb.pp("o_proj"))?,
            keep: fuser.get(square, "keep")?,
            mix: fuser.get(square, "mix")?,
            mask: config.span.map(|_| Ok::<_, candle_core::Error>([read("decay")?, read("base")?])).transpose()?,
            strength: config.location_prior.then(strength).transpose()?,
            config,
        })
    }

    /// A module to be trained: MODA's parameters enter `variables` under `prefix` with their starting values, the
    /// projections with candle's.
    pub fn fresh(
        config: ModaConfig,
        variables: &VarMap,
        prefix: &str,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let mut known = variables.data().lock().expect("nobody panics while holding the variables");
        for (name, value) in config.start(dtype, device)? {
            known.insert(format!("{prefix}.{name}"), Var::from_tensor(&value)?);
        }
        drop(known);
        Self::new(config, VarBuilder::from_varmap(variables, dtype, device).pp(prefix))
    }

    /// Attention over hidden states (B, N, E), with a cache after all tokens before.
    ///
    /// `modality` is that of these N tokens; `sources` the same with -1 for tokens that may feed no basis (an answer in
    /// training), None where all may. `sources` is read at the first call with a cache only.
    pub fn forward(
        &self,
        hidden: &Tensor,
        modality: &Ids,
        sources: Option<&Ids>,
        cache: Option<&mut ModaCache>,
    ) -> Result<Tensor> {
        Ok(self.run(hidden, (modality, sources), cache, false)?.0)
    }

    /// The same, and the attention mass (B, Hq, N, 3) on self keys, on cross keys and on the pseudo-scores.
    pub fn forward_with_mass(
        &self,
        hidden: &Tensor,
        modality: &Ids,
        sources: Option<&Ids>,
        cache: Option<&mut ModaCache>,
    ) -> Result<(Tensor, Tensor)> {
        let (out, mass) = self.run(hidden, (modality, sources), cache, true)?;
        Ok((out, mass.expect("mass was asked for")))
    }

    fn run(
        &self,
        hidden: &Tensor,
        (modality, sources): (&Ids, Option<&Ids>),
        cache: Option<&mut ModaCache>,
        wants_mass: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (b, n, _) = hidden.dims3()?;
        if modality.shape() != [b, n] {
            candle_core::bail!("modality has shape {:?}; wanted (B, N) = ({b}, {n})", modality.shape());
        }
        let heads = |x: Tensor| x.reshape((b, n, (), self.config.head_dim))?.transpose(1, 2);
        let mut query = heads(self.query.forward(hidden)?)?;
        let mut key = heads(self.key.forward(hidden)?)?;
        let mut value = heads(self.value.forward(hidden)?)?;
        let mut none = ModaCache::default();
        let cache = cache.unwrap_or(&mut none);
        let all = match &cache.tokens {
            Some((.., earlier)) => joined(earlier, modality),
            None => modality.clone(),
        };
        let positions = last_positions(&all, n);
        if let Some(theta) = self.config.rope_theta {
            let angles = angles(&positions, (b, n, self.config.head_dim), theta, hidden.device())?;
            query = rotate(&query, &angles)?;
            key = rotate(&key, &angles)?;
        }
        let options =
            Alignment { sources, basis: cache.basis.as_ref(), kind: self.config.kind, ..Alignment::new(modality) };
        let (aligned, basis) = duplex_align(&key, &value, &self.keep, &self.mix, &options)?;
        key = aligned;
        if let Some((keys, values, _)) = &cache.tokens {
            key = Tensor::cat(&[keys, &key], 2)?;
            value = Tensor::cat(&[values, &value], 2)?;
        }
        let sink = self.sink(&positions, modality, query.dtype())?;
        let bias = self.bias(&basis)?;
        let options = Attention {
            query_modality: Some(modality),
            sink: sink.as_ref(),
            bias: bias.as_ref(),
            combine: self.config.combine,
            ..Attention::new(&all)
        };
        let (out, mass) = if wants_mass {
            let (out, mass) = modular_attention_with_mass(&query, &key, &value, &options)?;
            (out, Some(mass))
        } else {
            (modular_attention(&query, &key, &value, &options)?, None)
        };
        *cache = ModaCache { tokens: Some((key, value, all)), basis: Some(basis) };
        Ok((self.out.forward(&out.transpose(1, 2)?.reshape((b, n, ()))?)?, mass))
    }

    fn sink(&self, positions: &[i64], modality: &Ids, dtype: DType) -> Result<Option<Tensor>> {
        let (Some([decay, base]), Some(span)) = (&self.mask, self.config.span) else { return Ok(None) };
        let sets = (0..self.config.combine.parts()).map(|set| {
            // The magnitude: below zero the pseudo-scores would grow over the span and take all mass for good.
            let decay = decay.get(set)?.to_dtype(table_dtype(dtype))?.abs()?;
            let base = base.get(set)?.to_dtype(table_dtype(dtype))?;
            pseudo_sink(positions, modality, span as i64, &decay, &base)
        });
        let sets = sets.collect::<Result<Vec<_>>>()?;
        if let [only] = &sets[..] { Ok(Some(only.clone())) } else { Tensor::stack(&sets, D::Minus1).map(Some) }
    }

    /// The location prior: strength times `<||G^m||, ||G^m'||> / D` between different modalities, (B, Hq, M, M).
    fn bias(&self, basis: &Tensor) -> Result<Option<Tensor>> {
        let Some(strength) = &self.strength else { return Ok(None) };
        let (b, h, m, d, _) = basis.dims5()?;
        let group = self.config.num_heads / h;
        let squares = basis.sqr()?.sum_keepdim(D::Minus1)?;
        let safe = squares.eq(0.0)?.where_cond(&squares.ones_like()?, &squares)?;
        let normed = basis.broadcast_div(&safe.sqrt()?)?.reshape((b * h, m, d * d))?;
        let others =
            (Tensor::ones((m, m), basis.dtype(), basis.device())? - Tensor::eye(m, basis.dtype(), basis.device())?)?;
        let likeness = normed.matmul(&normed.transpose(1, 2)?)?.broadcast_mul(&(others / d as f64)?)?;
        let likeness = likeness.reshape((b, h, 1, m, m))?.broadcast_as((b, h, group, m, m))?;
        let strength = strength.to_dtype(basis.dtype())?.reshape((1, h, group, 1, 1))?;
        likeness.broadcast_mul(&strength)?.reshape((b, h * group, m, m)).map(Some)
    }
}

/// The ids of more tokens behind the ids so far.
fn joined(before: &Ids, new: &Ids) -> Ids {
    let [b, n] = new.shape();
    let flat: Vec<i32> = (0..b).flat_map(|row| [before.row(row), new.row(row)].concat()).collect();
    Ids::new(&flat, [b, before.shape()[1] + n]).expect("both were ids")
}

/// 0-based positions of the last `count` tokens among the real tokens of their row; 0 for padding in front.
fn last_positions(ids: &Ids, count: usize) -> Vec<i64> {
    let [b, n] = ids.shape();
    let row = |b: usize| {
        let mut real = 0;
        let positions = ids.row(b).iter().map(move |&id| {
            real += i64::from(id != PADDING);
            (real - 1).max(0)
        });
        positions.skip(n - count)
    };
    (0..b).flat_map(row).collect()
}

/// Cosines and sines (B, 1, N, D) of the rotary embedding, in the half-split layout of Llama.
fn angles(positions: &[i64], (b, n, d): (usize, usize, usize), theta: f64, device: &Device) -> Result<[Tensor; 2]> {
    let rate = |i: usize| theta.powf(-((2 * (i % (d / 2))) as f64) / d as f64);
    let angle = positions.iter().flat_map(|&p| (0..d).map(move |i| p as f64 * rate(i)));
    let angle = Tensor::from_vec(angle.collect::<Vec<_>>(), (b, 1, n, d), device)?;
    Ok([angle.cos()?, angle.sin()?])
}

fn rotate(x: &Tensor, [cos, sin]: &[Tensor; 2]) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let [first, second] = [x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?];
    let turned = Tensor::cat(&[second.neg()?, first], D::Minus1)?;
    let part = |x: &Tensor, by: &Tensor| x.broadcast_mul(&by.to_dtype(x.dtype())?);
    part(x, cos)? + part(&turned, sin)?
}
