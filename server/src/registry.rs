//! The models of this server by name, and whether each can be used yet.

use std::sync::{Arc, PoisonError, RwLock};

use mainstay_engine::{Handle, Reuse};
use mainstay_models::Generation;
use mainstay_models::graph::PooledKind;
use mainstay_models::template::ChatTemplate;
use mainstay_models::tokenizer::{ShowSpecial, Tokenizer};

use crate::detokenize::{ByteTokens, Decoder};
use crate::error::ApiError;
use crate::grammar::Grammars;
use crate::metrics::ModelMetrics;
use crate::output::{Format, FormatChoice};

/// The row that a text becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PooledShape {
    /// What it is.
    pub kind: PooledKind,
    /// Its width.
    pub width: usize,
}

/// A model that can serve requests.
pub struct ServedModel {
    /// Its name in the API; may contain `/`.
    pub id: String,
    /// When it was made or loaded, unix seconds.
    pub created: u64,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template; without one it serves completions only.
    pub template: Option<ChatTemplate>,
    /// What the operator says of how it writes reasoning and calls.
    pub format: FormatChoice,
    /// Its defaults.
    pub generation: Generation,
    /// Token ids that it can embed: every id of a prompt must be below (`Graph::vocab`).
    pub vocab: usize,
    /// Longest sequence, tokens.
    pub context: usize,
    /// Whether it generates text.
    pub generates: bool,
    /// What it makes of a whole text, if it can.
    pub pooled: Option<PooledShape>,
    /// Which stored pages requests may use that do not say.
    pub reuse: Reuse,
    /// Its engine.
    pub engine: Handle,
}

/// A served model with what the server derives from it once.
pub(crate) struct Model {
    pub(crate) served: ServedModel,
    pub(crate) byte_tokens: ByteTokens,
    /// How it writes reasoning and calls.
    pub(crate) format: Format,
    /// Tells clients when the bits of a seeded result may change.
    pub(crate) fingerprint: String,
    pub(crate) metrics: ModelMetrics,
    pub(crate) grammars: Grammars,
}

impl Model {
    fn new(served: ServedModel) -> Self {
        let class = served.engine.numeric_class();
        let identity = format!("{} {} {class:?}", env!("CARGO_PKG_VERSION"), served.id);
        let hash = blake3::hash(identity.as_bytes()).to_hex();
        Self {
            byte_tokens: ByteTokens::of(&served.tokenizer),
            format: Format::of(served.template.as_ref(), &served.tokenizer, served.format),
            fingerprint: format!("fp_{}", &hash.as_str()[..10]),
            metrics: ModelMetrics::default(),
            grammars: Grammars::default(),
            served,
        }
    }

    /// Beside what `show` says, the special tokens among `markers` are shown.
    pub(crate) fn decoder<'a>(&'a self, show: ShowSpecial, markers: &'a [u32]) -> Decoder<'a> {
        Decoder { tokenizer: &self.served.tokenizer, byte_tokens: &self.byte_tokens, show, markers }
    }

    /// The role under which this model's template takes a developer's message.
    pub(crate) fn developer_role(&self) -> &'static str {
        let known = self.served.template.as_ref().is_some_and(|template| template.mentions("developer"));
        if known { "developer" } else { "system" }
    }
}

#[derive(Clone)]
enum State {
    Loading,
    Ready(Arc<Model>),
    Failed(Arc<str>),
}

/// All models of a server, cheap to clone; every clone sees the same models.
#[derive(Clone, Default)]
pub struct Registry {
    models: Arc<RwLock<Vec<(String, State)>>>,
}

impl Registry {
    /// Names the models that are being loaded. Requests for them are answered 503 until [`Registry::ready`].
    pub fn loading(ids: impl IntoIterator<Item = String>) -> Self {
        let models = ids.into_iter().map(|id| (id, State::Loading)).collect();
        Self { models: Arc::new(RwLock::new(models)) }
    }

    /// The model can be used from now on.
    pub fn ready(&self, model: ServedModel) {
        let id = model.id.clone();
        self.set(id, State::Ready(Arc::new(Model::new(model))));
    }

    /// The model will not come; `reason` is told to clients that ask for it.
    pub fn failed(&self, id: &str, reason: &str) {
        self.set(id.to_owned(), State::Failed(reason.into()));
    }

    fn set(&self, id: String, state: State) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        match models.iter_mut().find(|(name, _)| *name == id) {
            Some(entry) => entry.1 = state,
            None => models.push((id, state)),
        }
    }

    fn snapshot(&self) -> Vec<(String, State)> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The model of this name.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Model>, ApiError> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        match models.iter().find(|(name, _)| name == id) {
            Some((_, State::Ready(model))) => Ok(model.clone()),
            Some((_, State::Loading)) => Err(loading(id)),
            Some((_, State::Failed(reason))) => Err(failed(id, reason)),
            None => Err(ApiError::no_model(id)),
        }
    }

    /// Whether it names no model.
    pub(crate) fn is_empty(&self) -> bool {
        self.models.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The only model, or the first of several, for requests that may leave the name out.
    pub(crate) fn first(&self) -> Result<Arc<Model>, ApiError> {
        match self.snapshot().first() {
            Some((id, _)) => self.get(id),
            None => Err(ApiError::unavailable("no model is loaded", "no_model")),
        }
    }

    /// The models that can be used, in the order they were named.
    pub(crate) fn list(&self) -> Vec<Arc<Model>> {
        let ready = |(_, state)| if let State::Ready(model) = state { Some(model) } else { None };
        self.snapshot().into_iter().filter_map(ready).collect()
    }

    /// Whether a request for any of the models would be served now.
    pub(crate) fn health(&self) -> Result<(), ApiError> {
        let models = self.snapshot();
        if models.is_empty() {
            return Err(ApiError::unavailable("no model is loaded", "no_model"));
        }
        for (id, state) in &models {
            match state {
                State::Ready(model) if model.served.engine.is_ready() => {}
                State::Ready(_) => {
                    return Err(ApiError::unavailable(
                        format!("the engine of `{id}` has stopped"),
                        "engine_stopped",
                    ));
                }
                State::Loading => return Err(loading(id)),
                State::Failed(reason) => return Err(failed(id, reason)),
            }
        }
        Ok(())
    }
}

fn loading(id: &str) -> ApiError {
    ApiError::unavailable(format!("the model `{id}` is being loaded"), "model_loading")
}

fn failed(id: &str, reason: &str) -> ApiError {
    ApiError::unavailable(format!("the model `{id}` could not be loaded: {reason}"), "model_failed")
}
