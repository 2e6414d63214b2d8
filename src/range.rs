//! Key ranges: the interval of keys that each query may see, read once from any integer dtype.

use crate::error::{Error, Result};
use crate::layout::print_shape;
use crate::view::RawView;
use std::ops::Range;

/// `first <= j < last` for every query of a batch; one batch row may stand for all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRanges {
    batch: usize,
    queries: usize,
    /// `[first, last]` row by row.
    flat: Vec<[usize; 2]>,
}

impl KeyRanges {
    /// Ranges from `batch * queries` pairs, clamped to the `keys` there are; panics where the length differs.
    pub fn from_slice(pairs: &[[i64; 2]], [batch, queries]: [usize; 2], keys: usize) -> Self {
        assert_eq!(pairs.len(), batch * queries);
        let flat = pairs.iter().map(|pair| pair.map(|bound| clamp(bound, keys))).collect();
        Self { batch, queries, flat }
    }

    /// Reads a tensor (B|1, Nq, 2) of any integer dtype. Bounds below 0 or above `keys` are clamped, so that a window may
    /// begin before the first key.
    pub fn read(argument: &'static str, tensor: &RawView<'_>, keys: usize) -> Result<Self> {
        let wanted = "(B|1, Nq, 2): the first key of a query and one past its last";
        let &[batch, queries, 2] = tensor.shape() else {
            return Err(Error::Shape { argument, given: print_shape(tensor.shape()), wanted: wanted.to_owned() });
        };
        let count = batch.saturating_mul(queries);
        let mut flat: Vec<[usize; 2]> = Vec::new();
        let bytes = count.saturating_mul(size_of::<[usize; 2]>());
        flat.try_reserve_exact(count).map_err(|_| Error::Allocation { bytes, what: "key ranges" })?;
        tensor.integers::<3>(argument, wanted, |[.., bound], given| {
            let given = clamp(given, keys);
            match flat.last_mut() {
                Some(pair) if bound == 1 => pair[1] = given,
                _ => flat.push([given, given]),
            }
        })?;
        Ok(Self { batch, queries, flat })
    }

    /// The shape (B|1, Nq).
    pub fn shape(&self) -> [usize; 2] {
        [self.batch, self.queries]
    }

    /// The keys of one query; empty where its first one is not below its last.
    #[inline]
    pub fn get(&self, batch: usize, query: usize) -> Range<usize> {
        let row = if self.batch == 1 { 0 } else { batch };
        let [first, last] = self.flat[row * self.queries + query];
        first..last.max(first)
    }
}

fn clamp(bound: i64, keys: usize) -> usize {
    usize::try_from(bound.max(0)).map_or(keys, |bound| bound.min(keys))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{DType, Scalar};

    fn raw<T: Scalar>(data: &mut [T], shape: [usize; 3]) -> RawView<'_> {
        let strides = vec![(shape[1] * shape[2]) as isize, shape[2] as isize, 1];
        // SAFETY: a contiguous slice of this shape.
        unsafe { RawView::new(data.as_mut_ptr().cast(), T::DTYPE, shape.to_vec(), strides) }
    }

    #[test]
    fn bounds_come_from_any_integer_dtype_and_are_clamped() {
        let wide = KeyRanges::read("key_range", &raw(&mut [-3i64, 2, 1, i64::MAX], [1, 2, 2]), 5).unwrap();
        assert_eq!([wide.get(0, 0), wide.get(7, 1)], [0..2, 1..5]);
        let narrow = KeyRanges::read("key_range", &raw(&mut [-3i8, 2, 1, 9], [1, 2, 2]), 5).unwrap();
        assert_eq!(wide, narrow);
        assert_eq!(wide, KeyRanges::from_slice(&[[-3, 2], [1, 100]], [1, 2], 5));
        let unsigned = KeyRanges::read("key_range", &raw(&mut [0, 2, 1, u64::MAX], [1, 2, 2]), 5).unwrap();
        assert_eq!(wide, unsigned);
    }

    #[test]
    fn a_range_that_ends_before_it_begins_is_empty() {
        assert!(KeyRanges::from_slice(&[[3, 1]], [1, 1], 5).get(0, 0).is_empty());
    }

    #[test]
    fn what_is_no_pair_of_integers_is_refused() {
        let error = KeyRanges::read("key_range", &raw(&mut [0i32; 3], [1, 1, 3]), 5).unwrap_err();
        assert!(error.to_string().starts_with("key_range has shape (1, 1, 3); wanted (B|1, Nq, 2)"), "{error}");
        let error = KeyRanges::read("key_range", &raw(&mut [0f32; 2], [1, 1, 2]), 5).unwrap_err();
        assert_eq!(
            error,
            Error::DType {
                argument: "key_range",
                given: DType::Float32.name().to_owned(),
                wanted: "an integer dtype".to_owned()
            }
        );
    }
}
