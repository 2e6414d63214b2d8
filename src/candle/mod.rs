//! The operators for [candle](candle_core), with the backward that candle's own attention kernels lack (feature `candle`,
//! CPU only): gradients reach query, key, value, keep, mix, sink and bias in float32, bfloat16, float16 and float64.
//!
//! candle's custom operators take at most three tensors, so the two tables of an operator travel as one, and so do key
//! and value of the attention; candle splits their gradients again.
//!
//! ```
//! # fn main() -> candle_core::Result<()> {
//! use candle_core::{Device, Tensor, Var};
//! use moda_attn::candle::{Attention, ids, modular_attention};
//!
//! let device = Device::Cpu;
//! let query = Var::randn(0f32, 1., (1, 4, 6, 8), &device)?; // (B, Hq, Nq, D)
//! let key = Tensor::randn(0f32, 1., (1, 2, 6, 8), &device)?; // (B, Hkv, Nk, D)
//! let value = Tensor::randn(0f32, 1., (1, 2, 6, 8), &device)?;
//! let modality = ids(&Tensor::new(&[[0i64, 1, 1, 1, 0, 0]], &device)?)?; // 0 text, 1 vision, -1 padding
//! let out = modular_attention(&query, &key, &value, &Attention::new(&modality))?;
//! let gradients = out.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&query).unwrap().dims(), query.dims());
//! # Ok(())
//! # }
//! ```

mod align;
mod attend;
mod layer;
mod sink;
mod storage;

pub use align::{Alignment, duplex_align};
pub use attend::{Attention, modular_attention, modular_attention_with_mass};
pub use layer::{ModaAttention, ModaCache, ModaConfig};
pub use sink::pseudo_sink;

use crate::ids::Ids;
use candle_core::{DType, Result, Tensor};

/// The modality ids of a tensor (B, N) of any integer dtype: -1 padding, 0 text, 1 vision, and so on.
pub fn ids(tensor: &Tensor) -> Result<Ids> {
    if !tensor.dtype().is_int() {
        candle_core::bail!("modality has dtype {:?}; wanted an integer dtype", tensor.dtype());
    }
    let (batch, tokens) = tensor.dims2()?;
    let flat: Vec<i64> = tensor.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?;
    // What no i32 holds is no id either, and is named as such.
    let flat: Vec<i32> = flat.into_iter().map(|id| i32::try_from(id).unwrap_or(i32::MIN)).collect();
    Ids::new(&flat, [batch, tokens]).map_err(storage::wrapped)
}
