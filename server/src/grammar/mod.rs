//! Holds answers to a JSON schema, a regular expression, some choices or a grammar: from the client's words to the masks
//! that the engine asks for.

mod compile;
mod masker;
mod source;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::sync::Semaphore;

pub(crate) use masker::Compiled;
pub(crate) use source::{Constraint, Wanted};

use crate::error::ApiError;
use crate::registry::Model;
use vocabulary::Vocabulary;

/// Compiled constraints that a model keeps.
const KEPT_MAX: usize = 64;
/// Constraints that are compiled at once: a costly one must leave a core to others.
const COMPILING_MAX: usize = 2;
/// How long a client waits for its constraint to be compiled.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// What a model needs to compile constraints, and those it has compiled.
pub(crate) struct Grammars {
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
    /// The latest last.
    kept: Mutex<VecDeque<Arc<Compiled>>>,
    compiling: Arc<Semaphore>,
}

impl Default for Grammars {
    fn default() -> Self {
        Self {
            vocabulary: OnceLock::new(),
            kept: Mutex::default(),
            compiling: Arc::new(Semaphore::new(COMPILING_MAX)),
        }
    }
}

impl Grammars {
    fn find(&self, wanted: &Wanted) -> Option<Arc<Compiled>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|compiled| compiled.wanted() == wanted)?;
        let found = kept.remove(at)?;
        kept.push_back(Arc::clone(&found));
        Some(found)
    }

    fn keep(&self, compiled: &Arc<Compiled>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(Arc::clone(compiled));
    }

    /// Blocks, at the first call for as long as a large vocabulary takes to sort.
    fn vocabulary(&self, model: &Model) -> Result<Arc<Vocabulary>, String> {
        let made = || Vocabulary::of(&model.served.tokenizer, model.served.vocab).map(Arc::new);
        self.vocabulary.get_or_init(made).clone()
    }
}

/// Compiles a constraint for a model, or finds it compiled.
///
/// # Errors
/// 400 with what is wrong with it, which names no field yet.
pub(crate) async fn compile(
    wanted: impl Into<Wanted>,
    model: &Arc<Model>,
) -> Result<Arc<Compiled>, ApiError> {
    let wanted = wanted.into();
    if let Some(found) = model.grammars.find(&wanted) {
        return Ok(found);
    }
    let work = {
        let model = Arc::clone(model);
        async move {
            // A client that leaves must not free the place of a thread that still works.
            let permit = Arc::clone(&model.grammars.compiling).acquire_owned().await;
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let vocabulary = model.grammars.vocabulary(&model)?;
                let compiled = compile::compile(wanted, vocabulary)?;
                model.grammars.keep(&compiled);
                Ok(compiled)
            })
            .await
        }
    };
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(Ok(compiled)) => compiled.map_err(|what: String| ApiError::bad_request(what)),
        Ok(Err(_)) => Err(ApiError::internal("compiling the constraint failed")),
        Err(_) => Err(ApiError::bad_request(format!(
            "expected a constraint that is compiled within {} s, found one that takes longer",
            PATIENCE.as_secs()
        ))),
    }
}
