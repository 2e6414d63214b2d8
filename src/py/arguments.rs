//! From raw views to what a problem holds: typed outputs, parameters widened, integers of any width.

use crate::dtype::{DType, Element, Real, Scalar};
use crate::error::{Error, Result};
use crate::ids::{Ids, MAX_MODALITIES};
use crate::layout::{contiguous_strides, count, for_each_index, print_shape};
use crate::range::KeyRanges;
use crate::view::{RawView, View, ViewMut};

/// A tensor to write, of exactly this shape.
///
/// # Safety
/// It must be a fresh tensor that nobody else reads or writes while the result lives.
pub(super) unsafe fn output<'a, T: Scalar, const R: usize>(
    argument: &'static str,
    tensor: &RawView<'a>,
    shape: [usize; R],
) -> Result<ViewMut<'a, T, R>> {
    let wanted = print_shape(&shape);
    if tensor.shape() != shape {
        return Err(Error::Shape { argument, given: print_shape(tensor.shape()), wanted });
    }
    // SAFETY: as the caller promises.
    unsafe { tensor.typed_mut(argument, &wanted) }
}

/// A tensor to read, of exactly this shape and any strides: what backward starts from.
pub(super) fn gradient<'a, T: Scalar, const R: usize>(
    argument: &'static str,
    tensor: &RawView<'a>,
    shape: [usize; R],
) -> Result<View<'a, T, R>> {
    let wanted = print_shape(&shape);
    if tensor.shape() != shape {
        return Err(Error::Shape { argument, given: print_shape(tensor.shape()), wanted });
    }
    tensor.typed(argument, &wanted)
}

/// Modality ids of a known shape. It is checked before they are read: a broadcast view may claim any number of tokens.
pub(super) fn ids(
    argument: &'static str,
    tensor: &RawView<'_>,
    shape: [usize; 2],
    meaning: &str,
    modalities: usize,
) -> Result<Ids> {
    if tensor.shape().len() == 2 && tensor.shape() != shape {
        let wanted = format!("{} = {meaning}", print_shape(&shape));
        return Err(Error::Shape { argument, given: print_shape(tensor.shape()), wanted });
    }
    Ids::read(argument, tensor, modalities)
}

/// How many keys come before the queries where these are the last tokens, their modality not given.
pub(super) fn keys_before(modality: [usize; 2], queries: usize) -> Result<usize> {
    modality[1].checked_sub(queries).ok_or_else(|| Error::Shape {
        argument: "modality",
        given: print_shape(&modality),
        wanted: format!("(B, Nk) with Nk >= Nq = {queries}, or query_modality (B, Nq) given"),
    })
}

/// The key ranges of [B, Nq] queries on `keys` keys. The shape is checked before they are read, as for ids.
pub(super) fn key_range(tensor: &RawView<'_>, [batch, queries]: [usize; 2], keys: usize) -> Result<KeyRanges> {
    let argument = "key_range";
    if !matches!(tensor.shape(), &[rows, n, 2] if (rows == batch || rows == 1) && n == queries) {
        let wanted = format!("(B|1, Nq, 2) = ({batch}|1, {queries}, 2)");
        return Err(Error::Shape { argument, given: print_shape(tensor.shape()), wanted });
    }
    KeyRanges::read(argument, tensor, keys)
}

/// A vector of exactly this capacity, or an error where the memory is not to be had.
pub(super) fn reserve<T>(length: usize, what: &'static str) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    let bytes = length.saturating_mul(size_of::<T>());
    vector.try_reserve_exact(length).map_err(|_| Error::Allocation { bytes, what })?;
    Ok(vector)
}

/// A parameter in the type the arithmetic runs in: as it lies, or widened into a row-major copy.
#[derive(Debug)]
pub(super) enum Table<'a, R, const N: usize> {
    Lent(View<'a, R, N>),
    Widened { shape: [usize; N], numbers: Vec<R> },
}

impl<'a, R: Real> Table<'a, R, 3> {
    /// Reads a parameter (M, D, D) stored in float32, in the key's dtype `T` or in the type of the arithmetic. Its shape
    /// is checked before it is read: a broadcast view may claim any size.
    pub(super) fn square<T: Element<Acc = R>>(
        argument: &'static str,
        tensor: &RawView<'a>,
        dim: usize,
    ) -> Result<Self> {
        if !matches!(tensor.shape(), &[m, rows, columns] if m <= MAX_MODALITIES && [rows, columns] == [dim, dim]) {
            let wanted = format!("(M, {dim}, {dim}) = (M, D, D) with M from 1 to {MAX_MODALITIES}");
            return Err(Error::Shape { argument, given: print_shape(tensor.shape()), wanted });
        }
        Self::read::<T>(argument, tensor, "(M, D, D)")
    }
}

impl<'a, R: Real, const N: usize> Table<'a, R, N> {
    fn read<T: Element<Acc = R>>(argument: &'static str, tensor: &RawView<'a>, meaning: &str) -> Result<Self> {
        match tensor.dtype() {
            dtype if dtype == R::DTYPE => Ok(Self::Lent(tensor.typed(argument, meaning)?)),
            dtype if dtype == T::DTYPE => Self::widen::<T>(argument, tensor, meaning),
            DType::Float32 => Self::widen::<f32>(argument, tensor, meaning),
            other => {
                let wanted = match T::DTYPE {
                    DType::Float32 => "float32, the dtype of key".to_owned(),
                    own => format!("{}, the dtype of key, or float32", own.name()),
                };
                Err(Error::DType { argument, given: other.name().to_owned(), wanted })
            }
        }
    }

    fn widen<S: Element>(argument: &'static str, tensor: &RawView<'_>, meaning: &str) -> Result<Self> {
        let view: View<'_, S, N> = tensor.typed(argument, meaning)?;
        let shape = view.shape();
        let length = shape.iter().product();
        let mut numbers = reserve(length, "a widened parameter")?;
        let widen = |number: S| R::from_f64(number.widen().to_f64());
        if view.strides() == contiguous_strides(shape) && length > 0 {
            // SAFETY: a contiguous tensor of this many numbers.
            let lying = unsafe { std::slice::from_raw_parts(view.pointer_at([0; N]), length) };
            numbers.extend(lying.iter().map(|&number| widen(number)));
        } else {
            for_each_index(shape, |index| numbers.push(widen(view.get(index))));
        }
        Ok(Self::Widened { shape, numbers })
    }

    /// The numbers as a view.
    pub(super) fn view(&self) -> View<'_, R, N> {
        match self {
            Self::Lent(view) => *view,
            Self::Widened { shape, numbers } => View::from_slice(numbers, *shape),
        }
    }
}

/// Reads integers of any width.
pub(super) fn integers(argument: &'static str, tensor: &RawView<'_>, meaning: &str) -> Result<(Vec<i64>, [usize; 2])> {
    let mut numbers = reserve(count(tensor.shape()).unwrap_or(usize::MAX), argument)?;
    let shape = tensor.integers(argument, meaning, |_, number| numbers.push(number))?;
    Ok((numbers, shape))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn parameters_widen_from_the_dtype_of_key_or_float32() {
        let mut data = [bf16::from_f32(1.5), bf16::from_f32(-2.0)];
        // SAFETY: a contiguous slice of two elements.
        let raw = unsafe { RawView::new(data.as_mut_ptr().cast(), DType::BFloat16, vec![1, 2], vec![2, 1]) };
        let table = Table::<f32, 2>::read::<bf16>("keep", &raw, "(1, 2)").unwrap();
        assert_eq!((table.view().get([0, 0]), table.view().get([0, 1])), (1.5, -2.0));
        let error = Table::<f32, 2>::read::<f16>("keep", &raw, "(1, 2)").unwrap_err();
        assert_eq!(error.to_string(), "keep has dtype bfloat16; wanted float16, the dtype of key, or float32");
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        assert!(matches!(reserve::<f64>(1 << 50, "x"), Err(Error::Allocation { .. })));
        assert!(matches!(reserve::<f64>(usize::MAX, "x"), Err(Error::Allocation { .. })));
    }
}
