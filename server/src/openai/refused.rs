//! Fields that exist in the API and are not served yet: refused by name, since ignoring them would answer another
//! question than the one asked.

use serde_json::{Value, json};

use super::fields::{Fields, unexpected};
use crate::error::ApiError;

/// Fields that ask for something this server does not do, with either endpoint.
const BOTH: [&str; 9] = [
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "logits_processors",
    "prompt_logprobs",
    "structured_outputs",
    "truncate_prompt_tokens",
    "use_beam_search",
];

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
        None | Some("") => {}
        Some(_) => {
            return Err(ApiError::unsupported(
                "suffix",
                "filling in before a suffix is not supported by this server",
            ));
        }
    }
    response_format(fields)
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
    response_format(fields)
}

fn response_format(fields: &Fields<'_, '_>) -> Result<(), ApiError> {
    let Some(format) = fields.object("response_format")? else { return Ok(()) };
    let format = Fields::at(format, "response_format");
    match format.required_string("type")? {
        "text" => Ok(()),
        kind @ ("json_object" | "json_schema") => {
            if kind == "json_schema" {
                let schema = format.object("json_schema")?;
                let schema = schema.ok_or_else(|| format.missing("json_schema", "an object"))?;
                Fields::at(schema, "response_format.json_schema").required_string("name")?;
            }
            let message = format!("the type `{kind}` is not supported by this server yet, only `text`");
            Err(ApiError::unsupported("response_format", message))
        }
        other => Err(unexpected("response_format.type", "text, json_object or json_schema", &json!(other))),
    }
}
