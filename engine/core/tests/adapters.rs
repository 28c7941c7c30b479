//! Adapters through the engine's handle, over the echo backend: whose pages are whose, and when an adapter goes.

use std::collections::BTreeMap;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use mainstay_backend_api::echo::{EchoExecutor, adapter_shift, expected_run};
use mainstay_backend_api::{KvDType, Limits, Sampling};
use mainstay_engine::{
    Adapter, EngineOptions, Event, Generation, Handle, Keep, KvState, Request, SamplingRequest, StopRule,
};
use mainstay_models::AdapterWeights;

const VOCAB: usize = 97;

fn engine() -> Handle {
    let limits = Limits {
        context: 512,
        tokens_per_step: 64,
        chunks: 8,
        output_rows: 8,
        pages: vec![64],
        kv_dtype: KvDType::F32,
    };
    let executor = EchoExecutor::new(VOCAB, limits.clone());
    Handle::start(Box::new(executor), EngineOptions::new(limits, 16, VOCAB)).unwrap()
}

fn adapter(handle: &Handle, content: u8) -> Adapter {
    let loading = handle.load_adapter(AdapterWeights { parts: BTreeMap::new(), hash: [content; 32] });
    let (mut loading, mut context) = (pin!(loading), Context::from_waker(Waker::noop()));
    loop {
        if let Poll::Ready(loaded) = loading.as_mut().poll(&mut context) {
            return loaded.unwrap();
        }
        std::thread::yield_now();
    }
}

fn request(adapter: Option<&Adapter>, prompt: &[u32]) -> Request {
    Request {
        tenant: "t".into(),
        prompt: prompt.to_vec(),
        choices: 1,
        sampling: SamplingRequest::greedy(),
        stop: StopRule { max_tokens: 6, ..StopRule::default() },
        logprobs: None,
        prompt_logprobs: None,
        drawn: Vec::new(),
        keep: Keep::default(),
        priority: 0,
        adapter: adapter.cloned(),
        grammar: None,
    }
}

/// The tokens that were drawn, and how the request began.
fn read(mut generation: Generation) -> (Vec<u32>, KvState) {
    let (mut tokens, mut state) = (Vec::new(), KvState::Cold);
    while let Some(event) = generation.events.blocking_recv() {
        match event {
            Event::Started { kv } => state = kv.state,
            Event::Token { token, .. } => tokens.push(token),
            Event::Finished { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    (tokens, state)
}

/// What the fake draws under an adapter of this content: it writes shifted tokens, and reads them back.
fn wanted(content: Option<u8>, prompt: &[u32]) -> Vec<u32> {
    let shift = content.map_or(0, |content| adapter_shift(&[content; 32]));
    let mut tokens: Vec<u32> = prompt.iter().map(|token| token.wrapping_add(shift)).collect();
    let mut drawn = Vec::new();
    for _ in 0..6 {
        let next = expected_run(VOCAB, &tokens, 1, &Sampling::greedy())[0];
        drawn.push(next);
        tokens.push(next.wrapping_add(shift));
    }
    drawn
}

#[test]
fn requests_of_several_adapters_share_steps_and_no_pages() {
    let handle = engine();
    let (one, two, twin) = (adapter(&handle, 1), adapter(&handle, 2), adapter(&handle, 1));
    let prompt: Vec<u32> = (0..70).map(|i| i * i % VOCAB as u32).collect();
    let cases = [(None, None), (Some(&one), Some(1)), (Some(&two), Some(2))];
    let running: Vec<Generation> =
        cases.iter().map(|(adapter, _)| handle.submit(request(*adapter, &prompt)).unwrap()).collect();
    for (generation, (_, content)) in running.into_iter().zip(&cases) {
        assert_eq!(read(generation).0, wanted(*content, &prompt), "{content:?}");
    }
    // Each finds its own pages, and those of an adapter of equal content.
    for (adapter, content) in cases.into_iter().chain([(Some(&twin), Some(1))]) {
        let (tokens, state) = read(handle.submit(request(adapter, &prompt)).unwrap());
        assert_eq!((tokens, state), (wanted(content, &prompt), KvState::Exact), "{content:?}");
    }
    let three = adapter(&handle, 3);
    let (tokens, state) = read(handle.submit(request(Some(&three), &prompt)).unwrap());
    assert_eq!((tokens, state), (wanted(Some(3), &prompt), KvState::Cold));
}

#[test]
fn an_adapter_stays_until_its_last_request_has_ended() {
    let handle = engine();
    let prompt = [5, 6, 7];
    for content in 0..20 {
        let adapter = adapter(&handle, content);
        let running = handle.submit(request(Some(&adapter), &prompt)).unwrap();
        // The fake asserts that every chunk's adapter is there.
        drop(adapter);
        assert_eq!(read(running).0, wanted(Some(content), &prompt));
    }
}
