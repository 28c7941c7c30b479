//! From prompts of tokens to text: submits to the engine, detokenizes, finds stop strings, counts.
//!
//! Streamed and whole answers both come from [`Run`], so their texts are equal.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use mainstay_engine::store::Durability;
use mainstay_engine::{Event, FinishReason, Generation, Keep, Request, RequestError, Score, StopRule};
use serde_json::Value;
use tokio::time::Instant;

use crate::choice::{ChoiceText, Ending};
use crate::detokenize::{Decoder, Detokenizer};
use crate::error::ApiError;
use crate::kv::{self, Reused};
use crate::metrics::Outcome;
use crate::openai::options::GenerationOptions;
use crate::openai::usage::Usage;
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

/// A request ready for the engine. Choice `i` belongs to prompt `i / options.choices`.
pub(crate) struct Job {
    pub(crate) model: Arc<Model>,
    pub(crate) tenant: Arc<str>,
    pub(crate) prompts: Vec<Prompt>,
    /// As the client asked.
    pub(crate) max_tokens: Option<usize>,
    /// Where it did not ask; without it, the rest of the context.
    pub(crate) max_tokens_default: Option<usize>,
    pub(crate) options: GenerationOptions,
    /// Alternatives to report beside each token's log-probability.
    pub(crate) logprobs: Option<usize>,
    pub(crate) echo: Echo,
    pub(crate) continuation: Continuation,
    pub(crate) time: TimeLimits,
    /// What becomes of its keys and values.
    pub(crate) keep: Keep,
}

/// Where a token of an answer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The prompt, echoed.
    Prompt,
    Generated,
}

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenOut {
    pub(crate) id: u32,
    pub(crate) origin: Origin,
    pub(crate) score: Option<Score>,
    /// Characters of the answer before it.
    pub(crate) offset: usize,
}

/// What happened to a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Update {
    /// A choice's text grew, or its list of tokens did.
    Delta { choice: usize, text: String, tokens: Vec<TokenOut> },
    /// A choice ended.
    End { choice: usize, ending: Ending },
}

/// A whole choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) tokens: Vec<TokenOut>,
    pub(crate) ending: Ending,
}

/// What an answer ends with, beside its choices.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Closing {
    pub(crate) kv: Value,
}

impl Closing {
    /// Writes it into the answer, or into the event that ends it.
    pub(crate) fn extend(&self, answer: &mut Value) {
        answer["kv"] = self.kv.clone();
    }
}

/// One prompt under way. Dropping the generation cancels it and frees its pages.
struct Lane {
    generation: Option<Generation>,
    choices: Vec<ChoiceText>,
}

/// A job under way. Dropping it cancels what has not finished.
pub(crate) struct Run {
    job: Job,
    lanes: Vec<Lane>,
    /// Prompts that the engine had no room for while others of this job hold its queue.
    unsent: VecDeque<usize>,
    updates: VecDeque<Update>,
    usage: Usage,
    reused: Reused,
    /// Generations whose choices have all ended here, before the engine said so.
    ended: Vec<Generation>,
    started: bool,
    first_token: bool,
}

impl Run {
    /// Submits the job's prompts.
    ///
    /// # Errors
    /// What the engine refuses, as an answer to the client. Then nothing of the job is left in the engine.
    pub(crate) fn start(job: Job) -> Result<Self, ApiError> {
        let lanes: Vec<Lane> = job.prompts.iter().map(|prompt| Lane::new(&job, prompt)).collect();
        let usage = Usage {
            prompt_tokens: job.prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
            ..Usage::default()
        };
        let unsent = (0..lanes.len()).collect();
        let updates = VecDeque::new();
        let mut run = Self {
            job,
            lanes,
            unsent,
            updates,
            usage,
            reused: Reused::default(),
            ended: Vec::new(),
            started: false,
            first_token: false,
        };
        if run.job.echo == Echo::Prompt && run.job.logprobs.is_none() {
            for prompt in 0..run.lanes.len() {
                run.echo(prompt, Vec::new());
            }
        }
        run.submit()?;
        Ok(run)
    }

    pub(crate) fn job(&self) -> &Job {
        &self.job
    }

    /// Choices of all prompts.
    pub(crate) fn choice_count(&self) -> usize {
        self.job.prompts.len() * self.job.options.choices as usize
    }

    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    /// The next thing that happens, `None` after the last choice ended. May be cancelled and called again.
    ///
    /// # Errors
    /// A device failure or a time limit; the job is over then.
    pub(crate) async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        loop {
            if let Some(update) = self.updates.pop_front() {
                return Some(Ok(update));
            }
            if self.unsent.is_empty() && self.lanes.iter().all(|lane| lane.generation.is_none()) {
                return None;
            }
            let handled = match self.deadline() {
                None => Ok(self.event().await),
                Some((at, error)) => tokio::time::timeout_at(at, self.event()).await.map_err(|_| error),
            };
            let handled = handled.and_then(|(lane, event)| self.handle(lane, event));
            if let Err(error) = handled {
                self.abort();
                return Some(Err(error));
            }
        }
    }

    /// Waits for all choices.
    ///
    /// # Errors
    /// As [`Run::next`].
    pub(crate) async fn collect(&mut self) -> Result<Vec<Choice>, ApiError> {
        let mut choices = vec![Choice::default(); self.choice_count()];
        while let Some(update) = self.next().await {
            match update? {
                Update::Delta { choice, text, tokens } => {
                    choices[choice].text.push_str(&text);
                    choices[choice].tokens.extend(tokens);
                }
                Update::End { choice, ending } => choices[choice].ending = ending,
            }
        }
        Ok(choices)
    }

    /// Ends the answer: waits for what its last event tells. Call it once, after the last choice has ended.
    pub(crate) async fn close(&mut self) -> Result<Closing, ApiError> {
        let is_kept = kv::are_pages_kept(&self.job.model, &self.job.keep);
        for mut generation in self.ended.drain(..).filter(|_| is_kept) {
            // Until the engine has seen that it was stopped, its last page is not on its way.
            let end = async { while generation.events.recv().await.is_some() {} };
            let _ = tokio::time::timeout(kv::PAGE_PATIENCE, end).await;
        }
        kv::settle(&self.job.model, &self.job.keep).await;
        let durability = if is_kept { Durability::Async } else { Durability::Ephemeral };
        Ok(Closing { kv: self.reused.to_json(durability) })
    }

    /// Hands prompts to the engine. When its queue is full of this very job, the rest waits here.
    fn submit(&mut self) -> Result<(), ApiError> {
        while let Some(&prompt) = self.unsent.front() {
            let request = self.job.request(prompt);
            match self.job.model.served.engine.submit(request) {
                Ok(generation) => self.lanes[prompt].generation = Some(generation),
                Err(RequestError::Busy { .. }) if self.lanes.iter().any(|lane| lane.generation.is_some()) => {
                    break;
                }
                Err(error) => return Err(error.into()),
            }
            self.unsent.pop_front();
        }
        Ok(())
    }

    async fn event(&mut self) -> (usize, Option<Event>) {
        poll_fn(|context| {
            for (at, lane) in self.lanes.iter_mut().enumerate() {
                if let Some(generation) = &mut lane.generation
                    && let Poll::Ready(event) = generation.events.poll_recv(context)
                {
                    return Poll::Ready((at, event));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// The time limit that comes first, and what the client hears then.
    fn deadline(&self) -> Option<(Instant, ApiError)> {
        let time = &self.job.time;
        let request =
            time.request.map(|limit| (time.arrived + limit, ApiError::timeout(limit.as_secs_f64())));
        let queue = time.queue.filter(|_| !self.started).map(|limit| {
            let message = format!("the request waited longer than {} s to be started", limit.as_secs_f64());
            (time.arrived + limit, ApiError::unavailable(message, "queue_timeout"))
        });
        [request, queue].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn handle(&mut self, at: usize, event: Option<Event>) -> Result<(), ApiError> {
        match event {
            Some(Event::Started { kv }) => {
                self.started = true;
                self.reused.add(&kv);
                self.usage.cached_tokens = self.reused.cached_tokens.min(self.usage.prompt_tokens);
            }
            Some(Event::Prompt(scores)) => self.echo_scores(at, scores),
            Some(Event::Token { choice, token, score }) => self.token(at, choice as usize, token, score),
            Some(Event::Finished { choice, reason }) => self.finished(at, choice as usize, reason),
            Some(Event::Failed(error)) => return Err(error.into()),
            None => {
                self.lanes[at].generation = None;
                if self.lanes[at].choices.iter().any(|choice| !choice.ended()) {
                    return Err(ApiError::internal("the engine ended the request without a result"));
                }
            }
        }
        if self.lanes[at].generation.is_some() && self.lanes[at].choices.iter().all(ChoiceText::ended) {
            self.ended.extend(self.lanes[at].generation.take());
        }
        if self.lanes[at].generation.is_none() { self.submit() } else { Ok(()) }
    }

    fn token(&mut self, at: usize, choice: usize, id: u32, score: Option<Score>) {
        let metrics = &self.job.model.metrics;
        if !std::mem::replace(&mut self.first_token, true) {
            metrics.first_token.observe(self.job.time.arrived.elapsed());
        }
        let lane = &mut self.lanes[at];
        let state = &mut lane.choices[choice];
        if state.ended() {
            // Drawn before the engine heard of the stop string.
            return;
        }
        if let Some(interval) = state.interval() {
            metrics.between_tokens.observe(interval);
        }
        self.usage.completion_tokens += 1;
        let offset = state.offset();
        let grown = state.push(self.job.decoder(), &self.job.options, id);
        let token = TokenOut { id, origin: Origin::Generated, score, offset };
        let tokens = if self.job.reports_tokens() { vec![token] } else { Vec::new() };
        let choice_index = self.job.choice_index(at, choice);
        if !grown.text.is_empty() || !tokens.is_empty() {
            self.updates.push_back(Update::Delta { choice: choice_index, text: grown.text, tokens });
        }
        if let Some(ending) = grown.ending {
            if let Some(generation) = &lane.generation {
                self.job.model.served.engine.stop(generation.id, choice as u32);
            }
            self.end(choice_index, ending);
        }
    }

    fn finished(&mut self, at: usize, choice: usize, reason: FinishReason) {
        let state = &mut self.lanes[at].choices[choice];
        if state.ended() {
            return;
        }
        let grown = state.finish(self.job.decoder(), &self.job.options, reason);
        let choice = self.job.choice_index(at, choice);
        if !grown.text.is_empty() {
            self.updates.push_back(Update::Delta { choice, text: grown.text, tokens: Vec::new() });
        }
        self.end(choice, grown.ending.expect("a finished choice has an ending"));
    }

    fn end(&mut self, choice: usize, ending: Ending) {
        self.job.model.metrics.finished(ending.outcome());
        self.updates.push_back(Update::End { choice, ending });
    }

    /// Echoes a prompt with its log-probabilities; `scores` are those of all its tokens but the first.
    fn echo_scores(&mut self, at: usize, scores: Vec<Score>) {
        if self.job.echo == Echo::No || self.job.logprobs.is_none() {
            return;
        }
        let decoder = self.job.decoder();
        let mut text = Detokenizer::default();
        let mut offset = 0;
        let scores = [None].into_iter().chain(scores.into_iter().map(Some));
        let token = |(id, score): (&u32, Option<Score>)| {
            let token = TokenOut { id: *id, origin: Origin::Prompt, score, offset };
            offset += text.push(decoder, *id).chars().count();
            token
        };
        let tokens = self.job.prompts[at].tokens.iter().zip(scores).map(token).collect();
        self.echo(at, tokens);
    }

    fn echo(&mut self, at: usize, tokens: Vec<TokenOut>) {
        let text = self.job.prompts[at].text(self.job.decoder());
        let offset = text.chars().count();
        for choice in 0..self.job.options.choices as usize {
            self.lanes[at].choices[choice].skip(offset);
            let choice = self.job.choice_index(at, choice);
            self.updates.push_back(Update::Delta { choice, text: text.clone(), tokens: tokens.clone() });
        }
    }

    /// Cancels what runs.
    fn abort(&mut self) {
        self.unsent.clear();
        for lane in self.lanes.iter_mut().filter(|lane| lane.generation.is_some()) {
            lane.generation = None;
            for _ in lane.choices.iter().filter(|choice| !choice.ended()) {
                self.job.model.metrics.finished(Outcome::Abort);
            }
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Lane {
    fn new(job: &Job, prompt: &Prompt) -> Self {
        let text = match job.continuation {
            Continuation::OwnText => Detokenizer::default(),
            Continuation::OfPrompt => Detokenizer::after(job.decoder(), &prompt.tokens),
        };
        let choice = ChoiceText::new(text, job.options.stop_strings.clone());
        Self { generation: None, choices: vec![choice; job.options.choices as usize] }
    }
}

impl Job {
    fn decoder(&self) -> Decoder<'_> {
        self.model.decoder(self.options.show_special)
    }

    /// Whether the answer names its tokens, beside the text.
    fn reports_tokens(&self) -> bool {
        self.logprobs.is_some() || self.options.return_token_ids
    }

    fn choice_index(&self, prompt: usize, choice: usize) -> usize {
        prompt * self.options.choices as usize + choice
    }

    fn request(&self, prompt: usize) -> Request {
        let prompt = self.prompts[prompt].tokens.clone();
        let room = self.model.served.context.saturating_sub(prompt.len());
        let max_tokens = self.max_tokens.unwrap_or(self.max_tokens_default.unwrap_or(room).min(room));
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
        }
    }
}
