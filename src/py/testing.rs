//! Hooks for the tests of what must never happen: a panic and a failed allocation inside an operator.

use super::arguments::reserve;
use super::call::compute;
use pyo3::prelude::*;

/// Panics inside the guard that every operator runs in. For the tests only.
#[pyfunction]
pub(super) fn _panic_for_test(py: Python<'_>, message: &str) -> PyResult<()> {
    compute(py, || panic!("{message}"))
}

/// Reserves a workspace of so many bytes as an operator would, and lets it go. For the tests only.
#[pyfunction]
pub(super) fn _allocate_for_test(py: Python<'_>, bytes: usize) -> PyResult<()> {
    compute(py, || reserve::<u8>(bytes, "a test").map(drop))
}
