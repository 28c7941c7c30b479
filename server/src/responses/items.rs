//! Items of a conversation as the Responses API has them: those of a client, checked and named, and the messages that
//! they are to a chat template.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::openai::fields::{Fields, unexpected};

/// Items of tools that run elsewhere. They are kept and shown again; of those with a `call_id` the model sees the call
/// and its result.
const FOREIGN: [&str; 21] = [
    "additional_tools",
    "apply_patch_call",
    "apply_patch_call_output",
    "code_interpreter_call",
    "computer_call",
    "computer_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "file_search_call",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_call",
    "mcp_list_tools",
    "program",
    "program_output",
    "shell_call",
    "shell_call_output",
    "tool_search_call",
    "web_search_call",
];

pub(crate) const APPROVAL_REQUEST: &str = "mcp_approval_request";
pub(crate) const APPROVAL_RESPONSE: &str = "mcp_approval_response";

/// The field `input`, or `items`: a text, which is a user's message, or items. Each gets an id and a status.
pub(crate) fn read(fields: &Fields<'_, '_>, field: &'static str) -> Result<Vec<Value>, ApiError> {
    match fields.get(field) {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![user_message(text)]),
        Some(Value::Array(items)) => {
            let item = |(at, item): (usize, &Value)| read_item(item, &format!("{field}[{at}]"));
            items.iter().enumerate().map(item).collect()
        }
        Some(other) => Err(unexpected(field, "a string or an array of items", other)),
    }
}

fn user_message(text: &str) -> Value {
    json!({
        "id": crate::random::id("msg_"),
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [{"type": "input_text", "text": text}],
    })
}

fn read_item(item: &Value, path: &str) -> Result<Value, ApiError> {
    let object = item.as_object().ok_or_else(|| unexpected(path, "an object", item))?;
    let fields = Fields::at(object, path);
    let kind = fields.string("type")?.unwrap_or("message");
    let (prefix, mut item) = match kind {
        "message" => ("msg_", read_message(&fields)?),
        "function_call" => {
            for field in ["call_id", "name", "arguments"] {
                fields.required_string(field)?;
            }
            ("fc_", owned(object))
        }
        "function_call_output" => {
            fields.required_string("call_id")?;
            check_output(&fields)?;
            ("fco_", owned(object))
        }
        "reasoning" => {
            for field in ["summary", "content"] {
                fields.array(field)?;
            }
            let mut item = owned(object);
            item.entry("summary").or_insert_with(|| json!([]));
            ("rs_", item)
        }
        "item_reference" => {
            fields.required_string("id")?;
            ("", owned(object))
        }
        "compaction" | "compaction_summary" => {
            fields.required_string("encrypted_content")?;
            ("cmp_", owned(object))
        }
        APPROVAL_RESPONSE => {
            fields.required_string("approval_request_id")?;
            fields.string("reason")?;
            if fields.bool("approve")?.is_none() {
                return Err(fields.missing("approve", "true or false"));
            }
            ("mcpa_", owned(object))
        }
        kind if FOREIGN.contains(&kind) => {
            fields.string("call_id")?;
            ("item_", owned(object))
        }
        other => {
            let expected = "message, function_call, function_call_output, reasoning, item_reference or another \
                            type of item";
            return Err(unexpected(fields.name("type"), expected, &json!(other)));
        }
    };
    match fields.string("id")? {
        Some(id) if !id.is_empty() => item.insert("id".to_owned(), json!(id)),
        _ => item.insert("id".to_owned(), json!(crate::random::id(prefix))),
    };
    if matches!(kind, "message" | "function_call" | "function_call_output") {
        fields.string("status")?;
        item.entry("status").or_insert_with(|| json!("completed"));
    }
    Ok(Value::Object(item))
}

fn owned(object: &Map<String, Value>) -> Map<String, Value> {
    object
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn read_message(fields: &Fields<'_, '_>) -> Result<Map<String, Value>, ApiError> {
    let role = fields.required_string("role")?;
    let is_answer = match role {
        "user" | "system" | "developer" => false,
        "assistant" => true,
        other => {
            let expected = "user, assistant, system or developer";
            return Err(unexpected(fields.name("role"), expected, &json!(other)));
        }
    };
    let content = match fields.get("content") {
        Some(Value::String(text)) => vec![part(is_answer, text)],
        Some(Value::Array(parts)) => {
            let path = fields.name("content");
            let read = |(at, value)| read_part(value, &format!("{path}[{at}]"), is_answer);
            parts.iter().enumerate().map(read).collect::<Result<_, _>>()?
        }
        Some(other) => {
            return Err(unexpected(fields.name("content"), "a string or an array of parts", other));
        }
        None => return Err(fields.missing("content", "a string or an array of parts")),
    };
    let mut message = Map::new();
    message.insert("type".to_owned(), json!("message"));
    message.insert("role".to_owned(), json!(role));
    message.insert("content".to_owned(), Value::from(content));
    if let Some(phase) = fields.string("phase")? {
        message.insert("phase".to_owned(), json!(phase));
    }
    if let Some(status) = fields.string("status")? {
        message.insert("status".to_owned(), json!(status));
    }
    Ok(message)
}

fn part(is_answer: bool, text: &str) -> Value {
    match is_answer {
        true => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}),
        false => json!({"type": "input_text", "text": text}),
    }
}

fn read_part(value: &Value, path: &str, is_answer: bool) -> Result<Value, ApiError> {
    let object = value.as_object().ok_or_else(|| unexpected(path, "an object", value))?;
    let fields = Fields::at(object, path);
    match fields.required_string("type")? {
        "input_text" | "output_text" | "text" => Ok(part(is_answer, fields.required_string("text")?)),
        "refusal" => Ok(json!({"type": "refusal", "refusal": fields.required_string("refusal")?})),
        kind @ ("input_image" | "input_file" | "input_audio" | "computer_screenshot") => {
            let message = format!("parts of type `{kind}` are not supported; this model reads text only");
            Err(ApiError::unsupported(fields.name("type"), message))
        }
        other => Err(unexpected(fields.name("type"), "input_text, output_text or refusal", &json!(other))),
    }
}

/// The result of a call: text, or parts of text.
fn check_output(fields: &Fields<'_, '_>) -> Result<(), ApiError> {
    match fields.get("output") {
        Some(Value::String(_)) => Ok(()),
        Some(Value::Array(parts)) => {
            let path = fields.name("output");
            let mut parts = parts.iter().enumerate();
            parts.try_for_each(|(at, value)| read_part(value, &format!("{path}[{at}]"), false).map(drop))
        }
        Some(other) => Err(unexpected(fields.name("output"), "a string or an array of parts", other)),
        None => Err(fields.missing("output", "a string or an array of parts")),
    }
}

/// Replaces references by the items of `past` that they name.
pub(crate) fn resolve(items: Vec<Value>, past: &[Value]) -> Result<Vec<Value>, ApiError> {
    let resolved = |item: Value| {
        if item["type"] != "item_reference" {
            return Ok(item);
        }
        let found = past.iter().find(|known| known["id"] == item["id"]);
        found.cloned().ok_or_else(|| {
            let message = format!("expected the id of an item before, found {}", item["id"]);
            ApiError::field("input", message)
        })
    };
    items.into_iter().map(resolved).collect()
}

/// What the result of a call names it by. Calls that this server made have no other id than their item's.
fn called(item: &Value) -> Option<&Value> {
    match item["type"].as_str()? {
        "function_call" => Some(&item["call_id"]),
        "mcp_call" => Some(&item["id"]),
        _ => None,
    }
}

/// Each result of a function must belong to a call before it, in `past` or among the items.
pub(crate) fn check_results(items: &[Value], past: &[Value]) -> Result<(), ApiError> {
    let mut calls: HashSet<&Value> = past.iter().filter_map(called).collect();
    for (at, item) in items.iter().enumerate() {
        calls.extend(called(item));
        let id = &item["call_id"];
        if item["type"] == "function_call_output" && !calls.contains(id) {
            let expected = "the call_id of a function call before it";
            return Err(unexpected(format!("input[{at}].call_id"), expected, id));
        }
    }
    Ok(())
}

/// An item as lists show it: messages of a conversation have a status.
pub(crate) fn shown(mut item: Value) -> Value {
    if item["type"] == "message" && item["status"].is_null() {
        item["status"] = json!("completed");
    }
    item
}

/// The text of a list of parts.
pub(crate) fn text(parts: &Value) -> String {
    if let Some(text) = parts.as_str() {
        return text.to_owned();
    }
    let parts = parts.as_array().map(Vec::as_slice).unwrap_or_default();
    let texts: Vec<&str> =
        parts.iter().filter_map(|part| part["text"].as_str().or_else(|| part["refusal"].as_str())).collect();
    texts.join("\n")
}

/// An assistant's message that items are gathered into: reasoning, then text, then calls.
#[derive(Default)]
struct Answer {
    reasoning: String,
    content: Option<String>,
    calls: Vec<Value>,
    /// Results of calls that the server has made.
    results: Vec<Value>,
    /// Which answer of its response it is.
    round: u64,
}

impl Answer {
    fn flush(&mut self, messages: &mut Vec<Value>) {
        let Answer { reasoning, content, calls, results, .. } = std::mem::take(self);
        if content.is_none() && calls.is_empty() {
            // Reasoning that led to nothing is no message.
            return;
        }
        let mut message = json!({"role": "assistant", "content": content});
        if !reasoning.is_empty() {
            message["reasoning_content"] = json!(reasoning);
        }
        if !calls.is_empty() {
            message["tool_calls"] = json!(calls);
        }
        messages.push(message);
        messages.extend(results);
    }
}

/// The messages that items are, as a client of chat completions would write them.
pub(crate) fn messages(items: &[Value]) -> Vec<Value> {
    let (mut messages, mut answer) = (Vec::new(), Answer::default());
    for item in items {
        let kind = item["type"].as_str().unwrap_or_default();
        match kind {
            "message" if item["role"] == "assistant" => {
                if answer.content.is_some() || !answer.calls.is_empty() {
                    answer.flush(&mut messages);
                }
                answer.content = Some(text(&item["content"]));
            }
            "reasoning" => {
                if answer.content.is_some() || !answer.calls.is_empty() {
                    answer.flush(&mut messages);
                }
                let content = text(&item["content"]);
                answer.reasoning += &if content.is_empty() { text(&item["summary"]) } else { content };
            }
            _ => match (call_of(item, kind), result_of(item, kind)) {
                (Some(call), result) => {
                    let round = item["round"].as_u64().unwrap_or(0);
                    if !answer.calls.is_empty() && round != answer.round {
                        answer.flush(&mut messages);
                    }
                    answer.round = round;
                    answer.calls.push(call);
                    answer.results.extend(result);
                }
                (None, other) => {
                    answer.flush(&mut messages);
                    messages.extend(other);
                }
            },
        }
    }
    answer.flush(&mut messages);
    messages
}

/// The call of a tool that an item is.
fn call_of(item: &Value, kind: &str) -> Option<Value> {
    let (name, arguments) = match kind {
        // The request was the call.
        "mcp_call" if item["approval_request_id"].is_string() => return None,
        "function_call" | "mcp_call" | APPROVAL_REQUEST => {
            (item["name"].as_str()?, item["arguments"].as_str()?.to_owned())
        }
        "custom_tool_call" => (item["name"].as_str()?, json!({"input": item["input"]}).to_string()),
        kind => (kind.strip_suffix("_call")?, item["action"].as_object().map(|a| json!(a).to_string())?),
    };
    let id = item["call_id"].as_str().or_else(|| item["id"].as_str())?;
    Some(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// What the model sees of a call that has failed.
pub(crate) fn called_in_vain(error: &str) -> String {
    format!("Error: {error}")
}

/// What else of an item the model sees: a message, or the result of a call.
fn result_of(item: &Value, kind: &str) -> Option<Value> {
    match kind {
        "message" => Some(json!({"role": item["role"], "content": text(&item["content"])})),
        "compaction" | "compaction_summary" => {
            let summary = super::compact::summary(item["encrypted_content"].as_str()?)?;
            Some(json!({"role": "user", "content": summary}))
        }
        "mcp_call" => {
            let text = match (item["output"].as_str(), item["error"].as_str()) {
                (Some(output), _) => output.to_owned(),
                (None, Some(error)) => called_in_vain(error),
                (None, None) => return None,
            };
            let id = item["approval_request_id"].as_str().or_else(|| item["id"].as_str());
            Some(json!({"role": "tool", "tool_call_id": id, "content": text}))
        }
        APPROVAL_RESPONSE if item["approve"] == false => {
            let reason = item["reason"].as_str().map(|reason| format!(": {reason}")).unwrap_or_default();
            let content = format!("The user did not approve this call{reason}");
            Some(json!({"role": "tool", "tool_call_id": item["approval_request_id"], "content": content}))
        }
        kind if kind.ends_with("_output") => {
            Some(json!({"role": "tool", "tool_call_id": item["call_id"], "content": text(&item["output"])}))
        }
        _ => None,
    }
}

/// The items of messages, for turns that came by chat completions.
pub(crate) fn of_messages<'a>(messages: impl Iterator<Item = &'a Value>) -> Vec<Value> {
    let mut items = Vec::new();
    for message in messages {
        let role = message["role"].as_str().unwrap_or("user");
        if role == "tool" {
            let (call, output) = (&message["tool_call_id"], text(&message["content"]));
            items.push(
                json!({"id": crate::random::id("fco_"), "type": "function_call_output", "call_id": call,
                              "output": output, "status": "completed"}),
            );
            continue;
        }
        if let Some(reasoning) = message["reasoning_content"].as_str().filter(|text| !text.is_empty()) {
            items.push(json!({"id": crate::random::id("rs_"), "type": "reasoning", "summary": [],
                              "content": [{"type": "reasoning_text", "text": reasoning}]}));
        }
        let content = text(&message["content"]);
        let calls = message["tool_calls"].as_array().map(Vec::as_slice).unwrap_or_default();
        if !content.is_empty() || calls.is_empty() {
            let parts = [part(role == "assistant", &content)];
            items.push(json!({"id": crate::random::id("msg_"), "type": "message", "status": "completed",
                              "role": role, "content": parts}));
        }
        for call in calls {
            let arguments = &call["function"]["arguments"];
            let arguments = arguments.as_str().map_or_else(|| arguments.to_string(), str::to_owned);
            items.push(json!({"id": crate::random::id("fc_"), "type": "function_call", "call_id": call["id"],
                              "name": call["function"]["name"], "arguments": arguments, "status": "completed"}));
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_input(input: Value) -> Result<Vec<Value>, ApiError> {
        read(&Fields::of(json!({"input": input}).as_object().unwrap()), "input")
    }

    #[test]
    fn items_become_messages_and_come_back() {
        let items = read_input(json!([
            {"role": "developer", "content": "be brief"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            {"type": "local_shell_call", "call_id": "c3", "action": {"type": "exec", "command": ["ls"]}},
            {"type": "local_shell_call_output", "call_id": "c3", "output": "x"},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        ]))
        .unwrap();
        assert!(items.iter().all(|item| item["id"].as_str().is_some_and(|id| !id.is_empty())));
        let call = |id: &str, name: &str, arguments: &str| {
            json!({"id": id, "type": "function",
            "function": {"name": name, "arguments": arguments}})
        };
        let expected = json!([
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "hm",
             "tool_calls": [call("c1", "f", "{}"), call("c2", "g", "{}")]},
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
            {"role": "tool", "tool_call_id": "c2", "content": "2"},
            {"role": "assistant", "content": null,
             "tool_calls": [call("c3", "local_shell", r#"{"type":"exec","command":["ls"]}"#)]},
            {"role": "tool", "tool_call_id": "c3", "content": "x"},
        ]);
        assert_eq!(Value::from(messages(&items)), expected);
        let again = of_messages(messages(&items).iter());
        assert_eq!(messages(&again), messages(&items));
    }

    #[test]
    fn what_is_no_item_is_refused_by_its_place() {
        for (input, param) in [
            (json!(5), "input"),
            (json!([5]), "input[0]"),
            (json!([{"type": "no_such_item"}]), "input[0].type"),
            (json!([{"content": "x"}]), "input[0].role"),
            (json!([{"role": "tool", "content": "x"}]), "input[0].role"),
            (json!([{"role": "user"}]), "input[0].content"),
            (json!([{"role": "user", "content": [{"type": "input_image"}]}]), "input[0].content[0].type"),
            (json!([{"type": "function_call", "call_id": "c"}]), "input[0].name"),
            (json!([{"type": "function_call_output", "call_id": "c"}]), "input[0].output"),
            (json!([{"type": "item_reference"}]), "input[0].id"),
        ] {
            let error = read_input(input.clone()).unwrap_err();
            assert_eq!(error.body()["error"]["param"], param, "{input}");
        }
    }

    #[test]
    fn a_result_follows_its_call() {
        let call = |id: &str| json!({"type": "function_call", "call_id": id});
        let result = |id: &str| json!({"type": "function_call_output", "call_id": id});
        assert!(check_results(&[result("a"), call("b"), result("b")], &[call("a")]).is_ok());
        for (items, param) in [
            (vec![result("b")], "input[0].call_id"),
            (vec![result("a"), result("b"), call("b")], "input[1].call_id"),
        ] {
            let error = check_results(&items, &[call("a")]).unwrap_err();
            assert_eq!(error.body()["error"]["param"], param);
        }
    }

    #[test]
    fn references_are_resolved() {
        let past = [json!({"id": "a", "type": "message"})];
        let items = vec![json!({"id": "a", "type": "item_reference"})];
        assert_eq!(resolve(items, &past).unwrap(), past);
        assert!(resolve(vec![json!({"id": "b", "type": "item_reference"})], &past).is_err());
    }
}
