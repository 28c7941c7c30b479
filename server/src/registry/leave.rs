//! Models that go: for want of use, for another's memory, with the server.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::adapters::AdapterState;
use super::entry::{Entry, State};
use super::{Model, Registry, Roster};

/// How long a model that goes waits for its pages to be with the store. What comes later is computed again.
const SETTLE: Duration = Duration::from_secs(30);
/// How long the end of the server waits for a model that is on its way.
const COMING_PATIENCE: Duration = Duration::from_secs(10);

impl Registry {
    /// Lets the models go that have not been used for so long. Call it now and then.
    pub async fn leave_idle(&self, idle: Duration) {
        let leaving = {
            let mut roster = self.roster();
            for entry in roster.entries.iter_mut().filter(|entry| !entry.is_idle()) {
                entry.used_at = Instant::now();
            }
            let ids: Vec<String> = movable(&mut roster)
                .filter(|entry| entry.used_at.elapsed() >= idle)
                .map(|entry| entry.listed.id.clone())
                .collect();
            ids.into_iter().filter_map(|id| take(&mut roster, &id)).collect::<Vec<_>>()
        };
        for (id, model) in leaving {
            tracing::info!(model = id, "unloading a model that is not used");
            self.leave(id, model).await;
        }
    }

    /// Lets the model go that has not been used for the longest time, for the sake of another; `false` where all are in
    /// use, or stay.
    pub async fn leave_oldest(&self) -> bool {
        let leaving = {
            let mut roster = self.roster();
            let oldest = movable(&mut roster).min_by_key(|entry| entry.used_at);
            let id = oldest.map(|entry| entry.listed.id.clone());
            id.and_then(|id| take(&mut roster, &id))
        };
        let Some((id, model)) = leaving else { return false };
        tracing::info!(model = id, "unloading a model for another's memory");
        self.leave(id, model).await;
        true
    }

    /// Ends all engines, once what they have is with the store; nothing is loaded after that.
    pub async fn close(&self) {
        self.roster().is_closed = true;
        self.inner.changed.send_replace(());
        let mut changed = self.inner.changed.subscribe();
        let arrived = changed.wait_for(|()| {
            let roster = self.roster();
            !roster.entries.iter().any(|entry| matches!(entry.state, State::Coming | State::Leaving))
        });
        if tokio::time::timeout(COMING_PATIENCE, arrived).await.is_err() {
            tracing::warn!("a model was still being loaded at the end");
        }
        let ids: Vec<String> = self.shown().into_iter().map(|shown| shown.id).collect();
        for id in ids {
            let taken = take(&mut self.roster(), &id);
            if let Some((id, model)) = taken {
                self.leave(id, model).await;
            }
        }
    }

    /// Goes on to its end also where nobody waits for it any longer.
    async fn leave(&self, id: String, model: Arc<Model>) {
        let registry = self.clone();
        let left = tokio::spawn(async move {
            let engine = model.served.engine.clone();
            if !engine.settle(SETTLE).await {
                tracing::warn!(model = id, "pages were still being written");
            }
            engine.shutdown();
            engine.closed().await;
            drop((engine, model));
            if let Some(loader) = &registry.inner.loader {
                loader.left(&id);
            }
            registry.set(&id, State::Away { failure: None });
        });
        if left.await.is_err() {
            tracing::error!("a model could not be unloaded");
        }
    }
}

/// Models that may go now.
fn movable(roster: &mut Roster) -> impl Iterator<Item = &Entry> {
    roster.entries.iter().filter(|entry| !entry.listed.is_pinned && entry.is_idle())
}

/// The model, no longer to be had.
fn take(roster: &mut Roster, id: &str) -> Option<(String, Arc<Model>)> {
    let entry = roster.entry(id)?;
    if !matches!(entry.state, State::Ready(_)) {
        return None;
    }
    for adapter in &mut entry.adapters {
        adapter.state = AdapterState::Away;
    }
    match std::mem::replace(&mut entry.state, State::Leaving) {
        State::Ready(model) => Some((id.to_owned(), model)),
        _ => None,
    }
}
