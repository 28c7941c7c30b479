//! The engine through its handle, over the echo backend.

use std::sync::mpsc::{Sender, channel};

use mainstay_backend_api::echo::{EchoExecutor, expected_run};
use mainstay_backend_api::{KvDType, Limits, Sampling};
use mainstay_engine::{
    EngineOptions, Event, FinishReason, Generation, Handle, Request, RequestError, SamplingRequest, StopRule,
};

const VOCAB: usize = 100;

fn limits() -> Limits {
    Limits {
        context: 512,
        tokens_per_step: 48,
        chunks: 8,
        output_rows: 8,
        pages: vec![65],
        kv_dtype: KvDType::F32,
    }
}

fn echo() -> EchoExecutor {
    EchoExecutor::new(VOCAB, limits())
}

fn start(executor: EchoExecutor) -> Handle {
    Handle::start(Box::new(executor), EngineOptions { limits: limits(), waiting: 16, vocab: VOCAB }).unwrap()
}

/// An engine that makes a step for every message, and runs freely once the sender is dropped.
fn gated() -> (Handle, Sender<()>) {
    let (gate, steps) = channel();
    (start(echo().gated(steps)), gate)
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        tenant: "t".into(),
        prompt: prompt.to_vec(),
        choices: 1,
        sampling: SamplingRequest {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        },
        stop: StopRule { max_tokens, ..StopRule::default() },
        logprobs: None,
        prompt_logprobs: None,
    }
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + 7) % VOCAB as u32).collect()
}

fn all_events(mut generation: Generation) -> Vec<Event> {
    std::iter::from_fn(|| generation.events.blocking_recv()).collect()
}

fn tokens(events: &[Event], of: u32) -> Vec<u32> {
    let token = |e: &Event| match e {
        Event::Token { choice, token, .. } if *choice == of => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

#[test]
fn a_request_runs_from_start_to_finish() {
    let handle = start(echo());
    let events = all_events(handle.submit(request(&prompt(100), 20)).unwrap());
    assert!(matches!(events[0], Event::Started { cached_tokens: 0 }));
    assert_eq!(tokens(&events, 0), expected_run(VOCAB, &prompt(100), 20, &Sampling::greedy()));
    assert!(matches!(events[21], Event::Finished { choice: 0, reason: FinishReason::Length }));
    assert_eq!(events.len(), 22);
    let stats = handle.stats();
    assert_eq!((stats.prompt_tokens, stats.generated_tokens, stats.pages_used), (100, 20, 0));
    assert_eq!((stats.running, stats.waiting, stats.pages_total, stats.pages_cached), (0, 0, 64, 3));
}
