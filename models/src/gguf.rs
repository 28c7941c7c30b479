//! GGUF files: a checkpoint in one file or several numbered ones, with its configuration and tokenizer as metadata.

mod config;
mod metadata;
mod mix;
pub(crate) mod names;
pub(crate) mod pre;
pub(crate) mod read;
mod tokens;
mod write;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::LoadError;
use crate::graph::PoolKind;
use crate::weights::Weights;

pub(crate) use metadata::Metadata;
pub use mix::{MIXES, Mix};
pub use write::{Plan, Planned};

/// More parts than any checkpoint has.
const PARTS_MAX: u64 = 10_000;

/// A checkpoint, as the files of a Hugging Face directory would say it.
pub(crate) struct Checkpoint {
    pub(crate) weights: Weights,
    pub(crate) config: Vec<u8>,
    pub(crate) tokenizer: Vec<u8>,
    pub(crate) tokenizer_config: Vec<u8>,
    pub(crate) generation: Vec<u8>,
    pub(crate) pooling: Option<PoolKind>,
}

/// Opens a file, and the others that it is the first of.
///
/// # Errors
/// [`LoadError`], naming the file and the metadata or tensor at fault.
pub(crate) fn open(path: &Path) -> Result<Checkpoint, LoadError> {
    let mut weights = Weights::none(path);
    let metadata = weights.add_gguf(path)?;
    for part in parts(path, &metadata)? {
        weights.add_gguf(&part)?;
    }
    checkpoint(weights, &metadata)
}

/// As [`open`], for a file that lies in memory; `origin` stands for its path in messages.
///
/// # Errors
/// As [`open`].
pub(crate) fn from_bytes(origin: &Path, bytes: Vec<u8>) -> Result<Checkpoint, LoadError> {
    let mut weights = Weights::none(origin);
    let metadata = weights.add_gguf_bytes(origin, bytes)?;
    checkpoint(weights, &metadata)
}

/// The `tokenizer.json` of a file, which need not hold a model.
///
/// # Errors
/// As [`open`].
pub(crate) fn tokenizer(path: &Path) -> Result<Vec<u8>, LoadError> {
    let metadata = Weights::none(path).add_gguf(path)?;
    Ok(tokens::read(&metadata)?.tokenizer.to_string().into_bytes())
}

/// The other files of a checkpoint in several: `NAME-00001-of-00003.gguf` and so on.
fn parts(path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>, LoadError> {
    let count = metadata.count("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(Vec::new());
    }
    if count > PARTS_MAX {
        return Err(metadata.wrong("split.count", &format!("at most {PARTS_MAX}")));
    }
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let suffix = format!("-00001-of-{count:05}.gguf");
    let first = metadata.count("split.no")?.unwrap_or(0) == 0;
    let Some(stem) = name.strip_suffix(&suffix).filter(|_| first) else {
        let what = format!("expected the first of {count} parts, its name ending in `{suffix}`");
        return Err(LoadError::format(path, what));
    };
    let part = |no| path.with_file_name(format!("{stem}-{no:05}-of-{count:05}.gguf"));
    Ok((2..=count).map(part).collect())
}

fn checkpoint(mut weights: Weights, metadata: &Metadata) -> Result<Checkpoint, LoadError> {
    const ARCHITECTURE: &str = "general.architecture";
    let architecture = metadata.text(ARCHITECTURE)?.ok_or_else(|| metadata.wrong(ARCHITECTURE, "a text"))?;
    let config = config::read(metadata, &weights, architecture)?;
    names::define(&mut weights, metadata, architecture)?;
    let tokens = tokens::read(metadata)?;
    let mut tokens_config = tokens.config;
    tokens_config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
    let pooling = match metadata.count(&format!("{architecture}.pooling_type"))? {
        Some(1) => Some(PoolKind::Mean),
        Some(2) => Some(PoolKind::First),
        Some(3) => Some(PoolKind::Last),
        _ => None,
    };
    Ok(Checkpoint {
        weights,
        config: Value::Object(config).to_string().into_bytes(),
        tokenizer: tokens.tokenizer.to_string().into_bytes(),
        tokenizer_config: Value::Object(tokens_config).to_string().into_bytes(),
        generation: json!({"eos_token_id": tokens.ends}).to_string().into_bytes(),
        pooling,
    })
}
