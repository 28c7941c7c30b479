//! A model that can serve requests, and what the server derives from it.

use std::sync::Arc;

use mainstay_engine::store::{BundlePages, PageKey, StoreError};
use mainstay_engine::{Adapter, Handle, Identity, Keep, Reuse};
use mainstay_models::Generation;
use mainstay_models::graph::PooledKind;
use mainstay_models::template::ChatTemplate;
use mainstay_models::tokenizer::{ShowSpecial, Tokenizer};

use super::About;
use crate::detokenize::{ByteTokens, Decoder};
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

impl PooledShape {
    /// What a model is for that makes such rows.
    pub fn task(self) -> &'static str {
        match self.kind {
            PooledKind::Embedding => "embed",
            PooledKind::Score => "rerank",
        }
    }
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

/// A served model, itself or under an adapter, with what the server derives from it once.
pub(crate) struct Model {
    /// Its name in the API, or its adapter's.
    pub(crate) id: String,
    pub(crate) served: Arc<ServedModel>,
    /// What changes it.
    pub(crate) adapter: Option<Adapter>,
    /// What decides the bytes of its pages.
    pub(crate) identity: Identity,
    pub(crate) byte_tokens: Arc<ByteTokens>,
    /// How it writes reasoning and calls.
    pub(crate) format: Format,
    /// Tells clients when the bits of a seeded result may change.
    pub(crate) fingerprint: String,
    /// Kept while the model is not loaded.
    pub(crate) metrics: Arc<ModelMetrics>,
    pub(crate) grammars: Arc<Grammars>,
}

impl Model {
    pub(super) fn new(served: ServedModel, metrics: Arc<ModelMetrics>) -> Self {
        Self {
            id: served.id.clone(),
            adapter: None,
            identity: served.engine.identity().clone(),
            byte_tokens: Arc::new(ByteTokens::of(&served.tokenizer)),
            format: Format::of(served.template.as_ref(), &served.tokenizer, served.format),
            fingerprint: fingerprint(&served, &served.id),
            metrics,
            grammars: Arc::default(),
            served: Arc::new(served),
        }
    }

    /// The same under an adapter, by another name.
    pub(super) fn under(&self, id: &str, adapter: Adapter) -> Self {
        Self {
            id: id.to_owned(),
            served: Arc::clone(&self.served),
            identity: self.identity.under(&adapter),
            byte_tokens: Arc::clone(&self.byte_tokens),
            format: self.format,
            fingerprint: fingerprint(&self.served, &format!("{id} {:?}", adapter.hash())),
            metrics: Arc::clone(&self.metrics),
            grammars: Arc::clone(&self.grammars),
            adapter: Some(adapter),
        }
    }

    /// Where the chain of page keys begins of a tenant's session of this many tokens.
    ///
    /// # Errors
    /// As [`Handle::root`].
    pub(crate) fn root(&self, tenant: &str, salt: &[u8], len: usize) -> Result<Option<PageKey>, StoreError> {
        self.served.engine.root(tenant, (self.adapter.as_ref(), salt), len)
    }

    /// How many of these tokens have stored pages, or why there are none.
    pub(crate) fn stored_len(&self, tenant: &str, tokens: &[u32]) -> (usize, Option<&'static str>) {
        self.served.engine.stored_len(tenant, (&Keep::default(), self.adapter.as_ref()), tokens)
    }

    /// How an import for this model takes pages.
    ///
    /// # Errors
    /// As [`Handle::import_pages`].
    pub(crate) fn import_pages(&self, tenant: &str) -> Result<BundlePages, StoreError> {
        self.served.engine.import_pages(tenant, self.adapter.as_ref())
    }

    /// What is told of it, also when it is not loaded.
    pub(super) fn about(&self) -> About {
        let (created, context) = (self.served.created, self.served.context);
        About { created, context, tasks: self.tasks().collect() }
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

fn fingerprint(served: &ServedModel, name: &str) -> String {
    let identity = format!("{} {name} {:?}", env!("CARGO_PKG_VERSION"), served.engine.numeric_class());
    format!("fp_{}", &blake3::hash(identity.as_bytes()).to_hex().as_str()[..10])
}
