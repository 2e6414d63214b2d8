//! Problems on a device are held to the rules of the CPU's, in the same words, and to those of the kernels.

use moda_attn::cuda::DeviceTensor;
use moda_attn::cuda::problem::{AlignProblem, AttendOutputs, AttendProblem, SinkProblem, Target};
use moda_attn::dtype::DType;
use moda_attn::ids::Ids;
use moda_attn::problem::{self, Basis, Combine};
use moda_attn::view::View;

const PLACE: u64 = 1 << 20;

fn on_device<const R: usize>(dtype: DType, shape: [usize; R]) -> DeviceTensor<R> {
    DeviceTensor::contiguous(PLACE, dtype, shape)
}

fn attend() -> AttendProblem {
    let (float, ids) = (DType::BFloat16, DType::Int64);
    AttendProblem {
        target: Target::SM_80,
        record: 0,
        query: on_device(float, [2, 4, 5, 8]),
        key: on_device(float, [2, 2, 6, 8]),
        value: on_device(float, [2, 2, 6, 8]),
        modality: on_device(ids, [2, 6]),
        query_modality: on_device(ids, [2, 5]),
        sink: Some(on_device(DType::Float32, [1, 4, 5, 1])),
        bias: Some(on_device(DType::Float32, [2, 1, 3, 3])),
        key_range: Some(on_device(DType::Int32, [1, 5, 2])),
        causal: true,
        scale: 0.5,
        combine: Combine::Joint,
        num_modalities: Some(3),
    }
}

fn align() -> AlignProblem {
    AlignProblem {
        target: Target::SM_80,
        record: 0,
        key: on_device(DType::Float16, [2, 3, 7, 16]),
        value: on_device(DType::Float16, [2, 3, 7, 16]),
        modality: on_device(DType::UInt8, [2, 7]),
        context: Some(on_device(DType::Bool, [2, 7])),
        keep: on_device(DType::Float32, [2, 16, 16]),
        mix: on_device(DType::Float32, [2, 16, 16]),
        basis: None,
        kind: Basis::Covariance,
        eps: 1e-6,
        dim: 16,
    }
}

#[test]
fn good_problems_are_good_and_repeat_what_is_given_once() {
    let problem = attend().validated().unwrap();
    let sink = problem.sink.unwrap();
    assert_eq!((sink.shape, sink.strides[0]), ([2, 4, 5, 1], 0));
    let bias = problem.bias.unwrap();
    assert_eq!((bias.shape, bias.strides[1]), ([2, 4, 3, 3], 0));
    let range = problem.key_range.unwrap();
    assert_eq!((range.shape, range.strides[0]), ([2, 5, 2], 0));
    align().validated().unwrap();
}

/// The message that a problem of the same shapes on the CPU gets.
fn on_the_cpu(given: &AttendProblem) -> String {
    let numbers = vec![0f32; 1 << 16];
    let ids = |shape: [usize; 2]| Ids::new(&vec![0; shape[0] * shape[1]], shape).unwrap();
    let (modality, query_modality) = (ids(given.modality.shape), ids(given.query_modality.shape));
    let view = |tensor: DeviceTensor<4>| View::from_slice(&numbers, tensor.shape);
    let mut problem = problem::AttendProblem::new(
        view(given.query),
        [view(given.key), view(given.value)],
        &modality,
        &query_modality,
    );
    (problem.sink, problem.bias) = (given.sink.map(view), given.bias.map(view));
    (problem.scale, problem.combine) = (given.scale as f32, given.combine);
    problem.num_modalities = given.num_modalities;
    problem.validated().unwrap_err().to_string()
}

#[test]
fn shapes_that_do_not_fit_are_refused_in_the_words_of_the_cpu() {
    let good = attend();
    let (float, small) = (DType::BFloat16, DType::Float32);
    let bad = [
        AttendProblem { key: on_device(float, [2, 2, 6, 16]), ..good },
        AttendProblem { value: on_device(float, [2, 2, 5, 8]), ..good },
        AttendProblem { query: on_device(float, [2, 3, 5, 8]), ..good },
        AttendProblem { modality: on_device(DType::Int8, [2, 7]), ..good },
        AttendProblem { query_modality: on_device(DType::Int8, [1, 5]), ..good },
        AttendProblem { sink: Some(on_device(small, [2, 2, 5, 1])), ..good },
        AttendProblem { sink: Some(on_device(small, [2, 4, 5, 1])), combine: Combine::Split, ..good },
        AttendProblem { bias: Some(on_device(small, [1, 1, 3, 4])), ..good },
        AttendProblem { num_modalities: Some(4), ..good },
        AttendProblem { scale: f64::NAN, ..good },
    ];
    for problem in bad {
        assert_eq!(problem.validated().unwrap_err().to_string(), on_the_cpu(&problem));
    }
}

#[test]
fn what_only_the_kernels_ask_for_is_said() {
    let message = |problem: AttendProblem| problem.validated().unwrap_err().to_string();
    let good = attend();
    let integers = AttendProblem { query: on_device(DType::Int32, [2, 4, 5, 8]), ..good };
    assert_eq!(message(integers), "query has dtype int32; wanted float16, bfloat16, float32 or float64");
    let mixed = AttendProblem { key: on_device(DType::Float16, [2, 2, 6, 8]), ..good };
    assert_eq!(message(mixed), "key has dtype float16; wanted bfloat16");
    let narrow = AttendProblem { sink: Some(on_device(DType::BFloat16, [1, 4, 5, 1])), ..good };
    assert_eq!(message(narrow), "sink has dtype bfloat16; wanted float32");
    let flags = AttendProblem { modality: on_device(DType::Bool, [2, 6]), ..good };
    assert_eq!(message(flags), "modality has dtype bool; wanted an integer dtype");

    let sizes = |dim| AttendProblem {
        query: on_device(DType::Float32, [2, 4, 5, dim]),
        key: on_device(DType::Float32, [2, 2, 6, dim]),
        value: on_device(DType::Float32, [2, 2, 6, dim]),
        ..good
    };
    for dim in [12, 264] {
        let wanted = "wanted a head dimension D that is a multiple of 8 and at most 256 on CUDA";
        assert_eq!(message(sizes(dim)), format!("query has shape (2, 4, 5, {dim}); {wanted}"));
    }
    let odd = AttendProblem { value: DeviceTensor { pointer: PLACE + 8, ..good.value }, ..good };
    assert!(message(odd).contains("value has shape (2, 2, 6, 8) with strides"), "{}", message(odd));
    let crowd = AttendProblem { bias: None, num_modalities: Some(255), ..good };
    assert_eq!(message(crowd), "num_modalities is for 255 modalities; wanted at most 254 on CUDA");
}

#[test]
fn alignment_and_pseudo_scores_are_checked_too() {
    let message = |problem: AlignProblem| problem.validated().unwrap_err().to_string();
    let good = align();
    let context = Some(on_device(DType::Int8, [2, 7]));
    assert_eq!(message(AlignProblem { context, ..good }), "context has dtype int8; wanted bool");
    let keep = on_device(DType::Float32, [2, 16, 8]);
    assert_eq!(message(AlignProblem { keep, ..good }), "keep has shape (2, 16, 8); wanted (2, 16, 16) = (M, D, D)");
    let mix = on_device(DType::Float16, [2, 16, 16]);
    assert_eq!(message(AlignProblem { mix, ..good }), "mix has dtype float16; wanted float32");
    let sink = SinkProblem {
        target: Target::SM_80,
        record: 0,
        position: on_device(DType::Int64, [2, 5]),
        query_modality: on_device(DType::Int8, [2, 5]),
        span: 9,
        decay: on_device(DType::Float32, [2, 4]),
        base: on_device(DType::Float32, [2, 4]),
    };
    assert_eq!(sink.validated().unwrap().shape(), [2, 4, 5]);
    let base = on_device(DType::Float64, [2, 4]);
    let error = SinkProblem { base, ..sink }.validated().unwrap_err();
    assert_eq!(error.to_string(), "base has dtype float64; wanted float32");
    assert!(SinkProblem { span: -1, ..sink }.validated().is_err());
}

#[test]
fn results_go_into_contiguous_tensors_of_their_shape() {
    let problem = attend().validated().unwrap();
    let good = AttendOutputs {
        out: on_device(DType::BFloat16, [2, 4, 5, 8]),
        logsumexp: on_device(DType::Float32, [2, 4, 1, 5]),
        parts: None,
        mass: None,
    };
    problem.check_outputs(&good).unwrap();
    let message = |outputs: AttendOutputs| problem.check_outputs(&outputs).unwrap_err().to_string();
    let out = on_device(DType::BFloat16, [2, 4, 6, 8]);
    assert_eq!(message(AttendOutputs { out, ..good }), "out has shape (2, 4, 6, 8); wanted (2, 4, 5, 8)");
    let logsumexp = on_device(DType::Float64, [2, 4, 1, 5]);
    assert_eq!(message(AttendOutputs { logsumexp, ..good }), "logsumexp has dtype float64; wanted float32");
    let out = DeviceTensor { strides: [160, 8, 32, 1], ..good.out };
    assert!(message(AttendOutputs { out, ..good }).contains("wanted a contiguous tensor"));
}
