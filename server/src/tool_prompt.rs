//! Conversations with functions, calls and results, in the form that a model's chat template can show.

use std::borrow::Cow;
use std::collections::HashMap;

use mainstay_models::template::{ChatTemplate, Conversation, TemplateError};
use serde_json::{Value, json};

use crate::output::ToolFormat;

/// A conversation as the request has it.
pub(crate) struct Shown<'a> {
    pub(crate) conversation: Conversation<'a>,
    pub(crate) format: ToolFormat,
}

/// Renders a conversation. A template that knows nothing of functions is told of them in a system message; what it
/// cannot show of calls and results becomes text.
///
/// # Errors
/// What the template says to the conversation as it came.
pub(crate) fn render(template: &ChatTemplate, shown: Shown<'_>) -> Result<String, TemplateError> {
    let Shown { conversation, format } = shown;
    let has_tools = conversation.tools.is_some_and(|tools| !tools.is_empty());
    let tells = has_tools && !template.mentions("tools");
    let messages = adapted(template, conversation.messages, format);
    let tools = conversation.tools.filter(|_| has_tools && !tells);
    let with = |messages: &[Value]| template.render(&Conversation { messages, tools, ..conversation });
    let instruction = tells.then(|| instruction(conversation.tools.unwrap_or_default(), format));
    let told = match &instruction {
        Some(text) => Cow::Owned(told(&messages, text, "system")),
        None => Cow::Borrowed(&*messages),
    };
    let error = match with(&told) {
        Ok(text) => return Ok(text),
        Err(error) => error,
    };
    // Some templates take no system message, and some take the arguments of calls as text.
    if let Some(text) = &instruction
        && let Ok(text) = with(&self::told(&messages, text, "user"))
    {
        return Ok(text);
    }
    let has_calls = told.iter().any(|message| message["tool_calls"].is_array());
    if has_calls && let Ok(text) = with(&with_text_arguments(&told)) {
        return Ok(text);
    }
    Err(error)
}

/// What a model is told of the functions by a template that does not do it itself.
fn instruction(tools: &[Value], format: ToolFormat) -> String {
    let functions: Vec<String> = tools.iter().map(|tool| tool["function"].to_string()).collect();
    let (form, several) = match format {
        ToolFormat::Hermes => (
            "<tool_call>{\"name\": \"the function\", \"arguments\": {\"argument\": \"value\"}}</tool_call>",
            "one after another",
        ),
        ToolFormat::Llama3Json => {
            ("{\"name\": \"the function\", \"parameters\": {\"argument\": \"value\"}}", "with ; between them")
        }
        ToolFormat::Mistral => (
            "[TOOL_CALLS][{\"name\": \"the function\", \"arguments\": {\"argument\": \"value\"}}]",
            "in the same array",
        ),
        ToolFormat::Gemma | ToolFormat::Json | ToolFormat::Harmony | ToolFormat::None => {
            ("{\"name\": \"the function\", \"arguments\": {\"argument\": \"value\"}}", "in a JSON array")
        }
    };
    format!(
        "You can call these functions, each with a JSON schema of its arguments:\n{}\n\nTo call one, answer with \
         nothing but this form:\n{form}\nSeveral calls stand {several}. Call a function only if you need it; otherwise \
         answer in words.",
        functions.join("\n")
    )
}

/// The messages with an instruction at their beginning.
fn told(messages: &[Value], instruction: &str, role: &str) -> Vec<Value> {
    let mut messages = messages.to_vec();
    match messages.iter_mut().find(|message| message["role"] == role) {
        Some(message) if message["content"].is_string() => {
            let content = message["content"].as_str().unwrap_or_default();
            let text = match role {
                "system" => format!("{content}\n\n{instruction}"),
                _ => format!("{instruction}\n\n{content}"),
            };
            message["content"] = json!(text);
        }
        _ => messages.insert(0, json!({"role": role, "content": instruction})),
    }
    messages
}

/// The messages as the template takes calls and results.
fn adapted<'a>(template: &ChatTemplate, messages: &'a [Value], format: ToolFormat) -> Cow<'a, [Value]> {
    let is_of_tools = |message: &Value| message["role"] == "tool" || message["tool_calls"].is_array();
    if !messages.iter().any(is_of_tools) {
        return Cow::Borrowed(messages);
    }
    if !template.mentions("tool_calls") {
        return Cow::Owned(as_text(messages, format));
    }
    // Mistral's templates refuse all other ids.
    if template.mentions("length 9") {
        return Cow::Owned(messages.iter().map(with_short_ids).collect());
    }
    Cow::Borrowed(messages)
}

/// Calls and results as text of the assistant and the user.
fn as_text(messages: &[Value], format: ToolFormat) -> Vec<Value> {
    let mut names: HashMap<String, String> = HashMap::new();
    let mut shown: Vec<Value> = Vec::new();
    let mut ends_with_result = false;
    for message in messages {
        let content = message["content"].as_str().unwrap_or_default();
        let role = message["role"].as_str().unwrap_or_default();
        let mut message = message.clone();
        let is_result = role == "tool";
        if is_result {
            let id = message["tool_call_id"].as_str().unwrap_or_default();
            let name = message["name"].as_str().or_else(|| names.get(id).map(String::as_str));
            let result = json!({"name": name, "content": content}).to_string();
            message =
                json!({"role": "user", "content": format!("<tool_response>\n{result}\n</tool_response>")});
        } else if let Some(calls) = message["tool_calls"].as_array() {
            for call in calls {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                names.insert(text(&call["id"]), text(&call["function"]["name"]));
            }
            let calls = calls_text(calls, format);
            let text = if content.is_empty() { calls } else { format!("{content}\n{calls}") };
            message = json!({"role": role, "content": text});
        }
        // Templates that know no results often want users and assistants to take turns.
        match shown.last_mut() {
            Some(last) if ends_with_result && message["role"] == "user" => {
                let both =
                    [&last["content"], &message["content"]].map(|text| text.as_str().unwrap_or_default());
                last["content"] = json!(both.join("\n"));
            }
            _ => shown.push(message),
        }
        ends_with_result = is_result || (ends_with_result && role == "user");
    }
    shown
}

/// Calls as the model would write them.
fn calls_text(calls: &[Value], format: ToolFormat) -> String {
    let key = if format == ToolFormat::Llama3Json { "parameters" } else { "arguments" };
    let call = |call: &Value| {
        let function = &call["function"];
        json!({"name": function["name"], key: function["arguments"]}).to_string()
    };
    let calls: Vec<String> = calls.iter().map(call).collect();
    match format {
        ToolFormat::Hermes => {
            let tagged = |call: &String| format!("<tool_call>{call}</tool_call>");
            calls.iter().map(tagged).collect::<Vec<_>>().join("\n")
        }
        ToolFormat::Llama3Json => calls.join("; "),
        ToolFormat::Mistral => format!("[TOOL_CALLS][{}]", calls.join(", ")),
        ToolFormat::Gemma | ToolFormat::Json | ToolFormat::Harmony | ToolFormat::None => match &*calls {
            [call] => call.clone(),
            calls => format!("[{}]", calls.join(", ")),
        },
    }
}

/// The message with ids of nine letters and digits.
fn with_short_ids(message: &Value) -> Value {
    let mut message = message.clone();
    if let Some(calls) = message["tool_calls"].as_array_mut() {
        for call in calls {
            call["id"] = short_id(&call["id"]);
        }
    }
    if message["role"] == "tool" {
        message["tool_call_id"] = short_id(&message["tool_call_id"]);
    }
    message
}

fn short_id(id: &Value) -> Value {
    let id = id.as_str().unwrap_or_default();
    if id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()) {
        return json!(id);
    }
    json!(blake3::hash(id.as_bytes()).to_hex().as_str()[..9])
}

/// The messages with the arguments of calls as JSON text.
fn with_text_arguments(messages: &[Value]) -> Vec<Value> {
    let mut messages = messages.to_vec();
    let calls = messages.iter_mut().filter_map(|message| message["tool_calls"].as_array_mut()).flatten();
    for call in calls {
        let arguments = &mut call["function"]["arguments"];
        if !arguments.is_string() {
            *arguments = json!(arguments.to_string());
        }
    }
    messages
}
