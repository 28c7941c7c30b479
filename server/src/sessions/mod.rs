//! Sessions as the API sees them: whose they are, which of them has a turn running, what their records say.

pub(crate) mod record;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_engine::store::{SessionId, Store, StoreError, Tenant};

use crate::error::ApiError;

/// The sessions of a server. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sessions {
    pub(crate) store: Arc<Store>,
    busy: Arc<Mutex<HashSet<SessionId>>>,
}

/// The right to write to a session, until it is dropped. Only one turn of a session runs at a time.
pub(crate) struct Claim {
    busy: Arc<Mutex<HashSet<SessionId>>>,
    id: SessionId,
}

impl Sessions {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Self { store, busy: Arc::default() }
    }

    /// A tenant by its name.
    pub(crate) fn tenant(&self, name: &str) -> Result<Tenant, ApiError> {
        Ok(self.store.tenant(name)?)
    }

    /// Claims a session for a turn, a rollback or a deletion.
    ///
    /// # Errors
    /// 409 `session_busy` while another has it.
    pub(crate) fn claim(&self, id: SessionId) -> Result<Claim, ApiError> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if !busy.insert(id) {
            return Err(ApiError::session_busy());
        }
        Ok(Claim { busy: Arc::clone(&self.busy), id })
    }

    /// Whether somebody has claimed the session.
    pub(crate) fn is_busy(&self, id: SessionId) -> bool {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }

    /// Runs a call that may wait for the disk on a thread that may wait.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let store = Arc::clone(&self.store);
        match tokio::task::spawn_blocking(move || call(&store)).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(ApiError::internal("the store failed")),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// An id as the API shows it.
pub(crate) fn shown(id: SessionId) -> String {
    format!("{PREFIX}{id}")
}

/// What a client wrote, as the store finds it: an id with or without its prefix, or a name.
pub(crate) fn id_or_name(text: &str) -> &str {
    match text.strip_prefix(PREFIX) {
        Some(id) if id.parse::<SessionId>().is_ok() => id,
        _ => text,
    }
}

const PREFIX: &str = "sess_";
