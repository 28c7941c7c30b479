//! /v1/chat/completions: the request's fields and the answer's shape.

use serde_json::{Value, json};

use super::constraint_fields::ConstraintField;
use super::fields::Fields;
use super::logprobs;
use super::options::{self, Delivery, GenerationOptions, TOP_LOGPROBS_MAX};
use super::refused::refuse_in_chat;
use super::session_fields::KeepFields;
use crate::choice::Ending;
use crate::error::ApiError;
use crate::generate::{Choice, TokenOut};
use crate::job::Job;
use crate::prompt::ChatInput;
use crate::registry::Model;
use crate::reply::{Shape, finish_reason, ids, stop_reason};

/// A chat request.
pub(crate) struct ChatRequest {
    pub(crate) input: ChatInput,
    pub(crate) options: GenerationOptions,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) logprobs: Option<usize>,
    pub(crate) delivery: Delivery,
    pub(crate) keep: KeepFields,
    pub(crate) constraint: Option<ConstraintField>,
}

impl ChatRequest {
    pub(crate) fn read(fields: &Fields<'_, '_>, model: &Model) -> Result<Self, ApiError> {
        let input = ChatInput::read(fields, model)?;
        let options = GenerationOptions::read(fields, model)?;
        let max_tokens = fields.count("max_tokens", 1..=usize::MAX)?;
        let max_tokens = fields.count("max_completion_tokens", 1..=usize::MAX)?.or(max_tokens);
        options.check_min_tokens(max_tokens)?;
        let logprobs = read_logprobs(fields)?;
        let delivery = options::delivery(fields)?;
        let keep = KeepFields::read(fields)?;
        let constraint = ConstraintField::read(fields)?;
        refuse_in_chat(fields)?;
        Ok(Self { input, options, max_tokens, logprobs, delivery, keep, constraint })
    }
}

fn read_logprobs(fields: &Fields<'_, '_>) -> Result<Option<usize>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    match top {
        Some(top) if top > 0 && !wanted => Err(ApiError::field(
            "top_logprobs",
            format!("expected `logprobs`: true beside it, found {top} without"),
        )),
        top => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

/// The shape of a chat answer.
pub(crate) struct ChatShape;

impl ChatShape {
    fn event(job: &Job, index: usize, delta: Value, rest: (&[TokenOut], Option<&Ending>)) -> Value {
        let (tokens, ending) = rest;
        let mut choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": null,
            "finish_reason": ending.map(finish_reason),
        });
        if job.logprobs.is_some() && !tokens.is_empty() {
            choice["logprobs"] = logprobs::chat(&job.model.served.tokenizer, tokens);
        }
        if job.options.return_token_ids && !tokens.is_empty() {
            choice["token_ids"] = json!(ids(tokens));
        }
        if let Some(ending) = ending {
            choice["stop_reason"] = stop_reason(ending);
        }
        choice
    }
}

impl Shape for ChatShape {
    const WHOLE: &'static str = "chat.completion";
    const EVENT: &'static str = "chat.completion.chunk";
    const ID_PREFIX: &'static str = "chatcmpl-";

    fn choice(&self, job: &Job, index: usize, choice: &Choice) -> Value {
        let logprobs = job.logprobs.map(|_| logprobs::chat(&job.model.served.tokenizer, &choice.tokens));
        let mut answer = json!({
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": null, "annotations": []},
            "logprobs": logprobs,
            "finish_reason": finish_reason(&choice.ending),
            "stop_reason": stop_reason(&choice.ending),
        });
        if job.options.return_token_ids {
            answer["token_ids"] = json!(ids(&choice.tokens));
        }
        answer
    }

    fn opening(&self, job: &Job, index: usize) -> Option<Value> {
        Some(Self::event(job, index, json!({"role": "assistant", "content": ""}), (&[], None)))
    }

    fn delta(&mut self, job: &Job, index: usize, (text, tokens): (&str, &[TokenOut])) -> Value {
        Self::event(job, index, json!({"content": text}), (tokens, None))
    }

    fn ending(&self, job: &Job, index: usize, ending: &Ending) -> Value {
        Self::event(job, index, json!({}), (&[], Some(ending)))
    }

    fn extend(&self, job: &Job, answer: &mut Value) {
        if job.options.return_token_ids {
            answer["prompt_token_ids"] = json!(job.prompts[0].tokens);
        }
    }
}
