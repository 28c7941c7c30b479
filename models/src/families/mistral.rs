//! Mistral: Llama with a sliding window in every layer (arXiv 2310.06825).

use std::iter::repeat;

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Decoder};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    // An absent window means the first release's, `null` means none.
    let config = &config.or(json!({"max_position_embeddings": 131_072, "sliding_window": 4096}));
    let mut decoder = Decoder::read(config)?;
    decoder.set_windows(repeat(decoder::window(config)?));
    Ok(decoder.graph("mistral"))
}
