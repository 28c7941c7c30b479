//! Responses that were made, or are being made: shown, read again as a stream, cancelled, deleted.

use std::collections::VecDeque;
use std::sync::Arc;

use mainstay_engine::store::{Store, Turn};
use serde_json::Value;
use tokio::time::Instant;

use super::answer::{Answering, CANCEL_PATIENCE, Role};
use super::object::{ResponseRecord, Status};
use super::past::{self, Past};
use super::{RESPONSE, items};
use crate::error::ApiError;
use crate::generate::Run;
use crate::job::TimeLimits;
use crate::registry::Registry;
use crate::sessions::Sessions;
use crate::sessions::record::{SessionRecord, TurnRecord};
use crate::sessions::resume::Reader;

/// One response, found.
pub(crate) struct Found {
    sessions: Sessions,
    tenant: Arc<str>,
    id: String,
    past: Past,
}

impl Found {
    /// # Errors
    /// 404.
    pub(crate) async fn of(sessions: &Sessions, tenant: Arc<str>, id: String) -> Result<Self, ApiError> {
        let past = past::of_response(sessions, &tenant, &id).await?;
        Ok(Self { sessions: sessions.clone(), tenant, id, past })
    }

    /// The record of it, as it stands now.
    async fn record(&self) -> Result<ResponseRecord, ApiError> {
        let missing = || ApiError::not_found("response", &self.id, "response_not_found");
        let found = self.past.response(&self.id);
        if let Some(record) = found.filter(|record| !record.is_partial()) {
            return Ok(record.clone());
        }
        // Asked first: whoever takes it up in the meantime shows it as live before this ends.
        let may_go_on = self.sessions.may_go_on(self.past.info.id);
        if let Some(live) = self.sessions.live(self.past.info.id).filter(|live| live.envelope.id() == self.id)
        {
            return ResponseRecord::read(&live.response).ok_or_else(missing);
        }
        let in_flight = past::in_flight(&self.sessions, &self.past).await?;
        let in_flight = in_flight.filter(|record| record.id() == Some(self.id.as_str()));
        let Some(mut record) = in_flight.or_else(|| found.cloned()) else {
            // It has ended since the session was read.
            let past = past::of_response(&self.sessions, &self.tenant, &self.id).await?;
            return past.response(&self.id).cloned().ok_or_else(missing);
        };
        if record.is_background() && may_go_on {
            return Ok(record);
        }
        // Nobody makes it any longer.
        let output = record.list("output").to_vec();
        record.fail(&ApiError::interrupted(), output);
        Ok(record)
    }

    /// The object.
    ///
    /// # Errors
    /// 404 where it was removed meanwhile.
    pub(crate) async fn object(&self) -> Result<Value, ApiError> {
        Ok(self.record().await?.object())
    }

    /// What the client said in it.
    ///
    /// # Errors
    /// As [`Found::object`].
    pub(crate) async fn input_items(&self) -> Result<Vec<Value>, ApiError> {
        Ok(self.record().await?.list("input").to_vec())
    }

    /// Its events again, or on: from an answer that runs, from one that was interrupted, or from one that has ended.
    ///
    /// # Errors
    /// 404, 409 where it cannot go on.
    pub(crate) async fn answering(
        self,
        registry: &Registry,
        interval: Option<std::time::Duration>,
        time: TimeLimits,
    ) -> Result<Answering, ApiError> {
        let record = self.record().await?;
        let mut begun = record.clone();
        begun.set("status", Status::InProgress.name().into());
        begun.set("output", Value::from(record.list("output")[..record.opened()].to_vec()));
        begun.set("rounds", Value::Null);
        for name in ["usage", "incomplete_details", "error", "completed_at", "kv", "session"] {
            begun.set(name, Value::Null);
        }
        let reader = Reader {
            sessions: self.sessions.clone(),
            registry: registry.clone(),
            tenant: Arc::clone(&self.tenant),
            interval,
            time,
            after: 0,
        };
        let found = self.past.response(&self.id);
        if found.is_some_and(|found| !found.is_partial()) {
            return Ok(Answering::again(self.tokens_again(&reader, &record).await, begun, record));
        }
        let session = self.past.info.id;
        if let Some(live) = self.sessions.live(session).filter(|live| live.envelope.id() == self.id) {
            return Ok(match live.feed.clone() {
                Some(feed) => Answering::heard(feed, record, live),
                None => Answering::new(reader.following(&live), begun, Role::Follower(live)),
            });
        }
        let is_in_flight = past::in_flight(&self.sessions, &self.past).await?.is_some();
        if found.is_some() && !is_in_flight {
            // It was interrupted between two of its answers.
            return Ok(Answering::again(VecDeque::new(), begun, record));
        }
        let (run, live) = reader.taken_up(self.past.tenant, session).await?;
        for name in ["output", "rounds"] {
            begun.set(name, record.0.get(name).cloned().unwrap_or_default());
        }
        Ok(Answering::new(run, begun, Role::Maker(live)))
    }

    /// The runs that read the response's tokens again, where all of them stand in its session.
    async fn tokens_again(&self, reader: &Reader, record: &ResponseRecord) -> VecDeque<Run> {
        let is_own = |turn: &&Arc<Turn>| {
            let record = TurnRecord::read(&turn.meta);
            ResponseRecord::read(&record.response).is_some_and(|found| found.id() == Some(self.id.as_str()))
        };
        let mut runs = VecDeque::new();
        for turn in self.past.turns.iter().filter(is_own) {
            let Ok(run) = reader.again(turn, &self.past.info).await else { return VecDeque::new() };
            runs.push_back(run);
        }
        if runs.len() == record.rounds() + 1 { runs } else { VecDeque::new() }
    }

    /// Ends a response that is made in the background.
    ///
    /// # Errors
    /// 400 where it is not one.
    pub(crate) async fn cancel(self) -> Result<Value, ApiError> {
        let record = self.record().await?;
        if !record.is_background() {
            let message = "only a response that is made in the background can be cancelled";
            return Err(ApiError::bad_request(message));
        }
        self.stop().await;
        let again = Self::of(&self.sessions, self.tenant, self.id).await?;
        again.object().await
    }

    /// Asks whoever makes it to end it, and waits for that.
    async fn stop(&self) {
        let session = self.past.info.id;
        let until = Instant::now() + CANCEL_PATIENCE;
        while let Some(live) = self.sessions.live(session).filter(|live| live.envelope.id() == self.id) {
            live.cancel();
            if Instant::now() > until {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// Shows it no longer. The session goes with the last of its responses; responses that follow this one stay.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) async fn delete(self) -> Result<(), ApiError> {
        self.stop().await;
        let (tenant, session, id) = (self.past.tenant, self.past.info.id, self.id);
        let delete = move |store: &Store| {
            let info = store.patch(tenant, session, |settings| {
                let mut record = SessionRecord::read(&settings.meta);
                record.deleted.push(id.clone());
                settings.meta = record.to_bytes();
            })?;
            let past = Past::read(store, tenant, info)?;
            let is_left = |record: &ResponseRecord| record.id().is_none_or(|id| past.response(id).is_some());
            if past.session.kind == RESPONSE && !past.records.iter().any(|placed| is_left(&placed.record)) {
                store.delete(tenant, session)?;
            }
            Ok(())
        };
        self.sessions.call(delete).await
    }
}

/// The items of a conversation, oldest first.
pub(crate) fn conversation_items(past: &Past) -> Vec<Value> {
    past.items(&past.records).into_iter().map(items::shown).collect()
}
