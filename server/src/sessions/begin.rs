//! Begins the answer of a turn: whichever endpoint asked for it, its job and what is written to its session are made here.

use std::sync::Arc;
use std::time::Duration;

use mainstay_engine::store::Durability;
use serde_json::Value;

use super::history::Fit;
use super::live::Live;
use super::options;
use super::record::TurnRecord;
use super::turn::{Claimed, Plan, Turn};
use crate::error::ApiError;
use crate::generate::Run;
use crate::job::{Asker, Continuation};
use crate::openai::chat::ChatRequest;
use crate::prompt::Prompt;
use crate::reply::Envelope;
use crate::responses::feed::Feed;

/// A turn whose session is claimed and whose prompt is known.
pub(crate) struct Beginning {
    pub(crate) asker: Asker,
    pub(crate) request: ChatRequest,
    pub(crate) claimed: Claimed,
    /// Turns that the session has.
    pub(crate) turns: u32,
    pub(crate) fit: Fit,
    /// The messages that this turn adds.
    pub(crate) messages: Vec<Value>,
    /// The part of the model that has changed since the last turn.
    pub(crate) changed: Option<&'static str>,
    /// The id of the answer, and when it was begun.
    pub(crate) envelope: Envelope,
    pub(crate) include_usage: bool,
    /// What the Responses API records of it; null where it is of another endpoint.
    pub(crate) response: Value,
    /// Where those who read along hear more than its tokens.
    pub(crate) feed: Option<Feed>,
    /// How often tokens of the answer are written to the journal.
    pub(crate) interval: Option<Duration>,
}

impl Beginning {
    /// Submits it, and writes down that it has begun.
    ///
    /// # Errors
    /// What the engine or the store refuses.
    pub(crate) async fn begin(self) -> Result<(Run, Arc<Live>), ApiError> {
        let Self { asker, request, claimed, fit, envelope, include_usage, response, .. } = self;
        let durability = request.keep.durability;
        let seed = request.options.sampling.seed;
        let prompt = (Prompt::of(fit.tokens), fit.text.as_str());
        let of_session = claimed.settings.durability;
        let mut job = asker.job(request, prompt, (Continuation::OwnText, of_session)).await?;
        if of_session == Durability::Ephemeral {
            job.keep.durability = Durability::Ephemeral;
        }
        let record = TurnRecord {
            id: envelope.id().to_owned(),
            created: envelope.created(),
            model: job.model.id.clone(),
            messages: self.messages,
            seed,
            sent_len: fit.sent_len,
            text_kept: fit.text_kept,
            text_sent: fit.text.len(),
            text: fit.text,
            options: options::write(&job, include_usage),
            response: response.clone(),
            ..TurnRecord::default()
        };
        let plan = Plan {
            record,
            turns: self.turns,
            kept: u32::try_from(fit.kept).unwrap_or(self.turns),
            durability,
            reason: fit.reason.map(str::to_owned),
            changed: self.changed.map(str::to_owned),
        };
        let live = Live::new(job.clone(), envelope, include_usage, &[]).of_response(response, self.feed);
        let live = Arc::new(live);
        let turn = Turn::new(claimed, plan, Arc::clone(&live), self.interval);
        let mut run = Run::of_turn(job, turn, Vec::new())?;
        run.begin_answer().await?;
        Ok((run, live))
    }
}
