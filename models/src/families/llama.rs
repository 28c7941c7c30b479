//! Llama 1 to 3 and the many checkpoints that share its layout (arXiv 2302.13971, 2407.21783).

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{Biases, Decoder, Defaults};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let mut decoder = Decoder::read(config, &Defaults { context: 2048, head_dim: None })?;
    let attention = config.flag("attention_bias", false)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: config.flag("mlp_bias", false)? };
    Ok(decoder.graph("llama"))
}
