//! Keys and values of tokens without an answer: read where they are stored, else computed.

use std::sync::Arc;

use mainstay_engine::{Event, Keep, KvReport, Request, SamplingRequest, StopRule};

use crate::error::ApiError;
use crate::registry::Model;

/// Brings the pages of these tokens to the device, and to the store where `keep` says so. What was reused.
///
/// # Errors
/// What the engine refuses, or fails with.
pub(crate) async fn prefill(
    model: &Model,
    tenant: &Arc<str>,
    tokens: Vec<u32>,
    keep: Keep,
) -> Result<KvReport, ApiError> {
    let mut generation = model.served.engine.submit(Request {
        tenant: Arc::clone(tenant),
        prompt: tokens,
        drawn: Vec::new(),
        choices: 1,
        sampling: SamplingRequest::greedy(),
        stop: StopRule::default(),
        logprobs: None,
        prompt_logprobs: None,
        keep,
        priority: 0,
        adapter: model.adapter.clone(),
        grammar: None,
    })?;
    let mut report = None;
    while let Some(event) = generation.events.recv().await {
        match event {
            Event::Started { kv } => report = Some(kv),
            Event::Failed(error) => return Err(error.into()),
            Event::Finished { .. } => break,
            Event::Prompt(_) | Event::Pooled(_) | Event::Token { .. } => {}
        }
    }
    report.ok_or_else(|| ApiError::internal("the engine ended the request without a result"))
}
