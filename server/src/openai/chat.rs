//! /v1/chat/completions: the request's fields and the answer's shape.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::constraint_fields::ConstraintField;
use super::fields::Fields;
use super::logprobs;
use super::options::{self, Delivery, GenerationOptions, TOP_LOGPROBS_MAX};
use super::refused::refuse_in_chat;
use super::session_fields::KeepFields;
use super::tools::{CallStyle, Tools};
use crate::choice::Ending;
use crate::error::ApiError;
use crate::generate::{Choice, TokenOut};
use crate::job::Job;
use crate::output::{Message, Output, Part, ShowReasoning};
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
    pub(crate) tools: Tools,
    show_reasoning: ShowReasoning,
    pub(crate) constraint: Option<ConstraintField>,
}

impl ChatRequest {
    pub(crate) fn read(fields: &Fields<'_, '_>, model: &Model) -> Result<Self, ApiError> {
        let tools = Tools::read(fields)?;
        let input = ChatInput::read(fields, model, &tools)?;
        let options = GenerationOptions::read(fields, model)?;
        let max_tokens = fields.count("max_tokens", 1..=usize::MAX)?;
        let max_tokens = fields.count("max_completion_tokens", 1..=usize::MAX)?.or(max_tokens);
        options.check_min_tokens(max_tokens)?;
        let logprobs = read_logprobs(fields)?;
        let delivery = options::delivery(fields)?;
        let keep = KeepFields::read(fields, model.served.reuse)?;
        let constraint = ConstraintField::read(fields)?;
        refuse_in_chat(fields)?;
        let show_reasoning = match fields.bool("include_reasoning")? {
            Some(false) => ShowReasoning::No,
            _ => ShowReasoning::Yes,
        };
        Ok(Self { input, options, max_tokens, logprobs, delivery, keep, constraint, tools, show_reasoning })
    }

    /// How answers that go on after a rendered prompt are taken apart.
    pub(crate) fn output(&self, model: &Model, prompt: &str) -> Output {
        let calls = (self.tools.names(), self.tools.style);
        Output::new(model.format, &model.served.tokenizer, calls, self.show_reasoning).after(prompt)
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
#[derive(Default)]
pub(crate) struct ChatShape {
    /// Choices of which a call is out.
    with_calls: HashSet<usize>,
}

impl ChatShape {
    fn event(job: &Job, index: usize, delta: Value, tokens: &[TokenOut]) -> Value {
        let mut choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        if job.logprobs.is_some() && !tokens.is_empty() {
            choice["logprobs"] = logprobs::chat(&job.model.served.tokenizer, tokens);
        }
        if job.options.return_token_ids && !tokens.is_empty() {
            choice["token_ids"] = json!(ids(tokens));
        }
        choice
    }
}

fn reason(job: &Job, ending: &Ending, has_calls: bool) -> &'static str {
    match finish_reason(ending, has_calls) {
        "tool_calls" if job.output.style == CallStyle::Functions => "function_call",
        reason => reason,
    }
}

/// The object `message`.
fn message_object(message: &Message, style: CallStyle) -> Value {
    let mut object = message.to_json();
    if let (CallStyle::Functions, Some(call)) = (style, message.calls.first()) {
        object.as_object_mut().map(|object| object.shift_remove("tool_calls"));
        object["function_call"] = json!({"name": call.name, "arguments": call.arguments});
    }
    object
}

/// The object `delta` of some parts. What is of one call stands in one entry, since clients put entries together by
/// their index only from one event to the next.
fn delta_object(parts: &[Part], style: CallStyle) -> Value {
    let mut delta = json!({});
    let add = |field: &mut Value, text: &str| {
        *field = json!(field.as_str().unwrap_or_default().to_owned() + text);
    };
    let mut calls: Vec<Value> = Vec::new();
    for part in parts {
        match part {
            Part::Text(text) => add(&mut delta["content"], text),
            Part::Reasoning(text) => add(&mut delta["reasoning_content"], text),
            Part::CallBegin { index, id, name } => {
                let function = json!({"name": name, "arguments": ""});
                calls.push(json!({"index": index, "id": id, "type": "function", "function": function}));
            }
            Part::CallArguments { index, text } => {
                if calls.last().is_none_or(|call| call["index"] != *index) {
                    calls.push(json!({"index": index, "function": {"arguments": ""}}));
                }
                let call = calls.last_mut().expect("there is one");
                add(&mut call["function"]["arguments"], text);
            }
        }
    }
    match (style, calls.first_mut()) {
        (_, None) => {}
        // There is one call at most: what would be more stays out.
        (CallStyle::Functions, Some(call)) if call["index"] == 0 => {
            delta["function_call"] = call["function"].take();
        }
        (CallStyle::Functions, Some(_)) => {}
        (CallStyle::Tools, Some(_)) => delta["tool_calls"] = Value::from(calls),
    }
    if parts.is_empty() {
        // An event of tokens alone.
        delta["content"] = json!("");
    }
    delta
}

impl Shape for ChatShape {
    const WHOLE: &'static str = "chat.completion";
    const EVENT: &'static str = "chat.completion.chunk";
    const ID_PREFIX: &'static str = "chatcmpl-";

    fn choice(&self, job: &Job, index: usize, choice: &Choice) -> Value {
        let logprobs = job.logprobs.map(|_| logprobs::chat(&job.model.served.tokenizer, &choice.tokens));
        let has_calls = !choice.message.calls.is_empty();
        let mut message = message_object(&choice.message, job.output.style);
        message["refusal"] = Value::Null;
        message["annotations"] = json!([]);
        let mut answer = json!({
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": reason(job, &choice.ending, has_calls),
            "stop_reason": stop_reason(&choice.ending),
        });
        if job.options.return_token_ids {
            answer["token_ids"] = json!(ids(&choice.tokens));
        }
        answer
    }

    fn opening(&self, job: &Job, index: usize) -> Option<Value> {
        Some(Self::event(job, index, json!({"role": "assistant", "content": ""}), &[]))
    }

    fn delta(&mut self, job: &Job, index: usize, (parts, tokens): (&[Part], &[TokenOut])) -> Value {
        if parts.iter().any(|part| matches!(part, Part::CallBegin { .. })) {
            self.with_calls.insert(index);
        }
        Self::event(job, index, delta_object(parts, job.output.style), tokens)
    }

    fn ending(&self, job: &Job, index: usize, ending: &Ending) -> Value {
        let mut choice = Self::event(job, index, json!({}), &[]);
        choice["finish_reason"] = json!(reason(job, ending, self.with_calls.contains(&index)));
        choice["stop_reason"] = stop_reason(ending);
        choice
    }

    fn extend(&self, job: &Job, answer: &mut Value) {
        if job.options.return_token_ids {
            answer["prompt_token_ids"] = json!(job.prompts[0].tokens);
        }
    }
}
