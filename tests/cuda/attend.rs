//! Attention, forward and backward: every kernel against the specification.

use crate::common::{
    AttendBuffers, AttendCase, AttendGradientBuffers, AttendOptions, BiasTable, Layout, Padding, Ranges, Rng, Sinks,
    Storage,
};
use crate::device::{ids, input, output, record, values};
use crate::emulator::{Gpu, Plain};
use half::{bf16, f16};
use moda_attn::cuda::DeviceTensor;
use moda_attn::cuda::attend::{backward, backward_workspace, forward, forward_workspace};
use moda_attn::cuda::problem::{AttendGradients, AttendOutputs, AttendProblem, AttendUpstream, Target};
use moda_attn::dtype::{DType, Element, Real};
use moda_attn::problem::{Combine, MassBy};

/// Elements whose numbers a buffer of the device can hold.
trait DeviceElement: Element<Acc: Plain> + Plain {}
impl<T: Element<Acc: Plain> + Plain> DeviceElement for T {}

/// A case on the device.
struct Device<'c, T: Element> {
    gpu: Gpu,
    case: &'c AttendCase<T>,
    problem: AttendProblem,
}

impl<'c, T: DeviceElement> Device<'c, T> {
    fn new(case: &'c AttendCase<T>) -> Self {
        Self::of(Target::SM_80, case)
    }

    fn of(target: Target, case: &'c AttendCase<T>) -> Self {
        let mut gpu = Gpu::with_architecture(target.capability);
        let AttendOptions { batch, heads, queries, keys, modalities, combine, causal, .. } = case.options;
        let key_range = case.ranges.as_ref().map(|ranges| {
            let [rows, _] = ranges.shape();
            let bounds = |b, i| [ranges.get(b, i).start as i32, ranges.get(b, i).end as i32];
            let flat: Vec<i32> = (0..rows).flat_map(|b| (0..queries).flat_map(move |i| bounds(b, i))).collect();
            DeviceTensor::contiguous(gpu.buffer(&flat), DType::Int32, [rows, queries, 2])
        });
        let problem = AttendProblem {
            target,
            record: record(&mut gpu),
            query: input(&mut gpu, &case.query),
            key: input(&mut gpu, &case.key),
            value: input(&mut gpu, &case.value),
            modality: ids(&mut gpu, &case.modality),
            query_modality: ids(&mut gpu, &case.query_modality),
            sink: case
                .sink
                .as_ref()
                .map(|sink| input(&mut gpu, sink).broadcast([batch, heads, queries, combine.parts()]).unwrap()),
            bias: case
                .bias
                .as_ref()
                .map(|bias| input(&mut gpu, bias).broadcast([batch, heads, modalities, modalities]).unwrap()),
            key_range,
            causal,
            scale: case.scale.to_f64(),
            combine,
            num_modalities: Some(modalities),
        };
        assert_eq!(problem.modality.shape, [batch, keys]);
        Self { gpu, case, problem }
    }

    fn outputs(&mut self) -> AttendOutputs {
        let AttendOptions { batch, heads, queries, dim, modalities, combine, mass, .. } = self.case.options;
        AttendOutputs {
            out: output::<T, 4>(&mut self.gpu, [batch, heads, queries, dim]),
            logsumexp: output::<T::Acc, 4>(&mut self.gpu, [batch, heads, combine.parts(), queries]),
            parts: (combine == Combine::Split)
                .then(|| output::<T::Acc, 5>(&mut self.gpu, [batch, heads, 2, queries, dim])),
            mass: Some((mass, output::<T::Acc, 4>(&mut self.gpu, [batch, heads, queries, mass.columns(modalities)]))),
        }
    }

    fn forward(&mut self) -> (AttendOutputs, AttendBuffers<T>) {
        let outputs = self.outputs();
        let workspace = self.gpu.output::<u8>(forward_workspace(&self.problem));
        let launches = forward(&self.problem, &outputs, workspace).unwrap();
        self.gpu.run(&launches);
        let buffers = AttendBuffers {
            out: values(&self.gpu, outputs.out),
            logsumexp: values(&self.gpu, outputs.logsumexp),
            parts: outputs.parts.map(|parts| values(&self.gpu, parts)),
            mass: values(&self.gpu, outputs.mass.unwrap().1),
        };
        (outputs, buffers)
    }

    fn backward(&mut self, forward: &AttendOutputs) -> AttendGradientBuffers<T> {
        let case = self.case;
        let AttendOptions { batch, heads, queries, modalities, combine, .. } = case.options;
        let upstream = AttendUpstream {
            out_gradient: input(&mut self.gpu, &case.out_gradient),
            out: forward.out,
            logsumexp: forward.logsumexp,
            parts: forward.parts,
        };
        let gradients = AttendGradients {
            query: output::<T, 4>(&mut self.gpu, case.query.shape),
            key: output::<T, 4>(&mut self.gpu, case.key.shape),
            value: output::<T, 4>(&mut self.gpu, case.value.shape),
            sink: case
                .sink
                .as_ref()
                .map(|_| output::<T::Acc, 4>(&mut self.gpu, [batch, heads, queries, combine.parts()])),
            bias: case
                .bias
                .as_ref()
                .map(|_| output::<T::Acc, 4>(&mut self.gpu, [batch, heads, modalities, modalities])),
        };
        let workspace = self.gpu.output::<u8>(backward_workspace(&self.problem));
        let launches = backward(&self.problem, &upstream, &gradients, workspace).unwrap();
        self.gpu.run(&launches);
        AttendGradientBuffers {
            query: values(&self.gpu, gradients.query),
            key: values(&self.gpu, gradients.key),
            value: values(&self.gpu, gradients.value),
            sink: gradients.sink.map(|sink| values(&self.gpu, sink)),
            bias: gradients.bias.map(|bias| values(&self.gpu, bias)),
        }
    }
}

/// Forward and backward of a case, both held to the specification.
#[track_caller]
fn check<T: DeviceElement>(seed: u64, options: AttendOptions) {
    check_on::<T>(Target::SM_80, seed, options);
}

#[track_caller]
fn check_on<T: DeviceElement>(target: Target, seed: u64, options: AttendOptions) {
    let case = AttendCase::<T>::new(&mut Rng::new(seed), options);
    let mut device = Device::of(target, &case);
    let (outputs, buffers) = device.forward();
    case.check_forward(&buffers);
    case.check_backward(&device.backward(&outputs));
}

/// Two tiles of keys, a boundary in every dimension, everything on.
fn usual() -> AttendOptions {
    AttendOptions {
        heads: 2,
        key_heads: 1,
        queries: 70,
        keys: 90,
        dim: 32,
        padding: Padding::Right,
        ..AttendOptions::default()
    }
}

/// Every option at random, within what kernels take. Each combination of causal limit, bias and ranges is another kernel to
/// compile: one of four stands for them.
fn random(rng: &mut Rng, combination: u64) -> AttendOptions {
    let key_heads = 1 + rng.below(2);
    let keys = rng.pick(&[1, 17, 64, 65, 128, 150, 200]);
    let fewer = 1 + rng.below(keys);
    let (causal, has_bias, has_ranges) =
        [(true, true, false), (false, true, true), (true, false, true), (false, false, false)]
            [combination as usize % 4];
    AttendOptions {
        heads: key_heads * (1 + rng.below(3)),
        key_heads,
        keys,
        queries: rng.pick(&[keys, keys, fewer, keys + 5]),
        dim: 40,
        storage: rng.pick(&[Storage::Contiguous, Storage::TokensFirst]),
        causal,
        bias: if has_bias {
            rng.pick(&[BiasTable::Finite, BiasTable::Shared, BiasTable::Forbidding])
        } else {
            BiasTable::Absent
        },
        ranges: if has_ranges { rng.pick(&Ranges::ALL[1..]) } else { Ranges::Absent },
        ..AttendOptions::random(rng)
    }
}

fn many<T: DeviceElement>(seeds: std::ops::Range<u64>, combinations: u64) {
    for seed in seeds {
        let options = random(&mut Rng::new(seed), seed % combinations);
        check::<T>(seed, options);
    }
}

#[test]
fn float32_matches_the_specification() {
    check::<f32>(0, usual());
    many::<f32>(0..10, 2);
}

#[test]
fn float64_matches_the_specification() {
    check::<f64>(0, usual());
    many::<f64>(0..6, 2);
}

#[test]
fn bfloat16_matches_the_specification() {
    check::<bf16>(0, usual());
    many::<bf16>(0..24, 4);
}

#[test]
fn float16_matches_the_specification() {
    check::<f16>(0, usual());
    many::<f16>(0..6, 2);
}

/// Few queries: keys are split over blocks.
#[test]
fn few_queries_match_the_specification() {
    for seed in 0..8 {
        let rng = &mut Rng::new(seed);
        let (queries, heads) = rng.pick(&[(1, 4), (1, 1), (3, 6), (16, 2), (2, 9)]);
        let mut options = random(rng, seed);
        (options.key_heads, options.heads, options.queries) = (1 + rng.below(2), heads, queries);
        options.heads *= options.key_heads;
        options.keys = rng.pick(&[65, 300, 513]);
        match seed % 4 {
            0 => check::<f32>(seed, options),
            _ => check::<bf16>(seed, options),
        }
    }
}

/// A query that is not finite spoils its own row, NaN even where one key's product would be infinite; no bit of another changes.
#[test]
fn a_query_that_is_not_finite_spoils_its_row_alone() {
    let options = AttendOptions { padding: Padding::None, layout: Layout::Last, sinks: Sinks::Extreme, ..usual() };
    for bad in [f32::NAN, f32::INFINITY] {
        for queries in [70, 3] {
            let sound = AttendCase::<bf16>::new(&mut Rng::new(7), AttendOptions { queries, ..options });
            let mut case = sound.clone();
            let row = queries + 1;
            case.query.set_flat(row * options.dim + 5, bf16::from_f32(bad));
            let (_, before) = Device::new(&sound).forward();
            let (_, after) = Device::new(&case).forward();
            let (before, after) = (before.out.values(), after.out.values());
            for (at, (before, after)) in before.iter().zip(&after).enumerate() {
                assert!(if at / options.dim == row { after.is_nan() } else { before.to_bits() == after.to_bits() });
            }
        }
    }
}

#[test]
fn empty_problems_give_zeros() {
    for (queries, keys, batch) in [(5, 0, 1), (0, 5, 1), (0, 0, 1), (5, 5, 0), (70, 0, 2)] {
        check::<bf16>(0, AttendOptions { queries, keys, batch, padding: Padding::None, ..usual() });
        check::<f32>(0, AttendOptions { queries, keys, batch, padding: Padding::None, ..usual() });
    }
}

/// The plan alone: what a device cannot do is refused before anything is launched.
#[test]
fn what_does_not_fit_the_device_is_refused() {
    let case = AttendCase::<f64>::new(&mut Rng::new(0), AttendOptions { dim: 256, ..usual() });
    let mut device = Device::new(&case);
    let outputs = device.outputs();
    let message = |problem: &AttendProblem| forward(problem, &outputs, 0).unwrap_err().to_string();
    let small = Target { shared_limit: 65_536, ..Target::SM_80 };
    let refused = message(&AttendProblem { target: small, ..device.problem });
    assert!(refused.contains("shared memory, this device has 65536"), "{refused}");
    let mut without_columns = device.problem;
    without_columns.query.shape[3] = 0;
    assert!(message(&without_columns).contains("at least 8"));
}

/// A negative factor turns the order of the scores round, one of 0 makes them all the same.
#[test]
fn any_scale_matches_the_specification() {
    for scale in [-0.3, 0.0] {
        let mut case = AttendCase::<bf16>::new(&mut Rng::new(3), usual());
        case.scale = scale;
        let mut device = Device::new(&case);
        let (outputs, buffers) = device.forward();
        case.check_forward(&buffers);
        case.check_backward(&device.backward(&outputs));
    }
}

/// Windows and packed sequences over several blocks of queries and keys.
#[test]
fn key_ranges_match_the_specification() {
    for (seed, &ranges) in Ranges::ALL[1..].iter().enumerate() {
        let options = random(&mut Rng::new(seed as u64), 2);
        let options = AttendOptions { ranges, queries: 260, keys: 260, heads: 2, key_heads: 1, batch: 2, ..options };
        check::<bf16>(seed as u64, options);
    }
}

/// Head dimensions with their own tiles: those that fill no step of 16, and those whose sums fill the registers.
#[test]
fn head_dimensions_match_the_specification() {
    for (seed, dim) in [16, 72, 128, 256].into_iter().enumerate() {
        let combine = if seed % 2 == 0 { Combine::Joint } else { Combine::Split };
        let options = AttendOptions { dim, combine, batch: 1, queries: 67, keys: 67, ..usual() };
        check::<bf16>(seed as u64, options);
        if dim == 256 {
            check::<f32>(seed as u64, AttendOptions { heads: 1, queries: 20, ..options });
            check::<f64>(seed as u64, AttendOptions { heads: 1, queries: 20, ..options });
        }
    }
}

/// The widest heads on the devices with the least shared memory: smaller tiles.
#[test]
fn little_shared_memory_is_enough() {
    let options = AttendOptions { dim: 256, batch: 1, heads: 1, queries: 20, keys: 37, ..usual() };
    check_on::<bf16>(Target::SM_89, 0, AttendOptions { queries: 70, keys: 70, combine: Combine::Split, ..options });
    check_on::<bf16>(Target::SM_89, 1, AttendOptions { queries: 3, keys: 130, ..options });
    check_on::<f32>(Target::SM_89, 2, AttendOptions { mass: MassBy::Modality, ..options });
    check_on::<f64>(Target::SM_89, 3, options);
}

/// As many modalities as a code tells apart, and some more than a tile's summary could name one by one.
#[test]
fn many_modalities_match_the_specification() {
    let options = AttendOptions { layout: Layout::Interleaved, mass: MassBy::Modality, batch: 1, ..usual() };
    for (modalities, combine) in [(5, Combine::Split), (6, Combine::Joint), (254, Combine::Joint)] {
        check::<bf16>(1, AttendOptions { modalities, combine, ..options });
    }
    let options = AttendOptions { modalities: 254, layout: Layout::Middle, dim: 8, ..options };
    check::<f32>(2, AttendOptions { queries: 4, keys: 300, heads: 1, ..options });
    check::<f32>(3, AttendOptions { queries: 66, keys: 300, heads: 1, combine: Combine::Split, ..options });
}

/// Tiles of one modality each: nothing is looked up; pairs that the table forbids are skipped whole.
#[test]
fn uniform_tiles_match_the_specification() {
    for (seed, bias) in [BiasTable::Absent, BiasTable::Shared, BiasTable::Forbidding].into_iter().enumerate() {
        for (combine, mass) in [(Combine::Joint, MassBy::Relation), (Combine::Split, MassBy::Modality)] {
            let options = AttendOptions {
                layout: Layout::Last,
                padding: Padding::None,
                queries: 256,
                keys: 256,
                batch: 1,
                bias,
                combine,
                mass,
                ..usual()
            };
            check::<bf16>(seed as u64, options);
        }
    }
}
