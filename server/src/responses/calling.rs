//! Between two answers of a response: tools are called, and the model is let go on with what they gave.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::answer::{Answering, Role};
use super::object::{Status, usage_object};
use super::rounds::SPENT;
use crate::error::ApiError;

/// What comes of waiting for a call.
enum Heard {
    Called(usize, Result<String, String>),
    Cancelled,
    Late(ApiError),
    /// A call ended without a result.
    Lost,
    /// All calls have ended.
    Done,
}

impl Answering {
    /// Begins the calls that the answer has. Where the model goes on after them, the answer is written down before.
    pub(super) async fn begin_calls(&mut self) {
        if !self.writer.waits()
            && let Err(error) = self.close_part().await
        {
            return self.stop(Err(error)).await;
        }
        let Some(rounds) = &mut self.rounds else { return };
        let mut calls = JoinSet::new();
        for index in self.writer.pending().to_vec() {
            if !rounds.may_call() {
                let events = self.writer.called(index, Err(SPENT.to_owned()));
                self.ready.extend(events);
                continue;
            }
            let (offer, item) = (Arc::clone(&rounds.offer), self.writer.output()[index].clone());
            calls.spawn(async move { (index, offer.call(&item).await) });
        }
        self.calls = Some(calls);
    }

    /// Writes down an answer that the response goes on after.
    async fn close_part(&mut self) -> Result<(), ApiError> {
        let Some(mut run) = self.run.take() else { return Ok(()) };
        self.spent = self.spent + run.usage();
        let output = self.writer.output().to_vec();
        let record = self.writer.record();
        record.set("output", Value::from(output));
        record.set("usage", usage_object(self.spent));
        let mut part = record.clone();
        part.set("partial", json!(true));
        run.describe(part.to_json());
        run.close().await.map(drop)
    }

    /// Waits for the result of a call, and goes on after the last.
    pub(super) async fn hear_calls(&mut self) {
        match self.hear_call().await {
            Heard::Called(index, result) => {
                let events = self.writer.called(index, result);
                self.ready.extend(events);
            }
            Heard::Cancelled => self.stop(Ok(Status::Cancelled)).await,
            Heard::Late(error) => self.stop(Err(error)).await,
            Heard::Lost => {}
            Heard::Done => {
                self.calls = None;
                for index in self.writer.pending().to_vec() {
                    let events = self.writer.called(index, Err("the call failed".to_owned()));
                    self.ready.extend(events);
                }
                if self.writer.waits() { self.close(Status::Completed).await } else { self.go_on().await }
            }
        }
    }

    async fn hear_call(&mut self) -> Heard {
        let Some(calls) = &mut self.calls else { return Heard::Done };
        let time = self.rounds.as_ref().map(|rounds| rounds.time);
        let limit = time.and_then(|time| time.request.map(|limit| (time.arrived + limit, limit)));
        let late = async {
            let Some((at, limit)) = limit else { return std::future::pending().await };
            tokio::time::sleep_until(at).await;
            ApiError::timeout(limit.as_secs_f64())
        };
        let cancelled = async {
            match &self.role {
                Role::Maker(live) => live.wait_cancelled().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = cancelled => Heard::Cancelled,
            error = late => Heard::Late(error),
            called = calls.join_next() => match called {
                Some(Ok((index, result))) => Heard::Called(index, result),
                // What has no result then is told of when all have ended.
                Some(Err(_)) => Heard::Lost,
                None => Heard::Done,
            },
        }
    }

    /// Lets the model answer again.
    async fn go_on(&mut self) {
        let Some(rounds) = &mut self.rounds else { return };
        let most = rounds.asked.max_output_tokens();
        if most.is_some_and(|most| self.spent.completion_tokens >= most) {
            return self.stop(Ok(Status::Incomplete)).await;
        }
        let (from, round) = (self.writer.round_begin(), self.writer.round());
        let output = self.writer.output().to_vec();
        let Some(feed) = self.feed.as_ref().map(|feed| feed.0.clone()) else { return };
        let record = self.writer.record();
        record.set("output", Value::from(output));
        let mut record = record.clone();
        record.set("rounds", json!(round + 1));
        match rounds.next((&record, from), self.spent, &feed).await {
            Ok(next) => {
                self.writer.next_round();
                (self.run, self.role, self.ending) = (Some(next.run), next.role, None);
            }
            Err(error) => self.stop(Err(error)).await,
        }
    }

    /// Ends the response between two answers.
    async fn stop(&mut self, end: Result<Status, ApiError>) {
        // Calls that are still being made are given up.
        self.calls = None;
        let status = end.as_ref().copied().unwrap_or(Status::Failed);
        let events = self.writer.end_items(status);
        self.ready.extend(events);
        let output = self.writer.output().to_vec();
        match &end {
            Ok(status) => self.writer.record().end(*status, output, Some(self.spent)),
            Err(error) => self.writer.record().fail(error, output),
        }
        if let Some(mut run) = self.run.take() {
            // The client had to act on this answer too, so it is not written down yet.
            run.describe(self.writer.record().to_json());
            if let Err(error) = run.close().await {
                tracing::warn!(error = error.message(), "the end of a response was not written");
            }
        } else if let Some(rounds) = &self.rounds
            && let Err(error) = rounds.note(self.writer.record()).await
        {
            tracing::warn!(error = error.message(), "the end of a response was not written");
        }
        self.last(status);
    }
}
