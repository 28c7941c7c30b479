//! Phi 3 and 4, the dense ones: Llama with stacked products, and LongRoPE for long contexts (arXiv 2404.14219).

use std::iter::repeat;

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Decoder, Stacking};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }));
    let mut decoder = Decoder::read(config)?;
    decoder.stacking = Stacking::Stacked;
    decoder.set_windows(repeat(decoder::window(config)?));
    Ok(decoder.graph("phi3"))
}
