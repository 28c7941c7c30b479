//! The object `message` and the events that it is streamed as.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};

use super::error;
use crate::choice::Ending;
use crate::error::ApiError;
use crate::generate::{Closing, Run, Update};
use crate::openai::usage::Usage;
use crate::output::Part;
use crate::sse::{COMMIT_AFTER, KEEP_ALIVE};

/// Blocks of content that grow.
#[derive(Default)]
struct Content {
    blocks: Vec<Value>,
    /// Arguments of the call that is being written.
    arguments: String,
    is_open: bool,
}

/// A message under way. Dropped, it stops.
struct Message {
    run: Run,
    id: String,
    content: Content,
    ready: VecDeque<Value>,
    ending: Option<Ending>,
    is_over: bool,
}

/// Answers with a run, whole.
///
/// # Errors
/// What went wrong.
pub(crate) async fn whole(run: Run) -> Result<Response, ApiError> {
    let mut message = Message::new(run);
    while let Some(update) = message.run.next().await {
        message.update(update?);
    }
    message.content.close(&mut message.ready);
    let closing = message.run.close().await?;
    Ok(Json(message.object(Some(&closing))).into_response())
}

/// Answers with a run, as events.
///
/// # Errors
/// What goes wrong before the first of them.
pub(crate) async fn events(run: Run) -> Result<Response, ApiError> {
    let mut message = Message::new(run);
    let first = tokio::time::timeout(COMMIT_AFTER, message.run.next()).await.ok().flatten().transpose()?;
    let object = message.object(None);
    message.ready.push_back(json!({"type": "message_start", "message": object}));
    message.ready.push_back(json!({"type": "ping"}));
    if let Some(update) = first {
        message.update(update);
    }
    let events = stream::unfold(message, |mut message| async move {
        let event = message.next().await?;
        let kind = event["type"].as_str().unwrap_or_default().to_owned();
        Some((Ok::<_, Infallible>(Event::default().event(kind).data(event.to_string())), message))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive")).into_response())
}

impl Message {
    fn new(run: Run) -> Self {
        Self {
            run,
            id: crate::random::id("msg_"),
            content: Content::default(),
            ready: VecDeque::new(),
            ending: None,
            is_over: false,
        }
    }

    /// The object, with what is there of it.
    fn object(&self, closing: Option<&Closing>) -> Value {
        let (reason, sequence) = self.stop();
        let mut object = json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.run.job().model.id,
            "content": self.content.blocks,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage(closing.map_or_else(|| self.run.usage(), |closing| closing.usage)),
        });
        if let Some(closing) = closing {
            object["kv"] = closing.kv.clone();
        }
        object
    }

    fn stop(&self) -> (Value, Value) {
        let calls = self.content.blocks.iter().any(|block| block["type"] == "tool_use");
        match &self.ending {
            None => (Value::Null, Value::Null),
            Some(Ending::Length) => (json!("max_tokens"), Value::Null),
            Some(Ending::String(text)) => (json!("stop_sequence"), json!(text)),
            Some(_) if calls => (json!("tool_use"), Value::Null),
            Some(_) => (json!("end_turn"), Value::Null),
        }
    }

    fn update(&mut self, update: Update) {
        let parts = match update {
            Update::Delta { parts, .. } => parts,
            Update::End { parts, ending, .. } => {
                self.ending = Some(ending);
                parts
            }
        };
        parts.iter().for_each(|part| self.content.part(part, &mut self.ready));
    }

    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            match self.run.next().await {
                Some(Ok(update)) => self.update(update),
                Some(Err(error)) => self.fail(&error),
                None => self.end().await,
            }
        }
    }

    async fn end(&mut self) {
        self.content.close(&mut self.ready);
        match self.run.close().await {
            Ok(closing) => {
                let (reason, sequence) = self.stop();
                self.ready.push_back(json!({
                    "type": "message_delta",
                    "delta": {"stop_reason": reason, "stop_sequence": sequence},
                    "usage": usage(closing.usage),
                    "kv": closing.kv,
                }));
                self.ready.push_back(json!({"type": "message_stop"}));
                self.is_over = true;
            }
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.ready.push_back(error::body(error));
        self.is_over = true;
    }
}

impl Content {
    fn part(&mut self, part: &Part, events: &mut VecDeque<Value>) {
        let (kind, field, delta, text) = match part {
            Part::Text(text) => ("text", "text", "text_delta", text),
            Part::Reasoning(text) => ("thinking", "thinking", "thinking_delta", text),
            Part::CallBegin { id, name, .. } => {
                let block = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                return self.open(block, events);
            }
            Part::CallArguments { text, .. } => {
                self.arguments += text;
                let delta = json!({"type": "input_json_delta", "partial_json": text});
                return events.push_back(self.delta(delta));
            }
        };
        if !self.is_open || self.blocks.last().is_none_or(|block| block["type"] != kind) {
            let mut block = json!({"type": kind, field: ""});
            if kind == "thinking" {
                block["signature"] = json!("");
            }
            self.open(block, events);
        }
        if let Some(block) = self.blocks.last_mut() {
            let grown = block[field].as_str().unwrap_or_default().to_owned() + text;
            block[field] = json!(grown);
        }
        events.push_back(self.delta(json!({"type": delta, field: text})));
    }

    fn delta(&self, delta: Value) -> Value {
        json!({"type": "content_block_delta", "index": self.blocks.len().saturating_sub(1), "delta": delta})
    }

    fn open(&mut self, block: Value, events: &mut VecDeque<Value>) {
        self.close(events);
        events.push_back(json!({
            "type": "content_block_start", "index": self.blocks.len(), "content_block": block,
        }));
        self.blocks.push(block);
        self.is_open = true;
    }

    fn close(&mut self, events: &mut VecDeque<Value>) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let arguments = std::mem::take(&mut self.arguments);
        if let Some(block) = self.blocks.last_mut().filter(|block| block["type"] == "tool_use") {
            // Arguments that were cut are no object.
            block["input"] = serde_json::from_str(&arguments).unwrap_or_else(|_| json!({}));
        }
        events.push_back(json!({"type": "content_block_stop", "index": self.blocks.len() - 1}));
    }
}

/// The object `usage`: what was found in the cache is counted apart.
fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}
