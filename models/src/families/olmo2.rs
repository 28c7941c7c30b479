//! OLMo 2: Llama with its norms after attention and MLP, and queries and keys normalised over all heads (arXiv 2501.00656).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{Biases, Decoder, Norms, QkNorm};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}));
    let mut decoder = Decoder::read(config)?;
    let attention = config.flag("attention_bias", false)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: false };
    decoder.norms = Norms::AFTER;
    decoder.qk_norm = QkNorm::Row;
    Ok(decoder.graph("olmo2"))
}
