//! k' = k keep + (k X + eps sum of the rows of X) / ||k + eps||, a task a head: both products take the key as it is, which
//! a bfloat16 operand holds exactly.

use super::TOKENS;
use super::basis::{Accumulator, Sizes, inverse_norms, mixed, normalise, operands, sum_of_others, tiles};
use crate::cpu::buffer::Buffer;
use crate::cpu::dot::Dot;
use crate::cpu::kernel::gemm::{Left, Right, Size};
use crate::cpu::kernel::pack;
use crate::cpu::simd::{Simd, Task};
use crate::cpu::{CpuReal, parallel};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::{AlignOutputs, AlignProblem};

pub(super) fn run<D, T>(
    d: D,
    threads: usize,
    problem: &AlignProblem<'_, T>,
    outputs: &mut AlignOutputs<'_, T>,
) -> Result<()>
where
    D: Dot<Real = T::Acc>,
    T: Element<Acc: CpuReal>,
{
    let sizes = Sizes::new(d.simd(), problem);
    let tasks = sizes.batch * sizes.heads;
    let parameters = Parameters::new(d, problem, &sizes)?;
    let worker = |_| Worker::new(d, problem, sizes, &parameters);
    let mut workers = (0..threads.min(tasks)).map(worker).collect::<Result<Vec<_>>>()?;
    let outputs = &*outputs;
    parallel::run(&mut workers, tasks, |worker, task| {
        let head = [task / sizes.heads, task % sizes.heads];
        d.enter(HeadTask { worker, head, outputs });
    });
    Ok(())
}

/// keep as right operands, and mix.
struct Parameters<R: Real> {
    keep: Buffer<R>,
    /// What keep lost to the rounding of its operands; none where it lost nothing. A keep near the identity would not be
    /// the same without its last bits.
    rest: Option<Buffer<R>>,
    mix: Buffer<R>,
}

impl<R: CpuReal> Parameters<R> {
    fn new<D, T>(d: D, problem: &AlignProblem<'_, T>, sizes: &Sizes) -> Result<Self>
    where
        D: Dot<Real = R>,
        T: Element<Acc = R>,
    {
        let squares = || sizes.squares("packed parameters");
        let (mut keep, mut mix, mut rest) = (squares()?, squares()?, None);
        tiles(&problem.keep, sizes, &mut keep);
        tiles(&problem.mix, sizes, &mut mix);
        if D::DEPTH > 1 {
            let mut lost = squares()?;
            let any = d.enter(Operands { d, sizes, tiles: &mut keep, lost: &mut lost });
            rest = any.then_some(lost);
        }
        Ok(Self { keep, rest, mix })
    }
}

/// Makes right operands of square tiles and of what they lose by it; returns whether that is anything.
struct Operands<'t, D: Dot> {
    d: D,
    sizes: &'t Sizes,
    tiles: &'t mut Buffer<D::Real>,
    lost: &'t mut Buffer<D::Real>,
}

impl<D: Dot> Task for Operands<'_, D> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Self { d, sizes, tiles, lost } = self;
        let s = d.simd();
        let mut units = [D::Unit::default(); 16];
        for at in (0..tiles.len()).step_by(D::Simd::LANES) {
            // SAFETY: whole registers of two buffers of one size; a register holds at most 16 units.
            unsafe {
                let numbers = s.load(tiles.as_ptr().add(at));
                d.store_left(units.as_mut_ptr(), 0, numbers);
                s.store(lost.as_mut_ptr().add(at), s.sub(numbers, d.load_left(units.as_ptr(), 0)));
            }
        }
        let any = lost.iter().any(|&lost| lost != D::Real::ZERO);
        operands(d, sizes, tiles);
        operands(d, sizes, lost);
        any
    }
}

/// One head.
struct HeadTask<'w, 'a, D: Dot, T: Element<Acc = D::Real>> {
    worker: &'w mut Worker<'a, D, T>,
    head: [usize; 2],
    outputs: &'w AlignOutputs<'a, T>,
}

impl<D: Dot, T: Element<Acc = D::Real>> Task for HeadTask<'_, '_, D, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.worker.prepare(self.head, self.outputs);
        self.worker.align(self.head, self.outputs);
    }
}

struct Worker<'a, D: Dot, T: Element<Acc = D::Real>> {
    d: D,
    problem: &'a AlignProblem<'a, T>,
    sizes: Sizes,
    parameters: &'a Parameters<D::Real>,
    accumulator: Accumulator<D::Simd>,
    bases: Buffer<D::Real>,
    others: Buffer<D::Real>,
    /// X of every modality as right operands, and eps times the sums of their rows.
    maps: Buffer<D::Real>,
    shifts: Buffer<D::Real>,
    norms: Vec<D::Real>,
    key: Buffer<D::Real>,
    aligned: Buffer<D::Real>,
    inverse: Vec<D::Real>,
    /// Which tokens the tile holds.
    tokens: Vec<usize>,
}

impl<'a, D: Dot, T: Element<Acc = D::Real>> Worker<'a, D, T> {
    fn new(d: D, problem: &'a AlignProblem<'a, T>, sizes: Sizes, parameters: &'a Parameters<D::Real>) -> Result<Self> {
        Ok(Self {
            d,
            problem,
            sizes,
            parameters,
            accumulator: Accumulator::new(d.simd(), sizes)?,
            bases: sizes.squares("the bases of a head")?,
            others: Buffer::new(sizes.square(), "the bases of a head")?,
            maps: sizes.squares("the maps of a head")?,
            shifts: Buffer::new(sizes.modalities * sizes.stride, "the maps of a head")?,
            norms: vec![D::Real::ZERO; sizes.modalities * sizes.depth],
            key: sizes.token_tile("a tile of keys")?,
            aligned: sizes.token_tile("a tile of aligned keys")?,
            inverse: vec![D::Real::ZERO; TOKENS],
            tokens: Vec::with_capacity(TOKENS),
        })
    }

    /// Bases of the head, written out where they were computed, and the map X of every modality that occurs.
    #[inline(always)]
    fn prepare(&mut self, head: [usize; 2], outputs: &AlignOutputs<'_, T>) {
        let (d, s, sizes) = (self.d, self.d.simd(), self.sizes);
        match &self.problem.basis {
            Some(basis) => tiles(&basis.index(head), &sizes, &mut self.bases),
            None => self.accumulator.bases(self.problem, head, &mut self.bases),
        }
        if let (Some(basis), None) = (&outputs.basis, &self.problem.basis) {
            for m in 0..sizes.modalities {
                for r in 0..sizes.depth {
                    // SAFETY: row r of tile m; this task alone owns the head.
                    unsafe {
                        let source = self.bases.as_ptr().add(m * sizes.square() + r * sizes.stride);
                        let target = basis.block([head[0], head[1], m, r]).as_mut_ptr();
                        target.copy_from_nonoverlapping(source, sizes.depth);
                    }
                }
            }
        }
        normalise(s, &sizes, &mut self.bases, &mut self.norms);
        for a in 0..sizes.modalities {
            if self.problem.modality.row(head[0]).contains(&(a as i32)) {
                sum_of_others(s, &sizes, &self.bases, a, &mut self.others);
                let at = a * sizes.square();
                mixed(s, &sizes, (&self.others, &raw const self.parameters.mix[at]), &raw mut self.maps[at]);
                let shift = &mut self.shifts[a * sizes.stride..][..sizes.stride];
                shift.fill(D::Real::ZERO);
                for r in 0..sizes.depth {
                    // SAFETY: row r of tile a, and a row of shifts.
                    unsafe {
                        let row = self.maps.as_ptr().add(at + r * sizes.stride);
                        pack::accumulate(s, row, self.problem.eps, shift.as_mut_ptr(), (sizes.vectors, true));
                    }
                }
                operands(d, &sizes, &mut self.maps[at..][..sizes.square()]);
            }
        }
    }

    /// The aligned keys of the head; padding passes through.
    #[inline(always)]
    fn align(&mut self, [b, h]: [usize; 2], outputs: &AlignOutputs<'_, T>) {
        let problem = self.problem;
        for a in PADDING..self.sizes.modalities as i32 {
            self.tokens.clear();
            for (token, &id) in problem.modality.row(b).iter().enumerate() {
                if id == a {
                    self.tokens.push(token);
                }
                if self.tokens.len() == TOKENS {
                    self.tile([b, h], a, outputs);
                }
            }
            self.tile([b, h], a, outputs);
        }
    }

    #[inline(always)]
    fn tile(&mut self, [b, h]: [usize; 2], a: i32, outputs: &AlignOutputs<'_, T>) {
        let (s, sizes) = (self.d.simd(), self.sizes);
        // SAFETY: a tile has a row for each of at most `TOKENS` tokens; this task alone owns the head's keys.
        unsafe {
            for (row, &token) in self.tokens.iter().enumerate() {
                let target = self.key.as_mut_ptr().add(row * sizes.stride);
                pack::row(s, &self.problem.key, [b, h, token], D::Real::ONE, target);
            }
            let mut result = self.key.as_ptr();
            if a != PADDING {
                self.map(a as usize);
                result = self.aligned.as_ptr();
            }
            for (row, &token) in self.tokens.iter().enumerate() {
                let target = outputs.aligned.block([b, h, token]).as_mut_ptr();
                pack::unpack(s, result.add(row * sizes.stride), D::Real::ONE, sizes.depth, target);
            }
        }
        self.tokens.clear();
    }

    /// The tile's keys, of modality `a`, aligned; they become a left operand.
    #[inline(always)]
    fn map(&mut self, a: usize) {
        let (d, s, sizes) = (self.d, self.d.simd(), self.sizes);
        let count = self.tokens.len();
        let at = a * sizes.square();
        let size = Size { depth: sizes.depth.div_ceil(D::DEPTH), ..sizes.size(count) };
        // SAFETY: `count` rows of both tiles, square tiles of this modality, its row of shifts.
        unsafe {
            inverse_norms(s, &sizes, self.problem.eps, self.key.as_ptr(), &mut self.inverse[..count]);
            for row in 0..count {
                pack::left(d, self.key.as_mut_ptr().add(row * sizes.stride), sizes.vectors);
            }
            let left = || Left { pointer: self.key.as_ptr().cast(), row_stride: sizes.stride, depth_stride: 1 };
            let right = |tiles: *const D::Real| Right::rows(d, tiles.add(at).cast(), sizes.stride);
            let aligned = self.aligned.as_mut_ptr();
            d.product(size, left(), right(self.maps.as_ptr()), sizes.target(aligned, false));
            let shift = self.shifts.as_ptr().add(a * sizes.stride);
            for (row, &inverse) in self.inverse[..count].iter().enumerate() {
                let (row, inverse) = (aligned.add(row * sizes.stride), s.splat(inverse));
                for v in (0..sizes.vectors).map(|v| v * D::Simd::LANES) {
                    s.store(row.add(v), s.mul(s.add(s.load(row.add(v)), s.load(shift.add(v))), inverse));
                }
            }
            for keep in [Some(&self.parameters.keep), self.parameters.rest.as_ref()].into_iter().flatten() {
                d.product(size, left(), right(keep.as_ptr()), sizes.target(aligned, true));
            }
        }
    }
}
