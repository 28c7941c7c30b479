//! /v1/completions: the request's fields and the answer's shape.

use std::collections::HashSet;

use mainstay_models::tokenizer::AddSpecial;
use serde_json::{Value, json};

use super::constraint_fields::ConstraintField;
use super::fields::Fields;
use super::logprobs;
use super::options::{self, Delivery, GenerationOptions, PromptInput, TOP_LOGPROBS_MAX};
use super::refused::refuse_in_completions;
use super::session_fields::KeepFields;
use crate::choice::Ending;
use crate::error::ApiError;
use crate::generate::{Choice, TokenOut};
use crate::job::{Echo, Job};
use crate::output::{Message, Part};
use crate::prompt::add_special;
use crate::registry::Model;
use crate::reply::{Shape, finish_reason, ids, stop_reason};

/// Most choices of all prompts of a request together.
const CHOICES_MAX: usize = 8192;

/// A completion request.
pub(crate) struct CompletionRequest {
    pub(crate) prompts: Vec<PromptInput>,
    pub(crate) special: AddSpecial,
    pub(crate) options: GenerationOptions,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) logprobs: Option<usize>,
    pub(crate) echo: Echo,
    pub(crate) delivery: Delivery,
    pub(crate) keep: KeepFields,
    pub(crate) constraint: Option<ConstraintField>,
}

impl CompletionRequest {
    pub(crate) fn read(fields: &Fields<'_, '_>, model: &Model) -> Result<Self, ApiError> {
        model.check_generates()?;
        let prompts = options::prompts(fields, "prompt", model.served.vocab)?;
        let options = GenerationOptions::read(fields, model)?;
        options::check_best_of(fields, options.choices)?;
        check_choices(prompts.len(), options.choices as usize)?;
        let echo = if fields.bool("echo")?.unwrap_or(false) { Echo::Prompt } else { Echo::No };
        let least = if echo == Echo::Prompt { 0 } else { 1 };
        let max_tokens = fields.count("max_tokens", least..=usize::MAX)?;
        options.check_min_tokens(max_tokens)?;
        let logprobs = fields.count("logprobs", 0..=TOP_LOGPROBS_MAX)?;
        let delivery = options::delivery(fields)?;
        let keep = KeepFields::read(fields, model.served.reuse)?;
        let constraint = ConstraintField::read(fields)?;
        refuse_in_completions(fields)?;
        let special = add_special(fields, AddSpecial::Yes)?;
        Ok(Self { prompts, special, options, max_tokens, logprobs, echo, delivery, keep, constraint })
    }
}

fn check_choices(prompts: usize, choices: usize) -> Result<(), ApiError> {
    if prompts.saturating_mul(choices) > CHOICES_MAX {
        let message = format!(
            "expected at most {CHOICES_MAX} choices in all, found {prompts} prompts with n {choices}"
        );
        return Err(ApiError::field("prompt", message));
    }
    Ok(())
}

/// The shape of a completion.
#[derive(Default)]
pub(crate) struct CompletionShape {
    /// Choices whose first event is out.
    begun: HashSet<usize>,
}

impl CompletionShape {
    fn prompt_token_ids(job: &Job, index: usize) -> Value {
        json!(job.prompts[index / job.options.choices as usize].tokens)
    }
}

impl Shape for CompletionShape {
    const WHOLE: &'static str = "text_completion";
    const EVENT: &'static str = "text_completion";
    const ID_PREFIX: &'static str = "cmpl-";

    fn choice(&self, job: &Job, index: usize, choice: &Choice) -> Value {
        let logprobs =
            job.logprobs.map(|_| logprobs::completions(&job.model.served.tokenizer, &choice.tokens));
        let mut answer = json!({
            "index": index,
            "text": choice.message.content,
            "logprobs": logprobs,
            "finish_reason": finish_reason(&choice.ending, false),
            "stop_reason": stop_reason(&choice.ending),
        });
        if job.options.return_token_ids {
            answer["token_ids"] = json!(ids(&choice.tokens));
            answer["prompt_token_ids"] = Self::prompt_token_ids(job, index);
        }
        answer
    }

    fn opening(&self, _job: &Job, _index: usize) -> Option<Value> {
        None
    }

    fn delta(&mut self, job: &Job, index: usize, (parts, tokens): (&[Part], &[TokenOut])) -> Value {
        let mut message = Message::default();
        message.extend(parts);
        let mut answer =
            json!({"index": index, "text": message.content, "logprobs": null, "finish_reason": null});
        if job.logprobs.is_some() && !tokens.is_empty() {
            answer["logprobs"] = logprobs::completions(&job.model.served.tokenizer, tokens);
        }
        if job.options.return_token_ids {
            if !tokens.is_empty() {
                answer["token_ids"] = json!(ids(tokens));
            }
            if self.begun.insert(index) {
                answer["prompt_token_ids"] = Self::prompt_token_ids(job, index);
            }
        }
        answer
    }

    fn ending(&self, _job: &Job, index: usize, ending: &Ending) -> Value {
        json!({
            "index": index,
            "text": "",
            "logprobs": null,
            "finish_reason": finish_reason(ending, false),
            "stop_reason": stop_reason(ending),
        })
    }

    fn extend(&self, _job: &Job, _answer: &mut Value) {}
}
