//! Fields that exist in the API and are not served yet: refused by name, since ignoring them would answer another
//! question than the one asked.

use serde_json::{Value, json};

use super::fields::Fields;
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
    if let Some(modalities) = fields.array("modalities")?
        && modalities != [json!("text")]
    {
        return Err(ApiError::unsupported("modalities", "only [\"text\"] is supported"));
    }
    Ok(())
}
