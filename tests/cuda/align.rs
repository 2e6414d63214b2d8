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
    run_forward_of(case, case.options.dim)
}

/// The same with so many real components of a key.
fn run_forward_of<T: Element<Acc: Plain> + Plain>(case: &AlignCase<T>, real: usize) -> AlignBuffers<T> {
    let mut gpu = Gpu::new();
    let problem = AlignProblem { dim: real, ..problem(&mut gpu, case) }.validated().unwrap();
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
    run_backward_of(case, basis, case.options.dim)
}

fn run_backward_of<T: Element<Acc: Plain> + Plain>(
    case: &AlignCase<T>,
    basis: &Tensor<T::Acc, 5>,
    dim: usize,
) -> AlignGradientBuffers<T> {
    let mut gpu = Gpu::new();
    let problem =
        AlignProblem { basis: Some(input(&mut gpu, basis)), dim, ..problem(&mut gpu, case) }.validated().unwrap();
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

/// keep = I and mix = 0, as a model starts: every key comes out as it went in, bit for bit.
fn check_start<T: Element<Acc: Plain> + Plain>(dim: usize, tokens: usize) {
    let options = AlignOptions {
        dim,
        tokens,
        given: tokens < 8,
        batch: 1,
        modalities: 3,
        layout: Layout::Interleaved,
        ..AlignOptions::default()
    };
    let mut case = AlignCase::<T>::new(&mut Rng::new(20), AlignOptions { padding: Padding::Left, ..options });
    case.mix = Tensor::new(vec![T::Acc::ZERO; case.mix.len()], case.mix.shape);
    let identity = |at: usize| if (at % (dim * dim)).is_multiple_of(dim + 1) { T::Acc::ONE } else { T::Acc::ZERO };
    case.keep = Tensor::new((0..case.keep.len()).map(identity).collect(), case.keep.shape);
    let bits = |tensor: &Tensor<T, 4>| tensor.widened().values().into_iter().map(f64::to_bits).collect::<Vec<_>>();
    assert!(bits(&run_forward(&case).aligned) == bits(&case.key), "{:?}", T::DTYPE);
}

#[test]
fn at_its_start_no_key_changes() {
    check_start::<f32>(32, 70);
    check_start::<f64>(8, 66);
    check_start::<bf16>(32, 70);
    check_start::<f16>(72, 70);
    check_start::<bf16>(64, 5);
}

/// A head dimension that is no multiple of 8: rows filled up with zeros, which get no eps.
#[test]
fn filled_rows_change_nothing() {
    const DIM: usize = 5;
    const FILLED: usize = 8;
    fn filled<T: Element, const R: usize>(tensor: &Tensor<T, R>, axes: usize) -> Tensor<T, R> {
        let mut shape = tensor.shape;
        shape[R - axes..].fill(FILLED);
        let mut values = vec![T::default(); shape.iter().product()];
        for (at, value) in tensor.values().into_iter().enumerate() {
            let (row, column) = (at / DIM, at % DIM);
            let row = if axes == 2 { row / DIM * FILLED + row % DIM } else { row };
            values[row * FILLED + column] = value;
        }
        Tensor::new(values, shape)
    }
    fn cut<T: Element, const R: usize>(tensor: &Tensor<T, R>, axes: usize) -> Tensor<T, R> {
        let mut shape = tensor.shape;
        shape[R - axes..].fill(DIM);
        let inside = |at: &usize| at % FILLED < DIM && (axes == 1 || at / FILLED % FILLED < DIM);
        let kept = (0..tensor.len()).filter(inside).map(|at| tensor.flat(at));
        Tensor::new(kept.collect(), shape)
    }
    let options = AlignOptions { dim: DIM, tokens: 20, given: false, basis_used: true, ..AlignOptions::default() };
    let case = AlignCase::<f64>::new(&mut Rng::new(30), options);
    let wide = AlignCase {
        options: AlignOptions { dim: FILLED, ..options },
        key: filled(&case.key, 1),
        value: filled(&case.value, 1),
        keep: filled(&case.keep, 2),
        mix: filled(&case.mix, 2),
        aligned_gradient: filled(&case.aligned_gradient, 1),
        basis_gradient: case.basis_gradient.as_ref().map(|gradient| filled(gradient, 2)),
        ..case.clone()
    };
    let got = run_forward_of(&wide, DIM);
    let gradients = run_backward_of(&wide, &got.basis, DIM);
    case.check_forward(&AlignBuffers { aligned: cut(&got.aligned, 1), basis: cut(&got.basis, 2) });
    case.check_backward(&AlignGradientBuffers {
        key: cut(&gradients.key, 1),
        value: cut(&gradients.value, 1),
        keep: cut(&gradients.keep, 2),
        mix: cut(&gradients.mix, 2),
        basis: None,
    });
}

#[test]
fn no_token_is_a_problem_too() {
    let options = AlignOptions { tokens: 0, dim: 8, ..AlignOptions::default() };
    check::<f32>(options, 40);
    check::<bf16>(AlignOptions { tokens: 5, batch: 0, ..options }, 41);
    check::<bf16>(AlignOptions { tokens: 5, heads: 0, basis_used: true, ..options }, 42);
    check::<f32>(AlignOptions { tokens: 5, batch: 0, given: true, ..options }, 43);
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

/// Head dimensions whose tiles are cut differently.
#[test]
fn large_heads_match_the_specification() {
    let options = AlignOptions { batch: 1, heads: 1, tokens: 21, padding: Padding::Right, ..AlignOptions::default() };
    check::<bf16>(AlignOptions { dim: 136, ..options }, 50);
    check::<f32>(AlignOptions { dim: 136, kind: Basis::Gram, ..options }, 51);
}

#[test]
fn the_largest_heads_match_the_specification() {
    let options = AlignOptions { batch: 1, heads: 1, dim: 256, tokens: 70, ..AlignOptions::default() };
    check::<bf16>(AlignOptions { padding: Padding::Left, storage: Storage::TokensFirst, ..options }, 70);
    check::<f16>(AlignOptions { dim: 200, tokens: 9, kind: Basis::Gram, basis_used: true, ..options }, 71);
    check::<f32>(AlignOptions { tokens: 33, given: true, ..options }, 72);
    check::<f64>(AlignOptions { dim: 248, tokens: 5, ..options }, 73);
}

#[test]
fn many_modalities_match_the_specification() {
    let options = AlignOptions { layout: Layout::Interleaved, batch: 1, dim: 40, ..AlignOptions::default() };
    check::<bf16>(AlignOptions { modalities: 5, tokens: 130, context: Context::Prompt, ..options }, 80);
    check::<f32>(AlignOptions { modalities: 6, tokens: 70, kind: Basis::Gram, basis_used: true, ..options }, 81);
    let options = AlignOptions { modalities: 254, dim: 8, heads: 1, ..options };
    check::<f32>(AlignOptions { tokens: 300, layout: Layout::Middle, ..options }, 82);
    check::<bf16>(AlignOptions { tokens: 3, given: true, ..options }, 83);
}

/// A decoding step: one launch without workspace.
#[test]
fn few_tokens_match_the_specification() {
    let options = AlignOptions { given: true, modalities: 3, layout: Layout::Interleaved, ..AlignOptions::default() };
    let forward = |case: AlignCase<bf16>| case.check_forward(&run_forward(&case));
    for (seed, tokens, dim, padding) in
        [(60, 1, 128, Padding::None), (61, 5, 40, Padding::Left), (62, 8, 72, Padding::WholeRow)]
    {
        forward(AlignCase::new(
            &mut Rng::new(seed),
            AlignOptions { tokens, dim, padding, storage: Storage::TokensFirst, ..options },
        ));
    }
    let case = AlignCase::<f32>::new(&mut Rng::new(63), AlignOptions { tokens: 2, dim: 256, ..options });
    case.check_forward(&run_forward(&case));
    let case = AlignCase::<f64>::new(&mut Rng::new(64), AlignOptions { tokens: 4, dim: 64, ..options });
    case.check_forward(&run_forward(&case));
}
