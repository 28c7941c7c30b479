//! One model of the list: where it is, and what is known of it while it is not loaded.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::adapters::{AdapterEntry, AdapterState};
use super::{About, Listed, ListedAdapter, Model, Roster};
use crate::error::ApiError;
use crate::metrics::ModelMetrics;

/// How long a failed load is not tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Why a model did not come.
pub(super) struct Failure {
    pub(super) reason: Arc<str>,
    pub(super) at: Instant,
}

/// Where a model is.
pub(super) enum State {
    /// On its way while the server starts: requests are answered 503.
    Starting,
    /// Not loaded; it comes when it is asked for.
    Away {
        failure: Option<Failure>,
    },
    /// On its way; requests wait.
    Coming,
    Ready(Arc<Model>),
    /// Being unloaded; requests wait until it has gone, and have it come back.
    Leaving,
    /// It will not come.
    Failed(Arc<str>),
}

/// A model of the list.
pub(super) struct Entry {
    pub(super) listed: Listed,
    pub(super) state: State,
    pub(super) about: Option<About>,
    /// When it was last asked for, or last seen in use.
    pub(super) used_at: Instant,
    /// Requests that wait for it.
    pub(super) waiting: usize,
    pub(super) metrics: Arc<ModelMetrics>,
    pub(super) adapters: Vec<AdapterEntry>,
    pub(super) loads: u64,
    pub(super) failures: u64,
}

/// A model as clients see it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shown {
    pub(crate) id: String,
    /// The model that it is an adapter of.
    pub(crate) parent: Option<String>,
    pub(crate) state: &'static str,
    /// Why it did not come when it was asked for last.
    pub(crate) error: Option<Arc<str>>,
    pub(crate) about: Option<About>,
    pub(crate) loads: u64,
    pub(crate) failures: u64,
}

impl Roster {
    pub(super) fn of(listed: impl IntoIterator<Item = Listed>) -> Self {
        let entries = listed.into_iter().map(|listed| Entry::new(listed, State::Starting)).collect();
        Self { entries, is_closed: false }
    }
}

impl Entry {
    pub(super) fn new(listed: Listed, state: State) -> Self {
        let away =
            |listed: &ListedAdapter| AdapterEntry { listed: listed.clone(), state: AdapterState::Away };
        Self {
            adapters: listed.adapters.iter().map(away).collect(),
            listed,
            state,
            about: None,
            used_at: Instant::now(),
            waiting: 0,
            metrics: Arc::default(),
            loads: 0,
            failures: 0,
        }
    }

    /// Counts what a load has come to.
    pub(super) fn arrived(&mut self, state: &State) {
        match state {
            State::Ready(model) => {
                self.loads += 1;
                self.used_at = Instant::now();
                self.about = Some(model.about());
            }
            _ => self.failures += 1,
        }
    }

    /// The model, or the adapter of it that has the name `asked`; `None` where it may be waited for.
    ///
    /// # Errors
    /// 503, where waiting is in vain, or too early.
    pub(super) fn loaded(&self, asked: &str) -> Result<Option<Arc<Model>>, ApiError> {
        let id = &self.listed.id;
        match &self.state {
            State::Ready(model) => match self.adapter(asked) {
                Some(adapter) => adapter.loaded(),
                None => Ok(Some(Arc::clone(model))),
            },
            State::Starting => Err(ApiError::model_loading(id)),
            State::Failed(reason) => Err(ApiError::model_failed(id, reason, 1)),
            State::Away { failure: Some(failure) } if failure.at.elapsed() < RETRY_PAUSE => {
                let pause = RETRY_PAUSE.saturating_sub(failure.at.elapsed());
                Err(ApiError::model_failed(id, &failure.reason, pause.as_secs() + 1))
            }
            State::Away { .. } | State::Coming | State::Leaving => Ok(None),
        }
    }

    /// Whether nobody has it or waits for it. Who has it holds a share of it.
    pub(super) fn is_idle(&self) -> bool {
        let is_free = matches!(&self.state, State::Ready(model) if Arc::strong_count(model) == 1);
        is_free && self.waiting == 0 && self.adapters.iter().all(AdapterEntry::is_idle)
    }

    /// The model and its adapters.
    pub(super) fn shown(&self) -> Vec<Shown> {
        let own = self.shown_alone();
        let adapter = |adapter: &AdapterEntry| {
            let shown = Shown { id: adapter.listed.id.clone(), parent: Some(own.id.clone()), ..own.clone() };
            match &adapter.state {
                AdapterState::Failed(reason) => {
                    Shown { state: "failed", error: Some(reason.clone()), ..shown }
                }
                AdapterState::Away | AdapterState::Ready(_) => shown,
            }
        };
        let adapters: Vec<Shown> = self.adapters.iter().map(adapter).collect();
        std::iter::once(own).chain(adapters).collect()
    }

    fn shown_alone(&self) -> Shown {
        let (state, error) = match &self.state {
            State::Starting | State::Coming => ("loading", None),
            State::Away { failure } => ("not_loaded", failure.as_ref().map(|failure| failure.reason.clone())),
            State::Ready(_) => ("loaded", None),
            State::Leaving => ("unloading", None),
            State::Failed(reason) => ("failed", Some(reason.clone())),
        };
        let (id, about) = (self.listed.id.clone(), self.about.clone());
        Shown { id, parent: None, state, error, about, loads: self.loads, failures: self.failures }
    }

    pub(super) fn health(&self) -> Result<(), ApiError> {
        match &self.state {
            State::Ready(model) if !model.served.engine.is_ready() => {
                let message = format!("the engine of `{}` has stopped", self.listed.id);
                Err(ApiError::unavailable(message, "engine_stopped"))
            }
            State::Starting | State::Failed(_) => self.loaded(&self.listed.id).map(|_| ()),
            State::Ready(_) | State::Away { .. } | State::Coming | State::Leaving => Ok(()),
        }
    }
}
