//! Modality ids, read once from any integer dtype and checked: -1 is padding, 0 .. M-1 the modalities.

use crate::dtype::{DType, Scalar};
use crate::error::{Error, Result};
use crate::layout::print_shape;
use crate::view::{RawView, View};

/// The most modalities a problem may have. Tables are M x M a head, so this bounds nothing anyone uses.
pub const MAX_MODALITIES: usize = 256;

/// The id of a padding token: never attended, never in a basis.
pub const PADDING: i32 = -1;

/// `modality[b, j]` of a batch of token rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    batch: usize,
    tokens: usize,
    flat: Vec<i32>,
}

impl Ids {
    /// Ids of `[batch, tokens]`, row after row, each -1 (padding) or a modality below [`MAX_MODALITIES`].
    pub fn new(ids: &[i32], [batch, tokens]: [usize; 2]) -> Result<Self> {
        if batch.checked_mul(tokens) != Some(ids.len()) {
            let wanted = format!("{}, row after row", print_shape(&[batch, tokens]));
            return Err(Error::Shape { argument: "modality", given: print_shape(&[ids.len()]), wanted });
        }
        let largest = MAX_MODALITIES as i32 - 1;
        if let Some(at) = ids.iter().position(|id| !(PADDING..=largest).contains(id)) {
            let (batch, token, given) = (at / tokens, at % tokens, ids[at].into());
            return Err(Error::Modality { argument: "modality", batch, token, given, largest: largest.into() });
        }
        Ok(Self { batch, tokens, flat: ids.to_vec() })
    }

    /// Reads a tensor (B, N) of any integer dtype whose ids lie in `-1 .. modalities - 1`.
    pub fn read(argument: &'static str, tensor: &RawView<'_>, modalities: usize) -> Result<Self> {
        let read = match tensor.dtype() {
            DType::Int8 => read::<i8>,
            DType::Int16 => read::<i16>,
            DType::Int32 => read::<i32>,
            DType::Int64 => read::<i64>,
            DType::UInt8 => read::<u8>,
            DType::UInt16 => read::<u16>,
            DType::UInt32 => read::<u32>,
            DType::UInt64 => read::<u64>,
            other => {
                let wanted = "an integer dtype".to_owned();
                return Err(Error::DType { argument, given: other.name().to_owned(), wanted });
            }
        };
        read(argument, tensor, modalities)
    }

    /// The shape (B, N).
    pub fn shape(&self) -> [usize; 2] {
        [self.batch, self.tokens]
    }

    /// The ids of one batch row.
    pub fn row(&self, batch: usize) -> &[i32] {
        &self.flat[batch * self.tokens..][..self.tokens]
    }

    /// Number of modalities the ids span: the largest id + 1.
    pub fn span(&self) -> usize {
        self.flat.iter().max().map_or(0, |&largest| (largest + 1) as usize)
    }

    /// The ids of the last `count` tokens of every row; `None` where a row is shorter.
    pub fn last(&self, count: usize) -> Option<Self> {
        let skip = self.tokens.checked_sub(count)?;
        let flat = (0..self.batch).flat_map(|b| self.row(b)[skip..].iter().copied()).collect();
        Some(Self { batch: self.batch, tokens: count, flat })
    }

    /// The same ids with padding outside the context: the tokens that may feed a basis. `context` is (B, N), bool.
    pub fn within(&self, context: &RawView<'_>) -> Result<Self> {
        let argument = "context";
        let wanted = || format!("{}, the shape of modality", print_shape(&self.shape()));
        if context.dtype() != DType::Bool {
            return Err(Error::DType { argument, given: context.dtype().name().to_owned(), wanted: "bool".to_owned() });
        }
        if context.shape() != self.shape() {
            return Err(Error::Shape { argument, given: print_shape(context.shape()), wanted: wanted() });
        }
        let flags: View<'_, Flag, 2> = context.typed(argument, &wanted())?;
        let ids = self.flat.iter().enumerate().map(|(at, &id)| {
            let Flag(inside) = flags.get([at / self.tokens, at % self.tokens]);
            if inside == 0 { PADDING } else { id }
        });
        Ok(Self { flat: ids.collect(), ..*self })
    }
}

/// A foreign bool: any non-zero byte is true, which Rust's own `bool` must not hold.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
struct Flag(u8);

impl Scalar for Flag {
    const DTYPE: DType = DType::Bool;
}

fn read<T: Scalar + TryInto<i64>>(argument: &'static str, tensor: &RawView<'_>, modalities: usize) -> Result<Ids> {
    let view: View<'_, T, 2> = tensor.typed(argument, "(B, N): one id a token")?;
    let [batch, tokens] = view.shape();
    let largest = modalities.min(MAX_MODALITIES) as i64 - 1;
    let count = batch.saturating_mul(tokens);
    let mut flat = Vec::new();
    let error = |_| Error::Allocation { bytes: count.saturating_mul(size_of::<i32>()), what: "modality ids" };
    flat.try_reserve_exact(count).map_err(error)?;
    for b in 0..batch {
        for j in 0..tokens {
            let given = view.get([b, j]).try_into().unwrap_or(i64::MAX);
            if !(i64::from(PADDING)..=largest).contains(&given) {
                return Err(Error::Modality { argument, batch: b, token: j, given, largest });
            }
            flat.push(given as i32);
        }
    }
    Ok(Ids { batch, tokens, flat })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw<T: Scalar>(data: &mut [T], shape: [usize; 2]) -> RawView<'_> {
        let strides = vec![shape[1] as isize, 1];
        // SAFETY: a contiguous slice of this shape.
        unsafe { RawView::new(data.as_mut_ptr().cast(), T::DTYPE, shape.to_vec(), strides) }
    }

    #[test]
    fn ids_come_from_any_integer_dtype() {
        let wide = Ids::read("modality", &raw(&mut [0i64, 1, -1, 1], [2, 2]), 2).unwrap();
        let narrow = Ids::read("modality", &raw(&mut [0i8, 1, -1, 1], [2, 2]), 2).unwrap();
        assert_eq!(wide, narrow);
        assert_eq!(wide.span(), 2);
        assert_eq!(wide.last(1).unwrap().row(0), [1]);
        assert_eq!(wide.last(3), None);
    }

    #[test]
    fn the_first_offender_is_named() {
        let error = Ids::read("modality", &raw(&mut [0i32, 1, 2, 9], [2, 2]), 2).unwrap_err();
        assert_eq!(error.to_string(), "modality[1, 0] is 2; wanted a modality id from -1 (padding) to 1");
        assert!(Ids::read("modality", &raw(&mut [u64::MAX], [1, 1]), 2).is_err());
        assert!(matches!(Ids::read("modality", &raw(&mut [0f32], [1, 1]), 2), Err(Error::DType { .. })));
    }

    #[test]
    fn a_slice_must_have_the_shape_and_known_ids() {
        let message = |ids: &[i32], shape| Ids::new(ids, shape).unwrap_err().to_string();
        assert!(message(&[0, 1, 1], [2, 2]).starts_with("modality has shape (3,)"), "{}", message(&[0, 1, 1], [2, 2]));
        assert!(message(&[0, 1, -2, 1], [2, 2]).starts_with("modality[1, 0] is -2"));
        assert!(Ids::new(&[0, 256], [1, 2]).is_err() && Ids::new(&[], [0, 5]).is_ok());
    }

    #[test]
    fn tokens_outside_the_context_feed_no_basis() {
        let ids = Ids::new(&[0, 1, -1], [1, 3]).unwrap();
        let mut flags = [0u8, 2, 1];
        // SAFETY: a contiguous slice of three bytes.
        let context = unsafe { RawView::new(flags.as_mut_ptr(), DType::Bool, vec![1, 3], vec![3, 1]) };
        assert_eq!(ids.within(&context).unwrap().row(0), [-1, 1, -1]);
    }
}
