//! What stands before a response: the turns of its session, and the items that they are.

use std::sync::Arc;

use mainstay_engine::store::{SessionInfo, Store, StoreError, TenantId, Turn};
use serde_json::{Value, json};

use super::object::ResponseRecord;
use super::{ids, items};
use crate::error::ApiError;
use crate::sessions::record::{SessionRecord, TurnRecord};
use crate::sessions::{Sessions, shown};

/// A record, and how many turns of the session stand when it does.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub(crate) turns: usize,
    /// The number of the turn that holds it: one more where its own tokens were replaced.
    pub(crate) holder: usize,
    pub(crate) record: ResponseRecord,
}

/// A session as the Responses API sees it, or its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Past {
    pub(crate) tenant: TenantId,
    pub(crate) info: SessionInfo,
    pub(crate) session: SessionRecord,
    pub(crate) turns: Vec<Arc<Turn>>,
    /// Oldest first; those whose tokens were replaced among them.
    pub(crate) records: Vec<Placed>,
    /// Nothing of the session was cut off.
    pub(crate) is_whole: bool,
}

impl Past {
    /// # Errors
    /// What the store says.
    pub(crate) fn read(store: &Store, tenant: TenantId, info: SessionInfo) -> Result<Self, StoreError> {
        let turns = store.turns(tenant, info.id)?;
        let session = SessionRecord::read(&info.settings.meta);
        let records = records_of(&turns, &info);
        Ok(Self { tenant, info, session, turns, records, is_whole: true })
    }

    /// Where a response stands, if it does and was not deleted.
    fn place(&self, id: &str) -> Option<usize> {
        let is_deleted = self.session.deleted.iter().any(|deleted| deleted == id);
        let place = self.records.iter().rposition(|placed| placed.record.id() == Some(id));
        place.filter(|_| !is_deleted)
    }

    /// The record of a response.
    pub(crate) fn response(&self, id: &str) -> Option<&ResponseRecord> {
        self.place(id).map(|at| &self.records[at].record)
    }

    /// Cuts off what came after a response; `false` where it is not there.
    pub(crate) fn cut_after(&mut self, id: &str) -> bool {
        let Some(at) = self.place(id) else { return false };
        self.records.truncate(at + 1);
        self.is_whole = at + 1 == self.records.len() && self.records[at].turns == self.turns.len();
        self.turns.truncate(self.records[at].turns);
        true
    }

    /// The records that are still shown to the model.
    pub(crate) fn shown(&self) -> &[Placed] {
        let skipped = self.records.last().map_or(0, |placed| placed.record.skipped());
        &self.records[skipped.min(self.records.len())..]
    }

    /// The items of some of the records, without those that were deleted.
    pub(crate) fn items(&self, records: &[Placed]) -> Vec<Value> {
        let items = records.iter().flat_map(|placed| placed.record.items());
        let is_deleted = |item: &&Value| {
            item["id"].as_str().is_some_and(|id| self.session.deleted.iter().any(|deleted| deleted == id))
        };
        items.filter(|item| !is_deleted(item)).cloned().collect()
    }
}

fn records_of(turns: &[Arc<Turn>], info: &SessionInfo) -> Vec<Placed> {
    let mut records: Vec<Placed> = Vec::new();
    for (at, turn) in turns.iter().enumerate() {
        let written = TurnRecord::read(&turn.meta);
        let mut record = ResponseRecord::read(&written.response)
            .unwrap_or_else(|| ResponseRecord::of_items(items::of_messages(written.all_messages().iter())));
        if record.id().is_some() {
            let name = &info.settings.name;
            record.set("kv", written.kv);
            record.set("session", json!({"id": shown(info.id), "name": name, "turn": turn.number}));
        }
        for replaced in record.take_replaced() {
            records.push(Placed { turns: at, holder: at + 1, record: replaced });
        }
        // A response of several turns is what its last one says.
        let goes_on = |before: &Placed| before.record.is_partial() && before.record.id() == record.id();
        if records.last().is_some_and(goes_on) {
            records.pop();
        }
        records.push(Placed { turns: at + 1, holder: at + 1, record });
    }
    records
}

/// The session of a response, whole.
///
/// # Errors
/// 404 where there is none of this tenant's, or the response was deleted; `missing` makes it.
pub(crate) async fn of_response(sessions: &Sessions, tenant: &Arc<str>, id: &str) -> Result<Past, ApiError> {
    let missing = || ApiError::not_found("response", id, "response_not_found");
    let session = ids::session_of_response(id).ok_or_else(missing)?;
    let past = read(sessions, tenant, session).await?.ok_or_else(missing)?;
    if past.response(id).is_some() || is_in_flight(sessions, &past, id).await? {
        return Ok(past);
    }
    // It may have ended between the two looks.
    let past = read(sessions, tenant, session).await?.ok_or_else(missing)?;
    if past.response(id).is_some() { Ok(past) } else { Err(missing()) }
}

/// The session of a conversation.
///
/// # Errors
/// 404.
pub(crate) async fn of_conversation(
    sessions: &Sessions,
    tenant: &Arc<str>,
    id: &str,
) -> Result<Past, ApiError> {
    let missing = || ApiError::not_found("conversation", id, "conversation_not_found");
    let session = ids::session_of_conversation(id).ok_or_else(missing)?;
    let past = read(sessions, tenant, session).await?.ok_or_else(missing)?;
    if past.session.kind == super::CONVERSATION { Ok(past) } else { Err(missing()) }
}

async fn read(
    sessions: &Sessions,
    tenant: &Arc<str>,
    id: mainstay_engine::store::SessionId,
) -> Result<Option<Past>, ApiError> {
    let name = Arc::clone(tenant);
    let read = move |store: &Store| {
        let tenant = store.tenant(&name)?.id;
        match store.get(tenant, id) {
            Ok(info) => Past::read(store, tenant, info).map(Some),
            Err(StoreError::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    };
    sessions.call(read).await
}

async fn is_in_flight(sessions: &Sessions, past: &Past, id: &str) -> Result<bool, ApiError> {
    if sessions.live(past.info.id).is_some_and(|live| live.envelope.id() == id) {
        return Ok(true);
    }
    Ok(in_flight(sessions, past).await?.is_some_and(|record| record.id() == Some(id)))
}

/// The response whose answer was being made when it stopped, or is being made.
pub(crate) async fn in_flight(sessions: &Sessions, past: &Past) -> Result<Option<ResponseRecord>, ApiError> {
    let (tenant, id) = (past.tenant, past.info.id);
    let answer = sessions.call(move |store| store.answer(tenant, id)).await?;
    let record = answer.and_then(|found| crate::sessions::resume::Meta::read(&found.meta));
    Ok(record.and_then(|(meta, _)| ResponseRecord::read(&meta.plan.record.response)))
}
