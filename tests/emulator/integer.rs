//! Arithmetic on integers and bits.

use super::instruction::{Function, Lanes, Type, WARP};
use std::cmp::Ordering;

/// A function of single lanes as one of the whole warp.
pub(crate) fn lanes<const N: usize>(f: impl Fn([u64; N]) -> u64 + Send + Sync + 'static) -> Function<N> {
    Box::new(move |to: &mut Lanes, from, mask| {
        if mask == u32::MAX {
            for lane in 0..WARP {
                to[lane] = f(from.map(|values| values[lane]));
            }
        } else {
            for lane in (0..WARP).filter(|lane| mask >> lane & 1 == 1) {
                to[lane] = f(from.map(|values| values[lane]));
            }
        }
    })
}

/// The lowest `bits` of a value.
pub(crate) fn low(value: u64, bits: u32) -> u64 {
    if bits >= 64 { value } else { value & ((1 << bits) - 1) }
}

/// The lowest `bits` of a value as a signed number of 64 bits.
pub(crate) fn sign_extended(value: u64, bits: u32) -> u64 {
    let shift = 64 - bits.min(64);
    ((value << shift) as i64 >> shift) as u64
}

/// One expression for every integer type: operands come in, the result goes out as that type.
macro_rules! integers {
    ($ty:expr, |$($name:ident),+| $result:expr) => {
        match $ty {
            Type::B8 | Type::U8 => integers!(@one u8 u8 |$($name),+| $result),
            Type::S8 => integers!(@one i8 u8 |$($name),+| $result),
            Type::B16 | Type::U16 => integers!(@one u16 u16 |$($name),+| $result),
            Type::S16 => integers!(@one i16 u16 |$($name),+| $result),
            Type::B32 | Type::U32 => integers!(@one u32 u32 |$($name),+| $result),
            Type::S32 => integers!(@one i32 u32 |$($name),+| $result),
            Type::B64 | Type::U64 => integers!(@one u64 u64 |$($name),+| $result),
            Type::S64 => integers!(@one i64 u64 |$($name),+| $result),
            _ => return None,
        }
    };
    (@one $int:ident $bits:ident |$($name:ident),+| $result:expr) => {
        lanes(|[$($name),+]| {
            $(let $name = $name as $int;)+
            u64::from($result as $bits)
        })
    };
}

/// `op.type d, a`
pub(crate) fn unary(name: &str, ty: Type) -> Option<Function<1>> {
    let bits = ty.bits();
    Some(match name {
        "mov" | "cvta" => lanes(|[a]| a),
        "not" if ty == Type::Pred => lanes(|[a]| a ^ 1),
        "not" => integers!(ty, |a| !a),
        "neg" => integers!(ty, |a| (!a).wrapping_add(1)),
        "abs" if ty.is_signed() => lanes(move |[a]| low((sign_extended(a, bits) as i64).unsigned_abs(), bits)),
        "popc" => lanes(|[a]| u64::from(a.count_ones())),
        "clz" => lanes(move |[a]| u64::from(a.leading_zeros() - (64 - bits))),
        "brev" => lanes(move |[a]| a.reverse_bits() >> (64 - bits)),
        "bfind" if !ty.is_signed() => lanes(|[a]| if a == 0 { 0xffff_ffff } else { 63 - u64::from(a.leading_zeros()) }),
        _ => return None,
    })
}

/// `op.type d, a, b`; `name` holds what of the opcode chooses the operation, as in `mul.hi`.
pub(crate) fn binary(name: &str, ty: Type) -> Option<Function<2>> {
    let bits = ty.bits();
    let signed = ty.is_signed();
    Some(match name {
        "and" => lanes(|[a, b]| a & b),
        "or" => lanes(|[a, b]| a | b),
        "xor" => lanes(|[a, b]| a ^ b),
        "add" => integers!(ty, |a, b| a.wrapping_add(b)),
        "sub" => integers!(ty, |a, b| a.wrapping_sub(b)),
        "mul.lo" => integers!(ty, |a, b| a.wrapping_mul(b)),
        "mul.hi" if signed => lanes(move |[a, b]| low((wide_signed(a, b, bits) >> bits) as u64, bits)),
        "mul.hi" => lanes(move |[a, b]| ((u128::from(a) * u128::from(b)) >> bits) as u64),
        "mul.wide" if signed => lanes(move |[a, b]| low(wide_signed(a, b, bits) as u64, 2 * bits)),
        "mul.wide" => lanes(|[a, b]| a.wrapping_mul(b)),
        "mul24.lo" if !signed => lanes(|[a, b]| low(low(a, 24) * low(b, 24), 32)),
        // Whatever the machine gives for a division by zero: all ones, as it happens.
        "div" => integers!(ty, |a, b| if b == 0 { !b } else { a.wrapping_div(b) }),
        "rem" => integers!(ty, |a, b| if b == 0 { !b } else { a.wrapping_rem(b) }),
        "min" => integers!(ty, |a, b| a.min(b)),
        "max" => integers!(ty, |a, b| a.max(b)),
        // The amount is a 32-bit number, and more than the width is as much as the width.
        "shl" => lanes(move |[a, b]| if b >= u64::from(bits) { 0 } else { low(a << b, bits) }),
        "shr" if signed => lanes(move |[a, b]| low((sign_extended(a, bits) as i64 >> b.min(63)) as u64, bits)),
        "shr" => lanes(|[a, b]| if b >= 64 { 0 } else { a >> b }),
        _ => return None,
    })
}

fn wide_signed(a: u64, b: u64, bits: u32) -> i128 {
    i128::from(sign_extended(a, bits) as i64) * i128::from(sign_extended(b, bits) as i64)
}

/// `op.type d, a, b, c`
pub(crate) fn ternary(name: &str, ty: Type) -> Option<Function<3>> {
    let bits = ty.bits();
    let signed = ty.is_signed();
    Some(match name {
        "mad.lo" => integers!(ty, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        "mad.hi" if signed => {
            lanes(move |[a, b, c]| low(((wide_signed(a, b, bits) >> bits) as u64).wrapping_add(c), bits))
        }
        "mad.hi" => {
            lanes(move |[a, b, c]| low((((u128::from(a) * u128::from(b)) >> bits) as u64).wrapping_add(c), bits))
        }
        "mad.wide" if signed => lanes(move |[a, b, c]| low((wide_signed(a, b, bits) as u64).wrapping_add(c), 2 * bits)),
        "mad.wide" => lanes(move |[a, b, c]| low(a.wrapping_mul(b).wrapping_add(c), 2 * bits)),
        "bfe" => lanes(move |[a, start, length]| extracted(a, low(start, 8) as u32, low(length, 8) as u32, ty)),
        "prmt" => lanes(|[a, b, selector]| permuted(a | b << 32, selector)),
        "shf.l.wrap" => lanes(|[a, b, c]| low(((b << 32 | a) << (c & 31)) >> 32, 32)),
        "shf.r.wrap" => lanes(|[a, b, c]| low((b << 32 | a) >> (c & 31), 32)),
        "shf.l.clamp" => lanes(|[a, b, c]| low(((b << 32 | a) << c.min(32)) >> 32, 32)),
        "shf.r.clamp" => lanes(|[a, b, c]| low((b << 32 | a) >> c.min(32), 32)),
        "sad" if !signed => lanes(move |[a, b, c]| low(a.abs_diff(b).wrapping_add(c), bits)),
        _ => return None,
    })
}

/// A field of bits, extended by its top bit (or the last one of the value) if signed.
fn extracted(value: u64, start: u32, length: u32, ty: Type) -> u64 {
    let bits = ty.bits();
    let wide = if ty.is_signed() { sign_extended(value, bits) } else { value };
    let shifted = match (ty.is_signed(), start) {
        (true, 64..) => (wide as i64 >> 63) as u64,
        (true, _) => (wide as i64 >> start) as u64,
        (false, 64..) => 0,
        (false, _) => wide >> start,
    };
    if length == 0 {
        return 0;
    }
    let length = length.min(bits);
    let field = low(shifted, length);
    if ty.is_signed() { low(sign_extended(field, length), bits) } else { field }
}

/// `bfi`: the lowest `length` bits of the first value put into the second from bit `start` on.
pub(crate) fn insert(ty: Type) -> Option<Function<4>> {
    let bits = ty.bits();
    ty.is_integer().then(|| {
        lanes(move |[field, value, start, length]| {
            let (start, length) = (low(start, 8) as u32, low(length, 8) as u32);
            if start >= bits {
                return value;
            }
            let mask = low(low(u64::MAX, length) << start, bits);
            value & !mask | (field << start) & mask
        })
    })
}

/// Four bytes chosen out of eight; bit 3 of a choice spreads the byte's sign.
fn permuted(bytes: u64, selector: u64) -> u64 {
    (0..4).fold(0, |result, at| {
        let choice = selector >> (4 * at);
        let byte = low(bytes >> (8 * (choice & 7)), 8);
        let byte = if choice & 8 != 0 { (byte >> 7) * 0xff } else { byte };
        result | byte << (8 * at)
    })
}

/// `lop3`: any function of three bits, by its table.
pub(crate) fn lookup(table: u64) -> Function<3> {
    lanes(move |[a, b, c]| {
        (0..8).filter(|row| table >> row & 1 == 1).fold(0, |result, row| {
            let pick = |value: u64, bit: u32| if row >> bit & 1 == 1 { value } else { !value };
            result | low(pick(a, 2) & pick(b, 1) & pick(c, 0), 32)
        })
    })
}

/// `setp` on integers and bits.
pub(crate) fn compare(name: &str, ty: Type) -> Option<Function<2>> {
    Some(match name {
        "eq" => ordered(ty, Ordering::is_eq),
        "ne" => ordered(ty, Ordering::is_ne),
        "lt" | "lo" => ordered(ty, Ordering::is_lt),
        "le" | "ls" => ordered(ty, Ordering::is_le),
        "gt" | "hi" => ordered(ty, Ordering::is_gt),
        "ge" | "hs" => ordered(ty, Ordering::is_ge),
        _ => return None,
    })
}

fn ordered(ty: Type, test: impl Fn(Ordering) -> bool + Send + Sync + 'static) -> Function<2> {
    let bits = ty.bits();
    if ty.is_signed() {
        let signed = move |value: u64| sign_extended(value, bits) as i64;
        lanes(move |[a, b]| u64::from(test(signed(a).cmp(&signed(b)))))
    } else {
        lanes(move |[a, b]| u64::from(test(a.cmp(&b))))
    }
}
