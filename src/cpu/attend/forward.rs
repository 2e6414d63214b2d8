//! Forward: online softmax over key blocks, the sink in the running maximum, mass in the same pass.

use super::decode;
use super::finish::Finish;
use super::mask::{Block, Content, Part, Tables};
use super::mass::{Masses, Scored};
use super::plan::{KEYS, ROWS, RowBlock, Sizes, row_blocks};
use super::rows::{RowInfo, Tile, infos, key_blocks, tiles};
use crate::cpu::buffer::Buffer;
use crate::cpu::kernel::gemm::{Left, Right, Size, Target, gemm};
use crate::cpu::kernel::pack;
use crate::cpu::kernel::softmax::{Running, Span, clear, softmax, split_sum};
use crate::cpu::simd::{Simd, Task};
use crate::cpu::{CpuReal, parallel};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::problem::{AttendOutputs, AttendProblem, MassBy};

pub(super) fn run<S, T>(
    s: S,
    threads: usize,
    problem: &AttendProblem<'_, T>,
    outputs: &mut AttendOutputs<'_, T>,
) -> Result<()>
where
    S: Simd<Real = T::Acc>,
    T: Element<Acc: CpuReal>,
{
    let sizes = Sizes::new(s, problem);
    let blocks = row_blocks(sizes.group, sizes.queries);
    let units = sizes.batch * sizes.kv_heads;
    if units == 0 || blocks.is_empty() {
        return Ok(());
    }
    let mass = outputs.mass.as_ref().map(|mass| mass.by);
    if decode::suits(&sizes, mass) {
        return decode::run(s, threads, problem, outputs, sizes);
    }
    // A task is a share of one key head's row blocks: whole heads where there are enough of them, so that keys are
    // packed once. Rows are independent, so the shares may depend on the threads.
    let shares = if threads == 1 { 1 } else { (4 * threads).div_ceil(units).min(blocks.len()) };
    let tasks = units * shares;
    let outputs = &*outputs;
    let worker = |_| Worker::new(s, problem, sizes, mass);
    let mut workers = (0..threads.min(tasks)).map(worker).collect::<Result<Vec<_>>>()?;
    parallel::run(&mut workers, tasks, |worker, task| {
        let (unit, share) = (task / shares, task % shares);
        let head = [unit / sizes.kv_heads, unit % sizes.kv_heads];
        s.vectorize(Share { worker, head, blocks: &blocks[share..], step: shares, outputs });
    });
    Ok(())
}

/// Every `step`-th row block of one key head.
struct Share<'w, 'a, S: Simd, T: Element<Acc = S::Real>> {
    worker: &'w mut Worker<'a, S, T>,
    head: [usize; 2],
    blocks: &'w [RowBlock],
    step: usize,
    outputs: &'w AttendOutputs<'a, T>,
}

impl<S: Simd, T: Element<Acc = S::Real>> Task for Share<'_, '_, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.worker.pack_keys(self.head);
        for block in self.blocks.iter().step_by(self.step) {
            self.worker.rows(block, self.outputs);
        }
    }
}

struct Worker<'a, S: Simd, T: Element<Acc = S::Real>> {
    s: S,
    problem: &'a AttendProblem<'a, T>,
    sizes: Sizes,
    mass: Option<MassBy>,
    /// Whose keys are packed.
    packed: Option<[usize; 2]>,
    /// Keys, transposed, in panels.
    key_panels: Buffer<S::Real>,
    values: Buffer<S::Real>,
    /// A block of keys before its transposition.
    staging: Buffer<S::Real>,
    contents: Vec<Content>,
    query: Buffer<S::Real>,
    scores: Buffer<S::Real>,
    sums: Buffer<S::Real>,
    /// Where the two outputs of "split" add up; empty for "joint".
    result: Buffer<S::Real>,
    tables: Tables<S::Real>,
    infos: Vec<RowInfo>,
    running: Vec<Running<S::Real>>,
    masses: Masses<S::Real>,
}

impl<'a, S: Simd, T: Element<Acc = S::Real>> Worker<'a, S, T> {
    fn new(s: S, problem: &'a AttendProblem<'a, T>, sizes: Sizes, mass: Option<MassBy>) -> Result<Self> {
        let padded = sizes.keys.next_multiple_of(2 * S::LANES);
        let rows = ROWS.min(sizes.group * sizes.queries);
        Ok(Self {
            s,
            problem,
            sizes,
            mass,
            packed: None,
            key_panels: Buffer::new(padded * sizes.depth, "packed keys")?,
            values: Buffer::new(sizes.keys * sizes.stride, "packed values")?,
            staging: Buffer::new(KEYS.min(sizes.keys) * sizes.stride, "a block of keys")?,
            contents: Vec::with_capacity(sizes.key_blocks()),
            query: Buffer::new(rows * sizes.stride, "a block of queries")?,
            scores: Buffer::new(rows * sizes.score_stride, "a block of scores")?,
            sums: Buffer::new(rows * sizes.stride, "a block of outputs")?,
            result: Buffer::new((sizes.parts - 1) * rows * sizes.stride, "a block of outputs")?,
            tables: Tables::new(&sizes)?,
            infos: Vec::with_capacity(rows),
            running: Vec::with_capacity(rows),
            masses: Masses::new(rows, if mass == Some(MassBy::Modality) { sizes.modalities } else { 0 })?,
        })
    }

    /// Packs the keys and values of head `h` in batch row `b`, unless they are.
    #[inline(always)]
    fn pack_keys(&mut self, [b, h]: [usize; 2]) {
        if self.packed == Some([b, h]) {
            return;
        }
        self.packed = Some([b, h]);
        self.contents.clear();
        let ids = self.problem.modality.row(b);
        let Sizes { depth, stride, .. } = self.sizes;
        for block in 0..self.sizes.key_blocks() {
            let range = self.sizes.key_block(block);
            let (first, ids) = (range.start, &ids[range]);
            self.contents.push(Content::of(ids));
            let key = self.problem.key.skip(2, first);
            let value = self.problem.value.skip(2, first);
            // SAFETY: `staging` has a block of rows, `values` a row for every key, `key_panels` whole panels of keys;
            // a block of keys is a whole number of panels.
            unsafe {
                pack::rows(self.s, &key, [b, h], ids, self.staging.as_mut_ptr(), stride);
                let panels = self.key_panels.as_mut_ptr().add(first * depth);
                pack::transpose(self.s, self.staging.as_ptr(), stride, [ids.len(), depth], panels);
                pack::rows(self.s, &value, [b, h], ids, self.values.as_mut_ptr().add(first * stride), stride);
            }
        }
    }

    /// All of one row block, for the packed key head.
    #[inline(always)]
    fn rows(&mut self, block: &RowBlock, outputs: &AttendOutputs<'_, T>) {
        let [b, h] = self.packed.expect("keys are packed before rows");
        self.pack_queries(block, [b, h]);
        for (index, &part) in Part::all(self.sizes.parts).iter().enumerate() {
            self.start([b, index]);
            let admitted = |block: &usize| match self.contents[*block] {
                Content::Mixed { .. } => true,
                Content::Uniform(key) => self.infos.iter().any(|info| part.admits(info.row.modality, key)),
            };
            let blocks: Vec<usize> = key_blocks(&self.infos, &self.sizes).filter(admitted).collect();
            for key_block in blocks {
                self.key_block(b, key_block, part);
            }
            self.finish([b, index], outputs);
        }
    }

    /// Rows of the block, scaled to log2 units.
    #[inline(always)]
    fn pack_queries(&mut self, block: &RowBlock, [b, h]: [usize; 2]) {
        let problem = self.problem;
        self.infos.clear();
        self.infos.extend(infos(problem, &self.sizes, block, [b, h]));
        let factor = problem.scale * S::Real::LOG2_E;
        for (row, info) in self.infos.iter().enumerate() {
            // SAFETY: the buffer holds every row of a block.
            unsafe {
                let target = self.query.as_mut_ptr().add(row * self.sizes.stride);
                pack::row(self.s, &problem.query, [b, info.row.head, info.query], factor, target);
                pack::poison(self.s, target, self.sizes.vectors);
            }
        }
    }

    /// Each row starts with its sink as the only entry of the softmax.
    #[inline(always)]
    fn start(&mut self, [b, part]: [usize; 2]) {
        let problem = self.problem;
        self.running.clear();
        self.running.extend(self.infos.iter().map(|info| {
            let sink = problem.sink.map(|sink| sink.get([b, info.row.head, info.query, part]));
            Running::new(sink.map_or(S::Real::NEG_INFINITY, |sink| sink * S::Real::LOG2_E))
        }));
        self.sums.fill(S::Real::ZERO);
        self.masses.start();
    }

    /// Scores, softmax and weighted values of one key block.
    #[inline(always)]
    fn key_block(&mut self, b: usize, index: usize, part: Part) {
        let s = self.s;
        let Sizes { depth, stride, score_stride, vectors, .. } = self.sizes;
        let range = self.sizes.key_block(index);
        let ids = &self.problem.modality.row(b)[range.clone()];
        let content = self.contents[index];
        let keys = Block { batch: b, ids, content, part };
        self.tables.clear();
        self.masses.block(ids);
        for Tile { rows: tile, keys: near } in tiles(s, &self.infos, &range) {
            let (from, reach) = (near.start, near.len());
            let panels = Right::panels(s, &raw const self.key_panels[(range.start + from) * depth], depth);
            let values = Right::rows(s, &raw const self.values[(range.start + from) * stride], stride);
            let size = Size { rows: tile.len(), vectors: reach.div_ceil(S::LANES), depth };
            // SAFETY: the rows of the tile, and panels up to the keys it reaches; scores hold a whole block of keys.
            unsafe {
                let query = self.query.as_ptr().add(tile.start * stride);
                let pointer = self.scores.as_mut_ptr().add(tile.start * score_stride + from);
                let left = Left { pointer: query, row_stride: stride, depth_stride: 1 };
                gemm(s, size, left, panels, Target { pointer, row_stride: score_stride, accumulate: false });
            }
            for row in tile.clone() {
                let info = self.infos[row];
                let seen = info.sees(&range);
                // SAFETY: the row's scores, of which `reach` keys were computed and are zeroed where not visible.
                unsafe {
                    let scores = self.scores.as_mut_ptr().add(row * score_stride + from);
                    let sums = self.sums.as_mut_ptr().add(row * stride);
                    if seen.is_empty() {
                        clear(s, scores, 0, reach);
                        continue;
                    }
                    let added = self.tables.added(self.problem, keys, info.row).add(from);
                    let (first, visible) = (seen.start - from, seen.end - from);
                    let running = &mut self.running[row];
                    let before = running.top;
                    let block = softmax(s, Span { scores, added, first, visible, reach }, running, (sums, vectors));
                    if self.mass == Some(MassBy::Modality) {
                        let (tops, probabilities) = ([before, running.top], scores.cast_const());
                        let scored = Scored { tops, total: block, probabilities, from, count: visible };
                        self.masses.add(s, row, scored, (&mut self.tables, keys));
                    } else if self.mass.is_some() {
                        let uniform = match (part, content) {
                            (Part::SelfKeys, _) => Some(true),
                            (Part::CrossKeys, _) => Some(false),
                            (Part::Whole, Content::Uniform(key)) => Some(key == info.row.modality),
                            (Part::Whole, Content::Mixed { .. }) => None,
                        };
                        let (own, cross) = match uniform {
                            Some(true) => (block, S::Real::ZERO),
                            Some(false) => (S::Real::ZERO, block),
                            None => split_sum(s, scores, self.tables.own(keys, info.row.modality).add(from), visible),
                        };
                        running.own += own;
                        running.cross += cross;
                    }
                }
            }
            let size = Size { rows: tile.len(), vectors, depth: reach };
            // SAFETY: the tile's probabilities for `reach` keys, those keys' values, and the tile's sums.
            unsafe {
                let pointer = self.scores.as_ptr().add(tile.start * score_stride + from);
                let left = Left { pointer, row_stride: score_stride, depth_stride: 1 };
                let pointer = self.sums.as_mut_ptr().add(tile.start * stride);
                gemm(s, size, left, values, Target { pointer, row_stride: stride, accumulate: true });
            }
        }
    }

    /// Closes one softmax of every row.
    #[inline(always)]
    fn finish(&mut self, [b, part]: [usize; 2], outputs: &AttendOutputs<'_, T>) {
        let finish = Finish { problem: self.problem, outputs, sizes: self.sizes };
        let stride = self.sizes.stride;
        for (row, (info, running)) in self.infos.iter().zip(&self.running).enumerate() {
            // SAFETY: this task alone owns the rows of its row block; the buffers hold every row of it, `result` for "split".
            unsafe {
                let sums = self.sums.as_ptr().add(row * stride);
                let result = self.result.as_mut_ptr().wrapping_add(row * stride);
                finish.row(self.s, ([b, part], info), (running, self.masses.row(row)), (sums, result));
            }
        }
    }
}
