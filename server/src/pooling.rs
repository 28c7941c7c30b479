//! From texts to rows: tokenizes them, hands them to the engine, and gathers what they become in their order.

use std::collections::VecDeque;
use std::sync::Arc;

use mainstay_engine::{Event, Generation, PoolRequest, RequestError};
use mainstay_models::graph::PooledKind;
use mainstay_models::tokenizer::Encoded;

use crate::error::ApiError;
use crate::job::TimeLimits;
use crate::openai::options::PromptInput;
use crate::prompt::off_thread;
use crate::registry::Model;

/// Texts of one request that the engine has at a time: enough to fill steps, and room is left in its queue for others.
const UNDER_WAY_MAX: usize = 64;

/// What is to be pooled.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Texts {
    /// Each by itself.
    Lone(Vec<PromptInput>),
    /// One text with each of others.
    Pairs { first: String, second: Vec<String> },
}

impl Texts {
    fn bytes(&self) -> usize {
        match self {
            Texts::Lone(inputs) => inputs
                .iter()
                .map(|input| if let PromptInput::Text(text) = input { text.len() } else { 0 })
                .sum(),
            Texts::Pairs { first, second } => {
                second.iter().map(String::len).sum::<usize>() + first.len() * second.len()
            }
        }
    }

    fn encode(self, model: &Model, most: Option<usize>) -> Result<Vec<Encoded>, ApiError> {
        let tokenizer = &model.served.tokenizer;
        let refused = |param: &'static str| move |error| ApiError::field(param, format!("{error}"));
        let one = |input| match input {
            PromptInput::Text(text) => tokenizer.encode_within(&text, None, most).map_err(refused("input")),
            PromptInput::Tokens(mut tokens) => {
                tokens.truncate(most.unwrap_or(usize::MAX));
                Ok(Encoded { tokens, second: None })
            }
        };
        match self {
            Texts::Lone(inputs) => inputs.into_iter().map(one).collect(),
            Texts::Pairs { first, second } => second
                .iter()
                .map(|second| {
                    tokenizer.encode_within(&first, Some(second), most).map_err(refused("documents"))
                })
                .collect(),
        }
    }
}

/// A request for rows.
pub(crate) struct PoolJob {
    pub(crate) model: Arc<Model>,
    pub(crate) tenant: Arc<str>,
    pub(crate) texts: Texts,
    /// Texts are cut to this many tokens; longer ones are refused where it is absent.
    pub(crate) truncate: Option<usize>,
    /// Whose turn it is: lower numbers go first.
    pub(crate) priority: i32,
    pub(crate) time: TimeLimits,
}

/// What became of them.
#[derive(Debug)]
pub(crate) struct Rows {
    /// One for each text, in order.
    pub(crate) rows: Vec<Vec<f32>>,
    /// Tokens of all texts.
    pub(crate) tokens: usize,
}

impl Rows {
    /// Bytes of all rows.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.iter().map(|row| row.len() * size_of::<f32>()).sum()
    }
}

impl PoolJob {
    /// The rows of all texts. Dropping the future cancels them.
    ///
    /// # Errors
    /// A text that does not fit, what the engine refuses, a device failure or a time limit.
    pub(crate) async fn run(self) -> Result<Rows, ApiError> {
        let (model, truncate) = (self.model.clone(), self.truncate);
        let param = match &self.texts {
            Texts::Lone(_) => "input",
            Texts::Pairs { .. } => "documents",
        };
        let texts = self.texts;
        let encoded = off_thread(texts.bytes(), move || texts.encode(&model, truncate)).await?;
        for (at, text) in encoded.iter().enumerate() {
            check(&self.model, &text.tokens, (param, at))?;
        }
        let tokens = encoded.iter().map(|text| text.tokens.len()).sum();
        let (model, tenant) = (&self.model, self.tenant);
        let pool = Pool { model, tenant, priority: self.priority, time: self.time };
        Ok(Rows { rows: pool.rows(encoded).await?, tokens })
    }
}

/// Checks that a text has tokens of the vocabulary and fits into the context.
fn check(model: &Model, tokens: &[u32], (param, at): (&'static str, usize)) -> Result<(), ApiError> {
    let (len, context, vocab) = (tokens.len(), model.served.context, model.served.vocab);
    if len == 0 {
        return Err(ApiError::field(param, format!("expected at least one token, found none at {at}")));
    }
    if len > context {
        let message = format!(
            "this model's context is {context} tokens, but the text at {at} has {len} (truncate_prompt_tokens cuts it)"
        );
        return Err(ApiError::context_length(message, param));
    }
    match tokens.iter().find(|id| **id as usize >= vocab) {
        Some(id) => {
            let message =
                format!("expected tokens below {vocab}, the model's vocabulary, found {id} at {at}");
            Err(ApiError::field(param, message))
        }
        None => Ok(()),
    }
}

struct Pool<'a> {
    model: &'a Model,
    tenant: Arc<str>,
    priority: i32,
    time: TimeLimits,
}

impl Pool<'_> {
    async fn rows(&self, texts: Vec<Encoded>) -> Result<Vec<Vec<f32>>, ApiError> {
        let mut rows = Vec::with_capacity(texts.len());
        let mut running: VecDeque<Generation> = VecDeque::new();
        let mut texts = texts.into_iter().peekable();
        loop {
            while running.len() < UNDER_WAY_MAX
                && let Some(text) = texts.peek()
            {
                let request = PoolRequest {
                    tenant: self.tenant.clone(),
                    tokens: text.tokens.clone(),
                    second: text.second,
                    priority: self.priority,
                    adapter: self.model.adapter.clone(),
                };
                match self.model.served.engine.pool(request) {
                    Ok(generation) => running.push_back(generation),
                    // The queue is full of this very job, or of others beside it: what is on its way makes room.
                    Err(RequestError::Busy { .. }) if !running.is_empty() => break,
                    Err(error) => return Err(error.into()),
                }
                texts.next();
            }
            let Some(generation) = running.pop_front() else { return Ok(rows) };
            rows.push(self.row(generation).await?);
        }
    }

    async fn row(&self, mut generation: Generation) -> Result<Vec<f32>, ApiError> {
        let mut started = false;
        loop {
            let event = generation.events.recv();
            let event = match self.time.deadline(started) {
                None => event.await,
                Some((at, error)) => tokio::time::timeout_at(at, event).await.map_err(|_| error)?,
            };
            match event {
                Some(Event::Started { .. }) => started = true,
                Some(Event::Pooled(row)) => return Ok(row),
                Some(Event::Failed(error)) => return Err(error.into()),
                Some(Event::Prompt(_) | Event::Token { .. } | Event::Finished { .. }) => {}
                None => return Err(ApiError::internal("the engine ended the request without a result")),
            }
        }
    }
}

impl Model {
    /// Width of its embeddings.
    ///
    /// # Errors
    /// 400 for a model that makes none.
    pub(crate) fn embedding_width(&self) -> Result<usize, ApiError> {
        match self.served.pooled {
            Some(pooled) if pooled.kind == PooledKind::Embedding => Ok(pooled.width),
            _ => Err(self.cannot("makes no embeddings")),
        }
    }

    /// Checks that it scores pairs of texts.
    ///
    /// # Errors
    /// 400 for a model that does not.
    pub(crate) fn check_scores(&self) -> Result<(), ApiError> {
        match self.served.pooled {
            Some(pooled) if pooled.kind == PooledKind::Score => Ok(()),
            _ => Err(self.cannot("scores no pairs of texts")),
        }
    }

    /// Checks that it generates text.
    ///
    /// # Errors
    /// 400 for a model that does not.
    pub(crate) fn check_generates(&self) -> Result<(), ApiError> {
        if self.served.generates { Ok(()) } else { Err(self.cannot("generates no text")) }
    }

    fn cannot(&self, what: &str) -> ApiError {
        let paths = self.tasks().map(|task| match task {
            "generate" => "/v1/chat/completions",
            "embed" => "/v1/embeddings",
            _ => "/v1/rerank",
        });
        let paths = paths.collect::<Vec<_>>().join(" and ");
        ApiError::field("model", format!("the model `{}` {what}; it serves {paths}", self.id))
    }

    /// What it is for: `generate`, `embed`, `rerank`.
    pub(crate) fn tasks(&self) -> impl Iterator<Item = &'static str> {
        let pooled = self.served.pooled.map(|pooled| pooled.task());
        self.served.generates.then_some("generate").into_iter().chain(pooled)
    }
}
