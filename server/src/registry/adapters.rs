//! Adapters of the models: named like models, there while their model is, loaded and let go at run time.

use std::path::PathBuf;
use std::sync::Arc;

use super::entry::{Entry, State};
use super::{Model, Registry, Roster};
use crate::error::ApiError;

/// An adapter of the operator's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedAdapter {
    /// Its name in the API, as a model's.
    pub id: String,
    /// The directory that PEFT wrote.
    pub path: PathBuf,
}

/// An adapter of a model.
pub(super) struct AdapterEntry {
    pub(super) listed: ListedAdapter,
    pub(super) state: AdapterState,
}

/// Where an adapter is.
pub(super) enum AdapterState {
    /// It comes with its model.
    Away,
    Ready(Arc<Model>),
    /// It did not come with its model.
    Failed(Arc<str>),
}

impl AdapterEntry {
    /// The model under it; `None` where it comes with its model.
    ///
    /// # Errors
    /// 503 where it did not.
    pub(super) fn loaded(&self) -> Result<Option<Arc<Model>>, ApiError> {
        match &self.state {
            AdapterState::Away => Ok(None),
            AdapterState::Ready(model) => Ok(Some(Arc::clone(model))),
            AdapterState::Failed(reason) => Err(ApiError::model_failed(&self.listed.id, reason, 1)),
        }
    }

    /// Whether nobody has it.
    pub(super) fn is_idle(&self) -> bool {
        !matches!(&self.state, AdapterState::Ready(model) if Arc::strong_count(model) > 1)
    }
}

impl Roster {
    /// The model of this name, or the one whose adapter has it.
    pub(super) fn owner(&mut self, id: &str) -> Option<&mut Entry> {
        let is_meant = |entry: &&mut Entry| entry.listed.id == id || entry.adapter(id).is_some();
        self.entries.iter_mut().find(is_meant)
    }

    /// The names of all models and adapters.
    pub(super) fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for entry in &self.entries {
            names.push(entry.listed.id.as_str());
            names.extend(entry.adapters.iter().map(|own| own.listed.id.as_str()));
        }
        names
    }
}

impl Entry {
    pub(super) fn adapter(&self, id: &str) -> Option<&AdapterEntry> {
        self.adapters.iter().find(|adapter| adapter.listed.id == id)
    }
}

impl Registry {
    /// Loads the adapters of a model that has just come. Those that do not come are told to whoever asks for them, and
    /// here.
    ///
    /// # Errors
    /// The first that did not, and why.
    pub async fn bring_adapters(&self, model: &str) -> Result<(), String> {
        let Some((base, listed)) = self.listed_adapters(model) else { return Ok(()) };
        let mut result = Ok(());
        for adapter in listed {
            let loaded = self.adapter_of(&base, &adapter).await;
            let state = match loaded {
                Ok(model) => AdapterState::Ready(Arc::new(model)),
                Err(reason) => {
                    tracing::error!(adapter = adapter.id, reason, "an adapter could not be loaded");
                    result = result.and(Err(format!("the adapter `{}`: {reason}", adapter.id)));
                    AdapterState::Failed(reason.into())
                }
            };
            let mut roster = self.roster();
            let entry = roster.entry(model);
            // It may have been unloaded meanwhile.
            let own = entry.and_then(|entry| entry.adapters.iter_mut().find(|own| own.listed == adapter));
            if let Some(own) = own {
                own.state = state;
            }
        }
        self.inner.changed.send_replace(());
        result
    }

    fn listed_adapters(&self, model: &str) -> Option<(Arc<Model>, Vec<ListedAdapter>)> {
        let mut roster = self.roster();
        let entry = roster.entry(model)?;
        let State::Ready(base) = &entry.state else { return None };
        let listed: Vec<_> = entry.adapters.iter().map(|own| own.listed.clone()).collect();
        (!listed.is_empty()).then(|| (Arc::clone(base), listed))
    }

    async fn adapter_of(&self, base: &Model, listed: &ListedAdapter) -> Result<Model, String> {
        let loader = self.inner.loader.clone().ok_or("this server loads no adapters")?;
        let engine = base.served.engine.clone();
        let adapter = loader.load_adapter(base.id.clone(), engine, listed.path.clone()).await?;
        Ok(base.under(&listed.id, adapter))
    }

    /// Adds an adapter to a loaded model; one of the same name is replaced only where that is `asked` for.
    ///
    /// # Errors
    /// 400 where the name is taken, or the adapter is none of this model.
    pub(crate) async fn add_adapter(
        &self,
        base: &Model,
        listed: ListedAdapter,
        may_replace: Replace,
    ) -> Result<(), ApiError> {
        self.check_name(base, &listed.id, may_replace)?;
        let loaded = self.adapter_of(base, &listed).await;
        let model = loaded.map_err(|reason| ApiError::field("lora_path", reason))?;
        let mut roster = self.roster();
        let taken = roster.owner(&listed.id).is_some_and(|owner| owner.listed.id != base.id);
        let Some(entry) = roster.entry(&base.id).filter(|_| !taken) else {
            return Err(ApiError::field("lora_name", format!("`{}` was taken meanwhile", listed.id)));
        };
        entry.adapters.retain(|own| own.listed.id != listed.id);
        entry.adapters.push(AdapterEntry { listed, state: AdapterState::Ready(Arc::new(model)) });
        Ok(())
    }

    fn check_name(&self, base: &Model, id: &str, may_replace: Replace) -> Result<(), ApiError> {
        let mut roster = self.roster();
        let Some(owner) = roster.owner(id) else { return Ok(()) };
        let is_own = owner.listed.id == base.id && owner.adapter(id).is_some();
        match (is_own, may_replace) {
            (true, Replace::Yes) => Ok(()),
            (true, Replace::No) => Err(ApiError::field(
                "lora_name",
                format!(
                    "The lora adapter '{id}' has already been loaded. If you want to load the adapter in place, set \
                     'load_inplace' to True."
                ),
            )),
            (false, _) => Err(ApiError::field("lora_name", format!("`{id}` is the name of a model"))),
        }
    }

    /// Takes an adapter away. Requests that have it go on to their end.
    ///
    /// # Errors
    /// 404.
    pub(crate) fn remove_adapter(&self, id: &str) -> Result<(), ApiError> {
        let mut roster = self.roster();
        let owner = roster.owner(id).filter(|owner| owner.adapter(id).is_some());
        let owner = owner.ok_or_else(|| ApiError::no_adapter(id))?;
        owner.adapters.retain(|own| own.listed.id != id);
        Ok(())
    }
}

/// Whether an adapter may take the place of one of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replace {
    Yes,
    No,
}
