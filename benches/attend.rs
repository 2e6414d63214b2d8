//! Attention on one thread, through the public kernels: forward and backward in every dtype and instruction set, and
//! forward where one of its parts dominates. Throughput is floating point operations of the products a second.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{AttendCase, AttendOptions, Rng};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use moda_attn::cpu::{CpuElement, Exec};
use moda_attn::dispatch::{self, Isa};
use moda_attn::dtype::Element;
use std::time::Duration;

/// One group of four query heads and their key head.
fn shape() -> AttendOptions {
    AttendOptions { batch: 1, heads: 4, key_heads: 1, queries: 512, keys: 512, dim: 128, ..AttendOptions::default() }
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> Group<'a> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    group
}

/// Operations of the two products of forward over the visible pairs.
fn operations(options: AttendOptions) -> u64 {
    let AttendOptions { batch, heads, queries, keys, dim, causal, .. } = options;
    let pairs = if causal { queries * (2 * keys - queries + 1) / 2 } else { queries * keys };
    (4 * batch * heads * pairs * dim) as u64
}

fn forward<T: CpuElement>(group: &mut Group<'_>, name: &str, isa: Isa, options: AttendOptions) {
    let case = AttendCase::<T>::new(&mut Rng::new(0), options);
    let exec = Exec { isa, threads: 1 };
    group.throughput(Throughput::Elements(operations(options)));
    group.bench_function(id::<T>(name, isa), |bencher| {
        case.forward(|problem, outputs| {
            outputs.mass = None;
            bencher.iter(|| T::attend(exec, problem, outputs).unwrap());
        });
    });
}

fn backward<T: CpuElement>(group: &mut Group<'_>, isa: Isa, options: AttendOptions) {
    let case = AttendCase::<T>::new(&mut Rng::new(0), options);
    let exec = Exec { isa, threads: 1 };
    let written = case.forward(|problem, outputs| T::attend(exec, problem, outputs).unwrap());
    // Five products instead of two.
    group.throughput(Throughput::Elements(operations(options) / 2 * 5));
    group.bench_function(id::<T>("", isa), |bencher| {
        case.backward(&written, |problem, upstream, gradients| {
            bencher.iter(|| T::attend_backward(exec, problem, upstream, gradients).unwrap());
        });
    });
}

fn id<T: Element>(name: &str, isa: Isa) -> BenchmarkId {
    BenchmarkId::new(format!("{}{name}", T::DTYPE.name()), isa.name())
}

/// What is worth timing: scalar code is for machines that have nothing else.
fn instruction_sets() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|&isa| isa.is_available() && isa != Isa::Scalar)
}

fn every_dtype(criterion: &mut Criterion) {
    let mut forwards = group(criterion, "attend forward");
    for isa in instruction_sets() {
        forward::<f32>(&mut forwards, "", isa, shape());
        forward::<bf16>(&mut forwards, "", isa, shape());
        forward::<f16>(&mut forwards, "", isa, shape());
        forward::<f64>(&mut forwards, "", isa, shape());
    }
    forwards.finish();
    let mut backwards = group(criterion, "attend backward");
    for isa in instruction_sets() {
        backward::<f32>(&mut backwards, isa, shape());
        backward::<bf16>(&mut backwards, isa, shape());
    }
    backwards.finish();
}

/// The same kernel where one part of it takes most of the time.
fn parts(criterion: &mut Criterion) {
    let isa = dispatch::choice().expect("MODA_ATTN_ISA names an instruction set of this machine").isa;
    let square = AttendOptions { queries: 256, keys: 256, causal: false, ..shape() };
    let mut parts = group(criterion, "attend forward, mostly");
    for (name, options) in [
        (" products (D 256)", AttendOptions { dim: 256, ..square }),
        (" softmax (D 16)", AttendOptions { dim: 16, ..square }),
        (" packing (4 queries a key)", AttendOptions { queries: 1, keys: 2048, heads: 4, ..shape() }),
        (" the edges of blocks (N 97, D 40)", AttendOptions { queries: 97, keys: 97, dim: 40, ..shape() }),
        (" the call (N 1, D 16)", AttendOptions { queries: 1, keys: 1, heads: 1, dim: 16, ..shape() }),
    ] {
        forward::<f32>(&mut parts, name, isa, options);
        forward::<bf16>(&mut parts, name, isa, options);
    }
    parts.finish();
}

criterion_group!(benches, every_dtype, parts);
criterion_main!(benches);
