//! The two softmaxes of "split", added.

use crate::common::{Rng, assert_close, tolerance};
use crate::emulator::Gpu;
use moda_attn::cuda::DeviceTensor;
use moda_attn::cuda::attend::sum;
use moda_attn::dtype::DType;

#[test]
fn parts_are_added() {
    let shape = [2, 3, 2, 5, 7];
    let parts: Vec<f32> = Rng::new(0).normals(shape.iter().product(), 1.0);
    let mut gpu = Gpu::new();
    let (parts_at, out_at) = (gpu.buffer(&parts), gpu.output::<f32>(parts.len() / 2));
    let out = DeviceTensor::contiguous(out_at, DType::Float32, [2, 3, 5, 7]);
    let launch = sum(DeviceTensor::contiguous(parts_at, DType::Float32, shape), out).unwrap();
    gpu.run(&[launch]);
    let truth: Vec<f64> =
        parts.chunks(70).flat_map(|both| (0..35).map(|at| f64::from(both[at]) + f64::from(both[35 + at]))).collect();
    assert_close("out", &gpu.read::<f32>(out_at), &truth, tolerance::<f32>().0);
}
