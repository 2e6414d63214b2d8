//! Our errors as Python exceptions: the classes of `moda_attn.errors`, chosen by kind.

use crate::dlpack::ImportError;
use crate::error::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::PyType;

/// The name of the class in `moda_attn.errors` that errors of this kind are raised as.
pub(super) const fn class_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Value => "ModaValueError",
        ErrorKind::Type => "ModaTypeError",
        ErrorKind::Runtime => "ModaRuntimeError",
        ErrorKind::Memory => "ModaMemoryError",
    }
}

fn exception(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let class = py.import("moda_attn.errors")?.getattr(class_name(error.kind()))?.cast_into::<PyType>()?;
    let exception = class.call1((error.to_string(),))?;
    exception.setattr("variant", error.name())?;
    Ok(PyErr::from_value(exception))
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| exception(py, &error).unwrap_or_else(|failed| failed))
    }
}

impl From<ImportError> for PyErr {
    fn from(error: ImportError) -> Self {
        match error {
            ImportError::Tensor(error) => error.into(),
            ImportError::Python(error) => error,
        }
    }
}
