//! The families: each a function from a configuration to a graph, found by `model_type`.

mod bert;
mod decoder;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod rope;

use crate::LoadError;
use crate::config::Config;
use crate::graph::Graph;

/// What builds a family's graph.
type Build = fn(&Config) -> Result<Graph, LoadError>;

/// Every family, by the `model_type` of its checkpoints.
const FAMILIES: [(&str, Build); 5] = [
    ("bert", bert::graph),
    ("llama", llama::graph),
    ("mistral", mistral::graph),
    ("qwen2", qwen2::graph),
    ("qwen3", qwen3::graph),
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
        known: FAMILIES.map(|(name, _)| name).join(", "),
    })?;
    if let Some(quantization) = config.object("quantization_config")? {
        return Err(quantization.wrong("quant_method", "no quantization (weights in F32, F16 or BF16)"));
    }
    build(config)
}
