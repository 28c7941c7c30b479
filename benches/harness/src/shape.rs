//! Graphs of real models with seeded random weights, so that speed can be measured without a download.

mod files;
mod tokens;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use mainstay_models::config::Config;
use mainstay_models::graph::Graph;
use mainstay_models::quant::seeded_blocks;
use mainstay_models::weights::{DType, MemoryTensor};
use mainstay_models::{LoadError, Weights, families};

use crate::mix::Mix;
pub use files::WriteError;

/// A real model's dimensions, from its published configuration, without what no op sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    name: &'static str,
    /// config.json
    config: &'static str,
}

/// All shapes: one or two for each family that generates.
pub const SHAPES: [Shape; 13] = [
    shape("qwen3-0.6b", include_str!("../shapes/qwen3-0.6b.json")),
    shape("llama-3.2-1b", include_str!("../shapes/llama-3.2-1b.json")),
    shape("mistral-7b", include_str!("../shapes/mistral-7b.json")),
    shape("qwen2.5-1.5b", include_str!("../shapes/qwen2.5-1.5b.json")),
    shape("gemma-2-2b", include_str!("../shapes/gemma-2-2b.json")),
    shape("gemma-3-4b", include_str!("../shapes/gemma-3-4b.json")),
    shape("phi-3-mini", include_str!("../shapes/phi-3-mini.json")),
    shape("olmo-2-1b", include_str!("../shapes/olmo-2-1b.json")),
    shape("smollm3-3b", include_str!("../shapes/smollm3-3b.json")),
    shape("qwen3-30b-a3b", include_str!("../shapes/qwen3-30b-a3b.json")),
    shape("gpt-oss-20b", include_str!("../shapes/gpt-oss-20b.json")),
    shape("moonlight-16b-a3b", include_str!("../shapes/moonlight-16b-a3b.json")),
    shape("llama-3.1-8b", include_str!("../shapes/llama-3.1-8b.json")),
];

const fn shape(name: &'static str, config: &'static str) -> Shape {
    Shape { name, config }
}

impl Shape {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The program of all layers, or of the first few.
    fn graph(self, layers: Option<usize>) -> Result<Graph, LoadError> {
        let origin = Path::new(self.name);
        let mut graph = families::graph(&Config::from_bytes(origin, self.config.as_bytes())?)?;
        let layers = layers.unwrap_or(usize::MAX).min(graph.layers.len());
        graph.layers.truncate(layers);
        graph.kv.truncate(layers);
        Ok(graph)
    }

    /// The graph, of the first `layers` layers only where they are given, with seeded weights of the wanted types.
    ///
    /// # Errors
    /// What the family or the weights' reader finds wrong; a shape that does not load is a bug.
    pub fn build(self, mix: Mix, layers: Option<usize>) -> Result<(Graph, Weights), LoadError> {
        let graph = self.graph(layers)?;
        let weights = Weights::from_tensors(Path::new(self.name), checkpoint(&graph, mix))?;
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
        let known: Vec<&str> = SHAPES.iter().map(|s| s.name()).collect();
        write!(f, "expected one of {}, found `{}`", known.join(", "), self.0)
    }
}

impl std::error::Error for UnknownShape {}

impl FromStr for Shape {
    type Err = UnknownShape;

    fn from_str(text: &str) -> Result<Self, UnknownShape> {
        SHAPES.into_iter().find(|s| s.name() == text).ok_or_else(|| UnknownShape(text.to_owned()))
    }
}

/// Every tensor that the graph names: random matrices, vectors of ones.
pub(crate) fn checkpoint(graph: &Graph, mix: Mix) -> impl Iterator<Item = MemoryTensor> {
    let mut random = Random(1);
    let layers = graph.layers.len();
    graph.tensors().into_iter().map(move |(name, shape)| {
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
    use serde_json::json;

    use super::*;
    use crate::mix::MIXES;

    #[test]
    fn names_are_read_back() {
        for shape in SHAPES {
            assert_eq!(shape.name().parse(), Ok(shape));
        }
        let message = "gpt-5".parse::<Shape>().unwrap_err().to_string();
        assert!(message.contains("qwen3-0.6b") && message.contains("gpt-5"), "{message}");
    }

    #[test]
    fn parameters_are_those_of_the_real_models() {
        let millions = |shape: Shape| {
            let tensors = shape.graph(None).unwrap().tensors();
            tensors.iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>() / 1_000_000
        };
        let found = SHAPES.map(millions);
        let expected = [596, 1235, 7248, 1543, 2614, 3880, 3821, 1484, 3075, 30_532, 20_914, 15_960, 8030];
        assert_eq!(found, expected);
    }

    #[test]
    fn the_first_layers_can_stand_for_all() {
        let few = SHAPES[0].graph(Some(3)).unwrap();
        assert_eq!((few.layers.len(), few.kv.len()), (3, 3));
        assert_eq!(SHAPES[0].graph(Some(100)).unwrap().layers.len(), 28);
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
            "rope_scaling": null
        });
        for config in [dense, experts] {
            let config = Config::from_bytes(Path::new("small"), config.to_string().as_bytes()).unwrap();
            let graph = families::graph(&config).unwrap();
            for mix in MIXES {
                let weights = Weights::from_tensors(Path::new("small"), checkpoint(&graph, mix)).unwrap();
                graph.check(&weights).unwrap();
            }
        }
    }
}
