//! Begins a response: finds or makes its session, and the tokens that stand for the conversation.

use std::sync::Arc;

use mainstay_engine::store::{At, Durability, Settings, Store};
use serde_json::Value;

use super::object::ResponseRecord;
use super::past::{self, Past, Placed};
use super::request::{Before, ResponseRequest, renamed};
use super::{CONVERSATION, RESPONSE, items};
use crate::error::ApiError;
use crate::openai::chat::ChatRequest;
use crate::openai::fields::Fields;
use crate::openai::session_fields::Truncation;
use crate::prompt::{self, Prompt};
use crate::registry::Model;
use crate::sessions::history::{self, Fit, History};
use crate::sessions::record::SessionRecord;
use crate::sessions::turn::Claimed;
use crate::sessions::{Sessions, opening::stale_part};

const TRUNCATED: &str = "truncated";

/// Whether the response is written to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// With this durability, where its session is new.
    Yes(Durability),
    No,
}

/// A conversation that can be answered.
pub(crate) struct Planned {
    pub(crate) chat: ChatRequest,
    pub(crate) input: Vec<Value>,
    pub(crate) fit: Fit,
    /// The chat messages that the tokens after the kept turns stand for.
    pub(crate) messages: Vec<Value>,
    /// Records of the turns that its tokens take the place of.
    pub(crate) replaced: Vec<ResponseRecord>,
    /// Records that are not shown to the model.
    pub(crate) skipped: usize,
    pub(crate) changed: Option<&'static str>,
}

/// What stands before the response that is asked for.
///
/// # Errors
/// 404, or 409 where its answer is still being made.
pub(crate) async fn before(
    sessions: Option<&Sessions>,
    tenant: &Arc<str>,
    asked: &ResponseRequest,
) -> Result<Option<Past>, ApiError> {
    match &asked.before {
        Before::Nothing => Ok(None),
        Before::Conversation(id) => {
            let sessions = sessions.ok_or_else(ApiError::no_sessions)?;
            past::of_conversation(sessions, tenant, id).await.map(Some)
        }
        Before::Response(id) => {
            let missing = || ApiError::no_previous_response(id);
            let sessions = sessions.ok_or_else(missing)?;
            let found = past::of_response(sessions, tenant, id).await;
            let mut past = found.map_err(|e| if e.status.as_u16() == 404 { missing() } else { e })?;
            let is_made = past.response(id).is_some_and(ResponseRecord::is_partial)
                && sessions.live(past.info.id).is_some_and(|live| live.envelope.id() == id);
            if is_made || !past.cut_after(id) {
                let message = format!("the response `{id}` has not ended; wait for its end");
                return Err(ApiError::conflict(message, "response_in_progress"));
            }
            Ok(Some(past))
        }
    }
}

/// Makes the conversation tokens. Takes its time: not for a thread that others wait for.
///
/// # Errors
/// 400, where the request is wrong or does not fit.
pub(crate) fn plan(
    asked: &ResponseRequest,
    model: &Arc<Model>,
    past: Option<&Past>,
) -> Result<Planned, ApiError> {
    let records = past.map_or(&[][..], Past::shown);
    let skipped = past.map_or(0, |past| past.records.len() - records.len());
    let known = past.map_or_else(Vec::new, |past| past.items(&past.records));
    let input = items::resolve(asked.input.clone(), &known)?;
    items::check_results(&input, &known)?;
    let identity = &model.identity;
    let stale = past.and_then(|past| stale_part(&past.session, identity));
    let changed = stale.or_else(|| past.and_then(|past| past.session.changed(identity)));
    let mut history = History::of(past.map(|past| past.turns.clone()).unwrap_or_default());
    if skipped > 0 {
        // Tokens of what is not shown stand before those of what is.
        history.truncate(0);
    }
    let items_of = |records: &[Placed]| past.map_or_else(Vec::new, |past| past.items(records));
    let known_of = |records: &[Placed]| {
        let has_answer = records.last().is_some_and(|last| !last.record.list("output").is_empty());
        let items = items_of(records);
        if has_answer { asked.answered_len(&items) } else { asked.messages_len(&items) }
    };
    let read = |records: &[Placed]| -> Result<(ChatRequest, usize), ApiError> {
        let shown = items_of(records);
        let chat = asked.chat(&[shown.as_slice(), &input, &asked.opened].concat());
        let chat = ChatRequest::read(&Fields::of(&chat), model).map_err(renamed)?;
        Ok((chat, known_of(records)))
    };
    let (chat, known_len) = read(records)?;
    let fit = match stale {
        Some(part) => history::whole(model, &chat.input, chat.input.render(model)?, Some(part))?,
        None => {
            let known_len = known_len.min(chat.input.messages.len());
            history.fit(model, &chat.input, &chat.input.messages[..known_len])?
        }
    };
    let fits = check_length(model, &chat, &fit);
    let (chat, fit, skipped) = match fits {
        Ok(()) => (chat, fit, skipped),
        Err(error) if asked.truncation == Truncation::Disabled => return Err(error),
        Err(error) => {
            let cut = truncated(records.len(), |dropped| {
                let (chat, _) = read(&records[dropped..])?;
                let fit = history::whole(model, &chat.input, chat.input.render(model)?, Some(TRUNCATED))?;
                Ok(check_length(model, &chat, &fit).is_ok().then_some((chat, fit, skipped + dropped)))
            });
            cut?.ok_or(error)?
        }
    };
    let kept_records = past.map_or(0, |past| past.records.iter().filter(|r| r.holder <= fit.kept).count());
    let replaced = past.map_or(&[][..], |past| &past.records[kept_records.min(past.records.len())..]);
    let shown_kept = &records[..kept_records.saturating_sub(skipped).min(records.len())];
    let kept_len = if fit.kept == 0 { 0 } else { known_of(shown_kept) };
    let messages = chat.input.messages[kept_len.min(chat.input.messages.len())..].to_vec();
    let replaced = replaced.iter().map(|placed| placed.record.clone()).collect();
    Ok(Planned { chat, input, fit, messages, replaced, skipped, changed })
}

/// The least number of records to leave out, from the oldest on, and what `without` makes then.
fn truncated<T>(
    records: usize,
    without: impl Fn(usize) -> Result<Option<T>, ApiError>,
) -> Result<Option<T>, ApiError> {
    if records == 0 {
        return Ok(None);
    }
    let Some(mut found) = without(records)? else { return Ok(None) };
    let (mut low, mut high) = (1, records);
    while low < high {
        let middle = low.midpoint(high);
        match without(middle)? {
            Some(planned) => (found, high) = (planned, middle),
            None => low = middle + 1,
        }
    }
    Ok(Some(found))
}

fn check_length(model: &Model, chat: &ChatRequest, fit: &Fit) -> Result<(), ApiError> {
    prompt::check_length(model, &Prompt::of(fit.tokens.clone()), chat.max_tokens, "input")
}

/// The session that the response is written to: that of what stands before it where it is the last there, else a fork
/// of it, or a new one.
///
/// # Errors
/// 409 where a response is being made in the conversation.
pub(crate) async fn claim(
    sessions: &Sessions,
    (tenant, durability): (&Arc<str>, Durability),
    model: &Arc<Model>,
    past: Option<Past>,
) -> Result<(Claimed, u32), ApiError> {
    let sessions = sessions.clone();
    let Some(past) = past else {
        let (name, model) = (Arc::clone(tenant), Arc::clone(model));
        let make = move |store: &Store| {
            let tenant = store.tenant(&name)?.id;
            let record = SessionRecord { kind: RESPONSE.to_owned(), ..SessionRecord::default() };
            let settings = Settings {
                model: model.id.clone(),
                root: model.root(&name, b"", 0)?,
                durability,
                meta: record.to_bytes(),
                ..Settings::default()
            };
            Ok((tenant, store.create(tenant, settings)?))
        };
        let (tenant, info) = sessions.call(make).await?;
        let claim = sessions.claim(info.id)?;
        let (id, settings) = (info.id, info.settings);
        return Ok((Claimed { sessions, claim, tenant, id, settings, is_new: true }, 0));
    };
    let (tenant, id, turns) = (past.tenant, past.info.id, past.info.turn_count);
    let is_conversation = past.session.kind == CONVERSATION;
    if past.is_whole {
        match sessions.claim(id) {
            Ok(claim) => {
                let settings = past.info.settings;
                return Ok((Claimed { sessions, claim, tenant, id, settings, is_new: false }, turns));
            }
            Err(busy) if is_conversation => return Err(busy),
            Err(_) => {}
        }
    }
    let kept = past.turns.last().map_or(0, |turn| turn.number);
    let mut record = past.session;
    RESPONSE.clone_into(&mut record.kind);
    let fork = move |store: &Store| {
        let made = store.fork(tenant, id, At::Turn(kept), None)?;
        store.patch(tenant, made.id, |settings| settings.meta = record.to_bytes())
    };
    let made = sessions.call(fork).await?;
    let claim = sessions.claim(made.id)?;
    let (id, settings, turns) = (made.id, made.settings, made.turn_count);
    Ok((Claimed { sessions, claim, tenant, id, settings, is_new: true }, turns))
}
