//! Modular masked attention on the CPU: forward and backward over tiles of rows and keys.

mod backward;
mod decode;
mod finish;
mod forward;
mod mask;
mod mass;
mod plan;
mod rows;

pub(super) use backward::run as backward;
pub(super) use forward::run as forward;
