//! The host side of CUDA, without a GPU: the run-time compiler, the cache, problems, the driver.

mod cache;
mod driver;
mod nvrtc;
mod problem;
