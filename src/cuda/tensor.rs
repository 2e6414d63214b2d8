//! Tensors on a device: an address, never dereferenced on the host.

use crate::dtype::DType;
use crate::layout::contiguous_strides;

/// A tensor of `R` dimensions in device memory. Copying it copies the description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceTensor<const R: usize> {
    /// Address of element (0, 0, ..).
    pub pointer: u64,
    /// Type of the elements.
    pub dtype: DType,
    /// Sizes.
    pub shape: [usize; R],
    /// Strides in elements; 0 repeats.
    pub strides: [isize; R],
}

impl<const R: usize> DeviceTensor<R> {
    /// A row-major tensor.
    pub fn contiguous(pointer: u64, dtype: DType, shape: [usize; R]) -> Self {
        Self { pointer, dtype, shape, strides: contiguous_strides(shape) }
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the elements lie row-major without gaps; strides of dimensions of one element do not matter.
    pub fn is_contiguous(&self) -> bool {
        let wanted = contiguous_strides(self.shape);
        self.count() == 0 || (0..R).all(|axis| self.shape[axis] == 1 || self.strides[axis] == wanted[axis])
    }

    /// Whether every row (the last dimension) is contiguous and begins at a multiple of `bytes`: what vector loads need.
    pub fn has_aligned_rows(&self, bytes: usize) -> bool {
        let rows = |axis: usize| {
            self.shape[axis] == 1 || self.strides[axis] * self.dtype.size() as isize % bytes as isize == 0
        };
        let last = R - 1;
        self.count() == 0
            || self.pointer.is_multiple_of(bytes as u64)
                && (self.shape[last] == 1 || self.strides[last] == 1)
                && (0..last).all(rows)
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
        Some(Self { shape, strides, ..*self })
    }

    /// The same tensor without the first `count` entries of a dimension.
    pub fn skip(&self, axis: usize, count: usize) -> Self {
        assert!(count <= self.shape[axis], "{count} entries to skip of shape {:?}", self.shape);
        let mut shape = self.shape;
        shape[axis] -= count;
        let bytes = count as i64 * self.strides[axis] as i64 * self.dtype.size() as i64;
        Self { pointer: self.pointer.wrapping_add_signed(bytes), shape, ..*self }
    }

    /// The same tensor with a last dimension of size 1 added.
    pub fn with_last<const S: usize>(&self) -> DeviceTensor<S> {
        assert_eq!(S, R + 1);
        let (mut shape, mut strides) = ([1; S], [1; S]);
        shape[..R].copy_from_slice(&self.shape);
        strides[..R].copy_from_slice(&self.strides);
        DeviceTensor { pointer: self.pointer, dtype: self.dtype, shape, strides }
    }

    /// The strides as kernels take them.
    pub fn long_strides(&self) -> [i64; R] {
        self.strides.map(|stride| stride as i64)
    }
}

/// The value of `-D DTYPE` for a floating dtype; the kernels' `types.cuh` lists them.
pub fn dtype_code(dtype: DType) -> i64 {
    match dtype {
        DType::Float32 => 0,
        DType::Float64 => 1,
        DType::BFloat16 => 2,
        DType::Float16 => 3,
        other => unreachable!("problems are validated: {}", other.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_aligned_where_pointer_and_strides_are() {
        let tensor = DeviceTensor::contiguous(256, DType::BFloat16, [2, 3, 8]);
        assert!(tensor.is_contiguous() && tensor.has_aligned_rows(16));
        assert!(!DeviceTensor { pointer: 264, ..tensor }.has_aligned_rows(16));
        assert!(!DeviceTensor { strides: [27, 9, 1], ..tensor }.has_aligned_rows(16));
        assert!(!DeviceTensor { strides: [1, 2, 6], ..tensor }.has_aligned_rows(16));
        let repeated = DeviceTensor { shape: [1, 3, 8], ..tensor }.broadcast([5, 3, 8]).unwrap();
        assert!(repeated.has_aligned_rows(16) && !repeated.is_contiguous());
        assert!(tensor.broadcast([5, 3, 8]).is_none());
    }

    #[test]
    fn entries_are_skipped_by_bytes() {
        let tensor = DeviceTensor::contiguous(256, DType::Int64, [2, 3]);
        assert_eq!(tensor.skip(1, 2), DeviceTensor { pointer: 272, shape: [2, 1], ..tensor });
    }
}
