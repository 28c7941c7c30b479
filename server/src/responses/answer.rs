//! A response under way: drives its run and writes its events, one after the other, for whoever reads them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;
use tokio::task::JoinSet;

use super::events::Writer;
use super::feed::{Feed, FeedWriter};
use super::object::{ResponseRecord, Status};
use super::rounds::Rounds;
use crate::choice::Ending;
use crate::error::ApiError;
use crate::generate::{Run, TokenOut, Update};
use crate::openai::logprobs;
use crate::openai::usage::Usage;
use crate::output::Part;
use crate::sessions::live::Live;
use crate::sse::{COMMIT_AFTER, KEEP_ALIVE};

/// Who else may end the answer, and whether this run makes it or only reads it.
#[derive(Clone)]
pub(crate) enum Role {
    /// Nobody hears of it but its reader.
    Alone,
    /// Others may follow it, and cancel it.
    Maker(Arc<Live>),
    Follower(Arc<Live>),
    /// It has ended; this is what was recorded of it.
    Past(ResponseRecord),
}

/// A response under way. Dropped, it stops; what is of a session stays in flight there.
pub(crate) struct Answering {
    /// Missing where the tokens of a past answer are no longer there, and between two answers.
    pub(super) run: Option<Run>,
    /// The other turns of a past response.
    later: VecDeque<Run>,
    pub(super) writer: Writer,
    pub(super) role: Role,
    pub(super) ready: VecDeque<Value>,
    begun: bool,
    pub(super) ending: Option<Ending>,
    /// Set with the last event.
    status: Option<Status>,
    /// Lets the model answer again when tools were called.
    pub(super) rounds: Option<Rounds>,
    /// Calls of tools that are being made, each with its place in the output.
    pub(super) calls: Option<JoinSet<(usize, Result<String, String>)>>,
    /// Of the answers before this one.
    pub(super) spent: Usage,
    pub(super) feed: Option<FeedWriter>,
    /// The events that are read along, and how many of them were.
    heard: Option<(Feed, usize)>,
    /// What went wrong before anything was answered.
    failed: Option<ApiError>,
}

impl Answering {
    pub(crate) fn new(run: Run, record: ResponseRecord, role: Role) -> Self {
        Self::with(Some(run), record, role)
    }

    /// One that has ended, from its beginning on: `begun` is what was recorded then, `ended` what there is now.
    pub(crate) fn again(mut runs: VecDeque<Run>, begun: ResponseRecord, ended: ResponseRecord) -> Self {
        let first = runs.pop_front();
        Self { later: runs, ..Self::with(first, begun, Role::Past(ended)) }
    }

    /// One whose events somebody else writes.
    pub(crate) fn heard(feed: Feed, record: ResponseRecord, live: Arc<Live>) -> Self {
        Self { heard: Some((feed, 0)), begun: true, ..Self::with(None, record, Role::Follower(live)) }
    }

    /// One whose model may call tools.
    pub(crate) fn with_rounds(self, rounds: Option<Rounds>, feed: FeedWriter) -> Self {
        let feed = rounds.is_some().then_some(feed);
        Self { rounds, feed, ..self }
    }

    fn with(run: Option<Run>, record: ResponseRecord, role: Role) -> Self {
        Self {
            run,
            later: VecDeque::new(),
            writer: Writer::new(record),
            role,
            ready: VecDeque::new(),
            begun: false,
            ending: None,
            status: None,
            rounds: None,
            calls: None,
            spent: Usage::default(),
            feed: None,
            heard: None,
            failed: None,
        }
    }

    /// Waits a while for the first piece of the answer, so that what goes wrong before it is an answer of its own.
    ///
    /// # Errors
    /// What goes wrong before.
    pub(crate) async fn begin(&mut self) -> Result<(), ApiError> {
        let first = match &mut self.run {
            Some(run) => tokio::time::timeout(COMMIT_AFTER, run.next()).await.ok().flatten().transpose()?,
            None => None,
        };
        self.open();
        if let Some(update) = first {
            self.update(update);
        }
        Ok(())
    }

    fn open(&mut self) {
        if !std::mem::replace(&mut self.begun, true) {
            let events = self.writer.begin();
            self.ready.extend(events);
        }
    }

    pub(crate) fn id(&self) -> String {
        self.writer.id().to_owned()
    }

    /// The object as it stands.
    pub(crate) fn object(&mut self) -> Value {
        self.writer.record().object()
    }

    /// The next event, `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        self.open();
        loop {
            if let Some(event) = self.ready.pop_front() {
                if let Some(feed) = &self.feed {
                    feed.push(&event);
                }
                return Some(event);
            }
            if self.status.is_some() {
                return None;
            }
            if self.heard.is_some() {
                self.read_along().await;
            } else if self.calls.is_some() {
                self.hear_calls().await;
            } else {
                self.advance().await;
            }
        }
    }

    async fn advance(&mut self) {
        match self.step().await {
            Some(Ok(update)) => self.update(update),
            Some(Err(error)) => {
                if self.writer.round() == 0 {
                    self.failed = Some(error.clone());
                }
                self.fail(&error);
            }
            None => self.end().await,
        }
    }

    async fn read_along(&mut self) {
        let Some((feed, at)) = &mut self.heard else { return };
        let Some(event) = feed.event(*at).await else {
            let sequence = *at as u64;
            self.writer.set_sequence(sequence);
            return self.last_failed(&ApiError::interrupted());
        };
        *at += 1;
        let ended = ResponseRecord::read(&event["response"]).map(|record| record.status());
        self.status = ended.filter(|status| *status != Status::InProgress);
        self.ready.push_back(event);
    }

    async fn step(&mut self) -> Option<Result<Update, ApiError>> {
        let run = self.run.as_mut()?;
        let Role::Maker(live) = &self.role else { return run.next().await };
        if live.is_cancelled() {
            return None;
        }
        tokio::select! {
            update = run.next() => update,
            () = live.wait_cancelled() => {
                run.cut();
                None
            }
        }
    }

    fn update(&mut self, update: Update) {
        match update {
            Update::Delta { parts, tokens, .. } => self.parts(&parts, &tokens),
            Update::End { parts, ending, .. } => {
                self.parts(&parts, &[]);
                self.ending = Some(ending);
            }
        }
    }

    fn parts(&mut self, parts: &[Part], tokens: &[TokenOut]) {
        let Some(job) = self.run.as_ref().map(Run::job) else { return };
        let mut scores = match job.logprobs {
            Some(_) if !tokens.is_empty() => {
                let mut scores = logprobs::chat(&job.model.served.tokenizer, tokens);
                scores["content"].as_array_mut().map(std::mem::take).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        for part in parts {
            let scores = if matches!(part, Part::Text(_)) { std::mem::take(&mut scores) } else { Vec::new() };
            let events = self.writer.part(part, scores);
            self.ready.extend(events);
        }
    }

    /// The answer's end: what it is goes to its session, and then to the reader.
    async fn end(&mut self) {
        if let Role::Past(ended) = &self.role {
            let ended = ended.clone();
            return self.end_past(ended);
        }
        let is_cancelled = match &self.role {
            Role::Alone | Role::Past(_) => false,
            Role::Maker(live) | Role::Follower(live) => live.is_cancelled(),
        };
        let status = match &self.ending {
            _ if is_cancelled => Status::Cancelled,
            Some(ending) => Status::of(ending),
            None => Status::Incomplete,
        };
        let events = self.writer.end_items(status);
        self.ready.extend(events);
        if self.writer.pending().is_empty() {
            return self.close(status).await;
        }
        if self.rounds.is_some() {
            return self.begin_calls().await;
        }
        // Whoever was to make the calls is gone.
        let events = self.writer.end_items(Status::Failed);
        self.ready.extend(events);
        self.close(Status::Failed).await;
    }

    /// Ends the response with this answer.
    pub(super) async fn close(&mut self, status: Status) {
        let Some(run) = &mut self.run else { return };
        let output = self.writer.output().to_vec();
        let usage = self.spent + run.usage();
        match status {
            Status::Failed => self.writer.record().fail(&ApiError::interrupted(), output),
            status => self.writer.record().end(status, output, Some(usage)),
        }
        run.describe(self.writer.record().to_json());
        match run.close().await {
            Ok(closing) => {
                let usage = self.spent + closing.usage;
                let record = self.writer.record();
                record.set("usage", super::object::usage_object(usage));
                record.set("kv", closing.kv);
                if let Some(session) = closing.session {
                    record.set("session", session);
                }
                self.last(status);
            }
            Err(error) => self.fail(&error),
        }
    }

    /// The tokens of a past answer were read.
    fn end_past(&mut self, ended: ResponseRecord) {
        let status = ended.status();
        let next = self.later.pop_front();
        if self.run.is_some() {
            let events = self.writer.end_items(if next.is_some() { Status::Completed } else { status });
            self.ready.extend(events);
            for index in self.writer.pending().to_vec() {
                let result = call_result(&ended.list("output")[index.min(ended.list("output").len())..]);
                let events = self.writer.called(index, result);
                self.ready.extend(events);
            }
            if next.is_some() {
                self.writer.next_round();
                (self.run, self.ending) = (next, None);
                return;
            }
        } else {
            let written = self.writer.output().len();
            for item in ended.list("output").iter().skip(written) {
                let events = self.writer.whole_item(item.clone());
                self.ready.extend(events);
            }
        }
        *self.writer.record() = ended;
        self.last(status);
    }

    fn fail(&mut self, error: &ApiError) {
        let events = self.writer.end_items(Status::Failed);
        self.ready.extend(events);
        self.last_failed(error);
    }

    fn last_failed(&mut self, error: &ApiError) {
        let output = self.writer.output().to_vec();
        self.writer.record().fail(error, output);
        self.last(Status::Failed);
    }

    pub(super) fn last(&mut self, status: Status) {
        // Whoever hears the end may go on from it at once.
        self.rounds = None;
        let event = self.writer.last(status);
        self.ready.push_back(event);
        self.status = Some(status);
    }

    /// Waits for the end; the object `response`.
    ///
    /// # Errors
    /// What made it fail.
    pub(crate) async fn whole(mut self) -> Result<Value, ApiError> {
        // Events that nobody reads: what they hold is in the record.
        while self.next().await.is_some() {}
        match self.failed {
            Some(error) => Err(error),
            None => Ok(self.writer.record().object()),
        }
    }

    /// Drives it to its end where nobody reads.
    pub(crate) async fn alone(mut self) {
        while self.next().await.is_some() {}
    }

    /// Its events as a stream, from the one on that the reader does not have.
    pub(crate) fn stream(self, after: Option<u64>) -> Response {
        let events = stream::unfold(Some(self), move |answering| async move {
            let mut answering = answering?;
            loop {
                let Some(event) = answering.next().await else {
                    let done = Event::default().data("[DONE]");
                    return Some((Ok::<_, Infallible>(done), None));
                };
                let number = event["sequence_number"].as_u64();
                if after.is_some_and(|after| number.is_some_and(|number| number <= after)) {
                    continue;
                }
                let kind = event["type"].as_str().unwrap_or_default().to_owned();
                let event = Event::default().event(kind).data(event.to_string());
                return Some((Ok(event), Some(answering)));
            }
        });
        let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive");
        Sse::new(events).keep_alive(keep_alive).into_response()
    }
}

/// How long a response that is cancelled may take to end.
pub(crate) const CANCEL_PATIENCE: Duration = Duration::from_secs(10);

/// What a recorded call gave.
fn call_result(items: &[Value]) -> Result<String, String> {
    let item = items.first().unwrap_or(&Value::Null);
    match (item["output"].as_str(), item["error"].as_str()) {
        (Some(output), _) => Ok(output.to_owned()),
        (None, error) => Err(error.unwrap_or("the call was interrupted").to_owned()),
    }
}
