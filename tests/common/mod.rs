//! What the integration tests share: random problems that own their buffers, and the one tolerance rule.
#![allow(dead_code, unused_imports, reason = "every test file uses its own part of this")]

mod align;
mod attend;
mod close;
mod ranges;
mod rng;
mod sizes;
mod tensor;
mod tokens;

pub(crate) use align::{AlignBuffers, AlignCase, AlignGradientBuffers, AlignOptions, Context};
pub(crate) use attend::{AttendBuffers, AttendCase, AttendGradientBuffers, AttendOptions, BiasTable, Sinks};
pub(crate) use close::{assert_close, assert_close_for_size, assert_each_close, derivative, relative_error, tolerance};
pub(crate) use ranges::Ranges;
pub(crate) use rng::Rng;
pub(crate) use tensor::{Storage, Tensor};
pub(crate) use tokens::{Layout, Padding, ids as token_ids};
