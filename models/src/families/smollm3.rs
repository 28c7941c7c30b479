//! SmolLM 3: Llama whose every fourth layer knows no positions (arXiv 2501.18795).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Biases, Decoder, LAYERS_MAX};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({
        "max_position_embeddings": 32_768,
        "rope_theta": 2e6,
        "tie_word_embeddings": true,
        "no_rope_layer_interval": 4,
    }));
    let mut decoder = Decoder::read(config)?;
    let attention = config.flag("attention_bias", false)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: config.flag("mlp_bias", false)? };
    let rotated = rotated(config, decoder.layers.len())?;
    let window = if config.flag("use_sliding_window", false)? { decoder::window(config)? } else { None };
    decoder.set_windows(decoder::layer_windows(config, rotated.len(), window, |layer| !rotated[layer])?);
    for (layer, rotated) in decoder.layers.iter_mut().zip(rotated) {
        layer.rope = layer.rope.take().filter(|_| rotated);
    }
    Ok(decoder.graph("smollm3"))
}

/// Which layers have RoPE: `no_rope_layers` holds 1 for those (its name notwithstanding), 0 for the others.
fn rotated(config: &Config, layers: usize) -> Result<Vec<bool>, LoadError> {
    let Some(flags) = config.get("no_rope_layers") else {
        let interval = config.required("no_rope_layer_interval", 1..=LAYERS_MAX)?;
        return Ok((1..=layers).map(|layer| layer % interval != 0).collect());
    };
    let flags = flags.as_array().filter(|flags| flags.len() == layers);
    let read = |flag: &serde_json::Value| match flag.as_u64() {
        Some(0) => Some(false),
        Some(1) => Some(true),
        _ => None,
    };
    let read = flags.and_then(|flags| flags.iter().map(read).collect());
    read.ok_or_else(|| config.wrong("no_rope_layers", &format!("{layers} numbers, each 0 or 1")))
}
