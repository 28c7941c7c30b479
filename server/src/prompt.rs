//! From messages or text to the tokens of a prompt.

use std::sync::Arc;

use mainstay_models::template::Conversation;
use mainstay_models::tokenizer::AddSpecial;
use serde_json::{Map, Value};

use crate::detokenize::{Decoder, Detokenizer};
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::messages;
use crate::openai::options::PromptInput;
use crate::openai::tools::Tools;
use crate::registry::Model;
use crate::tool_prompt::{self, Shown};

/// Text longer than this is rendered and tokenized on a thread of its own, since it would hold up other requests.
const LONG_TEXT_BYTES: usize = 16 << 10;

/// A prompt, tokenized.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    /// As the client wrote it, if it was text.
    text: Option<String>,
}

impl Prompt {
    /// Tokens that were checked when they came in.
    pub(crate) fn of(tokens: Vec<u32>) -> Self {
        Self { tokens, text: None }
    }

    /// Its text, where it is known.
    pub(crate) fn written(&self) -> &str {
        self.text.as_deref().unwrap_or_default()
    }

    /// Its text, for the echo.
    pub(crate) fn text(&self, decoder: Decoder<'_>) -> String {
        match &self.text {
            Some(text) => text.clone(),
            None => {
                let mut text = Detokenizer::default();
                let mut all: String = self.tokens.iter().map(|id| text.push(decoder, *id)).collect();
                all += &text.finish(decoder);
                all
            }
        }
    }
}

/// What follows the rendered messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The beginning of the assistant's answer.
    Generation,
    /// Nothing.
    Nothing,
    /// Nothing, and the end of the last message is cut off too: the answer goes on with it.
    OpenMessage,
}

/// A conversation to be rendered.
#[derive(Clone, Debug)]
pub(crate) struct ChatInput {
    pub(crate) messages: Vec<Value>,
    /// Functions that the model is told of.
    tools: Arc<[Value]>,
    kwargs: Option<Map<String, Value>>,
    pub(crate) ending: Ending,
    special: AddSpecial,
}

impl ChatInput {
    /// The fields `messages`, `add_generation_prompt`, `continue_final_message`, `add_special_tokens` and
    /// `chat_template_kwargs`.
    pub(crate) fn read(fields: &Fields<'_, '_>, model: &Model, tools: &Tools) -> Result<Self, ApiError> {
        let open = fields.bool("continue_final_message")?.unwrap_or(false);
        let ending = match (fields.bool("add_generation_prompt")?, open) {
            (Some(true), true) => {
                let message =
                    "expected only one of add_generation_prompt and continue_final_message, found both";
                return Err(ApiError::field("continue_final_message", message));
            }
            (_, true) => Ending::OpenMessage,
            (Some(false), false) => Ending::Nothing,
            (Some(true) | None, false) => Ending::Generation,
        };
        let messages = messages::read(fields, model.developer_role())?;
        if ending == Ending::OpenMessage && messages.last().is_none_or(|last| last["role"] != "assistant") {
            let message = "expected the last message to be the assistant's, found another";
            return Err(ApiError::field("continue_final_message", message));
        }
        Ok(Self {
            messages,
            tools: tools.shown().into(),
            kwargs: kwargs(fields, model)?,
            ending,
            special: add_special(fields, AddSpecial::No)?,
        })
    }

    /// Another conversation, to be rendered in the same way.
    pub(crate) fn with(&self, messages: Vec<Value>, ending: Ending) -> Self {
        Self {
            messages,
            tools: self.tools.clone(),
            kwargs: self.kwargs.clone(),
            ending,
            special: self.special,
        }
    }

    pub(crate) fn with_special(self, special: AddSpecial) -> Self {
        Self { special, ..self }
    }

    /// The tokens of rendered text.
    pub(crate) fn encode(&self, model: &Model, text: &str) -> Result<Vec<u32>, ApiError> {
        let prompt = Prompt { tokens: encode(model, text, self.special, "messages")?, text: None };
        Ok(checked(model, prompt, "messages")?.tokens)
    }

    pub(crate) fn render(&self, model: &Model) -> Result<String, ApiError> {
        model.check_generates()?;
        let Some(template) = &model.served.template else {
            let message = format!(
                "the model `{}` has no chat template, so it takes no messages; use /v1/completions",
                model.id
            );
            return Err(ApiError::field("messages", message));
        };
        let conversation = Conversation {
            messages: &self.messages,
            tools: Some(&*self.tools).filter(|tools| !tools.is_empty()),
            add_generation_prompt: self.ending == Ending::Generation,
            kwargs: self.kwargs.as_ref(),
        };
        let shown = Shown { conversation, format: model.format.tools };
        let text = tool_prompt::render(template, shown)
            .map_err(|error| ApiError::field("messages", error.to_string()))?;
        if self.ending == Ending::OpenMessage { self.open_last(text) } else { Ok(text) }
    }

    /// Cuts a rendered conversation where the text of its last message ends.
    fn open_last(&self, mut text: String) -> Result<String, ApiError> {
        let last = self.messages.last().and_then(|message| message["content"].as_str()).unwrap_or_default();
        let trimmed = last.trim();
        let start = text.rfind(trimmed).ok_or_else(|| {
            let message =
                "the chat template does not show the last message as it is, so it cannot be continued";
            ApiError::field("continue_final_message", message)
        })?;
        let end = start + trimmed.len();
        // Templates may trim a message; spaces that survived belong to it.
        let spaces = &last[last.trim_end().len()..];
        let kept = if text[end..].starts_with(spaces) { spaces.len() } else { 0 };
        text.truncate(end + kept);
        Ok(text)
    }
}

/// The variables of the template that a request sets: `chat_template_kwargs`, and what the API has a field for.
fn kwargs(fields: &Fields<'_, '_>, model: &Model) -> Result<Option<Map<String, Value>>, ApiError> {
    const EFFORT: &str = "reasoning_effort";
    let mut kwargs = fields.object("chat_template_kwargs")?.cloned();
    let knows = || model.served.template.as_ref().is_some_and(|template| template.mentions(EFFORT));
    if let Some(effort) = fields.string(EFFORT)?
        && knows()
    {
        kwargs.get_or_insert_default().entry(EFFORT).or_insert_with(|| effort.into());
    }
    Ok(kwargs)
}

/// The field `add_special_tokens`.
pub(crate) fn add_special(fields: &Fields<'_, '_>, default: AddSpecial) -> Result<AddSpecial, ApiError> {
    Ok(match fields.bool("add_special_tokens")? {
        Some(true) => AddSpecial::Yes,
        Some(false) => AddSpecial::No,
        None => default,
    })
}

/// Renders and tokenizes a conversation.
pub(crate) async fn chat(model: &Arc<Model>, input: ChatInput) -> Result<Prompt, ApiError> {
    let owned = model.clone();
    off_thread(input.messages.iter().chain(&*input.tools).map(weight).sum(), move || {
        let text = input.render(&owned)?;
        let tokens = encode(&owned, &text, input.special, "messages")?;
        checked(&owned, Prompt { tokens, text: Some(text) }, "messages")
    })
    .await
}

/// Bytes of text in a value, and one for each part of it.
fn weight(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 1,
        Value::Array(items) => items.iter().map(weight).sum::<usize>() + 1,
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| key.len() + weight(value)).sum::<usize>() + 1
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 1,
    }
}

/// Tokenizes plain prompts.
pub(crate) async fn plain(
    model: &Arc<Model>,
    inputs: Vec<PromptInput>,
    special: AddSpecial,
) -> Result<Vec<Prompt>, ApiError> {
    let bytes = |input: &PromptInput| if let PromptInput::Text(text) = input { text.len() } else { 0 };
    let owned = model.clone();
    off_thread(inputs.iter().map(bytes).sum(), move || {
        let prompt = |input| match input {
            PromptInput::Tokens(tokens) => checked(&owned, Prompt { tokens, text: None }, "prompt"),
            PromptInput::Text(text) => {
                let tokens = encode(&owned, &text, special, "prompt")?;
                checked(&owned, Prompt { tokens, text: Some(text) }, "prompt")
            }
        };
        inputs.into_iter().map(prompt).collect()
    })
    .await
}

fn encode(model: &Model, text: &str, special: AddSpecial, param: &'static str) -> Result<Vec<u32>, ApiError> {
    model.served.tokenizer.encode(text, special).map_err(|error| ApiError::field(param, error.to_string()))
}

pub(crate) async fn off_thread<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= LONG_TEXT_BYTES {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::internal("the request could not be worked on")),
    }
}

/// The engine trusts token ids, so every prompt passes here.
fn checked(model: &Model, prompt: Prompt, param: &'static str) -> Result<Prompt, ApiError> {
    match prompt.tokens.iter().find(|id| **id as usize >= model.served.vocab) {
        Some(id) => {
            let vocab = model.served.vocab;
            let message = format!("expected tokens below {vocab}, the model's vocabulary, found {id}");
            Err(ApiError::field(param, message))
        }
        None => Ok(prompt),
    }
}

/// Checks that a prompt has tokens, and that it fits into the context with the tokens to generate.
pub(crate) fn check_length(
    model: &Model,
    prompt: &Prompt,
    max_tokens: Option<usize>,
    param: &'static str,
) -> Result<(), ApiError> {
    let (prompt_len, context) = (prompt.tokens.len(), model.served.context);
    if prompt_len == 0 {
        return Err(ApiError::field(param, "expected at least one token, found none"));
    }
    let wanted = max_tokens.unwrap_or(1);
    if prompt_len.saturating_add(wanted) > context {
        let message = match max_tokens {
            Some(max) if prompt_len < context => format!(
                "this model's context is {context} tokens, but {} were asked for: {prompt_len} in the prompt and {max} \
                 to generate",
                prompt_len.saturating_add(max)
            ),
            _ => format!(
                "this model's context is {context} tokens, of which one must be left to generate, but the prompt has \
                 {prompt_len}"
            ),
        };
        return Err(ApiError::context_length(message, param));
    }
    Ok(())
}
