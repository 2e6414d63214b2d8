//! The CPU kernels against the specification in float64: every instruction set the machine has, every dtype, every option.

mod common;

use common::{
    AlignCase, AlignOptions, AttendBuffers, AttendCase, AttendGradientBuffers, AttendOptions, Ranges, Rng,
    assert_close, assert_close_for_size, assert_each_close, tolerance,
};
use half::{bf16, f16};
use moda_attn::cpu::{CpuElement, Exec};
use moda_attn::dispatch::Isa;
use moda_attn::problem::Combine;
use moda_attn::range::KeyRanges;

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
    let (outputs, _) = tolerance::<T>();
    let (accumulated, _) = tolerance::<T::Acc>();
    let truth = case.truth();
    let got = case.forward(|problem, outputs| T::attend(exec, problem, outputs).unwrap());
    let name = |what| format!("{what} {exec:?} {:?} {:?}", T::DTYPE, case.options);
    assert_close(&name("out"), &got.out.values(), &truth.out.values(), outputs);
    assert_each_close(&name("logsumexp"), &got.logsumexp.values(), &truth.logsumexp.values(), accumulated);
    assert_close(&name("mass"), &got.mass.values(), &truth.mass.values(), accumulated);
    case.check_backward(&case.backward(&got, |problem, upstream, gradients| {
        T::attend_backward(exec, problem, upstream, gradients).unwrap();
    }));
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
    // A row of one number has a norm it cannot change: zero in theory, a difference of terms of about 1 in practice.
    let size = if case.options.dim == 1 { 1.0 } else { 0.0 };
    assert_close_for_size(&name("d key"), &got.key.values(), &truth.key.values(), gradients, size);
    assert_close_for_size(&name("d value"), &got.value.values(), &truth.value.values(), gradients, size);
    assert_close(&name("d keep"), &got.keep.values(), &truth.keep.values(), gradients);
    assert_close(&name("d mix"), &got.mix.values(), &truth.mix.values(), gradients);
    if let (Some(got), Some(truth)) = (&got.basis, &truth.basis) {
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
        let options = few_queries(rng, seed);
        let attend = AttendCase::<T>::new(rng, options);
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

/// Ranges that begin and end inside key blocks, over several of them.
fn ranged<T: CpuElement>() {
    for (seed, (ranges, causal)) in Ranges::ALL.into_iter().flat_map(|r| [(r, true), (r, false)]).enumerate() {
        let rng = &mut Rng::new(seed as u64);
        let options = AttendOptions::random(rng);
        let (heads, queries) = if seed % 3 == 0 { (6, 23) } else { (2, 300) };
        let options = AttendOptions { batch: 1, heads, key_heads: 1, queries, keys: 300, ranges, causal, ..options };
        let case = AttendCase::<T>::new(rng, options);
        for isa in available() {
            check_attend(Exec { isa, threads: 2 }, &case);
        }
    }
}

#[test]
fn key_ranges_match_the_specification_across_blocks() {
    ranged::<f32>();
    ranged::<f64>();
    ranged::<bf16>();
}

/// Everything both kernels write, as bits.
fn bits(exec: Exec, case: &AttendCase<f32>) -> Vec<u32> {
    let out: AttendBuffers<f32> = case.forward(|problem, outputs| f32::attend(exec, problem, outputs).unwrap());
    let gradients: AttendGradientBuffers<f32> = case.backward(&out, |problem, upstream, gradients| {
        f32::attend_backward(exec, problem, upstream, gradients).unwrap();
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
    ];
    all.concat().into_iter().map(f32::to_bits).collect()
}

/// A range that hides nothing costs no bit, and neither does the causal limit put as one.
#[test]
fn ranges_that_say_what_is_so_anyway_change_nothing() {
    for isa in available() {
        for seed in 0..12 {
            let rng = &mut Rng::new(seed);
            let options =
                AttendOptions { keys: 150 + rng.below(150), ranges: Ranges::Absent, ..AttendOptions::random(rng) };
            let case = AttendCase::<f32>::new(rng, options);
            let (queries, keys) = (options.queries as i64, options.keys as i64);
            let with = |causal: bool, pair: &dyn Fn(i64) -> [i64; 2]| {
                let mut case = case.clone();
                case.options.causal = causal;
                let pairs: Vec<_> = (0..queries).map(pair).collect();
                case.ranges = Some(KeyRanges::from_slice(&pairs, [1, queries as usize], keys as usize));
                case
            };
            let exec = Exec { isa, threads: 2 };
            let plain = bits(exec, &case);
            assert!(bits(exec, &with(options.causal, &|_| [-1, keys + 7])) == plain, "{options:?}");
            if options.causal {
                assert!(bits(exec, &with(false, &|i| [0, i + 1 + keys - queries])) == plain, "{options:?}");
            }
        }
    }
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
                let aligned = align.forward(|problem, outputs| f32::align(exec, problem, outputs).unwrap());
                let align_gradients = align.backward(&aligned, |problem, upstream, gradients| {
                    f32::align_backward(exec, problem, upstream, gradients).unwrap();
                });
                let all = [
                    aligned.aligned.values(),
                    aligned.basis.values(),
                    align_gradients.key.values(),
                    align_gradients.value.values(),
                    align_gradients.keep.values(),
                    align_gradients.mix.values(),
                ];
                let aligned = all.concat().into_iter().map(f32::to_bits);
                bits(exec, &attend).into_iter().chain(aligned).collect::<Vec<_>>()
            };
            let one = run(1);
            assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one), "{isa:?}, seed {seed}");
        }
    }
}
