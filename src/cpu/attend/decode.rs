//! Forward for few query rows a key head, as in a decoding step: keys and values are read once, where they lie.
//!
//! The keys of a head are cut into stretches, a task each; the softmaxes of the stretches are joined in order by the
//! task that ends last. The cut depends on the problem alone, so the result does not depend on the threads.

use super::finish::Finish;
use super::mask::{Block, Content, Part, Tables};
use super::plan::{KEYS, RowBlock, Sizes};
use super::rows::{RowInfo, infos, seen};
use crate::cpu::buffer::Buffer;
use crate::cpu::kernel::few::{Rows, Source, dots, weighted_sums};
use crate::cpu::kernel::pack;
use crate::cpu::kernel::softmax::{Running, Span, clear, join, softmax, split_sum};
use crate::cpu::simd::{Simd, Task};
use crate::cpu::{CpuReal, parallel};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::{AttendOutputs, AttendProblem, MassBy};
use crate::view::View;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Most rows a key head may have to come this way: with more of them the packing of tiles pays.
const ROWS: usize = 16;
/// Tasks a problem is cut into, if its keys allow: enough to keep a large machine busy.
const TASKS: usize = 64;
/// Key blocks a task has at least.
const BLOCKS: usize = 4;

/// Whether a problem comes this way. Mass by key modality, M numbers a row, is the tiled way's.
pub(super) fn suits(sizes: &Sizes, mass: Option<MassBy>) -> bool {
    sizes.group * sizes.queries <= ROWS && mass != Some(MassBy::Modality)
}

pub(super) fn run<S, T>(
    s: S,
    threads: usize,
    problem: &AttendProblem<'_, T>,
    outputs: &AttendOutputs<'_, T>,
    sizes: Sizes,
) -> Result<()>
where
    S: Simd<Real = T::Acc>,
    T: Element<Acc: CpuReal>,
{
    let units = sizes.batch * sizes.kv_heads;
    let cut = Cut::new(units, sizes.key_blocks());
    let tasks = units * cut.stretches;
    let softmaxes = cut.stretches * sizes.parts * sizes.group * sizes.queries;
    let mut running = vec![Running::new(T::Acc::NEG_INFINITY); units * softmaxes];
    let mut sums = Buffer::new(running.len() * sizes.stride, "partial outputs")?;
    let each = running.chunks_exact_mut(softmaxes).zip(sums.chunks_exact_mut(softmaxes * sizes.stride));
    let head = |(running, sums)| Mutex::new(Head { pending: cut.stretches, running, sums });
    let heads: Vec<Mutex<Head<'_, T::Acc>>> = each.map(head).collect();
    let finish = Finish { problem, outputs, sizes };
    let worker = |_| Worker::new(s, finish, &heads);
    let mut workers = (0..threads.min(tasks)).map(worker).collect::<Result<Vec<_>>>()?;
    parallel::run(&mut workers, tasks, |worker, task| {
        let (unit, stretch) = (task / cut.stretches, task % cut.stretches);
        s.vectorize(Stretch { worker, unit, index: stretch, blocks: cut.blocks(stretch) });
    });
    Ok(())
}

/// How the key blocks of every head are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    stretches: usize,
    key_blocks: usize,
}

impl Cut {
    fn new(units: usize, key_blocks: usize) -> Self {
        let stretches = TASKS.div_ceil(units).min(key_blocks / BLOCKS).max(1);
        Self { stretches, key_blocks }
    }

    /// The key blocks of one stretch: as many for each as can be.
    fn blocks(&self, stretch: usize) -> Range<usize> {
        let from = |stretch| stretch * self.key_blocks / self.stretches;
        from(stretch)..from(stretch + 1)
    }
}

/// What the stretches of one head have come to.
struct Head<'b, R: Real> {
    /// How many are still to come.
    pending: usize,
    /// The softmaxes of every stretch, part by part and row by row, and their sums.
    running: &'b mut [Running<R>],
    sums: &'b mut [R],
}

/// One stretch of the keys of one head.
struct Stretch<'w, 'a, 'o, S: Simd, T: Element<Acc = S::Real>> {
    worker: &'w mut Worker<'a, 'o, S, T>,
    unit: usize,
    index: usize,
    blocks: Range<usize>,
}

impl<S: Simd, T: Element<Acc = S::Real>> Task for Stretch<'_, '_, '_, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { worker, unit, index, blocks } = self;
        worker.stretch(unit, blocks);
        worker.leave(unit, index);
    }
}

struct Worker<'a, 'o, S: Simd, T: Element<Acc = S::Real>> {
    s: S,
    finish: Finish<'a, 'o, T>,
    heads: &'a [Mutex<Head<'a, S::Real>>],
    query: Buffer<S::Real>,
    scores: Buffer<S::Real>,
    /// Probabilities of one softmax of "split", whose scores serve both; "joint" turns the scores into them.
    probabilities: Buffer<S::Real>,
    /// Of every part and row.
    sums: Buffer<S::Real>,
    running: Vec<Running<S::Real>>,
    /// A row's joined sums, and where its two outputs of "split" add up.
    joined: Buffer<S::Real>,
    tables: Tables<S::Real>,
    infos: Vec<RowInfo>,
    /// The keys of a block that are no padding, and their ids.
    chosen: Vec<usize>,
    ids: Vec<i32>,
    /// A block of keys or values whose rows cannot be read in whole registers.
    staging: Buffer<S::Real>,
    staged: Vec<usize>,
}

impl<'a, 'o, S: Simd, T: Element<Acc = S::Real>> Worker<'a, 'o, S, T> {
    fn new(s: S, finish: Finish<'a, 'o, T>, heads: &'a [Mutex<Head<'a, S::Real>>]) -> Result<Self> {
        let sizes = finish.sizes;
        let rows = Rows::<()>::padded(sizes.group * sizes.queries);
        let two = sizes.parts - 1;
        let staging =
            if [finish.problem.key, finish.problem.value].iter().all(lies_in_registers::<S, T>) { 0 } else { KEYS };
        Ok(Self {
            s,
            finish,
            heads,
            query: Buffer::new(rows * sizes.stride, "a block of queries")?,
            scores: Buffer::new(rows * sizes.score_stride, "a block of scores")?,
            probabilities: Buffer::new(two * rows * sizes.score_stride, "a block of probabilities")?,
            sums: Buffer::new(sizes.parts * rows * sizes.stride, "a block of outputs")?,
            running: Vec::with_capacity(sizes.parts * rows),
            joined: Buffer::new(2 * sizes.stride, "a row of outputs")?,
            tables: Tables::new(&sizes)?,
            infos: Vec::with_capacity(rows),
            chosen: Vec::with_capacity(KEYS),
            ids: Vec::with_capacity(KEYS),
            staging: Buffer::new(staging * sizes.stride, "a block of keys")?,
            staged: (0..staging).collect(),
        })
    }

    /// Number of rows.
    fn rows(&self) -> usize {
        self.infos.len()
    }

    /// Where the sums of a part begin.
    fn sums_of(&self, part: usize) -> usize {
        part * self.rows() * self.finish.sizes.stride
    }

    /// All rows over some key blocks of one head.
    #[inline(always)]
    fn stretch(&mut self, unit: usize, blocks: Range<usize>) {
        let sizes = self.finish.sizes;
        let head = [unit / sizes.kv_heads, unit % sizes.kv_heads];
        self.pack_queries(head);
        self.sums.fill(S::Real::ZERO);
        self.running.clear();
        self.running.resize(sizes.parts * self.rows(), Running::new(S::Real::NEG_INFINITY));
        for block in blocks {
            self.block(head, sizes.key_block(block));
        }
    }

    /// Every row of the head, scaled to log2 units.
    #[inline(always)]
    fn pack_queries(&mut self, [b, h]: [usize; 2]) {
        let (problem, sizes) = (self.finish.problem, self.finish.sizes);
        let all = RowBlock { heads: 0..sizes.group, queries: 0..sizes.queries };
        self.infos.clear();
        self.infos.extend(infos(problem, &sizes, &all, [b, h]));
        let factor = problem.scale * S::Real::LOG2_E;
        for (row, info) in self.infos.iter().enumerate() {
            // SAFETY: the buffer holds every row.
            unsafe {
                let target = self.query.as_mut_ptr().add(row * sizes.stride);
                pack::row(self.s, &problem.query, [b, info.row.head, info.query], factor, target);
                pack::poison(self.s, target, sizes.vectors);
            }
        }
    }

    /// One block of keys: scores, then for each part softmax and weighted values.
    #[inline(always)]
    fn block(&mut self, head: [usize; 2], range: Range<usize>) {
        let problem = self.finish.problem;
        let ids = problem.modality.row(head[0]);
        self.chosen.clear();
        self.ids.clear();
        for j in seen(&self.infos, &range, 1) {
            let j = range.start + j;
            if ids[j] != PADDING {
                self.chosen.push(j);
                self.ids.push(ids[j]);
            }
        }
        if self.chosen.is_empty() {
            return;
        }
        self.scores(head);
        let content = Content::of(&self.ids);
        for (index, &part) in Part::all(self.finish.sizes.parts).iter().enumerate() {
            let admitted = match content {
                Content::Mixed { .. } => true,
                Content::Uniform(key) => self.infos.iter().any(|info| part.admits(info.row.modality, key)),
            };
            if admitted {
                self.softmaxes(head[0], content, (index, part));
                self.values(head, index);
            }
        }
    }

    /// Scores of every row against the chosen keys.
    #[inline(always)]
    fn scores(&mut self, head: [usize; 2]) {
        let (s, sizes, key) = (self.s, self.finish.sizes, self.finish.problem.key);
        let rows = Rows { pointer: self.query.as_ptr(), stride: sizes.stride, count: self.rows() };
        let target = Rows { pointer: self.scores.as_mut_ptr(), stride: sizes.score_stride, count: self.rows() };
        // SAFETY: the buffers hold every row, padded; the chosen keys exist.
        unsafe {
            if lies_in_registers::<S, T>(&key) {
                dots(s, sizes.vectors, rows, lying(&key, head, &self.chosen), target);
            } else {
                self.stage(&key, head);
                dots(s, sizes.vectors, rows, self.staged(), target);
            }
        }
    }

    /// The scores of one part become probabilities relative to each row's maximum so far.
    #[inline(always)]
    fn softmaxes(&mut self, b: usize, content: Content, (index, part): (usize, Part)) {
        let (s, sizes, problem) = (self.s, self.finish.sizes, self.finish.problem);
        let keys = Block { batch: b, ids: &self.ids, content, part };
        let count = self.chosen.len();
        let sums = self.sums_of(index);
        self.tables.clear();
        for (row, info) in self.infos.iter().enumerate() {
            let first = self.chosen.partition_point(|&j| j < info.first);
            let visible = self.chosen.partition_point(|&j| j < info.visible);
            // SAFETY: the row's scores, sums and tables.
            unsafe {
                let mut scores = self.scores.as_mut_ptr().add(row * sizes.score_stride);
                if sizes.parts > 1 {
                    let copy = self.probabilities.as_mut_ptr().add(row * sizes.score_stride);
                    copy.copy_from_nonoverlapping(scores, count.next_multiple_of(S::LANES));
                    scores = copy;
                }
                if first >= visible {
                    clear(s, scores, 0, count);
                    continue;
                }
                let added = self.tables.added(problem, keys, info.row);
                let running = &mut self.running[index * self.infos.len() + row];
                let sums = self.sums.as_mut_ptr().add(sums + row * sizes.stride);
                let block =
                    softmax(s, Span { scores, added, first, visible, reach: count }, running, (sums, sizes.vectors));
                if self.finish.outputs.mass.is_some() {
                    let uniform = match (part, content) {
                        (Part::SelfKeys, _) => Some(true),
                        (Part::CrossKeys, _) => Some(false),
                        (Part::Whole, Content::Uniform(key)) => Some(key == info.row.modality),
                        (Part::Whole, Content::Mixed { .. }) => None,
                    };
                    let (own, cross) = match uniform {
                        Some(true) => (block, S::Real::ZERO),
                        Some(false) => (S::Real::ZERO, block),
                        None => split_sum(s, scores, self.tables.own(keys, info.row.modality), visible),
                    };
                    running.own += own;
                    running.cross += cross;
                }
            }
        }
    }

    /// Adds the chosen values, weighted, to the sums of a part.
    #[inline(always)]
    fn values(&mut self, head: [usize; 2], index: usize) {
        let (s, sizes, value) = (self.s, self.finish.sizes, self.finish.problem.value);
        let probabilities = if sizes.parts > 1 { &self.probabilities } else { &self.scores };
        let weights = Rows { pointer: probabilities.as_ptr(), stride: sizes.score_stride, count: self.rows() };
        // SAFETY: the buffers hold every row, padded, for every part; the chosen values exist.
        unsafe {
            let pointer = self.sums.as_mut_ptr().add(self.sums_of(index));
            let sums = Rows { pointer, stride: sizes.stride, count: self.rows() };
            if lies_in_registers::<S, T>(&value) {
                weighted_sums(s, sizes.vectors, weights, lying(&value, head, &self.chosen), sums);
            } else {
                self.stage(&value, head);
                weighted_sums(s, sizes.vectors, weights, self.staged(), sums);
            }
        }
    }

    /// The chosen rows of a tensor, widened.
    #[inline(always)]
    fn stage(&mut self, view: &View<'_, T, 4>, [b, h]: [usize; 2]) {
        for (row, &j) in self.chosen.iter().enumerate() {
            // SAFETY: the buffer holds a block of rows.
            unsafe {
                let target = self.staging.as_mut_ptr().add(row * self.finish.sizes.stride);
                pack::row(self.s, view, [b, h, j], S::Real::ONE, target);
            }
        }
    }

    fn staged(&self) -> Source<'_, S::Real> {
        let stride = self.finish.sizes.stride as isize;
        Source { pointer: self.staging.as_ptr(), stride, chosen: &self.staged[..self.chosen.len()] }
    }

    /// Leaves the softmaxes of a stretch to the last one of its head, which joins them all.
    #[inline(always)]
    fn leave(&mut self, unit: usize, stretch: usize) {
        let heads = self.heads;
        let mut head = heads[unit].lock().unwrap_or_else(PoisonError::into_inner);
        let (softmaxes, all) = (self.running.len(), self.running.len() * self.finish.sizes.stride);
        head.running[stretch * softmaxes..][..softmaxes].copy_from_slice(&self.running);
        head.sums[stretch * all..][..all].copy_from_slice(&self.sums[..all]);
        head.pending -= 1;
        if head.pending == 0 {
            self.close(unit, &head);
        }
    }

    /// Joins the softmaxes of all stretches of a head, in order, with the sinks, and writes the results.
    #[inline(always)]
    fn close(&mut self, unit: usize, head: &Head<'_, S::Real>) {
        let (s, Finish { problem, sizes, .. }) = (self.s, self.finish);
        let (b, softmaxes) = (unit / sizes.kv_heads, self.running.len());
        let (sum, result) = self.joined.split_at_mut(sizes.stride);
        for (row, info) in self.infos.iter().enumerate() {
            for part in 0..sizes.parts {
                let sink = problem.sink.map(|sink| sink.get([b, info.row.head, info.query, part]));
                let mut total = Running::new(sink.map_or(S::Real::NEG_INFINITY, |sink| sink * S::Real::LOG2_E));
                sum.fill(S::Real::ZERO);
                for softmax in (part * self.infos.len() + row..head.running.len()).step_by(softmaxes) {
                    let other = (&head.running[softmax], head.sums[softmax * sizes.stride..].as_ptr());
                    // SAFETY: sums of D in whole registers.
                    unsafe { join(s, (&mut total, sum.as_mut_ptr()), other, sizes.vectors) };
                }
                // SAFETY: the head's last task alone writes its rows; sums and result of one row.
                unsafe { self.finish.row(s, ([b, part], info), (&total, &[]), (sum.as_ptr(), result.as_mut_ptr())) };
            }
        }
    }
}

/// Whether rows can be read where they lie: columns side by side, D in whole registers.
fn lies_in_registers<S: Simd, T: Element>(view: &View<'_, T, 4>) -> bool {
    view.strides()[3] == 1 && view.shape()[3].is_multiple_of(S::LANES)
}

/// The chosen rows of one head.
fn lying<'c, T: Element>(view: &View<'_, T, 4>, [b, h]: [usize; 2], chosen: &'c [usize]) -> Source<'c, T> {
    Source { pointer: view.pointer_at([b, h, 0, 0]), stride: view.strides()[2], chosen }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stretches_of_a_head_are_all_of_its_blocks() {
        for (units, key_blocks) in [(1, 0), (1, 1), (1, 9), (8, 32), (3, 1000), (100, 50)] {
            let cut = Cut::new(units, key_blocks);
            let blocks: Vec<usize> = (0..cut.stretches).flat_map(|stretch| cut.blocks(stretch)).collect();
            assert_eq!(blocks, (0..key_blocks).collect::<Vec<_>>());
            assert!(cut.stretches == 1 || key_blocks / cut.stretches >= BLOCKS);
        }
    }
}
