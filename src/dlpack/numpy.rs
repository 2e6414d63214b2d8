//! `NumPy` arrays, described through the `numpy` crate: no capsule, and read-only and bfloat16 arrays work too.

use super::foreign::Description;
use crate::dtype::DType;
use numpy::npyffi::{NPY_ARRAY_WRITEABLE, PyArrayObject};
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::borrow::Cow;

/// Describes an array; `None` for any other object.
pub(super) fn describe(object: &Bound<'_, PyAny>) -> PyResult<Option<Description<'static>>> {
    if !is_loaded(object.py())? {
        return Ok(None);
    }
    let Ok(array) = object.cast::<PyUntypedArray>() else { return Ok(None) };
    let descriptor = array.dtype();
    let size = descriptor.itemsize().max(1) as isize;
    let raw: *const PyArrayObject = array.as_array_ptr();
    // SAFETY: a live array object; the GIL is held.
    let (data, flags) = unsafe { ((*raw).fields.data, (*raw).fields.flags) };
    let strides = array.strides().iter().map(|&bytes| (bytes % size == 0).then_some((bytes / size) as i64)).collect();
    let strides: Option<Vec<i64>> = strides;
    Ok(Some(Description {
        data: data.cast(),
        device: None,
        dtype: dtype(&descriptor),
        shape: array.shape().iter().map(|&size| size as i64).collect(),
        strides: strides.map(Cow::Owned),
        read_only: flags & NPY_ARRAY_WRITEABLE == 0,
    }))
}

/// An array can only exist once somebody has imported `NumPy`; asking the `numpy` crate earlier would import it.
fn is_loaded(py: Python<'_>) -> PyResult<bool> {
    let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?;
    modules.cast::<PyDict>()?.contains(intern!(py, "numpy"))
}

/// The dtype, or how `NumPy` prints it where it is none of ours. `ml_dtypes` registers bfloat16 as a void of 2 bytes.
fn dtype(descriptor: &Bound<'_, PyArrayDescr>) -> Result<DType, String> {
    let native = descriptor.is_native_byteorder() != Some(false);
    match (descriptor.kind(), descriptor.itemsize()) {
        _ if !native => Err(format!("{descriptor} (not of this machine's byte order)")),
        (b'b', 1) => Ok(DType::Bool),
        (b'i', 1) => Ok(DType::Int8),
        (b'i', 2) => Ok(DType::Int16),
        (b'i', 4) => Ok(DType::Int32),
        (b'i', 8) => Ok(DType::Int64),
        (b'u', 1) => Ok(DType::UInt8),
        (b'u', 2) => Ok(DType::UInt16),
        (b'u', 4) => Ok(DType::UInt32),
        (b'u', 8) => Ok(DType::UInt64),
        (b'f', 2) => Ok(DType::Float16),
        (b'f', 4) => Ok(DType::Float32),
        (b'f', 8) => Ok(DType::Float64),
        (b'V', 2) if descriptor.to_string() == "bfloat16" => Ok(DType::BFloat16),
        _ => Err(descriptor.to_string()),
    }
}
