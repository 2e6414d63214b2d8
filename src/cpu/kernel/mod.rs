//! The inner loops, each written once over [`Simd`](super::simd::Simd).

pub(crate) mod exp2;
pub(crate) mod few;
pub(crate) mod gemm;
pub(crate) mod pack;
pub(crate) mod softmax;
