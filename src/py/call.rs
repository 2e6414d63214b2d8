//! Running an operator from Python: without the GIL, and with every panic turned into an error.

use crate::error::{Error, Result};
use pyo3::prelude::*;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work` with the GIL released.
pub(super) fn compute<R: Send>(py: Python<'_>, work: impl FnOnce() -> Result<R> + Send) -> PyResult<R> {
    // What a panic leaves half-written are results nobody sees: the caller gets the exception instead.
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    Ok(outcome.unwrap_or_else(|panic| Err(Error::Panic(message(panic.as_ref()))))?)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|&text| text.to_owned());
    literal
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

/// Calls a generic function with the storage type that a floating dtype names.
macro_rules! for_element {
    ($view:expr, $argument:literal, $function:ident($($given:expr),*)) => {
        match $view.dtype() {
            $crate::dtype::DType::Float16 => $function::<half::f16>($($given),*),
            $crate::dtype::DType::BFloat16 => $function::<half::bf16>($($given),*),
            $crate::dtype::DType::Float32 => $function::<f32>($($given),*),
            $crate::dtype::DType::Float64 => $function::<f64>($($given),*),
            other => Err($crate::py::call::not_a_float($argument, other, "float16, bfloat16, float32 or float64")),
        }
    };
}

/// The same for what is never stored in half precision: parameters of the mask.
macro_rules! for_real {
    ($view:expr, $argument:literal, $function:ident($($given:expr),*)) => {
        match $view.dtype() {
            $crate::dtype::DType::Float32 => $function::<f32>($($given),*),
            $crate::dtype::DType::Float64 => $function::<f64>($($given),*),
            other => Err($crate::py::call::not_a_float($argument, other, "float32 or float64")),
        }
    };
}

pub(super) use {for_element, for_real};

/// The error for a dtype that no storage type stands for.
pub(super) fn not_a_float(argument: &'static str, given: crate::dtype::DType, wanted: &str) -> Error {
    Error::DType { argument, given: given.name().to_owned(), wanted: wanted.to_owned() }
}
