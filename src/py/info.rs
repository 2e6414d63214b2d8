//! What this build is, what it would run, and what it can raise.

use super::call::compute;
use super::error::class_name;
use crate::dispatch::{self, Isa};
use crate::error::Error;
use crate::op;
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::fmt::Debug;
use std::thread;
use std::time::Duration;

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
        Ok(choice) => (Some(choice.isa.name()), choice.reason.clone()),
        Err(error) => (None, error.to_string()),
    };
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("compiler", env!("MODA_ATTN_RUSTC"))?;
    info.set_item("features", features())?;
    info.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    info.set_item("optimised", !cfg!(debug_assertions))?;
    info.set_item("devices", devices())?;
    info.set_item("isa", isa)?;
    info.set_item("isa_reason", reason)?;
    info.set_item("isa_available", available())?;
    info.set_item("processors", processors())?;
    Ok(info)
}

/// The types of devices that this build has kernels for; whether they are there is another question.
fn devices() -> &'static [&'static str] {
    if cfg!(feature = "cuda") { &["cpu", "cuda"] } else { &["cpu"] }
}

fn features() -> Vec<&'static str> {
    let known = [("python", cfg!(feature = "python")), ("cuda", cfg!(feature = "cuda"))];
    known.into_iter().filter_map(|(name, on)| on.then_some(name)).collect()
}

/// Which kernels run here and why, in words.
#[pyfunction]
pub(super) fn explain() -> String {
    let choice = dispatch::choice();
    let narrow = choice.as_ref().is_ok_and(|choice| choice.isa.multiplies_bfloat16());
    let products = if narrow { "; bfloat16 attention sums products of bfloat16 numbers" } else { "" };
    let kernels = match choice {
        Ok(choice) => format!("{}: {}", choice.isa.name(), choice.reason),
        Err(error) => format!("none, every call raises: {error}"),
    };
    #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "only CUDA adds lines"))]
    let mut lines = vec![
        format!("moda-attn {} on {}-{}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH, std::env::consts::OS),
        format!("instruction set   {kernels}"),
        format!("kernels for       {}", devices().join(", ")),
        format!("arithmetic        float64 for float64 tensors, float32 for the others{products}"),
        format!("threads           torch.get_num_threads() a call, at most useful: {} processors", processors()),
    ];
    #[cfg(feature = "cuda")]
    lines.extend(super::cuda::describe().into_iter().map(|(name, found)| format!("{name:<17} {found}")));
    lines.join("\n")
}

/// Floating point operations a second of a register loop of the products that attention on a dtype is made of, run for
/// so many seconds on so many threads: what benchmarks measure the kernels against.
#[pyfunction]
pub(super) fn _product_rate(py: Python<'_>, dtype: &str, threads: usize, seconds: f64) -> PyResult<f64> {
    let rate = match dtype {
        "float32" => op::product_rate::<f32>,
        "float64" => op::product_rate::<f64>,
        "bfloat16" => op::product_rate::<bf16>,
        "float16" => op::product_rate::<f16>,
        _ => return Err(unknown("dtype", dtype, "float16, bfloat16, float32 or float64").into()),
    };
    let duration = Duration::try_from_secs_f64(seconds);
    let duration = duration.map_err(|_| unknown("seconds", seconds, "a number of seconds >= 0"))?;
    compute(py, || rate(threads, duration))
}

fn unknown(argument: &'static str, given: impl Debug, wanted: &str) -> Error {
    Error::Option { argument, given: format!("{given:?}"), wanted: wanted.to_owned() }
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
