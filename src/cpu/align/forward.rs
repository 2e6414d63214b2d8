//! k' = k keep + k^ X, a task a head.

use super::TOKENS;
use super::basis::{Accumulator, Sizes, mixed, normalise, sum_of_others, tiles, unit_keys};
use crate::cpu::buffer::Buffer;
use crate::cpu::kernel::gemm::{Right, gemm};
use crate::cpu::kernel::pack;
use crate::cpu::simd::{Simd, Task};
use crate::cpu::{CpuReal, parallel};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::{AlignOutputs, AlignProblem};

pub(super) fn run<S, T>(
    s: S,
    threads: usize,
    problem: &AlignProblem<'_, T>,
    outputs: &mut AlignOutputs<'_, T>,
) -> Result<()>
where
    S: Simd<Real = T::Acc>,
    T: Element<Acc: CpuReal>,
{
    let sizes = Sizes::new(s, problem);
    let tasks = sizes.batch * sizes.heads;
    let mut parameters = [sizes.squares("packed parameters")?, sizes.squares("packed parameters")?];
    for (view, target) in [problem.keep, problem.mix].iter().zip(&mut parameters) {
        tiles(view, &sizes, target);
    }
    let worker = |_| Worker::new(s, problem, sizes, &parameters);
    let mut workers = (0..threads.min(tasks)).map(worker).collect::<Result<Vec<_>>>()?;
    let outputs = &*outputs;
    parallel::run(&mut workers, tasks, |worker, task| {
        let head = [task / sizes.heads, task % sizes.heads];
        s.vectorize(HeadTask { worker, head, outputs });
    });
    Ok(())
}

/// One head.
struct HeadTask<'w, 'a, S: Simd, T: Element<Acc = S::Real>> {
    worker: &'w mut Worker<'a, S, T>,
    head: [usize; 2],
    outputs: &'w AlignOutputs<'a, T>,
}

impl<S: Simd, T: Element<Acc = S::Real>> Task for HeadTask<'_, '_, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.worker.prepare(self.head, self.outputs);
        self.worker.align(self.head, self.outputs);
    }
}

struct Worker<'a, S: Simd, T: Element<Acc = S::Real>> {
    s: S,
    problem: &'a AlignProblem<'a, T>,
    sizes: Sizes,
    /// keep and mix.
    parameters: &'a [Buffer<S::Real>; 2],
    accumulator: Accumulator<S>,
    bases: Buffer<S::Real>,
    others: Buffer<S::Real>,
    /// X of every modality.
    maps: Buffer<S::Real>,
    norms: Vec<S::Real>,
    key: Buffer<S::Real>,
    unit: Buffer<S::Real>,
    aligned: Buffer<S::Real>,
    inverse: Vec<S::Real>,
    /// Which tokens the tile holds.
    tokens: Vec<usize>,
}

impl<'a, S: Simd, T: Element<Acc = S::Real>> Worker<'a, S, T> {
    fn new(s: S, problem: &'a AlignProblem<'a, T>, sizes: Sizes, parameters: &'a [Buffer<S::Real>; 2]) -> Result<Self> {
        Ok(Self {
            s,
            problem,
            sizes,
            parameters,
            accumulator: Accumulator::new(s, sizes)?,
            bases: sizes.squares("the bases of a head")?,
            others: Buffer::new(sizes.square(), "the bases of a head")?,
            maps: sizes.squares("the maps of a head")?,
            norms: vec![S::Real::ZERO; sizes.modalities * sizes.depth],
            key: sizes.token_tile("a tile of keys")?,
            unit: sizes.token_tile("a tile of unit keys")?,
            aligned: sizes.token_tile("a tile of aligned keys")?,
            inverse: vec![S::Real::ZERO; TOKENS],
            tokens: Vec::with_capacity(TOKENS),
        })
    }

    /// Bases of the head, written out where they were computed, and the map X of every modality that occurs.
    #[inline(always)]
    fn prepare(&mut self, head: [usize; 2], outputs: &AlignOutputs<'_, T>) {
        let (s, sizes) = (self.s, self.sizes);
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
                mixed(s, &sizes, (&self.others, &raw const self.parameters[1][at]), &raw mut self.maps[at]);
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
        let (s, sizes) = (self.s, self.sizes);
        let count = self.tokens.len();
        // SAFETY: a tile has a row for each of at most `TOKENS` tokens; this task alone owns the head's keys.
        unsafe {
            for (row, &token) in self.tokens.iter().enumerate() {
                let target = self.key.as_mut_ptr().add(row * sizes.stride);
                pack::row(s, &self.problem.key, [b, h, token], S::Real::ONE, target);
            }
            let result = if a == PADDING {
                self.key.as_ptr()
            } else {
                let at = a as usize * sizes.square();
                self.unit.as_mut_ptr().copy_from_nonoverlapping(self.key.as_ptr(), count * sizes.stride);
                unit_keys(s, &sizes, self.problem.eps, self.unit.as_mut_ptr(), &mut self.inverse[..count]);
                let keep = Right::rows(s, &raw const self.parameters[0][at], sizes.stride);
                let target = sizes.target(self.aligned.as_mut_ptr(), false);
                gemm(s, sizes.size(count), sizes.left(self.key.as_ptr()), keep, target);
                let map = Right::rows(s, &raw const self.maps[at], sizes.stride);
                let target = sizes.target(self.aligned.as_mut_ptr(), true);
                gemm(s, sizes.size(count), sizes.left(self.unit.as_ptr()), map, target);
                self.aligned.as_ptr()
            };
            for (row, &token) in self.tokens.iter().enumerate() {
                let target = outputs.aligned.block([b, h, token]).as_mut_ptr();
                pack::unpack(s, result.add(row * sizes.stride), S::Real::ONE, sizes.depth, target);
            }
        }
        self.tokens.clear();
    }
}
