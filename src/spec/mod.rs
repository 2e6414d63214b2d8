//! The specification: every formula as slow, readable scalar code, forward and backward.
//!
//! The kernels are tested against this module run in float64. It is generic over the element type, stores what they
//! store and computes in [`Element::Acc`](crate::dtype::Element::Acc), so it also shows what a plain loop makes of a
//! narrower dtype.
//!
//! Equations are those of the paper (arXiv 2507.04635). Row vectors throughout; `j` is a key, `i` a query, `a` and `m`
//! modalities.
//!
//! | symbol | formula | equation | function |
//! |---|---|---|---|
//! | k^ | (k + eps) / ‖k + eps‖₂ | 5 | [`align::forward`] |
//! | G^m | Σ k^ⱼᵀ wⱼ over context tokens j of modality m; w = k^ or v | 5 | [`align::forward`] |
//! | ‖G‖ | each row of G divided by its length; a zero row stays zero | 5 | [`align::forward`] |
//! | T^a | Σ ‖G^m‖ over m ≠ a | 6 | [`align::forward`] |
//! | k' | k keep_a + k^ (T^a mix_a) | 6 | [`align::forward`] |
//! | dk, dv, dkeep, dmix, dG | chain rule through k', T, ‖G‖, G and k^ | | [`align::backward`] |
//! | log Z | base + log Σ exp(-t decay) over t = 0 .. e-1, e = max(span - 1 - position, 0) | 10 | [`mask::pseudo_sink`] |
//! | ddecay, dbase | Σ dz · ∂log Z/∂decay, Σ dz | | [`mask::pseudo_sink_backward`] |
//! | s | scale q·k' + bias\[m(i), m(j)\] | 7, 8 | [`attend::forward`] |
//! | o, "joint" | Σ exp(s) v / (Σ exp(s) + exp(z)) over self and cross keys together | 9 | [`attend::forward`] |
//! | o, "split" | o_self + o_cross, each over its own keys and its own z | 7, 8 | [`attend::forward`] |
//! | L | log(Σ exp(s) + exp(z)), natural | | [`attend::forward`] |
//! | mass | (Σ P over self keys, Σ P over cross keys, exp(z - L)) | | [`attend::forward`] |
//! | dq, dk, dv, dz, dbias | P = exp(s - L), dS = P (dP - delta), dz = -exp(z - L) delta, delta = dO·o | | [`attend::backward`] |

pub mod align;
pub mod attend;
mod linear;
pub mod mask;
