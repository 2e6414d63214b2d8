//! Foreign tensors become views here, and only here: what comes from outside is checked once in [`foreign`](Imported).
//!
//! | file | what |
//! |---|---|
//! | `structs` | the C structs of `DLPack` 1.3, with their layout asserted |
//! | `dtype` | type codes to [`DType`](crate::dtype::DType) and back |
//! | `exchange` | the C exchange API of a tensor type: the hot path, no reference counting |
//! | `capsule` | `__dlpack__` capsules, old and versioned: consumed once, deleted once |
//! | `numpy` | `NumPy` arrays, read directly through the `numpy` crate |
//! | `foreign` | all of the above to a checked [`RawView`](crate::view::RawView) |
//! | `device` | the same for tensors on a CUDA device, which are described and never read |
//! | `export` | an owned buffer out as a managed tensor, old and versioned |

mod capsule;
#[cfg(feature = "cuda")]
mod device;
mod dtype;
mod exchange;
mod export;
mod foreign;
mod numpy;
mod structs;

#[cfg(feature = "cuda")]
pub(crate) use device::OnDevice;
pub(crate) use export::{Owned, old_capsule, versioned_capsule};
pub(crate) use foreign::{ImportError, Imported};
pub(crate) use structs::{CPU, VERSION};
