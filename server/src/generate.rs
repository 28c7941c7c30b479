//! From prompts of tokens to answers: submits to the engine, detokenizes, finds stop strings, takes apart, counts.
//!
//! Streamed and whole answers both come from [`Run`], so their texts are equal.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};

use mainstay_engine::store::Durability;
use mainstay_engine::{Event, FinishReason, Generation, RequestError, Score};
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::choice::{ChoiceText, Ending};
use crate::detokenize::Detokenizer;
use crate::error::ApiError;
use crate::job::{Continuation, Echo, Job};
use crate::kv::{self, Reused};
use crate::metrics::Outcome;
use crate::openai::usage::Usage;
use crate::output::{Message, Parser, Part};
use crate::prompt::Prompt;
use crate::sessions::live::Heard;
use crate::sessions::turn::{Answered, Turn};

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
    /// A choice grew by some parts, or its list of tokens did, with the `drawn`th token.
    Delta { choice: usize, parts: Vec<Part>, tokens: Vec<TokenOut>, drawn: usize },
    /// A choice ended; the parts were held back until now.
    End { choice: usize, parts: Vec<Part>, ending: Ending, drawn: usize },
}

/// A whole choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) message: Message,
    pub(crate) tokens: Vec<TokenOut>,
    pub(crate) ending: Ending,
}

/// What an answer ends with, beside its choices.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Closing {
    pub(crate) kv: Value,
    /// The object `session`, of a turn.
    pub(crate) session: Option<Value>,
    pub(crate) usage: Usage,
}

impl Closing {
    /// Writes it into the answer, or into the event that ends it.
    pub(crate) fn extend(&self, answer: &mut Value) {
        answer["kv"] = self.kv.clone();
        if let Some(session) = &self.session {
            answer["session"] = session.clone();
        }
    }
}

/// Where tokens come from.
enum Source {
    /// Dropping it cancels it and frees its pages.
    Engine(Generation),
    /// Another run of this process, whose tokens are read along.
    Live(UnboundedReceiver<Heard>),
}

/// One prompt under way.
struct Lane {
    generation: Option<Source>,
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
    /// The end of the turn that is read along, when all its text is here.
    end: Option<UnboundedReceiver<Heard>>,
    /// Tokens of the answer that were drawn before it was interrupted.
    drawn: Vec<u32>,
    /// What becomes of the answer in its session.
    turn: Option<Turn>,
    /// The answer so far, of a turn: as the model wrote it, and what it is.
    answer: (String, Message),
    /// How the answer closed, where that is known before.
    closing: Option<Closing>,
    /// Others count what they only read again.
    is_counted: bool,
    started: bool,
    first_token: bool,
}

impl Run {
    /// Submits the job's prompts.
    ///
    /// # Errors
    /// What the engine refuses, as an answer to the client. Then nothing of the job is left in the engine.
    pub(crate) fn start(job: Job) -> Result<Self, ApiError> {
        let mut run = Self::new(job);
        if run.job.echo == Echo::Prompt && run.job.logprobs.is_none() {
            for prompt in 0..run.lanes.len() {
                run.echo(prompt, Vec::new());
            }
        }
        run.submit()?;
        Ok(run)
    }

    /// Begins a turn of a session, or goes on with one after the tokens that were drawn of it. Where these end the
    /// answer, nothing is submitted.
    ///
    /// # Errors
    /// As [`Run::start`].
    pub(crate) fn of_turn(job: Job, turn: Turn, drawn: Vec<u32>) -> Result<Self, ApiError> {
        let mut run = Self::new(job);
        run.turn = Some(turn);
        run.read_again(&drawn);
        let options = &run.job.options;
        let is_stop = |token: &u32| options.stop_tokens.contains(token) && drawn.len() > options.min_tokens;
        let full = run.job.prompts[0].tokens.len() + drawn.len() >= run.job.model.served.context;
        if let Some(token) = drawn.last().copied().filter(is_stop) {
            run.finished(0, 0, FinishReason::Stop(token));
        } else if !drawn.is_empty() && (drawn.len() >= run.job.most_tokens(0) || full) {
            run.finished(0, 0, FinishReason::Length);
        }
        run.drawn = drawn;
        if run.lanes[0].choices[0].ended() {
            run.unsent.clear();
        }
        run.submit()?;
        Ok(run)
    }

    /// Reads along with a turn that runs.
    pub(crate) fn follow(job: Job, heard: UnboundedReceiver<Heard>) -> Self {
        let mut run = Self::new(job);
        run.unsent.clear();
        run.is_counted = false;
        run.lanes[0].generation = Some(Source::Live(heard));
        run
    }

    /// Reads the tokens of a turn that has ended, for want of tokens or not.
    pub(crate) fn of_past(job: Job, (drawn, is_cut): (&[u32], bool), closing: Closing) -> Self {
        let mut run = Self::new(job);
        run.unsent.clear();
        run.is_counted = false;
        run.read_again(drawn);
        let is_stop = |token: &u32| run.job.options.stop_tokens.contains(token);
        let last = drawn.last().copied().filter(is_stop);
        let undrawn = if is_cut { FinishReason::Length } else { FinishReason::Complete };
        run.finished(0, 0, last.map_or(undrawn, FinishReason::Stop));
        run.usage = closing.usage;
        run.closing = Some(closing);
        run
    }

    fn new(job: Job) -> Self {
        let lanes: Vec<Lane> = job.prompts.iter().map(|prompt| Lane::new(&job, prompt)).collect();
        let usage = Usage {
            prompt_tokens: job.prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
            ..Usage::default()
        };
        let unsent = (0..lanes.len()).collect();
        let updates = VecDeque::new();
        Self {
            job,
            lanes,
            unsent,
            updates,
            usage,
            reused: Reused::default(),
            end: None,
            drawn: Vec::new(),
            turn: None,
            answer: Default::default(),
            closing: None,
            is_counted: true,
            started: false,
            first_token: false,
        }
    }

    /// Takes tokens that were drawn before.
    fn read_again(&mut self, drawn: &[u32]) {
        for token in drawn {
            self.token(0, 0, *token, None);
        }
    }

    /// Writes down in the session that an answer has begun, so that it can go on if it is interrupted.
    ///
    /// # Errors
    /// What the store refuses.
    pub(crate) async fn begin_answer(&mut self) -> Result<(), ApiError> {
        match &mut self.turn {
            Some(turn) => turn.begin_answer(&self.job).await,
            None => Ok(()),
        }
    }

    /// What the Responses API is to find with the turn, before [`Run::close`].
    pub(crate) fn describe(&mut self, response: Value) {
        if let Some(turn) = &mut self.turn {
            turn.describe(response);
        }
    }

    /// Ends the answer where it is; what there is of it can be closed.
    pub(crate) fn cut(&mut self) {
        self.abort();
        self.updates.clear();
        if let Some(turn) = &self.turn {
            turn.finished(FinishReason::Length);
        }
    }

    /// Whether it is a turn of a session.
    pub(crate) fn is_turn(&self) -> bool {
        self.turn.is_some()
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
            let handled = match self.job.time.deadline(self.started) {
                None => Ok(self.event().await),
                Some((at, error)) => tokio::time::timeout_at(at, self.event()).await.map_err(|_| error),
            };
            let handled = handled.and_then(|(lane, event)| self.handle(lane, event));
            if let Err(error) = handled {
                self.abort();
                if let Some(turn) = self.turn.take() {
                    turn.failed(&error);
                }
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
                Update::Delta { choice, parts, tokens, .. } => {
                    choices[choice].message.extend(&parts);
                    choices[choice].tokens.extend(tokens);
                }
                Update::End { choice, parts, ending, .. } => {
                    choices[choice].message.extend(&parts);
                    choices[choice].ending = ending;
                }
            }
        }
        Ok(choices)
    }

    /// Ends the answer: waits for what its last event tells. Call it once, after the last choice has ended.
    pub(crate) async fn close(&mut self) -> Result<Closing, ApiError> {
        if let Some(heard) = self.end.take() {
            let closing = closing_of(heard).await?;
            self.usage = closing.usage;
            return Ok(closing);
        }
        if let Some(closing) = self.closing.take() {
            return Ok(closing);
        }
        if let Some(turn) = self.turn.take() {
            let (text, message) = std::mem::take(&mut self.answer);
            let ending = self.lanes[0].choices[0].ending().cloned().unwrap_or_default();
            let answered = Answered { text, message, ending, usage: self.usage, reused: self.reused.clone() };
            return turn.commit(&self.job, answered).await;
        }
        kv::settle(&self.job.model, &self.job.keep).await;
        let is_kept = kv::are_pages_kept(&self.job.model, &self.job.keep);
        let durability = if is_kept { Durability::Async } else { Durability::Ephemeral };
        Ok(Closing { kv: self.reused.to_json(durability), session: None, usage: self.usage })
    }

    /// Hands prompts to the engine. When its queue is full of this very job, the rest waits here.
    fn submit(&mut self) -> Result<(), ApiError> {
        while let Some(&prompt) = self.unsent.front() {
            let mut request = self.job.request(prompt);
            request.drawn.clone_from(&self.drawn);
            match self.job.model.served.engine.submit(request) {
                Ok(generation) => self.lanes[prompt].generation = Some(Source::Engine(generation)),
                Err(RequestError::Busy { .. }) if self.lanes.iter().any(|lane| lane.generation.is_some()) => {
                    break;
                }
                Err(error) => return Err(error.into()),
            }
            self.unsent.pop_front();
        }
        Ok(())
    }

    async fn event(&mut self) -> (usize, Option<Heard>) {
        poll_fn(|context| {
            for (at, lane) in self.lanes.iter_mut().enumerate() {
                if let Some(generation) = &mut lane.generation
                    && let Poll::Ready(event) = generation.poll(context)
                {
                    return Poll::Ready((at, event));
                }
            }
            Poll::Pending
        })
        .await
    }

    fn handle(&mut self, at: usize, heard: Option<Heard>) -> Result<(), ApiError> {
        let event = match heard {
            Some(Heard::Event(event)) => Some(event),
            Some(Heard::Closed(end)) => return end.map(|_| ()),
            None => None,
        };
        match event {
            Some(Event::Started { kv }) => {
                self.started = true;
                if self.is_counted {
                    self.job.model.metrics.reused(kv.state);
                }
                self.reused.add(&kv);
                self.usage.cached_tokens = self.reused.cached_tokens.min(self.usage.prompt_tokens);
            }
            Some(Event::Prompt(scores)) => self.echo_scores(at, scores),
            Some(Event::Token { choice, token, score }) => self.drew(at, choice as usize, token, score),
            Some(Event::Finished { choice, reason }) => {
                if let Some(turn) = &self.turn {
                    turn.finished(reason);
                }
                self.finished(at, choice as usize, reason);
            }
            // Only what asks for a row hears of one.
            Some(Event::Pooled(_)) => {}
            Some(Event::Failed(error)) => return Err(error.into()),
            None => {
                self.lanes[at].generation = None;
                if self.lanes[at].choices.iter().any(|choice| !choice.ended()) {
                    return Err(ApiError::internal("the engine ended the request without a result"));
                }
            }
        }
        if self.lanes[at].generation.is_some() && self.lanes[at].choices.iter().all(ChoiceText::ended) {
            // Dropped, it is cancelled: it may not have heard of the stop string yet.
            if let Some(Source::Live(heard)) = self.lanes[at].generation.take() {
                self.end = Some(heard);
            }
        }
        if self.lanes[at].generation.is_none() { self.submit() } else { Ok(()) }
    }

    /// Takes a token that is new.
    fn drew(&mut self, at: usize, choice: usize, id: u32, score: Option<Score>) {
        let state = &mut self.lanes[at].choices[choice];
        if state.ended() {
            // Drawn before the engine heard of the stop string.
            return;
        }
        if self.is_counted {
            let metrics = &self.job.model.metrics;
            if !std::mem::replace(&mut self.first_token, true) {
                metrics.first_token.observe(self.job.time.arrived.elapsed());
            }
            if let Some(interval) = state.interval() {
                metrics.between_tokens.observe(interval);
            }
        }
        if let Some(turn) = &mut self.turn {
            turn.drew(id, score.as_ref());
        }
        self.token(at, choice, id, score);
    }

    fn token(&mut self, at: usize, choice: usize, id: u32, score: Option<Score>) {
        let lane = &mut self.lanes[at];
        let state = &mut lane.choices[choice];
        if state.ended() {
            return;
        }
        self.usage.completion_tokens += 1;
        self.usage.reasoning_tokens += usize::from(state.is_reasoning());
        let offset = state.offset();
        let grown = state.push(self.job.decoder(), &self.job.options, id);
        let drawn = state.generated();
        if self.turn.is_some() {
            self.answer.0.push_str(&grown.text);
            self.answer.1.extend(&grown.parts);
        }
        let token = TokenOut { id, origin: Origin::Generated, score, offset };
        let tokens = if self.job.reports_tokens() { vec![token] } else { Vec::new() };
        let choice_index = self.job.choice_index(at, choice);
        if !grown.parts.is_empty() || !tokens.is_empty() {
            let (choice, parts) = (choice_index, grown.parts);
            self.updates.push_back(Update::Delta { choice, parts, tokens, drawn });
        }
        if let Some(ending) = grown.ending {
            if let Some(Source::Engine(generation)) = &lane.generation {
                self.job.model.served.engine.stop(generation.id, choice as u32);
            }
            self.end((choice_index, drawn), Vec::new(), ending);
        }
    }

    fn finished(&mut self, at: usize, choice: usize, reason: FinishReason) {
        let state = &mut self.lanes[at].choices[choice];
        if state.ended() {
            return;
        }
        let grown = state.finish(self.job.decoder(), &self.job.options, reason);
        let place = (self.job.choice_index(at, choice), state.generated());
        if self.turn.is_some() {
            self.answer.0.push_str(&grown.text);
            self.answer.1.extend(&grown.parts);
        }
        self.end(place, grown.parts, grown.ending.expect("a finished choice has an ending"));
    }

    fn end(&mut self, (choice, drawn): (usize, usize), parts: Vec<Part>, ending: Ending) {
        if self.is_counted {
            self.job.model.metrics.finished(ending.outcome());
        }
        self.updates.push_back(Update::End { choice, parts, ending, drawn });
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
            let (parts, tokens) = (vec![Part::Text(text.clone())], tokens.clone());
            self.updates.push_back(Update::Delta { choice, parts, tokens, drawn: 0 });
        }
    }

    /// Cancels what runs.
    fn abort(&mut self) {
        self.unsent.clear();
        for lane in self.lanes.iter_mut().filter(|lane| lane.generation.is_some()) {
            lane.generation = None;
            let open = lane.choices.iter().filter(|choice| self.is_counted && !choice.ended());
            for _ in open {
                self.job.model.metrics.finished(Outcome::Abort);
            }
        }
    }
}

/// The end of a turn that runs elsewhere.
async fn closing_of(mut heard: UnboundedReceiver<Heard>) -> Result<Closing, ApiError> {
    while let Some(heard) = heard.recv().await {
        if let Heard::Closed(end) = heard {
            return *end;
        }
    }
    Err(ApiError::interrupted())
}

impl Source {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Heard>> {
        match self {
            Self::Engine(generation) => {
                generation.events.poll_recv(context).map(|event| event.map(Heard::Event))
            }
            Self::Live(heard) => heard.poll_recv(context),
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
        let choice = |choice: u32| {
            let parser = Parser::new(&job.output, choice as usize);
            ChoiceText::new(text.clone(), job.options.stop_strings.clone(), parser)
        };
        Self { generation: None, choices: (0..job.options.choices).map(choice).collect() }
    }
}
