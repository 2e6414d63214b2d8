//! The one place where foreign memory becomes a [`RawView`]: every claim that can be checked is checked here.

use super::capsule::{self, Taken};
use super::structs::{CPU, CUDA, CUDA_HOST, CUDA_MANAGED, Device, Tensor};
use super::{dtype, exchange, numpy};
use crate::dtype::DType;
use crate::error::Error;
use crate::layout::{count, print_shape};
use crate::view::RawView;
use pyo3::intern;
use pyo3::prelude::*;
use std::borrow::Cow;
use std::slice;

/// More dimensions than any array library allows; a guard against garbage.
const MAX_RANK: usize = 64;

/// Why a tensor could not be taken.
#[derive(Debug)]
pub(crate) enum ImportError {
    /// It does not fit: our own error.
    Tensor(Error),
    /// Its owner refused: the owner's exception.
    Python(PyErr),
}

impl From<Error> for ImportError {
    fn from(error: Error) -> Self {
        Self::Tensor(error)
    }
}

impl From<PyErr> for ImportError {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

/// A foreign tensor, checked. It borrows from the Python object it came from (`'a`), or holds what that object handed out.
#[derive(Debug)]
pub(crate) struct Imported<'a> {
    view: RawView<'a>,
    read_only: bool,
    _taken: Option<Taken>,
}

impl<'a> Imported<'a> {
    /// Imports a tensor: by the C exchange API of its type, as a `NumPy` array, or by a `__dlpack__` capsule.
    ///
    /// Its memory is borrowed: the caller keeps the object unchanged (no resize, no writer in another thread) while the
    /// view is used, as every operator of an array library asks of its caller.
    pub(crate) fn new(argument: &'static str, object: &'a Bound<'_, PyAny>) -> Result<Self, ImportError> {
        if let Some(tensor) = exchange::borrow(object)? {
            // SAFETY: the object has just filled it and stays alive and unchanged for this call.
            return unsafe { Self::from_tensor(argument, &tensor, false, None) };
        }
        if let Some(description) = numpy::describe(object)? {
            // SAFETY: read off a live array, which stays alive and unchanged for `'a`.
            return Ok(unsafe { description.check(argument) }.map(|view| Self::whole(view, &description, None))?);
        }
        refuse_other_devices(argument, object)?;
        let Some(taken) = capsule::take(&without_gradient(object)?, None)? else {
            return Err(Error::NotATensor { argument, given: object.get_type().name()?.to_string() }.into());
        };
        let tensor: *const Tensor = taken.tensor();
        // SAFETY: the tensor inside `taken` lives until `taken` is dropped, which the result holds.
        unsafe { Self::from_tensor(argument, &*tensor, taken.is_read_only(), Some(taken)) }
    }

    /// The same for an argument that may be `None`.
    pub(crate) fn optional(
        argument: &'static str,
        object: Option<&'a Bound<'_, PyAny>>,
    ) -> Result<Option<Self>, ImportError> {
        object.map(|object| Self::new(argument, object)).transpose()
    }

    /// The same for a tensor that will be written: a producer that says "read only" is refused.
    pub(crate) fn writable(argument: &'static str, object: &'a Bound<'_, PyAny>) -> Result<Self, ImportError> {
        let imported = Self::new(argument, object)?;
        if imported.read_only {
            return Err(unusable(argument, "read-only", "a tensor to write into").into());
        }
        Ok(imported)
    }

    /// The view; it cannot outlive what keeps its memory alive.
    pub(crate) fn view(&self) -> &RawView<'_> {
        &self.view
    }

    /// # Safety
    /// The tensor's shape and strides must be readable now, its data as long as `'a` or until `taken` is dropped.
    unsafe fn from_tensor(
        argument: &'static str,
        tensor: &Tensor,
        read_only: bool,
        taken: Option<Taken>,
    ) -> Result<Self, ImportError> {
        // SAFETY: as the caller promises.
        let description = unsafe { Description::of(argument, tensor, read_only)? };
        // SAFETY: as above.
        let view = unsafe { description.check(argument)? };
        Ok(Self::whole(view, &description, taken))
    }

    fn whole(view: RawView<'a>, description: &Description<'_>, taken: Option<Taken>) -> Self {
        Self { view, read_only: description.read_only, _taken: taken }
    }
}

/// What a producer claims about a tensor, not yet believed.
pub(super) struct Description<'p> {
    /// First element.
    pub(super) data: *mut u8,
    /// Where it lives; `None` for plain memory.
    pub(super) device: Option<Device>,
    /// One of our dtypes, or the name of another one.
    pub(super) dtype: Result<DType, String>,
    pub(super) shape: Cow<'p, [i64]>,
    /// In elements; `None` where a stride is no whole number of them.
    pub(super) strides: Option<Cow<'p, [i64]>>,
    pub(super) read_only: bool,
}

impl<'p> Description<'p> {
    /// # Safety
    /// Where they are not null, shape and strides must point to `ndim` numbers, for `'p`.
    pub(super) unsafe fn of(argument: &'static str, tensor: &'p Tensor, read_only: bool) -> Result<Self, Error> {
        let rank = usize::try_from(tensor.ndim).ok().filter(|&rank| rank <= MAX_RANK);
        let rank = rank.filter(|&rank| rank == 0 || !tensor.shape.is_null());
        let Some(rank) = rank else {
            let given = format!("a tensor of {} dimensions without a shape", tensor.ndim);
            return Err(unusable(argument, &given, "a tensor of at most 64 dimensions"));
        };
        let read = |numbers: *const i64| -> &'p [i64] {
            match rank {
                0 => &[][..],
                // SAFETY: `ndim` numbers, as the caller promises; null only for rank 0.
                _ => unsafe { slice::from_raw_parts(numbers, rank) },
            }
        };
        let shape = read(tensor.shape);
        let strides = if tensor.strides.is_null() {
            Cow::Owned(compact_strides(shape))
        } else {
            Cow::Borrowed(read(tensor.strides))
        };
        let base = tensor.data.cast::<u8>();
        // A null pointer with an offset is still no data.
        let data = if base.is_null() { base } else { base.wrapping_add(tensor.byte_offset as usize) };
        let (shape, strides) = (Cow::Borrowed(shape), Some(strides));
        Ok(Self { data, device: Some(tensor.ctx), dtype: dtype::decode(tensor.dtype), shape, strides, read_only })
    }

    /// Checks the claims and makes the view.
    ///
    /// # Safety
    /// The memory must be as described, for `'a`: what can be checked without reading it is checked here.
    unsafe fn check<'a>(&self, argument: &'static str) -> Result<RawView<'a>, Error> {
        if let Some(device) = self.device.filter(|device| !is_host(*device)) {
            return Err(not_here(argument, device, "cpu".to_owned()));
        }
        let Claims { dtype, shape, strides } = self.claims(argument)?;
        // SAFETY: as the caller promises; a tensor without elements is never read.
        Ok(unsafe { RawView::new(self.data, dtype, shape, strides) })
    }

    /// What can be checked of a tensor on any device.
    pub(super) fn claims(&self, argument: &'static str) -> Result<Claims, Error> {
        let dtype = self.dtype.clone().map_err(|given| {
            let wanted = "float16, bfloat16, float32 or float64 (an integer dtype for ids)".to_owned();
            Error::DType { argument, given, wanted }
        })?;
        let shape: Option<Vec<usize>> = self.shape.iter().map(|&size| usize::try_from(size).ok()).collect();
        let elements =
            shape.as_ref().and_then(|shape| count(shape)).filter(|&n| n <= isize::MAX as usize / dtype.size());
        let (Some(shape), Some(elements)) = (shape, elements) else {
            let wanted = "sizes >= 0 whose product fits in memory";
            return Err(Error::Shape { argument, given: format!("{:?}", self.shape), wanted: wanted.to_owned() });
        };
        let strides = self.strides.as_ref().map(|strides| strides.iter().map(|&stride| stride as isize).collect());
        let aligned = self.data.addr().is_multiple_of(dtype.size());
        let Some(strides) = strides.filter(|_| aligned || elements == 0) else {
            let given = format!("not aligned to its elements of {} bytes", dtype.size());
            return Err(unusable(argument, &given, "an aligned tensor, such as a copy of it"));
        };
        if self.data.is_null() && elements != 0 {
            let given = format!("a tensor of shape {} without data (fake or meta)", print_shape(&shape));
            return Err(unusable(argument, &given, "a tensor with data"));
        }
        Ok(Claims { dtype, shape, strides })
    }
}

/// What a producer claims, as far as it can be believed without reading the data.
pub(super) struct Claims {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<isize>,
}

/// Row-major strides, which null strides stood for before `DLPack` 1.2.
fn compact_strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = shape[axis].max(1).saturating_mul(strides[axis]);
    }
    strides
}

pub(super) fn unusable(argument: &'static str, given: &str, wanted: &str) -> Error {
    Error::Option { argument, given: given.to_owned(), wanted: wanted.to_owned() }
}

pub(super) fn is_host(device: Device) -> bool {
    matches!(device.device_type, CPU | CUDA_HOST)
}

/// The error for a tensor on a device other than the one that is wanted.
pub(super) fn not_here(argument: &'static str, device: Device, wanted: String) -> Error {
    Error::Device { argument, given: name(device), wanted }
}

fn name(device: Device) -> String {
    let kind = match device.device_type {
        _ if is_host(device) => return "cpu".to_owned(),
        CUDA | CUDA_MANAGED => "cuda".to_owned(),
        4 => "opencl".to_owned(),
        7 => "vulkan".to_owned(),
        8 => "mps".to_owned(),
        10 | 11 => "rocm".to_owned(),
        14 => "xpu".to_owned(),
        other => format!("DLPack device type {other}"),
    };
    format!("{kind}:{}", device.device_id)
}

/// Asks a capsule producer where its tensor lives before asking for the tensor: exporting from another device may
/// synchronise it, or fail in words of its own.
fn refuse_other_devices(argument: &'static str, object: &Bound<'_, PyAny>) -> Result<(), ImportError> {
    match device_of(object)? {
        Some(device) if !is_host(device) => Err(not_here(argument, device, "cpu".to_owned()).into()),
        _ => Ok(()),
    }
}

/// Where a capsule producer says that its tensor lives.
pub(super) fn device_of(object: &Bound<'_, PyAny>) -> PyResult<Option<Device>> {
    let Some(ask) = object.getattr_opt(intern!(object.py(), "__dlpack_device__"))? else { return Ok(None) };
    let (device_type, device_id) = ask.call0()?.extract()?;
    Ok(Some(Device { device_type, device_id }))
}

/// A torch tensor that requires a gradient refuses to be exported; its detached twin shares the memory.
pub(super) fn without_gradient<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = object.py();
    match object.getattr_opt(intern!(py, "requires_grad"))? {
        Some(wish) if wish.is_truthy()? => object.call_method0(intern!(py, "detach")),
        _ => Ok(object.clone()),
    }
}
