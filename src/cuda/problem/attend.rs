//! Modular attention on a device.

use super::{MAX_MODALITIES, Target, arithmetic};
use crate::cuda::tensor::DeviceTensor;
use crate::cuda::valid::{self, Given};
use crate::error::Result;
use crate::problem::{Combine, MassBy};
use crate::shapes::{AttendShapes, check_scale};

/// Modular masked attention.
#[derive(Debug, Clone, Copy)]
pub struct AttendProblem {
    /// The device.
    pub target: Target,
    /// Device address of the [`IdsRecord`](super::IdsRecord).
    pub record: u64,
    /// q (B, Hq, Nq, D): bfloat16, float16, float32 or float64; rows contiguous, 16-byte aligned.
    pub query: DeviceTensor<4>,
    /// k' (B, Hkv, Nk, D), of the query's dtype, rows as its.
    pub key: DeviceTensor<4>,
    /// v (B, Hkv, Nk, D), of the query's dtype, rows as its.
    pub value: DeviceTensor<4>,
    /// Modality of every key (B, Nk), any integer dtype and strides.
    pub modality: DeviceTensor<2>,
    /// Modality of every query (B, Nq), any integer dtype and strides; where none was given the last entries of `modality`.
    pub query_modality: DeviceTensor<2>,
    /// Sink logit z (B, Hq, Nq, parts), any strides, [`arithmetic`] dtype; batch and heads may be 1 before validation.
    pub sink: Option<DeviceTensor<4>>,
    /// Modality bias (B, Hq, M, M), any strides, [`arithmetic`] dtype; batch and heads may be 1 before validation.
    pub bias: Option<DeviceTensor<4>>,
    /// First visible key and one past the last (B, Nq, 2), any integer dtype and strides, not clamped; batch may be 1
    /// before validation.
    pub key_range: Option<DeviceTensor<3>>,
    /// Key j is visible to query i only where j <= i + (Nk - Nq).
    pub causal: bool,
    /// Factor on q . k'.
    pub scale: f64,
    /// One softmax or two.
    pub combine: Combine,
    /// Number of modalities M, where it is given.
    pub num_modalities: Option<usize>,
}

impl AttendProblem {
    /// Checks dtypes, shapes and rows, and repeats sink, bias and ranges over batch and heads; returns the problem itself.
    pub fn validated(mut self) -> Result<Self> {
        let [b, hq, nq, _] = self.query.shape;
        let dtype = valid::float("query", &self.query)?;
        valid::dtype("key", &self.key, dtype)?;
        valid::dtype("value", &self.value, dtype)?;
        valid::integer("modality", &self.modality)?;
        valid::integer("query_modality", &self.query_modality)?;
        self.sink.given("sink", |name, sink| valid::dtype(name, sink, arithmetic(dtype)))?;
        self.bias.given("modality_bias", |name, bias| valid::dtype(name, bias, arithmetic(dtype)))?;
        self.key_range.given("key_range", valid::integer)?;
        self.shapes().check()?;
        check_scale(self.scale)?;
        valid::modalities("num_modalities", self.num_modalities.or(self.bias.map(|bias| bias.shape[2])))?;
        for (name, tensor) in [("query", &self.query), ("key", &self.key), ("value", &self.value)] {
            valid::rows(name, tensor)?;
        }
        let repeated = |table: DeviceTensor<4>| table.broadcast([b, hq, table.shape[2], table.shape[3]]);
        (self.sink, self.bias) = (self.sink.and_then(repeated), self.bias.and_then(repeated));
        self.key_range = self.key_range.and_then(|range| range.broadcast([b, nq, 2]));
        Ok(self)
    }

    fn shapes(&self) -> AttendShapes {
        AttendShapes {
            query: self.query.shape,
            key: self.key.shape,
            value: self.value.shape,
            modality: self.modality.shape,
            query_modality: self.query_modality.shape,
            sink: self.sink.map(|sink| sink.shape),
            bias: self.bias.map(|bias| bias.shape),
            key_range: self.key_range.map(|DeviceTensor { shape: [rows, queries, _], .. }| [rows, queries]),
            combine: self.combine,
            num_modalities: self.num_modalities,
        }
    }

    /// Checks where forward writes: shapes, dtypes, contiguous.
    pub fn check_outputs(&self, outputs: &AttendOutputs) -> Result<()> {
        let AttendOutputs { out, logsumexp, parts, mass } = outputs;
        let shape_of_mass = mass.map(|(by, mass)| (by, mass.shape));
        let shape_of_parts = parts.map(|parts| parts.shape);
        let logsumexp_shape = Some(logsumexp.shape);
        self.shapes().check_outputs(out.shape, logsumexp_shape, shape_of_parts, shape_of_mass, self.modalities())?;
        let work = arithmetic(self.query.dtype);
        valid::written("out", out, self.query.dtype)?;
        valid::written("logsumexp", logsumexp, work)?;
        parts.given("parts", |name, parts| valid::written(name, parts, work))?;
        mass.map(|(_, mass)| mass).given("mass", |name, mass| valid::written(name, mass, work))
    }

    /// Checks what backward starts from.
    pub fn check_upstream(&self, upstream: &AttendUpstream) -> Result<()> {
        let AttendUpstream { out_gradient, out, logsumexp, parts } = upstream;
        let shape_of_parts = parts.map(|parts| parts.shape);
        self.shapes().check_upstream([out_gradient.shape, out.shape, logsumexp.shape], shape_of_parts)?;
        let work = arithmetic(self.query.dtype);
        valid::dtype("d out", out_gradient, self.query.dtype)?;
        valid::rows("d out", out_gradient)?;
        valid::written("out", out, self.query.dtype)?;
        valid::written("logsumexp", logsumexp, work)?;
        parts.given("parts", |name, parts| valid::written(name, parts, work))
    }

    /// Checks where backward writes: shapes, dtypes, contiguous.
    pub fn check_gradients(&self, gradients: &AttendGradients) -> Result<()> {
        let AttendGradients { query, key, value, sink, bias } = gradients;
        let shape = |tensor: DeviceTensor<4>| tensor.shape;
        let always = [query, key, value].map(|tensor| tensor.shape);
        self.shapes().check_gradients(always, sink.map(shape), bias.map(shape), self.modalities())?;
        let (dtype, work) = (self.query.dtype, arithmetic(self.query.dtype));
        for (name, tensor) in [("d query", query), ("d key", key), ("d value", value)] {
            valid::written(name, tensor, dtype)?;
        }
        sink.given("d sink", |name, sink| valid::written(name, sink, work))?;
        bias.given("d bias", |name, bias| valid::written(name, bias, work))
    }

    /// Number of modalities M: the given one or the bias table's, else as many as there can be: ids are not read here.
    pub fn modalities(&self) -> usize {
        self.num_modalities.or(self.bias.map(|bias| bias.shape[2])).unwrap_or(MAX_MODALITIES)
    }

    /// Query heads that read one key head.
    pub fn group(&self) -> usize {
        self.query.shape[1].checked_div(self.key.shape[1]).unwrap_or(0)
    }
}

/// Where attention writes; everything is contiguous and overwritten.
#[derive(Debug, Clone, Copy)]
pub struct AttendOutputs {
    /// o (B, Hq, Nq, D), the query's dtype.
    pub out: DeviceTensor<4>,
    /// L (B, Hq, parts, Nq), natural logarithm, sink included; +inf for a row that sees nothing.
    pub logsumexp: DeviceTensor<4>,
    /// o_self and o_cross (B, Hq, 2, Nq, D) in the [`arithmetic`] dtype; there for "split" only.
    pub parts: Option<DeviceTensor<5>>,
    /// Attention mass (B, Hq, Nq, columns) and what its columns are, where it is wanted.
    pub mass: Option<(MassBy, DeviceTensor<4>)>,
}

/// What backward of attention starts from.
#[derive(Debug, Clone, Copy)]
pub struct AttendUpstream {
    /// Gradient of o (B, Hq, Nq, D), the query's dtype, rows contiguous, 16-byte aligned.
    pub out_gradient: DeviceTensor<4>,
    /// o as forward wrote it.
    pub out: DeviceTensor<4>,
    /// L as forward wrote it.
    pub logsumexp: DeviceTensor<4>,
    /// o_self and o_cross as forward wrote them, for "split".
    pub parts: Option<DeviceTensor<5>>,
}

/// Where backward of attention writes; everything is contiguous and overwritten.
#[derive(Debug, Clone, Copy)]
pub struct AttendGradients {
    /// (B, Hq, Nq, D)
    pub query: DeviceTensor<4>,
    /// (B, Hkv, Nk, D)
    pub key: DeviceTensor<4>,
    /// (B, Hkv, Nk, D)
    pub value: DeviceTensor<4>,
    /// (B, Hq, Nq, parts), [`arithmetic`] dtype.
    pub sink: Option<DeviceTensor<4>>,
    /// (B, Hq, M, M), [`arithmetic`] dtype.
    pub bias: Option<DeviceTensor<4>>,
}
