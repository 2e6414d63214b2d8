//! candle's tensors as views, and results as candle's storage.

use crate::cpu::CpuElement;
use crate::error::Error;
use crate::view::View;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType};

/// An element type that both sides know.
pub(super) trait Number: CpuElement<Acc: WithDType> + WithDType {}
impl<T: CpuElement<Acc: WithDType> + WithDType> Number for T {}

/// Runs `$body` with `$T` as the element type of a dtype.
macro_rules! for_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => candle_core::bail!("dtype {other:?}; wanted F32, BF16, F16 or F64"),
        }
    };
}
pub(super) use for_dtype;

/// Runs `$body` with `$R` as the real type of a dtype of tables.
macro_rules! for_real {
    ($dtype:expr, $R:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $R = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $R = f64;
                $body
            }
            other => candle_core::bail!("dtype {other:?}; wanted F32 or F64"),
        }
    };
}
pub(super) use for_real;

/// The dtype of tables, sinks, bases and masses for queries and keys of a dtype.
pub(super) fn table_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

pub(super) fn wrapped(error: Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// A storage as a view of rank R.
pub(super) fn view<'a, T: Number, const R: usize>(storage: &'a CpuStorage, layout: &Layout) -> Result<View<'a, T, R>> {
    let data = storage.as_slice::<T>()?;
    let dims = <[usize; R]>::try_from(layout.dims());
    let strides = <[usize; R]>::try_from(layout.stride());
    let (Ok(dims), Ok(strides)) = (dims, strides) else {
        candle_core::bail!("a tensor of shape {:?}; wanted {R} dimensions", layout.dims());
    };
    let found = View::strided(data, layout.start_offset(), dims, strides.map(|stride| stride as isize));
    found.ok_or_else(|| candle_core::Error::msg(format!("layout {layout:?} reaches past its storage")))
}

/// The numbers of a tensor on the CPU.
pub(super) fn on_cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        Storage::Cuda(_) | Storage::Metal(_) => candle_core::bail!("a tensor on another device; wanted the CPU"),
    }
}

/// A contiguous storage as a slice.
pub(super) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((first, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("layout {layout:?}; wanted a contiguous one");
    };
    Ok(&storage.as_slice()?[first..end])
}

pub(super) fn result<T: WithDType>(values: Vec<T>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (T::to_cpu_storage_owned(values), shape.into())
}

pub(super) fn tensor<T: WithDType>(values: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}
