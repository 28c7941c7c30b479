//! Streams: an answer as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;

use crate::error::ApiError;
use crate::generate::{Closing, Run, Update};
use crate::reply::{Envelope, Shape};

/// How often a comment is sent while there is no event.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How long the status line waits for the first token: a request that fails before is answered with its status, and
/// one that takes longer is kept alive by comments.
const COMMIT_AFTER: Duration = Duration::from_secs(2);

struct Events<S> {
    run: Run,
    shape: S,
    envelope: Envelope,
    include_usage: bool,
    /// Choices that have not ended.
    open_choices: usize,
    closing: Option<Closing>,
    ready: VecDeque<String>,
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
    include_usage: bool,
) -> Result<Response, ApiError> {
    let first = tokio::time::timeout(COMMIT_AFTER, run.next()).await.ok().flatten().transpose()?;
    let mut events = Events {
        open_choices: run.choice_count(),
        run,
        shape,
        envelope,
        include_usage,
        closing: None,
        ready: VecDeque::new(),
        ended: false,
    };
    events.open();
    if let Some(update) = first {
        events.update(update).await?;
    }
    let stream = stream::unfold(events, |mut events| async move {
        let data = events.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), events))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive")).into_response())
}

impl<S: Shape> Events<S> {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
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
                self.ready.push_back(error.body().to_string());
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
            self.ready.push_back(event.to_string());
        }
    }

    async fn update(&mut self, update: Update) -> Result<(), ApiError> {
        let ends_choice = matches!(update, Update::End { .. });
        let job = self.run.job();
        let choice = match update {
            Update::Delta { choice, text, tokens } => self.shape.delta(job, choice, (&text, &tokens)),
            Update::End { choice, ending } => self.shape.ending(job, choice, &ending),
        };
        let mut event = self.event(vec![choice]);
        self.open_choices -= usize::from(ends_choice);
        if self.open_choices == 0 {
            let closing = self.run.close().await?;
            closing.extend(&mut event);
            self.closing = Some(closing);
        }
        self.ready.push_back(event.to_string());
        Ok(())
    }

    fn close(&mut self) {
        if self.include_usage {
            let mut event = self.envelope.wrap(S::EVENT, Vec::new());
            event["usage"] = self.run.usage().to_json();
            if let Some(closing) = &self.closing {
                closing.extend(&mut event);
            }
            self.ready.push_back(event.to_string());
        }
        self.ready.push_back("[DONE]".to_owned());
        self.ended = true;
    }

    fn event(&self, choices: Vec<Value>) -> Value {
        let mut event = self.envelope.wrap(S::EVENT, choices);
        if self.include_usage {
            event["usage"] = Value::Null;
        }
        event
    }
}
