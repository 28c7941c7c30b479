//! Qwen 3, dense: Llama with queries and keys normalised per head before RoPE (arXiv 2505.09388).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Biases, Decoder, QkNorm};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({"max_position_embeddings": 32_768, "head_dim": 128}));
    let mut decoder = Decoder::read(config)?;
    let attention = config.flag("attention_bias", false)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: false };
    decoder.qk_norm = QkNorm::Head;
    decoder.set_windows(decoder::qwen_windows(config, decoder.layers.len())?);
    Ok(decoder.graph("qwen3"))
}
