//! A request that is ready for the engine.

use std::sync::Arc;
use std::time::Duration;

use mainstay_engine::store::Durability;
use mainstay_engine::{Keep, Request, StopRule};
use tokio::time::Instant;

use crate::detokenize::Decoder;
use crate::error::ApiError;
use crate::grammar::Compiled;
use crate::openai::chat::ChatRequest;
use crate::openai::options::GenerationOptions;
use crate::output::Output;
use crate::prompt::Prompt;
use crate::registry::Model;

/// Whether the prompt is part of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Echo {
    No,
    /// Its text, and its log-probabilities if log-probabilities are wanted at all.
    Prompt,
}

/// Whether the answer is a text of its own or goes on where the prompt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Continuation {
    OwnText,
    OfPrompt,
}

/// How long a request may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeLimits {
    pub(crate) arrived: Instant,
    /// From arrival to the last token.
    pub(crate) request: Option<Duration>,
    /// From arrival to the first step.
    pub(crate) queue: Option<Duration>,
}

impl TimeLimits {
    /// The limit that comes first, of a request whose first step has been `started` or not, and what the client hears
    /// then.
    pub(crate) fn deadline(&self, started: bool) -> Option<(Instant, ApiError)> {
        let request =
            self.request.map(|limit| (self.arrived + limit, ApiError::timeout(limit.as_secs_f64())));
        let queue = self.queue.filter(|_| !started).map(|limit| {
            let message = format!("the request waited longer than {} s to be started", limit.as_secs_f64());
            (self.arrived + limit, ApiError::unavailable(message, "queue_timeout"))
        });
        [request, queue].into_iter().flatten().min_by_key(|(at, _)| *at)
    }
}

/// A request ready for the engine. Choice `i` belongs to prompt `i / options.choices`.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) model: Arc<Model>,
    pub(crate) tenant: Arc<str>,
    pub(crate) prompts: Vec<Prompt>,
    /// As the client asked.
    pub(crate) max_tokens: Option<usize>,
    /// Where it did not ask; without it, the rest of the context.
    pub(crate) max_tokens_default: Option<usize>,
    pub(crate) options: GenerationOptions,
    /// How the answers are taken apart.
    pub(crate) output: Output,
    /// Alternatives to report beside each token's log-probability.
    pub(crate) logprobs: Option<usize>,
    pub(crate) echo: Echo,
    pub(crate) continuation: Continuation,
    pub(crate) time: TimeLimits,
    /// What becomes of its keys and values.
    pub(crate) keep: Keep,
    /// What every answer is held to.
    pub(crate) constraint: Option<Arc<Compiled>>,
}

/// Who asks a model for an answer, and how long it may take.
#[derive(Clone)]
pub(crate) struct Asker {
    pub(crate) model: Arc<Model>,
    pub(crate) tenant: Arc<str>,
    /// Where the client names no limit; without it, the rest of the context.
    pub(crate) max_tokens_default: Option<usize>,
    pub(crate) time: TimeLimits,
}

impl Asker {
    /// The job of a chat request whose prompt was made of the text `written`. `durability` holds where the request does
    /// not say.
    ///
    /// # Errors
    /// 400, where what the answer is to be held to cannot be compiled.
    pub(crate) async fn job(
        self,
        request: ChatRequest,
        (prompt, written): (Prompt, &str),
        (continuation, durability): (Continuation, Durability),
    ) -> Result<Job, ApiError> {
        let output = request.output(&self.model, written);
        let constraint = request.held(&self.model, &output).await?;
        Ok(Job {
            model: self.model,
            tenant: self.tenant,
            prompts: vec![prompt],
            max_tokens: request.max_tokens,
            max_tokens_default: self.max_tokens_default,
            options: request.options,
            output,
            logprobs: request.logprobs,
            echo: Echo::No,
            continuation,
            time: self.time,
            keep: request.keep.keep(durability),
            constraint,
        })
    }
}

impl Job {
    pub(crate) fn decoder(&self) -> Decoder<'_> {
        self.model.decoder(self.options.show_special, self.output.markers())
    }

    /// Whether the answer names its tokens, beside the text.
    pub(crate) fn reports_tokens(&self) -> bool {
        self.logprobs.is_some() || self.options.return_token_ids
    }

    pub(crate) fn choice_index(&self, prompt: usize, choice: usize) -> usize {
        prompt * self.options.choices as usize + choice
    }

    /// The most tokens that an answer to a prompt may have.
    pub(crate) fn most_tokens(&self, prompt: usize) -> usize {
        let room = self.model.served.context.saturating_sub(self.prompts[prompt].tokens.len());
        self.max_tokens.unwrap_or(self.max_tokens_default.unwrap_or(room).min(room))
    }

    /// Tokens that may be drawn where the constraint lets the text end: the model's, and what the client adds to them that
    /// has no text.
    fn end_tokens(&self) -> Vec<u32> {
        let served = &self.model.served;
        let ends = |id: &u32| served.generation.eos.contains(id) || served.tokenizer.is_special(*id);
        self.options.stop_tokens.iter().copied().filter(ends).collect()
    }

    pub(crate) fn request(&self, prompt: usize) -> Request {
        let max_tokens = self.most_tokens(prompt);
        let prompt = self.prompts[prompt].tokens.clone();
        // Without tokens to generate, the engine is only asked for the prompt's scores.
        let wants_scores = self.echo == Echo::Prompt && (self.logprobs.is_some() || max_tokens == 0);
        Request {
            tenant: self.tenant.clone(),
            prompt,
            choices: self.options.choices,
            sampling: self.options.sampling.clone(),
            stop: StopRule {
                max_tokens,
                tokens: self.options.stop_tokens.clone(),
                min_tokens: self.options.min_tokens.min(max_tokens),
            },
            logprobs: self.logprobs,
            prompt_logprobs: wants_scores.then_some(self.logprobs.unwrap_or(0)),
            drawn: Vec::new(),
            keep: self.keep.clone(),
            priority: self.options.priority,
            adapter: self.model.adapter.clone(),
            grammar: self.constraint.as_ref().map(|compiled| compiled.grammar(self.end_tokens())),
        }
    }
}
