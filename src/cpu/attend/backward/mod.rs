//! Backward: probabilities recomputed tile by tile from the logsumexp, five products a tile.
//!
//! A task is one key head and a share of its query heads: it alone writes their rows of dQ, d sink and d bias, and sums
//! dK and dV over them. Where a key head has several tasks their sums are added in order afterwards. The shares depend
//! on the problem alone, so the result does not depend on the threads.

mod rows;
mod worker;

use super::plan::{Sizes, row_blocks};
use crate::cpu::buffer::Buffer;
use crate::cpu::dot::Dot;
use crate::cpu::simd::Task;
use crate::cpu::{CpuReal, parallel};
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::problem::{AttendGradients, AttendProblem, AttendUpstream};
use std::ops::Range;
use worker::Worker;

/// Tasks a problem is cut into, if its heads allow: enough to keep a large machine busy.
const TASKS: usize = 8;

pub(in crate::cpu) fn run<D, T>(
    d: D,
    threads: usize,
    problem: &AttendProblem<'_, T>,
    upstream: &AttendUpstream<'_, T>,
    gradients: &mut AttendGradients<'_, T>,
) -> Result<()>
where
    D: Dot<Real = T::Acc>,
    T: Element<Acc: CpuReal>,
{
    let sizes = Sizes::new(d, problem);
    let units = sizes.batch * sizes.kv_heads;
    if let Some(bias) = &mut gradients.bias {
        bias.as_mut_slice().fill(T::Acc::ZERO);
    }
    if units == 0 || sizes.group == 0 || sizes.queries == 0 || sizes.keys == 0 {
        gradients.query.as_mut_slice().fill(T::default());
        gradients.key.as_mut_slice().fill(T::default());
        gradients.value.as_mut_slice().fill(T::default());
        if let Some(sink) = &mut gradients.sink {
            sink.as_mut_slice().fill(T::Acc::ZERO);
        }
        return Ok(());
    }
    let heads = sizes.group.div_ceil(TASKS.div_ceil(units).min(sizes.group));
    let shares = sizes.group.div_ceil(heads);
    let tasks = units * shares;
    let tile = sizes.keys * sizes.stride;
    let partial = Buffer::new(if shares > 1 { tasks * 2 * tile } else { 0 }, "partial gradients of keys and values")?;
    let partial = Partial { sums: partial, tile };
    let gradients = &*gradients;
    let worker = |_| Worker::new(d, problem, upstream, gradients, sizes);
    let mut workers = (0..threads.min(tasks)).map(worker).collect::<Result<Vec<_>>>()?;
    parallel::run(&mut workers, tasks, |worker, task| {
        let (unit, share) = (task / shares, task % shares);
        let head = [unit / sizes.kv_heads, unit % sizes.kv_heads];
        let first = share * heads;
        let queries = first..(first + heads).min(sizes.group);
        let leave = (shares > 1).then_some((&partial, task));
        d.enter(Share { worker, head, queries, leave });
    });
    if shares > 1 {
        parallel::run(&mut workers, units, |worker, unit| {
            let head = [unit / sizes.kv_heads, unit % sizes.kv_heads];
            let tasks = unit * shares..(unit + 1) * shares;
            d.enter(Gather { worker, head, partial: &partial, tasks });
        });
    }
    Ok(())
}

/// Sums of dK and dV of every task, for key heads that have more than one.
struct Partial<R: Real> {
    sums: Buffer<R>,
    tile: usize,
}

impl<R: Real> Partial<R> {
    /// dK (0) or dV (1) of a task.
    fn slot(&self, task: usize, which: usize) -> *mut R {
        (&raw const self.sums[(2 * task + which) * self.tile]).cast_mut()
    }
}

/// Some query heads of one key head.
struct Share<'w, 'a, D: Dot, T: Element<Acc = D::Real>> {
    worker: &'w mut Worker<'a, D, T>,
    head: [usize; 2],
    /// Query heads, counted inside the group.
    queries: Range<usize>,
    /// Where to leave the sums of dK and dV, if other tasks add to them.
    leave: Option<(&'w Partial<D::Real>, usize)>,
}

impl<D: Dot, T: Element<Acc = D::Real>> Task for Share<'_, '_, D, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { worker, head, queries, leave } = self;
        worker.pack_keys(head);
        for mut block in row_blocks(queries.len(), worker.queries()) {
            block.heads = block.heads.start + queries.start..block.heads.end + queries.start;
            worker.rows(&block);
        }
        match leave {
            None => worker.finish(),
            Some((partial, task)) => worker.leave(partial, task),
        }
    }
}

/// The sums of all tasks of one key head.
struct Gather<'w, 'a, D: Dot, T: Element<Acc = D::Real>> {
    worker: &'w mut Worker<'a, D, T>,
    head: [usize; 2],
    partial: &'w Partial<D::Real>,
    tasks: Range<usize>,
}

impl<D: Dot, T: Element<Acc = D::Real>> Task for Gather<'_, '_, D, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.worker.gather(self.partial, self.tasks, self.head);
    }
}
