//! What tensors on a device are held to beside their shapes: dtypes, rows that kernels can load, results without gaps.

use super::problem::MAX_MODALITIES;
use super::tensor::DeviceTensor;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::print_shape;

/// Largest head dimension of the kernels.
pub(super) const MAX_HEAD_DIM: usize = 256;

/// A head dimension is a multiple of so many elements.
const DIM_STEP: usize = 8;

/// Bytes of a vector load.
const VECTOR: usize = 16;

fn wrong(argument: &'static str, given: DType, wanted: &str) -> Error {
    Error::DType { argument, given: given.name().to_owned(), wanted: wanted.to_owned() }
}

/// One of the dtypes of query, key and value; returns it.
pub(super) fn float<const R: usize>(argument: &'static str, tensor: &DeviceTensor<R>) -> Result<DType> {
    let dtype = tensor.dtype;
    if dtype.is_float() { Ok(dtype) } else { Err(wrong(argument, dtype, "float16, bfloat16, float32 or float64")) }
}

/// One of the dtypes that arithmetic runs in.
pub(super) fn real<const R: usize>(argument: &'static str, tensor: &DeviceTensor<R>) -> Result<()> {
    let fits = matches!(tensor.dtype, DType::Float32 | DType::Float64);
    if fits { Ok(()) } else { Err(wrong(argument, tensor.dtype, "float32 or float64")) }
}

/// Any integer dtype.
pub(super) fn integer<const R: usize>(argument: &'static str, tensor: &DeviceTensor<R>) -> Result<()> {
    if tensor.dtype.is_integer() { Ok(()) } else { Err(wrong(argument, tensor.dtype, "an integer dtype")) }
}

/// Exactly this dtype.
pub(super) fn dtype<const R: usize>(argument: &'static str, tensor: &DeviceTensor<R>, wanted: DType) -> Result<()> {
    if tensor.dtype == wanted { Ok(()) } else { Err(wrong(argument, tensor.dtype, wanted.name())) }
}

/// No more modalities than the kernels' codes tell apart.
pub(super) fn modalities(argument: &'static str, given: Option<usize>) -> Result<()> {
    let Some(m) = given.filter(|&m| m > MAX_MODALITIES) else { return Ok(()) };
    let wanted = format!("at most {MAX_MODALITIES} on CUDA");
    Err(Error::Option { argument, given: format!("for {m} modalities"), wanted })
}

/// Rows of a head dimension the kernels have, contiguous, each beginning where a vector load may.
pub(super) fn rows(argument: &'static str, tensor: &DeviceTensor<4>) -> Result<()> {
    let dim = tensor.shape[3];
    let given = || print_shape(&tensor.shape);
    if dim > MAX_HEAD_DIM || !dim.is_multiple_of(DIM_STEP) {
        let wanted = format!("a head dimension D that is a multiple of {DIM_STEP} and at most {MAX_HEAD_DIM} on CUDA");
        return Err(Error::Shape { argument, given: given(), wanted });
    }
    if tensor.has_aligned_rows(VECTOR) {
        return Ok(());
    }
    let given = format!("{} with strides {:?} at {:#x}", given(), tensor.strides, tensor.pointer);
    let wanted =
        format!("contiguous rows that begin at multiples of {VECTOR} bytes on CUDA, such as a contiguous copy");
    Err(Error::Shape { argument, given, wanted })
}

/// A tensor without gaps, of this dtype, aligned as allocations are: what is written, and what kernels read as such.
pub(super) fn written<const R: usize>(argument: &'static str, tensor: &DeviceTensor<R>, wanted: DType) -> Result<()> {
    dtype(argument, tensor, wanted)?;
    let aligned = tensor.count() == 0 || tensor.pointer.is_multiple_of(VECTOR as u64);
    if tensor.is_contiguous() && aligned {
        return Ok(());
    }
    let given = format!("{} with strides {:?} at {:#x}", print_shape(&tensor.shape), tensor.strides, tensor.pointer);
    let wanted = format!("a contiguous tensor that begins at a multiple of {VECTOR} bytes");
    Err(Error::Shape { argument, given, wanted })
}

/// Checks of tensors that may be absent.
pub(super) trait Given<const R: usize> {
    /// Applies a check to what is there.
    fn given(
        &self,
        argument: &'static str,
        check: impl FnOnce(&'static str, &DeviceTensor<R>) -> Result<()>,
    ) -> Result<()>;
}

impl<const R: usize> Given<R> for Option<DeviceTensor<R>> {
    fn given(
        &self,
        argument: &'static str,
        check: impl FnOnce(&'static str, &DeviceTensor<R>) -> Result<()>,
    ) -> Result<()> {
        self.as_ref().map_or(Ok(()), |tensor| check(argument, tensor))
    }
}
