//! Forward: online softmax over key blocks, the sink in the running maximum, mass in the same pass.

use super::decode;
use super::finish::Finish;
use super::mask::{Block, Content, Part, Tables};
use super::mass::{Masses, Scored};
use super::plan::{KEYS, ROWS, RowBlock, Sizes, row_blocks};
use super::rows::{RowInfo, Tile, common, holds, infos, key_blocks, tiles};
use crate::cpu::buffer::Buffer;
use crate::cpu::dot::Dot;
use crate::cpu::kernel::gemm::{Left, Right, Size, Target};
use crate::cpu::kernel::pack;
use crate::cpu::kernel::softmax::{self, Added, Running, Span, split_sum};
use crate::cpu::simd::{Simd, Task};
use crate::cpu::{CpuReal, parallel};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::{AttendOutputs, AttendProblem, MassBy};
use std::ops::Range;

pub(in crate::cpu) fn run<D, T>(
    d: D,
    threads: usize,
    problem: &AttendProblem<'_, T>,
    outputs: &mut AttendOutputs<'_, T>,
) -> Result<()>
where
    D: Dot<Real = T::Acc>,
    T: Element<Acc: CpuReal>,
{
    let sizes = Sizes::new(d, problem);
    let blocks = row_blocks(sizes.group, sizes.queries);
    let units = sizes.batch * sizes.kv_heads;
    if units == 0 || blocks.is_empty() {
        return Ok(());
    }
    let mass = outputs.mass.as_ref().map(|mass| mass.by);
    if decode::suits(&sizes, mass) {
        return decode::run(d.simd(), threads, problem, outputs, sizes);
    }
    // A task is a key head, so that keys are packed once, or a share of the row blocks of one of the last heads, so that
    // the threads end together. Rows are independent, so the shares may depend on the threads.
    let cut = if threads == 1 { 0 } else { threads.min(units) };
    let shares = (4 * threads).div_ceil(cut.max(1)).min(blocks.len());
    let whole = units - cut;
    let tasks = whole + cut * shares;
    let outputs = &*outputs;
    let worker = |_| Worker::new(d, problem, sizes, mass);
    let mut workers = (0..threads.min(tasks)).map(worker).collect::<Result<Vec<_>>>()?;
    parallel::run(&mut workers, tasks, |worker, task| {
        let of_last = task.checked_sub(whole).map(|task| (whole + task / shares, task % shares, shares));
        let (unit, share, step) = of_last.unwrap_or((task, 0, 1));
        let head = [unit / sizes.kv_heads, unit % sizes.kv_heads];
        d.enter(Share { worker, head, blocks: &blocks[share..], step, outputs });
    });
    Ok(())
}

/// Every `step`-th row block of one key head.
struct Share<'w, 'a, D: Dot, T: Element<Acc = D::Real>> {
    worker: &'w mut Worker<'a, D, T>,
    head: [usize; 2],
    blocks: &'w [RowBlock],
    step: usize,
    outputs: &'w AttendOutputs<'a, T>,
}

impl<D: Dot, T: Element<Acc = D::Real>> Task for Share<'_, '_, D, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.worker.pack_keys(self.head);
        for block in self.blocks.iter().step_by(self.step) {
            self.worker.rows(block, self.outputs);
        }
    }
}

struct Worker<'a, D: Dot, T: Element<Acc = D::Real>> {
    d: D,
    problem: &'a AttendProblem<'a, T>,
    sizes: Sizes,
    mass: Option<MassBy>,
    /// Whose keys are packed.
    packed: Option<[usize; 2]>,
    // Operands are kept as numbers of the same size: see `Dot::Unit`.
    /// Keys, transposed, in panels.
    key_panels: Buffer<D::Real>,
    values: Buffer<D::Real>,
    /// A block of keys or values before it becomes an operand.
    staging: Buffer<D::Real>,
    contents: Vec<Content>,
    query: Buffer<D::Real>,
    scores: Buffer<D::Real>,
    sums: Buffer<D::Real>,
    /// Where the two outputs of "split" add up; empty for "joint".
    result: Buffer<D::Real>,
    tables: Tables<D::Real>,
    infos: Vec<RowInfo>,
    /// The keys that each of them may see, and that all of them see.
    keys: Vec<Range<usize>>,
    common: Range<usize>,
    /// How many rows from each on have its head and modality.
    alike: Vec<usize>,
    running: Vec<Running<D::Real>>,
    masses: Masses<D::Real>,
    /// A row's probabilities for a block of keys before they were rounded to an operand, for its mass.
    numbers: Buffer<D::Real>,
}

impl<'a, D: Dot, T: Element<Acc = D::Real>> Worker<'a, D, T> {
    fn new(d: D, problem: &'a AttendProblem<'a, T>, sizes: Sizes, mass: Option<MassBy>) -> Result<Self> {
        let padded = sizes.keys.next_multiple_of(2 * D::Simd::LANES);
        let rows = ROWS.min(sizes.group * sizes.queries);
        Ok(Self {
            d,
            problem,
            sizes,
            mass,
            packed: None,
            key_panels: Buffer::new(padded * sizes.units, "packed keys")?,
            values: Buffer::new(sizes.keys.div_ceil(D::DEPTH) * sizes.stride, "packed values")?,
            staging: Buffer::new(KEYS.min(sizes.keys) * sizes.stride, "a block of keys")?,
            contents: Vec::with_capacity(sizes.key_blocks()),
            query: Buffer::new(rows * sizes.stride, "a block of queries")?,
            scores: Buffer::new(rows * sizes.score_stride, "a block of scores")?,
            sums: Buffer::new(rows * sizes.stride, "a block of outputs")?,
            result: Buffer::new((sizes.parts - 1) * rows * sizes.stride, "a block of outputs")?,
            tables: Tables::new(&sizes)?,
            infos: Vec::with_capacity(rows),
            keys: Vec::with_capacity(rows),
            common: 0..0,
            alike: Vec::with_capacity(rows),
            running: Vec::with_capacity(rows),
            masses: Masses::new(rows, if mass == Some(MassBy::Modality) { sizes.modalities } else { 0 })?,
            numbers: Buffer::new(if D::DEPTH > 1 { KEYS } else { 0 }, "a row of probabilities")?,
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
        let Sizes { units, stride, vectors, .. } = self.sizes;
        for block in 0..self.sizes.key_blocks() {
            let range = self.sizes.key_block(block);
            let (first, ids) = (range.start, &ids[range]);
            self.contents.push(Content::of(ids));
            let key = self.problem.key.skip(2, first);
            let value = self.problem.value.skip(2, first);
            // SAFETY: `staging` has a block of rows, `values` units for every key, `key_panels` whole panels of keys;
            // a block of keys is a whole number of panels and of units.
            unsafe {
                let staging = self.staging.as_mut_ptr();
                pack::rows(self.d.simd(), &key, [b, h], ids, staging, stride);
                let panels = self.key_panels.as_mut_ptr().add(first * units);
                pack::panels(self.d, staging, stride, [ids.len(), vectors, units], panels);
                pack::rows(self.d.simd(), &value, [b, h], ids, staging, stride);
                let values = self.values.as_mut_ptr().add(first / D::DEPTH * stride).cast();
                pack::right(self.d, staging, stride, [ids.len(), vectors], values);
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

    /// The queries of the block.
    #[inline(always)]
    fn pack_queries(&mut self, block: &RowBlock, [b, h]: [usize; 2]) {
        let (problem, s) = (self.problem, self.d.simd());
        self.infos.clear();
        self.infos.extend(infos(problem, &self.sizes, block, [b, h]));
        self.keys.clear();
        self.keys.extend(self.infos.iter().map(|info| info.first..info.visible));
        self.common = common(&self.infos);
        self.alike.clear();
        for run in self.infos.chunk_by(|a, b| a.row == b.row) {
            self.alike.extend((1..=run.len()).rev());
        }
        for (row, info) in self.infos.iter().enumerate() {
            // SAFETY: the buffer holds every row of a block.
            unsafe {
                let target = self.query.as_mut_ptr().add(row * self.sizes.stride);
                pack::row(s, &problem.query, [b, info.row.head, info.query], D::Real::ONE, target);
                pack::poison(s, target, self.sizes.vectors);
                pack::left(self.d, target, self.sizes.vectors);
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
            Running::new(sink.map_or(D::Real::NEG_INFINITY, |sink| sink * D::Real::LOG2_E))
        }));
        self.sums.fill(D::Real::ZERO);
        self.masses.start();
    }

    /// Scores, softmax and weighted values of one key block.
    #[inline(always)]
    fn key_block(&mut self, b: usize, index: usize, part: Part) {
        let Sizes { stride, score_stride, vectors, .. } = self.sizes;
        let range = self.sizes.key_block(index);
        let ids = &self.problem.modality.row(b)[range.clone()];
        let keys = Block { batch: b, ids, content: self.contents[index], part };
        self.tables.clear();
        self.masses.block(ids);
        let whole = holds(&self.common, &range);
        let tiles: Vec<Tile> = tiles(self.d.simd(), &self.infos, &range, whole).collect();
        for Tile { rows, keys: near } in tiles {
            self.scores(&range, rows.clone(), &near);
            let mut next = rows.start;
            while next < rows.end {
                next = self.softmax(keys, &range, next..rows.end, &near);
            }
            let size = Size { rows: rows.len(), vectors, depth: near.len().div_ceil(D::DEPTH) };
            // SAFETY: the tile's probabilities for the keys `near`, those keys' values, and the tile's sums.
            unsafe {
                let pointer = self.scores.as_ptr().add(rows.start * score_stride + near.start).cast();
                let left = Left { pointer, row_stride: score_stride, depth_stride: 1 };
                let values = self.values.as_ptr().add((range.start + near.start) / D::DEPTH * stride);
                let values = Right::rows(self.d, values.cast(), stride);
                let pointer = self.sums.as_mut_ptr().add(rows.start * stride);
                self.d.product(size, left, values, Target { pointer, row_stride: stride, accumulate: true });
            }
        }
    }

    /// Products of some queries with the keys `near` of a block, which begin with a whole panel.
    #[inline(always)]
    fn scores(&mut self, range: &Range<usize>, rows: Range<usize>, near: &Range<usize>) {
        let Sizes { units, stride, score_stride, .. } = self.sizes;
        let size = Size { rows: rows.len(), vectors: near.len().div_ceil(D::Simd::LANES), depth: units };
        // SAFETY: rows of the block, and panels up to the keys they reach; scores hold a whole block of keys.
        unsafe {
            let query = self.query.as_ptr().add(rows.start * stride).cast();
            let left = Left { pointer: query, row_stride: stride, depth_stride: 1 };
            let panels = self.key_panels.as_ptr().add((range.start + near.start) * units);
            let panels = Right::panels(self.d, panels.cast(), units);
            let pointer = self.scores.as_mut_ptr().add(rows.start * score_stride + near.start);
            self.d.product(size, left, panels, Target { pointer, row_stride: score_stride, accumulate: false });
        }
    }

    /// The softmax over the keys `near` of a block, for the first of some rows: those whose head and modality is the same.
    /// Returns the first row that is left.
    #[inline(always)]
    fn softmax(&mut self, keys: Block<'_>, range: &Range<usize>, rows: Range<usize>, near: &Range<usize>) -> usize {
        let Sizes { stride, score_stride, vectors, .. } = self.sizes;
        let of = self.infos[rows.start].row;
        // Mass is added row by row.
        let end = if self.mass.is_some() { rows.start + 1 } else { rows.end.min(rows.start + self.alike[rows.start]) };
        let added = match of.modality {
            PADDING => Added::Same(D::Real::NEG_INFINITY), // sees none of them
            // SAFETY: tables are of a whole block of keys, of which `near` is a part.
            _ => unsafe { self.tables.added(self.problem, keys, of).after(near.start) },
        };
        let numbers = (D::DEPTH > 1 && self.mass.is_some()).then(|| self.numbers.as_mut_ptr());
        let (mut row, mut far) = (rows.start, false);
        loop {
            let before = self.running[row].top;
            // SAFETY: scores and sums of existing rows, the scores from the first key that they reach on.
            let (scores, sums) = unsafe {
                (
                    self.scores.as_mut_ptr().add(row * score_stride + near.start),
                    self.sums.as_mut_ptr().add(row * stride),
                )
            };
            let factor = self.problem.scale * D::Real::LOG2_E;
            let span = Span { scores, factor, added, numbers, first: 0, visible: 0, reach: near.len() };
            let (done, total) = self.d.enter(softmax::Rows {
                d: self.d,
                span,
                score_stride,
                from: range.start + near.start,
                keys: &self.keys[row..end],
                running: &mut self.running[row..end],
                sums,
                sum_stride: stride,
                vectors,
                far,
            });
            row += done;
            if row < end {
                self.scores(range, row..row + 1, near);
                far = true;
                continue;
            }
            let visible = self.infos[rows.start].sees(range).end;
            if let (Some(by), 1..) = (self.mass, visible) {
                let scored = Scored {
                    tops: [before, self.running[rows.start].top],
                    total,
                    probabilities: numbers.unwrap_or(scores).cast_const(),
                    from: near.start,
                    count: visible - near.start,
                };
                self.add_mass(by, keys, rows.start, scored);
            }
            return end;
        }
    }

    /// The mass of one row on a block of keys.
    #[inline(always)]
    fn add_mass(&mut self, by: MassBy, keys: Block<'_>, row: usize, scored: Scored<D::Real>) {
        let s = self.d.simd();
        if by == MassBy::Modality {
            // SAFETY: probabilities up to the last visible key in whole registers.
            unsafe { self.masses.add(s, row, scored, (&mut self.tables, keys)) };
            return;
        }
        let modality = self.infos[row].row.modality;
        let uniform = match (keys.part, keys.content) {
            (Part::SelfKeys, _) => Some(true),
            (Part::CrossKeys, _) => Some(false),
            (Part::Whole, Content::Uniform(key)) => Some(key == modality),
            (Part::Whole, Content::Mixed { .. }) => None,
        };
        let (own, cross) = match uniform {
            Some(true) => (scored.total, D::Real::ZERO),
            Some(false) => (D::Real::ZERO, scored.total),
            // SAFETY: as above; a table has the length of a whole block of keys.
            None => unsafe {
                let own = self.tables.own(keys, modality).add(scored.from);
                split_sum(s, scored.probabilities, own, scored.count)
            },
        };
        let running = &mut self.running[row];
        running.own += own;
        running.cross += cross;
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
                finish.row(self.d.simd(), ([b, part], info), (running, self.masses.row(row)), (sums, result));
            }
        }
    }
}
