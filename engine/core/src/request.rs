//! What goes into the engine and what comes out of it.

use std::collections::HashSet;
use std::sync::Arc;

use mainstay_store::Durability;

use crate::{Adapter, Grammar};

/// One generation request, already tokens.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whose it is; pages are never shared between tenants.
    pub tenant: Arc<str>,
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Tokens of the answer that were drawn before it was interrupted: it goes on after them as if it never had
    /// been. Only for a request with one choice.
    pub drawn: Vec<u32>,
    /// How many independent continuations to draw; they share the prompt's pages. Each is what a lone request with
    /// that choice's index in its draws would give.
    pub choices: u32,
    /// Draws; `seed` and the penalties of every choice. `choice`, `bias` and `history` are filled in by the engine.
    pub sampling: SamplingRequest,
    /// When a choice ends.
    pub stop: StopRule,
    /// Report the log-probability of generated tokens and this many alternatives.
    pub logprobs: Option<usize>,
    /// Report the log-probability of prompt tokens and this many alternatives; such a request takes no prefix hit.
    pub prompt_logprobs: Option<usize>,
    /// What becomes of its keys and values.
    pub keep: Keep,
    /// Whose turn it is: lower numbers go first, equal ones in the order of arrival.
    pub priority: i32,
    /// What the model is changed by.
    pub adapter: Option<Adapter>,
    /// What every choice is held to. Prompt log-probabilities and scores are those of the model, as without it.
    pub grammar: Option<Arc<dyn Grammar>>,
}

/// A request for the one row that a text, or a pair of texts, becomes: its embedding, or its score.
#[derive(Clone, Debug)]
pub struct PoolRequest {
    /// Whose it is; pages are never shared between tenants.
    pub tenant: Arc<str>,
    /// The text, at least one token.
    pub tokens: Vec<u32>,
    /// Where the second text of a pair begins.
    pub second: Option<usize>,
    /// As [`Request::priority`].
    pub priority: i32,
    /// As [`Request::adapter`].
    pub adapter: Option<Adapter>,
}

impl PoolRequest {
    /// The same, as a prompt after which nothing is generated.
    pub(crate) fn into_parts(self) -> (Request, Goal) {
        let request = Request {
            tenant: self.tenant,
            prompt: self.tokens,
            drawn: Vec::new(),
            choices: 1,
            sampling: SamplingRequest::greedy(),
            stop: StopRule::default(),
            logprobs: None,
            prompt_logprobs: None,
            keep: Keep { durability: Durability::Ephemeral, ..Keep::default() },
            priority: self.priority,
            adapter: self.adapter,
            grammar: None,
        };
        (request, Goal::Row { second: self.second })
    }
}

/// What a sequence is computed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// To draw tokens after it.
    Tokens,
    /// To become one row.
    Row {
        /// Where the second text of a pair begins.
        second: Option<usize>,
    },
}

/// What becomes of a request's keys and values.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Keep {
    /// The client's own partition of its tenant's pages.
    pub salt: Vec<u8>,
    /// Whether pages go to the store, if the engine has one: never at `Ephemeral`; at `Full` none is left out for
    /// lack of room in the queue.
    pub durability: Durability,
    /// Which stored pages may be used.
    pub reuse: Reuse,
}

/// Which stored pages a request may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reuse {
    /// Those that the same numeric class computed: the continuation has the same bits.
    #[default]
    Exact,
    /// Also another class's, of the same weights: the continuation is equal within tolerance.
    Equivalent,
}

/// What was reused of a request's keys and values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvReport {
    /// How the request began.
    pub state: KvState,
    /// Why nothing, or not all, was reused, where that is known: `numeric_class`, `planner`, `damaged`, `late`,
    /// `absent`.
    pub reason: Option<&'static str>,
    /// Prompt tokens whose keys and values were found, and are not computed again.
    pub cached_tokens: usize,
    /// Of these, such that were read from the store.
    pub restored_tokens: usize,
    /// From the first read until the pages were on the device, milliseconds.
    pub restore_ms: f64,
}

/// How a request began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvState {
    /// With keys and values that have the bits it would have computed itself.
    Exact,
    /// With keys and values of another numeric class, or on a backend whose results are not invariant.
    Equivalent,
    /// Stored keys and values were known, and computed again.
    Recomputed,
    /// With nothing.
    Cold,
}

impl KvState {
    /// As it stands in answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Equivalent => "equivalent",
            Self::Recomputed => "recomputed",
            Self::Cold => "cold",
        }
    }
}

/// How to draw, as the client asked; see [`mainstay_backend_api::Sampling`] for the meaning of each number.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingRequest {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 drops none.
    pub min_p: f32,
    /// 1 does nothing.
    pub repetition_penalty: f32,
    /// 0 does nothing.
    pub presence_penalty: f32,
    /// 0 does nothing.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The seed of all draws of the request.
    pub seed: u64,
}

impl SamplingRequest {
    /// Always the most probable token, nothing counted against any.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }

    /// Whether draws depend on the tokens before them in another way than through the model.
    pub(crate) fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// When a choice ends. Stop strings are text and belong to the server, which ends a choice by `Handle::stop`.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct StopRule {
    /// Most tokens to generate; 0 computes the prompt only (for its log-probabilities, or to warm its pages).
    pub max_tokens: usize,
    /// Tokens that end the choice: end-of-text tokens of the model (unless ignored) and the client's own.
    pub tokens: Vec<u32>,
    /// None of `tokens` may be drawn before this many tokens were generated.
    pub min_tokens: usize,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A token of [`StopRule::tokens`] was drawn; it is the last token reported.
    Stop(u32),
    /// [`StopRule::max_tokens`] or the context was reached.
    Length,
    /// [`Request::grammar`] allows no token more.
    Complete,
    /// The server ended it.
    Stopped,
}

/// A token's log-probability and the alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The token.
    pub token: u32,
    /// Natural logarithm, under the raw logits.
    pub logprob: f32,
    /// Most probable tokens, most probable first.
    pub top: Vec<(u32, f32)>,
}

/// What a request's owner hears, in order. Dropping the receiver cancels the request.
#[derive(Debug)]
pub enum Event {
    /// The first step with this request's tokens is about to run.
    Started {
        /// What was reused.
        kv: KvReport,
    },
    /// Log-probabilities of all prompt tokens but the first, once, before any token.
    Prompt(Vec<Score>),
    /// The row that was asked for by a [`PoolRequest`].
    Pooled(Vec<f32>),
    /// A generated token.
    Token {
        /// The choice's index.
        choice: u32,
        /// The token; the log-probability is present if asked for.
        token: u32,
        /// Its score.
        score: Option<Score>,
    },
    /// A choice ended. After the last choice the channel closes.
    Finished {
        /// The choice's index.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// The request failed; nothing follows.
    Failed(RequestError),
}

/// Why a request was not served. The client can act on each.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Prompt and wanted tokens do not fit.
    #[error(
        "the prompt has {prompt} tokens; the context holds {context}, of which at least one must be left"
    )]
    ContextLength {
        /// Tokens in the prompt.
        prompt: usize,
        /// The engine's context.
        context: usize,
    },
    /// No room in the queue.
    #[error("{waiting} sequences wait already; try again later")]
    Busy {
        /// The limit that was reached.
        waiting: usize,
    },
    /// A field has a value that the engine cannot take.
    #[error("{field}: {what}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Expected and found.
        what: String,
    },
    /// The request's grammar failed while its answer was drawn.
    #[error("the grammar: {0}")]
    Grammar(String),
    /// The device failed under this request.
    #[error("the device failed: {0}")]
    Device(String),
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    Shutdown,
}

/// What a request must keep to.
pub(crate) struct Bounds {
    /// Tokens of a sequence.
    pub(crate) context: usize,
    pub(crate) vocab: usize,
    pub(crate) choices: usize,
    /// It draws tokens.
    pub(crate) generates: bool,
    /// Sequences can become one row.
    pub(crate) pools: bool,
}

/// No logit may become infinite by a penalty or a bias, or one request would fail the step of all.
const NUMBER_MAX: f32 = 1e4;

impl Request {
    /// Finds what the engine could not serve.
    pub(crate) fn check(&self, goal: Goal, bounds: &Bounds) -> Result<(), RequestError> {
        require("model", goal != Goal::Tokens || bounds.generates, || {
            "expected a model that generates text, found one that only makes embeddings or scores".to_owned()
        })?;
        require("model", goal == Goal::Tokens || bounds.pools, || {
            "expected a model that makes embeddings or scores, found one that only generates text".to_owned()
        })?;
        let prompt = self.prompt.len();
        require("prompt", prompt > 0, || "expected at least one token, found none".to_owned())?;
        if prompt > bounds.context || prompt == bounds.context && self.stop.max_tokens > 0 {
            return Err(RequestError::ContextLength { prompt, context: bounds.context });
        }
        check_ids("prompt", self.prompt.iter(), bounds.vocab)?;
        self.check_drawn(bounds)?;
        let choices = self.choices as usize;
        require("choices", (1..=bounds.choices).contains(&choices), || {
            format!("expected 1 to {}, found {choices}", bounds.choices)
        })?;
        self.sampling.check(bounds.vocab)?;
        let banned: HashSet<u32> = self.stop.tokens.iter().copied().collect();
        require("min_tokens", self.stop.min_tokens == 0 || banned.len() < bounds.vocab, || {
            "every token is a stop token, so none could be drawn before".to_owned()
        })
    }

    fn check_drawn(&self, bounds: &Bounds) -> Result<(), RequestError> {
        let (drawn, all) = (self.drawn.len(), self.prompt.len() + self.drawn.len());
        if drawn == 0 {
            return Ok(());
        }
        check_ids("drawn", self.drawn.iter(), bounds.vocab)?;
        if all >= bounds.context {
            return Err(RequestError::ContextLength { prompt: all, context: bounds.context });
        }
        require("drawn", self.choices == 1 && self.prompt_logprobs.is_none(), || {
            "expected one choice and no prompt log-probabilities beside tokens already drawn".to_owned()
        })?;
        require("drawn", drawn < self.stop.max_tokens, || {
            format!("expected fewer than max_tokens {}, found {drawn}", self.stop.max_tokens)
        })
    }
}

impl SamplingRequest {
    fn check(&self, vocab: usize) -> Result<(), RequestError> {
        let numbers = [
            ("temperature", self.temperature, 0.0..=NUMBER_MAX),
            ("top_p", self.top_p, 0.0..=1.0),
            ("min_p", self.min_p, 0.0..=1.0),
            ("repetition_penalty", self.repetition_penalty, 1.0 / NUMBER_MAX..=NUMBER_MAX),
            ("presence_penalty", self.presence_penalty, -NUMBER_MAX..=NUMBER_MAX),
            ("frequency_penalty", self.frequency_penalty, -NUMBER_MAX..=NUMBER_MAX),
        ];
        let biases = self.logit_bias.iter().map(|&(_, bias)| ("logit_bias", bias, -NUMBER_MAX..=NUMBER_MAX));
        for (field, number, range) in numbers.into_iter().chain(biases) {
            // A NaN is in no range.
            require(field, range.contains(&number), || {
                format!("expected {} to {}, found {number}", range.start(), range.end())
            })?;
        }
        check_ids("logit_bias", self.logit_bias.iter().map(|(id, _)| id), vocab)
    }
}

fn require(field: &'static str, holds: bool, what: impl FnOnce() -> String) -> Result<(), RequestError> {
    if holds { Ok(()) } else { Err(RequestError::Invalid { field, what: what() }) }
}

fn check_ids<'a>(
    field: &'static str,
    mut ids: impl Iterator<Item = &'a u32>,
    vocab: usize,
) -> Result<(), RequestError> {
    let wrong = ids.find(|&&id| id as usize >= vocab);
    let what = |id| format!("expected token ids below {vocab}, found {id}");
    wrong.map_or(Ok(()), |id| Err(RequestError::Invalid { field, what: what(id) }))
}
