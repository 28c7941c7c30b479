//! Sessions as the API sees them: whose they are, which of them has a turn running, what their records say.

pub(crate) mod begin;
pub(crate) mod chat;
pub(crate) mod history;
pub(crate) mod live;
pub(crate) mod opening;
pub(crate) mod options;
pub(crate) mod record;
pub(crate) mod resume;
pub(crate) mod stored;
pub(crate) mod turn;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::HeaderValue;
use axum::response::Response;
use mainstay_engine::store::{SessionId, Store, StoreError, TenantId};

use self::live::Live;
use crate::error::ApiError;
use crate::openai::session_fields::SESSION_ID;

/// The sessions of a server. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sessions {
    pub(crate) store: Arc<Store>,
    busy: Arc<Mutex<Busy>>,
    /// Sessions whose answers are about to go on by themselves; `None` until it is known which.
    going_on: Arc<Mutex<Option<HashSet<SessionId>>>>,
}

/// Sessions that somebody has claimed, and the turns that run in them.
type Busy = HashMap<SessionId, Option<Arc<Live>>>;

/// The right to write to a session, until it is dropped. Only one turn of a session runs at a time.
/// A clone is the same right, which ends with the last of them.
#[derive(Clone)]
pub(crate) struct Claim(Arc<Held>);

struct Held {
    busy: Arc<Mutex<Busy>>,
    id: SessionId,
}

impl Sessions {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Self { store, busy: Arc::default(), going_on: Arc::new(Mutex::new(Some(HashSet::new()))) }
    }

    /// Notes which answers are about to go on by themselves.
    pub(crate) fn will_go_on(&self, sessions: Option<HashSet<SessionId>>) {
        *self.going_on.lock().unwrap_or_else(PoisonError::into_inner) = sessions;
    }

    /// Its answer goes on, or cannot.
    pub(crate) fn has_gone_on(&self, id: SessionId) {
        let mut going_on = self.going_on.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sessions) = going_on.as_mut() {
            sessions.remove(&id);
        }
    }

    /// Whether its answer may be about to go on by itself.
    pub(crate) fn may_go_on(&self, id: SessionId) -> bool {
        let going_on = self.going_on.lock().unwrap_or_else(PoisonError::into_inner);
        going_on.as_ref().is_none_or(|sessions| sessions.contains(&id))
    }

    /// A tenant's session by id or name.
    ///
    /// # Errors
    /// 404, also where it is another tenant's.
    pub(crate) async fn find(
        &self,
        tenant: &Arc<str>,
        session: String,
    ) -> Result<(TenantId, SessionId), ApiError> {
        let name = Arc::clone(tenant);
        self.call(move |store| {
            let tenant = store.tenant(&name)?.id;
            Ok((tenant, store.find(tenant, id_or_name(&session))?))
        })
        .await
    }

    /// Claims a session for a turn, a rollback or a deletion.
    ///
    /// # Errors
    /// 409 `session_busy` while another has it.
    pub(crate) fn claim(&self, id: SessionId) -> Result<Claim, ApiError> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if busy.contains_key(&id) {
            return Err(ApiError::session_busy());
        }
        busy.insert(id, None);
        Ok(Claim(Arc::new(Held { busy: Arc::clone(&self.busy), id })))
    }

    /// Whether somebody has claimed the session.
    pub(crate) fn is_busy(&self, id: SessionId) -> bool {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&id)
    }

    /// The turn that runs in a session.
    pub(crate) fn live(&self, id: SessionId) -> Option<Arc<Live>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned().flatten()
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

impl Claim {
    /// Lets others read along with the turn.
    pub(crate) fn show(&self, live: &Arc<Live>) {
        let mut busy = self.0.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.insert(self.0.id, Some(Arc::clone(live)));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// An answer with the header that names its session.
pub(crate) fn named(mut response: Response, id: SessionId) -> Response {
    let value = HeaderValue::try_from(shown(id)).expect("an id is letters and digits");
    response.headers_mut().insert(SESSION_ID, value);
    response
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
