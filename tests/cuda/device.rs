//! Tensors of the random cases, put on the interpreter's device.

use crate::common::Tensor;
use crate::emulator::{Gpu, Plain};
use moda_attn::cuda::DeviceTensor;
use moda_attn::cuda::problem::IdsRecord;
use moda_attn::dtype::{DType, Element};
use moda_attn::ids::Ids;

/// An input as it lies in memory.
pub(crate) fn input<T: Element + Plain, const R: usize>(gpu: &mut Gpu, tensor: &Tensor<T, R>) -> DeviceTensor<R> {
    let (buffer, offset, strides) = tensor.memory();
    let pointer = gpu.buffer(buffer) + (offset * T::SIZE) as u64;
    DeviceTensor { pointer, dtype: T::DTYPE, shape: tensor.shape, strides }
}

/// A result that nothing has written yet.
pub(crate) fn output<T: Element + Plain, const R: usize>(gpu: &mut Gpu, shape: [usize; R]) -> DeviceTensor<R> {
    DeviceTensor::contiguous(gpu.output::<T>(shape.iter().product()), T::DTYPE, shape)
}

/// What a result holds.
pub(crate) fn values<T: Element + Plain, const R: usize>(gpu: &Gpu, tensor: DeviceTensor<R>) -> Tensor<T, R> {
    Tensor::new(gpu.read(tensor.pointer), tensor.shape)
}

/// Ids as 64-bit integers.
pub(crate) fn ids(gpu: &mut Gpu, ids: &Ids) -> DeviceTensor<2> {
    let [batch, _] = ids.shape();
    let flat: Vec<i64> = (0..batch).flat_map(|b| ids.row(b)).map(|&id| id.into()).collect();
    DeviceTensor::contiguous(gpu.buffer(&flat), DType::Int64, ids.shape())
}

/// A record that holds nothing.
pub(crate) fn record(gpu: &mut Gpu) -> u64 {
    gpu.variable(&[IdsRecord::NONE.0])
}
