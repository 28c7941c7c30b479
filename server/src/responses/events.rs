//! The events of a response, from the parts of its answer. A whole response is what its last event holds.

use serde_json::{Map, Value, json};

use super::ids;
use super::mcp::{self, Offered};
use super::object::{ResponseRecord, Status};
use crate::output::Part;

const ADDED: &str = "response.output_item.added";

/// The item that is being written.
enum Open {
    Message {
        text: String,
        logprobs: Vec<Value>,
    },
    Reasoning {
        text: String,
    },
    Call {
        arguments: String,
    },
    /// A call of a tool that takes any text; it is shown when it is whole.
    Custom {
        arguments: String,
    },
    /// A call of an MCP server's tool. Its item ends with the call's result.
    Mcp {
        arguments: String,
    },
    /// One that waits for the client's approval; it is shown when it is whole.
    Approval {
        arguments: String,
    },
}

/// Writes the events of one response.
pub(crate) struct Writer {
    record: ResponseRecord,
    id: String,
    sequence: u64,
    output: Vec<Value>,
    open: Option<Open>,
    /// Tools of type `custom`.
    custom: Vec<String>,
    /// Tools of MCP servers.
    mcp: Vec<Offered>,
    /// Items that are there before the model answers.
    opened: Vec<Value>,
    /// Calls of MCP servers' tools that have no result yet.
    pending: Vec<usize>,
    /// The answer has a call that the client has to answer.
    waits: bool,
    /// Answers of this response before this one, and where in the output it begins.
    round: usize,
    round_begin: usize,
}

impl Writer {
    pub(crate) fn new(record: ResponseRecord) -> Self {
        let id = record.id().unwrap_or_default().to_owned();
        let tools = record.0.get("echo").and_then(|echo| echo["tools"].as_array());
        let custom = tools.into_iter().flatten().filter(|tool| tool["type"] == "custom");
        let custom = custom.filter_map(|tool| tool["name"].as_str().map(str::to_owned)).collect();
        let mcp = Offered::read_all(record.0.get("mcp").unwrap_or(&Value::Null));
        let (opened, round) = (record.list("output").to_vec(), record.rounds());
        Self {
            record,
            id,
            sequence: 0,
            output: Vec::new(),
            open: None,
            custom,
            mcp,
            opened,
            pending: Vec::new(),
            waits: false,
            round,
            round_begin: 0,
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn record(&mut self) -> &mut ResponseRecord {
        &mut self.record
    }

    pub(crate) fn output(&self) -> &[Value] {
        &self.output
    }

    /// The number of the next event.
    pub(crate) fn set_sequence(&mut self, sequence: u64) {
        self.sequence = sequence;
    }

    fn event(&mut self, kind: &str, fields: Value) -> Value {
        let mut event = Map::new();
        event.insert("type".to_owned(), json!(kind));
        event.insert("sequence_number".to_owned(), json!(self.sequence));
        self.sequence += 1;
        if let Value::Object(fields) = fields {
            event.extend(fields);
        }
        Value::Object(event)
    }

    fn of_response(&mut self, kind: &str) -> Value {
        let response = self.record.object();
        self.event(kind, json!({"response": response}))
    }

    /// An event about the item that is open.
    fn of_item(&mut self, kind: &str, fields: Value) -> Value {
        self.of_item_at(self.output.len() - 1, kind, fields)
    }

    fn of_item_at(&mut self, index: usize, kind: &str, fields: Value) -> Value {
        let mut event = json!({"item_id": self.output[index]["id"], "output_index": index});
        if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
            event.extend(fields);
        }
        self.event(kind, event)
    }

    /// The events before any output.
    pub(crate) fn begin(&mut self) -> Vec<Value> {
        let opened = std::mem::take(&mut self.opened);
        self.record.set("output", Value::Array(Vec::new()));
        let mut events = vec![self.of_response("response.created"), self.of_response("response.in_progress")];
        events.extend(opened.into_iter().flat_map(|item| self.whole_item(item)));
        self.record.set("output", Value::from(self.output.clone()));
        self.round_begin = self.output.len();
        events
    }

    /// More of the answer; `logprobs` are those of the tokens that it came with.
    pub(crate) fn part(&mut self, part: &Part, logprobs: Vec<Value>) -> Vec<Value> {
        let mut events = Vec::new();
        match part {
            Part::Text(text) => {
                if !matches!(self.open, Some(Open::Message { .. })) {
                    events.extend(self.open_message());
                }
                events.push(self.of_item(
                    "response.output_text.delta",
                    json!({"content_index": 0, "delta": text, "logprobs": logprobs}),
                ));
                if let Some(Open::Message { text: all, logprobs: scores }) = &mut self.open {
                    all.push_str(text);
                    scores.extend(logprobs);
                }
            }
            Part::Reasoning(text) => {
                if !matches!(self.open, Some(Open::Reasoning { .. })) {
                    events.extend(self.open_reasoning());
                }
                let delta = json!({"content_index": 0, "delta": text});
                events.push(self.of_item("response.reasoning_text.delta", delta));
                if let Some(Open::Reasoning { text: all }) = &mut self.open {
                    all.push_str(text);
                }
            }
            Part::CallBegin { id, name, .. } => events.extend(self.open_call(id, name)),
            Part::CallArguments { text, .. } => match &mut self.open {
                Some(Open::Call { arguments }) => {
                    arguments.push_str(text);
                    events
                        .push(self.of_item("response.function_call_arguments.delta", json!({"delta": text})));
                }
                Some(Open::Mcp { arguments }) => {
                    arguments.push_str(text);
                    events.push(self.of_item("response.mcp_call_arguments.delta", json!({"delta": text})));
                }
                Some(Open::Custom { arguments } | Open::Approval { arguments }) => arguments.push_str(text),
                _ => {}
            },
        }
        events
    }

    fn add(&mut self, item: Value, open: Open) -> Vec<Value> {
        let mut events = self.close(Status::Completed);
        self.output.push(item.clone());
        self.open = Some(open);
        let index = self.output.len() - 1;
        events.push(self.event(ADDED, json!({"output_index": index, "item": item})));
        events
    }

    fn item_id(&self, prefix: &str) -> String {
        ids::output_item(prefix, &self.id, self.output.len())
    }

    fn open_message(&mut self) -> Vec<Value> {
        let item = json!({"id": self.item_id("msg_"), "type": "message", "status": "in_progress",
                          "role": "assistant", "content": []});
        let mut events = self.add(item, Open::Message { text: String::new(), logprobs: Vec::new() });
        let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
        events.push(self.of_item("response.content_part.added", json!({"content_index": 0, "part": part})));
        events
    }

    fn open_reasoning(&mut self) -> Vec<Value> {
        let item = json!({"id": self.item_id("rs_"), "type": "reasoning", "status": "in_progress",
                          "summary": [], "content": []});
        let mut events = self.add(item, Open::Reasoning { text: String::new() });
        let part = json!({"type": "reasoning_text", "text": ""});
        events.push(self.of_item("response.content_part.added", json!({"content_index": 0, "part": part})));
        events
    }

    fn open_call(&mut self, call_id: &str, name: &str) -> Vec<Value> {
        if let Some(tool) = self.mcp.iter().find(|tool| tool.function == name).cloned() {
            return self.open_mcp(&tool);
        }
        self.waits = true;
        if self.custom.iter().any(|custom| custom == name) {
            let item = json!({"id": self.item_id("ctc_"), "type": "custom_tool_call", "status": "in_progress",
                              "call_id": call_id, "name": name, "input": ""});
            return self.add(self.in_round(item), Open::Custom { arguments: String::new() });
        }
        let item = json!({"id": self.item_id("fc_"), "type": "function_call", "status": "in_progress",
                          "call_id": call_id, "name": name, "arguments": ""});
        self.add(self.in_round(item), Open::Call { arguments: String::new() })
    }

    fn open_mcp(&mut self, tool: &Offered) -> Vec<Value> {
        if tool.needs_approval {
            self.waits = true;
            let item = json!({"id": self.item_id("mcpr_"), "type": "mcp_approval_request",
                              "server_label": tool.label, "name": tool.name, "arguments": ""});
            return self.add(self.in_round(item), Open::Approval { arguments: String::new() });
        }
        let item = json!({"id": self.item_id("mcp_"), "type": "mcp_call", "status": "in_progress",
                          "approval_request_id": null, "server_label": tool.label, "name": tool.name,
                          "arguments": "", "output": null, "error": null});
        let mut events = self.add(self.in_round(item), Open::Mcp { arguments: String::new() });
        events.push(self.of_item("response.mcp_call.in_progress", json!({})));
        events
    }

    /// A call says which answer of its response it belongs to, where that is not the first.
    fn in_round(&self, mut item: Value) -> Value {
        if self.round > 0 {
            item["round"] = json!(self.round);
        }
        item
    }

    /// Ends the item that is open, if one is.
    fn close(&mut self, status: Status) -> Vec<Value> {
        let Some(open) = self.open.take() else { return Vec::new() };
        let mut events = Vec::new();
        let index = self.output.len() - 1;
        match open {
            Open::Message { text, logprobs } => {
                let part =
                    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs});
                let done = json!({"content_index": 0, "text": text, "logprobs": logprobs});
                events.push(self.of_item("response.output_text.done", done));
                let done = json!({"content_index": 0, "part": part});
                events.push(self.of_item("response.content_part.done", done));
                self.output[index]["content"] = json!([part]);
            }
            Open::Reasoning { text } => {
                let part = json!({"type": "reasoning_text", "text": text});
                let done = json!({"content_index": 0, "text": text});
                events.push(self.of_item("response.reasoning_text.done", done));
                let done = json!({"content_index": 0, "part": part});
                events.push(self.of_item("response.content_part.done", done));
                self.output[index]["content"] = json!([part]);
            }
            Open::Call { arguments } => {
                let name = self.output[index]["name"].clone();
                let done = json!({"name": name, "arguments": arguments});
                events.push(self.of_item("response.function_call_arguments.done", done));
                self.output[index]["arguments"] = json!(arguments);
            }
            Open::Custom { arguments } => {
                let given: Value = serde_json::from_str(&arguments).unwrap_or_default();
                let input = given["input"].as_str().unwrap_or(&arguments).to_owned();
                events.push(self.of_item("response.custom_tool_call_input.delta", json!({"delta": input})));
                events.push(self.of_item("response.custom_tool_call_input.done", json!({"input": input})));
                self.output[index]["input"] = json!(input);
            }
            Open::Mcp { arguments } => {
                let done = json!({"arguments": arguments});
                events.push(self.of_item("response.mcp_call_arguments.done", done));
                self.output[index]["arguments"] = json!(arguments);
                if status == Status::Completed {
                    self.pending.push(index);
                    return events;
                }
            }
            Open::Approval { arguments } => {
                self.output[index]["arguments"] = json!(arguments);
                events.push(self.item_done(index));
                return events;
            }
        }
        self.output[index]["status"] = json!(status.of_open_item());
        events.push(self.item_done(index));
        events
    }

    fn item_done(&mut self, index: usize) -> Value {
        let item = self.output[index].clone();
        self.event("response.output_item.done", json!({"output_index": index, "item": item}))
    }

    /// Ends the answer of the model. One that said nothing is an empty message. Where it was cut, so are its calls.
    pub(crate) fn end_items(&mut self, status: Status) -> Vec<Value> {
        let mut events = Vec::new();
        if self.output.len() == self.round_begin {
            events.extend(self.open_message());
        }
        events.extend(self.close(status));
        if status != Status::Completed {
            for index in std::mem::take(&mut self.pending) {
                self.output[index]["status"] = json!(status.of_open_item());
                events.push(self.item_done(index));
            }
        }
        events
    }

    /// Calls that are to be made now.
    pub(crate) fn pending(&self) -> &[usize] {
        &self.pending
    }

    /// Answers of this response before this one.
    pub(crate) fn round(&self) -> usize {
        self.round
    }

    /// Where in the output this answer begins.
    pub(crate) fn round_begin(&self) -> usize {
        self.round_begin
    }

    /// Whether the client has to do something before the model can go on.
    pub(crate) fn waits(&self) -> bool {
        self.waits
    }

    /// A call has its result.
    pub(crate) fn called(&mut self, index: usize, result: Result<String, String>) -> Vec<Value> {
        self.pending.retain(|pending| *pending != index);
        let kind = if result.is_ok() { "response.mcp_call.completed" } else { "response.mcp_call.failed" };
        mcp::finish(&mut self.output[index], result);
        vec![self.of_item_at(index, kind, json!({})), self.item_done(index)]
    }

    /// The model answers again.
    pub(crate) fn next_round(&mut self) {
        (self.round, self.round_begin, self.waits) = (self.round + 1, self.output.len(), false);
        self.record.set("rounds", json!(self.round));
    }

    /// An item that is whole at once.
    pub(crate) fn whole_item(&mut self, item: Value) -> Vec<Value> {
        match item["type"].as_str() {
            Some("mcp_list_tools") => self.list_item(item),
            Some("mcp_call") => self.call_item(item),
            _ => self.plain_item(item),
        }
    }

    fn list_item(&mut self, item: Value) -> Vec<Value> {
        let begun = json!({"id": item["id"], "type": item["type"], "server_label": item["server_label"],
                           "tools": [], "error": null});
        let index = self.output.len();
        let mut events = vec![self.event(ADDED, json!({"output_index": index, "item": begun}))];
        let end = if item["error"].is_null() { "completed" } else { "failed" };
        self.output.push(item);
        for kind in ["in_progress", end] {
            events.push(self.of_item(&format!("response.mcp_list_tools.{kind}"), json!({})));
        }
        events.push(self.item_done(index));
        events
    }

    fn call_item(&mut self, item: Value) -> Vec<Value> {
        let mut begun = item.clone();
        for (name, value) in [
            ("status", json!("in_progress")),
            ("arguments", json!("")),
            ("output", Value::Null),
            ("error", Value::Null),
        ] {
            begun[name] = value;
        }
        let index = self.output.len();
        let arguments = item["arguments"].clone();
        let end = if item["status"] == "completed" { "completed" } else { "failed" };
        let mut events = vec![self.event(ADDED, json!({"output_index": index, "item": begun}))];
        self.output.push(item);
        for (kind, fields) in [
            ("mcp_call.in_progress", json!({})),
            ("mcp_call_arguments.delta", json!({"delta": arguments})),
            ("mcp_call_arguments.done", json!({"arguments": arguments})),
            (&format!("mcp_call.{end}"), json!({})),
        ] {
            events.push(self.of_item(&format!("response.{kind}"), fields));
        }
        events.push(self.item_done(index));
        events
    }

    fn plain_item(&mut self, item: Value) -> Vec<Value> {
        let mut events = self.close(Status::Completed);
        self.output.push(item.clone());
        let index = self.output.len() - 1;
        for kind in [ADDED, "response.output_item.done"] {
            events.push(self.event(kind, json!({"output_index": index, "item": item})));
        }
        events
    }

    /// The last event.
    pub(crate) fn last(&mut self, status: Status) -> Value {
        self.of_response(&format!("response.{}", status.name()))
    }
}
