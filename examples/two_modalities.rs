//! Trains a tiny two-modality model with candle and prints the loss and where attention goes.
//!
//! An "image" is four patches, each a noisy vector of one of four colours; the "text" is one token that asks for the
//! colour of one of the patches. The answer is only in the image, so the text has to look there.
//!
//! `cargo run --release --features candle --example two_modalities`

use candle_core::{D, DType, Device, IndexOp, Result, Tensor};
use candle_nn::{
    AdamW, Embedding, Linear, Module, Optimizer, VarBuilder, VarMap, embedding, linear, loss::cross_entropy,
};
use moda_attn::candle::{ModaAttention, ModaConfig, ids};
use moda_attn::ids::Ids;

const CPU: Device = Device::Cpu;
const COLOURS: usize = 4;
const PATCHES: usize = 4;
const PATCH_DIM: usize = 8;
const EMBED_DIM: usize = 32;
const LAYERS: usize = 2;
const BATCH: usize = 64;
const STEPS: usize = 300;

struct Model {
    patches: Linear,
    places: Embedding,
    questions: Embedding,
    attentions: Vec<ModaAttention>,
    head: Linear,
}

impl Model {
    fn new(variables: &VarMap) -> Result<Self> {
        let vb = VarBuilder::from_varmap(variables, DType::F32, &CPU);
        let mut config = ModaConfig::new(EMBED_DIM, 4);
        config.span = Some(64);
        let attention = |layer| {
            ModaAttention::fresh(config.clone(), variables, &format!("layers.{layer}.attention"), (DType::F32, &CPU))
        };
        Ok(Self {
            patches: linear(PATCH_DIM, EMBED_DIM, vb.pp("patches"))?,
            places: embedding(PATCHES, EMBED_DIM, vb.pp("places"))?,
            questions: embedding(PATCHES, EMBED_DIM, vb.pp("questions"))?,
            attentions: (0..LAYERS).map(attention).collect::<Result<_>>()?,
            head: linear(EMBED_DIM, COLOURS, vb.pp("head"))?,
        })
    }

    /// Logits (B, colours), and for every layer the mean mass of the question's row: self, cross, pseudo.
    fn forward(&self, batch: &Batch, modality: &Ids) -> Result<(Tensor, Vec<Vec<f32>>)> {
        let places = self.places.forward(&Tensor::arange(0, PATCHES as u32, &CPU)?)?;
        let image = self.patches.forward(&batch.image)?.broadcast_add(&places)?;
        let text = self.questions.forward(&batch.question)?.unsqueeze(1)?;
        let mut hidden = Tensor::cat(&[image, text], 1)?;
        let mut balance = Vec::new();
        for attention in &self.attentions {
            let (out, mass) = attention.forward_with_mass(&hidden, modality, None, None)?;
            hidden = (hidden + out)?;
            balance.push(mass.i((.., .., PATCHES))?.mean((0, 1))?.to_vec1()?);
        }
        Ok((self.head.forward(&hidden.i((.., PATCHES))?)?, balance))
    }
}

struct Batch {
    image: Tensor,
    question: Tensor,
    answer: Tensor,
}

/// Random colours on the patches, and a question about one of them.
fn batch(colours: &Tensor) -> Result<Batch> {
    let pick =
        |high: usize, shape: &[usize]| Tensor::rand(0f32, high as f32, shape, &CPU)?.floor()?.to_dtype(DType::U32);
    let painted = pick(COLOURS, &[BATCH, PATCHES])?;
    let question = pick(PATCHES, &[BATCH])?;
    let clean = colours.index_select(&painted.flatten_all()?, 0)?.reshape((BATCH, PATCHES, PATCH_DIM))?;
    let image = (&clean + (clean.randn_like(0., 1.)? * 0.1)?)?;
    let answer = painted.gather(&question.unsqueeze(1)?, 1)?.squeeze(1)?;
    Ok(Batch { image, question, answer })
}

fn main() -> Result<()> {
    let colours = Tensor::randn(0f32, 1., (COLOURS, PATCH_DIM), &CPU)?;
    let variables = VarMap::new();
    let model = Model::new(&variables)?;
    let mut optimizer = AdamW::new_lr(variables.all_vars(), 3e-3)?;
    let mut row = vec![1i64; PATCHES];
    row.push(0);
    let modality = ids(&Tensor::new(row, &CPU)?.expand((BATCH, PATCHES + 1))?)?;
    println!("step   loss  right   question's mass on self / cross / pseudo, a layer each");
    for step in 0..=STEPS {
        let batch = batch(&colours)?;
        let (logits, balance) = model.forward(&batch, &modality)?;
        let loss = cross_entropy(&logits, &batch.answer)?;
        optimizer.backward_step(&loss)?;
        if step % 50 == 0 {
            let right = logits.argmax(D::Minus1)?.eq(&batch.answer)?.to_dtype(DType::F32)?.mean_all()?;
            let layers: Vec<String> =
                balance.iter().map(|m| format!("{:.2} / {:.2} / {:.2}", m[0], m[1], m[2])).collect();
            let [loss, right] = [loss, right].map(|x| x.to_scalar::<f32>());
            println!("{step:4}  {:.3}  {:4.0} %   {}", loss?, 100.0 * right?, layers.join("    "));
        }
    }
    Ok(())
}
