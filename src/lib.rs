//! MODA attention (`MOdular` Duplex Attention, ICML 2025, arXiv 2507.04635): duplex alignment of the keys with the
//! other modality's Gram basis, then attention under a modular mask whose pseudo-scores take surplus mass.
//!
//! The crate is the numeric core, forward and backward, on the CPU; the feature `cuda` adds kernels and launches for
//! GPUs. It names no Python unless the feature `python` is on.
//! Modules in layer order; a module imports only from the ones above it:
//!
//! | layer | modules | what lives there |
//! |---|---|---|
//! | 0 | `error` `dtype` `layout` `view` `ids` `range` `shapes` `problem` | the vocabulary; a problem is validated once, then trusted |
//! | 1 | `spec` | the formulas as slow, readable scalar code: what the kernels are tested against |
//! | 2 | `cpu` | the fast kernels, written once over a small SIMD trait |
//! | 2 | `cuda` | plans for NVIDIA GPUs, their kernels, the run-time compiler |
//! | 3 | `dispatch` `op` | which kernel runs and why; the public operators |
//! | 4 | `candle` | custom operators and a module for candle |
//! | 4 | `dlpack` | foreign tensors become views, in one place |
//! | 5 | `py` | the Python extension module |
//!
//! # Attention, and where it went
//!
//! ```
//! use moda_attn::ids::Ids;
//! use moda_attn::op;
//! use moda_attn::problem::{AttendOutputs, AttendProblem, Mass, MassBy};
//! use moda_attn::view::{View, ViewMut};
//!
//! # fn main() -> moda_attn::Result<()> {
//! let (b, hq, hkv, n, d) = (1, 4, 2, 5, 8);
//! let numbers = |count: usize| (0..count).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>();
//! let (query, key, value) = (numbers(b * hq * n * d), numbers(b * hkv * n * d), numbers(b * hkv * n * d));
//! let modality = Ids::new(&[0, 1, 1, 1, 0], [b, n])?; // 0 text, 1 vision, -1 padding
//! let sink = vec![-2.0; n]; // the pseudo-scores' logit of every query, the same for all heads
//!
//! let pair = [View::from_slice(&key, [b, hkv, n, d]), View::from_slice(&value, [b, hkv, n, d])];
//! let mut problem = AttendProblem::new(View::from_slice(&query, [b, hq, n, d]), pair, &modality, &modality);
//! problem.sink = Some(View::from_slice(&sink, [1, 1, n, 1]));
//!
//! let (mut out, mut mass) = (numbers(b * hq * n * d), vec![0.0; b * hq * n * 3]);
//! let mut outputs = AttendOutputs {
//!     out: ViewMut::from_slice(&mut out, [b, hq, n, d]),
//!     logsumexp: None, // wanted where a backward is to follow
//!     parts: None,
//!     mass: Some(Mass { by: MassBy::Relation, values: ViewMut::from_slice(&mut mass, [b, hq, n, 3]) }),
//! };
//! op::modular_attention(&problem, &mut outputs, 2)?;
//! let [own, cross, pseudo] = [mass[0], mass[1], mass[2]];
//! assert!(own > 0.0 && cross == 0.0 && (own + pseudo - 1.0).abs() < 1e-6); // the first token sees itself alone
//! # Ok(())
//! # }
//! ```
//!
//! # Alignment
//!
//! ```
//! use moda_attn::ids::Ids;
//! use moda_attn::op;
//! use moda_attn::problem::{AlignOutputs, AlignProblem};
//! use moda_attn::view::{View, ViewMut};
//!
//! # fn main() -> moda_attn::Result<()> {
//! let (b, h, n, d, m) = (1, 2, 4, 3, 2);
//! let key: Vec<f64> = (0..b * h * n * d).map(|i| (i as f64).cos()).collect();
//! let modality = Ids::new(&[0, 1, 1, 0], [b, n])?;
//! let eye: Vec<f64> = (0..m * d * d).map(|i| if i % (d * d) % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
//! let none = vec![0.0; m * d * d];
//!
//! let keys = View::from_slice(&key, [b, h, n, d]);
//! let tables = [View::from_slice(&eye, [m, d, d]), View::from_slice(&none, [m, d, d])]; // keep = I, mix = 0
//! let problem = AlignProblem::new([keys, keys], &modality, tables);
//! let (mut aligned, mut basis) = (key.clone(), vec![0.0; b * h * m * d * d]);
//! let mut outputs = AlignOutputs {
//!     aligned: ViewMut::from_slice(&mut aligned, [b, h, n, d]),
//!     basis: Some(ViewMut::from_slice(&mut basis, [b, h, m, d, d])),
//! };
//! op::duplex_align(&problem, &mut outputs, 1)?;
//! assert_eq!(aligned, key);
//! # Ok(())
//! # }
//! ```

pub mod error;

pub mod dtype;
pub mod ids;
pub mod layout;
pub mod problem;
pub mod range;
mod shapes;
pub mod view;

pub mod spec;

pub mod cpu;

#[cfg(feature = "cuda")]
pub mod cuda;

pub mod dispatch;
pub mod op;

#[cfg(feature = "candle")]
pub mod candle;

#[cfg(feature = "python")]
mod dlpack;

#[cfg(feature = "python")]
mod py;

pub use error::{Error, Result};
