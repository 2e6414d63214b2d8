//! The extension module `moda_attn._native`: thin functions that import tensors, release the GIL and run the operators.
//!
//! Results are written into tensors that Python allocates, so they belong to its allocator and no copy is made.

mod align;
mod arguments;
mod attend;
mod call;
#[cfg(feature = "cuda")]
mod cuda;
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
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::cuda::{
        cuda_align_backward, cuda_align_forward, cuda_attend_backward, cuda_attend_forward, cuda_check, cuda_info,
        cuda_look_in, cuda_sink_backward, cuda_sink_forward,
    };
    #[pymodule_export]
    use super::info::{_product_rate, build_info, explain, list_errors};
    #[pymodule_export]
    use super::sink::{sink_backward, sink_forward};
    #[pymodule_export]
    use super::tensor::{Tensor, describe};
    #[pymodule_export]
    use super::testing::{_allocate_for_test, _panic_for_test};
}
