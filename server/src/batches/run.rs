//! Works on batches: checks their lines, has them answered by the server's own routes, and writes the files.

use std::collections::HashSet;
use std::io::{self, Error};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinHandle, JoinSet};
use tower::ServiceExt;

use super::input::{self, Line, Lines};
use super::journal::{self, Answer, Journal};
use super::record::{BatchRecord, Status};
use super::{Batch, Queue};
use crate::auth::Tenant;
use crate::files::{About, Draft, Files, now_s};
use crate::openai::priority;
use crate::random;
use crate::shutdown::{ShutdownSignal, ShutdownStage};

/// Waits before a line is tried again that there was no room for: the first, and the longest.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(5)];
/// Wait before a batch goes on that the disk has stopped.
const RETRY: Duration = Duration::from_secs(10);
/// Errors of the server that pass.
const PASSING: [&str; 5] = ["queue_full", "queue_timeout", "model_loading", "model_no_room", "shutting_down"];

/// What works on batches.
pub(crate) struct Worker {
    /// Answers lines: routes without keys, for the tenant is known.
    lines: Router,
    files: Files,
    /// Lines under way at a time, of all batches.
    slots: Arc<Semaphore>,
    shutdown: ShutdownSignal,
}

/// The work on batches; it ends with this.
pub(crate) struct Work(JoinHandle<()>);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why no more lines are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    Cancelled,
    Expired,
    /// The server ends; the next one goes on.
    Stopped,
}

impl Worker {
    pub(crate) fn new(lines: Router, files: Files, slots: usize, shutdown: ShutdownSignal) -> Self {
        let slots = Arc::new(Semaphore::new(slots.clamp(1, Semaphore::MAX_PERMITS)));
        Self { lines, files, slots, shutdown }
    }

    /// Works on whatever is queued.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub(crate) fn start(self, mut queue: Queue) -> Work {
        let worker = Arc::new(self);
        Work(tokio::spawn(async move {
            let mut running = JoinSet::new();
            loop {
                tokio::select! {
                    batch = queue.recv() => match batch {
                        Some(batch) => drop(running.spawn(Arc::clone(&worker).work(batch))),
                        None => break,
                    },
                    Some(_) = running.join_next() => {}
                }
            }
            running.join_all().await;
        }))
    }

    async fn work(self: Arc<Self>, batch: Arc<Batch>) {
        let BatchRecord { id, expires_at, .. } = batch.record();
        // A disk that is full may have room again.
        while let Err(error) = self.run(&batch).await {
            tracing::error!(batch = id, %error, "a batch cannot go on");
            if now_s() < expires_at {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            if let Err(error) = on_disk(&batch, move |batch| fail(batch, &error)).await {
                tracing::error!(batch = id, %error, "nor can it be ended");
            }
            return;
        }
    }

    async fn run(&self, batch: &Arc<Batch>) -> io::Result<()> {
        let mut record = batch.record();
        if record.status == Status::Validating {
            record = on_disk(batch, validate).await?;
        }
        let mut end = End::Done;
        if record.status == Status::InProgress {
            end = self.answer_lines(batch).await?;
            if end == End::Stopped {
                return Ok(());
            }
            record = on_disk(batch, move |batch| begin_end(batch, end)).await?;
        }
        let is_over = match record.status {
            Status::Finalizing => Status::Completed,
            Status::Cancelling => Status::Cancelled,
            Status::InProgress if end == End::Expired => Status::Expired,
            _ => return Ok(()),
        };
        let files = self.files.clone();
        on_disk(batch, move |batch| finish(batch, &files, is_over)).await
    }

    /// Answers the lines that are not answered yet.
    async fn answer_lines(&self, batch: &Arc<Batch>) -> io::Result<End> {
        let record = batch.record();
        let (mut journal, mut source) = on_disk(batch, |batch| {
            let (journal, answered, counts) = Journal::open(&batch.answers())?;
            batch.set_counts(counts);
            Ok((journal, Source { lines: Some(Lines::open(&batch.input())?), answered }))
        })
        .await?;
        let mut next = source.next(&record.endpoint).await?;
        let mut running = JoinSet::new();
        let expired = tokio::time::sleep(Duration::from_secs(record.expires_at.saturating_sub(now_s())));
        tokio::pin!(expired);
        let end = loop {
            if next.is_none() && running.is_empty() {
                break End::Done;
            }
            tokio::select! {
                biased;
                () = batch.cancelled.notified() => break End::Cancelled,
                () = &mut expired => break End::Expired,
                () = self.shutdown.reached(ShutdownStage::Drain) => break End::Stopped,
                Some(answer) = running.join_next() => {
                    let group = joined(answer, &mut running)?;
                    journal = kept(batch, journal, group).await?;
                }
                slot = Arc::clone(&self.slots).acquire_owned(), if next.is_some() => {
                    let (Some(line), Ok(slot)) = (next.take(), slot) else { break End::Stopped };
                    running.spawn(answered_line(self.lines.clone(), record.clone(), line, slot));
                    next = source.next(&record.endpoint).await?;
                }
            }
        };
        if let Some(answer) = running.try_join_next() {
            let group = joined(answer, &mut running)?;
            kept(batch, journal, group).await?;
        }
        Ok(end)
    }
}

type Joined = Result<Answer, tokio::task::JoinError>;

/// An answer, and those that are there with it.
fn joined(first: Joined, running: &mut JoinSet<Answer>) -> io::Result<Vec<Answer>> {
    let mut group = vec![first.map_err(Error::other)?];
    while let Some(answer) = running.try_join_next() {
        group.push(answer.map_err(Error::other)?);
    }
    Ok(group)
}

/// Writes answers down, then counts them.
async fn kept(batch: &Arc<Batch>, mut journal: Journal, group: Vec<Answer>) -> io::Result<Journal> {
    on_disk(batch, move |batch| {
        journal.append(&group)?;
        let mut counts = batch.counts();
        group.iter().for_each(|answer| *counts.of(answer.is_success) += 1);
        batch.set_counts(counts);
        Ok(journal)
    })
    .await
}

/// Runs work on a batch that waits for the disk on a thread that may wait.
async fn on_disk<T: Send + 'static>(
    batch: &Arc<Batch>,
    work: impl FnOnce(&Batch) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let batch = Arc::clone(batch);
    tokio::task::spawn_blocking(move || work(&batch)).await.map_err(Error::other)?
}

/// The lines that are not answered yet.
struct Source {
    lines: Option<Lines>,
    answered: HashSet<u64>,
}

impl Source {
    async fn next(&mut self, endpoint: &str) -> io::Result<Option<Line>> {
        let Some(mut lines) = self.lines.take() else { return Ok(None) };
        let answered = std::mem::take(&mut self.answered);
        let read = tokio::task::spawn_blocking(move || {
            let next = loop {
                match lines.next()? {
                    Some((number, _)) if answered.contains(&number) => {}
                    next => break next,
                }
            };
            Ok::<_, Error>((next, lines, answered))
        });
        let (next, lines, answered) = read.await.map_err(Error::other)??;
        self.answered = answered;
        let Some((number, bytes)) = next else { return Ok(None) };
        self.lines = Some(lines);
        let changed = |_| Error::other(format!("line {number} of the input has changed"));
        input::read(number, &bytes, endpoint).map(Some).map_err(changed)
    }
}

fn validate(batch: &Batch) -> io::Result<BatchRecord> {
    let checked = input::check(&batch.input(), &batch.record().endpoint)?;
    let record = batch.change(|record| {
        if record.status != Status::Validating {
            return;
        }
        match checked {
            Ok(total) => {
                record.total = total;
                record.reach(Status::InProgress, now_s());
            }
            Err(errors) => {
                record.errors = errors;
                record.reach(Status::Failed, now_s());
            }
        }
    })?;
    if record.status == Status::Failed {
        batch.tidy()?;
    }
    Ok(record)
}

fn begin_end(batch: &Batch, end: End) -> io::Result<BatchRecord> {
    batch.change(|record| {
        if record.status == Status::InProgress && end != End::Expired {
            record.reach(Status::Finalizing, now_s());
        }
    })
}

fn fail(batch: &Batch, error: &Error) -> io::Result<()> {
    let counts = batch.counts();
    let message = format!("the server could not work on it: {error}");
    batch.change(|record| {
        record.errors =
            vec![json!({"code": "server_error", "message": message, "param": null, "line": null})];
        record.counts = counts;
        record.reach(Status::Failed, now_s());
    })?;
    batch.tidy()
}

/// Writes the files and ends the batch. Done again after a crash, it writes the same files.
fn finish(batch: &Batch, files: &Files, status: Status) -> io::Result<()> {
    let record = batch.record();
    let mut drafts: [Option<Draft>; 2] = [None, None];
    let mut write = |at: usize, text: &str| {
        let draft = match &mut drafts[at] {
            Some(draft) => draft,
            none => none.insert(files.begin_as(&record.tenant, record.output_files[at].clone())?),
        };
        draft.write(text.as_bytes())?;
        draft.write(b"\n")
    };
    let (_, answered, counts) = Journal::open(&batch.answers())?;
    journal::read(&batch.answers(), |answer| write(usize::from(!answer.is_success), &answer.result))?;
    if let Some((code, message)) = unanswered(status) {
        let mut lines = Lines::open(&batch.input())?;
        while let Some((number, bytes)) = lines.next()? {
            if answered.contains(&number) {
                continue;
            }
            // Of a batch that was cancelled before its lines were checked, not all may be lines.
            let Ok(line) = input::read(number, &bytes, &record.endpoint) else { continue };
            let error = json!({"code": code, "message": message});
            let result = result(&line.custom_id, Value::Null, error);
            write(1, &result.to_string())?;
        }
    }
    let mut has_files = [false, false];
    for (at, draft) in drafts.into_iter().enumerate() {
        let Some(draft) = draft else { continue };
        let filename = format!("{}_{}.jsonl", record.id, ["output", "error"][at]);
        let purpose = "batch_output".to_owned();
        files.keep(draft, About { filename, purpose, lifetime_s: record.output_lifetime_s })?;
        has_files[at] = true;
    }
    batch.set_counts(counts);
    batch.change(|record| {
        (record.has_files, record.counts) = (has_files, counts);
        record.reach(status, now_s());
    })?;
    batch.tidy()
}

/// What is told of lines that were not answered.
fn unanswered(status: Status) -> Option<(&'static str, &'static str)> {
    match status {
        Status::Expired => {
            Some(("batch_expired", "the request was not executed before the completion window was over"))
        }
        Status::Cancelled => {
            Some(("batch_cancelled", "the batch was cancelled before the request was executed"))
        }
        _ => None,
    }
}

/// A line of an output file.
fn result(custom_id: &str, response: Value, error: Value) -> Value {
    json!({"id": random::id("batch_req_"), "custom_id": custom_id, "response": response, "error": error})
}

/// Has a line answered, as often as it takes while there is no room for it.
async fn answered_line(
    lines: Router,
    batch: BatchRecord,
    mut line: Line,
    _slot: OwnedSemaphorePermit,
) -> Answer {
    line.body.insert("priority".to_owned(), json!(priority::LAST));
    let body = Value::Object(line.body).to_string();
    let [mut pause, longest] = PAUSE;
    loop {
        let mut request = Request::post(&batch.endpoint)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body.clone()))
            .expect("an endpoint is a path");
        request.extensions_mut().insert(Tenant(batch.tenant.as_str().into()));
        let Ok(response) = lines.clone().oneshot(request).await;
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let code = body["error"]["code"].as_str().unwrap_or_default();
        if !status.is_success() && PASSING.contains(&code) {
            tokio::time::sleep(pause).await;
            pause = longest.min(pause * 2);
            continue;
        }
        let request_id = headers.get("x-request-id").and_then(|id| id.to_str().ok());
        let response = json!({"status_code": status.as_u16(), "request_id": request_id, "body": body});
        let result = result(&line.custom_id, response, Value::Null).to_string();
        return Answer { line: line.number, is_success: status.is_success(), result };
    }
}
