//! Pseudo-scores as a custom operator over (decay, base).

use super::storage::{Number, for_real, on_cpu, result, tensor, view, wrapped};
use crate::dtype::Real;
use crate::ids::Ids;
use crate::op;
use crate::problem::SinkProblem;
use crate::view::{View, ViewMut};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

/// Sink logits (B, Hq, Nq) of every query row (paper, equation 10), differentiable in decay and base (M, Hq), both
/// float32 or both float64.
///
/// `position` (B, Nq) holds the 0-based position of every query among the real tokens of its row, row after row.
pub fn pseudo_sink(position: &[i64], query_modality: &Ids, span: i64, decay: &Tensor, base: &Tensor) -> Result<Tensor> {
    let [b, nq] = query_modality.shape();
    let m = decay.dims2()?.0;
    if position.len() != b * nq {
        candle_core::bail!("{} positions; wanted (B, Nq) = ({b}, {nq})", position.len());
    }
    if query_modality.span() > m {
        candle_core::bail!("query_modality has the id {}; wanted ids below M = {m}", query_modality.span() - 1);
    }
    let operator = Operator { position: position.to_vec(), query_modality: query_modality.clone(), span };
    decay.apply_op2(base, operator)
}

struct Operator {
    position: Vec<i64>,
    query_modality: Ids,
    span: i64,
}

impl Operator {
    fn problem<'a, R: Number + Real>(
        &'a self,
        decay: View<'a, R, 2>,
        base: View<'a, R, 2>,
    ) -> Result<SinkProblem<'a, R>> {
        let position = View::from_slice(&self.position, self.query_modality.shape());
        let problem = SinkProblem { position, query_modality: &self.query_modality, span: self.span, decay, base };
        problem.validated().map_err(wrapped)
    }
}

impl CustomOp2 for Operator {
    fn name(&self) -> &'static str {
        "moda-pseudo-sink"
    }

    fn cpu_fwd(
        &self,
        decay: &CpuStorage,
        decay_layout: &Layout,
        base: &CpuStorage,
        base_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [b, nq] = self.query_modality.shape();
        let heads = decay_layout.dims()[1];
        for_real!(decay.dtype(), R => {
            let problem = self.problem::<R>(view(decay, decay_layout)?, view(base, base_layout)?)?;
            let mut sink = vec![0.0; b * heads * nq];
            op::pseudo_sink(&problem, &mut ViewMut::from_slice(&mut sink, [b, heads, nq])).map_err(wrapped)?;
            Ok(result(sink, (b, heads, nq)))
        })
    }

    fn bwd(
        &self,
        decay: &Tensor,
        base: &Tensor,
        _: &Tensor,
        d_sink: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let shape = decay.dims2()?;
        let [decay, base, d_sink] = [decay, base, d_sink].map(Tensor::storage_and_layout);
        for_real!(on_cpu(&decay.0)?.dtype(), R => {
            let (decay, base) = (view(on_cpu(&decay.0)?, decay.1)?, view(on_cpu(&base.0)?, base.1)?);
            let problem = self.problem::<R>(decay, base)?;
            let mut gradients = [vec![0.0; shape.0 * shape.1], vec![0.0; shape.0 * shape.1]];
            let [d_decay, d_base] = &mut gradients;
            let [mut d_decay, mut d_base] = [d_decay, d_base].map(|d| ViewMut::from_slice(d, [shape.0, shape.1]));
            let d_sink = view(on_cpu(&d_sink.0)?, d_sink.1)?;
            op::pseudo_sink_backward(&problem, d_sink, &mut d_decay, &mut d_base).map_err(wrapped)?;
            let [d_decay, d_base] = gradients.map(|gradient| tensor(gradient, shape));
            Ok((Some(d_decay?), Some(d_base?)))
        })
    }
}
