//! Chat templates: the text that a conversation becomes, equal to transformers' `apply_chat_template`.

use serde_json::{Map, Value};

use crate::LoadError;

/// A compiled chat template with the special tokens that it may name.
pub struct ChatTemplate {}

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct Conversation<'a> {
    /// Message objects, passed through as they are.
    pub messages: &'a [Value],
    /// Tool objects, `None` if the request has none.
    pub tools: Option<&'a [Value]>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Further variables (`chat_template_kwargs`): `enable_thinking`, `date_string` ...
    pub kwargs: Option<&'a Map<String, Value>>,
}

/// The template refused the conversation (`raise_exception`) or could not be evaluated with it: the client's doing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("the chat template refused the messages: {0}")]
pub struct TemplateError(pub String);

impl ChatTemplate {
    /// Compiles a template's source; `special_tokens` become variables (`bos_token`, `eos_token` ...).
    pub fn new(_source: &str, _special_tokens: Map<String, Value>) -> Result<Self, LoadError> {
        unimplemented!()
    }

    /// The text of a conversation.
    pub fn render(&self, _conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        unimplemented!()
    }
}
