//! What lies between the keys and the aligned keys: the bases G, their row norms, and X = T mix.
//!
//! Square tiles are D x D with rows of `stride` numbers, D in whole registers; the padding is zero.

use super::TOKENS;
use crate::cpu::buffer::Buffer;
use crate::cpu::dot::Dot;
use crate::cpu::kernel::gemm::{Left, Right, Size, Target, gemm};
use crate::cpu::kernel::pack;
use crate::cpu::simd::{Simd, Task};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::problem::{AlignProblem, Basis};
use crate::view::View;

/// Sizes that both directions need at hand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) tokens: usize,
    pub(super) depth: usize,
    pub(super) modalities: usize,
    /// D in whole registers.
    pub(super) vectors: usize,
    /// Row stride of every tile.
    pub(super) stride: usize,
}

impl Sizes {
    pub(super) fn new<S: Simd<Real = T::Acc>, T: Element>(_: S, problem: &AlignProblem<'_, T>) -> Self {
        let [batch, heads, tokens, depth] = problem.key.shape();
        let vectors = depth.div_ceil(S::LANES);
        let stride = (vectors + 1) * S::LANES;
        Self { batch, heads, tokens, depth, modalities: problem.modalities(), vectors, stride }
    }

    /// Size of one square tile.
    pub(super) fn square(&self) -> usize {
        self.depth * self.stride
    }

    /// One square tile for every modality.
    pub(super) fn squares<R: Real>(&self, what: &'static str) -> Result<Buffer<R>> {
        Buffer::new(self.modalities * self.square(), what)
    }

    /// A tile of tokens.
    pub(super) fn token_tile<R: Real>(&self, what: &'static str) -> Result<Buffer<R>> {
        Buffer::new(TOKENS.min(self.tokens) * self.stride, what)
    }

    /// The product of a tile of `rows` with a square tile, both of D columns.
    pub(super) fn size(&self, rows: usize) -> Size {
        Size { rows, vectors: self.vectors, depth: self.depth }
    }

    /// Tile `a` as left operand.
    pub(super) fn left<R>(&self, pointer: *const R) -> Left<R> {
        Left { pointer, row_stride: self.stride, depth_stride: 1 }
    }

    /// The transpose of tile `a` as left operand.
    pub(super) fn left_transposed<R>(&self, pointer: *const R) -> Left<R> {
        Left { pointer, row_stride: 1, depth_stride: self.stride }
    }

    /// A tile as result.
    pub(super) fn target<R>(&self, pointer: *mut R, accumulate: bool) -> Target<R> {
        Target { pointer, row_stride: self.stride, accumulate }
    }
}

/// A parameter, or the bases of one head, (M, D, D), into square tiles.
pub(super) fn tiles<R: Real>(view: &View<'_, R, 3>, sizes: &Sizes, tiles: &mut Buffer<R>) {
    let contiguous = view.strides()[2] == 1;
    for m in 0..sizes.modalities {
        for r in 0..sizes.depth {
            let row = &mut tiles[m * sizes.square() + r * sizes.stride..][..sizes.depth];
            if contiguous {
                // SAFETY: row r of tile m of a view whose columns lie side by side.
                let source = unsafe { std::slice::from_raw_parts(view.pointer_at([m, r, 0]), sizes.depth) };
                row.copy_from_slice(source);
            } else {
                row.iter_mut().enumerate().for_each(|(c, entry)| *entry = view.get([m, r, c]));
            }
        }
    }
}

/// The transpose of every square tile; a function of its own.
pub(super) fn transposed<S: Simd>(s: S, sizes: &Sizes, source: &Buffer<S::Real>, target: &mut Buffer<S::Real>) {
    s.vectorize(Transposed { s, sizes, source, target });
}

struct Transposed<'t, S: Simd> {
    s: S,
    sizes: &'t Sizes,
    source: &'t Buffer<S::Real>,
    target: &'t mut Buffer<S::Real>,
}

impl<S: Simd> Task for Transposed<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { s, sizes, source, target } = self;
        for m in 0..sizes.modalities {
            for r in (0..sizes.depth).step_by(S::LANES) {
                for c in (0..sizes.depth).step_by(S::LANES) {
                    let (from, to) =
                        (m * sizes.square() + r * sizes.stride + c, m * sizes.square() + c * sizes.stride + r);
                    let (rows, columns) = (S::LANES.min(sizes.depth - r), S::LANES.min(sizes.depth - c));
                    let mut square = [s.zero(); 16];
                    // SAFETY: rows below D of tile m; a tile's row holds D in whole registers, zero past D.
                    unsafe {
                        for (l, row) in square.iter_mut().enumerate().take(rows) {
                            *row = s.load(source.as_ptr().add(from + l * sizes.stride));
                        }
                        s.transpose(&mut square[..S::LANES]);
                        for (l, &column) in square.iter().enumerate().take(columns) {
                            s.store(target.as_mut_ptr().add(to + l * sizes.stride), column);
                        }
                    }
                }
            }
        }
    }
}

/// The unit keys (k + eps) / ||k + eps|| of a tile, in place, and the inverse norms.
///
/// # Safety
/// `tile` must hold a row for every entry of `inverse`.
#[inline(always)]
pub(super) unsafe fn unit_keys<S: Simd>(
    s: S,
    sizes: &Sizes,
    eps: S::Real,
    tile: *mut S::Real,
    inverse: &mut [S::Real],
) {
    let shift = s.splat(eps);
    for (row, inverse) in inverse.iter_mut().enumerate() {
        // SAFETY: a row of the tile; the columns past D stay zero.
        unsafe {
            let row = tile.add(row * sizes.stride);
            for v in 0..sizes.vectors {
                let at = row.add(v * S::LANES);
                s.store(at, s.first(sizes.depth - v * S::LANES, s.add(s.load(at), shift), s.zero()));
            }
            *inverse = S::Real::ONE / pack::dot(s, row, row, sizes.vectors).sqrt();
            let factor = s.splat(*inverse);
            for v in 0..sizes.vectors {
                let at = row.add(v * S::LANES);
                s.store(at, s.mul(s.load(at), factor));
            }
        }
    }
}

/// 1 / ||k + eps|| of every row of a tile.
///
/// # Safety
/// `tile` must hold a row for every entry of `inverse`.
#[inline(always)]
pub(super) unsafe fn inverse_norms<S: Simd>(
    s: S,
    sizes: &Sizes,
    eps: S::Real,
    tile: *const S::Real,
    inverse: &mut [S::Real],
) {
    let shift = s.splat(eps);
    for (row, inverse) in inverse.iter_mut().enumerate() {
        let mut squares = s.zero();
        for v in 0..sizes.vectors {
            // SAFETY: a register of a row of the tile.
            let key = unsafe { s.load(tile.add(row * sizes.stride + v * S::LANES)) };
            let shifted = s.first(sizes.depth - v * S::LANES, s.add(key, shift), s.zero());
            squares = s.mul_add(shifted, shifted, squares);
        }
        *inverse = S::Real::ONE / s.sum(squares).sqrt();
    }
}

/// Square tiles, in place, become right operands.
#[inline(always)]
pub(super) fn operands<D: Dot>(d: D, sizes: &Sizes, tiles: &mut [D::Real]) {
    if D::DEPTH == 1 {
        return;
    }
    for tile in tiles.chunks_exact_mut(sizes.square()) {
        let tile = tile.as_mut_ptr();
        // SAFETY: D rows of whole registers; a unit has the size of a number and is written after its numbers were read, no
        // further on.
        unsafe { pack::right(d, tile, sizes.stride, [sizes.depth, sizes.vectors], tile.cast()) };
    }
}

/// Computes bases: k^ᵀ w summed over the context tokens of each modality, a tile of tokens at a time.
pub(super) struct Accumulator<S: Simd> {
    s: S,
    sizes: Sizes,
    unit: Buffer<S::Real>,
    value: Buffer<S::Real>,
    inverse: Vec<S::Real>,
}

impl<S: Simd> Accumulator<S> {
    pub(super) fn new(s: S, sizes: Sizes) -> Result<Self> {
        let unit = sizes.token_tile("a tile of unit keys")?;
        let value = sizes.token_tile("a tile of values")?;
        Ok(Self { s, sizes, unit, value, inverse: vec![S::Real::ZERO; TOKENS] })
    }

    /// All bases of head (b, h) into `bases`, a square tile for every modality.
    #[inline(always)]
    pub(super) fn bases<T: Element<Acc = S::Real>>(
        &mut self,
        problem: &AlignProblem<'_, T>,
        [b, h]: [usize; 2],
        bases: &mut Buffer<S::Real>,
    ) {
        bases.fill(S::Real::ZERO);
        for m in 0..self.sizes.modalities {
            let mut count = 0;
            for (token, &id) in problem.sources.row(b).iter().enumerate() {
                if id == m as i32 {
                    self.take(problem, [b, h, token], count);
                    count += 1;
                }
                if count == TOKENS {
                    self.add(problem, count, (bases, m));
                    count = 0;
                }
            }
            self.add(problem, count, (bases, m));
        }
    }

    #[inline(always)]
    fn take<T: Element<Acc = S::Real>>(&mut self, problem: &AlignProblem<'_, T>, token: [usize; 3], slot: usize) {
        let offset = slot * self.sizes.stride;
        // SAFETY: `slot` is below the number of rows of a tile.
        unsafe {
            pack::row(self.s, &problem.key, token, S::Real::ONE, self.unit.as_mut_ptr().add(offset));
            if problem.kind == Basis::Covariance {
                pack::row(self.s, &problem.value, token, S::Real::ONE, self.value.as_mut_ptr().add(offset));
            }
        }
    }

    #[inline(always)]
    fn add<T: Element<Acc = S::Real>>(
        &mut self,
        problem: &AlignProblem<'_, T>,
        count: usize,
        (bases, m): (&mut Buffer<S::Real>, usize),
    ) {
        let sizes = self.sizes;
        // SAFETY: `count` rows of the tiles were taken; tile m of the bases.
        unsafe {
            unit_keys(self.s, &sizes, problem.eps, self.unit.as_mut_ptr(), &mut self.inverse[..count]);
            let weights = match problem.kind {
                Basis::Gram => self.unit.as_ptr(),
                Basis::Covariance => self.value.as_ptr(),
            };
            let size = Size { rows: sizes.depth, vectors: sizes.vectors, depth: count };
            let right = Right::rows(self.s, weights, sizes.stride);
            let target = sizes.target(bases.as_mut_ptr().add(m * sizes.square()), true);
            gemm(self.s, size, sizes.left_transposed(self.unit.as_ptr()), right, target);
        }
    }
}

/// Divides every row of every basis by its norm, which is kept; a zero row stays zero.
#[inline(always)]
pub(super) fn normalise<S: Simd>(s: S, sizes: &Sizes, bases: &mut Buffer<S::Real>, norms: &mut [S::Real]) {
    for (row, norm) in norms.iter_mut().enumerate() {
        let (m, r) = (row / sizes.depth, row % sizes.depth);
        // SAFETY: row r of tile m.
        unsafe {
            let row = bases.as_mut_ptr().add(m * sizes.square() + r * sizes.stride);
            *norm = pack::dot(s, row, row, sizes.vectors).sqrt();
            let factor = if *norm == S::Real::ZERO { S::Real::ZERO } else { S::Real::ONE / *norm };
            pack::accumulate(s, row, factor, row, (sizes.vectors, false));
        }
    }
}

/// target = sum over m != a of tile m: T^a from normed bases.
#[inline(always)]
pub(super) fn sum_of_others<S: Simd>(
    s: S,
    sizes: &Sizes,
    tiles: &Buffer<S::Real>,
    a: usize,
    target: &mut Buffer<S::Real>,
) {
    target.fill(S::Real::ZERO);
    for m in (0..sizes.modalities).filter(|&m| m != a) {
        // SAFETY: whole square tiles, which are whole registers.
        unsafe {
            let tile = tiles.as_ptr().add(m * sizes.square());
            pack::accumulate(s, tile, S::Real::ONE, target.as_mut_ptr(), (sizes.square() / S::LANES, true));
        }
    }
}

/// X^a = T^a mix_a for one modality.
#[inline(always)]
pub(super) fn mixed<S: Simd>(
    s: S,
    sizes: &Sizes,
    (others, mix): (&Buffer<S::Real>, *const S::Real),
    target: *mut S::Real,
) {
    // SAFETY: three square tiles.
    unsafe {
        let right = Right::rows(s, mix, sizes.stride);
        gemm(s, sizes.size(sizes.depth), sizes.left(others.as_ptr()), right, sizes.target(target, false));
    }
}
