//! The fields `tools` and `tool_choice` of the Responses API, and what they are in a chat request.

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::openai::fields::{Fields, unexpected};

/// What a request says about tools.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tools {
    /// The chat request's fields.
    pub(crate) chat: Map<String, Value>,
    /// The tools of type `mcp`, each with its place among all.
    pub(crate) mcp: Vec<(usize, Map<String, Value>)>,
}

/// # Errors
/// 400, naming the field.
pub(crate) fn read(fields: &Fields<'_, '_>) -> Result<Tools, ApiError> {
    let (mut functions, mut mcp) = (Vec::new(), Vec::new());
    for (at, tool) in fields.array("tools")?.unwrap_or_default().iter().enumerate() {
        let path = format!("tools[{at}]");
        let object = tool.as_object().ok_or_else(|| unexpected(&path, "an object", tool))?;
        let own = Fields::at(object, &path);
        match own.required_string("type")? {
            "function" => functions.push(function(&own)?),
            "custom" => functions.push(custom(&own)?),
            "mcp" => {
                own.required_string("server_label")?;
                mcp.push((at, object.clone()));
            }
            // Tools of the vendor's own or of the client: a model here cannot call them, and need not.
            _ => {}
        }
    }
    let mut chat = Map::new();
    if !functions.is_empty() {
        chat.insert("tools".to_owned(), Value::from(functions));
    }
    if let Some(choice) = choice(fields)? {
        chat.insert("tool_choice".to_owned(), choice);
    }
    Ok(Tools { chat, mcp })
}

fn function(own: &Fields<'_, '_>) -> Result<Value, ApiError> {
    let mut function = json!({"name": own.required_string("name")?});
    if let Some(description) = own.string("description")? {
        function["description"] = json!(description);
    }
    if let Some(parameters) = own.object("parameters")? {
        function["parameters"] = json!(parameters);
    }
    if let Some(strict) = own.bool("strict")? {
        function["strict"] = json!(strict);
    }
    Ok(json!({"type": "function", "function": function}))
}

/// A tool that takes any text is a function of one.
fn custom(own: &Fields<'_, '_>) -> Result<Value, ApiError> {
    let (name, description) = (own.required_string("name")?, own.string("description")?.unwrap_or_default());
    let parameters = json!({
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": false,
    });
    let function = json!({"name": name, "description": description, "parameters": parameters});
    Ok(json!({"type": "function", "function": function}))
}

/// `tool_choice` in chat's form.
fn choice(fields: &Fields<'_, '_>) -> Result<Option<Value>, ApiError> {
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    match fields.get("tool_choice") {
        None => Ok(None),
        Some(word @ Value::String(_)) => Ok(Some(word.clone())),
        Some(Value::Object(object)) => {
            let own = Fields::at(object, "tool_choice");
            match own.required_string("type")? {
                "function" | "custom" => Ok(Some(named(own.required_string("name")?))),
                "allowed_tools" => {
                    let mode = own.required_string("mode")?;
                    let tools = own.array("tools")?.ok_or_else(|| own.missing("tools", "an array"))?;
                    let tools: Vec<Value> =
                        tools.iter().filter_map(|tool| tool["name"].as_str()).map(named).collect();
                    Ok(Some(
                        json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}),
                    ))
                }
                // A choice among tools that are not the model's leaves it free.
                _ => Ok(None),
            }
        }
        Some(other) => Err(unexpected("tool_choice", "a string or an object", other)),
    }
}

/// Fields that the object's tools have even where the request left them out.
pub(crate) fn complete(tools: &mut Value) {
    let tools = tools.as_array_mut().map(Vec::as_mut_slice).unwrap_or_default();
    for tool in tools.iter_mut().filter(|tool| tool["type"] == "mcp").filter_map(Value::as_object_mut) {
        // Secrets are for the server that they are sent to.
        tool.retain(|name, _| !matches!(name.as_str(), "authorization" | "headers"));
    }
    let objects = tools.iter_mut().filter_map(Value::as_object_mut);
    for tool in objects.filter(|tool| tool.get("type").is_some_and(|kind| kind == "function")) {
        tool.entry("parameters").or_insert(Value::Null);
        tool.entry("strict").or_insert(json!(true));
        tool.entry("description").or_insert(Value::Null);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_chat_tools() {
        let body = json!({"tools": [
            {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true},
            {"type": "web_search"},
            {"type": "custom", "name": "c"},
            {"type": "mcp", "server_label": "s"},
        ], "tool_choice": {"type": "function", "name": "f"}});
        let tools = read(&Fields::of(body.as_object().unwrap())).unwrap();
        assert_eq!(tools.chat["tools"][0]["function"]["name"], "f");
        assert_eq!(tools.chat["tools"][1]["function"]["parameters"]["required"], json!(["input"]));
        assert_eq!(tools.chat["tools"].as_array().unwrap().len(), 2);
        assert_eq!(tools.chat["tool_choice"], json!({"type": "function", "function": {"name": "f"}}));
        assert_eq!(tools.mcp.len(), 1);
    }
}
