//! candle-transformers for compare.py: runs a cell for each line on stdin and answers with a line of JSON.
//!
//! Qwen3 shapes from GGUF files. Its model computes one stream on a processor and cannot take tokens away again, so a run
//! at a depth begins with computing what lies before, which is not timed.

use std::fs::File;
use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_qwen3::ModelWeights;
use serde_json::{Value, json};

/// Tokens of one call.
const BATCH: usize = 512;

struct Peer {
    model: ModelWeights,
    vocab: u32,
    prompt: usize,
    steps: usize,
    state: u64,
}

impl Peer {
    /// Computes made-up tokens behind `at` others.
    fn forward(&mut self, at: usize, count: usize) -> Result<()> {
        let tokens: Vec<u32> = (0..count).map(|_| self.token()).collect();
        let input = Tensor::from_vec(tokens, (1, count), &Device::Cpu)?;
        self.model.forward(&input, at)?;
        Ok(())
    }

    fn token(&mut self) -> u32 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as u32 % self.vocab
    }

    fn run(&mut self, cell: &str) -> Result<Value> {
        let (phase, rest) = cell.split_once('@').context("a cell")?;
        let (depth, streams) = rest.split_once('x').unwrap_or((rest, "1"));
        let (depth, streams): (usize, usize) = (depth.parse()?, streams.parse()?);
        if streams != 1 {
            return Ok(json!({"error": "one stream only"}));
        }
        self.model.clear_kv_cache();
        for at in (0..depth).step_by(BATCH) {
            self.forward(at, BATCH.min(depth - at))?;
        }
        let begun = Instant::now();
        let count = if phase == "prefill" {
            self.forward(depth, self.prompt)?;
            self.prompt
        } else {
            for step in 0..self.steps {
                self.forward(depth + step, 1)?;
            }
            self.steps
        };
        Ok(json!({"tokens_per_s": count as f64 / begun.elapsed().as_secs_f64()}))
    }
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| {
        let at = words.iter().position(|word| word == name).with_context(|| format!("{name} is missing"))?;
        words.get(at + 1).with_context(|| format!("{name} needs a value"))
    };
    let threads: usize = option("--threads")?.parse()?;
    let model = words.first().context("a GGUF file is missing")?;
    let mut file = File::open(model).with_context(|| model.clone())?;
    let content = Content::read(&mut file)?;
    let architecture = content.metadata.get("general.architecture").and_then(|value| value.to_string().ok());
    if architecture.map(String::as_str) != Some("qwen3") {
        bail!("{model}: expected the architecture qwen3, found {architecture:?}");
    }
    let vocab = content.tensor_infos.get("token_embd.weight").context("token_embd.weight")?.shape.dims()[0];
    let mut peer = Peer {
        model: ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?,
        vocab: u32::try_from(vocab)?,
        prompt: option("--prompt")?.parse()?,
        steps: option("--gen")?.parse()?,
        state: 7,
    };
    let mut out = std::io::stdout();
    writeln!(out, "{}", json!({"version": "candle-transformers 0.11.1", "threads": threads, "kv_type": "f32"}))?;
    for line in std::io::stdin().lock().lines() {
        writeln!(out, "{}", peer.run(line?.trim())?)?;
    }
    Ok(())
}
