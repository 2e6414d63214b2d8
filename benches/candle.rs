//! Ours beside candle's own CPU flash attention: time and error, on the threads candle uses.
//!
//! `cargo bench --features candle --bench candle` prints a table; with `-- --record FILE` it also writes JSON.
//!
//! Plain attention is what both can do. "full" adds what only ours does: pseudo-scores and the modality bias. candle's
//! kernel has no backward, so forward + backward is timed beside the dense formula under candle's autograd.

use candle_core::utils::get_num_threads;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops::softmax;
use moda_attn::candle::{Attention, ids, modular_attention};
use std::fs;
use std::time::Instant;

const CPU: Device = Device::Cpu;
const ROUNDS: usize = 7;
/// B, Hq, Hkv, N, D
const SHAPES: [[usize; 5]; 3] = [[1, 8, 2, 512, 64], [1, 32, 8, 1024, 128], [2, 16, 16, 1024, 64]];

struct Case {
    query: Var,
    key: Var,
    value: Var,
    sink: Tensor,
    bias: Tensor,
    scale: f64,
    modality: moda_attn::ids::Ids,
}

impl Case {
    fn new([b, hq, hkv, n, d]: [usize; 5]) -> Result<Self> {
        let random = |h: usize| Var::randn(0f32, 1., (b, h, n, d), &CPU);
        let row: Vec<i64> = (0..n).map(|j| i64::from((n / 8..n / 2).contains(&j))).collect();
        Ok(Self {
            query: random(hq)?,
            key: random(hkv)?,
            value: random(hkv)?,
            sink: Tensor::randn(-4f32, 1., (b, hq, n), &CPU)?,
            bias: Tensor::randn(0f32, 0.1, (b, hq, 2, 2), &CPU)?,
            scale: (d as f64).powf(-0.5),
            modality: ids(&Tensor::new(row, &CPU)?.expand((b, n))?)?,
        })
    }

    fn ours(&self, full: bool) -> Result<Tensor> {
        let options = Attention {
            sink: full.then_some(&self.sink),
            bias: full.then_some(&self.bias),
            ..Attention::new(&self.modality)
        };
        modular_attention(&self.query, &self.key, &self.value, &options)
    }

    /// candle's kernel wants (B, N, H, D).
    fn flash(&self) -> Result<Tensor> {
        let [q, k, v] = [&self.query, &self.key, &self.value].map(|x| x.transpose(1, 2));
        flash_attn::<f32>(
            &q?.contiguous()?,
            &k?.contiguous()?,
            &v?.contiguous()?,
            self.scale as f32,
            AttnMask::causal(),
            None,
            None,
        )
    }

    /// The dense formula in the dtype given.
    fn dense(&self, dtype: DType) -> Result<Tensor> {
        let (b, hq, n, d) = self.query.dims4()?;
        let hkv = self.key.dim(1)?;
        let repeat = |x: &Tensor| {
            let shape = (b, hkv, hq / hkv, n, d);
            x.to_dtype(dtype)?.unsqueeze(2)?.broadcast_as(shape)?.contiguous()?.reshape((b, hq, n, d))
        };
        let (key, value) = (repeat(&self.key)?, repeat(&self.value)?);
        let scores = (self.query.to_dtype(dtype)?.matmul(&key.t()?.contiguous()?)? * self.scale)?;
        let hidden: Vec<f32> = (0..n * n).map(|at| if at % n > at / n { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(hidden, (n, n), &CPU)?.to_dtype(dtype)?;
        softmax(&scores.broadcast_add(&mask)?, D::Minus1)?.matmul(&value)
    }

    fn errors(&self) -> Result<[f64; 2]> {
        let truth = self.dense(DType::F64)?;
        let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>();
        let error =
            |x: Tensor| -> Result<f64> { Ok((norm(&(x.to_dtype(DType::F64)? - &truth)?)? / norm(&truth)?).sqrt()) };
        Ok([error(self.ours(false)?)?, error(self.flash()?)?])
    }
}

fn backward(out: &Tensor) -> Result<()> {
    out.sum_all()?.backward().map(drop)
}

/// Median seconds of every candidate over interleaved rounds, after one round to warm up.
fn race(candidates: &[&dyn Fn() -> Result<()>]) -> Result<Vec<f64>> {
    let mut times = vec![Vec::new(); candidates.len()];
    for round in 0..=ROUNDS {
        for (candidate, times) in candidates.iter().zip(&mut times) {
            let start = Instant::now();
            candidate()?;
            if round > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    for times in &mut times {
        times.sort_by(f64::total_cmp);
    }
    Ok(times.into_iter().map(|times| times[ROUNDS / 2]).collect())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let record = arguments.iter().position(|word| word == "--record").and_then(|at| arguments.get(at + 1));
    let threads = get_num_threads();
    println!("float32, causal, {threads} threads; milliseconds, median of {ROUNDS} interleaved rounds");
    println!(
        "{:22} {:>7} {:>7} {:>7} | {:>9} {:>9} | error ours, flash",
        "B Hq Hkv N D", "ours", "full", "flash", "ours f+b", "dense f+b"
    );
    let mut rows = Vec::new();
    for shape in SHAPES {
        let case = Case::new(shape)?;
        let [ours_error, flash_error] = case.errors()?;
        assert!(ours_error < 2e-6 && flash_error < 1e-4, "parity: {ours_error:.1e}, {flash_error:.1e}");
        let times = race(&[
            &|| case.ours(false).map(drop),
            &|| case.ours(true).map(drop),
            &|| case.flash().map(drop),
            &|| backward(&case.ours(false)?),
            &|| backward(&case.dense(DType::F32)?),
        ])?;
        let [ours, full, flash, ours_both, dense_both] = std::array::from_fn(|at| 1e3 * times[at]);
        println!(
            "{:22} {ours:7.2} {full:7.2} {flash:7.2} | {ours_both:9.2} {dense_both:9.2} | {ours_error:.1e}, {flash_error:.1e}",
            format!("{shape:?}")
        );
        rows.push(format!(
            "  {{\"shape\": {shape:?}, \"ours_ms\": {ours:.3}, \"full_ms\": {full:.3}, \"flash_ms\": {flash:.3}, \
             \"ours_backward_ms\": {ours_both:.3}, \"dense_backward_ms\": {dense_both:.3}, \
             \"ours_error\": {ours_error:.2e}, \"flash_error\": {flash_error:.2e}}}"
        ));
    }
    if let Some(path) = record {
        let head =
            format!("\"peer\": \"candle-nn flash_attn on the CPU\", \"threads\": {threads}, \"dtype\": \"float32\"");
        let text = format!("{{{head}, \"rounds\": {ROUNDS}, \"rows\": [\n{}\n]}}\n", rows.join(",\n"));
        fs::write(path, text).map_err(candle_core::Error::wrap)?;
    }
    Ok(())
}
