//! What one thread does in backward: packs a key head, then goes through row blocks tile by tile.

use super::Partial;
use super::rows::{Closed, Line, LinePart, Rows, UnitTiles, differentiate};
use crate::cpu::CpuReal;
use crate::cpu::attend::mask::{Block, Content, Part, Tables};
use crate::cpu::attend::plan::{KEYS, ROWS, RowBlock, Sizes};
use crate::cpu::attend::rows::{RowInfo, Tile, common, holds, infos, key_blocks, seen, tiles};
use crate::cpu::buffer::Buffer;
use crate::cpu::dot::Dot;
use crate::cpu::kernel::exp2::exp2_one;
use crate::cpu::kernel::gemm::{Left, Right, Size, Target};
use crate::cpu::kernel::pack;
use crate::cpu::kernel::softmax::{clear, sum_where};
use crate::cpu::simd::Simd;
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::{AttendGradients, AttendProblem, AttendUpstream};
use std::ops::Range;

/// Workspaces and the problem.
pub(super) struct Worker<'a, D: Dot, T: Element<Acc = D::Real>> {
    d: D,
    problem: &'a AttendProblem<'a, T>,
    upstream: &'a AttendUpstream<'a, T>,
    gradients: &'a AttendGradients<'a, T>,
    sizes: Sizes,
    /// Whose keys are packed.
    head: [usize; 2],
    packed: bool,
    // Operands are kept as numbers of the same size: see `Dot::Unit`.
    key_panels: Buffer<D::Real>,
    value_panels: Buffer<D::Real>,
    /// Keys as a right operand.
    keys: Buffer<D::Real>,
    /// A block of keys or values before it becomes an operand.
    staging: Buffer<D::Real>,
    contents: Vec<Content>,
    d_key: Buffer<D::Real>,
    d_value: Buffer<D::Real>,
    query: Rows<D>,
    d_out: Rows<D>,
    d_query: Buffer<D::Real>,
    /// Scores, then probabilities as a right operand.
    probabilities: Buffer<D::Real>,
    /// Gradients of probabilities, then of scores as a right operand.
    d_scores: Buffer<D::Real>,
    /// Gradients of scores as a left operand, where that is another thing.
    d_scores_left: Buffer<D::Real>,
    /// Sums of d bias in the current block: by head in the group, modality of the query and of the key.
    d_bias: Vec<f64>,
    tables: Vec<Tables<D::Real>>,
    infos: Vec<RowInfo>,
    /// The keys that all of them see.
    common: Range<usize>,
    /// Every row's softmaxes, row by row.
    closed: Vec<Closed<D::Real>>,
}

impl<'a, D: Dot, T: Element<Acc = D::Real>> Worker<'a, D, T> {
    pub(super) fn new(
        d: D,
        problem: &'a AttendProblem<'a, T>,
        upstream: &'a AttendUpstream<'a, T>,
        gradients: &'a AttendGradients<'a, T>,
        sizes: Sizes,
    ) -> Result<Self> {
        let panels = sizes.keys.next_multiple_of(2 * D::Simd::LANES) * sizes.units;
        let tile = sizes.keys * sizes.stride;
        let rows = ROWS.min((sizes.group * sizes.queries).next_multiple_of(D::DEPTH));
        let scores = rows * sizes.score_stride;
        Ok(Self {
            d,
            problem,
            upstream,
            gradients,
            sizes,
            head: [0, 0],
            packed: false,
            key_panels: Buffer::new(panels, "packed keys")?,
            value_panels: Buffer::new(panels, "packed values")?,
            keys: Buffer::new(sizes.keys.div_ceil(D::DEPTH) * sizes.stride, "packed keys")?,
            staging: Buffer::new(KEYS.min(sizes.keys) * sizes.stride, "a block of keys or values")?,
            contents: Vec::with_capacity(sizes.key_blocks()),
            d_key: Buffer::new(tile, "gradients of keys")?,
            d_value: Buffer::new(tile, "gradients of values")?,
            query: Rows::new(rows * sizes.stride, "a block of queries")?,
            d_out: Rows::new(rows * sizes.stride, "a block of output gradients")?,
            d_query: Buffer::new(rows * sizes.stride, "a block of query gradients")?,
            probabilities: Buffer::new(scores, "a block of probabilities")?,
            d_scores: Buffer::new(scores, "a block of score gradients")?,
            d_scores_left: Buffer::new(if D::DEPTH > 1 { scores } else { 0 }, "a block of score gradients")?,
            d_bias: vec![0.0; if gradients.bias.is_some() { sizes.group * sizes.modalities.pow(2) } else { 0 }],
            tables: (0..sizes.parts).map(|_| Tables::new(&sizes)).collect::<Result<_>>()?,
            infos: Vec::with_capacity(rows),
            common: 0..0,
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
        self.d_key.fill(D::Real::ZERO);
        self.d_value.fill(D::Real::ZERO);
        if self.packed && self.head == head {
            return;
        }
        (self.head, self.packed) = (head, true);
        self.contents.clear();
        let ids = self.problem.modality.row(head[0]);
        let Sizes { units, stride, vectors, .. } = self.sizes;
        let (d, s) = (self.d, self.d.simd());
        for block in 0..self.sizes.key_blocks() {
            let range = self.sizes.key_block(block);
            let (first, ids) = (range.start, &ids[range]);
            self.contents.push(Content::of(ids));
            let key = self.problem.key.skip(2, first);
            let value = self.problem.value.skip(2, first);
            let staging = self.staging.as_mut_ptr();
            let size = [ids.len(), vectors, units];
            // SAFETY: `staging` has a block of rows, `keys` units for every key, the panels whole panels of keys; a block is a
            // whole number of units and of panels.
            unsafe {
                pack::rows(s, &key, head, ids, staging, stride);
                let keys = self.keys.as_mut_ptr().add(first / D::DEPTH * stride).cast();
                pack::right(d, staging, stride, [ids.len(), vectors], keys);
                pack::panels(d, staging, stride, size, self.key_panels.as_mut_ptr().add(first * units));
                pack::rows(s, &value, head, ids, staging, stride);
                pack::panels(d, staging, stride, size, self.value_panels.as_mut_ptr().add(first * units));
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
        self.write_bias();
    }

    /// Queries, output gradients and closed softmaxes of the block; d sink falls out on the way.
    #[inline(always)]
    fn pack_rows(&mut self, block: &RowBlock) {
        let (problem, upstream, s) = (self.problem, self.upstream, self.d.simd());
        let Sizes { depth, stride, vectors, parts, .. } = self.sizes;
        let b = self.head[0];
        self.infos.clear();
        self.infos.extend(infos(problem, &self.sizes, block, self.head));
        self.closed.clear();
        self.d_query.fill(D::Real::ZERO);
        for (row, info) in self.infos.iter_mut().enumerate() {
            let at = [b, info.row.head, info.query];
            let logsumexp = |part: usize| upstream.logsumexp.get([b, info.row.head, part, info.query]);
            if (0..parts).all(|part| logsumexp(part) == D::Real::INFINITY) {
                (info.first, info.visible) = (0, 0);
            }
            // SAFETY: the buffers hold every row of a block.
            unsafe {
                let query = self.query.left.as_mut_ptr().add(row * stride);
                let d_out = self.d_out.left.as_mut_ptr().add(row * stride);
                if info.visible == 0 {
                    // Whatever such a row holds must not reach a gradient, not even times zero.
                    clear(s, query, 0, depth);
                    clear(s, d_out, 0, depth);
                } else {
                    pack::row(s, &problem.query, at, D::Real::ONE, query);
                    pack::poison(s, query, vectors);
                    pack::row(s, &upstream.out_gradient, at, D::Real::ONE, d_out);
                }
                for part in 0..parts {
                    // The block of dQ is not in use yet: it takes the output, widened.
                    let out = self.d_query.as_mut_ptr().add(row * stride);
                    match upstream.parts {
                        Some(both) => {
                            let source = both.pointer_at([b, info.row.head, part, info.query, 0]);
                            pack::copy(s, source, depth, out);
                        }
                        None => pack::row(s, &upstream.out, at, D::Real::ONE, out),
                    }
                    let delta = pack::dot(s, out, d_out, vectors);
                    clear(s, out, 0, depth);
                    let binary = logsumexp(part).to_f64() * std::f64::consts::LOG2_E;
                    let rounded = D::Real::from_f64(binary);
                    let rest = if rounded.is_finite() { binary - rounded.to_f64() } else { 0.0 };
                    let closed = Closed { logsumexp: rounded, rest: D::Real::from_f64(rest), delta };
                    self.closed.push(closed);
                    if let (Some(d_sink), Some(sink)) = (&self.gradients.sink, problem.sink) {
                        let z = sink.get([b, info.row.head, info.query, part]).to_f64();
                        // The logsumexp is no smaller than the sink, whatever its rounding says.
                        let gap = (z * std::f64::consts::LOG2_E - binary).min(0.0);
                        let share = exp2_one(s, D::Real::from_f64(gap));
                        let dead = closed.logsumexp == D::Real::INFINITY;
                        let value = if dead { D::Real::ZERO } else { -share * delta };
                        *d_sink.element([b, info.row.head, info.query, part]) = value;
                    }
                }
            }
        }
        self.common = common(&self.infos);
        self.query.pack(self.d, &self.sizes, self.infos.len());
        self.d_out.pack(self.d, &self.sizes, self.infos.len());
    }

    /// One tile: scores, probabilities, their gradients, and what they give to dQ, dK and dV.
    #[inline(always)]
    fn key_block(&mut self, index: usize) {
        let d = self.d;
        let Sizes { units, stride, score_stride, vectors, .. } = self.sizes;
        let range = self.sizes.key_block(index);
        let whole = holds(&self.common, &range);
        let near = if whole { 0..range.len() } else { seen(&self.infos, &range, 2 * D::Simd::LANES) };
        self.tables.iter_mut().for_each(Tables::clear);
        let tiles: Vec<Tile> = tiles(d.simd(), &self.infos, &range, whole).collect();
        for Tile { rows, keys } in tiles {
            let from = range.start + keys.start;
            let size = Size { rows: rows.len(), vectors: keys.len().div_ceil(D::Simd::LANES), depth: units };
            let products = [
                (&self.query, &self.key_panels, &mut self.probabilities),
                (&self.d_out, &self.value_panels, &mut self.d_scores),
            ];
            for (left, panels, target) in products {
                // SAFETY: the rows of the tile, and panels up to the keys it reaches; scores hold a whole block of keys.
                unsafe {
                    let pointer = left.left().add(rows.start * stride);
                    let left = Left { pointer, row_stride: stride, depth_stride: 1 };
                    let right = Right::panels(d, panels.as_ptr().add(from * units).cast(), units);
                    let pointer = target.as_mut_ptr().add(rows.start * score_stride + keys.start);
                    d.product(size, left, right, Target { pointer, row_stride: score_stride, accumulate: false });
                }
            }
            for first in rows.clone().step_by(D::DEPTH) {
                self.unit(first..(first + D::DEPTH).min(rows.end), index, &near);
            }
            let size = Size { rows: rows.len(), vectors, depth: keys.len().div_ceil(D::DEPTH) };
            // SAFETY: the tile's score gradients for the keys it reaches, those keys, and the tile's rows of dQ.
            unsafe {
                let pointer = self.d_scores_left().add(rows.start * score_stride + keys.start / D::DEPTH).cast_const();
                let left = Left { pointer, row_stride: score_stride, depth_stride: 1 };
                let keys = self.keys.as_ptr().add(from / D::DEPTH * stride);
                let pointer = self.d_query.as_mut_ptr().add(rows.start * stride);
                let target = Target { pointer, row_stride: stride, accumulate: true };
                d.product(size, left, Right::rows(d, keys.cast(), stride), target);
            }
        }
        let from = range.start * stride;
        // SAFETY: rows of these keys in the sums of dK and dV.
        unsafe {
            let d_value = self.d_value.as_mut_ptr().add(from);
            self.keys_product(&range, &near, (&self.probabilities, &self.d_out, d_value));
            let d_key = self.d_key.as_mut_ptr().add(from);
            self.keys_product(&range, &near, (&self.d_scores, &self.query, d_key));
        }
    }

    /// Score gradients as a left operand; rows are a row of scores apart.
    fn d_scores_left(&mut self) -> *mut D::Unit {
        let scores = if D::DEPTH == 1 { &mut self.d_scores } else { &mut self.d_scores_left };
        scores.as_mut_ptr().cast()
    }

    /// target += scoresᵀ rows, for the keys `near` of the block; rows before and after those that see a tile of keys are
    /// left out.
    ///
    /// # Safety
    /// `scores` must hold every row's scores for the keys `near` as a right operand, `target` a row for every key.
    #[inline(always)]
    unsafe fn keys_product(
        &self,
        range: &Range<usize>,
        near: &Range<usize>,
        (scores, rows, target): (&Buffer<D::Real>, &Rows<D>, *mut D::Real),
    ) {
        let Sizes { stride, score_stride, vectors, .. } = self.sizes;
        let whole = holds(&self.common, range);
        let step = if whole { range.len() } else { D::Simd::TALL };
        // Units of a right operand, read along its rows, are the transposed left operand.
        let depth_stride = D::DEPTH * score_stride;
        for first in near.clone().step_by(step) {
            let count = step.min(near.end - first);
            let sees = |info: &RowInfo| {
                let seen = info.sees(range);
                seen.start < first + count && first < seen.end
            };
            let skip = self.infos.iter().position(sees).unwrap_or(self.infos.len()) / D::DEPTH;
            let until = self.infos.iter().rposition(sees).map_or(skip, |last| last / D::DEPTH + 1);
            let size = Size { rows: count, vectors, depth: until - skip };
            // SAFETY: keys `first ..` of the block and units of rows from `skip` on; the caller's contract.
            unsafe {
                let pointer = scores.as_ptr().cast::<D::Unit>().add(skip * depth_stride + first);
                let left = Left { pointer, row_stride: 1, depth_stride };
                let right = Right::rows(self.d, rows.right().add(skip * stride), stride);
                let target = Target { pointer: target.add(first * stride), row_stride: stride, accumulate: true };
                self.d.product(size, left, right, target);
            }
        }
    }

    /// Probabilities and score gradients of the rows of one unit for one key block, zero for those of the keys
    /// `near` that are not visible.
    #[inline(always)]
    fn unit(&mut self, rows: Range<usize>, key_block: usize, near: &Range<usize>) {
        let b = self.head[0];
        let Sizes { score_stride, parts, .. } = self.sizes;
        let range = self.sizes.key_block(key_block);
        let ids = &self.problem.modality.row(b)[range.clone()];
        let content = self.contents[key_block];
        // SAFETY: a row of score gradients in either form.
        let d_left = unsafe { self.d_scores_left().add(rows.start * score_stride) };
        let mut lines = [Line::default(); 2];
        for (row, line) in rows.clone().zip(&mut lines) {
            let info = self.infos[row];
            let seen = info.sees(&range);
            if seen.is_empty() {
                continue;
            }
            (line.first, line.visible) = (seen.start, seen.end);
            for (index, &part) in Part::all(parts).iter().enumerate() {
                let closed = self.closed[row * parts + index];
                let keys = Block { batch: b, ids, content, part };
                let added = self.tables[index].added(self.problem, keys, info.row);
                line.parts[index] = LinePart { added, closed };
            }
        }
        let factor = self.problem.scale * D::Real::LOG2_E;
        // SAFETY: the rows' scores hold a whole block of keys, of which the visible ones were computed; so do
        // the tables, which are numbers for all the parts of a block of keys or for none.
        unsafe {
            let p = self.probabilities.as_mut_ptr().add(rows.start * score_stride);
            let d = self.d_scores.as_mut_ptr().add(rows.start * score_stride);
            let tiles = &UnitTiles { p, d, d_left, score_stride, near: near.clone() };
            if parts == 1 {
                differentiate::<D, 1>(self.d, tiles, factor, &lines);
            } else {
                differentiate::<D, 2>(self.d, tiles, factor, &lines);
            }
        }
        if self.gradients.bias.is_some() {
            for (i, row) in rows.enumerate() {
                // SAFETY: a row of score gradients.
                let d_left = unsafe { d_left.add(i * score_stride) };
                let keys = Block { batch: b, ids, content, part: Part::Whole };
                self.add_bias_gradient(keys, self.infos[row], (d_left, lines[i]));
            }
        }
    }

    /// Adds a row's score gradients, zero beside the visible ones, to the bias of every modality in the block.
    #[inline(always)]
    fn add_bias_gradient(&mut self, keys: Block<'_>, info: RowInfo, (d_scores, line): (*const D::Unit, Line<D::Real>)) {
        let ids = match keys.content {
            _ if line.visible == 0 => 0..0,
            Content::Uniform(key) => key..key + 1,
            Content::Mixed { .. } => 0..self.sizes.modalities as i32,
        };
        for key in ids {
            let own = self.tables[0].own(keys, key);
            // SAFETY: the row's score gradients and a table of a whole block of keys.
            let sum = unsafe { sum_where(self.d, d_scores, own, line.first..line.visible) };
            let query = info.row.head_in_group * self.sizes.modalities + info.row.modality as usize;
            self.d_bias[query * self.sizes.modalities + key as usize] += sum.to_f64();
        }
    }

    /// Adds what the block gave to d bias: summed in float64, as many small terms cancel.
    #[inline(always)]
    fn write_bias(&mut self) {
        let Some(target) = &self.gradients.bias else { return };
        let [b, h] = self.head;
        let modalities = self.sizes.modalities;
        for (at, sum) in self.d_bias.iter_mut().enumerate().filter(|(_, sum)| **sum != 0.0) {
            let head = h * self.sizes.group + at / (modalities * modalities);
            // SAFETY: this task alone owns the tables of the block's heads.
            let entry = unsafe { target.element([b, head, at / modalities % modalities, at % modalities]) };
            *entry += D::Real::from_f64(std::mem::take(sum));
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
                pack::unpack(self.d.simd(), source, self.problem.scale, depth, target);
            }
        }
    }

    /// dK and dV of a key head that has no other task.
    #[inline(always)]
    pub(super) fn finish(&mut self) {
        let Sizes { depth, stride, keys, .. } = self.sizes;
        let [b, h] = self.head;
        for j in 0..keys {
            // SAFETY: the key's sums; this task alone owns the key head.
            unsafe {
                let d_key = self.gradients.key.block([b, h, j]).as_mut_ptr();
                pack::unpack(self.d.simd(), self.d_key.as_ptr().add(j * stride), self.problem.scale, depth, d_key);
                let d_value = self.gradients.value.block([b, h, j]).as_mut_ptr();
                pack::unpack(self.d.simd(), self.d_value.as_ptr().add(j * stride), D::Real::ONE, depth, d_value);
            }
        }
    }

    /// Leaves the sums of one task for [`Self::gather`].
    #[inline(always)]
    pub(super) fn leave(&mut self, partial: &Partial<D::Real>, task: usize) {
        for (which, sums) in [&self.d_key, &self.d_value].into_iter().enumerate() {
            // SAFETY: a slot has the size of the sums, and a task has its own.
            unsafe { partial.slot(task, which).copy_from_nonoverlapping(sums.as_ptr(), sums.len()) };
        }
    }

    /// Adds the sums of a key head's tasks in order and writes dK and dV.
    #[inline(always)]
    pub(super) fn gather(&mut self, partial: &Partial<D::Real>, tasks: Range<usize>, head: [usize; 2]) {
        self.head = head;
        self.d_key.fill(D::Real::ZERO);
        self.d_value.fill(D::Real::ZERO);
        for task in tasks {
            for (which, sums) in [&mut self.d_key, &mut self.d_value].into_iter().enumerate() {
                let vectors = sums.len() / D::Simd::LANES;
                // SAFETY: a slot has the size of the sums, whole registers; all tasks have ended.
                unsafe {
                    let slot = partial.slot(task, which);
                    pack::accumulate(self.d.simd(), slot, D::Real::ONE, sums.as_mut_ptr(), (vectors, true));
                }
            }
        }
        self.finish();
    }
}
