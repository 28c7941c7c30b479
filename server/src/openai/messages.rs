//! Messages of a conversation: checked, and brought into the form that chat templates are written for.

use serde_json::{Map, Value, json};

use super::fields::{Fields, unexpected};
use crate::error::ApiError;

const ROLES: &str = "system, developer, user, assistant, tool or function";

/// The messages as a template sees them: content is text, arguments of tool calls are objects, nulls are gone.
/// `developer` names the role that stands for a developer's message in this template.
pub(crate) fn read(fields: &Fields<'_, '_>, developer: &str) -> Result<Vec<Value>, ApiError> {
    let items =
        fields.array("messages")?.ok_or_else(|| fields.missing("messages", "an array of messages"))?;
    if items.is_empty() {
        return Err(ApiError::field("messages", "expected at least one message, found none"));
    }
    let message = |(at, item): (usize, &Value)| {
        let path = format!("messages[{at}]");
        let object = item.as_object().ok_or_else(|| unexpected(&path, "an object", item))?;
        read_message(object, &path, developer)
    };
    items.iter().enumerate().map(message).collect()
}

fn read_message(object: &Map<String, Value>, path: &str, developer: &str) -> Result<Value, ApiError> {
    let fields = Fields::at(object, path);
    let role = fields.required_string("role")?;
    if !matches!(role, "system" | "developer" | "user" | "assistant" | "tool" | "function") {
        return Err(unexpected(fields.name("role"), ROLES, &Value::from(role)));
    }
    for field in ["name", "tool_call_id", "refusal", "reasoning_content"] {
        fields.string(field)?;
    }
    if fields.get("audio").is_some() {
        return Err(ApiError::unsupported(fields.name("audio"), "this model reads text only"));
    }
    let calls = match (fields.array("tool_calls")?, fields.object("function_call")?) {
        (Some(calls), _) if !calls.is_empty() => Some(read_calls(calls, &fields)?),
        (_, Some(call)) if role == "assistant" => {
            let name = Fields::at(call, &fields.name("function_call")).required_string("name")?;
            let call = json!({"id": function_id(name), "type": "function", "function": call});
            Some(read_calls(&[call], &fields)?)
        }
        _ => None,
    };
    let content = read_content(&fields, role)?;
    let content = match (content, &calls) {
        (Some(text), _) => Value::from(text),
        // Templates tell a message that only calls tools by its missing content.
        (None, Some(_)) => Value::Null,
        (None, None) => Value::from(""),
    };
    let mut message: Map<String, Value> = object.iter().filter(|(_, v)| !v.is_null()).map(owned).collect();
    if role == "function" {
        // The result of a call as it was written before there were tools.
        let name = fields.required_string("name")?;
        message.insert("tool_call_id".to_owned(), json!(function_id(name)));
    }
    message.shift_remove("function_call");
    let role = match role {
        "developer" => developer,
        "function" => "tool",
        role => role,
    };
    message.insert("role".to_owned(), json!(role));
    message.insert("content".to_owned(), content);
    match calls {
        Some(calls) => message.insert("tool_calls".to_owned(), Value::from(calls)),
        None => message.shift_remove("tool_calls"),
    };
    Ok(Value::Object(message))
}

/// The id of a call that came without one.
fn function_id(name: &str) -> String {
    format!("call_{name}")
}

/// A message that was answered, as templates see it.
pub(crate) fn of_answer(answer: &Value) -> Value {
    let read = answer.as_object().map(|object| read_message(object, "answer", "developer"));
    read.and_then(Result::ok).unwrap_or_else(|| answer.clone())
}

fn owned((key, value): (&String, &Value)) -> (String, Value) {
    (key.clone(), value.clone())
}

/// The text of `content`: a string, or parts of text, joined by newlines.
fn read_content(fields: &Fields<'_, '_>, role: &str) -> Result<Option<String>, ApiError> {
    match fields.get("content") {
        None if role == "assistant" => Ok(None),
        None => Err(fields.missing("content", "a string or an array of parts")),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(parts)) => {
            let part = |(at, part)| read_part(part, &format!("{}[{at}]", fields.name("content")));
            let texts: Vec<&str> = parts.iter().enumerate().map(part).collect::<Result<_, _>>()?;
            Ok(Some(texts.join("\n")))
        }
        Some(other) => Err(unexpected(fields.name("content"), "a string or an array of parts", other)),
    }
}

fn read_part<'a>(part: &'a Value, path: &str) -> Result<&'a str, ApiError> {
    let object = part.as_object().ok_or_else(|| unexpected(path, "an object", part))?;
    let part = Fields::at(object, path);
    match part.required_string("type")? {
        "text" => part.required_string("text"),
        "refusal" => part.required_string("refusal"),
        kind @ ("image_url" | "input_audio" | "file" | "video_url" | "audio_url") => {
            let message = format!("parts of type `{kind}` are not supported; this model reads text only");
            Err(ApiError::unsupported(part.name("type"), message))
        }
        other => Err(unexpected(part.name("type"), "text or refusal", &Value::from(other))),
    }
}

/// Tool calls of the past. Their arguments come as JSON text and are objects in a template, where the text is one.
fn read_calls(calls: &[Value], message: &Fields<'_, '_>) -> Result<Vec<Value>, ApiError> {
    let call = |(at, call): (usize, &Value)| {
        let path = format!("{}[{at}]", message.name("tool_calls"));
        let object = call.as_object().ok_or_else(|| unexpected(&path, "an object", call))?;
        let fields = Fields::at(object, &path);
        fields.string("id")?;
        let function = fields.object("function")?.ok_or_else(|| fields.missing("function", "an object"))?;
        let function_path = fields.name("function");
        let function_fields = Fields::at(function, &function_path);
        function_fields.required_string("name")?;
        let arguments = match function_fields.get("arguments") {
            None => Value::Object(Map::new()),
            Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(Value::Object(object)) => Value::Object(object),
                _ => Value::String(text.clone()),
            },
            Some(object @ Value::Object(_)) => object.clone(),
            Some(other) => {
                return Err(unexpected(function_fields.name("arguments"), "a string of JSON", other));
            }
        };
        let mut function = function.clone();
        function.insert("arguments".to_owned(), arguments);
        let mut call = object.clone();
        call.insert("function".to_owned(), Value::Object(function));
        Ok(Value::Object(call))
    };
    calls.iter().enumerate().map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(body: Value) -> Result<Vec<Value>, ApiError> {
        read(&Fields::of(body.as_object().unwrap()), "system")
    }

    #[test]
    fn parts_are_joined_and_arguments_become_objects() {
        let found = messages(json!({"messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "refusal": null, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}},
                {"id": "d", "type": "function", "function": {"name": "g", "arguments": "not json"}},
            ]},
            {"role": "tool", "tool_call_id": "c", "content": "21"},
            {"role": "assistant", "content": null},
            {"role": "assistant", "content": null, "function_call": {"name": "h", "arguments": ""}},
            {"role": "function", "name": "h", "content": "no"},
            {"role": "assistant", "content": "x", "tool_calls": []},
        ]}));
        let expected = json!([
            {"role": "system", "content": "a\nb"},
            {"role": "assistant", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {"id": "d", "type": "function", "function": {"name": "g", "arguments": "not json"}},
            ], "content": null},
            {"role": "tool", "tool_call_id": "c", "content": "21"},
            {"role": "assistant", "content": ""},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "call_h", "type": "function", "function": {"name": "h", "arguments": {}}},
            ]},
            {"role": "tool", "name": "h", "content": "no", "tool_call_id": "call_h"},
            {"role": "assistant", "content": "x"},
        ]);
        assert_eq!(Value::from(found.unwrap()), expected);
    }

    #[test]
    fn what_is_no_message_is_refused_by_its_place() {
        let cases = [
            (json!("hi"), "messages"),
            (json!([]), "messages"),
            (json!(["hi"]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (json!([{"role": "alien", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "user", "content": null}]), "messages[0].content"),
            (json!([{"role": "user", "content": 3}]), "messages[0].content"),
            (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0].type"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
            (json!([{"role": "function", "content": "x"}]), "messages[0].name"),
            (json!([{"role": "assistant", "function_call": {}}]), "messages[0].function_call.name"),
            (json!([{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0].function"),
        ];
        for (value, param) in cases {
            let error = messages(json!({"messages": value})).unwrap_err();
            assert_eq!((error.status.as_u16(), &error.body()["error"]["param"]), (400, &json!(param)));
        }
    }
}
