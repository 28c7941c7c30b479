//! The smaller model that guesses what a larger one draws.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use mainstay_backend_api::{Backend, Executor, Limits};
use mainstay_models::Model;
use mainstay_models::tokenizer::Tokenizer;

use crate::exit::Usage;
use crate::options::{DraftChoice, EngineArgs};
use crate::start;

/// Its keys and values take this part of what the larger model's do.
pub(crate) const KV_SHARE: u64 = 8;

/// What has to be there so that so much is left to the larger model.
pub(crate) fn with_share(kv_bytes: u64) -> u64 {
    kv_bytes.saturating_add(kv_bytes / (KV_SHARE - 1) + 1)
}

/// Opens the smaller model, if one was named.
///
/// # Errors
/// [`Usage`] for one that cannot guess; otherwise what the loader says.
pub(crate) fn open(model: &Model, args: &EngineArgs) -> Result<Option<Model>> {
    let Some(path) = &args.draft_model else { return Ok(None) };
    let named = || format!("--draft-model {}", path.display());
    if args.draft == DraftChoice::Off {
        return Err(Usage(format!("{}: nothing is guessed with --draft off", named())).into());
    }
    let draft = Model::open(path).with_context(named)?;
    check(model, &draft, path)?;
    Ok(Some(draft))
}

/// A guess is a token id: ids must mean the same to both.
fn check(model: &Model, draft: &Model, path: &Path) -> Result<(), Usage> {
    let wrong = |what: String| Err(Usage(format!("--draft-model {}: {what}", path.display())));
    if !draft.graph.generates() || draft.graph.is_whole() {
        return wrong("expected a model that generates text, found another".to_owned());
    }
    if draft.hashes.tokenizer == model.hashes.tokenizer {
        return Ok(());
    }
    let (own, other) = (&model.tokenizer, &draft.tokenizer);
    let (expected, found) = (own.vocab_len(), other.vocab_len());
    if expected != found {
        return wrong(format!("expected the {expected} tokens of `{}`, found {found}", model.name));
    }
    let text = |of: &Tokenizer, id| of.token_bytes(id);
    match (0..expected as u32).find(|&id| text(own, id) != text(other, id)) {
        None => Ok(()),
        Some(id) => wrong(format!("expected the vocabulary of `{}`, found another token {id}", model.name)),
    }
}

/// Loads it with limits of its own.
///
/// # Errors
/// [`Usage`] where its part of the memory holds no sequence; otherwise what the backend says.
pub(crate) fn load(
    draft: &Model,
    backend: &dyn Backend,
    args: &EngineArgs,
    kv_bytes: u64,
) -> Result<(Box<dyn Executor>, Limits)> {
    let args = EngineArgs { context: None, ..args.clone() };
    let kv_dtype = start::kv_dtype(args.kv_type, &draft.weights);
    let limits = start::limits(&draft.graph, kv_dtype, kv_bytes, &args)
        .map_err(|usage| anyhow!(usage).context("--draft-model"))?;
    let executor = backend.load(&draft.graph, &draft.weights, &limits).context("--draft-model")?;
    Ok((executor, limits))
}
