//! The families: each a function from a configuration to a graph, found by `model_type`.

mod bert;
mod decoder;
mod deepseek;
mod gemma;
mod gpt_oss;
mod llama;
mod mistral;
mod mixture;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod rope;
mod smollm3;

use crate::LoadError;
use crate::config::Config;
use crate::graph::Graph;

/// What builds a family's graph.
type Build = fn(&Config) -> Result<Graph, LoadError>;

/// Every family, by the `model_type` of its checkpoints.
const FAMILIES: &[(&str, Build)] = &[
    ("bert", bert::graph),
    ("deepseek_v3", deepseek::v3),
    ("gemma2", gemma::gemma2),
    ("gemma3", gemma::gemma3_with_text),
    ("gemma3_text", gemma::gemma3_text),
    ("gpt_oss", gpt_oss::graph),
    ("llama", llama::graph),
    ("mistral", mistral::graph),
    ("olmo2", olmo2::graph),
    ("phi3", phi3::graph),
    ("qwen2", qwen2::graph),
    ("qwen3", qwen3::graph),
    ("qwen3_moe", qwen3_moe::graph),
    ("smollm3", smollm3::graph),
];

/// The graph of a checkpoint.
///
/// # Errors
/// [`LoadError::UnknownFamily`], or [`LoadError::Format`] where the configuration asks for what its family cannot
/// be or what is not supported.
pub fn graph(config: &Config) -> Result<Graph, LoadError> {
    let found = config.text("model_type")?.unwrap_or_default();
    let family = FAMILIES.iter().find(|(name, _)| *name == found);
    let (_, build) = family.ok_or_else(|| LoadError::UnknownFamily {
        path: config.path().to_owned(),
        found: found.to_owned(),
        known: FAMILIES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
    })?;
    build(config)
}
