//! Qwen 2 and 2.5: Llama with biases on q, k, v, and windows in the upper layers where asked for (arXiv 2407.10671).

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Biases, Decoder, Defaults};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let mut decoder = Decoder::read(config, &Defaults { context: 32_768, head_dim: None })?;
    decoder.biases = Biases { qkv: true, out: false, mlp: false };
    decoder.windows = decoder::layer_windows(config, decoder.windows.len())?;
    Ok(decoder.graph("qwen2"))
}
