//! Workspace memory: aligned to cache lines, zeroed, and an error instead of an abort where there is none.

use super::pages::prefer_large;
use crate::dtype::Real;
use crate::error::{Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const ALIGNMENT: usize = 64;

/// A fixed number of zero-initialised numbers.
#[derive(Debug)]
pub(crate) struct Buffer<R: Real> {
    /// As it was allocated: the allocator makes zeros of memory that it aligns itself by writing them, page by page.
    allocated: NonNull<u8>,
    /// The first number: where `allocated` is aligned.
    pointer: NonNull<R>,
    length: usize,
}

// SAFETY: an owned allocation of plain numbers.
unsafe impl<R: Real> Send for Buffer<R> {}
// SAFETY: as above.
unsafe impl<R: Real> Sync for Buffer<R> {}

impl<R: Real> Buffer<R> {
    /// `length` zeros.
    pub(crate) fn new(length: usize, what: &'static str) -> Result<Self> {
        if length == 0 {
            return Ok(Self { allocated: NonNull::dangling(), pointer: NonNull::dangling(), length });
        }
        let failed = || Error::Allocation { bytes: length.saturating_mul(size_of::<R>()), what };
        let layout = Self::layout(length).ok_or_else(failed)?;
        // SAFETY: the layout is not of size zero.
        let allocated = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(failed)?;
        prefer_large(allocated.as_ptr(), layout.size());
        // SAFETY: the layout has room for the numbers after the next aligned address.
        let pointer = unsafe { allocated.byte_add(allocated.align_offset(ALIGNMENT)) }.cast();
        Ok(Self { allocated, pointer, length })
    }

    fn layout(length: usize) -> Option<Layout> {
        let bytes = length.checked_mul(size_of::<R>())?.checked_add(ALIGNMENT)?;
        Layout::from_size_align(bytes, align_of::<R>()).ok()
    }
}

impl<R: Real> Drop for Buffer<R> {
    fn drop(&mut self) {
        if let (Some(layout), 1..) = (Self::layout(self.length), self.length) {
            // SAFETY: allocated in `new` with this very layout.
            unsafe { dealloc(self.allocated.as_ptr(), layout) };
        }
    }
}

impl<R: Real> Deref for Buffer<R> {
    type Target = [R];
    fn deref(&self) -> &[R] {
        // SAFETY: `length` initialised numbers, or a dangling pointer with length 0.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.length) }
    }
}

impl<R: Real> DerefMut for Buffer<R> {
    fn deref_mut(&mut self) -> &mut [R] {
        // SAFETY: as in `deref`, and exclusively borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        let error = Buffer::<f64>::new(usize::MAX / 4, "a test").unwrap_err();
        assert!(matches!(error, Error::Allocation { what: "a test", .. }));
    }

    #[test]
    fn a_buffer_is_aligned_and_zero() {
        let buffer = Buffer::<f32>::new(100, "a test").unwrap();
        assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0);
        assert!(buffer.iter().all(|&x| x == 0.0) && buffer.len() == 100);
        assert!(Buffer::<f32>::new(0, "nothing").unwrap().is_empty());
    }
}
