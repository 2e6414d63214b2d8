//! What one thread does in backward: packs a key head, then goes through row blocks tile by tile.

use super::Partial;
use crate::cpu::CpuReal;
use crate::cpu::attend::mask::{Block, Content, Part, Tables};
use crate::cpu::attend::plan::{KEYS, ROWS, RowBlock, Sizes};
use crate::cpu::attend::rows::{RowInfo, Tile, infos, key_blocks, seen, tiles};
use crate::cpu::buffer::Buffer;
use crate::cpu::kernel::exp2::{exp2, exp2_one};
use crate::cpu::kernel::gemm::{Left, Right, Size, Target, gemm};
use crate::cpu::kernel::pack;
use crate::cpu::kernel::softmax::{clear, split_sum};
use crate::cpu::simd::Simd;
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::{AttendGradients, AttendProblem, AttendUpstream};
use std::ops::Range;

/// One softmax of a row: its logsumexp in log2 units and delta = dO . o.
#[derive(Debug, Clone, Copy)]
struct Closed<R> {
    logsumexp: R,
    delta: R,
}

/// Workspaces and the problem.
pub(super) struct Worker<'a, S: Simd, T: Element<Acc = S::Real>> {
    s: S,
    problem: &'a AttendProblem<'a, T>,
    upstream: &'a AttendUpstream<'a, T>,
    gradients: &'a AttendGradients<'a, T>,
    sizes: Sizes,
    /// Whose keys are packed.
    head: [usize; 2],
    packed: bool,
    key_panels: Buffer<S::Real>,
    value_panels: Buffer<S::Real>,
    keys: Buffer<S::Real>,
    /// A block of values before its transposition.
    staging: Buffer<S::Real>,
    contents: Vec<Content>,
    d_key: Buffer<S::Real>,
    d_value: Buffer<S::Real>,
    query: Buffer<S::Real>,
    d_out: Buffer<S::Real>,
    d_query: Buffer<S::Real>,
    probabilities: Buffer<S::Real>,
    d_scores: Buffer<S::Real>,
    tables: Vec<Tables<S::Real>>,
    infos: Vec<RowInfo>,
    /// Every row's softmaxes, row by row.
    closed: Vec<Closed<S::Real>>,
}

impl<'a, S: Simd, T: Element<Acc = S::Real>> Worker<'a, S, T> {
    pub(super) fn new(
        s: S,
        problem: &'a AttendProblem<'a, T>,
        upstream: &'a AttendUpstream<'a, T>,
        gradients: &'a AttendGradients<'a, T>,
        sizes: Sizes,
    ) -> Result<Self> {
        let panels = sizes.keys.next_multiple_of(2 * S::LANES) * sizes.depth;
        let tile = sizes.keys * sizes.stride;
        let rows = ROWS.min(sizes.group * sizes.queries);
        let block = |what| Buffer::new(rows * sizes.stride, what);
        Ok(Self {
            s,
            problem,
            upstream,
            gradients,
            sizes,
            head: [0, 0],
            packed: false,
            key_panels: Buffer::new(panels, "packed keys")?,
            value_panels: Buffer::new(panels, "packed values")?,
            keys: Buffer::new(tile, "packed keys")?,
            staging: Buffer::new(KEYS.min(sizes.keys) * sizes.stride, "a block of values")?,
            contents: Vec::with_capacity(sizes.key_blocks()),
            d_key: Buffer::new(tile, "gradients of keys")?,
            d_value: Buffer::new(tile, "gradients of values")?,
            query: block("a block of queries")?,
            d_out: block("a block of output gradients")?,
            d_query: block("a block of query gradients")?,
            probabilities: Buffer::new(rows * sizes.score_stride, "a block of probabilities")?,
            d_scores: Buffer::new(rows * sizes.score_stride, "a block of score gradients")?,
            tables: (0..sizes.parts).map(|_| Tables::new(&sizes)).collect::<Result<_>>()?,
            infos: Vec::with_capacity(rows),
            closed: Vec::with_capacity(rows * sizes.parts),
        })
    }

    /// Number of queries.
    pub(super) fn queries(&self) -> usize {
        self.sizes.queries
    }

    /// Packs the keys and values of a key head, unless they are, and starts its sums.
    #[inline(always)]
    pub(super) fn pack_keys(&mut self, head: [usize; 2]) {
        self.d_key.fill(S::Real::ZERO);
        self.d_value.fill(S::Real::ZERO);
        if self.packed && self.head == head {
            return;
        }
        (self.head, self.packed) = (head, true);
        self.contents.clear();
        let ids = self.problem.modality.row(head[0]);
        let Sizes { depth, stride, .. } = self.sizes;
        for block in 0..self.sizes.key_blocks() {
            let range = self.sizes.key_block(block);
            let (first, ids) = (range.start, &ids[range]);
            self.contents.push(Content::of(ids));
            let key = self.problem.key.skip(2, first);
            let value = self.problem.value.skip(2, first);
            // SAFETY: `keys` has a row for every key, `staging` a block of rows, the panels hold whole panels of keys;
            // a block of keys is a whole number of panels.
            unsafe {
                let keys = self.keys.as_mut_ptr().add(first * stride);
                pack::rows(self.s, &key, head, ids, keys, stride);
                let panels = self.key_panels.as_mut_ptr().add(first * depth);
                pack::transpose(self.s, keys, stride, [ids.len(), depth], panels);
                pack::rows(self.s, &value, head, ids, self.staging.as_mut_ptr(), stride);
                let panels = self.value_panels.as_mut_ptr().add(first * depth);
                pack::transpose(self.s, self.staging.as_ptr(), stride, [ids.len(), depth], panels);
            }
        }
    }

    /// All of one row block, for the packed key head.
    #[inline(always)]
    pub(super) fn rows(&mut self, block: &RowBlock) {
        self.pack_rows(block);
        let real = |block: &usize| self.contents[*block] != Content::Uniform(PADDING);
        let blocks: Vec<usize> = key_blocks(&self.infos, &self.sizes).filter(real).collect();
        for key_block in blocks {
            self.key_block(key_block);
        }
        self.write_queries();
    }

    /// Queries, output gradients and closed softmaxes of the block; d sink falls out on the way.
    #[inline(always)]
    fn pack_rows(&mut self, block: &RowBlock) {
        let (problem, upstream, s) = (self.problem, self.upstream, self.s);
        let Sizes { depth, stride, vectors, parts, .. } = self.sizes;
        let b = self.head[0];
        self.infos.clear();
        self.infos.extend(infos(problem, &self.sizes, block, self.head));
        self.closed.clear();
        self.d_query.fill(S::Real::ZERO);
        let factor = problem.scale * S::Real::LOG2_E;
        for (row, info) in self.infos.iter_mut().enumerate() {
            let at = [b, info.row.head, info.query];
            let logsumexp = |part: usize| upstream.logsumexp.get([b, info.row.head, part, info.query]);
            if (0..parts).all(|part| logsumexp(part) == S::Real::INFINITY) {
                (info.first, info.visible) = (0, 0);
            }
            // SAFETY: the buffers hold every row of a block.
            unsafe {
                let query = self.query.as_mut_ptr().add(row * stride);
                let d_out = self.d_out.as_mut_ptr().add(row * stride);
                if info.visible == 0 {
                    // Whatever such a row holds must not reach a gradient, not even times zero.
                    clear(s, query, 0, depth);
                    clear(s, d_out, 0, depth);
                } else {
                    pack::row(s, &problem.query, at, factor, query);
                    pack::poison(s, query, vectors);
                    pack::row(s, &upstream.out_gradient, at, S::Real::ONE, d_out);
                }
                for part in 0..parts {
                    // The block of dQ is not in use yet: it takes the output, widened.
                    let out = self.d_query.as_mut_ptr().add(row * stride);
                    match upstream.parts {
                        Some(both) => {
                            let source = both.pointer_at([b, info.row.head, part, info.query, 0]);
                            pack::copy(s, source, depth, out);
                        }
                        None => pack::row(s, &upstream.out, at, S::Real::ONE, out),
                    }
                    let delta = pack::dot(s, out, d_out, vectors);
                    clear(s, out, 0, depth);
                    let binary = logsumexp(part).to_f64() * std::f64::consts::LOG2_E;
                    let closed = Closed { logsumexp: S::Real::from_f64(binary), delta };
                    self.closed.push(closed);
                    if let (Some(d_sink), Some(sink)) = (&self.gradients.sink, problem.sink) {
                        let z = sink.get([b, info.row.head, info.query, part]).to_f64();
                        // The logsumexp is no smaller than the sink, whatever its rounding says.
                        let gap = (z * std::f64::consts::LOG2_E - binary).min(0.0);
                        let share = exp2_one(s, S::Real::from_f64(gap));
                        let dead = closed.logsumexp == S::Real::INFINITY;
                        let value = if dead { S::Real::ZERO } else { -share * delta };
                        *d_sink.element([b, info.row.head, info.query, part]) = value;
                    }
                }
            }
        }
    }

    /// One tile: scores, probabilities, their gradients, and what they give to dQ, dK and dV.
    #[inline(always)]
    fn key_block(&mut self, index: usize) {
        let s = self.s;
        let Sizes { depth, stride, score_stride, vectors, .. } = self.sizes;
        let range = self.sizes.key_block(index);
        let near = seen(&self.infos, &range, 2 * S::LANES);
        self.tables.iter_mut().for_each(Tables::clear);
        let tiles: Vec<Tile> = tiles(s, &self.infos, &range).collect();
        for Tile { rows, keys } in tiles {
            let (from, reach) = (range.start + keys.start, keys.len());
            let key_panels = Right::panels(s, &raw const self.key_panels[from * depth], depth);
            let value_panels = Right::panels(s, &raw const self.value_panels[from * depth], depth);
            let size = Size { rows: rows.len(), vectors: reach.div_ceil(S::LANES), depth };
            // SAFETY: the rows of the tile, and panels up to the keys it reaches; scores hold a whole block of keys.
            unsafe {
                let offset = rows.start * stride;
                let scores = rows.start * score_stride + keys.start;
                let left = Left { pointer: self.query.as_ptr().add(offset), row_stride: stride, depth_stride: 1 };
                let pointer = self.probabilities.as_mut_ptr().add(scores);
                gemm(s, size, left, key_panels, Target { pointer, row_stride: score_stride, accumulate: false });
                let left = Left { pointer: self.d_out.as_ptr().add(offset), ..left };
                let pointer = self.d_scores.as_mut_ptr().add(scores);
                gemm(s, size, left, value_panels, Target { pointer, row_stride: score_stride, accumulate: false });
            }
            for row in rows.clone() {
                self.row(row, index, &near);
            }
            let size = Size { rows: rows.len(), vectors, depth: reach };
            // SAFETY: the tile's score gradients for `reach` keys, those keys, and the tile's rows of dQ.
            unsafe {
                let pointer = self.d_scores.as_ptr().add(rows.start * score_stride + keys.start);
                let left = Left { pointer, row_stride: score_stride, depth_stride: 1 };
                let right = Right::rows(s, &raw const self.keys[from * stride], stride);
                let pointer = self.d_query.as_mut_ptr().add(rows.start * stride);
                gemm(s, size, left, right, Target { pointer, row_stride: stride, accumulate: true });
            }
        }
        let from = range.start * stride;
        // SAFETY: rows of these keys in the sums of dK and dV.
        unsafe {
            let d_value = self.d_value.as_mut_ptr().add(from);
            self.keys_product(&range, &near, (self.probabilities.as_ptr(), self.d_out.as_ptr(), d_value));
            let d_key = self.d_key.as_mut_ptr().add(from);
            self.keys_product(&range, &near, (self.d_scores.as_ptr(), self.query.as_ptr(), d_key));
        }
    }

    /// target += scoresᵀ rows, for the keys `near` of the block; rows before and after those that see a tile of keys are
    /// left out.
    ///
    /// # Safety
    /// `scores` must hold every row's scores for the keys `near`, `rows` every row, `target` a row for every key.
    #[inline(always)]
    unsafe fn keys_product(
        &self,
        range: &Range<usize>,
        near: &Range<usize>,
        (scores, rows, target): (*const S::Real, *const S::Real, *mut S::Real),
    ) {
        let s = self.s;
        let Sizes { stride, score_stride, vectors, .. } = self.sizes;
        let whole = self.infos.iter().all(|info| info.sees(range) == (0..range.len()));
        let step = if whole { range.len() } else { S::TALL };
        for first in near.clone().step_by(step) {
            let count = step.min(near.end - first);
            let sees = |info: &RowInfo| {
                let seen = info.sees(range);
                seen.start < first + count && first < seen.end
            };
            let skip = self.infos.iter().position(sees).unwrap_or(self.infos.len());
            let until = self.infos.iter().rposition(sees).map_or(skip, |last| last + 1);
            let size = Size { rows: count, vectors, depth: until - skip };
            // SAFETY: keys `first ..` of the block and rows from `skip` on; the caller's contract.
            unsafe {
                let pointer = scores.add(skip * score_stride + first);
                let left = Left { pointer, row_stride: 1, depth_stride: score_stride };
                let right = Right::rows(s, rows.add(skip * stride), stride);
                let target = target.add(first * stride);
                gemm(s, size, left, right, Target { pointer: target, row_stride: stride, accumulate: true });
            }
        }
    }

    /// Probabilities and score gradients of one row for one key block, zero for those of the keys `near` that are not
    /// visible.
    #[inline(always)]
    fn row(&mut self, row: usize, key_block: usize, near: &Range<usize>) {
        let (s, b) = (self.s, self.head[0]);
        let Sizes { score_stride, parts, .. } = self.sizes;
        let range = self.sizes.key_block(key_block);
        let info = self.infos[row];
        let Range { start: first, end: visible } = info.sees(&range);
        let ids = &self.problem.modality.row(b)[range];
        let content = self.contents[key_block];
        // SAFETY: the row's scores hold a whole block of keys, of which at least the visible ones were computed.
        let (p, d) = unsafe {
            let p = self.probabilities.as_mut_ptr().add(row * score_stride);
            (p, self.d_scores.as_mut_ptr().add(row * score_stride))
        };
        // Registers with a visible key; those before and after them are cleared.
        let (from, to) = (first / S::LANES * S::LANES, visible.next_multiple_of(S::LANES));
        for scores in [p, d] {
            // SAFETY: as above.
            unsafe {
                clear(s, scores, near.start, from);
                clear(s, scores, to.max(near.start), near.end);
            }
        }
        if visible == 0 {
            return;
        }
        let mut masks = [std::ptr::null(); 2];
        for (part, mask) in Part::all(parts).iter().zip(&mut masks) {
            let keys = Block { batch: b, ids, content, part: *part };
            *mask = self.tables[usize::from(*part == Part::CrossKeys)].added(self.problem, keys, info.row);
        }
        let closed = &self.closed[row * parts..][..parts];
        for at in (from..visible).step_by(S::LANES) {
            // SAFETY: registers that begin below `visible`, inside scores and tables of a whole block of keys.
            unsafe {
                let (score, d_p) = (s.load(p.add(at)), s.load(d.add(at)));
                let (mut probability, mut d_score) = (s.zero(), s.zero());
                for (closed, mask) in closed.iter().zip(masks) {
                    let x = s.sub(s.add(score, s.load(mask.add(at))), s.splat(closed.logsumexp));
                    let x = exp2(s, x);
                    probability = s.add(probability, x);
                    d_score = s.mul_add(x, s.sub(d_p, s.splat(closed.delta)), d_score);
                }
                let inside = visible - at;
                (probability, d_score) = (s.first(inside, probability, s.zero()), s.first(inside, d_score, s.zero()));
                if at < first {
                    let outside = first - at;
                    (probability, d_score) =
                        (s.first(outside, s.zero(), probability), s.first(outside, s.zero(), d_score));
                }
                s.store(p.add(at), probability);
                s.store(d.add(at), d_score);
            }
        }
        if let Some(d_bias) = &self.gradients.bias {
            let keys = Block { batch: b, ids, content, part: Part::Whole };
            let query = info.row.modality as usize;
            let modalities = match content {
                Content::Uniform(key) => key..key + 1,
                Content::Mixed { .. } => 0..self.sizes.modalities as i32,
            };
            for key in modalities {
                // SAFETY: the row's score gradients, zero past the visible ones; this task alone owns the head's table.
                unsafe {
                    let own = self.tables[0].own(keys, key).add(from);
                    let (sum, _) = split_sum(s, d.add(from), own, visible - from);
                    *d_bias.element([b, info.row.head, query, key as usize]) += sum;
                }
            }
        }
    }

    /// dQ of the block.
    #[inline(always)]
    fn write_queries(&mut self) {
        let Sizes { depth, stride, .. } = self.sizes;
        for (row, info) in self.infos.iter().enumerate() {
            // SAFETY: the row's sums; this task alone owns the row of dQ.
            unsafe {
                let source = self.d_query.as_ptr().add(row * stride);
                let target = self.gradients.query.block([self.head[0], info.row.head, info.query]).as_mut_ptr();
                pack::unpack(self.s, source, self.problem.scale, depth, target);
            }
        }
    }

    /// dK and dV of a key head that has no other task.
    #[inline(always)]
    pub(super) fn finish(&mut self) {
        let Sizes { depth, stride, keys, .. } = self.sizes;
        let [b, h] = self.head;
        for j in 0..keys {
            // SAFETY: the key's sums; this task alone owns the key head. Queries were scaled to log2 units: ln 2 undoes it.
            unsafe {
                let d_key = self.gradients.key.block([b, h, j]).as_mut_ptr();
                pack::unpack(self.s, self.d_key.as_ptr().add(j * stride), S::Real::LN_2, depth, d_key);
                let d_value = self.gradients.value.block([b, h, j]).as_mut_ptr();
                pack::unpack(self.s, self.d_value.as_ptr().add(j * stride), S::Real::ONE, depth, d_value);
            }
        }
    }

    /// Leaves the sums of one task for [`Self::gather`].
    #[inline(always)]
    pub(super) fn leave(&mut self, partial: &Partial<S::Real>, task: usize) {
        for (which, sums) in [&self.d_key, &self.d_value].into_iter().enumerate() {
            // SAFETY: a slot has the size of the sums, and a task has its own.
            unsafe { partial.slot(task, which).copy_from_nonoverlapping(sums.as_ptr(), sums.len()) };
        }
    }

    /// Adds the sums of a key head's tasks in order and writes dK and dV.
    #[inline(always)]
    pub(super) fn gather(&mut self, partial: &Partial<S::Real>, tasks: Range<usize>, head: [usize; 2]) {
        self.head = head;
        self.d_key.fill(S::Real::ZERO);
        self.d_value.fill(S::Real::ZERO);
        for task in tasks {
            for (which, sums) in [&mut self.d_key, &mut self.d_value].into_iter().enumerate() {
                let vectors = sums.len() / S::LANES;
                // SAFETY: a slot has the size of the sums, whole registers; all tasks have ended.
                unsafe {
                    let slot = partial.slot(task, which);
                    pack::accumulate(self.s, slot, S::Real::ONE, sums.as_mut_ptr(), (vectors, true));
                }
            }
        }
        self.finish();
    }
}
