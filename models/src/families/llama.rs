//! Llama 1 to 3 and the many checkpoints that share its layout (arXiv 2302.13971, 2407.21783).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{Biases, Decoder};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({"max_position_embeddings": 2048}));
    let mut decoder = Decoder::read(config)?;
    let attention = config.flag("attention_bias", false)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: config.flag("mlp_bias", false)? };
    Ok(decoder.graph("llama"))
}
