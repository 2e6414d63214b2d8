//! Duplex alignment as two custom operators: the bases of (key, value), then the aligned keys of (key, [keep, mix], bases).

use super::storage::{Number, for_dtype, on_cpu, result, table_dtype, tensor, view, wrapped};
use crate::dtype::Real;
use crate::ids::{Ids, PADDING};
use crate::op;
use crate::problem::{AlignGradients, AlignOutputs, AlignProblem, AlignUpstream, Basis};
use crate::view::{View, ViewMut};
use candle_core::backend::BackendStorage;
use candle_core::utils::get_num_threads;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// What [`duplex_align`] needs beside its tensors; only the modality has no default.
#[derive(Debug, Clone, Copy)]
pub struct Alignment<'a> {
    /// Modality of every token (B, N).
    pub modality: &'a Ids,
    /// The same with -1 for tokens that may feed no basis; None: every real token may.
    pub sources: Option<&'a Ids>,
    /// G (B, Hkv, M, D, D) to use instead of computing one, as decoding does.
    pub basis: Option<&'a Tensor>,
    /// What the basis is. Default: covariance.
    pub kind: Basis,
    /// Added to every component of a key before it is normalised. Default: 1e-6.
    pub eps: f64,
}

impl<'a> Alignment<'a> {
    /// Covariance bases of every real token.
    pub fn new(modality: &'a Ids) -> Self {
        Self { modality, sources: None, basis: None, kind: Basis::Covariance, eps: 1e-6 }
    }
}

/// Duplex alignment (paper, equations 5 and 6): key and value (B, Hkv, N, D), keep and mix (M, D, D) to the aligned keys
/// and the bases (B, Hkv, M, D, D) in float32 (float64 for float64 keys). Differentiable in all tensors, the given basis too.
pub fn duplex_align(
    key: &Tensor,
    value: &Tensor,
    keep: &Tensor,
    mix: &Tensor,
    options: &Alignment<'_>,
) -> Result<(Tensor, Tensor)> {
    if key.dtype() != value.dtype() {
        candle_core::bail!("key and value have dtypes {:?} and {:?}; wanted the same", key.dtype(), value.dtype());
    }
    let modalities = keep.dims3()?.0;
    if options.modality.span() > modalities {
        candle_core::bail!("modality has the id {}; wanted ids below M = {modalities}", options.modality.span() - 1);
    }
    let dtype = table_dtype(key.dtype());
    let settings = Settings {
        modality: options.modality.clone(),
        sources: options.sources.unwrap_or(options.modality).clone(),
        modalities,
        kind: options.kind,
        eps: options.eps,
    };
    let basis = match options.basis {
        Some(basis) => basis.clone(),
        None => key.apply_op2(value, Bases(settings.clone()))?,
    };
    let tables = Tensor::stack(&[keep.to_dtype(dtype)?, mix.to_dtype(dtype)?], 0)?;
    let aligned = key.apply_op3(&tables, &basis.to_dtype(dtype)?, Aligned(settings))?;
    Ok((aligned, basis))
}

#[derive(Clone)]
struct Settings {
    modality: Ids,
    sources: Ids,
    modalities: usize,
    kind: Basis,
    eps: f64,
}

/// (key, value) to the bases.
struct Bases(Settings);

/// (key, [keep, mix], bases) to the aligned keys.
struct Aligned(Settings);

impl Bases {
    /// Alignment by tables of zeros, of which only the bases are wanted.
    fn problem<'a, T: Number>(
        &'a self,
        [key, value]: [View<'a, T, 4>; 2],
        modality: &'a Ids,
        (zeros, basis): (&'a [T::Acc], Option<View<'a, T::Acc, 5>>),
    ) -> Result<AlignProblem<'a, T>> {
        let Settings { sources, modalities, kind, eps, .. } = &self.0;
        let d = key.shape()[3];
        let table = View::from_slice(zeros, [*modalities, d, d]);
        let eps = T::Acc::from_f64(*eps);
        AlignProblem { key, value, modality, sources, keep: table, mix: table, basis, kind: *kind, eps }
            .validated()
            .map_err(wrapped)
    }

    fn forward<T: Number>(&self, key: View<'_, T, 4>, value: View<'_, T, 4>) -> Result<(CpuStorage, Shape)> {
        let ([b, h, n, d], m) = (key.shape(), self.0.modalities);
        let zeros = vec![T::Acc::ZERO; m * d * d];
        // Every token passes through as padding, so that nothing but the bases is computed.
        let padding = Ids::new(&vec![PADDING; b * n], [b, n]).expect("padding is an id");
        let problem = self.problem([key, value], &padding, (&zeros, None))?;
        let mut unchanged = vec![T::default(); b * h * n * d];
        let mut basis = vec![T::Acc::ZERO; b * h * m * d * d];
        let mut outputs = AlignOutputs {
            aligned: ViewMut::from_slice(&mut unchanged, [b, h, n, d]),
            basis: Some(ViewMut::from_slice(&mut basis, [b, h, m, d, d])),
        };
        op::duplex_align(&problem, &mut outputs, get_num_threads()).map_err(wrapped)?;
        Ok(result(basis, vec![b, h, m, d, d]))
    }

    fn backward<T: Number>(
        &self,
        inputs: [View<'_, T, 4>; 2],
        basis: View<'_, T::Acc, 5>,
        d_basis: View<'_, T::Acc, 5>,
    ) -> Result<[Tensor; 2]> {
        let ([b, h, n, d], m) = (inputs[0].shape(), self.0.modalities);
        let (zeros, nothing) = (vec![T::Acc::ZERO; m * d * d], vec![T::default(); b * h * n * d]);
        let problem = self.problem(inputs, &self.0.modality, (&zeros, Some(basis)))?;
        let aligned = View::from_slice(&nothing, [b, h, n, d]);
        let upstream = AlignUpstream { aligned, basis: Some(d_basis), computed: true };
        let (mut d_key, mut d_value) = (nothing.clone(), nothing.clone());
        let mut tables = [zeros.clone(), zeros.clone()];
        let [keep, mix] = &mut tables;
        let mut gradients = AlignGradients {
            key: ViewMut::from_slice(&mut d_key, [b, h, n, d]),
            value: ViewMut::from_slice(&mut d_value, [b, h, n, d]),
            keep: ViewMut::from_slice(keep, [m, d, d]),
            mix: ViewMut::from_slice(mix, [m, d, d]),
            basis: None,
        };
        op::duplex_align_backward(&problem, &upstream, &mut gradients, get_num_threads()).map_err(wrapped)?;
        Ok([tensor(d_key, (b, h, n, d))?, tensor(d_value, (b, h, n, d))?])
    }
}

impl CustomOp2 for Bases {
    fn name(&self) -> &'static str {
        "moda-bases"
    }

    fn cpu_fwd(
        &self,
        key: &CpuStorage,
        key_layout: &Layout,
        value: &CpuStorage,
        value_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        for_dtype!(key.dtype(), T => self.forward::<T>(view(key, key_layout)?, view(value, value_layout)?))
    }

    fn bwd(
        &self,
        key: &Tensor,
        value: &Tensor,
        basis: &Tensor,
        d_basis: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [key, value, basis, d_basis] = [key, value, basis, d_basis].map(Tensor::storage_and_layout);
        for_dtype!(on_cpu(&key.0)?.dtype(), T => {
            let inputs = [view::<T, 4>(on_cpu(&key.0)?, key.1)?, view(on_cpu(&value.0)?, value.1)?];
            let bases = [view(on_cpu(&basis.0)?, basis.1)?, view(on_cpu(&d_basis.0)?, d_basis.1)?];
            let [d_key, d_value] = self.backward(inputs, bases[0], bases[1])?;
            Ok((Some(d_key), Some(d_value)))
        })
    }
}

impl Aligned {
    fn problem<'a, T: Number>(
        &'a self,
        key: View<'a, T, 4>,
        tables: &View<'a, T::Acc, 4>,
        basis: View<'a, T::Acc, 5>,
    ) -> Result<AlignProblem<'a, T>> {
        let Settings { modality, kind, eps, .. } = &self.0;
        AlignProblem {
            key,
            value: key, // only a basis yet to be computed would read it
            modality,
            sources: modality,
            keep: tables.index([0]),
            mix: tables.index([1]),
            basis: Some(basis),
            kind: *kind,
            eps: T::Acc::from_f64(*eps),
        }
        .validated()
        .map_err(wrapped)
    }

    fn forward<T: Number>(
        &self,
        key: View<'_, T, 4>,
        tables: &View<'_, T::Acc, 4>,
        basis: View<'_, T::Acc, 5>,
    ) -> Result<(CpuStorage, Shape)> {
        let problem = self.problem(key, tables, basis)?;
        let [b, h, n, d] = key.shape();
        let mut aligned = vec![T::default(); b * h * n * d];
        let mut outputs = AlignOutputs { aligned: ViewMut::from_slice(&mut aligned, [b, h, n, d]), basis: None };
        op::duplex_align(&problem, &mut outputs, get_num_threads()).map_err(wrapped)?;
        Ok(result(aligned, (b, h, n, d)))
    }

    fn backward<T: Number>(
        &self,
        key: View<'_, T, 4>,
        (tables, basis): (&View<'_, T::Acc, 4>, View<'_, T::Acc, 5>),
        d_aligned: View<'_, T, 4>,
    ) -> Result<[Tensor; 3]> {
        let problem = self.problem(key, tables, basis)?;
        let ([b, h, n, d], m) = (key.shape(), self.0.modalities);
        let upstream = AlignUpstream { aligned: d_aligned, basis: None, computed: false };
        let mut d_key = vec![T::default(); b * h * n * d];
        let mut unused = d_key.clone();
        let mut d_tables = vec![T::Acc::ZERO; 2 * m * d * d];
        let mut d_basis = vec![T::Acc::ZERO; b * h * m * d * d];
        let (keep, mix) = d_tables.split_at_mut(m * d * d);
        let mut gradients = AlignGradients {
            key: ViewMut::from_slice(&mut d_key, [b, h, n, d]),
            value: ViewMut::from_slice(&mut unused, [b, h, n, d]),
            keep: ViewMut::from_slice(keep, [m, d, d]),
            mix: ViewMut::from_slice(mix, [m, d, d]),
            basis: Some(ViewMut::from_slice(&mut d_basis, [b, h, m, d, d])),
        };
        op::duplex_align_backward(&problem, &upstream, &mut gradients, get_num_threads()).map_err(wrapped)?;
        Ok([tensor(d_key, (b, h, n, d))?, tensor(d_tables, (2, m, d, d))?, tensor(d_basis, vec![b, h, m, d, d])?])
    }
}

impl CustomOp3 for Aligned {
    fn name(&self) -> &'static str {
        "moda-duplex-align"
    }

    fn cpu_fwd(
        &self,
        key: &CpuStorage,
        key_layout: &Layout,
        tables: &CpuStorage,
        tables_layout: &Layout,
        basis: &CpuStorage,
        basis_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        for_dtype!(key.dtype(), T => {
            self.forward::<T>(view(key, key_layout)?, &view(tables, tables_layout)?, view(basis, basis_layout)?)
        })
    }

    fn bwd(
        &self,
        key: &Tensor,
        tables: &Tensor,
        basis: &Tensor,
        _: &Tensor,
        d_aligned: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [key, tables, basis, d_aligned] = [key, tables, basis, d_aligned].map(Tensor::storage_and_layout);
        for_dtype!(on_cpu(&key.0)?.dtype(), T => {
            let (tables, basis) = (view(on_cpu(&tables.0)?, tables.1)?, view(on_cpu(&basis.0)?, basis.1)?);
            let d_aligned = view(on_cpu(&d_aligned.0)?, d_aligned.1)?;
            let key = view::<T, 4>(on_cpu(&key.0)?, key.1)?;
            let [d_key, d_tables, d_basis] = self.backward(key, (&tables, basis), d_aligned)?;
            Ok((Some(d_key), Some(d_tables), Some(d_basis)))
        })
    }
}
