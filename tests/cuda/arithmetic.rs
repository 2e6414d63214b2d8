//! Arithmetic instructions of the interpreter, one by one, against plain Rust.
#![allow(clippy::float_cmp, clippy::manual_clamp, reason = "bits are compared, and NaN saturates to zero")]

use crate::common::Rng;
use crate::emulator::Gpu;
use crate::kernel::run;
use half::{bf16, f16};
use std::fmt::Write;

/// An instruction on %0 (result), %1, %2, %3; the letters of their registers (h 16, r 32, l 64 bits); what it computes.
type Case = (&'static str, &'static str, fn([u64; 3]) -> u64);

/// Operands with edges in them: zeros, ones, extremes, subnormals, infinities, NaN of every width.
const EDGES: [u64; 34] = [
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    64,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0x3c00,
    0x7c00,
    0x7e00,
    0x0001_0203,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x0000_0001,
    0x0040_0000,
    0x8000_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x4b80_0001,
    0x3ff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
    0x4330_0000_0000_0001,
    0xc1e0_0000_0000_0000,
];

fn operands() -> Vec<u64> {
    let rng = &mut Rng::new(0);
    let mut bits = |width: u32| (0..width).fold(0u64, |bits, at| bits | u64::from(rng.flip()) << at);
    let random = [0; 300].map(|_| bits(64));
    // Numbers of a size that arithmetic does something with.
    let usual32 = [0; 300].map(|_| bits(31) & 0x83ff_ffff | 0x3c00_0000);
    let usual16 = [0; 300].map(|_| bits(32) & 0x8fff_8fff | 0x3000_3000);
    let usual64 = [0; 300].map(|_| bits(64) & 0x803f_ffff_ffff_ffff | 0x3fc0_0000_0000_0000);
    let triples = EDGES.into_iter().flat_map(|a| EDGES.into_iter().map(move |b| [a, b, a ^ b]));
    triples.flatten().chain(random).chain(usual32).chain(usual16).chain(usual64).collect()
}

fn width(letter: char) -> u32 {
    match letter {
        'h' => 16,
        'r' => 32,
        _ => 64,
    }
}

/// Runs every case on every operand and compares by bits; `same` says when different bits are as good.
fn check(cases: &[Case], same: fn(u64, u64) -> bool) {
    let operands = operands();
    let mut body = String::new();
    for (at, (code, letters, _)) in cases.iter().enumerate() {
        let mut letters = letters.chars();
        let result = letters.next().unwrap();
        let ty = |letter: char| format!("u{}", width(letter));
        let inputs: Vec<_> = letters
            .zip(["a", "b", "c"])
            .map(|(letter, name)| format!("\"{letter}\"(({})p.{name})", ty(letter)))
            .collect();
        let _ = writeln!(
            body,
            "{{ {} d; asm volatile(\"{code}\" : \"={result}\"(d) : {}); p.out[{at} * p.count + i] = (u64)d; }}",
            ty(result),
            inputs.join(", ").replace("p.", "")
        );
    }
    let text = format!(
        "struct Params {{ const u64* in; u64* out; u64 count; }};
        KERNEL(test)(const __grid_constant__ Params p) {{
            for (u64 i = threadIdx.x; i < p.count; i += blockDim.x) {{
                u64 a = p.in[3 * i], b = p.in[3 * i + 1], c = p.in[3 * i + 2];
                {body}
            }}
        }}"
    );
    let mut gpu = Gpu::new();
    let count = operands.len() / 3;
    let (input, output) = (gpu.buffer(&operands), gpu.output::<u64>(count * cases.len()));
    run(&mut gpu, &text, 64, &[input, output, count as u64]);
    let results = gpu.read::<u64>(output);
    for ((code, letters, wanted), results) in cases.iter().zip(results.chunks(count)) {
        for (triple, &got) in operands.chunks(3).zip(results) {
            let mut cut = [0; 3];
            for ((cut, &value), letter) in cut.iter_mut().zip(triple).zip(letters.chars().skip(1)) {
                *cut = value & (u64::MAX >> (64 - width(letter)));
            }
            let wanted = wanted(cut);
            assert!(got == wanted || same(got, wanted), "{code} of {cut:x?}: {got:#x}, not {wanted:#x}");
        }
    }
}

fn never(_: u64, _: u64) -> bool {
    false
}

#[test]
fn integers() {
    let cases: &[Case] = &[
        ("add.s32 %0, %1, %2;", "rrr", |[a, b, _]| u64::from((a as u32).wrapping_add(b as u32))),
        ("sub.s64 %0, %1, %2;", "lll", |[a, b, _]| a.wrapping_sub(b)),
        ("mul.lo.s32 %0, %1, %2;", "rrr", |[a, b, _]| u64::from((a as u32).wrapping_mul(b as u32))),
        ("mul.hi.s32 %0, %1, %2;", "rrr", |[a, b, _]| {
            u64::from((i64::from(a as i32).wrapping_mul(i64::from(b as i32)) >> 32) as u32)
        }),
        ("mul.hi.u32 %0, %1, %2;", "rrr", |[a, b, _]| (a * b) >> 32),
        ("mul.hi.u64 %0, %1, %2;", "lll", |[a, b, _]| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        ("mul.wide.s32 %0, %1, %2;", "lrr", |[a, b, _]| (i64::from(a as i32) * i64::from(b as i32)) as u64),
        ("mul.wide.u16 %0, %1, %2;", "rhh", |[a, b, _]| a * b),
        ("mad.lo.u32 %0, %1, %2, %3;", "rrrr", |[a, b, c]| {
            u64::from((a as u32).wrapping_mul(b as u32).wrapping_add(c as u32))
        }),
        ("mad.wide.s32 %0, %1, %2, %3;", "lrrl", |[a, b, c]| {
            (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64) as u64
        }),
        ("min.s32 %0, %1, %2;", "rrr", |[a, b, _]| u64::from((a as i32).min(b as i32) as u32)),
        ("max.u64 %0, %1, %2;", "lll", |[a, b, _]| a.max(b)),
        ("shl.b32 %0, %1, %2;", "rrr", |[a, b, _]| if b > 31 { 0 } else { u64::from((a as u32) << b) }),
        ("shr.s32 %0, %1, %2;", "rrr", |[a, b, _]| u64::from((a as i32 >> b.min(31)) as u32)),
        ("shr.u64 %0, %1, %2;", "llr", |[a, b, _]| if b > 63 { 0 } else { a >> b }),
        ("shr.s16 %0, %1, %2;", "hhr", |[a, b, _]| u64::from((a as i16 >> b.min(15)) as u16)),
        ("not.b32 %0, %1;", "rr", |[a, ..]| u64::from(!a as u32)),
        ("neg.s64 %0, %1;", "ll", |[a, ..]| a.wrapping_neg()),
        ("abs.s32 %0, %1;", "rr", |[a, ..]| u64::from((a as i32).unsigned_abs())),
        ("popc.b64 %0, %1;", "rl", |[a, ..]| u64::from(a.count_ones())),
        ("clz.b32 %0, %1;", "rr", |[a, ..]| u64::from((a as u32).leading_zeros())),
        ("brev.b32 %0, %1;", "rr", |[a, ..]| u64::from((a as u32).reverse_bits())),
        ("bfe.s32 %0, %1, 5, 9;", "rr", |[a, ..]| u64::from(((a as i32) << 18 >> 23) as u32)),
        ("bfe.u64 %0, %1, 40, 60;", "ll", |[a, ..]| a >> 40),
        ("bfi.b32 %0, %1, %2, 4, 10;", "rrr", |[a, b, _]| b & !0x3ff0 | (a & 0x3ff) << 4),
        ("prmt.b32 %0, %1, %2, 0xba41;", "rrr", |[a, b, _]| {
            let sign = |byte: u64| (byte >> 7 & 1) * 0xff;
            (a >> 8 & 0xff) | (b & 0xff) << 8 | sign(a >> 16) << 16 | sign(a >> 24) << 24
        }),
        ("lop3.b32 %0, %1, %2, %3, 0xca;", "rrrr", |[a, b, c]| a & b | !a & c),
        ("shf.l.wrap.b32 %0, %1, %2, %3;", "rrrr", |[a, b, c]| ((b << 32 | a) << (c & 31)) >> 32),
        (
            "shf.r.clamp.b32 %0, %1, %2, %3;",
            "rrrr",
            |[a, b, c]| {
                if c > 31 { b } else { (b << 32 | a) >> c & 0xffff_ffff }
            },
        ),
        ("{.reg .pred p; setp.lt.s32 p, %1, %2; selp.b32 %0, %1, %2, p;}", "rrr", |[a, b, _]| {
            if (a as i32) < b as i32 { a } else { b }
        }),
        (
            "{.reg .pred p, q; setp.ne.u32 q, %3, 0; setp.hi.and.u32 p|q, %1, %2, q; @p mov.u32 %0, 1; @!p mov.u32 %0, 2; @q mov.u32 %0, 3;}",
            "rrrr",
            |[a, b, c]| {
                if c == 0 {
                    2
                } else if a > b {
                    1
                } else {
                    3
                }
            },
        ),
        ("cvt.s32.s8 %0, %1;", "rr", |[a, ..]| u64::from(i32::from(a as i8) as u32)),
        ("cvt.u64.u32 %0, %1;", "lr", |[a, ..]| a),
        ("cvt.s64.s32 %0, %1;", "lr", |[a, ..]| i64::from(a as i32) as u64),
        ("cvt.sat.s16.s32 %0, %1;", "hr", |[a, ..]| u64::from((a as i32).clamp(-32768, 32767) as i16 as u16)),
        ("{.reg .b32 lo, hi; mov.b64 {lo, hi}, %1; mov.b64 %0, {hi, lo};}", "ll", |[a, ..]| a.rotate_left(32)),
        ("{.reg .b16 x, y; mov.b32 {x, y}, %1; mov.b32 %0, {y, x};}", "rr", |[a, ..]| a << 16 & 0xffff_ffff | a >> 16),
        ("{.reg .pred p; setp.eq.u32 p, %2, 0; @p mov.u32 %0, 7; @!p div.u32 %0, %1, %2;}", "rrr", |[a, b, _]| {
            a.checked_div(b).unwrap_or(7)
        }),
        ("{.reg .pred p; setp.eq.u32 p, %2, 0; @p mov.u32 %0, 7; @!p rem.s32 %0, %1, %2;}", "rrr", |[a, b, _]| {
            if b == 0 { 7 } else { u64::from((a as i32).wrapping_rem(b as i32) as u32) }
        }),
    ];
    check(cases, never);
}

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn b(value: f32) -> u64 {
    u64::from(value.to_bits())
}

fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0.0_f32.copysign(value) } else { value }
}

fn ordered(a: f32) -> i64 {
    let bits = i64::from(a.to_bits() as i32);
    if bits < 0 { i64::from(i32::MIN) - bits } else { bits }
}

/// NaN is NaN, and an approximation may be off by two units of the last place.
fn close32(got: u64, wanted: u64) -> bool {
    let (got, wanted) = (f(got), f(wanted));
    got.is_nan() && wanted.is_nan() || !got.is_nan() && !wanted.is_nan() && (ordered(got) - ordered(wanted)).abs() <= 2
}

fn same32(got: u64, wanted: u64) -> bool {
    f(got).is_nan() && f(wanted).is_nan()
}

fn same64(got: u64, wanted: u64) -> bool {
    f64::from_bits(got).is_nan() && f64::from_bits(wanted).is_nan()
}

#[test]
fn floats_of_32_bits() {
    let cases: &[Case] = &[
        ("add.f32 %0, %1, %2;", "rrr", |[x, y, _]| b(f(x) + f(y))),
        ("add.ftz.f32 %0, %1, %2;", "rrr", |[x, y, _]| b(flushed(flushed(f(x)) + flushed(f(y))))),
        ("sub.rn.f32 %0, %1, %2;", "rrr", |[x, y, _]| b(f(x) - f(y))),
        ("mul.f32 %0, %1, %2;", "rrr", |[x, y, _]| b(f(x) * f(y))),
        ("mul.ftz.f32 %0, %1, %2;", "rrr", |[x, y, _]| b(flushed(flushed(f(x)) * flushed(f(y))))),
        ("fma.rn.f32 %0, %1, %2, %3;", "rrrr", |[x, y, z]| b(f(x).mul_add(f(y), f(z)))),
        ("div.rn.f32 %0, %1, %2;", "rrr", |[x, y, _]| b(f(x) / f(y))),
        ("rcp.rn.f32 %0, %1;", "rr", |[x, ..]| b(1.0 / f(x))),
        ("sqrt.rn.f32 %0, %1;", "rr", |[x, ..]| b(f(x).sqrt())),
        ("neg.f32 %0, %1;", "rr", |[x, ..]| b(-f(x))),
        ("abs.f32 %0, %1;", "rr", |[x, ..]| b(f(x).abs())),
        // Of a number and NaN the number.
        ("max.f32 %0, %1, %2;", "rrr", |[x, y, _]| {
            b(match (f(x), f(y)) {
                (x, y) if x.is_nan() => y,
                (x, y) if y.is_nan() || x > y || x == y && x.is_sign_positive() => x,
                (_, y) => y,
            })
        }),
        ("min.NaN.f32 %0, %1, %2;", "rrr", |[x, y, _]| {
            b(match (f(x), f(y)) {
                (x, y) if x.is_nan() || y.is_nan() => f32::NAN,
                (x, y) if x < y || x == y && x.is_sign_negative() => x,
                (_, y) => y,
            })
        }),
        ("add.sat.f32 %0, %1, %2;", "rrr", |[x, y, _]| b((f(x) + f(y)).max(0.0).min(1.0))),
        ("cvt.rzi.s32.f32 %0, %1;", "rr", |[x, ..]| u64::from((f(x) as i32) as u32)),
        ("cvt.rni.u32.f32 %0, %1;", "rr", |[x, ..]| u64::from(f(x).round_ties_even() as u32)),
        ("cvt.rmi.f32.f32 %0, %1;", "rr", |[x, ..]| b(f(x).floor())),
        ("cvt.rn.f32.s32 %0, %1;", "rr", |[x, ..]| b(x as i32 as f32)),
        ("cvt.rn.f32.u64 %0, %1;", "rl", |[x, ..]| b(x as f32)),
        ("cvt.rn.f32.f64 %0, %1;", "rl", |[x, ..]| b(f64::from_bits(x) as f32)),
        ("{.reg .pred p; setp.ltu.f32 p, %1, %2; selp.u32 %0, 1, 0, p;}", "rrr", |[x, y, _]| {
            u64::from(!matches!(f(x).partial_cmp(&f(y)), Some(o) if o.is_ge()))
        }),
        ("{.reg .pred p; setp.ne.f32 p, %1, %2; selp.u32 %0, 1, 0, p;}", "rrr", |[x, y, _]| {
            u64::from(f(x) < f(y) || f(x) > f(y))
        }),
        ("{.reg .pred p; setp.neu.f32 p, %1, %2; selp.u32 %0, 1, 0, p;}", "rrr", |[x, y, _]| u64::from(f(x) != f(y))),
    ];
    check(cases, same32);
    let approximate: &[Case] = &[
        ("ex2.approx.f32 %0, %1;", "rr", |[x, ..]| b(f(x).exp2())),
        ("ex2.approx.ftz.f32 %0, %1;", "rr", |[x, ..]| b(flushed(flushed(f(x)).exp2()))),
        ("lg2.approx.f32 %0, %1;", "rr", |[x, ..]| b(f(x).log2())),
        ("rsqrt.approx.f32 %0, %1;", "rr", |[x, ..]| b(1.0 / f(x).sqrt())),
        ("rcp.approx.ftz.f32 %0, %1;", "rr", |[x, ..]| b(flushed(1.0 / flushed(f(x))))),
        ("div.full.f32 %0, %1, %2;", "rrr", |[x, y, _]| b(f(x) / f(y))),
        ("sqrt.approx.f32 %0, %1;", "rr", |[x, ..]| b(f(x).sqrt())),
    ];
    check(approximate, close32);
}

#[test]
fn floats_of_64_bits() {
    fn g(bits: u64) -> f64 {
        f64::from_bits(bits)
    }
    let cases: &[Case] = &[
        ("add.rn.f64 %0, %1, %2;", "lll", |[x, y, _]| (g(x) + g(y)).to_bits()),
        ("mul.f64 %0, %1, %2;", "lll", |[x, y, _]| (g(x) * g(y)).to_bits()),
        ("fma.rn.f64 %0, %1, %2, %3;", "llll", |[x, y, z]| g(x).mul_add(g(y), g(z)).to_bits()),
        ("div.rn.f64 %0, %1, %2;", "lll", |[x, y, _]| (g(x) / g(y)).to_bits()),
        ("sqrt.rn.f64 %0, %1;", "ll", |[x, ..]| g(x).sqrt().to_bits()),
        ("cvt.f64.f32 %0, %1;", "lr", |[x, ..]| f64::from(f(x)).to_bits()),
        ("cvt.rn.f64.s64 %0, %1;", "ll", |[x, ..]| (x as i64 as f64).to_bits()),
        // NaN to 64 bits is the lowest number.
        ("cvt.rzi.s64.f64 %0, %1;", "ll", |[x, ..]| if g(x).is_nan() { 1 << 63 } else { g(x) as i64 as u64 }),
    ];
    check(cases, same64);
}

#[test]
fn floats_of_16_bits() {
    fn h(bits: u64) -> f16 {
        f16::from_bits(bits as u16)
    }
    fn bf(bits: u64) -> bf16 {
        bf16::from_bits(bits as u16)
    }
    fn of(value: f64) -> u64 {
        u64::from(f16::from_f64(value).to_bits())
    }
    fn pair(x: bf16, y: bf16) -> u64 {
        u64::from(x.to_bits()) << 16 | u64::from(y.to_bits())
    }
    let cases: &[Case] = &[
        ("cvt.f32.f16 %0, %1;", "rh", |[x, ..]| b(h(x).to_f32())),
        ("cvt.f32.bf16 %0, %1;", "rh", |[x, ..]| b(bf(x).to_f32())),
        ("cvt.rn.f16.f32 %0, %1;", "hr", |[x, ..]| u64::from(f16::from_f32(f(x)).to_bits())),
        ("cvt.rn.bf16.f32 %0, %1;", "hr", |[x, ..]| u64::from(bf16::from_f32(f(x)).to_bits())),
        ("cvt.rn.f16.f64 %0, %1;", "hl", |[x, ..]| of(f64::from_bits(x))),
        ("add.f16 %0, %1, %2;", "hhh", |[x, y, _]| of(h(x).to_f64() + h(y).to_f64())),
        ("mul.f16 %0, %1, %2;", "hhh", |[x, y, _]| of(h(x).to_f64() * h(y).to_f64())),
    ];
    check(cases, |got, wanted| {
        same32(got, wanted) || h(got).is_nan() && h(wanted).is_nan() || bf(got).is_nan() && bf(wanted).is_nan()
    });
    let cases: &[Case] = &[
        ("cvt.rn.bf16x2.f32 %0, %1, %2;", "rrr", |[x, y, _]| pair(bf16::from_f32(f(x)), bf16::from_f32(f(y)))),
        ("fma.rn.bf16x2 %0, %1, %2, %3;", "rrrr", |[x, y, z]| {
            let one = |shift: u32| {
                let [x, y, z] = [x, y, z].map(|bits| bf(bits >> shift).to_f64());
                bf16::from_f64(x * y + z)
            };
            pair(one(16), one(0))
        }),
    ];
    check(cases, |got, wanted| {
        let either = |shift: u32| {
            let (got, wanted) = (bf(got >> shift), bf(wanted >> shift));
            got.to_bits() == wanted.to_bits() || got.is_nan() && wanted.is_nan()
        };
        either(0) && either(16)
    });
}
