//! Duplex alignment, forward and backward.

use crate::common::{
    AlignBuffers, AlignCase, AlignGradientBuffers, AlignOptions, Context, Layout, Padding, Rng, Storage,
};
use crate::common::{Tensor, assert_close, tolerance};
use crate::device::{ids, input, output, record, values};
use crate::emulator::{Gpu, Plain};
use half::{bf16, f16};
use moda_attn::cuda::DeviceTensor;
use moda_attn::cuda::align::{backward, backward_workspace, forward, forward_workspace};
use moda_attn::cuda::problem::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, IdsRecord, Target};
use moda_attn::dtype::{DType, Element, Real};
use moda_attn::ids::PADDING;
use moda_attn::problem::Basis;

/// Everything of a case but the basis on the device.
fn problem<T: Element<Acc: Plain> + Plain>(gpu: &mut Gpu, case: &AlignCase<T>) -> AlignProblem {
    let [batch, tokens] = case.sources.shape();
    let inside: Vec<u8> = (0..batch).flat_map(|b| case.sources.row(b)).map(|&id| u8::from(id != PADDING)).collect();
    let context = DeviceTensor::contiguous(gpu.buffer(&inside), DType::Bool, [batch, tokens]);
    AlignProblem {
        target: Target::SM_80,
        record: record(gpu),
        key: input(gpu, &case.key),
        value: input(gpu, &case.value),
        modality: ids(gpu, &case.modality),
        context: (case.options.context != Context::All).then_some(context),
        keep: input(gpu, &case.keep),
        mix: input(gpu, &case.mix),
        basis: case.basis.as_ref().map(|basis| input(gpu, basis)),
        kind: case.options.kind,
        eps: case.eps.to_f64(),
        dim: case.options.dim,
    }
}

fn run_forward<T: Element<Acc: Plain> + Plain>(case: &AlignCase<T>) -> AlignBuffers<T> {
    let mut gpu = Gpu::new();
    let problem = problem(&mut gpu, case).validated().unwrap();
    let AlignOptions { batch, heads, modalities, dim, .. } = case.options;
    let basis = case.basis.is_none().then(|| output::<T::Acc, 5>(&mut gpu, [batch, heads, modalities, dim, dim]));
    let outputs = AlignOutputs { aligned: output::<T, 4>(&mut gpu, case.key.shape), basis };
    problem.check_outputs(&outputs).unwrap();
    let workspace = gpu.output::<u8>(forward_workspace(&problem));
    gpu.run(&forward(&problem, &outputs, workspace).unwrap());
    assert_eq!(IdsRecord(gpu.read(problem.record)[0]).offender(), None);
    let basis = outputs.basis.map(|basis| values(&gpu, basis));
    AlignBuffers { aligned: values(&gpu, outputs.aligned), basis: basis.or(case.basis.clone()).unwrap() }
}

fn run_backward<T: Element<Acc: Plain> + Plain>(
    case: &AlignCase<T>,
    basis: &Tensor<T::Acc, 5>,
) -> AlignGradientBuffers<T> {
    let mut gpu = Gpu::new();
    let problem = AlignProblem { basis: Some(input(&mut gpu, basis)), ..problem(&mut gpu, case) }.validated().unwrap();
    let upstream = AlignUpstream {
        aligned: input(&mut gpu, &case.aligned_gradient),
        basis: case.basis_gradient.as_ref().map(|gradient| input(&mut gpu, gradient)),
        computed: case.basis.is_none(),
    };
    problem.check_upstream(&upstream).unwrap();
    let gradients = AlignGradients {
        key: output::<T, 4>(&mut gpu, case.key.shape),
        value: output::<T, 4>(&mut gpu, case.value.shape),
        keep: output::<T::Acc, 3>(&mut gpu, case.keep.shape),
        mix: output::<T::Acc, 3>(&mut gpu, case.mix.shape),
        basis: case.basis.as_ref().map(|basis| output::<T::Acc, 5>(&mut gpu, basis.shape)),
    };
    problem.check_gradients(&gradients).unwrap();
    let workspace = gpu.output::<u8>(backward_workspace(&problem));
    gpu.run(&backward(&problem, &upstream, &gradients, workspace).unwrap());
    AlignGradientBuffers {
        key: values(&gpu, gradients.key),
        value: values(&gpu, gradients.value),
        keep: values(&gpu, gradients.keep),
        mix: values(&gpu, gradients.mix),
        basis: gradients.basis.map(|basis| values(&gpu, basis)),
    }
}

/// Bases are held to the tolerance of the type they are computed in.
fn check<T: Element<Acc: Plain> + Plain>(options: AlignOptions, seed: u64) {
    let case = AlignCase::<T>::new(&mut Rng::new(seed), options);
    let got = run_forward(&case);
    case.check_forward(&got);
    let (allowed, _) = tolerance::<T::Acc>();
    assert_close(&format!("basis of {options:?}"), &got.basis.values(), &case.truth().basis.values(), allowed);
    case.check_backward(&run_backward(&case, &got.basis));
}

/// One case after the other with every option met in them.
fn cases(dims: [usize; 4], tokens: [usize; 4]) -> [AlignOptions; 4] {
    let some = |at: usize| AlignOptions {
        batch: 2,
        heads: 2,
        tokens: tokens[at],
        dim: dims[at],
        storage: [Storage::TokensFirst, Storage::Contiguous, Storage::Reversed, Storage::Contiguous][at],
        ..AlignOptions::default()
    };
    [
        AlignOptions { padding: Padding::Right, basis_used: true, ..some(0) },
        AlignOptions {
            kind: Basis::Gram,
            layout: Layout::Interleaved,
            modalities: 3,
            context: Context::Prompt,
            ..some(1)
        },
        AlignOptions { padding: Padding::WholeRow, layout: Layout::Last, given: true, ..some(2) },
        AlignOptions {
            padding: Padding::Left,
            layout: Layout::First,
            context: Context::Empty,
            modalities: 1,
            batch: 1,
            ..some(3)
        },
    ]
}

#[test]
fn float32_matches_the_specification() {
    cases([32, 40, 64, 72], [70, 63, 1, 33])
        .into_iter()
        .zip(0..)
        .for_each(|(options, seed)| check::<f32>(options, seed));
}

#[test]
fn float64_matches_the_specification() {
    cases([40, 32, 32, 64], [33, 65, 7, 16])
        .into_iter()
        .zip(4..)
        .for_each(|(options, seed)| check::<f64>(options, seed));
}

#[test]
fn bfloat16_matches_the_specification() {
    cases([64, 40, 72, 32], [130, 63, 1, 70])
        .into_iter()
        .zip(8..)
        .for_each(|(options, seed)| check::<bf16>(options, seed));
}

#[test]
fn float16_matches_the_specification() {
    cases([32, 72, 40, 64], [70, 65, 33, 7])
        .into_iter()
        .zip(12..)
        .for_each(|(options, seed)| check::<f16>(options, seed));
}
