//! Duplex alignment on one thread, through the public kernels. Throughput is floating point operations of the products
//! that grow with the tokens: basis, keep and mix.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{AlignCase, AlignOptions, Rng};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use moda_attn::cpu::{CpuElement, Exec};
use moda_attn::dispatch::Isa;
use std::time::Duration;

type Group<'a> = BenchmarkGroup<'a, WallTime>;

fn sizes(tokens: usize, dim: usize, given: bool) -> AlignOptions {
    AlignOptions { batch: 1, heads: 1, tokens, dim, given, ..AlignOptions::default() }
}

fn forward<T: CpuElement>(group: &mut Group<'_>, isa: Isa, options: AlignOptions) {
    let case = AlignCase::<T>::new(&mut Rng::new(0), options);
    let exec = Exec { isa, threads: 1 };
    case.forward(|problem, outputs| {
        measure::<T>(group, isa, options, 1, || T::align(exec, problem, outputs).unwrap());
    });
}

fn backward<T: CpuElement>(group: &mut Group<'_>, isa: Isa, options: AlignOptions) {
    let case = AlignCase::<T>::new(&mut Rng::new(0), options);
    let exec = Exec { isa, threads: 1 };
    let written = case.forward(|problem, outputs| T::align(exec, problem, outputs).unwrap());
    case.backward(&written, |problem, upstream, gradients| {
        // Every product has two gradients.
        measure::<T>(group, isa, options, 2, || T::align_backward(exec, problem, upstream, gradients).unwrap());
    });
}

fn measure<T: CpuElement>(group: &mut Group<'_>, isa: Isa, options: AlignOptions, times: usize, mut run: impl FnMut()) {
    let AlignOptions { tokens, dim, given, .. } = options;
    let products = if given { 2 } else { 3 };
    group.throughput(Throughput::Elements((times * products * 2 * tokens * dim * dim) as u64));
    let what = if given { "given basis" } else { "own basis" };
    let name = format!("{} N {tokens} D {dim} {what}", T::DTYPE.name());
    group.bench_function(BenchmarkId::new(name, isa.name()), |bencher| bencher.iter(&mut run));
}

fn align(criterion: &mut Criterion) {
    for (name, wanted) in [("align forward", true), ("align backward", false)] {
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
        for isa in Isa::ALL.into_iter().filter(|&isa| isa.is_available() && isa != Isa::Scalar) {
            for options in [sizes(1024, 128, false), sizes(1024, 64, false), sizes(1, 128, true)] {
                if wanted {
                    forward::<f32>(&mut group, isa, options);
                    forward::<bf16>(&mut group, isa, options);
                } else {
                    backward::<f32>(&mut group, isa, options);
                }
            }
        }
        group.finish();
    }
}

criterion_group!(benches, align);
criterion_main!(benches);
