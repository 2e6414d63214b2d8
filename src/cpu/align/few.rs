//! Forward for few tokens with a basis given, as in a decoding step: k' = k keep + ((k^ T) mix), so that no product of two
//! D x D matrices is made, and basis, keep and mix are read where they lie.

use super::basis::{Sizes, unit_keys};
use crate::cpu::buffer::Buffer;
use crate::cpu::kernel::few::{Rows, Source, weighted_sums};
use crate::cpu::kernel::pack;
use crate::cpu::simd::{Simd, Task};
use crate::cpu::{CpuReal, parallel};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::{AlignOutputs, AlignProblem};
use crate::view::View;
use std::ops::Range;

/// Heads of a task, which share the reading of keep and mix.
const HEADS: usize = 4;

/// Whether a problem comes this way: few enough tokens that mapping them costs less than mapping mix, and matrices whose
/// rows are whole registers.
pub(super) fn suits<S: Simd<Real = T::Acc>, T: Element>(_: S, problem: &AlignProblem<'_, T>) -> bool {
    let [.., tokens, depth] = problem.key.shape();
    let lies = [problem.keep, problem.mix].iter().all(|parameter| parameter.strides()[2] == 1);
    let given = problem.basis.is_some_and(|basis| basis.strides()[4] == 1);
    given && lies && 2 * tokens <= depth && depth.is_multiple_of(S::LANES)
}

pub(super) fn run<S, T>(
    s: S,
    threads: usize,
    problem: &AlignProblem<'_, T>,
    outputs: &AlignOutputs<'_, T>,
) -> Result<()>
where
    S: Simd<Real = T::Acc>,
    T: Element<Acc: CpuReal>,
{
    let sizes = Sizes::new(s, problem);
    let shares = sizes.heads.div_ceil(HEADS);
    let tasks = sizes.batch * shares;
    let mut workers = (0..threads.min(tasks)).map(|_| Worker::new(s, problem, sizes)).collect::<Result<Vec<_>>>()?;
    parallel::run(&mut workers, tasks, |worker, task| {
        let first = task % shares * HEADS;
        let heads = first..(first + HEADS).min(sizes.heads);
        s.vectorize(Share { worker, batch: task / shares, heads, outputs });
    });
    Ok(())
}

/// Some heads of one batch row.
struct Share<'w, 'a, S: Simd, T: Element<Acc = S::Real>> {
    worker: &'w mut Worker<'a, S, T>,
    batch: usize,
    heads: Range<usize>,
    outputs: &'w AlignOutputs<'a, T>,
}

impl<S: Simd, T: Element<Acc = S::Real>> Task for Share<'_, '_, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { worker, batch, heads, outputs } = self;
        for a in PADDING..worker.sizes.modalities as i32 {
            worker.tokens.clear();
            let ids = worker.problem.modality.row(batch).iter().enumerate();
            worker.tokens.extend(ids.filter(|&(_, &id)| id == a).map(|(token, _)| token));
            if !worker.tokens.is_empty() {
                worker.modality((batch, heads.clone()), a, outputs);
            }
        }
    }
}

struct Worker<'a, S: Simd, T: Element<Acc = S::Real>> {
    s: S,
    problem: &'a AlignProblem<'a, T>,
    sizes: Sizes,
    /// The tokens of one modality.
    tokens: Vec<usize>,
    key: Buffer<S::Real>,
    unit: Buffer<S::Real>,
    /// Unit keys, each number divided by the norm of its row of a basis.
    scaled: Buffer<S::Real>,
    /// k^ T
    mapped: Buffer<S::Real>,
    aligned: Buffer<S::Real>,
    inverse: Vec<S::Real>,
    /// One over the norm of each row of a basis; 0 for a zero row.
    factors: Buffer<S::Real>,
    /// 0 .. D: every row of a matrix is taken.
    every: Vec<usize>,
}

impl<'a, S: Simd, T: Element<Acc = S::Real>> Worker<'a, S, T> {
    fn new(s: S, problem: &'a AlignProblem<'a, T>, sizes: Sizes) -> Result<Self> {
        let rows = HEADS.min(sizes.heads) * Rows::<()>::padded(sizes.tokens);
        let tile = || Buffer::new(rows * sizes.stride, "a tile of tokens");
        Ok(Self {
            s,
            problem,
            sizes,
            tokens: Vec::with_capacity(sizes.tokens),
            key: tile()?,
            unit: tile()?,
            scaled: tile()?,
            mapped: tile()?,
            aligned: tile()?,
            inverse: vec![S::Real::ZERO; rows],
            factors: Buffer::new(sizes.depth, "the norms of a basis")?,
            every: (0..sizes.depth).collect(),
        })
    }

    /// The tokens of one modality in some heads; a head's rows are filled up to what the products touch.
    #[inline(always)]
    fn modality(&mut self, (b, heads): (usize, Range<usize>), a: i32, outputs: &AlignOutputs<'_, T>) {
        let (s, sizes, problem) = (self.s, self.sizes, self.problem);
        let each = Rows::<()>::padded(self.tokens.len());
        let rows = heads.len() * each;
        for (head, h) in heads.clone().enumerate() {
            for (token, &j) in self.tokens.iter().enumerate() {
                // SAFETY: the tile holds every token of the heads.
                unsafe {
                    let target = self.key.as_mut_ptr().add((head * each + token) * sizes.stride);
                    pack::row(s, &problem.key, [b, h, j], S::Real::ONE, target);
                }
            }
        }
        let mut result = self.key.as_ptr();
        if a != PADDING {
            let all = rows * sizes.stride;
            self.unit[..all].copy_from_slice(&self.key[..all]);
            self.mapped[..all].fill(S::Real::ZERO);
            self.aligned[..all].fill(S::Real::ZERO);
            // SAFETY: `rows` rows of the tile.
            unsafe { unit_keys(s, &sizes, problem.eps, self.unit.as_mut_ptr(), &mut self.inverse[..rows]) };
            for (head, h) in heads.clone().enumerate() {
                for m in (0..sizes.modalities).filter(|&m| m != a as usize) {
                    self.map([b, h, m], head * each);
                }
            }
            for (tile, parameter) in [(&self.key, problem.keep), (&self.mapped, problem.mix)] {
                let tile = Rows { pointer: tile.as_ptr(), stride: sizes.stride, count: rows };
                let sums = Rows { pointer: self.aligned.as_mut_ptr(), stride: sizes.stride, count: rows };
                // SAFETY: tiles of `rows` rows, which are whole fours; D rows of D numbers in whole registers.
                unsafe { weighted_sums(s, sizes.vectors, tile, self.matrix(&parameter.index([a as usize])), sums) };
            }
            result = self.aligned.as_ptr();
        }
        for (head, h) in heads.enumerate() {
            for (token, &j) in self.tokens.iter().enumerate() {
                // SAFETY: a row of the tile; this task alone owns the keys of its heads.
                unsafe {
                    let target = outputs.aligned.block([b, h, j]).as_mut_ptr();
                    let source = result.add((head * each + token) * sizes.stride);
                    pack::unpack(s, source, S::Real::ONE, sizes.depth, target);
                }
            }
        }
    }

    /// Adds k^ times the normed basis of modality m to the mapped keys of one head, whose rows begin at `first`.
    #[inline(always)]
    fn map(&mut self, [b, h, m]: [usize; 3], first: usize) {
        let (s, sizes) = (self.s, self.sizes);
        let basis: View<'_, S::Real, 2> = self.problem.basis.expect("asked for by `suits`").index([b, h, m]);
        self.norms(&basis);
        let count = self.tokens.len();
        for row in first..first + count {
            for v in 0..sizes.vectors {
                let at = row * sizes.stride + v * S::LANES;
                // SAFETY: a register of a row of both tiles, and of the factors.
                unsafe {
                    let unit = s.load(self.unit.as_ptr().add(at));
                    let factors = s.load(self.factors.as_ptr().add(v * S::LANES));
                    s.store(self.scaled.as_mut_ptr().add(at), s.mul(unit, factors));
                }
            }
        }
        // SAFETY: the head's rows of both tiles, filled up to whole fours; D rows of D numbers in whole registers.
        unsafe {
            let scaled = self.scaled.as_ptr().add(first * sizes.stride);
            let mapped = self.mapped.as_mut_ptr().add(first * sizes.stride);
            let scaled = Rows { pointer: scaled, stride: sizes.stride, count };
            let sums = Rows { pointer: mapped, stride: sizes.stride, count };
            weighted_sums(s, sizes.vectors, scaled, self.matrix(&basis), sums);
        }
    }

    /// One over the norm of every row of a basis.
    #[inline(always)]
    fn norms(&mut self, basis: &View<'_, S::Real, 2>) {
        let (s, sizes) = (self.s, self.sizes);
        for first in (0..sizes.depth).step_by(S::LANES) {
            let mut squares = [s.zero(); 16];
            for (l, square) in squares.iter_mut().enumerate().take(S::LANES) {
                let row = basis.pointer_at([first + l, 0]);
                for v in 0..sizes.vectors {
                    // SAFETY: a register of a row of the basis: D is whole registers.
                    let numbers = unsafe { s.load(row.wrapping_add(v * S::LANES)) };
                    *square = s.mul_add(numbers, numbers, *square);
                }
            }
            // SAFETY: a register of the factors.
            unsafe { s.store(self.factors.as_mut_ptr().add(first), s.sum_each(&squares)) };
        }
        for factor in &mut self.factors[..sizes.depth] {
            *factor = if *factor == S::Real::ZERO { S::Real::ZERO } else { S::Real::ONE / factor.sqrt() };
        }
    }

    /// All rows of a D x D matrix.
    fn matrix(&self, view: &View<'_, S::Real, 2>) -> Source<'_, S::Real> {
        Source { pointer: view.pointer_at([0, 0]), stride: view.strides()[0], chosen: &self.every }
    }
}
