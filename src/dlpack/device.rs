//! Foreign tensors on a CUDA device: their claims are checked as those of host tensors are, their memory is only named.

use super::capsule::{self, NO_SYNC, Taken};
use super::foreign::{Claims, Description, ImportError, device_of, not_here, unusable, without_gradient};
use super::structs::{CUDA, CUDA_MANAGED, Device, Tensor};
use super::{exchange, numpy};
use crate::cuda::DeviceTensor;
use crate::dtype::DType;
use crate::error::Error;
use crate::layout::print_shape;
use pyo3::prelude::*;

/// A tensor on a CUDA device.
#[derive(Debug)]
pub(crate) struct OnDevice {
    pointer: u64,
    dtype: DType,
    shape: Vec<usize>,
    strides: Vec<isize>,
    ordinal: usize,
    read_only: bool,
    _taken: Option<Taken>,
}

impl OnDevice {
    /// Imports a tensor by the C exchange API of its type or by a `__dlpack__` capsule, without any synchronisation: what
    /// uses it is launched on the stream that it was made on. `wanted` says where it should be, for the error.
    ///
    /// The caller keeps the object alive and unchanged until the launches that use it are made.
    pub(crate) fn new(
        argument: &'static str,
        object: &Bound<'_, PyAny>,
        wanted: impl FnOnce() -> String,
    ) -> Result<Self, ImportError> {
        if let Some(tensor) = exchange::borrow(object)? {
            // SAFETY: the object has just filled it and is alive.
            return unsafe { Self::from_tensor(argument, &tensor, None, wanted) };
        }
        let elsewhere = match numpy::describe(object)? {
            Some(_) => return Err(Error::Device { argument, given: "cpu".to_owned(), wanted: wanted() }.into()),
            None => device_of(object)?.filter(|&device| !is_cuda(device)),
        };
        if let Some(device) = elsewhere {
            return Err(not_here(argument, device, wanted()).into());
        }
        let Some(taken) = capsule::take(&without_gradient(object)?, Some(NO_SYNC))? else {
            return Err(Error::NotATensor { argument, given: object.get_type().name()?.to_string() }.into());
        };
        let tensor: *const Tensor = taken.tensor();
        // SAFETY: the tensor inside `taken` lives until `taken` is dropped, which the result holds.
        unsafe { Self::from_tensor(argument, &*tensor, Some(taken), wanted) }
    }

    /// # Safety
    /// The tensor's shape and strides must be readable now.
    unsafe fn from_tensor(
        argument: &'static str,
        tensor: &Tensor,
        taken: Option<Taken>,
        wanted: impl FnOnce() -> String,
    ) -> Result<Self, ImportError> {
        let device = tensor.ctx;
        if !is_cuda(device) {
            return Err(not_here(argument, device, wanted()).into());
        }
        let read_only = taken.as_ref().is_some_and(Taken::is_read_only);
        // SAFETY: as the caller promises.
        let description = unsafe { Description::of(argument, tensor, read_only)? };
        let Claims { dtype, shape, strides } = description.claims(argument)?;
        let (pointer, ordinal) = (description.data as u64, device.device_id.max(0) as usize);
        Ok(Self { pointer, dtype, shape, strides, ordinal, read_only, _taken: taken })
    }

    /// The device's number.
    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Refuses a tensor whose producer says "read only".
    pub(crate) fn check_writable(&self, argument: &'static str) -> Result<(), Error> {
        if self.read_only { Err(unusable(argument, "read-only", "a tensor to write into")) } else { Ok(()) }
    }

    /// The tensor with its rank known.
    pub(crate) fn tensor<const R: usize>(
        &self,
        argument: &'static str,
        wanted: &str,
    ) -> Result<DeviceTensor<R>, Error> {
        let shape = <[usize; R]>::try_from(self.shape.as_slice()).ok();
        let strides = <[isize; R]>::try_from(self.strides.as_slice()).ok();
        let (pointer, dtype) = (self.pointer, self.dtype);
        let tensor = shape.zip(strides).map(|(shape, strides)| DeviceTensor { pointer, dtype, shape, strides });
        let error = || Error::Shape { argument, given: print_shape(&self.shape), wanted: wanted.to_owned() };
        tensor.ok_or_else(error)
    }
}

fn is_cuda(device: Device) -> bool {
    matches!(device.device_type, CUDA | CUDA_MANAGED)
}
