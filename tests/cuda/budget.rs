//! What the compiler makes of the kernels: registers, spills and shared memory of every specialisation of the common grid,
//! for sm_80 and sm_90, against the most that each may take.

use moda_attn::cuda::nvrtc::{Nvrtc, Want};
use moda_attn::cuda::problem::{
    AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, AttendGradients, AttendOutputs, AttendProblem,
    AttendUpstream, Target,
};
use moda_attn::cuda::{DeviceTensor, Kernel, Launch, Source, align, attend};
use moda_attn::dtype::DType;
use moda_attn::problem::{Basis, Combine, MassBy};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where all the tensors of a plan would lie; nothing is launched.
const SOMEWHERE: u64 = 1 << 20;

/// One point of the grid.
#[derive(Debug, Clone, Copy)]
struct Point {
    dtype: DType,
    dim: usize,
    queries: usize,
    causal: bool,
    /// Sinks, bias table, key ranges, mass.
    everything: bool,
    combine: Combine,
}

fn tensor<const R: usize>(dtype: DType, shape: [usize; R]) -> DeviceTensor<R> {
    DeviceTensor::contiguous(SOMEWHERE, dtype, shape)
}

/// All launches of attention, forward and backward.
fn attention(point: Point, target: Target) -> Vec<Launch> {
    let Point { dtype, dim, queries, causal, everything, combine } = point;
    let (batch, heads, key_heads, keys, modalities) = (1, 8, 2, 1024, 2);
    let parts = combine.parts();
    let some = |want: bool, shape: [usize; 4]| want.then(|| tensor(DType::Float32, shape));
    let query = tensor(dtype, [batch, heads, queries, dim]);
    let key = tensor(dtype, [batch, key_heads, keys, dim]);
    let problem = AttendProblem {
        target,
        record: SOMEWHERE,
        query,
        key,
        value: key,
        modality: tensor(DType::Int64, [batch, keys]),
        query_modality: tensor(DType::Int64, [batch, queries]),
        sink: some(true, [batch, heads, queries, parts]),
        bias: some(everything, [batch, heads, modalities, modalities]),
        key_range: everything.then(|| tensor(DType::Int32, [batch, queries, 2])),
        causal,
        scale: 0.125,
        combine,
        num_modalities: Some(modalities),
    };
    let problem = problem.validated().unwrap();
    let logsumexp = tensor(DType::Float32, [batch, heads, parts, queries]);
    let by_parts = (parts == 2).then(|| tensor(DType::Float32, [batch, heads, 2, queries, dim]));
    let outputs = AttendOutputs {
        out: query,
        logsumexp,
        parts: by_parts,
        mass: everything.then(|| (MassBy::Relation, tensor(DType::Float32, [batch, heads, queries, 3]))),
    };
    let upstream = AttendUpstream { out_gradient: query, out: query, logsumexp, parts: by_parts };
    let gradients = AttendGradients { query, key, value: key, sink: problem.sink, bias: problem.bias };
    let mut launches = attend::forward(&problem, &outputs, SOMEWHERE).unwrap();
    launches.extend(attend::backward(&problem, &upstream, &gradients, SOMEWHERE).unwrap());
    launches
}

/// All launches of alignment, forward and backward.
fn alignment(dtype: DType, dim: usize, kind: Basis, target: Target) -> Vec<Launch> {
    let (batch, heads, tokens, modalities) = (1, 2, 512, 2);
    let key = tensor(dtype, [batch, heads, tokens, dim]);
    let matrices = tensor(DType::Float32, [modalities, dim, dim]);
    let basis = tensor(DType::Float32, [batch, heads, modalities, dim, dim]);
    let problem = AlignProblem {
        target,
        record: SOMEWHERE,
        key,
        value: key,
        modality: tensor(DType::Int64, [batch, tokens]),
        context: None,
        keep: matrices,
        mix: matrices,
        basis: None,
        kind,
        eps: 1e-6,
        dim,
    };
    let problem = problem.validated().unwrap();
    let outputs = AlignOutputs { aligned: key, basis: Some(basis) };
    let mut launches = align::forward(&problem, &outputs, SOMEWHERE).unwrap();
    let problem = AlignProblem { basis: Some(basis), ..problem };
    let upstream = AlignUpstream { aligned: key, basis: Some(basis), computed: true };
    let gradients = AlignGradients { key, value: key, keep: matrices, mix: matrices, basis: None };
    launches.extend(align::backward(&problem, &upstream, &gradients, SOMEWHERE).unwrap());
    launches
}

/// What the assembler says of one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Usage {
    registers: usize,
    /// Bytes of local memory a thread: registers that were spilled, arrays indexed by what is not constant.
    stack: usize,
    /// Bytes of shared memory that the kernel declares itself.
    shared: usize,
}

/// The number before `unit` in a report such as `8 bytes stack frame`.
fn number(report: &str, unit: &str) -> Option<usize> {
    let before = &report[..report.find(unit)?];
    before.split_whitespace().last()?.parse().ok()
}

/// Reads the report of one of the kernels that a text was compiled to.
fn usage(log: &str, entry: &str) -> Usage {
    let start = log.find(&format!("Compiling entry function '{entry}'")).unwrap_or_else(|| panic!("{entry}: {log}"));
    let rest = &log[start..];
    let end = rest[1..].find("Compiling entry function").map_or(rest.len(), |end| end + 1);
    let report = &rest[..end];
    let registers = report.split_once("Used ").and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    Usage {
        registers: registers.unwrap_or_else(|| panic!("{entry}: no registers in {log}")),
        stack: number(report, " bytes stack frame").unwrap_or_else(|| panic!("{entry}: no stack in {log}")),
        shared: number(report, " bytes smem").unwrap_or(0),
    }
}

/// Blocks that a multiprocessor holds at once.
fn blocks_at_once(usage: Usage, launch: &Launch, target: Target) -> usize {
    let registers = launch.block as usize * usage.registers.next_multiple_of(8);
    // Every block takes 1024 bytes of shared memory beside its own.
    let shared = usage.shared + launch.shared as usize + 1024;
    let limit = target.shared_limit as usize + 1024;
    (65_536 / registers).min(limit / shared).min(2048 / launch.block as usize)
}

/// What a kernel may take: most bytes of local memory a thread, fewest blocks that a multiprocessor holds at once.
fn budget(kernel: &Kernel) -> (usize, usize) {
    let dim = kernel.defines.iter().find(|(name, _)| *name == "HEAD_DIM").map_or(0, |&(_, dim)| dim);
    match (kernel.entry, dim) {
        // Their sums alone fill the registers.
        ("attend_forward", ..=128) => (160, 2),
        ("attend_keys" | "attend_rows", ..=64) | ("maps" | "mix_gradient" | "others_gradient", _) => (32, 2),
        ("attend_forward" | "attend_keys" | "attend_rows", _) => (160, 1),
        ("token_gradients", _) => (128, 1),
        ("align_keys" | "outer_sums", _) => (32, 1),
        _ => (0, 4),
    }
}

/// The grid of a target: what every change is checked on, or `whole`.
fn grid(target: Target, whole: bool) -> Vec<Launch> {
    let mut launches = Vec::new();
    let dtypes = [DType::BFloat16, DType::Float16, DType::Float32];
    for (dtype, dim) in dtypes.into_iter().flat_map(|dtype| [32, 64, 96, 128, 256].map(|dim| (dtype, dim))) {
        let newest = target.capability >= (9, 0);
        let wanted = match (dtype, dim) {
            (DType::BFloat16, 128) => true,
            (DType::BFloat16, 96) | (DType::Float16, 128) => newest,
            (DType::BFloat16, 64 | 256) | (DType::Float32, 64) => !newest,
            _ => false,
        };
        let usual = wanted && dtype == DType::BFloat16 && [64, 128].contains(&dim);
        if !wanted && !whole {
            continue;
        }
        let plain = Point { dtype, dim, queries: 1024, causal: true, everything: false, combine: Combine::Joint };
        launches.extend(attention(plain, target));
        launches.extend(alignment(dtype, dim, Basis::Covariance, target));
        if usual || whole {
            launches.extend(attention(Point { everything: true, ..plain }, target));
            launches.extend(attention(Point { queries: 1, ..plain }, target));
        }
        if whole {
            launches.extend(attention(Point { causal: false, ..plain }, target));
            launches.extend(attention(Point { combine: Combine::Split, ..plain }, target));
            launches.extend(alignment(dtype, dim, Basis::Gram, target));
        }
    }
    let mut seen = HashSet::new();
    launches.retain(|launch| seen.insert(launch.kernel.clone()));
    launches
}

/// Everything over budget, and how many kernels there were.
fn over_budget(target: Target, whole: bool) -> (Vec<String>, usize) {
    let launches = grid(target, whole);
    // Kernels of one text are compiled together.
    let mut texts: Vec<Vec<&Launch>> = Vec::new();
    for launch in &launches {
        let same = |other: &&Launch| {
            (other.kernel.source, &other.kernel.defines) == (launch.kernel.source, &launch.kernel.defines)
        };
        match texts.iter_mut().find(|text| same(&text[0])) {
            Some(text) => text.push(launch),
            None => texts.push(vec![launch]),
        }
    }
    let (next, over) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(text) = texts.get(next.fetch_add(1, Ordering::Relaxed)) {
            let Kernel { source, defines, .. } = &text[0].kernel;
            let text_of = (source.name(), source.text());
            let nvrtc = Nvrtc::get().unwrap();
            let image = nvrtc.compile((text_of.0, &text_of.1), defines, target.capability, Want::Cubin).unwrap();
            for launch in text {
                let used = usage(&image.log, launch.kernel.entry);
                let at_once = blocks_at_once(used, launch, target);
                let (stack, blocks) = budget(&launch.kernel);
                if used.stack > stack || at_once < blocks {
                    over.lock().unwrap().push(format!(
                        "{} {defines:?} on {:?}: {used:?} and {} bytes of dynamic shared memory for {} threads: {at_once} \
                         blocks at once; allowed are {stack} bytes of stack, wanted {blocks} blocks",
                        launch.kernel.entry, target.capability, launch.shared, launch.block
                    ));
                }
            }
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
    (over.into_inner().unwrap(), launches.len())
}

/// With MODA_ATTN_GRID=whole every specialisation: a quarter of an hour.
#[test]
fn kernels_stay_within_their_budget() {
    let whole = std::env::var_os("MODA_ATTN_GRID").is_some_and(|grid| grid == "whole");
    let mut over = Vec::new();
    for target in [Target::SM_80, Target::SM_90] {
        let (found, count) = over_budget(target, whole);
        println!("sm_{}{}: {count} kernels", target.capability.0, target.capability.1);
        over.extend(found);
    }
    assert!(over.is_empty(), "{}", over.join("\n"));
}

/// The oldest compiler that is promised, beside torch's in the developers' environment. It is stricter than newer ones.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn the_oldest_compiler_takes_every_text() {
    let environment = std::env::var_os("VIRTUAL_ENV").expect("VIRTUAL_ENV: the developers' Python environment");
    let library = "site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12";
    let pythons = std::fs::read_dir(Path::new(&environment).join("lib")).unwrap().flatten();
    let path = pythons.map(|python| python.path().join(library)).find(|path| path.exists());
    let path = path.expect("no NVRTC 12: pip install nvidia-cuda-nvrtc-cu12==12.1.105");
    // The usual one comes first: what is loaded is what the other tests would find.
    let usual = Nvrtc::get().unwrap();
    let oldest = Nvrtc::find(Some(&path), &[]).unwrap();
    assert!(oldest.version() == (12, 1) && oldest.version() < usual.version());

    let half = Point {
        dtype: DType::BFloat16,
        dim: 128,
        queries: 1024,
        causal: true,
        everything: true,
        combine: Combine::Joint,
    };
    let single = Point { dtype: DType::Float32, dim: 64, queries: 3, combine: Combine::Split, ..half };
    let mut launches = [attention(half, Target::SM_90), attention(single, Target::SM_80)].concat();
    launches.extend(alignment(DType::BFloat16, 128, Basis::Covariance, Target::SM_90));
    launches.extend(alignment(DType::Float32, 64, Basis::Gram, Target::SM_80));
    let mut texts: HashSet<_> =
        launches.into_iter().map(|launch| (launch.kernel.source, launch.kernel.defines)).collect();
    let dtype = |code| vec![("DTYPE", code)];
    texts.extend([(Source::Sink, dtype(1)), (Source::Ranges, dtype(0))]);
    texts.insert((Source::AlignFew, vec![("DTYPE", 2), ("HEAD_DIM", 128), ("COUNT", 1)]));
    let sources: HashSet<Source> = texts.iter().map(|&(source, _)| source).collect();
    assert_eq!(sources.len(), Source::ALL.len());
    for (source, defines) in texts {
        oldest.compile((source.name(), &source.text()), &defines, (8, 0), Want::Ptx).unwrap();
    }
    oldest.compile(("attend_sum.cu", &Source::AttendSum.text()), &dtype(2), (9, 0), Want::Cubin).unwrap();
}

#[test]
fn reports_are_read() {
    let log = "ptxas info    : Compiling entry function 'one' for 'sm_80'\n\
        ptxas         .     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n\
        ptxas info    : Used 26 registers, used 1 barriers, 8 bytes cumulative stack size, 2240 bytes smem\n\
        ptxas info    : Compiling entry function 'two' for 'sm_80'\n\
        ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 16 registers, used 0 barriers, 408 bytes cmem[0]\n";
    assert_eq!(usage(log, "one"), Usage { registers: 26, stack: 8, shared: 2240 });
    assert_eq!(usage(log, "two"), Usage { registers: 16, stack: 0, shared: 0 });
}
