//! The tiles' machine code against plain sums, and attention through them against attention through vectors. Where the
//! CPU has no AMX the instructions are emulated; where it has no AVX512-BF16 there is nothing to run them with.

use super::*;
use crate::cpu::attend;
use crate::ids::Ids;
use crate::problem::{AttendGradients, AttendOutputs, AttendProblem, AttendUpstream};
use crate::view::{View, ViewMut};
use half::bf16;

fn token() -> Option<Amx> {
    if let Some(amx) = Amx::new() {
        return Some(amx);
    }
    if !Avx512Bf16::is_available() {
        eprintln!("skipped: this machine has no AVX512-BF16");
        return None;
    }
    super::emulator::install();
    // SAFETY: the CPU has the vectors, and the emulator carries out what it lacks.
    Some(unsafe { Amx::new_unchecked() })
}

/// Small whole numbers, whose products and sums are exact.
fn whole(count: usize, seed: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32(((i * 37 + seed * 11) % 19) as f32 - 9.0)).collect()
}

#[test]
fn products_of_integers_are_exact() {
    let Some(amx) = token() else { return };
    for (rows, vectors, depth) in
        [(1, 1, 1), (5, 3, 16), (12, 2, 33), (16, 8, 64), (29, 4, 3), (45, 5, 90), (32, 2, 160)]
    {
        for (turned, accumulate) in [(false, false), (true, true)] {
            let (columns, a, b) = (vectors * TILE, whole(rows * depth * 2, 1), whole(depth * vectors * TILE * 2, 2));
            let before = vec![3.0; rows * columns];
            let mut c = before.clone();
            let strides = if turned { (1, rows) } else { (depth, 1) };
            let left = Left { pointer: a.as_ptr().cast(), row_stride: strides.0, depth_stride: strides.1 };
            let right = Right { pointer: b.as_ptr().cast(), row_stride: columns, panel_stride: 2 * TILE };
            let target = Target { pointer: c.as_mut_ptr(), row_stride: columns, accumulate };
            // SAFETY: operands of exactly these sizes.
            unsafe { enter_product(amx, Size { rows, vectors, depth }, left, right, target) };
            for i in 0..rows {
                for j in 0..columns {
                    let unit = |p: usize| if turned { p * rows + i } else { i * depth + p };
                    let term = |p: usize, half: usize| {
                        a[2 * unit(p) + half].to_f32() * b[2 * (p * columns + j) + half].to_f32()
                    };
                    let sum: f32 = (0..depth).map(|p| term(p, 0) + term(p, 1)).sum();
                    let wanted = sum + if accumulate { 3.0 } else { 0.0 };
                    assert_eq!(
                        c[i * columns + j].to_bits(),
                        wanted.to_bits(),
                        "{rows} x {vectors} x {depth}, turned {turned}: ({i}, {j})"
                    );
                }
            }
        }
    }
}

unsafe fn enter_product(amx: Amx, size: Size, a: Left<Pair>, b: Right<Pair>, c: Target<f32>) {
    struct Product(Amx, Size, Left<Pair>, Right<Pair>, Target<f32>);
    impl Task for Product {
        type Output = ();
        #[inline(always)]
        fn run(self) {
            // SAFETY: the caller's contract.
            unsafe { self.0.product(self.1, self.2, self.3, self.4) };
        }
    }
    amx.enter(Product(amx, size, a, b, c));
}

/// One attention problem's results: output, logsumexp and the gradients of query, key and value.
fn attention<D: Dot<Real = f32>>(d: D, problem: &AttendProblem<'_, bf16>, d_out: &[bf16]) -> [Vec<f32>; 5] {
    let ([b, hq, nq, dim], [_, hkv, nk, _]) = (problem.query.shape(), problem.key.shape());
    let mut out = vec![bf16::NAN; b * hq * nq * dim];
    let mut logsumexp = vec![f32::NAN; b * hq * nq];
    let mut outputs = AttendOutputs {
        out: ViewMut::from_slice(&mut out, [b, hq, nq, dim]),
        logsumexp: Some(ViewMut::from_slice(&mut logsumexp, [b, hq, 1, nq])),
        parts: None,
        mass: None,
    };
    attend::forward(d, 2, problem, &mut outputs).unwrap();
    let [mut query, mut key, mut value] = [hq * nq, hkv * nk, hkv * nk].map(|rows| vec![bf16::NAN; b * rows * dim]);
    let upstream = AttendUpstream {
        out_gradient: View::from_slice(d_out, [b, hq, nq, dim]),
        out: View::from_slice(&out, [b, hq, nq, dim]),
        logsumexp: View::from_slice(&logsumexp, [b, hq, 1, nq]),
        parts: None,
    };
    let mut gradients = AttendGradients {
        query: ViewMut::from_slice(&mut query, [b, hq, nq, dim]),
        key: ViewMut::from_slice(&mut key, [b, hkv, nk, dim]),
        value: ViewMut::from_slice(&mut value, [b, hkv, nk, dim]),
        sink: None,
        bias: None,
    };
    attend::backward(d, 2, problem, &upstream, &mut gradients).unwrap();
    let wide = |values: Vec<bf16>| values.into_iter().map(bf16::to_f32).collect::<Vec<_>>();
    [wide(out), logsumexp, wide(query), wide(key), wide(value)]
}

#[test]
fn attention_by_tiles_is_attention_by_vectors() {
    let Some(amx) = token() else { return };
    let vectors = amx.0;
    for (hq, hkv, n, dim, causal) in [(4, 2, 150, 64, true), (2, 1, 67, 40, true), (3, 3, 40, 128, false)] {
        let random = |count: usize, seed: usize| -> Vec<bf16> {
            (0..count).map(|i| bf16::from_f32(((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0)).collect()
        };
        let [query, d_out] = [1, 2].map(|seed| random(hq * n * dim, seed));
        let [key, value] = [3, 4].map(|seed| random(hkv * n * dim, seed));
        let tokens: Vec<i32> = (0..n).map(|j| if j < 3 { -1 } else { i32::from(j % 5 > 2) }).collect();
        let ids = Ids::new(&tokens, [1, n]).unwrap();
        let pair = [&key, &value].map(|data| View::from_slice(data, [1, hkv, n, dim]));
        let mut problem = AttendProblem::new(View::from_slice(&query, [1, hq, n, dim]), pair, &ids, &ids);
        (problem.causal, problem.scale) = (causal, 0.3);
        let problem = problem.validated().unwrap();
        let (got, wanted) = (attention(amx, &problem, &d_out), attention(vectors, &problem, &d_out));
        for (at, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            let pairs = || got.iter().zip(wanted).filter(|(_, wanted)| wanted.is_finite());
            let difference: f32 = pairs().map(|(got, wanted)| (got - wanted).powi(2)).sum();
            let size: f32 = pairs().map(|(_, wanted)| wanted * wanted).sum();
            let error = (difference / size).sqrt();
            assert!(error < 5e-3, "{hq} {hkv} {n} {dim}, result {at}: {error:.1e}");
        }
    }
}
