//! Sequences that become one row, through the handle, over the echo backend: with pages as a decoder has them, and
//! without as an encoder.

use std::sync::mpsc::channel;

use mainstay_backend_api::echo::{EchoExecutor, POOLED_WIDTH, expected_row, expected_run};
use mainstay_backend_api::{KvDType, Limits, Sampling};
use mainstay_engine::{
    EngineOptions, Event, Generation, Handle, Keep, PoolRequest, Request, RequestError, SamplingRequest,
    StopRule,
};

const VOCAB: usize = 100;

fn limits(pages: &[usize]) -> Limits {
    Limits {
        context: 200,
        tokens_per_step: 256,
        chunks: 8,
        output_rows: 8,
        pages: pages.to_vec(),
        kv_dtype: KvDType::F32,
    }
}

fn start(limits: Limits, waiting: usize) -> Handle {
    let mut options = EngineOptions::new(limits.clone(), waiting, VOCAB);
    options.pooled_width = Some(POOLED_WIDTH);
    Handle::start(Box::new(EchoExecutor::new(VOCAB, limits)), options).unwrap()
}

fn text(len: usize, salt: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + salt) % VOCAB as u32).collect()
}

fn wanted(tokens: &[u32], second: Option<usize>) -> PoolRequest {
    PoolRequest { tenant: "t".into(), tokens: tokens.to_vec(), second, priority: 0, adapter: None }
}

fn generation(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        tenant: "t".into(),
        prompt: prompt.to_vec(),
        choices: 1,
        sampling: SamplingRequest::greedy(),
        stop: StopRule { max_tokens, ..StopRule::default() },
        logprobs: None,
        prompt_logprobs: None,
        drawn: Vec::new(),
        keep: Keep::default(),
        priority: 0,
        adapter: None,
        grammar: None,
    }
}

/// All that was heard but the start and the end, which must be there.
fn heard(mut generation: Generation) -> Vec<Event> {
    let mut events: Vec<Event> = std::iter::from_fn(|| generation.events.blocking_recv()).collect();
    assert!(matches!(events.first(), Some(Event::Started { .. })), "{events:?}");
    assert!(matches!(events.last(), Some(Event::Finished { choice: 0, .. })), "{events:?}");
    events.drain(1..events.len() - 1).collect()
}

fn row(generation: Generation) -> Vec<f32> {
    match &heard(generation)[..] {
        [Event::Pooled(row)] => row.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn texts_of_all_lengths_become_their_rows_with_pages_and_without() {
    for pages in [&[][..], &[65], &[65, 65]] {
        let handle = start(limits(pages), 64);
        let texts: Vec<(Vec<u32>, Option<usize>)> = (0..40)
            .map(|i| (text(1 + i * 5 % 199, i as u32), (i % 3 == 0).then_some(i)))
            .chain([(text(200, 7), None)])
            .collect();
        let under_way: Vec<Generation> =
            texts.iter().map(|(tokens, second)| handle.pool(wanted(tokens, *second)).unwrap()).collect();
        for (generation, (tokens, second)) in under_way.into_iter().zip(&texts) {
            assert_eq!(row(generation), expected_row(tokens, *second), "{} tokens, {pages:?}", tokens.len());
        }
        let stats = handle.stats();
        assert_eq!((stats.running, stats.waiting, stats.pages_used), (0, 0, 0));
    }
}

#[test]
fn a_decoder_makes_rows_beside_what_it_generates() {
    let handle = start(Limits { tokens_per_step: 32, ..limits(&[65]) }, 64);
    let generations: Vec<Generation> =
        (0..5).map(|i| handle.submit(generation(&text(30, i), 40)).unwrap()).collect();
    let rows: Vec<Generation> =
        (0..8).map(|i| handle.pool(wanted(&text(150, i % 4), None)).unwrap()).collect();
    for (i, rows) in (0..).zip(rows) {
        assert_eq!(row(rows), expected_row(&text(150, i % 4), None));
    }
    for (i, generation) in (0..).zip(generations) {
        let tokens: Vec<u32> = heard(generation)
            .iter()
            .map(|event| if let Event::Token { token, .. } = event { *token } else { panic!("{event:?}") })
            .collect();
        assert_eq!(tokens, expected_run(VOCAB, &text(30, i), 40, &Sampling::greedy()));
    }
    assert!(handle.stats().cached_tokens > 0, "the second four rows find the pages of the first");
}

#[test]
fn what_a_model_is_not_for_is_refused() {
    let encoder = start(limits(&[]), 4);
    let refused = encoder.submit(generation(&[1, 2], 3)).err().unwrap();
    assert!(refused.to_string().contains("model: expected a model that generates text"), "{refused}");
    let options = EngineOptions::new(limits(&[65]), 4, VOCAB);
    let decoder = Handle::start(Box::new(EchoExecutor::new(VOCAB, limits(&[65]))), options).unwrap();
    let refused = decoder.pool(wanted(&[1, 2], None)).err().unwrap();
    assert!(refused.to_string().contains("model: expected a model that makes embeddings"), "{refused}");
}

#[test]
fn a_text_fits_whole_or_is_refused() {
    // Without pages a step bounds the context; with them the context does.
    for (pages, most) in [(&[][..], 64), (&[65], 200)] {
        let handle = start(Limits { tokens_per_step: 64, ..limits(pages) }, 4);
        assert_eq!(handle.limits().context, most);
        assert_eq!(
            row(handle.pool(wanted(&text(most, 0), None)).unwrap()),
            expected_row(&text(most, 0), None)
        );
        let refused = handle.pool(wanted(&text(most + 1, 0), None)).err().unwrap();
        assert_eq!(refused, RequestError::ContextLength { prompt: most + 1, context: most });
        assert!(matches!(handle.pool(wanted(&[], None)), Err(RequestError::Invalid { field: "prompt", .. })));
    }
}

#[test]
fn a_dropped_request_is_never_computed_and_a_full_queue_is_busy() {
    let (gate, steps) = channel();
    let limits = limits(&[]);
    let mut options = EngineOptions::new(limits.clone(), 3, VOCAB);
    options.pooled_width = Some(POOLED_WIDTH);
    let executor = EchoExecutor::new(VOCAB, limits).gated(steps);
    let handle = Handle::start(Box::new(executor), options).unwrap();
    let first = handle.pool(wanted(&text(150, 0), None)).unwrap();
    while handle.stats().running == 0 {
        std::thread::yield_now();
    }
    let mut waiting: Vec<Generation> =
        (1..4).map(|i| handle.pool(wanted(&text(150, i), None)).unwrap()).collect();
    let refused = handle.pool(wanted(&[1], None)).err();
    assert_eq!(refused, Some(RequestError::Busy { waiting: 3 }));
    waiting.remove(1);
    drop(gate);
    assert_eq!(row(first), expected_row(&text(150, 0), None));
    for (generation, salt) in waiting.into_iter().zip([1, 3]) {
        assert_eq!(row(generation), expected_row(&text(150, salt), None));
    }
    // Each text takes a step of its own: the dropped one took none.
    assert_eq!((handle.stats().steps, handle.stats().prompt_tokens), (3, 450));
}
