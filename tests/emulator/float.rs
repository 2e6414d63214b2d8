//! Arithmetic on floating-point numbers.
//!
//! Everything is computed in float64 and rounded once to the type of the instruction, which is what the correctly rounded
//! instructions give (twice the digits and two more are enough for sums, products, quotients and roots) and closer than the
//! machine's own `.approx` ones, which may be off by a few units of the last place.

#![allow(clippy::float_cmp, reason = "what the instructions compare is exact")]

use super::half::{bf16_bits, bf16_value, f16_bits, f16_value};
use super::instruction::{Function, Type};
use super::integer::{lanes, low};
use std::cmp::Ordering;

/// What a float instruction does besides its operation.
#[derive(Debug, Clone, Copy, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is a modifier of the opcode")]
pub(crate) struct Float {
    /// Subnormal operands and results count as zero.
    pub(crate) flush: bool,
    /// The result is brought to 0 .. 1, NaN to 0.
    pub(crate) saturate: bool,
    /// A minimum or maximum with NaN is NaN.
    pub(crate) keep_nan: bool,
    /// A negative result or NaN becomes zero.
    pub(crate) relu: bool,
}

impl Float {
    pub(crate) fn value32(self, bits: u64) -> f64 {
        f64::from(self.flushed(f32::from_bits(bits as u32)))
    }

    pub(crate) fn bits32(self, value: f64) -> u64 {
        u64::from(self.flushed(self.bounded(value) as f32).to_bits())
    }

    fn flushed(self, value: f32) -> f32 {
        if self.flush && value.is_subnormal() { 0.0_f32.copysign(value) } else { value }
    }

    pub(crate) fn bounded(self, value: f64) -> f64 {
        if self.saturate {
            // Minus zero becomes plus zero.
            return if value.is_nan() { 0.0 } else { value.clamp(0.0, 1.0) + 0.0 };
        }
        if self.relu && value < 0.0 { 0.0 } else { value }
    }

    /// A function of float64 numbers as one of registers of a type.
    fn lifted<const N: usize>(
        self,
        ty: Type,
        f: impl Fn([f64; N]) -> f64 + Send + Sync + 'static,
    ) -> Option<Function<N>> {
        let half = |bits: u64, part: u32| low(bits >> (16 * part), 16);
        Some(match ty {
            Type::F32 => lanes(move |from| self.bits32(f(from.map(|bits| self.value32(bits))))),
            Type::F64 => lanes(move |from| self.bounded(f(from.map(f64::from_bits))).to_bits()),
            Type::F16 => lanes(move |from| f16_bits(self.bounded(f(from.map(f16_value))))),
            Type::BF16 => lanes(move |from| bf16_bits(self.bounded(f(from.map(bf16_value))))),
            Type::F16x2 => lanes(move |from| {
                let part = |part| f16_bits(self.bounded(f(from.map(|bits| f16_value(half(bits, part))))));
                part(0) | part(1) << 16
            }),
            Type::BF16x2 => lanes(move |from| {
                let part = |part| bf16_bits(self.bounded(f(from.map(|bits| bf16_value(half(bits, part))))));
                part(0) | part(1) << 16
            }),
            _ => return None,
        })
    }

    /// `op.type d, a`
    pub(crate) fn unary(self, name: &str, ty: Type) -> Option<Function<1>> {
        match name {
            "mov" => Some(lanes(|[a]| a)),
            "neg" => self.lifted(ty, |[a]| -a),
            "abs" => self.lifted(ty, |[a]| a.abs()),
            "sqrt" => self.lifted(ty, |[a]| a.sqrt()),
            // What Newton steps start from: 20 digits, the lower word zero.
            "rcp.approx" if ty == Type::F64 => Some(lanes(|[a]| (1.0 / f64::from_bits(a)).to_bits() >> 32 << 32)),
            "rsqrt.approx" if ty == Type::F64 => {
                Some(lanes(|[a]| (1.0 / f64::from_bits(a).sqrt()).to_bits() >> 32 << 32))
            }
            "rcp" | "rcp.approx" => self.lifted(ty, |[a]| 1.0 / a),
            "sqrt.approx" => self.lifted(ty, |[a]| a.sqrt()),
            "rsqrt.approx" => self.lifted(ty, |[a]| 1.0 / a.sqrt()),
            "ex2.approx" => self.lifted(ty, |[a]| a.exp2()),
            "lg2.approx" => self.lifted(ty, |[a]| a.log2()),
            "sin.approx" => self.lifted(ty, |[a]| a.sin()),
            "cos.approx" => self.lifted(ty, |[a]| a.cos()),
            "tanh.approx" => self.lifted(ty, |[a]| a.tanh()),
            _ => None,
        }
    }

    /// `op.type d, a, b`
    pub(crate) fn binary(self, name: &str, ty: Type) -> Option<Function<2>> {
        let keep_nan = self.keep_nan;
        match name {
            "add" => self.lifted(ty, |[a, b]| a + b),
            "sub" => self.lifted(ty, |[a, b]| a - b),
            "mul" => self.lifted(ty, |[a, b]| a * b),
            "div" | "div.approx" | "div.full" => self.lifted(ty, |[a, b]| a / b),
            "min" => self.lifted(ty, move |[a, b]| -larger(-a, -b, keep_nan)),
            "max" => self.lifted(ty, move |[a, b]| larger(a, b, keep_nan)),
            "copysign" => self.lifted(ty, |[sign, value]| value.copysign(sign)),
            _ => None,
        }
    }

    /// `op.type d, a, b, c`
    pub(crate) fn ternary(self, name: &str, ty: Type) -> Option<Function<3>> {
        match (name, ty) {
            // A product of two float32 numbers and a sum do not fit into float64: one rounding, by its own instruction.
            ("fma" | "mad", Type::F32) => Some(lanes(move |[a, b, c]| {
                let [a, b, c] = [a, b, c].map(|bits| self.flushed(f32::from_bits(bits as u32)));
                self.bits32(f64::from(a.mul_add(b, c)))
            })),
            ("fma" | "mad", _) => self.lifted(ty, |[a, b, c]| a.mul_add(b, c)),
            _ => None,
        }
    }

    /// `setp` on floating-point numbers.
    pub(crate) fn compare(self, name: &str, ty: Type) -> Option<Function<2>> {
        let test: fn(f64, f64) -> bool = match name {
            "eq" => |a, b| a == b,
            "ne" => |a, b| a.partial_cmp(&b).is_some_and(Ordering::is_ne),
            "lt" => |a, b| a < b,
            "le" => |a, b| a <= b,
            "gt" => |a, b| a > b,
            "ge" => |a, b| a >= b,
            "equ" => |a, b| a == b || a.is_nan() || b.is_nan(),
            "neu" => |a, b| a != b,
            "ltu" => |a, b| a < b || a.is_nan() || b.is_nan(),
            "leu" => |a, b| a <= b || a.is_nan() || b.is_nan(),
            "gtu" => |a, b| a > b || a.is_nan() || b.is_nan(),
            "geu" => |a, b| a >= b || a.is_nan() || b.is_nan(),
            "num" => |a, b| !a.is_nan() && !b.is_nan(),
            "nan" => |a, b| a.is_nan() || b.is_nan(),
            _ => return None,
        };
        Some(match ty {
            Type::F32 => lanes(move |[a, b]| u64::from(test(self.value32(a), self.value32(b)))),
            Type::F64 => lanes(move |[a, b]| u64::from(test(f64::from_bits(a), f64::from_bits(b)))),
            Type::F16 => lanes(move |[a, b]| u64::from(test(f16_value(a), f16_value(b)))),
            Type::BF16 => lanes(move |[a, b]| u64::from(test(bf16_value(a), bf16_value(b)))),
            _ => return None,
        })
    }
}

/// The larger number, +0 above -0. NaN only where both are or where it is wanted.
fn larger(a: f64, b: f64, keep_nan: bool) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => f64::NAN,
        (true, false) | (false, true) if keep_nan => f64::NAN,
        (true, false) => b,
        (false, true) => a,
        _ if a == b => {
            if a.is_sign_negative() {
                b
            } else {
                a
            }
        }
        _ => {
            if a > b {
                a
            } else {
                b
            }
        }
    }
}
