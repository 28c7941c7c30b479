//! The fields that chat and completions share: how to draw tokens, when to stop, what to show.

use mainstay_engine::SamplingRequest;
use mainstay_models::Generation;
use mainstay_models::tokenizer::ShowSpecial;
use serde_json::Value;

use super::fields::{Fields, found, unexpected};
use super::priority;
use crate::error::ApiError;
use crate::registry::Model;

/// Most stop strings.
const STOPS_MAX: usize = 4;
/// Most choices of one prompt.
const CHOICES_MAX: usize = 128;
/// Most alternatives shown beside a token.
pub(crate) const TOP_LOGPROBS_MAX: usize = 20;
/// Most pairs in `metadata`.
const METADATA_MAX: usize = 16;

/// Whether the stop string or token that ended a text is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShowStop {
    Yes,
    No,
}

/// How to generate, as the client asked, with the model's defaults where it did not.
#[derive(Clone, Debug)]
pub(crate) struct GenerationOptions {
    pub(crate) choices: u32,
    pub(crate) sampling: SamplingRequest,
    /// Tokens that end a text: the model's unless ignored, and the client's.
    pub(crate) stop_tokens: Vec<u32>,
    /// Of these, the client's.
    pub(crate) own_stop_tokens: Vec<u32>,
    pub(crate) stop_strings: Vec<String>,
    pub(crate) min_tokens: usize,
    pub(crate) show_special: ShowSpecial,
    pub(crate) show_stop: ShowStop,
    pub(crate) return_token_ids: bool,
    /// Whose turn it is: lower numbers go first.
    pub(crate) priority: i32,
}

/// How the answer is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// One JSON body.
    Whole,
    /// Events; the last may tell the usage.
    Stream { include_usage: bool },
}

impl GenerationOptions {
    pub(crate) fn read(fields: &Fields<'_, '_>, model: &Model) -> Result<Self, ApiError> {
        let vocab = model.served.vocab;
        let defaults = &model.served.generation;
        let own_stop_tokens = fields.token_ids("stop_token_ids", vocab)?.unwrap_or_default();
        let mut stop_tokens = own_stop_tokens.clone();
        if fields.bool("ignore_eos")? != Some(true) {
            stop_tokens.extend(&defaults.eos);
        }
        let choices = fields.count("n", 1..=CHOICES_MAX)?.unwrap_or(1);
        check_ignored(fields)?;
        Ok(Self {
            choices: u32::try_from(choices).expect("at most 128"),
            sampling: sampling(fields, defaults, vocab)?,
            stop_tokens,
            own_stop_tokens,
            stop_strings: stop_strings(fields)?,
            min_tokens: fields.count("min_tokens", 0..=usize::MAX)?.unwrap_or(0),
            show_special: match fields.bool("skip_special_tokens")? {
                Some(false) => ShowSpecial::Yes,
                _ => ShowSpecial::No,
            },
            show_stop: match fields.bool("include_stop_str_in_output")? {
                Some(true) => ShowStop::Yes,
                _ => ShowStop::No,
            },
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            priority: priority::read(fields)?,
        })
    }

    /// `min_tokens` may not be above `max_tokens`.
    pub(crate) fn check_min_tokens(&self, max_tokens: Option<usize>) -> Result<(), ApiError> {
        match max_tokens {
            Some(max) if self.min_tokens > max => {
                let message =
                    format!("expected at most max_tokens, {max}, found the number {}", self.min_tokens);
                Err(ApiError::field("min_tokens", message))
            }
            _ => Ok(()),
        }
    }
}

fn sampling(
    fields: &Fields<'_, '_>,
    defaults: &Generation,
    vocab: usize,
) -> Result<SamplingRequest, ApiError> {
    let top_k = fields.integer("top_k", -1..=i64::MAX)?;
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    Ok(SamplingRequest {
        temperature: fields.number("temperature", 0.0..=2.0)?.or(defaults.temperature).unwrap_or(1.0),
        top_k: match top_k {
            Some(top_k) => usize::try_from(top_k).unwrap_or(0),
            None => defaults.top_k.unwrap_or(0),
        },
        top_p: fields.positive("top_p", 1.0)?.or(defaults.top_p).unwrap_or(1.0),
        min_p: fields.number("min_p", 0.0..=1.0)?.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: fields
            .positive("repetition_penalty", f64::MAX)?
            .or(defaults.repetition_penalty)
            .unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, vocab)?,
        seed: match seed {
            Some(seed) => seed.cast_unsigned(),
            None => crate::random::seed(),
        },
    })
}

fn logit_bias(fields: &Fields<'_, '_>, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let bias = |(key, value): (&String, &Value)| {
        let id = key.parse::<u32>().ok().filter(|id| (*id as usize) < vocab).ok_or_else(|| {
            let last = vocab.saturating_sub(1);
            ApiError::field(
                "logit_bias",
                format!("expected token ids from 0 to {last} as keys, found {key:?}"),
            )
        })?;
        let bias = value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias =
            bias.ok_or_else(|| unexpected("logit_bias", "numbers from -100 to 100 as values", value))?;
        Ok((id, bias as f32))
    };
    biases.iter().map(bias).collect()
}

fn stop_strings(fields: &Fields<'_, '_>) -> Result<Vec<String>, ApiError> {
    let expected = "a string that is not empty, or up to 4 of them";
    let items = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= STOPS_MAX => items.as_slice(),
        Some(value @ Value::String(_)) => std::slice::from_ref(value),
        Some(other) => return Err(unexpected("stop", expected, other)),
    };
    let stop = |value: &Value| match value {
        Value::String(text) if !text.is_empty() => Ok(text.clone()),
        other => Err(unexpected("stop", expected, other)),
    };
    items.iter().map(stop).collect()
}

/// Fields that are accepted and have no effect here, but must still be what the API says they are.
fn check_ignored(fields: &Fields<'_, '_>) -> Result<(), ApiError> {
    for field in ["user", "safety_identifier", "prompt_cache_key", "reasoning_effort", "verbosity"] {
        fields.string(field)?;
    }
    let Some(metadata) = fields.object("metadata")? else { return Ok(()) };
    if metadata.len() > METADATA_MAX {
        let message = format!("expected at most {METADATA_MAX} keys, found {}", metadata.len());
        return Err(ApiError::field("metadata", message));
    }
    match metadata.values().find(|value| !value.is_string()) {
        Some(value) => Err(unexpected("metadata", "strings as values", value)),
        None => Ok(()),
    }
}

/// The fields `stream` and `stream_options`. The options are ignored without `stream`, as several clients send them.
pub(crate) fn delivery(fields: &Fields<'_, '_>) -> Result<Delivery, ApiError> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let include_usage = match fields.object("stream_options")? {
        Some(options) => Fields::at(options, "stream_options").bool("include_usage")?.unwrap_or(false),
        None => false,
    };
    Ok(if stream { Delivery::Stream { include_usage } } else { Delivery::Whole })
}

/// `best_of` draws more choices than it returns; only the case where it returns all of them is served.
pub(crate) fn check_best_of(fields: &Fields<'_, '_>, choices: u32) -> Result<(), ApiError> {
    match fields.count("best_of", 1..=CHOICES_MAX)? {
        Some(best_of) if best_of != choices as usize && best_of != 1 => {
            let message =
                format!("expected 1 or n, {choices}; choosing among more is not supported; found {best_of}");
            Err(ApiError::unsupported("best_of", message))
        }
        _ => Ok(()),
    }
}

/// A prompt of text or token ids, as /v1/completions takes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum PromptInput {
    Text(String),
    Tokens(Vec<u32>),
}

/// The field `prompt`, or another of its kind: a string, strings, token ids or lists of token ids.
pub(crate) fn prompts(
    fields: &Fields<'_, '_>,
    field: &str,
    vocab: usize,
) -> Result<Vec<PromptInput>, ApiError> {
    let expected = "a string, an array of strings, of token ids, or of arrays of token ids";
    let value = fields.get(field).ok_or_else(|| fields.missing(field, expected))?;
    let items = match value {
        Value::String(text) => return Ok(vec![PromptInput::Text(text.clone())]),
        Value::Array(items) if !items.is_empty() => items,
        other => return Err(unexpected(field, expected, other)),
    };
    if items.iter().all(Value::is_number) {
        return Ok(vec![PromptInput::Tokens(super::fields::token_ids(field, items, vocab)?)]);
    }
    let prompt = |(at, item): (usize, &Value)| match item {
        Value::String(text) => Ok(PromptInput::Text(text.clone())),
        Value::Array(ids) if !ids.is_empty() => {
            super::fields::token_ids(&format!("{field}[{at}]"), ids, vocab).map(PromptInput::Tokens)
        }
        other => Err(ApiError::field(field, format!("expected {expected}, found {} at {at}", found(other)))),
    };
    items.iter().enumerate().map(prompt).collect()
}
