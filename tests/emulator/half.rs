//! The 16-bit floats, from and to float64.

/// The number that the bits of a float16 stand for.
pub(crate) fn f16_value(bits: u64) -> f64 {
    let (exponent, digits) = (bits >> 10 & 0x1f, bits & 0x3ff);
    let size = match exponent {
        0 => f64::from(digits as u32) * f64::from_bits((1023 - 24) << 52),
        31 => f64::from_bits(0x7ff << 52 | digits << 42),
        _ => f64::from_bits((exponent + 1023 - 15) << 52 | digits << 42),
    };
    if bits >> 15 & 1 == 1 { -size } else { size }
}

/// The number that the bits of a bfloat16 stand for.
pub(crate) fn bf16_value(bits: u64) -> f64 {
    f64::from(f32::from_bits((bits as u32) << 16))
}

/// The nearest float16, ties to even.
pub(crate) fn f16_bits(value: f64) -> u64 {
    let value = rounded_to_odd(value);
    let size = value.abs().to_bits();
    let sign = u64::from(value.is_sign_negative()) << 15;
    let half = 0.5_f32.to_bits();
    sign | u64::from(match size {
        0x7f80_0001.. => 0x7fff,
        0x477f_f000.. => 0x7c00,
        // below 2^-14: the unit of 0.5 is the smallest float16
        ..0x3880_0000 => (f32::from_bits(size) + 0.5).to_bits() - half,
        _ => ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10),
    })
}

/// The nearest bfloat16, ties to even.
pub(crate) fn bf16_bits(value: f64) -> u64 {
    let bits = rounded_to_odd(value).to_bits();
    if value.is_nan() {
        return 0x7fff;
    }
    u64::from((bits + 0x7fff + (bits >> 16 & 1)) >> 16)
}

/// A float32 from which rounding again gives what rounding once would have: inexact ones end in a one.
fn rounded_to_odd(value: f64) -> f32 {
    let near = value as f32;
    let exact = f64::from(near).to_bits() == value.to_bits();
    if exact || value.is_nan() || near.is_infinite() {
        return near;
    }
    let below = if f64::from(near).abs() > value.abs() { near.to_bits() - 1 } else { near.to_bits() };
    f32::from_bits(below | 1)
}

/// The same towards zero, given the nearest.
pub(crate) fn towards_zero(nearest: u64, value: f64, decode: fn(u64) -> f64) -> u64 {
    if decode(nearest).abs() > value.abs() { nearest - 1 } else { nearest }
}

/// The nearest number of tf32, ties away from zero, in the bits of a float32: the last 13 of them are zeros.
pub(crate) fn tf32_bits(bits: u64) -> u64 {
    if f32::from_bits(bits as u32).is_finite() { (bits + 0x1000) & 0xffff_e000 } else { bits }
}

/// What a product takes a float32 for: it does not look at the last 13 bits.
pub(crate) fn tf32_value(bits: u64) -> f64 {
    f64::from(f32::from_bits(bits as u32 & 0xffff_e000))
}
