//! A chat request that is a turn of a session.

use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use mainstay_engine::store::Durability;

use super::live::Live;
use super::opening::{self, Asked, Opened};
use super::options;
use super::record::TurnRecord;
use super::turn::{Plan, Turn};
use super::{Sessions, named};
use crate::error::ApiError;
use crate::generate::Run;
use crate::job::{Continuation, Echo, Job, TimeLimits};
use crate::openai::chat::{ChatRequest, ChatShape};
use crate::openai::options::Delivery;
use crate::openai::session_fields::SessionFields;
use crate::prompt::{Ending, Prompt};
use crate::registry::Model;
use crate::reply::{self, Envelope};
use crate::responses::now_s;

/// A chat request to a session.
pub(crate) struct SessionChat {
    pub(crate) model: Arc<Model>,
    pub(crate) tenant: Arc<str>,
    pub(crate) session: SessionFields,
    pub(crate) request: ChatRequest,
    /// The answer's id, where it is not any.
    pub(crate) id: Option<String>,
    pub(crate) max_tokens_default: Option<usize>,
    /// How often tokens of the answer are written to the journal.
    pub(crate) interval: Option<Duration>,
    pub(crate) time: TimeLimits,
}

impl SessionChat {
    /// Answers it and appends it to its session.
    ///
    /// # Errors
    /// Whatever goes wrong before the first byte of the answer is sent.
    pub(crate) async fn answer(self, sessions: &Sessions) -> Result<Response, ApiError> {
        self.check()?;
        let request = self.request;
        // Before anything is changed, so that what is wrong is told in time.
        request.held(&self.model, &request.output(&self.model, "")).await?;
        let asked = Asked {
            model: self.model.clone(),
            tenant: self.tenant.clone(),
            session: self.session,
            input: request.input.clone(),
            max_tokens: request.max_tokens,
        };
        let Opened { claimed, turns, fit, messages, changed } = opening::open(sessions, asked).await?;
        let output = request.output(&self.model, &fit.text);
        let constraint = request.held(&self.model, &output).await?;
        let ChatRequest { options, max_tokens, logprobs, delivery, keep, .. } = request;
        let asked_durability = keep.durability;
        let mut keep = keep.keep(claimed.settings.durability);
        if claimed.settings.durability == Durability::Ephemeral {
            keep.durability = Durability::Ephemeral;
        }
        let seed = options.sampling.seed;
        let job = Job {
            model: self.model.clone(),
            tenant: self.tenant,
            prompts: vec![Prompt::of(fit.tokens)],
            max_tokens,
            max_tokens_default: self.max_tokens_default,
            options,
            output,
            logprobs,
            echo: Echo::No,
            continuation: Continuation::OwnText,
            time: self.time,
            keep,
            constraint,
        };
        let include_usage = delivery == Delivery::Stream { include_usage: true };
        let envelope = match self.id {
            Some(id) => Envelope::of(id, now_s(), &self.model),
            None => Envelope::new::<ChatShape>(&self.model),
        };
        let record = TurnRecord {
            id: envelope.id().to_owned(),
            created: envelope.created(),
            model: self.model.served.id.clone(),
            messages,
            seed,
            sent_len: fit.sent_len,
            text_kept: fit.text_kept,
            text_sent: fit.text.len(),
            text: fit.text,
            options: options::write(&job, include_usage),
            ..TurnRecord::default()
        };
        let plan = Plan {
            record,
            turns,
            kept: u32::try_from(fit.kept).unwrap_or(turns),
            durability: asked_durability,
            reason: fit.reason.map(str::to_owned),
            changed: changed.map(str::to_owned),
        };
        let id = claimed.id;
        let live = Arc::new(Live::new(job.clone(), envelope.clone(), include_usage, &[]));
        let turn = Turn::new(claimed, plan, live, self.interval);
        let mut run = Run::of_turn(job, turn, Vec::new())?;
        run.begin_answer().await?;
        Ok(named(reply::deliver(run, ChatShape::default(), envelope, delivery).await?, id))
    }

    fn check(&self) -> Result<(), ApiError> {
        let choices = self.request.options.choices;
        if choices != 1 {
            return Err(ApiError::field("n", format!("expected 1 for a turn of a session, found {choices}")));
        }
        if self.request.input.ending == Ending::OpenMessage {
            let message =
                "expected false for a turn of a session, whose answers are messages of their own, found true";
            return Err(ApiError::field("continue_final_message", message));
        }
        Ok(())
    }
}
