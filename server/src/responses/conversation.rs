//! Conversations: sessions whose items can be added, shown and removed without an answer.

use std::sync::Arc;

use mainstay_engine::store::{Append, Durability, SessionInfo, Settings, Store};
use serde_json::{Map, Value, json};

use super::object::ResponseRecord;
use super::past::{self, Past};
use super::{CONVERSATION, ids, items};
use crate::error::ApiError;
use crate::registry::Registry;
use crate::sessions::Sessions;
use crate::sessions::record::{SessionRecord, TurnRecord};

/// Most items that one request adds.
pub(crate) const ITEMS_MAX: usize = 20;

/// A conversation of a tenant.
pub(crate) struct Conversation {
    sessions: Sessions,
    tenant: Arc<str>,
    id: String,
    pub(crate) past: Past,
}

impl Conversation {
    /// # Errors
    /// 404.
    pub(crate) async fn of(sessions: &Sessions, tenant: Arc<str>, id: String) -> Result<Self, ApiError> {
        let past = past::of_conversation(sessions, &tenant, &id).await?;
        Ok(Self { sessions: sessions.clone(), tenant, id, past })
    }

    /// Makes one.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) async fn create(
        sessions: &Sessions,
        (tenant, durability): (Arc<str>, Durability),
        registry: &Registry,
        (metadata, items): (Map<String, Value>, Vec<Value>),
    ) -> Result<Self, ApiError> {
        // The model is the one that answers in it first.
        let model = registry.first().unwrap_or_default();
        let record = SessionRecord { metadata, kind: CONVERSATION.to_owned(), ..SessionRecord::default() };
        let settings = Settings { model, durability, meta: record.to_bytes(), ..Settings::default() };
        let name = Arc::clone(&tenant);
        let make = move |store: &Store| {
            let tenant = store.tenant(&name)?.id;
            let info = store.create(tenant, settings)?;
            Past::read(store, tenant, info)
        };
        let past = sessions.call(make).await?;
        let id = ids::conversation(past.info.id);
        let made = Self { sessions: sessions.clone(), tenant, id, past };
        if !items.is_empty() {
            return made.add(items).await;
        }
        Ok(made)
    }

    /// The object `conversation`.
    pub(crate) fn object(&self) -> Value {
        json!({
            "id": self.id,
            "object": "conversation",
            "created_at": self.past.info.created_ms / 1000,
            "metadata": self.past.session.metadata,
        })
    }

    /// Adds items as a turn of no tokens; the next answer's prompt has them.
    ///
    /// # Errors
    /// 409 while an answer is made in it.
    pub(crate) async fn add(self, items: Vec<Value>) -> Result<Self, ApiError> {
        let _claim = self.sessions.claim(self.past.info.id)?;
        let (tenant, session) = (self.past.tenant, self.past.info.id);
        let record = TurnRecord {
            messages: items::messages(&items),
            response: ResponseRecord::of_items(items).to_json(),
            ..TurnRecord::default()
        };
        let append = Append { meta: record.to_bytes(), ..Append::default() };
        let add = move |store: &Store| {
            store.append_turn(tenant, session, append)?;
            Past::read(store, tenant, store.get(tenant, session)?)
        };
        let past = self.sessions.call(add).await?;
        Ok(Self { past, sessions: self.sessions.clone(), tenant: self.tenant.clone(), id: self.id.clone() })
    }

    async fn patch(self, change: impl FnOnce(&mut SessionRecord) + Send + 'static) -> Result<Self, ApiError> {
        let (tenant, session) = (self.past.tenant, self.past.info.id);
        let patch = move |store: &Store| {
            let info: SessionInfo = store.patch(tenant, session, |settings| {
                let mut record = SessionRecord::read(&settings.meta);
                change(&mut record);
                settings.meta = record.to_bytes();
            })?;
            Past::read(store, tenant, info)
        };
        let past = self.sessions.call(patch).await?;
        Ok(Self { past, ..self })
    }

    /// # Errors
    /// What the store says.
    pub(crate) async fn set_metadata(self, metadata: Map<String, Value>) -> Result<Self, ApiError> {
        self.patch(move |record| record.metadata = metadata).await
    }

    /// The items, oldest first.
    pub(crate) fn items(&self) -> Vec<Value> {
        super::read::conversation_items(&self.past)
    }

    /// # Errors
    /// 404.
    pub(crate) fn item(&self, id: &str) -> Result<Value, ApiError> {
        let found = self.items().into_iter().find(|item| item["id"] == id);
        found.ok_or_else(|| ApiError::not_found("item", id, "item_not_found"))
    }

    /// Shows an item no longer, to nobody: the next answer's prompt is without it.
    ///
    /// # Errors
    /// 404.
    pub(crate) async fn remove_item(self, id: String) -> Result<Self, ApiError> {
        self.item(&id)?;
        self.patch(move |record| record.deleted.push(id)).await
    }

    /// # Errors
    /// 409 while an answer is made in it.
    pub(crate) async fn delete(self) -> Result<Value, ApiError> {
        let _claim = self.sessions.claim(self.past.info.id)?;
        let (tenant, session) = (self.past.tenant, self.past.info.id);
        self.sessions.call(move |store| store.delete(tenant, session)).await?;
        Ok(json!({"id": self.id, "object": "conversation.deleted", "deleted": true}))
    }
}
