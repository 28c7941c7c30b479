//! POST /v1/responses: from the request to a response under way.

use std::sync::Arc;
use std::time::Duration;

use mainstay_engine::store::Durability;
use serde_json::{Value, json};

use super::answer::{Answering, Role};
use super::object::ResponseRecord;
use super::opening::{self, Planned, Stored};
use super::past::Past;
use super::request::{self, Before, ResponseRequest};
use super::{ids, now_s};
use crate::error::ApiError;
use crate::generate::Run;
use crate::job::{Continuation, Echo, Job, TimeLimits};
use crate::openai::chat::ChatRequest;
use crate::prompt::Prompt;
use crate::registry::{Model, Registry};
use crate::reply::Envelope;
use crate::sessions::history::Fit;
use crate::sessions::live::Live;
use crate::sessions::record::TurnRecord;
use crate::sessions::turn::{Plan, Turn};
use crate::sessions::{Sessions, options};

/// What answers responses.
#[derive(Clone)]
pub(crate) struct Responder {
    pub(crate) registry: Registry,
    pub(crate) sessions: Option<Sessions>,
    /// Of new sessions, and of pages that are of none.
    pub(crate) durability: (Durability, Durability),
    pub(crate) max_tokens_default: Option<usize>,
    /// How often tokens of an answer are written to the journal.
    pub(crate) interval: Option<Duration>,
    /// What is not to be stored has a session in memory, for whoever goes on from it soon.
    pub(crate) keeps_unstored: bool,
}

impl Responder {
    /// Begins a response.
    ///
    /// # Errors
    /// What the client has to know before anything was changed.
    pub(crate) async fn begin(
        &self,
        tenant: Arc<str>,
        asked: ResponseRequest,
        time: TimeLimits,
    ) -> Result<Answering, ApiError> {
        let model = self.registry.get(&asked.model)?;
        let stored = self.stored(&asked)?;
        let past = opening::before(self.sessions.as_ref(), &tenant, &asked).await?;
        let (asked, past, planned) = planned(&model, asked, past).await?;
        match (stored, &self.sessions) {
            (Stored::Yes(durability), Some(sessions)) => {
                let begun = Begun { responder: self, tenant, model, asked, time };
                begun.in_session((sessions, durability), past, planned).await
            }
            _ => {
                let begun = Begun { responder: self, tenant, model, asked, time };
                begun.plain(planned).await
            }
        }
    }

    /// How many tokens the prompt of a request has.
    ///
    /// # Errors
    /// As [`Responder::begin`].
    pub(crate) async fn input_tokens(
        &self,
        tenant: Arc<str>,
        asked: ResponseRequest,
    ) -> Result<usize, ApiError> {
        let model = self.registry.get(&asked.model)?;
        let past = opening::before(self.sessions.as_ref(), &tenant, &asked).await?;
        let (_, _, planned) = planned(&model, asked, past).await?;
        Ok(planned.fit.tokens.len())
    }

    fn stored(&self, asked: &ResponseRequest) -> Result<Stored, ApiError> {
        let in_conversation = matches!(asked.before, Before::Conversation(_));
        match (asked.store, &self.sessions) {
            (Some(false), Some(_)) if !in_conversation && self.keeps_unstored => {
                Ok(Stored::Yes(Durability::Ephemeral))
            }
            (Some(false), _) if !in_conversation => Ok(Stored::No),
            (_, Some(_)) => Ok(Stored::Yes(self.durability.0)),
            (Some(true), None) => Err(ApiError::no_sessions()),
            (_, None) if asked.background || in_conversation => Err(ApiError::no_sessions()),
            (_, None) => Ok(Stored::No),
        }
    }
}

async fn planned(
    model: &Arc<Model>,
    asked: ResponseRequest,
    past: Option<Past>,
) -> Result<(ResponseRequest, Option<Past>, Planned), ApiError> {
    let model = Arc::clone(model);
    let plan = move || {
        let planned = opening::plan(&asked, &model, past.as_ref())?;
        Ok((asked, past, planned))
    };
    let planned = tokio::task::spawn_blocking(plan).await;
    planned.unwrap_or_else(|_| Err(ApiError::internal("rendering the conversation failed")))
}

/// A response that was planned.
struct Begun<'a> {
    responder: &'a Responder,
    tenant: Arc<str>,
    model: Arc<Model>,
    asked: ResponseRequest,
    time: TimeLimits,
}

impl Begun<'_> {
    /// What the object repeats, completed by what only this server knows.
    fn record(&mut self, id: &str, planned: &Planned, is_stored: bool) -> ResponseRecord {
        let sampling = &planned.chat.options.sampling;
        self.asked.complete_echo(&self.model, (sampling.temperature, sampling.top_p));
        let mut echo = self.asked.echo.clone();
        echo.insert("store".to_owned(), json!(is_stored));
        let conversation = match &self.asked.before {
            Before::Conversation(id) => json!({"id": id}),
            Before::Nothing | Before::Response(_) => Value::Null,
        };
        echo.insert("conversation".to_owned(), conversation);
        let mut record = ResponseRecord::new(id, now_s(), echo, planned.input.clone());
        if planned.skipped > 0 {
            record.set("skipped", json!(planned.skipped));
        }
        if !planned.replaced.is_empty() {
            record.set("before", planned.replaced.iter().map(ResponseRecord::to_json).collect());
        }
        record
    }

    async fn job(&self, chat: ChatRequest, fit: &Fit, durability: Durability) -> Result<Job, ApiError> {
        let output = chat.output(&self.model, &fit.text);
        let constraint = chat.held(&self.model, &output).await.map_err(request::renamed)?;
        Ok(Job {
            output,
            constraint,
            model: Arc::clone(&self.model),
            tenant: Arc::clone(&self.tenant),
            prompts: vec![Prompt::of(fit.tokens.clone())],
            max_tokens: chat.max_tokens,
            max_tokens_default: self.responder.max_tokens_default,
            options: chat.options,
            logprobs: chat.logprobs,
            echo: Echo::No,
            continuation: Continuation::OwnText,
            time: self.time,
            keep: chat.keep.keep(durability),
        })
    }

    /// A response that is kept nowhere.
    async fn plain(mut self, planned: Planned) -> Result<Answering, ApiError> {
        let id = ids::response(mainstay_engine::store::SessionId(0));
        let record = self.record(&id, &planned, false);
        let job = self.job(planned.chat, &planned.fit, self.responder.durability.1).await?;
        Ok(Answering::new(Run::start(job)?, record, Role::Alone))
    }

    /// A response that is a turn of a session.
    async fn in_session(
        mut self,
        (sessions, durability): (&Sessions, Durability),
        past: Option<Past>,
        planned: Planned,
    ) -> Result<Answering, ApiError> {
        // Before anything is changed, so that what is wrong is told in time.
        let output = planned.chat.output(&self.model, &planned.fit.text);
        planned.chat.held(&self.model, &output).await.map_err(request::renamed)?;
        let place = (&self.tenant, durability);
        let (claimed, turns) = opening::claim(sessions, place, &self.model, past).await?;
        let id = ids::response(claimed.id);
        let is_stored =
            self.asked.store != Some(false) || matches!(self.asked.before, Before::Conversation(_));
        let record = self.record(&id, &planned, is_stored);
        let Planned { chat, fit, messages, changed, .. } = planned;
        let asked_durability = chat.keep.durability;
        let seed = chat.options.sampling.seed;
        let mut job = self.job(chat, &fit, claimed.settings.durability).await?;
        if claimed.settings.durability == Durability::Ephemeral {
            job.keep.durability = Durability::Ephemeral;
        }
        let envelope = Envelope::of(id.clone(), now_s(), &self.model);
        let turn_record = TurnRecord {
            id,
            created: envelope.created(),
            model: self.model.served.id.clone(),
            messages,
            seed,
            sent_len: fit.sent_len,
            text_kept: fit.text_kept,
            text_sent: fit.text.len(),
            text: fit.text,
            options: options::write(&job, true),
            response: record.to_json(),
            ..TurnRecord::default()
        };
        let plan = Plan {
            record: turn_record,
            turns,
            kept: u32::try_from(fit.kept).unwrap_or(turns),
            durability: asked_durability,
            reason: fit.reason.map(str::to_owned),
            changed: changed.map(str::to_owned),
        };
        let live = Arc::new(Live::new(job.clone(), envelope, true, &[]).of_response(record.to_json()));
        let turn = Turn::new(claimed, plan, Arc::clone(&live), self.responder.interval);
        let mut run = Run::of_turn(job, turn, Vec::new())?;
        run.begin_answer().await?;
        Ok(Answering::new(run, record, Role::Maker(live)))
    }
}
