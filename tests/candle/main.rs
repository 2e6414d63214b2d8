//! candle's operators against candle's own autograd on the dense formulas in float64: outputs and every gradient.

mod dense;
#[path = "../common/rng.rs"]
#[allow(dead_code, reason = "only the normal numbers are used here")]
mod rng;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use moda_attn::candle::{
    Alignment, Attention, ModaAttention, ModaCache, ModaConfig, duplex_align, ids, modular_attention,
    modular_attention_with_mass, pseudo_sink,
};
use moda_attn::problem::{Basis, Combine};
use rng::Rng;

const CPU: Device = Device::Cpu;
const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];
/// Modalities of the cases: text, vision and a third one.
const M: usize = 3;
/// Two rows of tokens; -1 is padding.
const TOKENS: [[i64; 9]; 2] = [[0, 0, 1, 1, 1, 2, 0, 1, 0], [-1, -1, 0, 1, 1, 0, 0, 2, 1]];

/// Random numbers that `dtype` can store, in float64.
fn random(rng: &mut Rng, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.normal()).collect();
    Tensor::from_vec(values, shape, &CPU)?.to_dtype(dtype)?.to_dtype(DType::F64)
}

/// The dtype of tables beside keys of `dtype`.
fn table(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Allowed relative errors of outputs and of gradients.
fn tolerance(dtype: DType) -> [f64; 2] {
    match dtype {
        DType::F64 => [1e-12, 1e-11],
        DType::F32 => [2e-6, 1e-5],
        DType::BF16 => [1e-2, 2e-2],
        _ => [2e-3, 4e-3],
    }
}

#[track_caller]
fn assert_close(name: &str, got: &Tensor, wanted: &Tensor, tolerance: f64) {
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    assert_eq!(got.dims(), wanted.dims(), "{name}");
    let error = norm(&(got.to_dtype(DType::F64).unwrap() - wanted).unwrap()) / norm(wanted).max(1e-3);
    assert!(error <= tolerance, "{name}: relative error {error:.1e}, allowed {tolerance:.1e}");
}

/// The loss sum(x * weight), so that every element has a gradient of its own.
fn weighed(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.mul(&weight.to_dtype(x.dtype())?)?.to_dtype(DType::F64)?.sum_all()
}

fn vars(values: &[Tensor], dtypes: &[DType]) -> Result<Vec<Var>> {
    values.iter().zip(dtypes).map(|(value, &dtype)| Var::from_tensor(&value.to_dtype(dtype)?)).collect()
}

/// Compares the gradient of every input.
#[track_caller]
fn assert_gradients(name: &str, (loss, inputs): (&Tensor, &[Var]), (truth, wanted): (&Tensor, &[Var]), tolerance: f64) {
    let (got, truth) = (loss.backward().unwrap(), truth.backward().unwrap());
    for (index, (input, wanted)) in inputs.iter().zip(wanted).enumerate() {
        let name = format!("{name}, gradient {index}");
        let got = got.get(input).unwrap_or_else(|| panic!("{name} is missing"));
        assert_close(&name, got, truth.get(wanted).unwrap(), tolerance);
    }
}

#[test]
fn attention_and_its_gradients_are_those_of_the_dense_formula() -> Result<()> {
    let tokens = Tensor::new(&TOKENS, &CPU)?;
    let modality = ids(&tokens)?;
    for dtype in DTYPES {
        for (case, combine) in [Combine::Joint, Combine::Split, Combine::Joint, Combine::Split].into_iter().enumerate()
        {
            let (causal, tables) = (case % 3 == 0, case < 3);
            let name = format!("{dtype:?} {combine:?} causal {causal} tables {tables}");
            let mut rng = Rng::new(case as u64 + 7);
            let (parts, wide) = (combine.parts(), table(dtype));
            let mut values = vec![
                random(&mut rng, &[2, 4, 9, 8], dtype)?,
                random(&mut rng, &[2, 2, 9, 8], dtype)?,
                random(&mut rng, &[2, 2, 9, 8], dtype)?,
            ];
            if tables {
                // One table for all batch rows: its gradient is a sum.
                values.push(random(&mut rng, &[1, 4, 9, parts], wide)?);
                values.push(random(&mut rng, &[2, 1, M, M], wide)?);
            }
            let weight = random(&mut rng, &[2, 4, 9, 8], dtype)?;
            let ours = vars(&values, &[dtype, dtype, dtype, wide, wide])?;
            let truth = vars(&values, &[DType::F64; 5])?;
            let sink = if tables {
                let sink = ours[3].as_tensor();
                Some(if parts == 1 { sink.squeeze(3)? } else { sink.clone() })
            } else {
                None
            };
            let options = Attention {
                causal,
                combine,
                sink: sink.as_ref(),
                bias: ours.get(4).map(Var::as_tensor),
                ..Attention::new(&modality)
            };
            let (out, mass) = modular_attention_with_mass(&ours[0], &ours[1], &ours[2], &options)?;
            let wide_tables = if tables {
                let sink = truth[3].broadcast_as((2, 4, 9, parts))?;
                Some((sink, truth[4].broadcast_as((2, 4, M, M))?.contiguous()?))
            } else {
                None
            };
            let (wanted, wanted_mass) = dense::modular_attention(&dense::Attention {
                query: &truth[0],
                key: &truth[1],
                value: &truth[2],
                modality: &tokens,
                query_modality: &tokens,
                sink: wide_tables.as_ref().map(|tables| &tables.0),
                bias: wide_tables.as_ref().map(|tables| &tables.1),
                causal,
                split: parts == 2,
            })?;
            let [outputs, gradients] = tolerance(dtype);
            assert_close(&name, &out, &wanted, outputs);
            assert_close(&format!("{name}, mass"), &mass, &wanted_mass, outputs);
            let losses = (weighed(&out, &weight)?, weighed(&wanted, &weight)?);
            assert_gradients(&name, (&losses.0, &ours), (&losses.1, &truth), gradients);
        }
    }
    Ok(())
}

#[test]
fn alignment_and_its_gradients_are_those_of_the_dense_formula() -> Result<()> {
    let tokens = Tensor::new(&TOKENS, &CPU)?;
    let sources = Tensor::new(&[[0i64, 0, 1, 1, 1, 2, -1, -1, -1], [-1, -1, 0, 1, 1, 0, -1, -1, -1]], &CPU)?;
    let (modality, feeding) = (ids(&tokens)?, ids(&sources)?);
    for dtype in DTYPES {
        for (kind, given) in [(Basis::Covariance, false), (Basis::Gram, false), (Basis::Covariance, true)] {
            let name = format!("{dtype:?} {kind:?} given {given}");
            let (mut rng, wide) = (Rng::new(3), table(dtype));
            let mut values = vec![
                random(&mut rng, &[2, 2, 9, 6], dtype)?,
                random(&mut rng, &[2, 2, 9, 6], dtype)?,
                random(&mut rng, &[M, 6, 6], wide)?,
                random(&mut rng, &[M, 6, 6], wide)?,
            ];
            if given {
                values[1] = random(&mut rng, &[2, 2, M, 6, 6], wide)?;
            }
            let second = if given { wide } else { dtype };
            let ours = vars(&values, &[dtype, second, wide, wide])?;
            let truth = vars(&values, &[DType::F64; 4])?;
            let no_value = Tensor::zeros((2, 2, 9, 6), dtype, &CPU)?;
            let [ours_value, true_value] =
                if given { [&no_value; 2] } else { [ours[1].as_tensor(), truth[1].as_tensor()] };
            let options = Alignment {
                sources: Some(&feeding),
                basis: given.then(|| ours[1].as_tensor()),
                kind,
                ..Alignment::new(&modality)
            };
            let (aligned, basis) = duplex_align(&ours[0], ours_value, &ours[2], &ours[3], &options)?;
            let inputs = [truth[0].as_tensor(), true_value, &truth[2], &truth[3]];
            let basis_given = given.then(|| truth[1].as_tensor());
            let (wanted, wanted_basis) = dense::duplex_align(inputs, [&tokens, &sources], basis_given, kind)?;
            let [outputs, gradients] = tolerance(dtype);
            assert_close(&name, &aligned, &wanted, outputs);
            assert_close(&format!("{name}, basis"), &basis, &wanted_basis, tolerance(wide)[0]);
            let weights = [random(&mut rng, &[2, 2, 9, 6], dtype)?, random(&mut rng, &[2, 2, M, 6, 6], wide)?];
            let loss = (weighed(&aligned, &weights[0])? + weighed(&basis, &weights[1])?)?;
            let truth_loss = (weighed(&wanted, &weights[0])? + weighed(&wanted_basis, &weights[1])?)?;
            // The gram basis does not read the value.
            let used = if kind == Basis::Gram { vec![0, 2, 3] } else { vec![0, 1, 2, 3] };
            let pick = |vars: &[Var]| used.iter().map(|&at| vars[at].clone()).collect::<Vec<_>>();
            assert_gradients(&name, (&loss, &pick(&ours)), (&truth_loss, &pick(&truth)), gradients);
        }
    }
    Ok(())
}

#[test]
fn pseudo_scores_and_their_gradients_are_those_of_the_sum() -> Result<()> {
    let tokens = Tensor::new(&[[0i64, 1, 2, 0], [1, 1, 0, 2]], &CPU)?;
    let position = [0, 1, 2, 3, 5, 6, 7, 8];
    for dtype in [DType::F64, DType::F32] {
        let mut rng = Rng::new(1);
        let values = [random(&mut rng, &[M, 4], dtype)?.abs()?, random(&mut rng, &[M, 4], dtype)?];
        let weight = random(&mut rng, &[2, 4, 4], dtype)?;
        let [ours, truth] = [vars(&values, &[dtype; 2])?, vars(&values, &[DType::F64; 2])?];
        let sink = pseudo_sink(&position, &ids(&tokens)?, 12, &ours[0], &ours[1])?;
        let wanted = dense::pseudo_sink(&position, &tokens, 12, [&truth[0], &truth[1]])?;
        let [outputs, gradients] = tolerance(dtype);
        assert_close("sink", &sink, &wanted, outputs);
        let losses = (weighed(&sink, &weight)?, weighed(&wanted, &weight)?);
        assert_gradients("sink", (&losses.0, &ours), (&losses.1, &truth), gradients);
    }
    Ok(())
}

#[test]
fn transposed_tensors_give_the_same_bits() -> Result<()> {
    let modality = ids(&Tensor::new(&TOKENS, &CPU)?)?;
    let mut rng = Rng::new(5);
    let plain = [0; 3].map(|_| random(&mut rng, &[2, 9, 2, 8], DType::F64).unwrap().transpose(1, 2).unwrap());
    let packed = [&plain[0], &plain[1], &plain[2]].map(|x| x.contiguous().unwrap());
    let run = |[q, k, v]: &[Tensor; 3]| modular_attention(q, k, v, &Attention::new(&modality));
    let difference = (run(&plain)? - run(&packed)?)?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert_eq!(difference.to_bits(), 0);
    Ok(())
}

fn module(config: ModaConfig, seed: u64) -> Result<(ModaAttention, VarMap)> {
    let variables = VarMap::new();
    let module = ModaAttention::fresh(config, &variables, "attention", (DType::F64, &CPU))?;
    let mut rng = Rng::new(seed);
    let known = variables.data().lock().unwrap();
    let mut names: Vec<_> = known.keys().cloned().collect();
    names.sort();
    for name in names {
        let var = &known[&name];
        var.set(&(var.as_tensor() + (random(&mut rng, var.dims(), DType::F64)? * 0.2)?)?)?;
    }
    drop(known);
    Ok((module, variables))
}

fn small(combine: Combine) -> ModaConfig {
    let mut config = ModaConfig::new(16, 4);
    (config.num_kv_heads, config.num_modalities, config.combine) = (2, M, combine);
    (config.span, config.base, config.rope_theta) = (Some(32), -1.0, Some(1e4));
    config
}

#[test]
fn the_module_begins_as_plain_attention() -> Result<()> {
    let mut config = small(Combine::Joint);
    config.span = None;
    let variables = VarMap::new();
    let module = ModaAttention::fresh(config.clone(), &variables, "attention", (DType::F64, &CPU))?;
    let text = ids(&Tensor::zeros((1, 7), DType::I64, &CPU)?)?;
    let mixed = ids(&Tensor::new(&[[0i64, 1, 1, 2, 0, 0, 1]], &CPU)?)?;
    let hidden = random(&mut Rng::new(2), &[1, 7, 16], DType::F64)?;
    let difference = (module.forward(&hidden, &text, None, None)? - module.forward(&hidden, &mixed, None, None)?)?;
    assert!(difference.abs()?.max_all()?.to_scalar::<f64>()? < 1e-14);
    Ok(())
}

#[test]
fn every_parameter_has_the_python_name_and_a_gradient() -> Result<()> {
    for combine in [Combine::Joint, Combine::Split] {
        let (module, variables) = module(small(combine), 4)?;
        let hidden = random(&mut Rng::new(3), &[2, 9, 16], DType::F64)?;
        let modality = ids(&Tensor::new(&TOKENS, &CPU)?)?;
        let gradients = module.forward(&hidden, &modality, None, None)?.sqr()?.sum_all()?.backward()?;
        let known = variables.data().lock().unwrap();
        let mut names: Vec<_> = known.keys().map(|name| name.strip_prefix("attention.").unwrap().to_owned()).collect();
        names.sort();
        let wanted = [
            "k_proj.weight",
            "moda.aligner.fuser.keep",
            "moda.aligner.fuser.mix",
            "moda.mask.base",
            "moda.mask.decay",
            "moda.prior.strength",
            "o_proj.weight",
            "q_proj.weight",
            "v_proj.weight",
        ];
        assert_eq!(names, wanted);
        for (name, var) in known.iter() {
            let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let size = gradient.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(size > 0.0 && size.is_finite(), "{name}: {size}");
        }
    }
    Ok(())
}

#[test]
fn the_module_repeats_what_the_python_one_computed() -> Result<()> {
    let mut tensors = candle_core::safetensors::load_buffer(include_bytes!("python_module.safetensors"), &CPU)?;
    let mut take = |name: &str| tensors.remove(name).unwrap_or_else(|| panic!("{name} is missing"));
    let [modality, context, hidden] = ["modality", "context", "hidden"].map(&mut take);
    let [out, mass] = ["out", "mass"].map(&mut take);
    let sources = context.ne(0i64)?.where_cond(&modality, &Tensor::full(-1i64, modality.dims(), &CPU)?)?;
    let weights = tensors.into_iter().map(|(name, weight)| (name.strip_prefix("weights.").unwrap().to_owned(), weight));
    let vb = VarBuilder::from_tensors(weights.collect(), DType::F64, &CPU);
    let module = ModaAttention::new(small(Combine::Joint), vb)?;
    let (got, got_mass) = module.forward_with_mass(&hidden, &ids(&modality)?, Some(&ids(&sources)?), None)?;
    // Its angles are float32.
    assert_close("output", &got, &out, 1e-6);
    assert_close("mass", &got_mass, &mass, 1e-6);
    Ok(())
}

#[test]
fn decoding_with_a_cache_equals_one_call_whose_basis_is_the_prompt() -> Result<()> {
    for combine in [Combine::Joint, Combine::Split] {
        let (module, _) = module(small(combine), 6)?;
        let hidden = random(&mut Rng::new(8), &[2, 9, 16], DType::F64)?;
        let tokens = Tensor::new(&TOKENS, &CPU)?;
        let prompt = 6;
        let sources = Tensor::cat(&[tokens.narrow(1, 0, prompt)?, Tensor::full(-1i64, (2, 3), &CPU)?], 1)?;
        let whole = module.forward(&hidden, &ids(&tokens)?, Some(&ids(&sources)?), None)?;
        let mut cache = ModaCache::default();
        let mut steps = Vec::new();
        for (first, count) in [(0, prompt), (6, 1), (7, 2)] {
            let new = ids(&tokens.narrow(1, first, count)?)?;
            steps.push(module.forward(&hidden.narrow(1, first, count)?, &new, None, Some(&mut cache))?);
        }
        assert_close("cached", &Tensor::cat(&steps, 1)?, &whole, 1e-12);
        // A basis that grows with the answer would be another computation.
        let leaking = module.forward(&hidden, &ids(&tokens)?, None, None)?;
        let leak = (leaking - whole)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(leak > 1e-3, "forgetting the prompt's basis changes nothing: {leak}");
    }
    Ok(())
}

#[test]
fn bad_input_is_an_error_that_says_what_was_wanted() -> Result<()> {
    let modality = ids(&Tensor::new(&[[0i64, 1, 0]], &CPU)?)?;
    let tensor = |shape: (usize, usize, usize, usize), dtype| Tensor::zeros(shape, dtype, &CPU);
    let good = tensor((1, 2, 3, 4), DType::F32)?;
    let fails = |q: &Tensor, k: &Tensor, v: &Tensor, words: &str| {
        let message = modular_attention(q, k, v, &Attention::new(&modality)).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    fails(&good, &tensor((1, 2, 3, 5), DType::F32)?, &tensor((1, 2, 3, 5), DType::F32)?, "key");
    fails(&good, &good.to_dtype(DType::F64)?, &good, "wanted the same for all");
    fails(&tensor((1, 3, 3, 4), DType::F32)?, &good, &good, "a multiple of Hkv = 2");
    fails(&tensor((1, 2, 4, 4), DType::F32)?, &good, &good, "give query_modality");
    let bytes = good.to_dtype(DType::U8)?;
    fails(&bytes, &bytes, &bytes, "wanted F32, BF16, F16 or F64");
    let message = ids(&Tensor::new(&[[0i64, -2]], &CPU)?).unwrap_err().to_string();
    assert!(message.contains("modality[0, 1] is -2"), "{message}");
    let (two, one) = (Tensor::zeros((1, 2, 2), DType::F32, &CPU)?, Tensor::zeros((1, 4, 4), DType::F32, &CPU)?);
    assert!(duplex_align(&good, &good, &two, &two, &Alignment::new(&modality)).is_err());
    let message = duplex_align(&good, &good, &one, &one, &Alignment::new(&modality)).unwrap_err().to_string();
    assert!(message.contains("ids below M = 1"), "{message}");
    Ok(())
}
