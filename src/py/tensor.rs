//! A result for callers without torch or `NumPy`: memory of our own that any library takes over with `from_dlpack`.

use crate::dlpack::{self, Imported, Owned};
use crate::dtype::DType;
use crate::error::Error;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// A contiguous CPU tensor that speaks DLPack. It only holds numbers: take it over with `torch.from_dlpack`,
/// `jax.numpy.from_dlpack`, `numpy.from_dlpack` and the like; nothing is copied.
#[pyclass(frozen, module = "moda_attn._native")]
pub(super) struct Tensor(Owned);

#[pymethods]
impl Tensor {
    /// A tensor of zeros; `dtype` is the name of a floating dtype.
    #[staticmethod]
    #[allow(clippy::needless_pass_by_value, reason = "what a Python tuple converts to")]
    fn zeros(shape: Vec<usize>, dtype: &str) -> PyResult<Self> {
        let floats = [DType::Float16, DType::BFloat16, DType::Float32, DType::Float64];
        let found = floats.into_iter().find(|known| known.name() == dtype);
        let found = found.ok_or_else(|| Error::DType {
            argument: "dtype",
            given: format!("{dtype:?}"),
            wanted: floats.map(DType::name).join(", "),
        })?;
        Ok(Self(Owned::zeros(found, &shape)?))
    }

    /// The shape, a tuple.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.shape())
    }

    /// The dtype's name.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype().name()
    }

    /// How many hold the memory: this object and every importer that has not let go.
    #[getter]
    fn _holders(&self) -> usize {
        self.0.holders()
    }

    /// A capsule with this tensor: versioned where the consumer's `max_version` allows it.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if stream.is_some_and(|stream| stream != -1) {
            return Err(PyBufferError::new_err("a CPU tensor has no stream; wanted stream=None"));
        }
        if dl_device.is_some_and(|device| device != self.__dlpack_device__()) {
            return Err(PyBufferError::new_err("a CPU tensor cannot be exported to another device"));
        }
        if copy == Some(true) {
            return Err(PyBufferError::new_err("the memory is only lent; copy it after from_dlpack"));
        }
        if max_version.is_some_and(|(major, _)| major >= dlpack::VERSION.major) {
            dlpack::versioned_capsule(py, &self.0)
        } else {
            dlpack::old_capsule(py, &self.0)
        }
    }

    /// (1, 0): plain memory.
    #[allow(clippy::unused_self, reason = "the protocol makes it a method")]
    fn __dlpack_device__(&self) -> (i32, i32) {
        (dlpack::CPU, 0)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("moda_attn tensor of shape {} and dtype {}", self.shape(py)?.repr()?, self.dtype()))
    }
}

/// Shape, dtype name and address of the first element of anything the operators take.
#[pyfunction]
pub(super) fn describe<'py>(
    py: Python<'py>,
    argument: &str,
    tensor: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, PyTuple>, &'static str, usize)> {
    let imported = Imported::new(argument_name(argument), tensor)?;
    let view = imported.view();
    Ok((PyTuple::new(py, view.shape())?, view.dtype().name(), view.pointer().addr()))
}

/// Errors name arguments by static strings; these are the ones whose shape Python must know first.
fn argument_name(given: &str) -> &'static str {
    ["query", "key", "value", "keep", "position", "decay"].into_iter().find(|known| *known == given).unwrap_or("tensor")
}
