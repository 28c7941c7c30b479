//! The events of a response, from the parts of its answer. A whole response is what its last event holds.

use serde_json::{Map, Value, json};

use super::ids;
use super::object::{ResponseRecord, Status};
use crate::output::Part;

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
}

impl Writer {
    pub(crate) fn new(record: ResponseRecord) -> Self {
        let id = record.id().unwrap_or_default().to_owned();
        let tools = record.0.get("echo").and_then(|echo| echo["tools"].as_array());
        let custom = tools.into_iter().flatten().filter(|tool| tool["type"] == "custom");
        let custom = custom.filter_map(|tool| tool["name"].as_str().map(str::to_owned)).collect();
        // Output of earlier turns of this response goes on.
        let output = record.list("output").to_vec();
        Self { record, id, sequence: 0, output, open: None, custom }
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
        let index = self.output.len() - 1;
        let mut event = json!({"item_id": self.output[index]["id"], "output_index": index});
        if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
            event.extend(fields);
        }
        self.event(kind, event)
    }

    /// The events before any output.
    pub(crate) fn begin(&mut self) -> Vec<Value> {
        vec![self.of_response("response.created"), self.of_response("response.in_progress")]
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
                Some(Open::Custom { arguments }) => arguments.push_str(text),
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
        events.push(self.event("response.output_item.added", json!({"output_index": index, "item": item})));
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
        if self.custom.iter().any(|custom| custom == name) {
            let item = json!({"id": self.item_id("ctc_"), "type": "custom_tool_call", "status": "in_progress",
                              "call_id": call_id, "name": name, "input": ""});
            return self.add(item, Open::Custom { arguments: String::new() });
        }
        let item = json!({"id": self.item_id("fc_"), "type": "function_call", "status": "in_progress",
                          "call_id": call_id, "name": name, "arguments": ""});
        self.add(item, Open::Call { arguments: String::new() })
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
        }
        self.output[index]["status"] = json!(status.of_open_item());
        let item = self.output[index].clone();
        events.push(self.event("response.output_item.done", json!({"output_index": index, "item": item})));
        events
    }

    /// Ends the answer of the model. One that said nothing is an empty message.
    pub(crate) fn end_items(&mut self, status: Status) -> Vec<Value> {
        let mut events = Vec::new();
        if self.output.is_empty() {
            events.extend(self.open_message());
        }
        events.extend(self.close(status));
        events
    }

    /// An item that is whole at once.
    pub(crate) fn whole_item(&mut self, item: Value) -> Vec<Value> {
        let mut events = self.close(Status::Completed);
        self.output.push(item.clone());
        let index = self.output.len() - 1;
        for kind in ["response.output_item.added", "response.output_item.done"] {
            events.push(self.event(kind, json!({"output_index": index, "item": item})));
        }
        events
    }

    /// The last event.
    pub(crate) fn last(&mut self, status: Status) -> Value {
        self.of_response(&format!("response.{}", status.name()))
    }
}
