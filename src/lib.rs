//! MODA attention (`MOdular` Duplex Attention, ICML 2025, arXiv 2507.04635): duplex alignment of the keys with the
//! other modality's Gram basis, then attention under a modular mask whose pseudo-scores take surplus mass.
//!
//! The crate is the numeric core, forward and backward, on the CPU. It names no Python unless the feature `python` is on.
//! Modules in layer order; a module imports only from the ones above it:
//!
//! | layer | modules | what lives there |
//! |---|---|---|
//! | 0 | `error` `dtype` `layout` `view` `ids` `range` `problem` | the vocabulary; a problem is validated once, then trusted |
//! | 1 | `spec` | the formulas as slow, readable scalar code: what the kernels are tested against |
//! | 2 | `cpu` | the fast kernels, written once over a small SIMD trait |
//! | 3 | `dispatch` `op` | which kernel runs and why; the public operators |
//! | 4 | `candle` | custom operators and a module for candle |
//! | 4 | `dlpack` | foreign tensors become views, in one place |
//! | 5 | `py` | the Python extension module |

pub mod error;

pub mod dtype;
pub mod ids;
pub mod layout;
pub mod problem;
pub mod range;
pub mod view;

pub mod spec;

pub mod cpu;

pub mod dispatch;
pub mod op;

#[cfg(feature = "candle")]
pub mod candle;

#[cfg(feature = "python")]
mod dlpack;

#[cfg(feature = "python")]
mod py;

pub use error::{Error, Result};
