//! 2^x for x <= 0: the softmax runs in powers of two, with log2 e folded into the scale.

use crate::cpu::CpuReal;
use crate::cpu::simd::Simd;

/// 2^x for x <= 0 (a little above is fine). Exactly 0 for minus infinity, NaN for NaN.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::Vector) -> S::Vector {
    let x = s.max(s.splat(S::Real::EXP2_LOWEST), x);
    let n = s.round(x);
    let r = s.sub(x, n);
    let (highest, rest) = S::Real::EXP2.split_last().expect("a polynomial has a coefficient");
    let mut p = s.splat(*highest);
    for &coefficient in rest.iter().rev() {
        p = s.mul_add(p, r, s.splat(coefficient));
    }
    s.scale_by_power(p, n)
}

/// [`exp2`] of one number.
#[inline(always)]
pub(crate) fn exp2_one<S: Simd>(s: S, x: S::Real) -> S::Real {
    let mut lanes = [x; 16];
    // SAFETY: a register holds at most 16 numbers.
    unsafe { s.store(lanes.as_mut_ptr(), exp2(s, s.splat(x))) };
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use crate::cpu::{Exec, with_token};

    fn worst<R: CpuReal>(exec: Exec) -> f64 {
        with_token!(exec, R, s => {
            let points = (0..200_000).map(|i| R::from_f64(f64::from(i) * -1e-4));
            let error = |x: R| (exp2_one(s, x).to_f64() / x.to_f64().exp2() - 1.0).abs();
            assert!([R::NEG_INFINITY, R::from_f64(-1e5)].into_iter().all(|x| exp2_one(s, x).to_f64().abs() < f64::MIN_POSITIVE));
            assert!(exp2_one(s, R::from_f64(f64::NAN)).to_f64().is_nan());
            points.map(error).fold(0.0, f64::max)
        })
    }

    #[test]
    fn the_error_stays_within_the_rounding_of_the_type() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let exec = Exec { isa, threads: 1 };
            assert!(worst::<f32>(exec) < 1.5e-7, "{isa:?} float32: {}", worst::<f32>(exec));
            assert!(worst::<f64>(exec) < 3e-16, "{isa:?} float64: {}", worst::<f64>(exec));
        }
    }
}
