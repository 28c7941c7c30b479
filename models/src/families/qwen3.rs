//! Qwen 3, dense: Llama with queries and keys normalised per head before RoPE (arXiv 2505.09388).

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Biases, Decoder, Defaults, HeadNorm};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let mut decoder = Decoder::read(config, &Defaults { context: 32_768, head_dim: Some(128) })?;
    let attention = config.flag("attention_bias", false)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: false };
    decoder.head_norm = HeadNorm::RmsNorm;
    decoder.windows = decoder::layer_windows(config, decoder.windows.len())?;
    Ok(decoder.graph("qwen3"))
}
