//! Graphs of real models with seeded random weights, so that speed can be measured without a download.

mod files;
mod tokens;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use mainstay_models::config::Config;
use mainstay_models::graph::{Block, Graph, Op};
use mainstay_models::quant::seeded_blocks;
use mainstay_models::weights::{DType, MemoryTensor};
use mainstay_models::{LoadError, Weights, families};
use serde_json::{Value, json};

use crate::mix::Mix;
pub use files::WriteError;

/// A real model's dimensions, from its published configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Qwen3 0.6B: 28 layers, 16 heads over 8, tied embedding of 151936 rows.
    Qwen3Small,
    /// Llama 3.2 1B: 16 layers, 32 heads over 8, tied embedding of 128256 rows.
    Llama32Small,
    /// Llama 3.1 8B: 32 layers, 32 heads over 8, embedding and vocabulary product of 128256 rows each.
    Llama31Medium,
    /// gpt-oss 20B: 24 layers of 32 experts, of which a row has 4; every second layer sees 128 tokens.
    GptOssSmall,
}

impl Shape {
    /// All shapes.
    pub const ALL: [Shape; 4] =
        [Shape::Qwen3Small, Shape::Llama32Small, Shape::Llama31Medium, Shape::GptOssSmall];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Qwen3Small => "qwen3-0.6b",
            Shape::Llama32Small => "llama-3.2-1b",
            Shape::Llama31Medium => "llama-3.1-8b",
            Shape::GptOssSmall => "gpt-oss-20b",
        }
    }

    fn config(self) -> Value {
        match self {
            Shape::Qwen3Small => json!({
                "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
                "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
                "hidden_act": "silu", "tie_word_embeddings": true, "attention_bias": false
            }),
            Shape::Llama32Small => json!({
                "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
                "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192
                },
                "hidden_act": "silu", "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false
            }),
            Shape::Llama31Medium => json!({
                "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
                "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192
                },
                "hidden_act": "silu", "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false
            }),
            Shape::GptOssSmall => json!({
                "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
                "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201_088,
                "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
                "rope_scaling": {
                    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                    "original_max_position_embeddings": 4096
                },
                "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0,
                "hidden_act": "silu", "tie_word_embeddings": false, "attention_bias": true
            }),
        }
    }

    fn graph(self) -> Result<Graph, LoadError> {
        let origin = Path::new(self.name());
        families::graph(&Config::from_bytes(origin, self.config().to_string().as_bytes())?)
    }

    /// The graph with seeded weights of the wanted types.
    ///
    /// # Errors
    /// What the family or the weights' reader finds wrong; a shape that does not load is a bug.
    pub fn build(self, mix: Mix) -> Result<(Graph, Weights), LoadError> {
        let origin = Path::new(self.name());
        let graph = self.graph()?;
        let weights = Weights::from_tensors(origin, checkpoint(&graph, mix))?;
        graph.check(&weights)?;
        Ok((graph, weights))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no shape has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownShape(String);

impl fmt::Display for UnknownShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known: Vec<&str> = Shape::ALL.iter().map(|s| s.name()).collect();
        write!(f, "expected one of {}, found `{}`", known.join(", "), self.0)
    }
}

impl std::error::Error for UnknownShape {}

impl FromStr for Shape {
    type Err = UnknownShape;

    fn from_str(text: &str) -> Result<Self, UnknownShape> {
        Shape::ALL.into_iter().find(|s| s.name() == text).ok_or_else(|| UnknownShape(text.to_owned()))
    }
}

/// Every tensor that the graph names: random matrices, vectors of ones.
pub(crate) fn checkpoint(graph: &Graph, mix: Mix) -> impl Iterator<Item = MemoryTensor> {
    let mut random = Random(1);
    let layers = graph.layers.len();
    tensors(graph).into_iter().map(move |(name, shape)| {
        let dtype = mix.of(&name, &shape, layers);
        let mut bytes = Vec::new();
        match shape[..] {
            [rows, cols] if dtype.format().is_some() => {
                seeded_blocks((dtype, WEIGHT_MAX), (rows, cols), || random.next(), &mut bytes);
            }
            [rows, cols] => (0..rows * cols).for_each(|_| push(&mut bytes, random.weight(), dtype)),
            _ => (0..shape.iter().product()).for_each(|_| push(&mut bytes, 1.0, dtype)),
        }
        MemoryTensor { name, dtype, shape, bytes }
    })
}

fn push(bytes: &mut Vec<u8>, value: f32, dtype: DType) {
    match dtype {
        DType::F16 => bytes.extend_from_slice(&half::f16::from_f32(value).to_le_bytes()),
        DType::BF16 => bytes.extend_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
        _ => bytes.extend_from_slice(&value.to_le_bytes()),
    }
}

/// Names and shapes of the graph's tensors, each once, in the order of the program.
pub(crate) fn tensors(graph: &Graph) -> Vec<(String, Vec<usize>)> {
    let mut found = Vec::new();
    collect(&graph.prologue, "", &mut found);
    for layer in &graph.layers {
        collect(&graph.blocks[layer.block], &layer.prefix, &mut found);
    }
    collect(&graph.epilogue, "", &mut found);
    if let Some(pooled) = &graph.pooled {
        collect(&pooled.block, "", &mut found);
    }
    let mut seen = std::collections::HashSet::new();
    found.retain(|(name, _)| seen.insert(name.clone()));
    found
}

fn collect(block: &Block, prefix: &str, found: &mut Vec<(String, Vec<usize>)>) {
    for op in &block.ops {
        let (matrix, vectors) = match op {
            Op::Embed { weight, .. } => (Some(weight), [None, None]),
            Op::Linear { weight, bias, .. } => (Some(weight), [bias.as_ref(), None]),
            Op::RmsNorm { weight, .. } => (None, [Some(weight), None]),
            Op::LayerNorm { weight, bias, .. } => (None, [Some(weight), Some(bias)]),
            Op::Attend(a) => (None, [a.sinks.as_ref(), None]),
            Op::AttendLatent(a) => (Some(&a.expand), [None, None]),
            Op::Experts(e) => (None, [e.routing.bias.as_ref(), None]),
            _ => (None, [None, None]),
        };
        let experts = if let Op::Experts(e) = op { &e.experts[..] } else { &[] };
        let inner = experts.iter().flat_map(|expert| [&expert.up, &expert.down]);
        for matrix in matrix.into_iter().chain(inner) {
            found.extend(
                matrix.parts.iter().map(|(n, rows)| (format!("{prefix}{n}"), vec![*rows, matrix.cols])),
            );
        }
        let inner = experts.iter().flat_map(|expert| [expert.up_bias.as_ref(), expert.down_bias.as_ref()]);
        for vector in vectors.into_iter().chain(inner).flatten() {
            found.extend(vector.parts.iter().map(|(n, len)| (format!("{prefix}{n}"), vec![*len])));
        }
    }
}

/// Uniform numbers up to it have the spread of a normal distribution of deviation 0.02.
const WEIGHT_MAX: f32 = 0.035;

/// xorshift64* (Vigna, 2016): speed depends on the values' range only, not on their distribution.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform between -[`WEIGHT_MAX`] and it.
    pub(crate) fn weight(&mut self) -> f32 {
        let unit = (self.next() >> 40) as f32 / (1u64 << 24) as f32;
        (unit - 0.5) * 2.0 * WEIGHT_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for shape in Shape::ALL {
            assert_eq!(shape.name().parse(), Ok(shape));
        }
        let message = "gpt-5".parse::<Shape>().unwrap_err().to_string();
        assert!(message.contains("qwen3-0.6b") && message.contains("gpt-5"), "{message}");
    }

    #[test]
    fn parameters_are_those_of_the_real_models() {
        let published = [596, 1235, 8030, 20_914];
        for (shape, millions) in Shape::ALL.into_iter().zip(published) {
            let graph = shape.graph().unwrap();
            let count: usize = tensors(&graph).iter().map(|(_, s)| s.iter().product::<usize>()).sum();
            assert_eq!(count / 1_000_000, millions, "{shape}");
        }
    }

    #[test]
    fn a_checkpoint_of_a_small_graph_loads() {
        let dense = json!({
            "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": false
        });
        let experts = json!({
            "model_type": "gpt_oss", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 50,
            "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
            "rope_scaling": Value::Null
        });
        for config in [dense, experts] {
            let config = Config::from_bytes(Path::new("small"), config.to_string().as_bytes()).unwrap();
            let graph = families::graph(&config).unwrap();
            let floats = [DType::F32, DType::F16, DType::BF16].map(Mix::Float);
            for mix in floats.into_iter().chain([Mix::Q8_0, Mix::Q4_0, Mix::Q4KM, Mix::Mxfp4]) {
                let weights = Weights::from_tensors(Path::new("small"), checkpoint(&graph, mix)).unwrap();
                graph.check(&weights).unwrap();
            }
        }
    }
}
