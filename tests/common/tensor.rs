//! A tensor that owns its memory and may lie in it in any order.

use super::rng::{narrow, widen};
use moda_attn::dtype::Element;
use moda_attn::layout::contiguous_strides;
use moda_attn::view::{RawView, View};

/// How a tensor (B, H, N, D) lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Row-major.
    Contiguous,
    /// (B, N, H, D), as projections leave it.
    TokensFirst,
    /// Every element followed by a NaN that must never be read.
    Gaps,
    /// Tokens back to front: a negative stride.
    Reversed,
}

impl Storage {
    pub(crate) const ALL: [Self; 4] = [Self::Contiguous, Self::TokensFirst, Self::Gaps, Self::Reversed];
}

/// Values and where they lie.
#[derive(Debug, Clone)]
pub(crate) struct Tensor<T, const R: usize> {
    pub(crate) shape: [usize; R],
    buffer: Vec<T>,
    offset: usize,
    strides: [isize; R],
}

impl<T: Element, const R: usize> Tensor<T, R> {
    /// A row-major tensor.
    pub(crate) fn new(values: Vec<T>, shape: [usize; R]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        Self { shape, buffer: values, offset: 0, strides: contiguous_strides(shape) }
    }

    /// A tensor of NaN, for results: what is not written shows.
    pub(crate) fn poisoned(shape: [usize; R]) -> Self {
        Self::new(vec![narrow(f64::NAN); shape.iter().product()], shape)
    }

    pub(crate) fn view(&self) -> View<'_, T, R> {
        if self.buffer.is_empty() {
            return View::from_slice(&[], self.shape);
        }
        let pointer = self.buffer[self.offset..].as_ptr().cast_mut().cast();
        // SAFETY: `place` below maps every index of the shape into the buffer with these same strides; only read.
        let raw = unsafe { RawView::new(pointer, T::DTYPE, self.shape.to_vec(), self.strides.to_vec()) };
        raw.typed("tensor", "this rank").unwrap()
    }

    /// All of the memory, where the first element lies in it, the strides.
    pub(crate) fn memory(&self) -> (&[T], usize, [isize; R]) {
        (&self.buffer, self.offset, self.strides)
    }

    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values in row-major order.
    pub(crate) fn values(&self) -> Vec<T> {
        (0..self.len()).map(|flat| self.buffer[self.place(flat)]).collect()
    }

    pub(crate) fn get(&self, index: [usize; R]) -> T {
        self.view().get(index)
    }

    /// The value at a row-major position.
    pub(crate) fn flat(&self, flat: usize) -> T {
        self.buffer[self.place(flat)]
    }

    pub(crate) fn set_flat(&mut self, flat: usize, value: T) {
        let place = self.place(flat);
        self.buffer[place] = value;
    }

    /// Overwrites everything under a leading index.
    pub(crate) fn fill<const L: usize>(&mut self, leading: [usize; L], value: T) {
        let size: usize = self.shape[L..].iter().product();
        let first = (0..L).fold(0, |index, axis| index * self.shape[axis] + leading[axis]) * size;
        (first..first + size).for_each(|flat| self.set_flat(flat, value));
    }

    /// All elements of a row-major tensor, to make a `ViewMut` of.
    pub(crate) fn slice_mut(&mut self) -> &mut [T] {
        assert_eq!(self.strides, contiguous_strides(self.shape));
        &mut self.buffer
    }

    /// The same values in float64, row-major; exact.
    pub(crate) fn widened(&self) -> Tensor<f64, R> {
        Tensor::new(self.values().into_iter().map(widen).collect(), self.shape)
    }

    fn place(&self, mut flat: usize) -> usize {
        let mut place = self.offset as isize;
        for axis in (0..R).rev() {
            place += (flat % self.shape[axis]) as isize * self.strides[axis];
            flat /= self.shape[axis];
        }
        place as usize
    }
}

impl<T: Element> Tensor<T, 4> {
    /// The same values, laid out in memory as `storage` says.
    pub(crate) fn stored(self, storage: Storage) -> Self {
        let [_, h, n, d] = self.shape;
        let [s0, s1, s2, s3] = contiguous_strides(self.shape);
        let (strides, offset, length) = match storage {
            Storage::Contiguous => ([s0, s1, s2, s3], 0, self.len()),
            Storage::TokensFirst => ([s0, d as isize, (h * d) as isize, 1], 0, self.len()),
            Storage::Gaps => ([2 * s0, 2 * s1, 2 * s2, 2 * s3], 0, 2 * self.len()),
            Storage::Reversed => ([s0, s1, -s2, s3], n.saturating_sub(1) * d, self.len()),
        };
        let buffer = vec![narrow(f64::NAN); length];
        let mut stored = Self { shape: self.shape, buffer, offset, strides };
        (0..self.len()).for_each(|flat| stored.set_flat(flat, self.flat(flat)));
        stored
    }
}
