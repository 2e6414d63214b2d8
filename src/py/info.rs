//! What this build is, what it would run, and what it can raise.

use super::error::class_name;
use crate::dispatch::{self, Isa};
use crate::error::Error;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::thread;

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn available() -> Vec<&'static str> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name).collect()
}

/// This build and this machine: version, compiler, features, target, instruction sets, processors.
///
/// `isa` is the instruction set that runs and `isa_reason` why; `None` and the complaint where `MODA_ATTN_ISA` asks for
/// one that cannot be had.
#[pyfunction]
pub(super) fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let (isa, reason) = match dispatch::choice() {
        Ok(choice) => (Some(choice.isa.name()), choice.reason),
        Err(error) => (None, error.to_string()),
    };
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("compiler", env!("MODA_ATTN_RUSTC"))?;
    info.set_item("features", features())?;
    info.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    info.set_item("optimised", !cfg!(debug_assertions))?;
    info.set_item("devices", ["cpu"])?;
    info.set_item("isa", isa)?;
    info.set_item("isa_reason", reason)?;
    info.set_item("isa_available", available())?;
    info.set_item("processors", processors())?;
    Ok(info)
}

fn features() -> Vec<&'static str> {
    let known = [("python", cfg!(feature = "python"))];
    known.into_iter().filter_map(|(name, on)| on.then_some(name)).collect()
}

/// Which kernels run here and why, in words.
#[pyfunction]
pub(super) fn explain() -> String {
    let kernels = match dispatch::choice() {
        Ok(choice) => format!("{}: {}", choice.isa.name(), choice.reason),
        Err(error) => format!("none, every call raises: {error}"),
    };
    [
        format!("moda-attn {} on {}-{}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH, std::env::consts::OS),
        format!("instruction set   {kernels}"),
        "device            cpu, the only one this build has kernels for".to_owned(),
        "arithmetic        float64 for float64 tensors, float32 for float32, bfloat16 and float16".to_owned(),
        format!("threads           torch.get_num_threads() a call, at most useful: {} processors", processors()),
    ]
    .join("\n")
}

/// Every error the extension can raise: its name, the class of `moda_attn.errors` and the form of its message.
#[pyfunction]
pub(super) fn list_errors(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let errors = PyList::empty(py);
    for error in Error::specimens() {
        let row = PyDict::new(py);
        row.set_item("name", error.name())?;
        row.set_item("exception", class_name(error.kind()))?;
        row.set_item("message", error.to_string())?;
        errors.append(row)?;
    }
    Ok(errors)
}
