//! Streams: an answer as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;

use crate::choice::Ending;
use crate::error::ApiError;
use crate::generate::{Closing, Run, TokenOut, Update};
use crate::output::Part;
use crate::reply::{Envelope, Shape};

/// How often a comment is sent while there is no event.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How long the status line waits for the first token: a request that fails before is answered with its status, and
/// one that takes longer is kept alive by comments.
const COMMIT_AFTER: Duration = Duration::from_secs(2);

/// How a stream is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    /// Events carry how many tokens were drawn up to and with them. Those up to this one are left out, but for the
    /// end of the answer.
    pub(crate) numbers: Option<usize>,
}

/// An event that is to be sent, and its number.
type Numbered = (Option<usize>, String);

struct Events<S> {
    run: Run,
    shape: S,
    envelope: Envelope,
    options: StreamOptions,
    /// Tokens drawn up to the event that comes.
    drawn: usize,
    /// Choices that have not ended.
    open_choices: usize,
    closing: Option<Closing>,
    ready: VecDeque<Numbered>,
    ended: bool,
}

/// Streams a run.
///
/// # Errors
/// What goes wrong before the answer's status is sent.
pub(crate) async fn stream<S: Shape>(
    mut run: Run,
    shape: S,
    envelope: Envelope,
    options: StreamOptions,
) -> Result<Response, ApiError> {
    let first = tokio::time::timeout(COMMIT_AFTER, run.next()).await.ok().flatten().transpose()?;
    let mut events = Events {
        open_choices: run.choice_count(),
        run,
        shape,
        envelope,
        options,
        drawn: 0,
        closing: None,
        ready: VecDeque::new(),
        ended: false,
    };
    events.open();
    if let Some(update) = first {
        events.update(update).await?;
    }
    let stream = stream::unfold(events, |mut events| async move {
        let (number, data) = events.next().await?;
        let event = Event::default().data(data);
        let event = match number {
            Some(number) => event.id(number.to_string()),
            None => event,
        };
        Some((Ok::<_, Infallible>(event), events))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive")).into_response())
}

impl<S: Shape> Events<S> {
    async fn next(&mut self) -> Option<Numbered> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            let updated = match self.run.next().await {
                Some(Ok(update)) => self.update(update).await,
                Some(Err(error)) => Err(error),
                None => {
                    self.close();
                    Ok(())
                }
            };
            if let Err(error) = updated {
                // The status is long sent; clients know this event, and that nothing follows it.
                self.ready.push_back((None, error.body().to_string()));
                self.ended = true;
            }
        }
    }

    fn open(&mut self) {
        let job = self.run.job();
        let openings: Vec<Value> =
            (0..self.open_choices).filter_map(|index| self.shape.opening(job, index)).collect();
        for (at, choice) in openings.into_iter().enumerate() {
            let mut event = self.event(vec![choice]);
            if at == 0 {
                self.shape.extend(self.run.job(), &mut event);
            }
            self.send(&event);
        }
    }

    async fn update(&mut self, update: Update) -> Result<(), ApiError> {
        match update {
            Update::Delta { choice, parts, tokens, drawn } => {
                self.drawn = drawn;
                self.delta(choice, &parts, &tokens);
                Ok(())
            }
            Update::End { choice, parts, ending, drawn } => {
                self.drawn = drawn;
                self.end(choice, &parts, &ending).await
            }
        }
    }

    fn delta(&mut self, choice: usize, parts: &[Part], tokens: &[TokenOut]) {
        let choice = self.shape.delta(self.run.job(), choice, (parts, tokens));
        let event = self.event(vec![choice]);
        self.send(&event);
    }

    async fn end(&mut self, choice: usize, parts: &[Part], ending: &Ending) -> Result<(), ApiError> {
        let mut held = None;
        if !parts.is_empty() && self.options.numbers.is_some() {
            // In an event of its own, it would have the number of the one before.
            held = Some(self.shape.delta(self.run.job(), choice, (parts, &[]))["delta"].take());
        } else if !parts.is_empty() {
            self.delta(choice, parts, &[]);
        }
        let mut choice = self.shape.ending(self.run.job(), choice, ending);
        if let Some(held) = held {
            choice["delta"] = held;
        }
        let mut event = self.event(vec![choice]);
        self.open_choices -= 1;
        if self.open_choices == 0 {
            let closing = self.run.close().await?;
            closing.extend(&mut event);
            self.closing = Some(closing);
        }
        self.push(&event);
        Ok(())
    }

    fn close(&mut self) {
        if self.options.include_usage {
            let mut event = self.envelope.wrap(S::EVENT, Vec::new());
            event["usage"] = self.run.usage().to_json();
            if let Some(closing) = &self.closing {
                closing.extend(&mut event);
            }
            self.push(&event);
        }
        self.ready.push_back((None, "[DONE]".to_owned()));
        self.ended = true;
    }

    fn event(&self, choices: Vec<Value>) -> Value {
        let mut event = self.envelope.wrap(S::EVENT, choices);
        if self.options.include_usage {
            event["usage"] = Value::Null;
        }
        event
    }

    /// Sends an event that the reader does not have yet.
    fn send(&mut self, event: &Value) {
        if self.options.numbers.is_none_or(|after| after == 0 || self.drawn > after) {
            self.push(event);
        }
    }

    fn push(&mut self, event: &Value) {
        let number = self.options.numbers.map(|_| self.drawn);
        self.ready.push_back((number, event.to_string()));
    }
}
