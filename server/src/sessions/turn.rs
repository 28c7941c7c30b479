//! A turn of a session under way: what is written to the journal while its answer is drawn, and at its end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mainstay_engine::store::{
    Append, Appended, Durability, InFlight, SessionId, Settings, Store, StoreError, TenantId,
};
use mainstay_engine::{FinishReason, Score};
use mainstay_models::tokenizer::ShowSpecial;
use serde_json::json;
use tokio::time::Instant;

use super::live::Live;
use super::record::{SessionRecord, TurnRecord};
use super::resume::Meta;
use super::{Claim, Sessions, shown};
use crate::choice::Ending;
use crate::error::ApiError;
use crate::generate::Closing;
use crate::job::Job;
use crate::kv::{self, Reused};
use crate::openai::options::ShowStop;
use crate::openai::usage::Usage;
use crate::output::Message;
use crate::prefill::prefill;
use crate::reply::finish_reason;

/// How long a turn of level `full` waits for its pages to be handed to the store.
const FULL_PATIENCE: Duration = Duration::from_secs(10);

/// Tokens of the prompt with which the first ones of the answer become text.
const CONTEXT_TOKENS: usize = 6;

/// A session, as one that has claimed it sees it.
pub(crate) struct Claimed {
    pub(crate) sessions: Sessions,
    pub(crate) claim: Claim,
    pub(crate) tenant: TenantId,
    pub(crate) id: SessionId,
    pub(crate) settings: Settings,
    /// It was made for this turn.
    pub(crate) is_new: bool,
}

/// What the turn will write to its session, but for the answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    pub(crate) record: TurnRecord,
    /// Turns that the session has, and those of them that stay.
    pub(crate) turns: u32,
    pub(crate) kept: u32,
    /// What was asked for, if it was.
    pub(crate) durability: Option<Durability>,
    /// Why tokens of earlier turns were given up.
    pub(crate) reason: Option<String>,
    /// The part of the model that is not what it was at the turn before.
    pub(crate) changed: Option<String>,
}

/// What a turn was answered with.
#[derive(Clone, Debug)]
pub(crate) struct Answered {
    /// As the model wrote it.
    pub(crate) text: String,
    pub(crate) message: Message,
    pub(crate) ending: Ending,
    pub(crate) usage: Usage,
    pub(crate) reused: Reused,
}

/// A turn under way. Where it is dropped before [`Turn::commit`], its answer stays in flight: all tokens drawn so far
/// are written, and can be gone on with.
pub(crate) struct Turn {
    claimed: Option<Claimed>,
    plan: Plan,
    live: Arc<Live>,
    journal: Arc<Journal>,
    interval: Option<Duration>,
    extended_at: Instant,
    /// It was interrupted, and goes on.
    is_resumed: bool,
}

/// Writes the tokens of an answer in flight.
struct Journal {
    /// Tokens of the answer that are written; `None` while, and from the moment that, none are to be.
    written: Mutex<Option<usize>>,
    is_writing: AtomicBool,
}

impl Turn {
    /// `interval` is the time between two entries of the journal; without it, an answer is never in flight there.
    pub(crate) fn new(claimed: Claimed, plan: Plan, live: Arc<Live>, interval: Option<Duration>) -> Self {
        claimed.claim.show(&live);
        let journal = Arc::new(Journal { written: Mutex::new(None), is_writing: AtomicBool::new(false) });
        let (claimed, extended_at) = (Some(claimed), Instant::now());
        Self { claimed, plan, live, journal, interval, extended_at, is_resumed: false }
    }

    /// Goes on with an answer of which so many tokens are written.
    pub(crate) fn resumed(mut self, written: usize) -> Self {
        self.is_resumed = true;
        *self.journal.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(written);
        self
    }

    /// What the Responses API is to find with the turn.
    pub(crate) fn describe(&mut self, response: serde_json::Value) {
        self.plan.record.response = response;
    }

    /// Writes down that an answer begins.
    ///
    /// # Errors
    /// What the store refuses.
    pub(crate) async fn begin_answer(&mut self, job: &Job) -> Result<(), ApiError> {
        let Some(claimed) = &mut self.claimed else { return Ok(()) };
        claimed.is_new = false;
        // What goes on without a reader has to be found after a crash.
        if self.interval.is_none() && self.plan.record.response["echo"]["background"] != true {
            return Ok(());
        }
        let prompt = &job.prompts[0].tokens;
        let tokens = prompt[prompt.len() - self.plan.record.sent_len..].to_vec();
        let tenant = job.tenant.to_string();
        let meta =
            Meta { plan: self.plan.clone(), keep: job.keep.clone(), tenant }.to_bytes(&job.model.identity);
        let (tenant, id, turns) = (claimed.tenant, claimed.id, self.plan.turns);
        let in_flight = InFlight { meta, tokens };
        let begun = move |store: &Store| store.begin_answer(tenant, id, Some(turns), in_flight);
        claimed.sessions.call(begun).await?;
        *self.journal.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(0);
        Ok(())
    }

    /// Takes a token. Writing happens elsewhere, one entry at a time.
    pub(crate) fn drew(&mut self, token: u32, score: Option<&Score>) {
        self.live.drew(token, score);
        let (Some(interval), Some(claimed)) = (self.interval, &self.claimed) else { return };
        if self.extended_at.elapsed() < interval || self.journal.is_writing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.extended_at = Instant::now();
        let (journal, live) = (Arc::clone(&self.journal), Arc::clone(&self.live));
        let (store, tenant, id) = (Arc::clone(&claimed.sessions.store), claimed.tenant, claimed.id);
        tokio::task::spawn_blocking(move || {
            journal.extend(&store, (tenant, id), &live);
            journal.is_writing.store(false, Ordering::Release);
        });
    }

    pub(crate) fn finished(&self, reason: FinishReason) {
        self.live.finished(reason);
    }

    /// Tells those who read along. The answer stays in flight.
    pub(crate) fn failed(self, error: &ApiError) {
        self.live.closed(&Err(error.clone()));
    }

    /// Appends the turn to its session, and tells how the answer closes. Goes on to its end also where nobody waits for
    /// it any longer.
    ///
    /// # Errors
    /// Where the turn was not made as durable as it was to be.
    pub(crate) async fn commit(self, job: &Job, answered: Answered) -> Result<Closing, ApiError> {
        let written = tokio::spawn(self.write(job.clone(), answered)).await;
        written.unwrap_or_else(|_| Err(ApiError::internal("writing the turn failed")))
    }

    async fn write(mut self, job: Job, answered: Answered) -> Result<Closing, ApiError> {
        let Some(claimed) = self.claimed.take() else { return Err(ApiError::internal("the turn has ended")) };
        let end = self.append(&job, &claimed, answered).await;
        self.live.closed(&end);
        if end.is_err() {
            self.claimed = Some(claimed);
        }
        end
    }

    /// Has the pages computed of an answer that was interrupted: where all of it was drawn before, nobody else does.
    async fn compute(&self, job: &Job) -> Result<(), ApiError> {
        let mut tokens = [&job.prompts[0].tokens[..], &self.live.drawn(0)].concat();
        // What follows the last token is no part of the turn.
        tokens.pop();
        if !tokens.is_empty() {
            prefill(&job.model, &job.tenant, tokens, job.keep.clone()).await?;
        }
        Ok(())
    }

    async fn append(
        &mut self,
        job: &Job,
        claimed: &Claimed,
        answered: Answered,
    ) -> Result<Closing, ApiError> {
        let level = match (claimed.settings.durability, self.plan.durability) {
            (Durability::Ephemeral, _) => Durability::Ephemeral,
            (own, asked) => asked.unwrap_or(own).max(Durability::Async),
        };
        if level == Durability::Full {
            if self.is_resumed {
                self.compute(job).await?;
            }
            kv::settle_within(&job.model, &job.keep, FULL_PATIENCE).await;
        } else {
            kv::settle(&job.model, &job.keep).await;
        }
        let Answered { text, message, ending, usage, mut reused } = answered;
        reused.explain(self.plan.reason.as_deref(), self.plan.changed.as_deref());
        let drawn = self.live.drawn(0);
        let prompt = &job.prompts[0].tokens;
        let (stands, drawn_text) = standing(job, (prompt, &drawn), (&text, &ending));
        let mut record = self.plan.record.clone();
        record.answer = message.to_json();
        record.finish_reason = finish_reason(&ending, !message.calls.is_empty()).to_owned();
        record.usage = usage.to_json();
        record.kv = reused.to_json(level);
        record.text += &drawn_text;
        record.dropped = drawn[stands..].to_vec();
        let sent = &prompt[prompt.len() - record.sent_len..];
        let append = Append {
            expected_turn: Some(self.plan.turns),
            kept_turns: Some(self.plan.kept),
            tokens: [sent, &drawn[..stands]].concat(),
            meta: record.to_bytes(),
            durability: self.plan.durability,
        };
        let writing = Writing {
            place: (claimed.tenant, claimed.id),
            append,
            settings: settings_now(job, &claimed.settings, prompt.len() + stands)?,
            old: claimed.settings.clone(),
            level,
        };
        let journal = Arc::clone(&self.journal);
        let appended = claimed.sessions.call(move |store| journal.append(store, writing)).await?;
        let name = &claimed.settings.name;
        Ok(Closing {
            kv: reused.to_json(appended.durability),
            session: Some(json!({"id": shown(claimed.id), "name": name, "turn": appended.turn})),
            usage,
        })
    }
}

/// All that is written at a turn's end.
struct Writing {
    place: (TenantId, SessionId),
    append: Append,
    old: Settings,
    /// What they should be from now on.
    settings: Settings,
    level: Durability,
}

impl Journal {
    /// Writes the tokens that are not written yet. A failure is met again at the turn's end.
    fn extend(&self, store: &Store, (tenant, id): (TenantId, SessionId), live: &Live) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(len) = *written else { return };
        let tokens = live.drawn(len);
        if tokens.is_empty() {
            return;
        }
        *written = match store.extend_answer(tenant, id, &tokens) {
            Ok(()) => Some(len + tokens.len()),
            Err(error) => {
                tracing::debug!(%error, session = %id, "the tokens of an answer were not written");
                None
            }
        };
    }

    /// Appends the turn. What was in flight is over with it, or stands as it was where this fails.
    fn append(&self, store: &Store, writing: Writing) -> Result<Appended, StoreError> {
        // Held, so that no entry of the answer comes after its end.
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let (tenant, id) = writing.place;
        if writing.level == Durability::Full && writing.old.root != writing.settings.root {
            // By it the store finds the pages that must be on disk before the turn.
            store.patch(tenant, id, |settings| settings.root = writing.settings.root)?;
        }
        let appended = store.append_turn(tenant, id, writing.append)?;
        *written = None;
        let (old, new) = (&writing.old, &writing.settings);
        if (old.root, &old.meta, &old.model) != (new.root, &new.meta, &new.model) {
            let brought_up = store.patch(tenant, id, |settings| {
                settings.root = new.root;
                settings.model.clone_from(&new.model);
                let mut record = SessionRecord::read(&settings.meta);
                record.identity = SessionRecord::read(&new.meta).identity;
                settings.meta = record.to_bytes();
            });
            if let Err(error) = brought_up {
                // The turn is there. The next one meets an older description, and computes more than it must.
                tracing::warn!(%error, session = %id, "what the session's model is was not written");
            }
        }
        Ok(appended)
    }
}

/// The settings of a session of this many tokens after a turn by this model.
fn settings_now(job: &Job, old: &Settings, len: usize) -> Result<Settings, ApiError> {
    let model = &job.model;
    let mut record = SessionRecord::read(&old.meta);
    let identity = &model.identity;
    let mut settings = old.clone();
    if record.identity.is_empty() || record.changed(identity).is_some() {
        record.set_identity(identity);
        settings.meta = record.to_bytes();
    }
    settings.root = model.root(&job.tenant, &job.keep.salt, len)?;
    settings.model.clone_from(&model.id);
    Ok(settings)
}

/// How many of the drawn tokens are part of the session, and their text, special tokens shown. Those that only ended
/// the answer as the client wished are not: in the next prompt the template goes on where the client's text ends.
fn standing(
    job: &Job,
    (prompt, drawn): (&[u32], &[u32]),
    (answer, ending): (&str, &Ending),
) -> (usize, String) {
    let tokenizer = &job.model.served.tokenizer;
    let mut stands = drawn.len();
    match ending {
        Ending::String(_) => {
            let is_said = |len: usize| answer.starts_with(&job.decoder().text(&drawn[..len]));
            while stands > 0 && !is_said(stands) {
                stands -= 1;
            }
        }
        Ending::Token(token)
            if job.options.show_stop == ShowStop::No && !job.model.served.generation.eos.contains(token) =>
        {
            stands = stands.saturating_sub(1);
        }
        Ending::Token(_) | Ending::Length | Ending::EndOfText => {}
    }
    let before = &prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..];
    let all = tokenizer.decode(&[before, &drawn[..stands]].concat(), ShowSpecial::Yes);
    let text = match all.strip_prefix(tokenizer.decode(before, ShowSpecial::Yes).as_str()) {
        Some(text) => text.to_owned(),
        None => tokenizer.decode(&drawn[..stands], ShowSpecial::Yes),
    };
    (stands, text)
}

/// What is left to do for a turn that did not end.
struct Leave {
    claimed: Claimed,
    live: Arc<Live>,
    journal: Arc<Journal>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.live.closed(&Err(ApiError::interrupted()));
        let Some(claimed) = self.claimed.take() else { return };
        let (live, journal) = (Arc::clone(&self.live), Arc::clone(&self.journal));
        let leave = Leave { claimed, live, journal };
        // A runtime that is going down drops it here, or without running it: then too it is done.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(leave))),
            Err(_) => drop(leave),
        }
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        let Claimed { sessions, tenant, id, is_new, .. } = &self.claimed;
        if *is_new {
            // Nobody has heard of it.
            let _ = sessions.store.delete(*tenant, *id);
            return;
        }
        self.journal.extend(&sessions.store, (*tenant, *id), &self.live);
        *self.journal.written.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
