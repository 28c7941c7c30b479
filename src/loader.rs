//! Brings the models of the list in, within the memory there is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use mainstay_engine::store::Store;
use mainstay_engine::{Handle, Reuse};
use mainstay_models::graph::Graph;
use mainstay_models::{AdapterWeights, Model};
use mainstay_server::{About, Listed, Loader, Loading, LoadingAdapter, NotLoaded, Registry, ServedModel};

use crate::memory::Memory;
use crate::roster::{HowArgs, Load, Wanted};
use crate::source::Place;
use crate::{serve, start};

/// How long a load waits for models in use to be let go.
const ROOM_PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks.
const ROOM_PAUSE: Duration = Duration::from_millis(20);

/// Loads models.
pub(crate) struct Loads {
    /// Those whose files are here.
    models: OnceLock<BTreeMap<String, (Place, HowArgs)>>,
    memory: Memory,
    store: Option<Arc<Store>>,
    reuse: Reuse,
    /// Of every model that was loaded: what its adapters must fit.
    graphs: Mutex<BTreeMap<String, Arc<Graph>>>,
    /// One load at a time: they share the disk, and what memory is left.
    turn: tokio::sync::Mutex<()>,
}

/// The list as the registry takes it.
pub(crate) fn listed(wanted: &[Wanted]) -> Vec<Listed> {
    let listed = |model: &Wanted| Listed {
        id: model.name.clone(),
        is_pinned: model.is_pinned,
        adapters: model.adapters.clone(),
    };
    wanted.iter().map(listed).collect()
}

impl Loads {
    pub(crate) fn new(memory: Memory, store: Option<Arc<Store>>, reuse: Reuse) -> Self {
        let (models, graphs, turn) = Default::default();
        Self { models, memory, store, reuse, graphs, turn }
    }

    fn graphs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Graph>>> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches what has to be fetched, opens every model once, so that what is wrong with one is told now, and loads
    /// those that are to be there from the start. The devices that these run on.
    ///
    /// # Errors
    /// What the hub or the loader says; [`crate::exit::Usage`] for models that memory cannot hold.
    pub(crate) async fn start(&self, wanted: Vec<Wanted>, registry: &Registry) -> Result<Vec<String>> {
        let mut opened = Vec::new();
        for model in wanted {
            let place = model.source.clone().fetched().await?;
            let found = place.clone().open().await?;
            self.memory.declare(&model.name, start::need(&found, &model.how.engine, &place)?)?;
            opened.push((model, place, found));
        }
        let (starting, later): (Vec<_>, Vec<_>) =
            opened.into_iter().partition(|(model, ..)| model.load == Load::Start);
        let names: Vec<&str> = starting.iter().map(|(model, ..)| model.name.as_str()).collect();
        self.memory.check_together(&names)?;
        let all = starting.iter().chain(&later);
        let models = all.map(|(model, place, _)| (model.name.clone(), (place.clone(), model.how.clone())));
        if self.models.set(models.collect()).is_err() {
            bail!("the models were opened twice");
        }
        let mut devices = Vec::new();
        for (model, _, found) in starting {
            let (served, device) = self.bring(&model.name, registry, Some(found)).await?;
            registry.ready(served);
            registry.bring_adapters(&model.name).await.map_err(|reason| anyhow!(reason))?;
            if !devices.contains(&device) {
                devices.push(device);
            }
        }
        // Not before: what is to be there from the start must find the memory that it was promised.
        for (model, _, found) in later {
            registry.available(&model.name, about(&found, &model.how)?);
        }
        Ok(devices)
    }

    /// Loads a model, and tells what it runs on.
    async fn bring(
        &self,
        id: &str,
        registry: &Registry,
        opened: Option<Model>,
    ) -> Result<(ServedModel, String)> {
        let known = self.models.get().and_then(|models| models.get(id));
        let (place, how) = known.with_context(|| format!("the model `{id}` is not known"))?;
        let _turn = self.turn.lock().await;
        let kv_bytes = self.room(id, registry).await?;
        let model = match opened {
            Some(model) => model,
            None => place.clone().open().await?,
        };
        self.graphs().insert(id.to_owned(), Arc::new(model.graph.clone()));
        let (args, store) = (how.engine.clone(), self.store.clone());
        let started = tokio::task::spawn_blocking(move || start::engine(model, &args, kv_bytes, store))
            .await
            .context("the loader stopped")??;
        self.memory.hold(id, started.memory_bytes);
        let device = started.device.clone();
        let (format, reuse) = (how.format(), self.reuse);
        Ok((ServedModel { format, reuse, ..serve::served(id.to_owned(), started)? }, device))
    }

    /// Bytes for keys and values. Models that nobody uses go for it, the least recently used first.
    async fn room(&self, id: &str, registry: &Registry) -> Result<u64> {
        let until = tokio::time::Instant::now() + ROOM_PATIENCE;
        loop {
            let missing = match self.memory.room(id) {
                Ok(kv_bytes) => return Ok(kv_bytes),
                Err(missing) => missing,
            };
            if registry.leave_oldest().await {
                continue;
            }
            if tokio::time::Instant::now() >= until {
                return Err(NoRoom(self.memory.shortage(id, missing)).into());
            }
            tokio::time::sleep(ROOM_PAUSE).await;
        }
    }
}

/// Models in use hold the memory.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoRoom(String);

impl Loader for Loads {
    fn load(self: Arc<Self>, id: String, registry: Registry) -> Loading {
        Box::pin(async move {
            let brought = self.bring(&id, &registry, None).await;
            brought.map(|(served, _)| served).map_err(|error| match error.downcast::<NoRoom>() {
                Ok(NoRoom(what)) => NotLoaded::NoRoom(what),
                Err(error) => NotLoaded::Failed(format!("{error:#}")),
            })
        })
    }

    fn left(&self, id: &str) {
        self.memory.release(id);
    }

    fn load_adapter(self: Arc<Self>, model: String, engine: Handle, path: PathBuf) -> LoadingAdapter {
        Box::pin(async move {
            let graph = self.graphs().get(&model).cloned();
            let graph = graph.ok_or_else(|| format!("the model `{model}` is not loaded"))?;
            let read = tokio::task::spawn_blocking(move || AdapterWeights::open(&path, &graph));
            let weights =
                read.await.map_err(|_| "the loader stopped".to_owned())?.map_err(|e| e.to_string())?;
            engine.load_adapter(weights).await.map_err(|e| e.to_string())
        })
    }
}

/// What is told of a model that is not loaded yet.
fn about(model: &Model, how: &HowArgs) -> Result<About> {
    let pooled = serve::pooled(model).map(|pooled| pooled.task());
    let tasks = model.graph.generates().then_some("generate").into_iter().chain(pooled).collect();
    Ok(About { created: serve::now_s()?, context: start::context(&model.graph, &how.engine)?, tasks })
}
