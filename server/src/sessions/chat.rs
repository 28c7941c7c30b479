//! A chat request that is a turn of a session.

use std::time::Duration;

use axum::response::Response;
use serde_json::Value;

use super::begin::Beginning;
use super::opening::{self, Asked, Opened};
use super::{Sessions, named};
use crate::error::ApiError;
use crate::job::Asker;
use crate::openai::chat::{ChatRequest, ChatShape};
use crate::openai::options::Delivery;
use crate::openai::session_fields::SessionFields;
use crate::prompt::Ending;
use crate::registry::Registry;
use crate::reply::{self, Envelope};
use crate::responses::now_s;

/// A chat request to a session.
pub(crate) struct SessionChat {
    /// Whose models sessions may belong to.
    pub(crate) registry: Registry,
    pub(crate) asker: Asker,
    pub(crate) session: SessionFields,
    pub(crate) request: ChatRequest,
    /// The answer's id, where it is not any.
    pub(crate) id: Option<String>,
    /// How often tokens of the answer are written to the journal.
    pub(crate) interval: Option<Duration>,
}

impl SessionChat {
    /// Answers it and appends it to its session.
    ///
    /// # Errors
    /// Whatever goes wrong before the first byte of the answer is sent.
    pub(crate) async fn answer(self, sessions: &Sessions) -> Result<Response, ApiError> {
        self.check()?;
        let Self { registry, asker, session, request, id, interval } = self;
        let model = &asker.model;
        // Before anything is changed, so that what is wrong is told in time.
        request.held(model, &request.output(model, "")).await?;
        let asked = Asked {
            registry,
            model: model.clone(),
            tenant: asker.tenant.clone(),
            session,
            input: request.input.clone(),
            max_tokens: request.max_tokens,
        };
        let Opened { claimed, turns, fit, messages, changed } = opening::open(sessions, asked).await?;
        let delivery = request.delivery;
        let envelope = match id {
            Some(id) => Envelope::of(id, now_s(), model),
            None => Envelope::new::<ChatShape>(model),
        };
        let session = claimed.id;
        let beginning = Beginning {
            asker,
            request,
            claimed,
            turns,
            fit,
            messages,
            changed,
            envelope: envelope.clone(),
            include_usage: delivery == Delivery::Stream { include_usage: true },
            response: Value::Null,
            feed: None,
            interval,
        };
        let (run, _) = beginning.begin().await?;
        Ok(named(reply::deliver(run, ChatShape::default(), envelope, delivery).await?, session))
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
