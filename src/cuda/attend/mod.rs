//! Plans of modular attention.

mod sum;

pub use sum::{SumParams, sum};
