//! Answers a job: as one JSON body, or as a stream of events.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::choice::Ending;
use crate::error::ApiError;
use crate::generate::{Choice, Origin, Run, TokenOut};
use crate::job::Job;
use crate::openai::options::Delivery;
use crate::output::Part;
use crate::registry::Model;
use crate::sse::{self, StreamOptions};

/// How an endpoint writes an answer down; chat and completions differ in nothing else.
pub(crate) trait Shape: Send + 'static {
    /// `object` of a whole answer.
    const WHOLE: &'static str;
    /// `object` of an event.
    const EVENT: &'static str;
    /// How ids begin.
    const ID_PREFIX: &'static str;

    /// A choice of a whole answer.
    fn choice(&self, job: &Job, index: usize, choice: &Choice) -> Value;

    /// The event before a choice's first text, if there is one.
    fn opening(&self, job: &Job, index: usize) -> Option<Value>;

    /// The event of more parts or tokens.
    fn delta(&mut self, job: &Job, index: usize, delta: (&[Part], &[TokenOut])) -> Value;

    /// The event that ends a choice.
    fn ending(&self, job: &Job, index: usize, ending: &Ending) -> Value;

    /// Adds what the answer, or its first event, holds beside its choices.
    fn extend(&self, job: &Job, answer: &mut Value);
}

/// What every body or event of one answer has in common.
#[derive(Clone, Debug)]
pub(crate) struct Envelope {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Envelope {
    pub(crate) fn new<S: Shape>(model: &Model) -> Self {
        Self {
            id: crate::random::id(S::ID_PREFIX),
            created: std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
            model: model.id.clone(),
            fingerprint: model.fingerprint.clone(),
        }
    }

    /// Of an answer that was begun before.
    pub(crate) fn of(id: String, created: u64, model: &Model) -> Self {
        Self { id, created, model: model.id.clone(), fingerprint: model.fingerprint.clone() }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn created(&self) -> u64 {
        self.created
    }

    /// An answer's JSON around its choices.
    pub(crate) fn wrap(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }
}

/// Runs the job and answers it.
///
/// # Errors
/// Whatever goes wrong before the first byte of the answer is sent.
pub(crate) async fn send<S: Shape>(job: Job, shape: S, delivery: Delivery) -> Result<Response, ApiError> {
    let envelope = Envelope::new::<S>(&job.model);
    deliver(Run::start(job)?, shape, envelope, delivery).await
}

/// Answers with a run.
///
/// # Errors
/// Whatever goes wrong before the first byte of the answer is sent.
pub(crate) async fn deliver<S: Shape>(
    mut run: Run,
    shape: S,
    envelope: Envelope,
    delivery: Delivery,
) -> Result<Response, ApiError> {
    match delivery {
        Delivery::Stream { include_usage } => {
            let numbers = run.is_turn().then_some(0);
            sse::stream(run, shape, envelope, StreamOptions { include_usage, numbers }).await
        }
        Delivery::Whole => {
            let choices = run.collect().await?;
            let closing = run.close().await?;
            let mut answer = whole(&run, &shape, &envelope, &choices);
            closing.extend(&mut answer);
            Ok(Json(answer).into_response())
        }
    }
}

fn whole<S: Shape>(run: &Run, shape: &S, envelope: &Envelope, choices: &[Choice]) -> Value {
    let job = run.job();
    let choices =
        choices.iter().enumerate().map(|(index, choice)| shape.choice(job, index, choice)).collect();
    let mut answer = envelope.wrap(S::WHOLE, choices);
    answer["usage"] = run.usage().to_json();
    shape.extend(job, &mut answer);
    answer
}

/// `finish_reason` of an ending. An answer that was cut is not complete, whether it has calls or not.
pub(crate) fn finish_reason(ending: &Ending, has_calls: bool) -> &'static str {
    match ending {
        Ending::Length => "length",
        _ if has_calls => "tool_calls",
        _ => "stop",
    }
}

/// vLLM's `stop_reason`: the stop string or token of the client's that ended the choice.
pub(crate) fn stop_reason(ending: &Ending) -> Value {
    match ending {
        Ending::Length | Ending::EndOfText => Value::Null,
        Ending::Token(id) => json!(id),
        Ending::String(text) => json!(text),
    }
}

/// `token_ids` of a choice: the generated ones.
pub(crate) fn ids(tokens: &[TokenOut]) -> Vec<u32> {
    tokens.iter().filter(|token| token.origin == Origin::Generated).map(|token| token.id).collect()
}
