//! The CPU kernels against the specification in float64: every instruction set the machine has, every dtype, every option.

mod common;

use common::{
    AlignCase, AlignOptions, AttendCase, AttendOptions, Rng, assert_close, assert_close_for_size, assert_each_close,
    tolerance,
};
use half::{bf16, f16};
use moda_attn::cpu::{CpuElement, Exec};
use moda_attn::dispatch::Isa;
use moda_attn::problem::Combine;

/// Random cases of a few tokens for every instruction set.
const CASES: u64 = 120;

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| {
        let here = isa.is_available();
        if !here {
            eprintln!("skipped: this machine has no {}", isa.name());
        }
        here
    })
}

fn check_attend<T: CpuElement>(exec: Exec, case: &AttendCase<T>) {
    let (outputs, gradients) = tolerance::<T>();
    let (accumulated, _) = tolerance::<T::Acc>();
    let truth = case.truth();
    let got = case.forward(|problem, outputs| T::attend(exec, problem, outputs).unwrap());
    let name = |what| format!("{what} {exec:?} {:?} {:?}", T::DTYPE, case.options);
    assert_close(&name("out"), &got.out.values(), &truth.out.values(), outputs);
    assert_each_close(&name("logsumexp"), &got.logsumexp.values(), &truth.logsumexp.values(), accumulated);
    assert_close(&name("mass"), &got.mass.values(), &truth.mass.values(), accumulated);
    let truth = case.true_gradients();
    let got = case.backward(&got, |problem, upstream, gradients| {
        T::attend_backward(exec, problem, upstream, gradients).unwrap();
    });
    // A row that sees one key has no gradient but for rounding: that is measured by what flows in.
    let inflow = 0.1 * case.out_gradient.widened().values().iter().map(|d| d * d).sum::<f64>().sqrt();
    let close = |what, got: &[f64], truth: &[f64]| assert_close_for_size(&name(what), got, truth, gradients, inflow);
    close("d query", &got.query.widened().values(), &truth.query.values());
    close("d key", &got.key.widened().values(), &truth.key.values());
    close("d value", &got.value.widened().values(), &truth.value.values());
    for (what, got, truth) in [("d sink", &got.sink, &truth.sink), ("d bias", &got.bias, &truth.bias)] {
        if let (Some(got), Some(truth)) = (got, truth) {
            close(what, &got.widened().values(), &truth.values());
        }
    }
}

fn check_align<T: CpuElement>(exec: Exec, case: &AlignCase<T>) {
    let (outputs, gradients) = tolerance::<T>();
    let truth = case.truth();
    let got = case.forward(|problem, outputs| T::align(exec, problem, outputs).unwrap());
    let name = |what| format!("{what} {exec:?} {:?} {:?}", T::DTYPE, case.options);
    assert_close(&name("aligned"), &got.aligned.values(), &truth.aligned.values(), outputs);
    assert_close(&name("basis"), &got.basis.values(), &truth.basis.values(), tolerance::<T::Acc>().0);
    let truth = case.true_gradients();
    let got = case.backward(&got, |problem, upstream, gradients| {
        T::align_backward(exec, problem, upstream, gradients).unwrap();
    });
    assert_close(&name("d key"), &got.key.values(), &truth.key.values(), gradients);
    assert_close(&name("d value"), &got.value.values(), &truth.value.values(), gradients);
    assert_close(&name("d keep"), &got.keep.values(), &truth.keep.values(), gradients);
    assert_close(&name("d mix"), &got.mix.values(), &truth.mix.values(), gradients);
    if let (Some(got), Some(truth)) = (&got.basis, &truth.basis) {
        // A row of one number has a norm it cannot change: zero in theory, a difference of terms of about 1 in practice.
        let size = if case.options.dim == 1 { 1.0 } else { 0.0 };
        assert_close_for_size(&name("d basis"), &got.values(), &truth.values(), gradients, size);
    }
}

fn small<T: CpuElement>() {
    for isa in available() {
        for seed in 0..CASES {
            let exec = Exec { isa, threads: 1 + (seed % 2) as usize };
            check_attend(exec, &AttendCase::<T>::random(&mut Rng::new(seed)));
            check_align(exec, &AlignCase::<T>::random(&mut Rng::new(seed)));
        }
    }
}

/// Lengths around the sizes of the blocks, where tiles are partly filled or partly visible.
fn long<T: CpuElement>() {
    for (seed, tokens) in [(0, 95), (1, 129), (2, 257), (3, 300)] {
        let rng = &mut Rng::new(seed);
        let mut options = AttendOptions::random(rng);
        (options.batch, options.heads, options.key_heads, options.keys) = (1, 3, 1, tokens);
        (options.queries, options.causal) = (tokens - (seed as usize % 2) * 11, seed != 2);
        let attend = AttendCase::<T>::new(rng, options);
        let mut options = AlignOptions::random(rng);
        (options.batch, options.heads, options.tokens) = (1, 1, tokens);
        let align = AlignCase::<T>::new(rng, options);
        for isa in available() {
            let exec = Exec { isa, threads: 2 };
            check_attend(exec, &attend);
            check_align(exec, &align);
        }
    }
}

/// Few queries over keys enough to be cut: a decoding step, and a few tokens at once.
fn few<T: CpuElement>() {
    for seed in 0..4 {
        let rng = &mut Rng::new(seed);
        let attend = AttendCase::<T>::new(rng, few_queries(rng, seed));
        for isa in available() {
            let exec = Exec { isa, threads: 2 };
            check_attend(exec, &attend);
        }
    }
}

fn few_queries(rng: &mut Rng, seed: u64) -> AttendOptions {
    let mut options = AttendOptions::random(rng);
    (options.batch, options.heads, options.key_heads, options.keys) = (1, 4, 1, 1100);
    options.queries = [1, 3, 1, 2][seed as usize % 4];
    options.combine = [Combine::Joint, Combine::Split][seed as usize / 2 % 2];
    options
}

#[test]
fn float64_matches_the_specification() {
    small::<f64>();
    long::<f64>();
    few::<f64>();
}

#[test]
fn float32_matches_the_specification() {
    small::<f32>();
    long::<f32>();
    few::<f32>();
}

#[test]
fn bfloat16_matches_the_specification() {
    small::<bf16>();
    long::<bf16>();
    few::<bf16>();
}

#[test]
fn float16_matches_the_specification() {
    small::<f16>();
    long::<f16>();
    few::<f16>();
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    for isa in available() {
        for seed in 0..20 {
            let rng = &mut Rng::new(seed);
            let mut options = AttendOptions::random(rng);
            (options.heads, options.key_heads, options.keys) = ([4, 6, 8][seed as usize % 3], 2, 200);
            if seed % 5 == 0 {
                options = few_queries(rng, seed);
            }
            let attend = AttendCase::<f32>::new(rng, options);
            let align = AlignCase::<f32>::random(rng);
            let run = |threads| {
                let exec = Exec { isa, threads };
                let out = attend.forward(|problem, outputs| f32::attend(exec, problem, outputs).unwrap());
                let gradients = attend.backward(&out, |problem, upstream, gradients| {
                    f32::attend_backward(exec, problem, upstream, gradients).unwrap();
                });
                let aligned = align.forward(|problem, outputs| f32::align(exec, problem, outputs).unwrap());
                let align_gradients = align.backward(&aligned, |problem, upstream, gradients| {
                    f32::align_backward(exec, problem, upstream, gradients).unwrap();
                });
                let all = [
                    out.out.values(),
                    out.logsumexp.values(),
                    out.mass.values(),
                    gradients.query.values(),
                    gradients.key.values(),
                    gradients.value.values(),
                    gradients.sink.map_or(Vec::new(), |sink| sink.values()),
                    gradients.bias.map_or(Vec::new(), |bias| bias.values()),
                    aligned.aligned.values(),
                    aligned.basis.values(),
                    align_gradients.key.values(),
                    align_gradients.value.values(),
                    align_gradients.keep.values(),
                    align_gradients.mix.values(),
                ];
                all.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let one = run(1);
            assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one), "{isa:?}, seed {seed}");
        }
    }
}
