//! The end of a row's softmax: logsumexp, mass, and the weighted sum divided by its total.

use super::plan::Sizes;
use super::rows::RowInfo;
use crate::cpu::CpuReal;
use crate::cpu::kernel::exp2::exp2_one;
use crate::cpu::kernel::pack;
use crate::cpu::kernel::softmax::Running;
use crate::cpu::simd::Simd;
use crate::dtype::{Element, Real};
use crate::problem::{AttendOutputs, AttendProblem, MassBy};

/// Where finished rows go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Finish<'a, 'o, T: Element> {
    pub(super) problem: &'a AttendProblem<'a, T>,
    pub(super) outputs: &'a AttendOutputs<'o, T>,
    pub(super) sizes: Sizes,
}

impl<T: Element<Acc: CpuReal>> Finish<'_, '_, T> {
    /// Writes what softmax `part` of one row of batch row `b` has come to. `sums` are its weighted values; the outputs of
    /// "split" add up in `result`, which "joint" does not touch; `by_modality` is read where mass is wanted that way.
    ///
    /// # Safety
    /// The caller alone owns the row in every output; `sums`, and for "split" `result`, are valid for D in whole registers.
    #[inline(always)]
    pub(super) unsafe fn row<S: Simd<Real = T::Acc>>(
        &self,
        s: S,
        ([b, part], info): ([usize; 2], &RowInfo),
        (running, by_modality): (&Running<S::Real>, &[S::Real]),
        (sums, result): (*const S::Real, *mut S::Real),
    ) {
        let outputs = self.outputs;
        let Sizes { depth, vectors, parts, .. } = self.sizes;
        let (head, query) = (info.row.head, info.query);
        let factor = if running.seen { S::Real::ONE / running.total } else { S::Real::ZERO };
        if let Some(logsumexp) = &outputs.logsumexp {
            // Backward takes every probability from this number: it is rounded once, to its own type.
            let natural = running.top.to_f64() * std::f64::consts::LN_2 + running.total.to_f64().ln();
            // SAFETY: this task alone owns the row.
            let logsumexp = unsafe { logsumexp.element([b, head, part, query]) };
            *logsumexp = if running.seen { S::Real::from_f64(natural) } else { S::Real::INFINITY };
        }
        if let Some(mass) = &outputs.mass {
            let sink = self.problem.sink.map(|sink| sink.get([b, head, query, part]) * S::Real::LOG2_E);
            // An infinite sink is its own maximum, and the difference of the two is no number.
            let pseudo = match sink {
                None => S::Real::ZERO,
                Some(sink) if sink == running.top => S::Real::ONE,
                Some(sink) => exp2_one(s, sink - running.top),
            };
            let by_relation = [running.own, running.cross];
            let shares = match mass.by {
                MassBy::Relation => &by_relation,
                MassBy::Modality => by_modality,
            };
            // SAFETY: this task alone owns the row.
            let columns = unsafe { mass.values.block([b, head, query]) };
            for (mass, &share) in columns.iter_mut().zip(shares.iter().chain([&pseudo])) {
                let earlier = if part == 0 { S::Real::ZERO } else { *mass };
                *mass = earlier + if running.seen { share * factor } else { S::Real::ZERO };
            }
        }
        // SAFETY: the row's sums and result, and its place in the outputs.
        unsafe {
            let out = || outputs.out.block([b, head, query]).as_mut_ptr();
            if parts == 1 {
                return pack::unpack(s, sums, factor, depth, out());
            }
            pack::accumulate(s, sums, factor, result, (vectors, part > 0));
            if let Some(both) = &outputs.parts {
                pack::unpack(s, sums, factor, depth, both.block([b, head, part, query]).as_mut_ptr());
            }
            if part + 1 == parts {
                pack::unpack(s, result, S::Real::ONE, depth, out());
            }
        }
    }
}
