//! Products of a few tile rows with many rows of a tensor that are read once, where they lie: no packing.

use crate::cpu::simd::{Simd, Task};
use crate::dtype::Element;

/// Chosen rows of a tensor, side by side in their columns and whole registers wide: row n begins at
/// `pointer + chosen[n] * stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a, E> {
    pub(crate) pointer: *const E,
    pub(crate) stride: isize,
    pub(crate) chosen: &'a [usize],
}

impl<E> Source<'_, E> {
    /// Where row n begins; past the last one, the last.
    #[inline(always)]
    fn row(&self, n: usize) -> *const E {
        let n = n.min(self.chosen.len() - 1);
        self.pointer.wrapping_offset(self.chosen[n] as isize * self.stride)
    }
}

/// A tile's rows, `stride` numbers apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<P> {
    pub(crate) pointer: P,
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

impl<P> Rows<P> {
    /// Rows that the products may touch, whatever they hold: tiles of rows are filled up to four.
    pub(crate) const fn padded(count: usize) -> usize {
        count.next_multiple_of(4)
    }
}

/// Bytes that the reading of a row asks for memory ahead: rows mostly lie side by side, and memory answers late.
const AHEAD: usize = 8192;

/// Values that take part in one run of sums: as many rows of D = 128 as lie well in the first-level cache.
const RUN: usize = 32;

/// Reads a register of a source row, and asks for what will be read a little later.
///
/// # Safety
/// A register must be readable.
#[inline(always)]
unsafe fn fetch<S: Simd, E: Element<Acc = S::Real>>(s: S, pointer: *const E) -> S::Vector {
    s.prefetch(pointer.wrapping_byte_add(AHEAD));
    // SAFETY: the caller's contract.
    unsafe { s.load_as(pointer) }
}

/// target[r][n] = row r . source row n, over `vectors` registers; a function of its own.
///
/// # Safety
/// `rows` and `target` must hold [`Rows::padded`] rows, those of `target` the number of source rows rounded up to whole
/// registers; every source row must be readable for `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn dots<S: Simd, E: Element<Acc = S::Real>>(
    s: S,
    vectors: usize,
    rows: Rows<*const S::Real>,
    source: Source<'_, E>,
    target: Rows<*mut S::Real>,
) {
    s.vectorize(Dots { s, vectors, rows, source, target });
}

/// Made by [`dots`] alone, whose contract holds for it.
struct Dots<'a, S: Simd, E> {
    s: S,
    vectors: usize,
    rows: Rows<*const S::Real>,
    source: Source<'a, E>,
    target: Rows<*mut S::Real>,
}

impl<S: Simd, E: Element<Acc = S::Real>> Task for Dots<'_, S, E> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { s, vectors, rows, source, target } = self;
        for first in (0..source.chosen.len()).step_by(S::LANES) {
            let mut keys = [source.pointer; 16];
            for (n, key) in keys.iter_mut().enumerate() {
                *key = source.row(first + n);
            }
            let mut row = 0;
            while row < rows.count {
                // SAFETY: rows below the padded count, and LANES source rows.
                row += unsafe {
                    let left = Rows { pointer: rows.pointer.add(row * rows.stride), ..rows };
                    let to = Rows { pointer: target.pointer.add(row * target.stride + first), ..target };
                    match (rows.count - row, S::LANES) {
                        (1, 16) => dots_of::<S, E, 1, 16>(s, vectors, left, &keys, to),
                        (1, 8) => dots_of::<S, E, 1, 8>(s, vectors, left, &keys, to),
                        (1, _) => dots_of::<S, E, 1, 4>(s, vectors, left, &keys, to),
                        (2, 16) => dots_of::<S, E, 2, 8>(s, vectors, left, &keys, to),
                        (2, 8) => dots_of::<S, E, 2, 4>(s, vectors, left, &keys, to),
                        (2, _) => dots_of::<S, E, 2, 2>(s, vectors, left, &keys, to),
                        (_, 16) => dots_of::<S, E, 4, 4>(s, vectors, left, &keys, to),
                        (_, 8) => dots_of::<S, E, 4, 2>(s, vectors, left, &keys, to),
                        _ => dots_of::<S, E, 4, 1>(s, vectors, left, &keys, to),
                    }
                };
            }
        }
    }
}

/// `ROWS` rows with LANES source rows, `KEYS` at a time; ROWS x KEYS is LANES, so that one register takes their sums.
/// Returns `ROWS`.
#[inline(always)]
unsafe fn dots_of<S: Simd, E: Element<Acc = S::Real>, const ROWS: usize, const KEYS: usize>(
    s: S,
    vectors: usize,
    rows: Rows<*const S::Real>,
    keys: &[*const E; 16],
    target: Rows<*mut S::Real>,
) -> usize {
    for first in (0..S::LANES).step_by(KEYS) {
        let mut sums = [[s.zero(); KEYS]; ROWS];
        // SAFETY: the contract of `dots`; the lanes are as many as the sums.
        unsafe {
            for v in 0..vectors {
                let mut right = [s.zero(); KEYS];
                for (n, right) in right.iter_mut().enumerate() {
                    *right = fetch(s, keys[first + n].add(v * S::LANES));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let left = s.load(rows.pointer.add(row * rows.stride + v * S::LANES));
                    for (sum, &right) in sums.iter_mut().zip(&right) {
                        *sum = s.mul_add(left, right, *sum);
                    }
                }
            }
            let mut lanes = [<S::Real as Default>::default(); 16];
            s.store(lanes.as_mut_ptr(), s.sum_each(sums.as_flattened()));
            for row in 0..ROWS {
                let to = target.pointer.add(row * target.stride + first);
                to.copy_from_nonoverlapping(lanes.as_ptr().add(row * KEYS), KEYS);
            }
        }
    }
    ROWS
}

/// sums[r] += sum over n of weights[r][n] source row n, over `vectors` registers; a function of its own.
///
/// # Safety
/// `weights` and `sums` must hold [`Rows::padded`] rows, those of `weights` a number for every source row, those of `sums`
/// `vectors` registers; every source row must be readable for `vectors` registers.
#[inline(always)]
pub(crate) unsafe fn weighted_sums<S: Simd, E: Element<Acc = S::Real>>(
    s: S,
    vectors: usize,
    weights: Rows<*const S::Real>,
    source: Source<'_, E>,
    sums: Rows<*mut S::Real>,
) {
    s.vectorize(WeightedSums { s, vectors, weights, source, sums });
}

/// Made by [`weighted_sums`] alone, whose contract holds for it.
struct WeightedSums<'a, S: Simd, E> {
    s: S,
    vectors: usize,
    weights: Rows<*const S::Real>,
    source: Source<'a, E>,
    sums: Rows<*mut S::Real>,
}

impl<S: Simd, E: Element<Acc = S::Real>> Task for WeightedSums<'_, S, E> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { s, vectors, weights, source, sums } = self;
        for first in (0..source.chosen.len()).step_by(RUN) {
            let chosen = &source.chosen[first..(first + RUN).min(source.chosen.len())];
            let mut row = 0;
            while row < weights.count {
                let height = if weights.count - row < 3 { weights.count - row } else { 4 };
                let mut v = 0;
                while v < vectors {
                    // SAFETY: rows below the padded count, registers below `vectors`.
                    v += unsafe {
                        let source = Source { pointer: source.pointer.wrapping_add(v * S::LANES), chosen, ..source };
                        let weights = Rows { pointer: weights.pointer.add(row * weights.stride + first), ..weights };
                        let sums = Rows { pointer: sums.pointer.add(row * sums.stride + v * S::LANES), ..sums };
                        // 32 registers take 16 sums and what goes into them, 16 registers 8.
                        match (height, vectors - v) {
                            (1, 8..) => run::<S, E, 1, 8>(s, weights, source, sums),
                            (1, 4..) => run::<S, E, 1, 4>(s, weights, source, sums),
                            (1, _) => run::<S, E, 1, 1>(s, weights, source, sums),
                            (2, 8..) if S::TALL == 12 => run::<S, E, 2, 8>(s, weights, source, sums),
                            (2, 4..) => run::<S, E, 2, 4>(s, weights, source, sums),
                            (2, _) => run::<S, E, 2, 1>(s, weights, source, sums),
                            (_, 4..) if S::TALL == 12 => run::<S, E, 4, 4>(s, weights, source, sums),
                            (_, 2..) => run::<S, E, 4, 2>(s, weights, source, sums),
                            _ => run::<S, E, 4, 1>(s, weights, source, sums),
                        }
                    };
                }
                row += height;
            }
        }
    }
}

/// One run over the source rows; returns `VECTORS`.
#[inline(always)]
unsafe fn run<S: Simd, E: Element<Acc = S::Real>, const ROWS: usize, const VECTORS: usize>(
    s: S,
    weights: Rows<*const S::Real>,
    source: Source<'_, E>,
    target: Rows<*mut S::Real>,
) -> usize {
    let mut sums = [[s.zero(); VECTORS]; ROWS];
    // SAFETY: the contract of `weighted_sums`.
    unsafe {
        for (n, &chosen) in source.chosen.iter().enumerate() {
            let at = source.pointer.wrapping_offset(chosen as isize * source.stride);
            let mut right = [s.zero(); VECTORS];
            for (v, right) in right.iter_mut().enumerate() {
                *right = fetch(s, at.add(v * S::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = s.splat(*weights.pointer.add(row * weights.stride + n));
                for (sum, &right) in sums.iter_mut().zip(&right) {
                    *sum = s.mul_add(weight, right, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let at = target.pointer.add(row * target.stride + v * S::LANES);
                s.store(at, s.add(s.load(at), sum));
            }
        }
    }
    VECTORS
}
