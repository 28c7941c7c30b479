//! Fields that exist in the API and are not served yet: refused by name, since ignoring them would answer another
//! question than the one asked.

use serde_json::{Value, json};

use super::fields::{Fields, unexpected};
use crate::error::ApiError;

/// Fields that ask for something this server does not do, with either endpoint.
const BOTH: [&str; 4] = ["logits_processors", "prompt_logprobs", "truncate_prompt_tokens", "use_beam_search"];

/// Refuses what is set to anything but its neutral value.
fn refuse_set(fields: &Fields<'_, '_>, names: &[&str]) -> Result<(), ApiError> {
    for name in names {
        match fields.get(name) {
            None | Some(Value::Bool(false)) => {}
            Some(_) => return Err(ApiError::unsupported(*name, "not supported by this server yet")),
        }
    }
    Ok(())
}

/// The fields of /v1/completions that are not served.
pub(crate) fn refuse_in_completions(fields: &Fields<'_, '_>) -> Result<(), ApiError> {
    refuse_set(fields, &BOTH)?;
    refuse_set(fields, &["session_id", "session_mode", "expected_turn", "truncation"])?;
    match fields.string("suffix")? {
        None | Some("") => Ok(()),
        Some(_) => {
            Err(ApiError::unsupported("suffix", "filling in before a suffix is not supported by this server"))
        }
    }
}

/// The fields of /v1/chat/completions that are not served.
pub(crate) fn refuse_in_chat(fields: &Fields<'_, '_>) -> Result<(), ApiError> {
    refuse_set(fields, &BOTH)?;
    refuse_set(fields, &["audio", "web_search_options", "moderation", "chat_template", "documents"])?;
    if fields.bool("store")? == Some(true) {
        return Err(ApiError::unsupported("store", "stored completions are not supported yet; send false"));
    }
    if let Some(modalities) = fields.array("modalities")?
        && modalities != [json!("text")]
    {
        return Err(ApiError::unsupported("modalities", "only [\"text\"] is supported"));
    }
    tools(fields)?;
    functions(fields)
}

/// Tools are checked and accepted when the model may not call them; the template does not get them then.
fn tools(fields: &Fields<'_, '_>) -> Result<(), ApiError> {
    let tools = fields.array("tools")?.unwrap_or_default();
    for (at, tool) in tools.iter().enumerate() {
        check_tool(tool, &format!("tools[{at}]"))?;
    }
    fields.bool("parallel_tool_calls")?;
    let choice = fields.get("tool_choice");
    match choice {
        Some(Value::String(choice)) if choice == "none" => Ok(()),
        None if tools.is_empty() => Ok(()),
        Some(Value::String(choice)) if choice == "auto" && tools.is_empty() => Ok(()),
        None => Err(ApiError::unsupported(
            "tools",
            "tool calls are not supported yet; send `tool_choice`: \"none\"",
        )),
        Some(Value::String(choice))
            if matches!(choice.as_str(), "auto" | "required") && !tools.is_empty() =>
        {
            let message = format!("\"{choice}\" is not supported by this server yet, only \"none\"");
            Err(ApiError::unsupported("tool_choice", message))
        }
        Some(Value::String(choice)) if choice == "required" => {
            Err(ApiError::field("tool_choice", "expected `tools` beside \"required\", found none"))
        }
        Some(Value::Object(_)) => Err(ApiError::unsupported(
            "tool_choice",
            "a named tool is not supported by this server yet, only \"none\"",
        )),
        Some(other) => Err(unexpected("tool_choice", "none, auto, required or a tool", other)),
    }
}

fn check_tool(tool: &Value, path: &str) -> Result<(), ApiError> {
    let object = tool.as_object().ok_or_else(|| unexpected(path, "an object", tool))?;
    let tool = Fields::at(object, path);
    if tool.required_string("type")? == "function" {
        let function = tool.object("function")?.ok_or_else(|| tool.missing("function", "an object"))?;
        let path = tool.name("function");
        let function = Fields::at(function, &path);
        function.required_string("name")?;
        function.object("parameters")?;
    }
    Ok(())
}

fn functions(fields: &Fields<'_, '_>) -> Result<(), ApiError> {
    let functions: &[Value] = fields.array("functions")?.unwrap_or_default();
    match fields.get("function_call") {
        Some(Value::String(call)) if call == "none" => Ok(()),
        Some(_) => {
            Err(ApiError::unsupported("function_call", "not supported by this server yet, only \"none\""))
        }
        None if functions.is_empty() => Ok(()),
        None => Err(ApiError::unsupported("functions", "not supported by this server yet")),
    }
}
