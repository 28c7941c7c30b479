//! The models of this server by name: which can be used now, which come when they are asked for, and which go.

mod adapters;
mod entry;
mod leave;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_engine::store::{BundlePages, PageKey, StoreError};
use mainstay_engine::{Adapter, Handle, Identity, Keep, Reuse};
use mainstay_models::Generation;
use mainstay_models::graph::PooledKind;
use mainstay_models::template::ChatTemplate;
use mainstay_models::tokenizer::{ShowSpecial, Tokenizer};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::detokenize::{ByteTokens, Decoder};
use crate::error::ApiError;
use crate::grammar::Grammars;
use crate::job::TimeLimits;
use crate::metrics::ModelMetrics;
use crate::output::{Format, FormatChoice};
pub use adapters::ListedAdapter;
pub(crate) use adapters::Replace;
pub(crate) use entry::Shown;
use entry::{Entry, Failure, State};

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
    fn new(served: ServedModel, metrics: Arc<ModelMetrics>) -> Self {
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
    fn under(&self, id: &str, adapter: Adapter) -> Self {
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
    fn about(&self) -> About {
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

/// A model of the operator's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name in the API.
    pub id: String,
    /// Once loaded, it stays.
    pub is_pinned: bool,
    /// Its adapters.
    pub adapters: Vec<ListedAdapter>,
}

/// What is known of a model that is not loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// When it was made or loaded last, unix seconds.
    pub created: u64,
    /// Longest sequence, tokens.
    pub context: usize,
    /// What it is for: `generate`, `embed`, `rerank`.
    pub tasks: Vec<&'static str>,
}

/// A model on its way, or why it does not come.
pub type Loading = Pin<Box<dyn Future<Output = Result<ServedModel, String>> + Send>>;

/// An adapter on its way, or why it does not come.
pub type LoadingAdapter = Pin<Box<dyn Future<Output = Result<Adapter, String>> + Send>>;

/// Brings models in, and divides memory between them. It may have the registry let idle ones go.
pub trait Loader: Send + Sync {
    /// Loads a model of the list.
    fn load(self: Arc<Self>, id: String, registry: Registry) -> Loading;

    /// The model has gone, with all its memory.
    fn left(&self, id: &str);

    /// Brings the adapter in a directory to the engine of a model that is loaded.
    fn load_adapter(self: Arc<Self>, model: String, engine: Handle, path: PathBuf) -> LoadingAdapter;
}

/// All models of a server, cheap to clone; every clone sees the same models.
#[derive(Clone, Default)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    roster: Mutex<Roster>,
    /// Told after every change that somebody may wait for.
    changed: watch::Sender<()>,
    /// Without one, nothing comes or goes by itself.
    loader: Option<Arc<dyn Loader>>,
    /// Requests that may wait for one model's coming.
    waiting_max: usize,
}

#[derive(Default)]
struct Roster {
    entries: Vec<Entry>,
    /// Nothing is loaded any more.
    is_closed: bool,
}

impl Roster {
    fn entry(&mut self, id: &str) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.listed.id == id)
    }
}

/// A request's place among those that wait for a model; while there is one, the model stays.
struct Seat<'a> {
    registry: &'a Registry,
    id: &'a str,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.registry.roster().owner(self.id) {
            entry.waiting -= 1;
        }
    }
}

impl Registry {
    /// Names the models that are being loaded. Requests for them are answered 503 until [`Registry::ready`].
    pub fn loading(ids: impl IntoIterator<Item = String>) -> Self {
        let listed = ids.into_iter().map(|id| Listed { id, is_pinned: true, adapters: Vec::new() });
        Self { inner: Arc::new(Inner { roster: Mutex::new(Roster::of(listed)), ..Inner::default() }) }
    }

    /// Names the models that `loader` can bring; of requests that wait for one, at most `waiting_max` are let in.
    /// Until [`Registry::ready`] or [`Registry::available`], requests are answered 503.
    pub fn of(listed: Vec<Listed>, loader: Arc<dyn Loader>, waiting_max: usize) -> Self {
        let roster = Mutex::new(Roster::of(listed));
        let loader = Some(loader);
        Self { inner: Arc::new(Inner { roster, changed: watch::Sender::default(), loader, waiting_max }) }
    }

    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.inner.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model can be used from now on.
    pub fn ready(&self, model: ServedModel) {
        self.settle(&model.id.clone(), Ok(model));
    }

    /// The model will not come; `reason` is told to clients that ask for it.
    pub fn failed(&self, id: &str, reason: &str) {
        self.set(id, State::Failed(reason.into()));
    }

    /// The model can be loaded from now on, when somebody asks for it.
    pub fn available(&self, id: &str, about: About) {
        if let Some(entry) = self.roster().entry(id) {
            entry.about = Some(about);
        }
        self.set(id, State::Away { failure: None });
    }

    fn set(&self, id: &str, state: State) {
        let mut roster = self.roster();
        match roster.entry(id) {
            Some(entry) => entry.state = state,
            None => {
                let listed = Listed { id: id.to_owned(), is_pinned: true, adapters: Vec::new() };
                roster.entries.push(Entry::new(listed, state));
            }
        }
        drop(roster);
        self.inner.changed.send_replace(());
    }

    /// Takes what a load has come to.
    fn settle(&self, id: &str, loaded: Result<ServedModel, String>) {
        let metrics = self.roster().entry(id).map(|entry| entry.metrics.clone()).unwrap_or_default();
        let state = match loaded {
            Ok(served) => State::Ready(Arc::new(Model::new(served, metrics))),
            Err(reason) => {
                tracing::error!(model = id, reason, "a model could not be loaded");
                State::Away { failure: Some(Failure { reason: reason.into(), at: Instant::now() }) }
            }
        };
        let mut roster = self.roster();
        if let Some(entry) = roster.entry(id) {
            entry.arrived(&state);
        }
        drop(roster);
        self.set(id, state);
    }

    /// The model of this name. One that is not loaded is waited for; all who wait share one load.
    ///
    /// # Errors
    /// 404 without such a model; 503 where it does not come, or not in time; 429 where too many wait for it.
    pub(crate) async fn get(&self, id: &str, time: &TimeLimits) -> Result<Arc<Model>, ApiError> {
        let mut changed = self.inner.changed.subscribe();
        let mut seat = None;
        loop {
            changed.borrow_and_update();
            if let Some(model) = self.ask(id, seat.is_some())? {
                return Ok(model);
            }
            seat.get_or_insert_with(|| Seat { registry: self, id });
            match time.deadline(false) {
                // The sender is here, so this cannot fail.
                None => drop(changed.changed().await),
                Some((at, error)) => {
                    drop(tokio::time::timeout_at(at, changed.changed()).await.map_err(|_| error)?);
                }
            }
        }
    }

    /// The model, or `None` where its coming has to be waited for; who has no seat yet is given one then.
    fn ask(&self, id: &str, has_seat: bool) -> Result<Option<Arc<Model>>, ApiError> {
        let mut roster = self.roster();
        let is_closed = roster.is_closed;
        let Some(entry) = roster.owner(id) else {
            return Err(ApiError::no_model(id, roster.names()));
        };
        if let Some(model) = entry.loaded(id)? {
            entry.used_at = Instant::now();
            return Ok(Some(model));
        }
        if is_closed {
            return Err(ApiError::unavailable("the server is shutting down", "shutting_down"));
        }
        if !has_seat {
            if entry.waiting >= self.inner.waiting_max {
                let message =
                    format!("{} requests wait for `{id}` to be loaded; try again later", entry.waiting);
                return Err(ApiError::queue_full(message));
            }
            entry.waiting += 1;
        }
        if matches!(entry.state, State::Away { .. })
            && let Some(loader) = self.inner.loader.clone()
        {
            entry.state = State::Coming;
            let (registry, id) = (self.clone(), entry.listed.id.clone());
            tokio::spawn(async move {
                // A panic of the loader is a failure of the load.
                let load = tokio::spawn(loader.load(id.clone(), registry.clone())).await;
                registry.settle(&id, load.unwrap_or_else(|_| Err("the loader stopped".to_owned())));
                // What is wrong with one is told to whoever asks for it.
                let _ = registry.bring_adapters(&id).await;
            });
        }
        Ok(None)
    }

    /// The model of this name, if it is loaded.
    pub(crate) fn loaded(&self, id: &str) -> Option<Arc<Model>> {
        self.roster().owner(id)?.loaded(id).ok().flatten()
    }

    /// Whether it names this model.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.roster().entry(id).is_some()
    }

    /// The only model, or the first of several, for requests that may leave the name out.
    ///
    /// # Errors
    /// As [`Registry::get`].
    pub(crate) async fn named(&self, id: Option<&str>, time: &TimeLimits) -> Result<Arc<Model>, ApiError> {
        match id.map(str::to_owned).or_else(|| self.first()) {
            Some(id) => self.get(&id, time).await,
            None => Err(ApiError::unavailable("no model is loaded", "no_model")),
        }
    }

    /// The name of the first model.
    pub(crate) fn first(&self) -> Option<String> {
        self.roster().entries.first().map(|entry| entry.listed.id.clone())
    }

    /// The models that can be used now, in the order they were named.
    pub(crate) fn list(&self) -> Vec<Arc<Model>> {
        let roster = self.roster();
        roster.entries.iter().filter_map(|entry| entry.loaded(&entry.listed.id).ok().flatten()).collect()
    }

    /// All models as clients see them, in the order they were named.
    pub(crate) fn shown(&self) -> Vec<Shown> {
        self.roster().entries.iter().flat_map(Entry::shown).collect()
    }

    /// Whether this is the name of another model of this server than `id`.
    pub(crate) fn is_other(&self, name: &str, id: &str) -> bool {
        name != id && self.roster().owner(name).is_some()
    }

    /// Whether requests are served now. Models that come when they are asked for do not count.
    pub(crate) fn health(&self) -> Result<(), ApiError> {
        let roster = self.roster();
        if roster.entries.is_empty() {
            return Err(ApiError::unavailable("no model is loaded", "no_model"));
        }
        roster.entries.iter().try_for_each(Entry::health)
    }
}
