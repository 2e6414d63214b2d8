//! Backward of alignment, in two passes over the tokens of a head.
//!
//! The first sums d keep and dX; from dX follow d mix and, through T and the row norm, dG. The second gives every token
//! its gradient: through keep, through X, and as a source of its basis.

use super::TOKENS;
use super::basis::{Sizes, mixed, normalise, sum_of_others, tiles, transposed, unit_keys};
use crate::cpu::buffer::Buffer;
use crate::cpu::kernel::gemm::{Left, Right, Size, gemm};
use crate::cpu::kernel::pack;
use crate::cpu::simd::{Simd, Task};
use crate::cpu::{CpuReal, parallel};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::{AlignGradients, AlignProblem, AlignUpstream, Basis};
use crate::view::View;

/// Tasks at most: each sums d keep and d mix over its heads, and these sums are added in order. The number depends on
/// the problem alone, so the result does not depend on the threads.
const TASKS: usize = 16;

pub(super) fn run<S, T>(
    s: S,
    threads: usize,
    problem: &AlignProblem<'_, T>,
    upstream: &AlignUpstream<'_, T>,
    gradients: &mut AlignGradients<'_, T>,
) -> Result<()>
where
    S: Simd<Real = T::Acc>,
    T: Element<Acc: CpuReal>,
{
    let sizes = Sizes::new(s, problem);
    let heads = sizes.batch * sizes.heads;
    let tasks = heads.min(TASKS);
    let parameters = Parameters::new(s, problem, &sizes)?;
    let all = sizes.modalities * sizes.square();
    let partial = Partial { sums: Buffer::new(tasks * 2 * all, "partial gradients of keep and mix")?, size: all };
    {
        let gradients = &*gradients;
        let worker = |_| Worker::new(s, problem, upstream, gradients, (&parameters, sizes));
        let mut workers = (0..threads.min(tasks)).map(worker).collect::<Result<Vec<_>>>()?;
        parallel::run(&mut workers, tasks, |worker, task| {
            for head in (task..heads).step_by(tasks) {
                let head = [head / sizes.heads, head % sizes.heads];
                s.vectorize(HeadTask { worker, head, sums: [0, 1].map(|which| partial.slot(task, which)) });
            }
        });
    }
    for (which, target) in [&mut gradients.keep, &mut gradients.mix].into_iter().enumerate() {
        let sum = |at: usize| (0..tasks).fold(T::Acc::ZERO, |sum, task| sum + partial.get(task, which, at));
        for (flat, target) in target.as_mut_slice().iter_mut().enumerate() {
            let (row, column) = (flat / sizes.depth, flat % sizes.depth);
            *target = sum(row * sizes.stride + column);
        }
    }
    Ok(())
}

/// d keep (0) and d mix (1) of every task, as square tiles.
struct Partial<R: Real> {
    sums: Buffer<R>,
    size: usize,
}

impl<R: Real> Partial<R> {
    fn slot(&self, task: usize, which: usize) -> *mut R {
        (&raw const self.sums[(2 * task + which) * self.size]).cast_mut()
    }

    fn get(&self, task: usize, which: usize, at: usize) -> R {
        self.sums[(2 * task + which) * self.size + at]
    }
}

/// keep and mix as square tiles, and their transposes.
struct Parameters<R: Real> {
    keep_transposed: Buffer<R>,
    mix: Buffer<R>,
    mix_transposed: Buffer<R>,
}

impl<R: CpuReal> Parameters<R> {
    fn new<S, T>(s: S, problem: &AlignProblem<'_, T>, sizes: &Sizes) -> Result<Self>
    where
        S: Simd<Real = R>,
        T: Element<Acc = R>,
    {
        let squares = || sizes.squares("packed parameters");
        let (mut keep, mut mix, mut keep_transposed, mut mix_transposed) =
            (squares()?, squares()?, squares()?, squares()?);
        tiles(&problem.keep, sizes, &mut keep);
        tiles(&problem.mix, sizes, &mut mix);
        transposed(s, sizes, &keep, &mut keep_transposed);
        transposed(s, sizes, &mix, &mut mix_transposed);
        Ok(Self { keep_transposed, mix, mix_transposed })
    }
}

/// One head; its d keep and d mix are added to `sums`.
struct HeadTask<'w, 'a, S: Simd, T: Element<Acc = S::Real>> {
    worker: &'w mut Worker<'a, S, T>,
    head: [usize; 2],
    sums: [*mut S::Real; 2],
}

impl<S: Simd, T: Element<Acc = S::Real>> Task for HeadTask<'_, '_, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.worker.head(self.head, self.sums);
    }
}

struct Worker<'a, S: Simd, T: Element<Acc = S::Real>> {
    s: S,
    problem: &'a AlignProblem<'a, T>,
    upstream: &'a AlignUpstream<'a, T>,
    gradients: &'a AlignGradients<'a, T>,
    parameters: &'a Parameters<S::Real>,
    sizes: Sizes,
    /// Normed bases.
    bases: Buffer<S::Real>,
    norms: Vec<S::Real>,
    /// T of one modality.
    others: Buffer<S::Real>,
    /// X of every modality, then its transpose.
    maps: Buffer<S::Real>,
    maps_transposed: Buffer<S::Real>,
    d_maps: Buffer<S::Real>,
    d_others: Buffer<S::Real>,
    d_bases: Buffer<S::Real>,
    d_bases_transposed: Buffer<S::Real>,
    key: Buffer<S::Real>,
    unit: Buffer<S::Real>,
    value: Buffer<S::Real>,
    d_aligned: Buffer<S::Real>,
    d_unit: Buffer<S::Real>,
    d_key: Buffer<S::Real>,
    inverse: Vec<S::Real>,
    tokens: Vec<usize>,
}

impl<'a, S: Simd, T: Element<Acc = S::Real>> Worker<'a, S, T> {
    fn new(
        s: S,
        problem: &'a AlignProblem<'a, T>,
        upstream: &'a AlignUpstream<'a, T>,
        gradients: &'a AlignGradients<'a, T>,
        (parameters, sizes): (&'a Parameters<S::Real>, Sizes),
    ) -> Result<Self> {
        let squares = || sizes.squares("the bases of a head");
        let square = || Buffer::new(sizes.square(), "the basis of a head");
        let tile = || sizes.token_tile("a tile of tokens");
        Ok(Self {
            s,
            problem,
            upstream,
            gradients,
            parameters,
            sizes,
            bases: squares()?,
            norms: vec![S::Real::ZERO; sizes.modalities * sizes.depth],
            others: square()?,
            maps: squares()?,
            maps_transposed: squares()?,
            d_maps: squares()?,
            d_others: square()?,
            d_bases: squares()?,
            d_bases_transposed: squares()?,
            key: tile()?,
            unit: tile()?,
            value: tile()?,
            d_aligned: tile()?,
            d_unit: tile()?,
            d_key: tile()?,
            inverse: vec![S::Real::ZERO; TOKENS],
            tokens: Vec::with_capacity(TOKENS),
        })
    }

    /// Everything one head gives; d keep and d mix are added to `sums`.
    #[inline(always)]
    fn head(&mut self, head: [usize; 2], [d_keep, d_mix]: [*mut S::Real; 2]) {
        let (s, sizes, problem) = (self.s, self.sizes, self.problem);
        let basis = problem.basis.expect("backward is given the basis that forward used");
        tiles(&basis.index(head), &sizes, &mut self.bases);
        normalise(s, &sizes, &mut self.bases, &mut self.norms);
        self.d_maps.fill(S::Real::ZERO);
        self.d_bases.fill(S::Real::ZERO);
        let ids = problem.modality.row(head[0]);
        for a in (0..sizes.modalities).filter(|&a| ids.contains(&(a as i32))) {
            let at = a * sizes.square();
            sum_of_others(s, &sizes, &self.bases, a, &mut self.others);
            mixed(s, &sizes, (&self.others, &raw const self.parameters.mix[at]), &raw mut self.maps[at]);
            self.tokens_of(head, a as i32, Pass::Maps(d_keep));
            self.through_map(a, d_mix);
        }
        transposed(s, &sizes, &self.maps, &mut self.maps_transposed);
        self.through_norm(head);
        transposed(s, &sizes, &self.d_bases, &mut self.d_bases_transposed);
        for a in PADDING..sizes.modalities as i32 {
            self.tokens_of(head, a, Pass::Tokens);
        }
    }

    /// One pass over the tokens of one modality, a tile at a time, those that feed the basis apart from the others.
    #[inline(always)]
    fn tokens_of(&mut self, [b, h]: [usize; 2], a: i32, pass: Pass<S::Real>) {
        let (ids, sources) = (self.problem.modality.row(b), self.problem.sources.row(b));
        for feeds in [true, false] {
            let tokens = Tokens { head: [b, h], modality: a, feeds: feeds && self.upstream.computed };
            let mut chosen = (0..ids.len()).filter(|&j| ids[j] == a && (sources[j] != PADDING) == feeds);
            loop {
                self.tokens.clear();
                self.tokens.extend(chosen.by_ref().take(TOKENS));
                if self.tokens.is_empty() {
                    break;
                }
                self.take(tokens);
                match pass {
                    Pass::Maps(d_keep) => self.sum_maps(a as usize, d_keep),
                    Pass::Tokens => self.token_gradients(tokens),
                }
            }
        }
    }

    /// Keys, unit keys, values and upstream gradients of the tile.
    #[inline(always)]
    fn take(&mut self, Tokens { head: [b, h], modality, feeds }: Tokens) {
        let (s, sizes, problem) = (self.s, self.sizes, self.problem);
        let tokens = &self.tokens;
        fetch(s, (&self.upstream.aligned, [b, h]), tokens, &sizes, &mut self.d_aligned);
        if modality == PADDING {
            return;
        }
        fetch(s, (&problem.key, [b, h]), tokens, &sizes, &mut self.key);
        if feeds && problem.kind == Basis::Covariance {
            fetch(s, (&problem.value, [b, h]), tokens, &sizes, &mut self.value);
        }
        let count = self.tokens.len();
        // SAFETY: `count` rows of both tiles.
        unsafe {
            self.unit.as_mut_ptr().copy_from_nonoverlapping(self.key.as_ptr(), count * sizes.stride);
            unit_keys(s, &sizes, problem.eps, self.unit.as_mut_ptr(), &mut self.inverse[..count]);
        }
    }

    /// d keep += kᵀ dk', dX += k^ᵀ dk'.
    #[inline(always)]
    fn sum_maps(&mut self, a: usize, d_keep: *mut S::Real) {
        let (s, sizes) = (self.s, self.sizes);
        let size = Size { rows: sizes.depth, vectors: sizes.vectors, depth: self.tokens.len() };
        let right = Right::rows(s, self.d_aligned.as_ptr(), sizes.stride);
        // SAFETY: tile a of both sums; as many rows as the tile has tokens.
        unsafe {
            let at = a * sizes.square();
            let target = sizes.target(d_keep.add(at), true);
            gemm(s, size, sizes.left_transposed(self.key.as_ptr()), right, target);
            let target = sizes.target(&raw mut self.d_maps[at], true);
            gemm(s, size, sizes.left_transposed(self.unit.as_ptr()), right, target);
        }
    }

    /// d mix += Tᵀ dX; dT = dX mixᵀ goes to every other modality's basis.
    #[inline(always)]
    fn through_map(&mut self, a: usize, d_mix: *mut S::Real) {
        let (s, sizes) = (self.s, self.sizes);
        let at = a * sizes.square();
        // SAFETY: square tiles; `others` holds T of this modality.
        unsafe {
            let d_map: *const S::Real = &raw const self.d_maps[at];
            let right = Right::rows(s, d_map, sizes.stride);
            let left = sizes.left_transposed(self.others.as_ptr());
            gemm(s, sizes.size(sizes.depth), left, right, sizes.target(d_mix.add(at), true));
            let right = Right::rows(s, &raw const self.parameters.mix_transposed[at], sizes.stride);
            let target = sizes.target(self.d_others.as_mut_ptr(), false);
            gemm(s, sizes.size(sizes.depth), sizes.left(d_map), right, target);
            for m in (0..sizes.modalities).filter(|&m| m != a) {
                let target = self.d_bases.as_mut_ptr().add(m * sizes.square());
                let registers = sizes.square() / S::LANES;
                pack::accumulate(s, self.d_others.as_ptr(), S::Real::ONE, target, (registers, true));
            }
        }
    }

    /// From the gradient of the normed bases to that of G: dG_r = (d^_r - ^G_r (^G_r . d^_r)) / ||G_r||, plus what
    /// reaches G from outside. Where G was given, this is its gradient.
    #[inline(always)]
    fn through_norm(&mut self, head: [usize; 2]) {
        let (s, sizes) = (self.s, self.sizes);
        for (row, &norm) in self.norms.iter().enumerate() {
            let (m, r) = (row / sizes.depth, row % sizes.depth);
            // SAFETY: row r of tile m of both.
            unsafe {
                let offset = m * sizes.square() + r * sizes.stride;
                let (normed, gradient) = (self.bases.as_ptr().add(offset), self.d_bases.as_mut_ptr().add(offset));
                project(s, (normed, gradient), norm, sizes.vectors);
                if let Some(basis) = &self.upstream.basis {
                    for d in 0..sizes.depth {
                        *gradient.add(d) += basis.get([head[0], head[1], m, r, d]);
                    }
                }
                if let (Some(target), false) = (&self.gradients.basis, self.upstream.computed) {
                    let target = target.block([head[0], head[1], m, r]).as_mut_ptr();
                    target.copy_from_nonoverlapping(gradient, sizes.depth);
                }
            }
        }
    }

    /// dk and dv of the tile.
    #[inline(always)]
    fn token_gradients(&mut self, Tokens { head: [b, h], modality, feeds }: Tokens) {
        let (s, sizes) = (self.s, self.sizes);
        let count = self.tokens.len();
        let value_fed = feeds && modality != PADDING && self.problem.kind == Basis::Covariance;
        let mut d_key: *const S::Real = self.d_aligned.as_ptr();
        if modality != PADDING {
            d_key = self.d_key.as_ptr();
            let at = modality as usize * sizes.square();
            let rows =
                |tile: &Buffer<S::Real>| Left { pointer: tile.as_ptr(), row_stride: sizes.stride, depth_stride: 1 };
            let square = |tiles: &Buffer<S::Real>| Right::rows(s, &raw const tiles[at], sizes.stride);
            let size = sizes.size(count);
            // SAFETY: tiles of `count` tokens and square tiles of this modality.
            unsafe {
                let target = sizes.target(self.d_key.as_mut_ptr(), false);
                gemm(s, size, rows(&self.d_aligned), square(&self.parameters.keep_transposed), target);
                let target = sizes.target(self.d_unit.as_mut_ptr(), false);
                gemm(s, size, rows(&self.d_aligned), square(&self.maps_transposed), target);
                if feeds {
                    let target = sizes.target(self.d_unit.as_mut_ptr(), true);
                    if value_fed {
                        gemm(s, size, rows(&self.value), square(&self.d_bases_transposed), target);
                        let target = sizes.target(self.value.as_mut_ptr(), false);
                        gemm(s, size, rows(&self.unit), square(&self.d_bases), target);
                    } else {
                        gemm(s, size, rows(&self.unit), square(&self.d_bases), target);
                        gemm(s, size, rows(&self.unit), square(&self.d_bases_transposed), target);
                    }
                }
                for (row, &inverse) in self.inverse[..count].iter().enumerate() {
                    let offset = row * sizes.stride;
                    let (unit, d_unit) = (self.unit.as_ptr().add(offset), self.d_unit.as_mut_ptr().add(offset));
                    project(s, (unit, d_unit), S::Real::ONE / inverse, sizes.vectors);
                    let target = self.d_key.as_mut_ptr().add(offset);
                    pack::accumulate(s, d_unit, S::Real::ONE, target, (sizes.vectors, true));
                }
            }
        }
        for (row, &token) in self.tokens.iter().enumerate() {
            // SAFETY: rows of the tiles; this task alone owns the head.
            unsafe {
                let target = self.gradients.key.block([b, h, token]).as_mut_ptr();
                pack::unpack(s, d_key.add(row * sizes.stride), S::Real::ONE, sizes.depth, target);
                let target = self.gradients.value.block([b, h, token]);
                if value_fed {
                    let source = self.value.as_ptr().add(row * sizes.stride);
                    pack::unpack(s, source, S::Real::ONE, sizes.depth, target.as_mut_ptr());
                } else {
                    target.fill(T::default());
                }
            }
        }
    }
}

/// Some tokens of a head into a tile.
#[inline(always)]
fn fetch<S: Simd, T: Element<Acc = S::Real>>(
    s: S,
    (view, [b, h]): (&View<'_, T, 4>, [usize; 2]),
    tokens: &[usize],
    sizes: &Sizes,
    tile: &mut Buffer<S::Real>,
) {
    for (row, &token) in tokens.iter().enumerate() {
        // SAFETY: a tile has a row for each of at most `TOKENS` tokens.
        unsafe {
            let target = tile.as_mut_ptr().add(row * sizes.stride);
            pack::row(s, view, [b, h, token], S::Real::ONE, target);
        }
    }
}

/// What a pass over the tokens does with a tile.
#[derive(Debug, Clone, Copy)]
enum Pass<R> {
    /// Sums d keep, to the square tiles here, and dX.
    Maps(*mut R),
    /// Writes dk and dv.
    Tokens,
}

/// The tokens of a tile: all of one modality, all feeding a basis or none.
#[derive(Debug, Clone, Copy)]
struct Tokens {
    head: [usize; 2],
    modality: i32,
    feeds: bool,
}

/// Backward of x / ||x||, in place: d = (d - u (u . d)) / norm for the unit row u; 0 where the norm is 0.
///
/// # Safety
/// Both rows must be valid for `vectors` registers.
#[inline(always)]
unsafe fn project<S: Simd>(s: S, (unit, d): (*const S::Real, *mut S::Real), norm: S::Real, vectors: usize) {
    let factor = if norm == S::Real::ZERO { S::Real::ZERO } else { S::Real::ONE / norm };
    // SAFETY: the caller's contract.
    unsafe {
        let along = pack::dot(s, unit, d, vectors);
        pack::accumulate(s, unit, -along, d, (vectors, true));
        pack::accumulate(s, d, factor, d, (vectors, false));
    }
}
