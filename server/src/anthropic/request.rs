//! The body of POST /v1/messages as the chat request that it is.

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::openai::fields::{Fields, unexpected};

/// Fields with another name or form in a chat request.
const OWN: [&str; 12] = [
    "cache_control",
    "container",
    "context_management",
    "mcp_servers",
    "messages",
    "metadata",
    "output_config",
    "stop_sequences",
    "system",
    "thinking",
    "tool_choice",
    "tools",
];

/// Whether the answer's length must be bounded by the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Answer,
    CountTokens,
}

/// The chat request.
///
/// # Errors
/// 400, naming the field.
pub(crate) fn chat(body: &Map<String, Value>, purpose: Purpose) -> Result<Map<String, Value>, ApiError> {
    let fields = Fields::of(body);
    if purpose == Purpose::Answer && fields.count("max_tokens", 1..=usize::MAX)?.is_none() {
        return Err(fields.missing("max_tokens", "an integer of at least 1"));
    }
    let keep = |(name, value): &(&String, &Value)| !OWN.contains(&name.as_str()) && !value.is_null();
    let mut chat: Map<String, Value> =
        body.iter().filter(keep).map(|(name, value)| (name.clone(), value.clone())).collect();
    if fields.array("mcp_servers")?.is_some_and(|servers| !servers.is_empty()) {
        let message = "servers named by a client are not called; the operator lists those that are";
        return Err(ApiError::unsupported("mcp_servers", message));
    }
    chat.insert("messages".to_owned(), Value::from(messages(&fields)?));
    if let Some(stops) = fields.array("stop_sequences")?.filter(|stops| !stops.is_empty()) {
        chat.insert("stop".to_owned(), json!(stops));
    }
    if let Some(tools) = fields.array("tools")? {
        let tool = |(at, tool): (usize, &Value)| read_tool(tool, &format!("tools[{at}]")).transpose();
        let tools: Vec<Value> = tools.iter().enumerate().filter_map(tool).collect::<Result<_, _>>()?;
        if !tools.is_empty() {
            chat.insert("tools".to_owned(), Value::from(tools));
        }
    }
    if let Some(choice) = fields.object("tool_choice")? {
        let own = Fields::at(choice, "tool_choice");
        let choice = match own.required_string("type")? {
            "auto" => json!("auto"),
            "any" => json!("required"),
            "none" => json!("none"),
            "tool" => json!({"type": "function", "function": {"name": own.required_string("name")?}}),
            other => {
                let expected = "auto, any, tool or none";
                return Err(unexpected("tool_choice.type", expected, &json!(other)));
            }
        };
        chat.insert("tool_choice".to_owned(), choice);
        if own.bool("disable_parallel_tool_use")? == Some(true) {
            chat.insert("parallel_tool_calls".to_owned(), json!(false));
        }
    }
    fields.object("metadata")?;
    chat.extend(output(&fields)?);
    if let Some(thinking) = fields.object("thinking")? {
        let kind = Fields::at(thinking, "thinking").required_string("type")?;
        let mut kwargs = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
        kwargs.entry("enable_thinking").or_insert(json!(kind != "disabled"));
        chat.insert("chat_template_kwargs".to_owned(), Value::Object(kwargs));
    }
    Ok(chat)
}

/// The field `output_config`: the form of the answer, and the effort.
fn output(fields: &Fields<'_, '_>) -> Result<Map<String, Value>, ApiError> {
    let mut chat = Map::new();
    let Some(config) = fields.object("output_config")? else { return Ok(chat) };
    let own = Fields::at(config, "output_config");
    if let Some(effort) = own.string("effort")? {
        chat.insert("reasoning_effort".to_owned(), json!(effort));
    }
    if let Some(format) = own.object("format")? {
        let own = Fields::at(format, "output_config.format");
        let kind = own.required_string("type")?;
        if kind != "json_schema" {
            return Err(unexpected(own.name("type"), "json_schema", &json!(kind)));
        }
        let schema = own.object("schema")?.ok_or_else(|| own.missing("schema", "an object"))?;
        let schema = json!({"name": "answer", "schema": schema, "strict": true});
        chat.insert("response_format".to_owned(), json!({"type": "json_schema", "json_schema": schema}));
    }
    Ok(chat)
}

/// An error about a field of the chat request, said of the field of this one.
pub(crate) fn renamed(error: ApiError) -> ApiError {
    error.rename(&[("response_format.json_schema", "output_config.format")])
}

fn read_tool(tool: &Value, path: &str) -> Result<Option<Value>, ApiError> {
    let object = tool.as_object().ok_or_else(|| unexpected(path, "an object", tool))?;
    let own = Fields::at(object, path);
    if own.string("type")?.is_some_and(|kind| kind != "custom") {
        // Tools of the vendor's own: a model here cannot call them, and need not.
        return Ok(None);
    }
    let mut function = json!({"name": own.required_string("name")?});
    if let Some(description) = own.string("description")? {
        function["description"] = json!(description);
    }
    let schema = own.object("input_schema")?.ok_or_else(|| own.missing("input_schema", "an object"))?;
    function["parameters"] = json!(schema);
    Ok(Some(json!({"type": "function", "function": function})))
}

fn messages(fields: &Fields<'_, '_>) -> Result<Vec<Value>, ApiError> {
    let mut all = Vec::new();
    match fields.get("system") {
        None => {}
        Some(Value::String(text)) => all.push(json!({"role": "system", "content": text})),
        Some(Value::Array(blocks)) => {
            all.push(json!({"role": "system", "content": texts(blocks, "system")?}));
        }
        Some(other) => return Err(unexpected("system", "a string or an array of blocks", other)),
    }
    let given =
        fields.array("messages")?.ok_or_else(|| fields.missing("messages", "an array of messages"))?;
    if given.is_empty() {
        return Err(ApiError::field("messages", "expected at least one message, found none"));
    }
    for (at, message) in given.iter().enumerate() {
        let path = format!("messages[{at}]");
        let object = message.as_object().ok_or_else(|| unexpected(&path, "an object", message))?;
        read_message(&Fields::at(object, &path), &mut all)?;
    }
    Ok(all)
}

fn read_message(own: &Fields<'_, '_>, all: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = own.required_string("role")?;
    if !matches!(role, "user" | "assistant" | "system") {
        return Err(unexpected(own.name("role"), "user or assistant", &json!(role)));
    }
    let path = own.name("content");
    let blocks = match own.get("content") {
        Some(text @ Value::String(_)) => {
            all.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Some(Value::Array(blocks)) => blocks,
        Some(other) => return Err(unexpected(path, "a string or an array of blocks", other)),
        None => return Err(own.missing("content", "a string or an array of blocks")),
    };
    let (mut text, mut thinking, mut calls, mut results) =
        (Vec::new(), String::new(), Vec::new(), Vec::new());
    for (at, block) in blocks.iter().enumerate() {
        let path = format!("{path}[{at}]");
        let object = block.as_object().ok_or_else(|| unexpected(&path, "an object", block))?;
        let block = Fields::at(object, &path);
        match block.required_string("type")? {
            "text" => text.push(block.required_string("text")?.to_owned()),
            "thinking" => thinking += block.required_string("thinking")?,
            "redacted_thinking" => {}
            "tool_use" => {
                let arguments =
                    block.object("input")?.map_or_else(|| "{}".to_owned(), |i| json!(i).to_string());
                let (id, name) = (block.required_string("id")?, block.required_string("name")?);
                calls.push(json!({"id": id, "type": "function",
                                  "function": {"name": name, "arguments": arguments}}));
            }
            "tool_result" => {
                let content = match block.get("content") {
                    None => String::new(),
                    Some(Value::String(text)) => text.clone(),
                    Some(Value::Array(blocks)) => texts(blocks, &block.name("content"))?,
                    Some(other) => {
                        return Err(unexpected(
                            block.name("content"),
                            "a string or an array of blocks",
                            other,
                        ));
                    }
                };
                let id = block.required_string("tool_use_id")?;
                results.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
            }
            kind => {
                let message =
                    format!("blocks of type `{kind}` are not supported; this model reads text only");
                return Err(ApiError::unsupported(block.name("type"), message));
            }
        }
    }
    all.append(&mut results);
    if text.is_empty() && calls.is_empty() {
        return Ok(());
    }
    let mut message = json!({"role": role, "content": text.join("\n")});
    if role == "assistant" {
        if !thinking.is_empty() {
            message["reasoning_content"] = json!(thinking);
        }
        if !calls.is_empty() {
            message["tool_calls"] = json!(calls);
            if text.is_empty() {
                message["content"] = Value::Null;
            }
        }
    }
    all.push(message);
    Ok(())
}

/// The text of blocks that can be nothing else.
fn texts(blocks: &[Value], path: &str) -> Result<String, ApiError> {
    let text = |(at, block): (usize, &Value)| {
        let path = format!("{path}[{at}]");
        let object = block.as_object().ok_or_else(|| unexpected(&path, "an object", block))?;
        let own = Fields::at(object, &path);
        match own.required_string("type")? {
            "text" => own.required_string("text").map(str::to_owned),
            kind => {
                let message =
                    format!("blocks of type `{kind}` are not supported; this model reads text only");
                Err(ApiError::unsupported(own.name("type"), message))
            }
        }
    };
    let texts: Vec<String> = blocks.iter().enumerate().map(text).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_request_is_a_chat_request() {
        let body = json!({
            "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "be brief"}], "top_k": 3,
            "stop_sequences": ["x"], "metadata": {"user_id": "u"},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
            "tools": [{"name": "f", "input_schema": {"type": "object"}}, {"type": "web_search_20250305", "name": "w"}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "1"}]},
                    {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}},
                ]},
            ],
        });
        let chat = chat(body.as_object().unwrap(), Purpose::Answer).unwrap();
        let call =
            json!({"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}});
        assert_eq!(
            Value::Object(chat),
            json!({
                "model": "m", "max_tokens": 9, "top_k": 3,
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "reasoning_content": "hm", "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "t1", "content": "1"},
                    {"role": "user", "content": "go on"},
                ],
                "stop": ["x"], "reasoning_effort": "low",
                "response_format": {"type": "json_schema", "json_schema":
                    {"name": "answer", "schema": {"type": "object"}, "strict": true}},
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
                "tool_choice": "required", "parallel_tool_calls": false,
            })
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({"messages": [{"role": "user", "content": "a"}]}), "max_tokens"),
            (json!({"max_tokens": 1}), "messages"),
            (json!({"max_tokens": 1, "messages": []}), "messages"),
            (json!({"max_tokens": 1, "messages": [{"role": "tool", "content": "a"}]}), "messages[0].role"),
            (
                json!({"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}),
                "messages[0].content[0].type",
            ),
            (
                json!({"max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}),
                "tools[0].input_schema",
            ),
            (
                json!({"max_tokens": 1, "messages": [{"role": "user", "content": "a"}],
                       "output_config": {"format": {"type": "json_schema"}}}),
                "output_config.format.schema",
            ),
        ] {
            let error = chat(body.as_object().unwrap(), Purpose::Answer).unwrap_err();
            assert_eq!(error.body()["error"]["param"], param, "{body}");
        }
    }
}
