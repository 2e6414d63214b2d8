//! What of CUDA this machine has, and what kernels found that they could not raise.

use super::compute;
use crate::cuda::cache::Cache;
use crate::cuda::driver::{self, Gpu};
use crate::cuda::nvrtc::{Nvrtc, look_in};
use crate::error::Error;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::fmt::Display;
use std::path::PathBuf;

/// Raises what a kernel on this device has found since the last call. It does not wait for the kernels that still run.
#[pyfunction]
pub(in crate::py) fn cuda_check(py: Python<'_>, ordinal: usize) -> PyResult<()> {
    compute(py, || Gpu::get(ordinal)?.check_record())
}

/// Driver, GPUs, compiler and cache, each described or with the reason why it is missing. Loads the driver.
#[pyfunction]
pub(in crate::py) fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("driver", driver())?;
    info.set_item("gpus", gpus())?;
    info.set_item("nvrtc", nvrtc().unwrap_or_else(why))?;
    info.set_item("cache", cache())?;
    Ok(info)
}

/// The same, a line each, for `explain`.
pub(in crate::py) fn describe() -> Vec<(&'static str, String)> {
    let mut lines = vec![("cuda driver", driver())];
    lines.extend(gpus().into_iter().map(|gpu| ("cuda gpu", gpu)));
    lines.extend([("cuda compiler", nvrtc().unwrap_or_else(why)), ("cuda cache", cache())]);
    lines
}

fn driver() -> String {
    driver::version().map_or_else(why, |(major, minor)| format!("CUDA {major}.{minor}"))
}

fn gpus() -> Vec<String> {
    let found = driver::devices().unwrap_or_default();
    found.iter().enumerate().map(|(ordinal, found)| describe_gpu(ordinal, found)).collect()
}

fn cache() -> String {
    let cache = Cache::get();
    let (files, bytes) = cache.size();
    let folder = cache.folder().map_or_else(|| "memory only".to_owned(), |folder| folder.display().to_string());
    format!("{folder}: {files} kernels, {} kB", bytes.div_ceil(1000))
}

fn why(error: impl Display) -> String {
    format!("none: {error}")
}

fn describe_gpu(ordinal: usize, found: &driver::Found) -> String {
    let (major, minor) = found.target.capability;
    let verdict = found.check(ordinal).map_or_else(|error| format!("no kernels: {error}"), |()| "usable".to_owned());
    let processors = found.target.multiprocessors;
    format!("cuda:{ordinal} {}, sm_{major}{minor}, {processors} multiprocessors, {verdict}", found.name)
}

fn nvrtc() -> Result<String, Error> {
    let found = Nvrtc::get()?;
    let (major, minor) = found.version();
    Ok(format!("{major}.{minor} at {}", found.origin()))
}

/// Names the folders of Python packages to look for the compiler in.
#[pyfunction]
pub(in crate::py) fn cuda_look_in(site_packages: Vec<PathBuf>) {
    look_in(site_packages);
}
