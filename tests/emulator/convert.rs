//! `cvt`: one type to another.

use super::float::Float;
use super::half::{bf16_bits, bf16_value, f16_bits, f16_value, tf32_bits, towards_zero};
use super::instruction::{Function, Type};
use super::integer::{lanes, low, sign_extended};

/// How a conversion rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rounding {
    Nearest,
    /// To the nearest, ties away from zero.
    Away,
    Zero,
    /// To a whole number: nearest, towards zero, down, up.
    WholeNearest,
    WholeZero,
    WholeDown,
    WholeUp,
}

impl Rounding {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "rn" => Self::Nearest,
            "rna" => Self::Away,
            "rz" => Self::Zero,
            "rni" => Self::WholeNearest,
            "rzi" => Self::WholeZero,
            "rmi" => Self::WholeDown,
            "rpi" => Self::WholeUp,
            _ => return None,
        })
    }

    fn whole(self, value: f64) -> f64 {
        match self {
            Self::Nearest | Self::Away | Self::Zero => value,
            Self::WholeNearest => value.round_ties_even(),
            Self::WholeZero => value.trunc(),
            Self::WholeDown => value.floor(),
            Self::WholeUp => value.ceil(),
        }
    }
}

/// `cvt.to.from d, a`
pub(crate) fn convert(to: Type, from: Type, rounding: Option<Rounding>, float: Float) -> Option<Function<1>> {
    let whole = rounding.unwrap_or(Rounding::Nearest);
    if from.is_integer() && to.is_integer() {
        return Some(lanes(move |[a]| integer(a, to, from, float.saturate)));
    }
    if rounding == Some(Rounding::Away) {
        return ((to, from) == (Type::TF32, Type::F32)).then(|| lanes(|[a]| tf32_bits(a)));
    }
    let decode = decoder(from, float)?;
    if to.is_integer() {
        return Some(lanes(move |[a]| to_integer(whole.whole(decode(a)), to, from)));
    }
    let encode = encoder(to, rounding == Some(Rounding::Zero), float)?;
    Some(lanes(move |[a]| encode(whole.whole(decode(a)))))
}

/// `cvt.to.f32 d, a, b`: `a` into the upper half, `b` into the lower one.
pub(crate) fn convert_pair(to: Type, rounding: Option<Rounding>, float: Float) -> Option<Function<2>> {
    let part = match to {
        Type::F16x2 => Type::F16,
        Type::BF16x2 => Type::BF16,
        _ => return None,
    };
    let decode = decoder(Type::F32, float)?;
    let encode = encoder(part, rounding? == Rounding::Zero, float)?;
    Some(lanes(move |[upper, lower]| encode(decode(upper)) << 16 | encode(decode(lower))))
}

type Decode = Box<dyn Fn(u64) -> f64 + Send + Sync>;
type Encode = Box<dyn Fn(f64) -> u64 + Send + Sync>;

/// Integers of 64 bits lose digits here that float32 would not have held either; float64 rounds them once.
fn decoder(from: Type, float: Float) -> Option<Decode> {
    let bits = from.bits();
    Some(match from {
        Type::F32 => Box::new(move |a| float.value32(a)),
        Type::F64 => Box::new(f64::from_bits),
        Type::F16 => Box::new(f16_value),
        Type::BF16 => Box::new(bf16_value),
        _ if from.is_signed() => Box::new(move |a| sign_extended(a, bits) as i64 as f64),
        _ if from.is_integer() => Box::new(move |a| low(a, bits) as f64),
        _ => return None,
    })
}

fn encoder(to: Type, zero: bool, float: Float) -> Option<Encode> {
    let bounded = move |value: f64| float.bounded(value);
    Some(match (to, zero) {
        (Type::F32, false) => Box::new(move |value| float.bits32(bounded(value))),
        (Type::F64, false) => Box::new(move |value| bounded(value).to_bits()),
        (Type::F16, false) => Box::new(move |value| f16_bits(bounded(value))),
        (Type::BF16, false) => Box::new(move |value| bf16_bits(bounded(value))),
        (Type::F16, true) => Box::new(move |value| towards_zero(f16_bits(bounded(value)), bounded(value), f16_value)),
        (Type::BF16, true) => {
            Box::new(move |value| towards_zero(bf16_bits(bounded(value)), bounded(value), bf16_value))
        }
        _ => return None,
    })
}

fn integer(value: u64, to: Type, from: Type, saturate: bool) -> u64 {
    let wide = if from.is_signed() { sign_extended(value, from.bits()) } else { low(value, from.bits()) };
    if !saturate {
        return low(wide, to.bits());
    }
    let wide = if from.is_signed() { i128::from(wide as i64) } else { i128::from(wide) };
    let (lowest, highest) = bounds(to);
    low(wide.clamp(lowest, highest) as u64, to.bits())
}

fn bounds(ty: Type) -> (i128, i128) {
    if ty.is_signed() { (-(1 << (ty.bits() - 1)), (1 << (ty.bits() - 1)) - 1) } else { (0, (1 << ty.bits()) - 1) }
}

/// Saturating, as the machine's is.
fn to_integer(value: f64, to: Type, from: Type) -> u64 {
    if value.is_nan() {
        let zero = from != Type::F64 && to.bits() < 64;
        return if zero { 0 } else { 1 << (to.bits() - 1) };
    }
    let (lowest, highest) = bounds(to);
    low((value as i128).clamp(lowest, highest) as u64, to.bits())
}
