//! Chat completions that are kept: each is the only turn of a session of its own, which its id names.

use std::sync::Arc;

use mainstay_engine::store::{Durability, SessionId, SessionInfo, Settings, Store, StoreError, TenantId};
use serde_json::{Map, Value, json};

use super::Sessions;
use super::record::{SessionRecord, TurnRecord};
use crate::error::ApiError;
use crate::registry::Model;

const KIND: &str = "chat.completion";
const PREFIX: &str = "chatcmpl-";
/// Characters of a session's id.
const SESSION_LEN: usize = 26;
/// Sessions looked at under one hold of the store's lock.
const SCAN: usize = 1000;

/// A completion that is kept.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    tenant: TenantId,
    info: SessionInfo,
    session: SessionRecord,
    turn: TurnRecord,
}

/// The id of a completion in a session of its own.
pub(crate) fn completion_id(session: SessionId) -> String {
    format!("{PREFIX}{session}{:016x}", crate::random::seed())
}

fn session_of(id: &str) -> Option<SessionId> {
    id.strip_prefix(PREFIX)?.get(..SESSION_LEN)?.parse().ok()
}

/// Makes the session of a completion that is to be kept.
///
/// # Errors
/// What the store says.
pub(crate) async fn create(
    sessions: &Sessions,
    (tenant, durability): (&Arc<str>, Durability),
    model: &Arc<Model>,
    metadata: Map<String, Value>,
) -> Result<SessionId, ApiError> {
    let (name, model) = (Arc::clone(tenant), Arc::clone(model));
    let record = SessionRecord { metadata, kind: KIND.to_owned(), ..SessionRecord::default() };
    let make = move |store: &Store| {
        let tenant = store.tenant(&name)?.id;
        let settings = Settings {
            model: model.id.clone(),
            root: model.root(&name, b"", 0)?,
            durability,
            meta: record.to_bytes(),
            ..Settings::default()
        };
        Ok(store.create(tenant, settings)?.id)
    };
    sessions.call(make).await
}

/// Removes the session of a completion that could not be begun.
///
/// # Errors
/// What the store says.
pub(crate) async fn forget(sessions: &Sessions, tenant: &Arc<str>, id: SessionId) -> Result<(), ApiError> {
    let name = Arc::clone(tenant);
    sessions.call(move |store| store.delete(store.tenant(&name)?.id, id)).await
}

impl Stored {
    fn read(store: &Store, tenant: TenantId, info: SessionInfo) -> Result<Option<Self>, StoreError> {
        let session = SessionRecord::read(&info.settings.meta);
        if session.kind != KIND {
            return Ok(None);
        }
        let turns = store.turns(tenant, info.id)?;
        let Some(turn) = turns.first() else { return Ok(None) };
        Ok(Some(Self { tenant, info, session, turn: TurnRecord::read(&turn.meta) }))
    }

    /// # Errors
    /// 404.
    pub(crate) async fn of(sessions: &Sessions, tenant: &Arc<str>, id: String) -> Result<Self, ApiError> {
        let missing = || ApiError::not_found("stored chat completion", &id, "completion_not_found");
        let session = session_of(&id).ok_or_else(missing)?;
        let name = Arc::clone(tenant);
        let read = move |store: &Store| {
            let tenant = store.tenant(&name)?.id;
            match store.get(tenant, session) {
                Ok(info) => Self::read(store, tenant, info),
                Err(StoreError::NotFound) => Ok(None),
                Err(error) => Err(error),
            }
        };
        sessions.call(read).await?.filter(|stored| stored.turn.id == id).ok_or_else(missing)
    }

    /// All of a tenant's that pass, oldest first.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) async fn all(
        sessions: &Sessions,
        tenant: &Arc<str>,
        passes: impl Fn(&SessionInfo, &SessionRecord) -> bool + Send + 'static,
    ) -> Result<Vec<Self>, ApiError> {
        let name = Arc::clone(tenant);
        let find = move |store: &Store| {
            let tenant = store.tenant(&name)?.id;
            let (mut found, mut after) = (Vec::new(), None);
            loop {
                let part = store.list(tenant, after, SCAN);
                let Some(last) = part.last() else { return Ok(found) };
                after = Some(last.id);
                for info in part {
                    let record = SessionRecord::read(&info.settings.meta);
                    if record.kind == KIND && passes(&info, &record) {
                        found.extend(Self::read(store, tenant, info)?);
                    }
                }
            }
        };
        sessions.call(find).await
    }

    /// The object `chat.completion`.
    pub(crate) fn object(&self) -> Value {
        let mut message = self.turn.answer.clone();
        message["refusal"] = Value::Null;
        message["annotations"] = json!([]);
        json!({
            "id": self.turn.id,
            "object": KIND,
            "created": self.turn.created,
            "model": self.turn.model,
            "choices": [{
                "index": 0,
                "message": message,
                "logprobs": null,
                "finish_reason": self.turn.finish_reason,
            }],
            "usage": self.turn.usage,
            "metadata": self.session.metadata,
            "kv": self.turn.kv,
        })
    }

    /// The messages, in order: those that were sent, and the answer. The list that the API describes holds none but the
    /// assistant's; `all` gives every one.
    pub(crate) fn messages(&self, all: bool) -> Vec<Value> {
        let named = |(at, message): (usize, &Value)| {
            let mut message = message.clone();
            message["id"] = json!(format!("{}-{at}", self.turn.id));
            message["refusal"] = Value::Null;
            message["content_parts"] = Value::Null;
            message
        };
        let messages = self.turn.messages.iter().chain([&self.turn.answer]).enumerate();
        messages.filter(|(_, message)| all || message["role"] == "assistant").map(named).collect()
    }

    /// # Errors
    /// What the store says.
    pub(crate) async fn set_metadata(
        mut self,
        sessions: &Sessions,
        metadata: Map<String, Value>,
    ) -> Result<Self, ApiError> {
        let (tenant, id, new) = (self.tenant, self.info.id, metadata.clone());
        let patch = move |store: &Store| {
            store.patch(tenant, id, |settings| {
                let record = SessionRecord { metadata: new, ..SessionRecord::read(&settings.meta) };
                settings.meta = record.to_bytes();
            })
        };
        self.info = sessions.call(patch).await?;
        self.session.metadata = metadata;
        Ok(self)
    }

    /// # Errors
    /// What the store says.
    pub(crate) async fn delete(self, sessions: &Sessions) -> Result<(), ApiError> {
        let (tenant, id) = (self.tenant, self.info.id);
        sessions.call(move |store| store.delete(tenant, id)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_names_its_session() {
        let session = SessionId(0x0190_1234_5678_9abc);
        assert_eq!(session_of(&completion_id(session)), Some(session));
        assert_eq!(session_of("chatcmpl-1234"), None);
    }
}
