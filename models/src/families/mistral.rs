//! Mistral: Llama with a sliding window in every layer (arXiv 2310.06825).

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Decoder, Defaults};
use crate::graph::Graph;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let mut decoder = Decoder::read(config, &Defaults { context: 131_072, head_dim: None })?;
    // Absent means the first release's 4096, `null` means none.
    let window = if config.mentions("sliding_window") { decoder::window(config)? } else { Some(4096) };
    decoder.windows.fill(window);
    Ok(decoder.graph("mistral"))
}
