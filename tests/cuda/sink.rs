//! The pseudo-scores and their gradients.

use crate::common::{Layout, Padding, Rng, Tensor, assert_each_close, tolerance};
use crate::device::{ids, input, output, record, values};
use crate::emulator::{Gpu, Plain};
use moda_attn::cuda::DeviceTensor;
use moda_attn::cuda::align::{pseudo_sink, pseudo_sink_backward};
use moda_attn::cuda::problem::{SinkProblem, Target};
use moda_attn::dtype::{DType, Real};
use moda_attn::ids::Ids;
use moda_attn::problem::SinkProblem as HostProblem;
use moda_attn::spec::mask;
use moda_attn::view::{View, ViewMut};

const SPAN: i64 = 40;
const SHAPE: [usize; 3] = [2, 3, 50];
const TABLE: [usize; 2] = [3, 3];

fn check<R: Real + Plain>() {
    let rng = &mut Rng::new(7);
    let [batch, heads, queries] = SHAPE;
    let modality: Ids = crate::common::token_ids(rng, [batch, queries], TABLE[0], Layout::Interleaved, Padding::Left);
    let position: Vec<i64> = (0..batch * queries).map(|at| (at % queries) as i64).collect();
    // 0, tiny, ordinary, large and negative decays
    let decays = [0.0, 1e-9, 1e-3, 0.01, 0.5, 4.0, -0.2, 2e-2, -1e-7];
    let decay = Tensor::new(decays.map(R::from_f64).to_vec(), TABLE);
    let base = Tensor::new(rng.normals::<R>(9, 1.0), TABLE);
    let d_sink = Tensor::new(rng.normals::<R>(SHAPE.iter().product(), 1.0), SHAPE);

    let mut gpu = Gpu::new();
    let problem = SinkProblem {
        target: Target::SM_80,
        record: record(&mut gpu),
        position: DeviceTensor::contiguous(gpu.buffer(&position), DType::Int64, [batch, queries]),
        query_modality: ids(&mut gpu, &modality),
        span: SPAN,
        decay: input(&mut gpu, &decay),
        base: input(&mut gpu, &base),
    };
    let sink = output::<R, 3>(&mut gpu, SHAPE);
    let gradients = [output::<R, 2>(&mut gpu, TABLE), output::<R, 2>(&mut gpu, TABLE)];
    let d_sink_there = input(&mut gpu, &d_sink);
    gpu.run(&pseudo_sink(&problem, sink));
    gpu.run(&pseudo_sink_backward(&problem, d_sink_there, gradients));

    let [decay, base, d_sink] = [decay.widened().values(), base.widened().values(), d_sink.widened().values()];
    let table = |values| View::from_slice(values, TABLE);
    let truth = HostProblem {
        position: View::from_slice(&position, [batch, queries]),
        query_modality: &modality,
        span: SPAN,
        decay: table(&decay),
        base: table(&base),
    };
    let mut wanted = vec![0.0; batch * heads * queries];
    mask::pseudo_sink(&truth, &mut ViewMut::from_slice(&mut wanted, SHAPE));
    let (mut d_decay, mut d_base) = (vec![0.0; 9], vec![0.0; 9]);
    mask::pseudo_sink_backward(
        &truth,
        View::from_slice(&d_sink, SHAPE),
        &mut ViewMut::from_slice(&mut d_decay, TABLE),
        &mut ViewMut::from_slice(&mut d_base, TABLE),
    );
    let (outputs, allowed) = tolerance::<R>();
    assert_each_close("sink", &values::<R, 3>(&gpu, sink).values(), &wanted, outputs);
    assert_each_close("d decay", &values::<R, 2>(&gpu, gradients[0]).values(), &d_decay, allowed);
    assert_each_close("d base", &values::<R, 2>(&gpu, gradients[1]).values(), &d_base, allowed);
}

#[test]
fn pseudo_scores_match_the_specification() {
    check::<f32>();
    check::<f64>();
}
