//! From raw views to what a problem holds: typed outputs, parameters widened, integers of any width.

use crate::dtype::{DType, Element, Real, Scalar};
use crate::error::{Error, Result};
use crate::ids::{Ids, MAX_MODALITIES};
use crate::layout::print_shape;
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

/// A vector of exactly this capacity, or an error where the memory is not to be had.
pub(super) fn reserve<T>(length: usize, what: &'static str) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    let bytes = length.saturating_mul(size_of::<T>());
    vector.try_reserve_exact(length).map_err(|_| Error::Allocation { bytes, what })?;
    Ok(vector)
}

/// Numbers copied into the type the arithmetic runs in, row-major.
#[derive(Debug)]
pub(super) struct Table<R, const N: usize> {
    shape: [usize; N],
    numbers: Vec<R>,
}

impl<R: Real> Table<R, 3> {
    /// Reads a parameter (M, D, D) stored in float32, in the key's dtype `T` or in the type of the arithmetic. Its shape
    /// is checked before it is read: a broadcast view may claim any size.
    pub(super) fn square<T: Element<Acc = R>>(
        argument: &'static str,
        tensor: &RawView<'_>,
        dim: usize,
    ) -> Result<Self> {
        if !matches!(tensor.shape(), &[m, rows, columns] if m <= MAX_MODALITIES && [rows, columns] == [dim, dim]) {
            let wanted = format!("(M, {dim}, {dim}) = (M, D, D) with M from 1 to {MAX_MODALITIES}");
            return Err(Error::Shape { argument, given: print_shape(tensor.shape()), wanted });
        }
        Self::read::<T>(argument, tensor, "(M, D, D)")
    }
}

impl<R: Real, const N: usize> Table<R, N> {
    fn read<T: Element<Acc = R>>(argument: &'static str, tensor: &RawView<'_>, meaning: &str) -> Result<Self> {
        match tensor.dtype() {
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
        for_each_index(shape, |index| numbers.push(R::from_f64(view.get(index).widen().to_f64())));
        Ok(Self { shape, numbers })
    }

    /// The numbers as a view.
    pub(super) fn view(&self) -> View<'_, R, N> {
        View::from_slice(&self.numbers, self.shape)
    }
}

/// Reads integers of any width.
pub(super) fn integers(argument: &'static str, tensor: &RawView<'_>, meaning: &str) -> Result<(Vec<i64>, [usize; 2])> {
    fn read<T: Scalar + TryInto<i64>>(
        argument: &'static str,
        tensor: &RawView<'_>,
        meaning: &str,
    ) -> Result<(Vec<i64>, [usize; 2])> {
        let view: View<'_, T, 2> = tensor.typed(argument, meaning)?;
        let [rows, columns] = view.shape();
        let mut numbers = reserve(rows.saturating_mul(columns), argument)?;
        for_each_index([rows, columns], |index| numbers.push(view.get(index).try_into().unwrap_or(i64::MAX)));
        Ok((numbers, [rows, columns]))
    }
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
            let (given, wanted) = (other.name().to_owned(), "an integer dtype".to_owned());
            return Err(Error::DType { argument, given, wanted });
        }
    };
    read(argument, tensor, meaning)
}

/// Every index of a shape, in row-major order.
fn for_each_index<const N: usize>(shape: [usize; N], mut visit: impl FnMut([usize; N])) {
    if shape.contains(&0) {
        return;
    }
    let mut index = [0; N];
    loop {
        visit(index);
        let Some(axis) = (0..N).rev().find(|&axis| index[axis] + 1 < shape[axis]) else { return };
        index[axis] += 1;
        index[axis + 1..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn indices_run_row_major() {
        let mut seen = Vec::new();
        for_each_index([2, 3], |index| seen.push(index));
        assert_eq!(seen, [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]);
        for_each_index([2, 0], |_| panic!("nothing to visit"));
    }

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
