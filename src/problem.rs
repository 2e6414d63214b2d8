//! A problem is the whole input of one operator, validated once and trusted from then on by every kernel.

use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::Ids;
use crate::range::KeyRanges;
pub use crate::shapes::check_modalities;
use crate::shapes::{AlignShapes, AttendShapes, SinkShapes, check_eps, check_scale, option};
use crate::view::{View, ViewMut};
use std::ops::Range;

/// What the weights of a modality's basis are: `G = sum of k^ᵀ w` over its context tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// w = k^, the unit key itself (paper, equation 5).
    Gram,
    /// w = v, the value ("+CoV", the paper's best).
    Covariance,
}

impl Basis {
    /// Parses the public name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "gram" => Ok(Self::Gram),
            "covariance" => Ok(Self::Covariance),
            _ => Err(option("kind", format!("{name:?}"), r#""gram" or "covariance""#)),
        }
    }
}

/// How self and cross keys share the softmax.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combine {
    /// One softmax over the row (paper, equation 9).
    Joint,
    /// Two softmaxes, self and cross, each with its own sink; their outputs add (paper, equations 7 and 8).
    Split,
}

impl Combine {
    /// Parses the public name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "joint" => Ok(Self::Joint),
            "split" => Ok(Self::Split),
            _ => Err(option("combine", format!("{name:?}"), r#""joint" or "split""#)),
        }
    }

    /// Number of softmaxes a row has.
    pub const fn parts(self) -> usize {
        match self {
            Self::Joint => 1,
            Self::Split => 2,
        }
    }
}

/// A product of sizes, as large as a number can say.
fn product<const N: usize>(sizes: [usize; N]) -> usize {
    sizes.into_iter().fold(1, usize::saturating_mul)
}

/// Every id has its row in tables of M modalities.
fn known(argument: &'static str, ids: &Ids, modalities: usize) -> Result<()> {
    match ids.span() {
        span if span <= modalities => Ok(()),
        span => Err(option(argument, format!("ids up to {}", span - 1), &format!("ids below M = {modalities}"))),
    }
}

/// Duplex alignment of one batch of keys.
///
/// B batch, H key/value heads, N tokens, D head dim, M modalities. `T` is what the tensors store; parameters and basis
/// are in the type the arithmetic runs in.
#[derive(Debug, Clone, Copy)]
pub struct AlignProblem<'a, T: Element> {
    /// k (B, H, N, D), after rotary embedding.
    pub key: View<'a, T, 4>,
    /// v (B, H, N, D).
    pub value: View<'a, T, 4>,
    /// Modality of every token (B, N).
    pub modality: &'a Ids,
    /// The same with padding outside the context: what feeds the bases.
    pub sources: &'a Ids,
    /// keep (M, D, D).
    pub keep: View<'a, T::Acc, 3>,
    /// mix (M, D, D).
    pub mix: View<'a, T::Acc, 3>,
    /// G (B, H, M, D, D) to use instead of computing one.
    pub basis: Option<View<'a, T::Acc, 5>>,
    /// Gram or covariance.
    pub kind: Basis,
    /// Added to every component of a key before it is normalised.
    pub eps: T::Acc,
}

impl<'a, T: Element> AlignProblem<'a, T> {
    /// Alignment with covariance bases of every real token and eps 1e-6; change the fields for anything else.
    pub fn new([key, value]: [View<'a, T, 4>; 2], modality: &'a Ids, [keep, mix]: [View<'a, T::Acc, 3>; 2]) -> Self {
        let (kind, eps) = (Basis::Covariance, T::Acc::from_f64(1e-6));
        Self { key, value, modality, sources: modality, keep, mix, basis: None, kind, eps }
    }

    /// Checks every shape against the key's and the parameters'; returns the problem itself.
    pub fn validated(self) -> Result<Self> {
        self.shapes().check()?;
        check_eps(self.eps)?;
        known("modality", self.modality, self.modalities())?;
        known("context", self.sources, self.modalities())?;
        Ok(self)
    }

    pub(crate) fn shapes(&self) -> AlignShapes {
        AlignShapes {
            key: self.key.shape(),
            value: self.value.shape(),
            modality: self.modality.shape(),
            context: self.sources.shape(),
            keep: self.keep.shape(),
            mix: self.mix.shape(),
            basis: self.basis.map(|basis| basis.shape()),
        }
    }

    /// Number of modalities M.
    pub fn modalities(&self) -> usize {
        self.keep.shape()[0]
    }

    /// About how many multiply-adds forward takes: basis, keep and map of every token, and a map for every modality.
    pub fn multiply_adds(&self) -> usize {
        let [b, h, n, d] = self.key.shape();
        product([b, h, d, d, 3 * n + self.modalities() * d])
    }
}

/// Modular masked attention of one batch.
#[derive(Debug, Clone, Copy)]
pub struct AttendProblem<'a, T: Element> {
    /// q (B, Hq, Nq, D).
    pub query: View<'a, T, 4>,
    /// k' (B, Hkv, Nk, D), aligned.
    pub key: View<'a, T, 4>,
    /// v (B, Hkv, Nk, D).
    pub value: View<'a, T, 4>,
    /// Modality of every key (B, Nk).
    pub modality: &'a Ids,
    /// Modality of every query (B, Nq).
    pub query_modality: &'a Ids,
    /// Sink logit z (B, Hq, Nq, parts); (B|1, Hq|1, Nq, parts) before validation. None: no pseudo-scores.
    pub sink: Option<View<'a, T::Acc, 4>>,
    /// Modality bias (B, Hq, M, M), [query modality, key modality]; (B|1, Hq|1, M, M) before validation.
    pub bias: Option<View<'a, T::Acc, 4>>,
    /// Key j is visible to query i only inside the range of its row, (B|1, Nq). None: no such limit.
    pub key_range: Option<&'a KeyRanges>,
    /// Key j is visible to query i only where j <= i + (Nk - Nq).
    pub causal: bool,
    /// Factor on q . k'.
    pub scale: T::Acc,
    /// One softmax or two.
    pub combine: Combine,
    /// Number of modalities M, where it is given: above every id, and the bias table's.
    pub num_modalities: Option<usize>,
}

impl<'a, T: Element> AttendProblem<'a, T> {
    /// Causal attention by one softmax with scale D^-1/2, without pseudo-scores and bias; change the fields for anything
    /// else. `query_modality` is often [`Ids::last`] of `modality`.
    pub fn new(
        query: View<'a, T, 4>,
        [key, value]: [View<'a, T, 4>; 2],
        modality: &'a Ids,
        query_modality: &'a Ids,
    ) -> Self {
        let scale = T::Acc::from_f64((query.shape()[3].max(1) as f64).sqrt().recip());
        Self {
            query,
            key,
            value,
            modality,
            query_modality,
            sink: None,
            bias: None,
            key_range: None,
            causal: true,
            scale,
            combine: Combine::Joint,
            num_modalities: None,
        }
    }

    /// Checks every shape and repeats sink and bias over batch and heads; returns the problem itself.
    pub fn validated(mut self) -> Result<Self> {
        self.shapes().check()?;
        check_scale(self.scale)?;
        let [b, hq, ..] = self.query.shape();
        let repeated = |table: View<'a, T::Acc, 4>| {
            let [_, _, rows, columns] = table.shape();
            table.broadcast([b, hq, rows, columns]).expect("a checked shape")
        };
        (self.sink, self.bias) = (self.sink.map(repeated), self.bias.map(repeated));
        known("modality", self.modality, self.modalities())?;
        known("query_modality", self.query_modality, self.modalities())?;
        Ok(self)
    }

    pub(crate) fn shapes(&self) -> AttendShapes {
        AttendShapes {
            query: self.query.shape(),
            key: self.key.shape(),
            value: self.value.shape(),
            modality: self.modality.shape(),
            query_modality: self.query_modality.shape(),
            sink: self.sink.map(|sink| sink.shape()),
            bias: self.bias.map(|bias| bias.shape()),
            key_range: self.key_range.map(KeyRanges::shape),
            combine: self.combine,
            num_modalities: self.num_modalities,
        }
    }

    /// Number of modalities M: the given one or the bias table's, else as many as the ids span.
    pub fn modalities(&self) -> usize {
        let span = || self.modality.span().max(self.query_modality.span()).max(1);
        self.num_modalities.or(self.bias.map(|bias| bias.shape()[2])).unwrap_or_else(span)
    }

    /// About how many multiply-adds forward takes: scores and weighted values.
    pub fn multiply_adds(&self) -> usize {
        let ([b, hq, nq, d], [_, _, nk, _]) = (self.query.shape(), self.key.shape());
        let seen = if self.causal && nq > 1 { nk.saturating_sub(nq / 2) } else { nk };
        product([b, hq, nq, 2 * d, seen])
    }

    /// Query heads that read one key head.
    pub fn group(&self) -> usize {
        let ([_, hq, ..], [_, hkv, ..]) = (self.query.shape(), self.key.shape());
        hq.checked_div(hkv).unwrap_or(0)
    }

    /// The keys that query i of batch row b sees, but for the padding among them: its range within the causal limit.
    pub fn visible(&self, b: usize, i: usize) -> Range<usize> {
        let (nq, nk) = (self.query.shape()[2], self.key.shape()[2]);
        let limit = if self.causal { (i + 1 + nk).saturating_sub(nq).min(nk) } else { nk };
        let Range { start, end } = self.key_range.map_or(0..nk, |ranges| ranges.get(b, i));
        if start < end.min(limit) { start..end.min(limit) } else { 0..0 }
    }
}

/// Where alignment writes.
#[derive(Debug)]
pub struct AlignOutputs<'a, T: Element> {
    /// k' (B, H, N, D).
    pub aligned: ViewMut<'a, T, 4>,
    /// G (B, H, M, D, D); not written where a basis was given.
    pub basis: Option<ViewMut<'a, T::Acc, 5>>,
}

/// What backward of alignment starts from. `basis` of the problem must be set: G as forward used it.
#[derive(Debug, Clone, Copy)]
pub struct AlignUpstream<'a, T: Element> {
    /// Gradient of k' (B, H, N, D).
    pub aligned: View<'a, T, 4>,
    /// Gradient of G itself (B, H, M, D, D), for those who use the returned basis.
    pub basis: Option<View<'a, T::Acc, 5>>,
    /// Whether forward computed G from the keys; otherwise it was given and `d_basis` is wanted.
    pub computed: bool,
}

/// Where backward of alignment writes; everything is overwritten.
#[derive(Debug)]
pub struct AlignGradients<'a, T: Element> {
    /// (B, H, N, D)
    pub key: ViewMut<'a, T, 4>,
    /// (B, H, N, D); zero where the value has no part in the basis.
    pub value: ViewMut<'a, T, 4>,
    /// (M, D, D)
    pub keep: ViewMut<'a, T::Acc, 3>,
    /// (M, D, D)
    pub mix: ViewMut<'a, T::Acc, 3>,
    /// (B, H, M, D, D), only for a given basis.
    pub basis: Option<ViewMut<'a, T::Acc, 5>>,
}

/// Where attention writes; everything is overwritten.
#[derive(Debug)]
pub struct AttendOutputs<'a, T: Element> {
    /// o (B, Hq, Nq, D).
    pub out: ViewMut<'a, T, 4>,
    /// L (B, Hq, parts, Nq): log of the row's denominator, sink included, natural. +inf for a row that sees nothing.
    /// Wanted where a backward is to follow.
    pub logsumexp: Option<ViewMut<'a, T::Acc, 4>>,
    /// `o_self` and `o_cross` (B, Hq, 2, Nq, D), wanted for "split" only: backward needs them apart.
    pub parts: Option<ViewMut<'a, T::Acc, 5>>,
    /// Attention mass, where it is wanted.
    pub mass: Option<Mass<'a, T::Acc>>,
}

/// How the attention mass of a row is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MassBy {
    /// On self keys, on cross keys, on the pseudo-scores.
    Relation,
    /// On the keys of modality 0 .. M-1, then on the pseudo-scores.
    Modality,
}

impl MassBy {
    /// Parses the operator's name for it; `None` where no mass is wanted.
    pub fn parse(name: &str) -> Result<Option<Self>> {
        match name {
            "none" => Ok(None),
            "relation" => Ok(Some(Self::Relation)),
            "modality" => Ok(Some(Self::Modality)),
            _ => Err(option("return_mass", format!("{name:?}"), r#"False, True or "modality""#)),
        }
    }

    /// Number of columns for M modalities.
    pub const fn columns(self, modalities: usize) -> usize {
        match self {
            Self::Relation => 3,
            Self::Modality => modalities + 1,
        }
    }
}

/// Where the attention mass goes.
#[derive(Debug)]
pub struct Mass<'a, R> {
    /// What the columns are.
    pub by: MassBy,
    /// (B, Hq, Nq, columns).
    pub values: ViewMut<'a, R, 4>,
}

/// What backward of attention starts from.
#[derive(Debug, Clone, Copy)]
pub struct AttendUpstream<'a, T: Element> {
    /// Gradient of o (B, Hq, Nq, D), any strides.
    pub out_gradient: View<'a, T, 4>,
    /// o as forward wrote it.
    pub out: View<'a, T, 4>,
    /// L as forward wrote it.
    pub logsumexp: View<'a, T::Acc, 4>,
    /// `o_self` and `o_cross` as forward wrote them, for "split".
    pub parts: Option<View<'a, T::Acc, 5>>,
}

/// Where backward of attention writes; everything is overwritten.
#[derive(Debug)]
pub struct AttendGradients<'a, T: Element> {
    /// (B, Hq, Nq, D)
    pub query: ViewMut<'a, T, 4>,
    /// (B, Hkv, Nk, D)
    pub key: ViewMut<'a, T, 4>,
    /// (B, Hkv, Nk, D)
    pub value: ViewMut<'a, T, 4>,
    /// (B, Hq, Nq, parts)
    pub sink: Option<ViewMut<'a, T::Acc, 4>>,
    /// (B, Hq, M, M)
    pub bias: Option<ViewMut<'a, T::Acc, 4>>,
}

/// Pseudo-scores of the modular mask: position and modality of every query row, decay and base a modality and head.
#[derive(Debug, Clone, Copy)]
pub struct SinkProblem<'a, R: Real> {
    /// 0-based position among the row's real tokens (B, Nq).
    pub position: View<'a, i64, 2>,
    /// Modality of every query (B, Nq).
    pub query_modality: &'a Ids,
    /// The "fixed n" of the paper: the model's context window.
    pub span: i64,
    /// Decay (M, Hq).
    pub decay: View<'a, R, 2>,
    /// Base (M, Hq).
    pub base: View<'a, R, 2>,
}

impl<R: Real> SinkProblem<'_, R> {
    /// Checks every shape; returns the problem itself.
    pub fn validated(self) -> Result<Self> {
        self.shapes().check(self.span)?;
        known("query_modality", self.query_modality, self.decay.shape()[0])?;
        Ok(self)
    }

    pub(crate) fn shapes(&self) -> SinkShapes {
        SinkShapes {
            position: self.position.shape(),
            query_modality: self.query_modality.shape(),
            decay: self.decay.shape(),
            base: self.base.shape(),
        }
    }

    /// The shape (B, Hq, Nq) of the sink.
    pub fn shape(&self) -> [usize; 3] {
        self.shapes().sink()
    }
}
