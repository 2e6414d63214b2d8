//! Borrowed tensors: [`RawView`] knows its dtype only at run time and its rank is free; [`View`] and [`ViewMut`] are typed.
//!
//! Strides are in elements and may be zero (broadcast) or negative for what is read. What is written is always a fresh,
//! contiguous tensor, so a [`ViewMut`] never overlaps itself.

use crate::dtype::{DType, Scalar};
use crate::error::{Error, Result};
use crate::layout::{contiguous_strides, count, for_each_index, print_shape};
use std::marker::PhantomData;

/// A tensor of any dtype and rank, borrowed from its owner.
#[derive(Debug, Clone)]
pub struct RawView<'a> {
    pointer: *mut u8,
    dtype: DType,
    shape: Vec<usize>,
    strides: Vec<isize>,
    owner: PhantomData<&'a u8>,
}

// SAFETY: a view is a borrowed slice with strides: shared reads are safe from any thread. Writing goes through
// `ViewMut`, whose constructors demand exclusive access.
unsafe impl Send for RawView<'_> {}
// SAFETY: as above.
unsafe impl Sync for RawView<'_> {}

impl<'a> RawView<'a> {
    /// A view of foreign memory.
    ///
    /// # Safety
    /// For `'a`, every element that `shape` and `strides` (in elements) reach from `pointer` must be readable, aligned
    /// and of dtype `dtype`; if the view is turned into a [`ViewMut`], writable and reached by nobody else.
    pub unsafe fn new(pointer: *mut u8, dtype: DType, shape: Vec<usize>, strides: Vec<isize>) -> Self {
        debug_assert_eq!(shape.len(), strides.len());
        Self { pointer, dtype, shape, strides, owner: PhantomData }
    }

    /// The dtype.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The strides in elements.
    pub fn strides(&self) -> &[isize] {
        &self.strides
    }

    /// Where element (0, 0, ...) lies.
    pub fn pointer(&self) -> *mut u8 {
        self.pointer
    }

    /// The same tensor with its type known.
    pub fn typed<T: Scalar, const R: usize>(&self, argument: &'static str, wanted: &str) -> Result<View<'a, T, R>> {
        let (shape, strides) = self.parts(argument, wanted)?;
        if self.dtype != T::DTYPE {
            return Err(Error::DType {
                argument,
                given: self.dtype.name().to_owned(),
                wanted: T::DTYPE.name().to_owned(),
            });
        }
        Ok(View { pointer: self.pointer.cast(), shape, strides, owner: PhantomData })
    }

    /// The same tensor with its type known, to be written. It must be contiguous: results are always fresh tensors.
    ///
    /// # Safety
    /// The memory must be writable and reached by nobody else while the result lives.
    pub unsafe fn typed_mut<T: Scalar, const R: usize>(
        &self,
        argument: &'static str,
        wanted: &str,
    ) -> Result<ViewMut<'a, T, R>> {
        let view = self.typed::<T, R>(argument, wanted)?;
        let expected = contiguous_strides(view.shape);
        let fits = (0..R).all(|axis| view.shape[axis] <= 1 || view.strides[axis] == expected[axis]);
        if !fits && count(&view.shape) != Some(0) {
            let given = format!("{} with strides {:?}", print_shape(&view.shape), view.strides);
            return Err(Error::Shape { argument, given, wanted: "a contiguous tensor to write into".to_owned() });
        }
        Ok(ViewMut { pointer: view.pointer.cast_mut(), shape: view.shape, owner: PhantomData })
    }

    /// Visits every element of a tensor of any integer dtype in row-major order; returns the shape. What does not fit
    /// an `i64` counts as the largest one.
    pub fn integers<const R: usize>(
        &self,
        argument: &'static str,
        wanted: &str,
        visit: impl FnMut([usize; R], i64),
    ) -> Result<[usize; R]> {
        fn each<T: Scalar + TryInto<i64>, const R: usize>(
            view: Result<View<'_, T, R>>,
            mut visit: impl FnMut([usize; R], i64),
        ) -> Result<[usize; R]> {
            let view = view?;
            for_each_index(view.shape, |index| visit(index, view.get(index).try_into().unwrap_or(i64::MAX)));
            Ok(view.shape)
        }
        match self.dtype {
            DType::Int8 => each::<i8, R>(self.typed(argument, wanted), visit),
            DType::Int16 => each::<i16, R>(self.typed(argument, wanted), visit),
            DType::Int32 => each::<i32, R>(self.typed(argument, wanted), visit),
            DType::Int64 => each::<i64, R>(self.typed(argument, wanted), visit),
            DType::UInt8 => each::<u8, R>(self.typed(argument, wanted), visit),
            DType::UInt16 => each::<u16, R>(self.typed(argument, wanted), visit),
            DType::UInt32 => each::<u32, R>(self.typed(argument, wanted), visit),
            DType::UInt64 => each::<u64, R>(self.typed(argument, wanted), visit),
            other => {
                let (given, wanted) = (other.name().to_owned(), "an integer dtype".to_owned());
                Err(Error::DType { argument, given, wanted })
            }
        }
    }

    fn parts<const R: usize>(&self, argument: &'static str, wanted: &str) -> Result<([usize; R], [isize; R])> {
        let shape = <[usize; R]>::try_from(self.shape.as_slice()).ok();
        let strides = <[isize; R]>::try_from(self.strides.as_slice()).ok();
        shape.zip(strides).ok_or_else(|| Error::Shape {
            argument,
            given: print_shape(&self.shape),
            wanted: wanted.to_owned(),
        })
    }
}

/// A tensor to read: `R` dimensions of any stride.
#[derive(Debug)]
pub struct View<'a, T, const R: usize> {
    pointer: *const T,
    shape: [usize; R],
    strides: [isize; R],
    owner: PhantomData<&'a T>,
}

impl<T, const R: usize> Clone for View<'_, T, R> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, const R: usize> Copy for View<'_, T, R> {}

// SAFETY: a shared slice with strides.
unsafe impl<T: Sync, const R: usize> Send for View<'_, T, R> {}
// SAFETY: as above.
unsafe impl<T: Sync, const R: usize> Sync for View<'_, T, R> {}

impl<'a, T: Copy, const R: usize> View<'a, T, R> {
    /// A contiguous tensor over a slice; panics where the slice is too short.
    pub fn from_slice(data: &'a [T], shape: [usize; R]) -> Self {
        assert!(count(&shape).is_some_and(|n| n <= data.len()), "{} elements for shape {shape:?}", data.len());
        Self { pointer: data.as_ptr(), shape, strides: contiguous_strides(shape), owner: PhantomData }
    }

    /// A tensor over a slice whose element (i, j, ..) lies at `offset + i * strides[0] + j * strides[1] + ..`; `None` where
    /// any element would lie outside the slice.
    pub fn strided(data: &'a [T], offset: usize, shape: [usize; R], strides: [isize; R]) -> Option<Self> {
        if count(&shape)? > 0 {
            let (mut first, mut last) = (offset as isize, offset as isize);
            for (&size, &stride) in shape.iter().zip(&strides) {
                let reach = (size as isize - 1).checked_mul(stride)?;
                first = first.checked_add(reach.min(0))?;
                last = last.checked_add(reach.max(0))?;
            }
            if first < 0 || last as usize >= data.len() {
                return None;
            }
        }
        let pointer = data.as_ptr().wrapping_add(offset);
        Some(Self { pointer, shape, strides, owner: PhantomData })
    }

    /// The shape.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    /// The strides in elements.
    pub fn strides(&self) -> [isize; R] {
        self.strides
    }

    /// One element; panics outside the shape.
    #[inline]
    pub fn get(&self, index: [usize; R]) -> T {
        let mut offset = 0;
        for axis in 0..R {
            assert!(index[axis] < self.shape[axis], "index {index:?} outside shape {:?}", self.shape);
            offset += index[axis] as isize * self.strides[axis];
        }
        // SAFETY: the index lies inside the shape, and the constructor vouched for every element of it.
        unsafe { *self.pointer.offset(offset) }
    }

    /// Pointer to the element at `index`, which may be one past the end in any dimension whose elements are not read.
    #[inline]
    pub fn pointer_at(&self, index: [usize; R]) -> *const T {
        let offset: isize = (0..R).map(|axis| index[axis] as isize * self.strides[axis]).sum();
        self.pointer.wrapping_offset(offset)
    }

    /// The part of the tensor under a leading index; `S` = `R` - `L`.
    pub fn index<const L: usize, const S: usize>(&self, leading: [usize; L]) -> View<'a, T, S> {
        assert_eq!(L + S, R);
        let offset: isize = (0..L)
            .map(|axis| {
                assert!(leading[axis] < self.shape[axis], "index {leading:?} outside shape {:?}", self.shape);
                leading[axis] as isize * self.strides[axis]
            })
            .sum();
        let mut view =
            View { pointer: self.pointer.wrapping_offset(offset), shape: [0; S], strides: [0; S], owner: PhantomData };
        view.shape.copy_from_slice(&self.shape[L..]);
        view.strides.copy_from_slice(&self.strides[L..]);
        view
    }

    /// The same tensor without the first `count` entries of a dimension.
    pub fn skip(&self, axis: usize, count: usize) -> Self {
        assert!(count <= self.shape[axis], "{count} entries to skip of shape {:?}", self.shape);
        let mut shape = self.shape;
        shape[axis] -= count;
        let pointer = self.pointer.wrapping_offset(count as isize * self.strides[axis]);
        Self { pointer, shape, ..*self }
    }

    /// The same elements with dimensions of size 1 repeated (stride 0) up to `shape`; `None` where that cannot be.
    pub fn broadcast(&self, shape: [usize; R]) -> Option<Self> {
        let mut strides = self.strides;
        for axis in 0..R {
            if self.shape[axis] != shape[axis] {
                if self.shape[axis] != 1 {
                    return None;
                }
                strides[axis] = 0;
            }
        }
        Some(Self { pointer: self.pointer, shape, strides, owner: PhantomData })
    }

    /// The same tensor with a first dimension of size 1 added.
    pub fn with_first<const S: usize>(&self) -> View<'a, T, S> {
        assert_eq!(S, R + 1);
        let mut view = View { pointer: self.pointer, shape: [1; S], strides: [0; S], owner: PhantomData };
        view.shape[1..].copy_from_slice(&self.shape);
        view.strides[1..].copy_from_slice(&self.strides);
        view
    }

    /// The same tensor with a last dimension of size 1 added.
    pub fn with_last<const S: usize>(&self) -> View<'a, T, S> {
        assert_eq!(S, R + 1);
        let mut shape = [1; S];
        let mut strides = [1; S];
        shape[..R].copy_from_slice(&self.shape);
        strides[..R].copy_from_slice(&self.strides);
        View { pointer: self.pointer, shape, strides, owner: PhantomData }
    }
}

/// A contiguous tensor to write.
#[derive(Debug)]
pub struct ViewMut<'a, T, const R: usize> {
    pointer: *mut T,
    shape: [usize; R],
    owner: PhantomData<&'a mut T>,
}

// SAFETY: an exclusive slice.
unsafe impl<T: Send, const R: usize> Send for ViewMut<'_, T, R> {}
// SAFETY: shared access gives only a pointer; who writes through it answers for disjointness.
unsafe impl<T: Send, const R: usize> Sync for ViewMut<'_, T, R> {}

impl<'a, T: Copy, const R: usize> ViewMut<'a, T, R> {
    /// A contiguous tensor over a slice; panics where the slice is too short.
    pub fn from_slice(data: &'a mut [T], shape: [usize; R]) -> Self {
        assert!(count(&shape).is_some_and(|n| n <= data.len()), "{} elements for shape {shape:?}", data.len());
        Self { pointer: data.as_mut_ptr(), shape, owner: PhantomData }
    }

    /// The shape.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    /// All elements, row-major.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        let length = count(&self.shape).unwrap_or(0);
        if length == 0 {
            return &mut [];
        }
        // SAFETY: the constructor vouched for a contiguous tensor of this shape, held exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, length) }
    }

    /// One element.
    ///
    /// # Safety
    /// No two live references may be to the same element: each is handed to one task only.
    #[allow(clippy::mut_from_ref, reason = "tasks write disjoint elements in parallel; see the safety note")]
    pub unsafe fn element(&self, index: [usize; R]) -> &mut T {
        // SAFETY: the caller's promise.
        unsafe { &mut self.block(index)[0] }
    }

    /// The elements of one contiguous block: the part of the tensor under a leading index.
    ///
    /// # Safety
    /// No two live blocks may overlap: each leading index is handed to one task only.
    #[allow(
        clippy::mut_from_ref,
        reason = "tasks write disjoint blocks of one tensor in parallel; see the safety note"
    )]
    pub unsafe fn block<const L: usize>(&self, leading: [usize; L]) -> &mut [T] {
        assert!(L <= R && (0..L).all(|axis| leading[axis] < self.shape[axis]), "{leading:?} outside {:?}", self.shape);
        let size: usize = self.shape[L..].iter().product();
        let index = (0..L).fold(0, |offset, axis| offset * self.shape[axis] + leading[axis]);
        // SAFETY: the block lies inside the tensor; that it is not aliased is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(index * size), size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_reads_through_its_strides() {
        let data: Vec<i32> = (0..12).collect();
        let view = View::from_slice(&data, [3, 4]);
        assert_eq!(view.get([2, 1]), 9);
        let wide = View::from_slice(&data, [1, 4]).broadcast([5, 4]).unwrap();
        assert_eq!(wide.get([4, 3]), 3);
        assert!(view.broadcast([5, 4]).is_none());
    }

    #[test]
    fn a_strided_view_stays_inside_its_slice() {
        let data: Vec<i32> = (0..12).collect();
        assert_eq!(View::strided(&data, 11, [3, 2], [-4, -1]).unwrap().get([2, 1]), 2);
        assert!(View::strided(&data, 0, [3, 2], [5, 2]).is_none());
        assert!(View::strided(&data, 7, [3, 2], [-4, 1]).is_none());
        assert!(View::strided(&data, 99, [0, 2], [5, 2]).is_some());
    }

    #[test]
    #[should_panic(expected = "outside shape")]
    fn an_index_outside_the_shape_panics() {
        View::from_slice(&[1, 2], [2]).get([2]);
    }

    #[test]
    fn blocks_are_rows_of_the_tensor() {
        let mut data = vec![0; 12];
        let view = ViewMut::from_slice(&mut data, [3, 4]);
        // SAFETY: two different rows.
        unsafe { view.block([1]) }.fill(7);
        assert_eq!(data, [0, 0, 0, 0, 7, 7, 7, 7, 0, 0, 0, 0]);
    }
}
