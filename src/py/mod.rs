//! The extension module `moda_attn._native`: thin functions that import tensors, release the GIL and run the operators.
//!
//! Results are written into tensors that Python allocates, so they belong to its allocator and no copy is made.

mod align;
mod arguments;
mod attend;
mod call;
mod error;
mod info;
mod sink;
mod tensor;
mod testing;

use pyo3::prelude::*;

/// MODA attention in Rust; private to the package `moda_attn`.
#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use super::align::{align_backward, align_forward};
    #[pymodule_export]
    use super::attend::{attend_backward, attend_forward};
    #[pymodule_export]
    use super::info::{_product_rate, build_info, explain, list_errors};
    #[pymodule_export]
    use super::sink::{sink_backward, sink_forward};
    #[pymodule_export]
    use super::tensor::{Tensor, describe};
    #[pymodule_export]
    use super::testing::{_allocate_for_test, _panic_for_test};
}
