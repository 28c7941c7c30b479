//! Qwen 2 and 2.5: Llama with biases on q, k, v, and windows in the upper layers where asked for (arXiv 2407.10671).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Biases, Decoder};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({"max_position_embeddings": 32_768}));
    let mut decoder = Decoder::read(config)?;
    decoder.biases = Biases { qkv: true, out: false, mlp: false };
    decoder.set_windows(decoder::qwen_windows(config, decoder.layers.len())?);
    Ok(decoder.graph("qwen2"))
}
