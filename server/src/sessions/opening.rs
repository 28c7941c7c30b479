//! Begins a turn: claims its session, finds what of the session's tokens stands for the conversation, forks where the
//! conversation went another way.

use std::sync::Arc;

use mainstay_engine::Identity;
use mainstay_engine::store::{At, SessionInfo, Store, StoreError, TenantId};
use serde_json::Value;

use super::history::{self, Fit, History};
use super::record::SessionRecord;
use super::turn::Claimed;
use super::{Claim, Sessions};
use crate::error::ApiError;
use crate::openai::session_fields::{SessionFields, SessionMode, Truncation};
use crate::prompt::{self, ChatInput, Prompt};
use crate::registry::{Model, Registry};

const TRUNCATED: &str = "truncated";

/// Parts of a model without which its tokens mean something else.
const TOKEN_PARTS: [&str; 2] = ["tokenizer", "template"];

/// What a client asks of a session.
pub(crate) struct Asked {
    pub(crate) registry: Registry,
    pub(crate) model: Arc<Model>,
    pub(crate) tenant: Arc<str>,
    pub(crate) session: SessionFields,
    pub(crate) input: ChatInput,
    /// Tokens to generate, if the client says.
    pub(crate) max_tokens: Option<usize>,
}

/// A turn that can begin.
pub(crate) struct Opened {
    pub(crate) claimed: Claimed,
    /// Turns that the session has.
    pub(crate) turns: u32,
    pub(crate) fit: Fit,
    /// The messages that this turn adds.
    pub(crate) messages: Vec<Value>,
    /// The part of the model that has changed since the last turn.
    pub(crate) changed: Option<&'static str>,
}

/// How a conversation goes on in a session.
struct Planned {
    fit: Fit,
    messages: Vec<Value>,
    /// The turn after which it goes another way than the session.
    fork: Option<usize>,
}

/// Begins a turn.
///
/// # Errors
/// What the client has to know before anything was changed.
pub(crate) async fn open(sessions: &Sessions, asked: Asked) -> Result<Opened, ApiError> {
    let (tenant, id) = sessions.find(&asked.tenant, asked.session.session.clone()).await?;
    let claim = sessions.claim(id)?;
    let read = move |store: &Store| Ok((store.get(tenant, id)?, store.turns(tenant, id)?));
    let (info, turns) = sessions.call(read).await?;
    // Of a model that is not served here any longer, the session goes on with another.
    let (own, named) = (&info.settings.model, &asked.model.id);
    if asked.registry.is_other(own, named) {
        return Err(ApiError::of_other_model(own, named));
    }
    if let Some(expected) = asked.session.expected_turn.filter(|turn| *turn != info.turn_count) {
        return Err(StoreError::Conflict { expected, found: info.turn_count }.into());
    }
    let identity = &asked.model.identity;
    let record = SessionRecord::read(&info.settings.meta);
    let stale = stale_part(&record, identity);
    let changed = stale.or_else(|| record.changed(identity));
    let plan = move || plan(&asked, History::of(turns), stale);
    let planned = tokio::task::spawn_blocking(plan)
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("rendering the conversation failed")))?;
    let (claimed, turns) = claimed(sessions, (claim, tenant, info), planned.fork).await?;
    Ok(Opened { claimed, turns, fit: planned.fit, messages: planned.messages, changed })
}

/// The part of the model that has changed so that its tokens mean something else.
pub(crate) fn stale_part(record: &SessionRecord, now: &Identity) -> Option<&'static str> {
    TOKEN_PARTS.into_iter().find(|part| differs(record, now, part))
}

fn differs(record: &SessionRecord, now: &Identity, part: &str) -> bool {
    let now = now.parts().iter().find(|(name, _)| *name == part).map(|(_, value)| value.as_str());
    !record.identity.is_empty() && record.identity.get(part).and_then(Value::as_str) != now
}

/// The session that the turn goes to: the one that was named, or a fork of it.
async fn claimed(
    sessions: &Sessions,
    (claim, tenant, info): (Claim, TenantId, SessionInfo),
    fork: Option<usize>,
) -> Result<(Claimed, u32), ApiError> {
    let sessions = sessions.clone();
    let Some(turn) = fork.and_then(|turn| u32::try_from(turn).ok()) else {
        let (id, settings, turns) = (info.id, info.settings, info.turn_count);
        return Ok((Claimed { sessions, claim, tenant, id, settings, is_new: false }, turns));
    };
    let of = info.id;
    let made = sessions.call(move |store| store.fork(tenant, of, At::Turn(turn), None)).await?;
    let claim = sessions.claim(made.id)?;
    let (id, settings) = (made.id, made.settings);
    Ok((Claimed { sessions, claim, tenant, id, settings, is_new: true }, made.turn_count))
}

fn plan(asked: &Asked, mut history: History, stale: Option<&'static str>) -> Result<Planned, ApiError> {
    let sent = &asked.input.messages;
    let (common, known) = match asked.session.mode {
        SessionMode::Append => (history.len(), 0),
        SessionMode::Full => history.common(sent),
    };
    let fork = (common < history.len()).then_some(common);
    history.truncate(common);
    let new = &sent[known..];
    let input = asked.input.with([history.messages(0), new.to_vec()].concat(), asked.input.ending);
    let fit = match stale {
        Some(part) if history.len() > 0 => {
            history::whole(&asked.model, &input, input.render(&asked.model)?, Some(part))?
        }
        _ => history.fit(&asked.model, &input, &history.messages(0))?,
    };
    if let Err(error) = asked.check_length(&fit) {
        return match asked.session.truncation {
            Truncation::Auto => truncated(asked, &history, new)?.ok_or(error),
            Truncation::Disabled => Err(error),
        };
    }
    let messages = [history.messages(fit.kept), new.to_vec()].concat();
    Ok(Planned { fit, messages, fork })
}

/// The conversation without its oldest turns, as few of them as must go; `None` where none would be enough.
fn truncated(asked: &Asked, history: &History, new: &[Value]) -> Result<Option<Planned>, ApiError> {
    let without = |turns: usize| -> Result<Option<Planned>, ApiError> {
        let messages = [history.rules(turns), history.messages(turns), new.to_vec()].concat();
        let input = asked.input.with(messages.clone(), asked.input.ending);
        let rendered = input.render(&asked.model)?;
        let fit = history::whole(&asked.model, &input, rendered, Some(TRUNCATED))?;
        let fits = asked.check_length(&fit).is_ok();
        Ok(fits.then_some(Planned { fit, messages, fork: Some(0) }))
    };
    if history.len() == 0 {
        return Ok(None);
    }
    let Some(mut found) = without(history.len())? else { return Ok(None) };
    // Turns below `low` are known to be too few to leave out.
    let (mut low, mut high) = (1, history.len());
    while low < high {
        let middle = low.midpoint(high);
        match without(middle)? {
            Some(planned) => (found, high) = (planned, middle),
            None => low = middle + 1,
        }
    }
    Ok(Some(found))
}

impl Asked {
    fn check_length(&self, fit: &Fit) -> Result<(), ApiError> {
        prompt::check_length(&self.model, &Prompt::of(fit.tokens.clone()), self.max_tokens, "messages")
    }
}
