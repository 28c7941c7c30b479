//! The object `response`, made of what is recorded of one.

use serde_json::{Map, Value, json};

use crate::choice::Ending;
use crate::error::ApiError;
use crate::openai::usage::Usage;

/// How a response stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    InProgress,
    Completed,
    Incomplete,
    Cancelled,
    Failed,
}

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// Of an item that was open when the response ended so.
    pub(crate) fn of_open_item(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::InProgress => "in_progress",
            Self::Incomplete | Self::Cancelled | Self::Failed => "incomplete",
        }
    }

    pub(crate) fn of(ending: &Ending) -> Self {
        if *ending == Ending::Length { Self::Incomplete } else { Self::Completed }
    }
}

/// What is recorded of a response: its object but for what follows from that, and what it was asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ResponseRecord(pub(crate) Map<String, Value>);

impl ResponseRecord {
    /// A response that begins.
    pub(crate) fn new(id: &str, created: u64, echo: Map<String, Value>, input: Vec<Value>) -> Self {
        let mut record = Map::new();
        record.insert("id".to_owned(), json!(id));
        record.insert("created_at".to_owned(), json!(created));
        record.insert("status".to_owned(), json!(Status::InProgress.name()));
        record.insert("echo".to_owned(), Value::Object(echo));
        record.insert("input".to_owned(), Value::from(input));
        Self(record)
    }

    /// Items that stand in a conversation without a response.
    pub(crate) fn of_items(items: Vec<Value>) -> Self {
        Self([("input".to_owned(), Value::from(items))].into_iter().collect())
    }

    /// `None` where a turn is of no response.
    pub(crate) fn read(value: &Value) -> Option<Self> {
        value.as_object().map(|record| Self(record.clone()))
    }

    pub(crate) fn to_json(&self) -> Value {
        Value::Object(self.0.clone())
    }

    pub(crate) fn id(&self) -> Option<&str> {
        self.0.get("id").and_then(Value::as_str)
    }

    pub(crate) fn list(&self, name: &str) -> &[Value] {
        self.0.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
    }

    /// What was said and answered.
    pub(crate) fn items(&self) -> impl Iterator<Item = &Value> {
        self.list("input").iter().chain(self.list("output"))
    }

    /// Notes the records that stood where its turn stands.
    pub(crate) fn set_replaced(&mut self, replaced: &[Self]) {
        self.0.shift_remove("before");
        if !replaced.is_empty() {
            self.set("before", replaced.iter().map(Self::to_json).collect());
        }
    }

    /// The records that it has in `before`. Taken out, they are not written again as a part of it.
    pub(crate) fn take_replaced(&mut self) -> Vec<Self> {
        let before = self.0.shift_remove("before").unwrap_or_default();
        before.as_array().into_iter().flatten().filter_map(Self::read).collect()
    }

    /// How many records before it are no longer shown to the model.
    pub(crate) fn skipped(&self) -> usize {
        self.0.get("skipped").and_then(Value::as_u64).unwrap_or(0) as usize
    }

    /// The response goes on in another turn.
    pub(crate) fn is_partial(&self) -> bool {
        self.0.get("partial").is_some_and(|partial| partial == true)
    }

    /// How many items stand before its first answer.
    pub(crate) fn opened(&self) -> usize {
        let opened = self.0.get("opened").and_then(Value::as_u64).unwrap_or(0) as usize;
        opened.min(self.list("output").len())
    }

    /// How many answers of it stand in turns before its last.
    pub(crate) fn rounds(&self) -> usize {
        self.0.get("rounds").and_then(Value::as_u64).unwrap_or(0) as usize
    }

    pub(crate) fn is_background(&self) -> bool {
        self.0.get("echo").is_some_and(|echo| echo["background"] == true)
    }

    pub(crate) fn status(&self) -> Status {
        let all = [Status::InProgress, Status::Completed, Status::Incomplete, Status::Cancelled];
        let name = self.0.get("status").and_then(Value::as_str).unwrap_or_default();
        all.into_iter().find(|status| status.name() == name).unwrap_or(Status::Failed)
    }

    pub(crate) fn set(&mut self, name: &str, value: Value) {
        self.0.insert(name.to_owned(), value);
    }

    /// Notes how it ended.
    pub(crate) fn end(&mut self, status: Status, output: Vec<Value>, usage: Option<Usage>) {
        self.set("status", json!(status.name()));
        self.set("output", Value::from(output));
        self.set("usage", usage.map_or(Value::Null, usage_object));
        if status == Status::Completed {
            self.set("completed_at", json!(crate::responses::now_s()));
        }
        let reason = (status == Status::Incomplete).then(|| json!({"reason": "max_output_tokens"}));
        self.set("incomplete_details", reason.unwrap_or_default());
    }

    /// Notes what went wrong.
    pub(crate) fn fail(&mut self, error: &ApiError, output: Vec<Value>) {
        self.end(Status::Failed, output, None);
        let code = if error.status.as_u16() == 429 { "rate_limit_exceeded" } else { "server_error" };
        self.set("error", json!({"code": code, "message": error.message()}));
    }

    /// The object.
    pub(crate) fn object(&self) -> Value {
        let own = |name: &str| self.0.get(name).cloned().unwrap_or_default();
        let mut object = json!({
            "id": own("id"),
            "object": "response",
            "created_at": own("created_at"),
            "completed_at": own("completed_at"),
            "status": own("status"),
            "error": own("error"),
            "incomplete_details": own("incomplete_details"),
            "output": self.list("output"),
            "usage": own("usage"),
        });
        if let (Some(object), Some(echo)) = (object.as_object_mut(), own("echo").as_object()) {
            object.extend(echo.clone());
        }
        for name in ["kv", "session"] {
            if let Some(value) = self.0.get(name) {
                object[name] = value.clone();
            }
        }
        object
    }
}

pub(crate) fn usage_object(usage: Usage) -> Value {
    let written = usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens);
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": written},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}
