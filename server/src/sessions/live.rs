//! A turn under way as others see it: what it has drawn so far, and who follows it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use mainstay_engine::{Event, FinishReason, Score};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use crate::error::ApiError;
use crate::generate::Closing;
use crate::job::Job;
use crate::reply::Envelope;
use crate::responses::feed::Feed;

/// A turn under way.
pub(crate) struct Live {
    /// Makes the same text of the same tokens.
    pub(crate) job: Job,
    pub(crate) envelope: Envelope,
    pub(crate) include_usage: bool,
    /// What the Responses API records of it as it begins.
    pub(crate) response: Value,
    /// All its events, where it is a response that goes on in other turns.
    pub(crate) feed: Option<Feed>,
    cancelled: watch::Sender<bool>,
    state: Mutex<State>,
}

/// What a follower hears, in order.
#[derive(Debug)]
pub(crate) enum Heard {
    /// As from the engine.
    Event(Event),
    /// The end of the turn: what its last event tells, or what went wrong.
    Closed(Box<Result<Closing, ApiError>>),
}

#[derive(Default)]
struct State {
    drawn: Vec<(u32, Option<Score>)>,
    finished: Option<FinishReason>,
    closed: Option<Result<Closing, ApiError>>,
    /// Their channels hold no more than one answer each, so that a slow one holds nobody up.
    followers: Vec<UnboundedSender<Heard>>,
}

impl Live {
    /// `drawn` are the tokens of an answer that goes on.
    pub(crate) fn new(job: Job, envelope: Envelope, include_usage: bool, drawn: &[u32]) -> Self {
        let drawn = drawn.iter().map(|token| (*token, None)).collect();
        let state = Mutex::new(State { drawn, ..State::default() });
        let cancelled = watch::Sender::new(false);
        Self { job, envelope, include_usage, response: Value::Null, feed: None, cancelled, state }
    }

    /// The answer is that of a response.
    pub(crate) fn of_response(self, response: Value, feed: Option<Feed>) -> Self {
        Self { response, feed, ..self }
    }

    /// Asks whoever makes the answer to end it where it is.
    pub(crate) fn cancel(&self) {
        self.cancelled.send_replace(true);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        *self.cancelled.borrow()
    }

    /// Returns once somebody wants the answer to end.
    pub(crate) async fn wait_cancelled(&self) {
        // The sender lives as long as this.
        let _ = self.cancelled.subscribe().wait_for(|is_cancelled| *is_cancelled).await;
    }

    pub(crate) fn drew(&self, token: u32, score: Option<&Score>) {
        let mut state = self.state();
        state.drawn.push((token, score.cloned()));
        state.tell(|| token_event(token, score));
    }

    pub(crate) fn finished(&self, reason: FinishReason) {
        let mut state = self.state();
        state.finished = Some(reason);
        state.tell(|| Heard::Event(Event::Finished { choice: 0, reason }));
    }

    /// Nothing follows. The first end holds.
    pub(crate) fn closed(&self, end: &Result<Closing, ApiError>) {
        let mut state = self.state();
        if state.closed.is_none() {
            state.closed = Some(end.clone());
            state.tell(|| Heard::Closed(Box::new(end.clone())));
            state.followers.clear();
        }
    }

    /// Whether it stopped before the answer's end.
    pub(crate) fn has_failed(&self) -> bool {
        self.state().closed.as_ref().is_some_and(Result::is_err)
    }

    /// Tokens drawn after the first `from`.
    pub(crate) fn drawn(&self, from: usize) -> Vec<u32> {
        self.state().drawn.iter().skip(from).map(|(token, _)| *token).collect()
    }

    /// All that was drawn, and what comes.
    pub(crate) fn follow(&self) -> UnboundedReceiver<Heard> {
        let (sender, heard) = unbounded_channel();
        let mut state = self.state();
        let past = state.drawn.iter().map(|(token, score)| token_event(*token, score.as_ref()));
        let finished = state.finished.map(|reason| Heard::Event(Event::Finished { choice: 0, reason }));
        let closed = state.closed.clone().map(|end| Heard::Closed(Box::new(end)));
        for event in past.chain(finished).chain(closed) {
            // The receiver is here.
            let _ = sender.send(event);
        }
        if state.closed.is_none() {
            state.followers.push(sender);
        }
        heard
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Tells all followers, and forgets those that have left.
    fn tell(&mut self, event: impl Fn() -> Heard) {
        self.followers.retain(|follower| follower.send(event()).is_ok());
    }
}

fn token_event(token: u32, score: Option<&Score>) -> Heard {
    Heard::Event(Event::Token { choice: 0, token, score: score.cloned() })
}
