//! The engine through its handle, over the echo backend.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::task::Poll;

use mainstay_backend_api::echo::{EchoExecutor, expected_run};
use mainstay_backend_api::{KvDType, Limits, Sampling};
use mainstay_engine::{
    EngineOptions, Event, FinishReason, Generation, Handle, Keep, KvReport, Request, RequestError,
    SamplingRequest, StopRule,
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
    Handle::start(Box::new(executor), EngineOptions::new(limits(), 16, VOCAB)).unwrap()
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
    assert!(matches!(events[0], Event::Started { kv: KvReport { cached_tokens: 0, .. } }));
    assert_eq!(tokens(&events, 0), expected_run(VOCAB, &prompt(100), 20, &Sampling::greedy()));
    assert!(matches!(events[21], Event::Finished { choice: 0, reason: FinishReason::Length }));
    assert_eq!(events.len(), 22);
    let stats = handle.stats();
    assert_eq!((stats.prompt_tokens, stats.generated_tokens, stats.pages_used), (100, 20, 0));
    assert_eq!((stats.running, stats.waiting, stats.pages_total, stats.pages_cached), (0, 0, 64, 3));
}

#[test]
fn every_choice_is_what_a_lone_request_draws() {
    let handle = start(echo());
    let mut wanted = request(&prompt(50), 30);
    wanted.choices = 5;
    wanted.sampling.temperature = 1.0;
    wanted.sampling.seed = 11;
    let events = all_events(handle.submit(wanted).unwrap());
    for choice in 0..5 {
        let sampling = Sampling { temperature: 1.0, seed: 11, choice, ..Sampling::greedy() };
        assert_eq!(
            tokens(&events, choice),
            expected_run(VOCAB, &prompt(50), 30, &sampling),
            "choice {choice}"
        );
    }
    assert_eq!(handle.stats().prompt_tokens, 50);
}

#[test]
fn many_requests_at_once_give_what_each_gives_alone() {
    let handle = start(echo());
    let submit = |i: u32| handle.submit(request(&prompt(20 + 9 * i as usize)[..], 40)).unwrap();
    let generations: Vec<Generation> = (0..16).map(submit).collect();
    for (i, generation) in generations.into_iter().enumerate() {
        let events = all_events(generation);
        assert_eq!(
            tokens(&events, 0),
            expected_run(VOCAB, &prompt(20 + 9 * i), 40, &Sampling::greedy()),
            "request {i}"
        );
    }
}

#[test]
fn a_prompt_alone_is_scored() {
    let handle = start(echo());
    let mut wanted = request(&prompt(70), 0);
    wanted.prompt_logprobs = Some(2);
    let events = all_events(handle.submit(wanted).unwrap());
    let [
        Event::Started { kv: KvReport { cached_tokens: 0, .. } },
        Event::Prompt(scores),
        Event::Finished { choice: 0, reason },
    ] = &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!((scores.len(), *reason), (69, FinishReason::Length));
    assert!(scores.iter().all(|s| s.top.len() == 2 && s.logprob <= s.top[0].1));
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let handle = start(echo());
    let field = |change: &dyn Fn(&mut Request)| {
        let mut wanted = request(&prompt(5), 5);
        change(&mut wanted);
        match handle.submit(wanted).map(|g| g.id) {
            Err(RequestError::Invalid { field, .. }) => field,
            other => panic!("expected a refusal, found {other:?}"),
        }
    };
    assert_eq!(field(&|r| r.prompt.clear()), "prompt");
    assert_eq!(field(&|r| r.prompt[2] = VOCAB as u32), "prompt");
    assert_eq!(field(&|r| r.choices = 0), "choices");
    assert_eq!(field(&|r| r.choices = 9), "choices");
    assert_eq!(field(&|r| r.sampling.temperature = -0.1), "temperature");
    assert_eq!(field(&|r| r.sampling.temperature = f32::NAN), "temperature");
    assert_eq!(field(&|r| r.sampling.top_p = 1.5), "top_p");
    assert_eq!(field(&|r| r.sampling.min_p = -1.0), "min_p");
    assert_eq!(field(&|r| r.sampling.repetition_penalty = 0.0), "repetition_penalty");
    assert_eq!(field(&|r| r.sampling.presence_penalty = f32::INFINITY), "presence_penalty");
    assert_eq!(field(&|r| r.sampling.frequency_penalty = f32::NAN), "frequency_penalty");
    assert_eq!(field(&|r| r.sampling.logit_bias = vec![(VOCAB as u32, 1.0)]), "logit_bias");
    assert_eq!(field(&|r| r.sampling.logit_bias = vec![(1, f32::INFINITY)]), "logit_bias");
    let all = |r: &mut Request| (r.stop.tokens, r.stop.min_tokens) = ((0..VOCAB as u32).collect(), 1);
    assert_eq!(field(&all), "min_tokens");
}

#[test]
fn a_prompt_must_leave_room_for_a_token() {
    let handle = start(echo());
    let refused = handle.submit(request(&prompt(512), 1)).map(|g| g.id);
    assert_eq!(refused, Err(RequestError::ContextLength { prompt: 512, context: 512 }));
    let events = all_events(handle.submit(request(&prompt(511), 9)).unwrap());
    assert_eq!(tokens(&events, 0).len(), 1);
    assert_eq!(all_events(handle.submit(request(&prompt(512), 0)).unwrap()).len(), 2);
}

#[test]
fn pages_bound_the_context() {
    let limits = Limits { pages: vec![4], ..limits() };
    let options = EngineOptions::new(limits.clone(), 4, VOCAB);
    let handle = Handle::start(Box::new(EchoExecutor::new(VOCAB, limits.clone())), options).unwrap();
    assert_eq!(handle.limits().context, 96);
    let refused = handle.submit(request(&prompt(96), 1)).map(|g| g.id);
    assert_eq!(refused, Err(RequestError::ContextLength { prompt: 96, context: 96 }));
    let none = EngineOptions::new(Limits { pages: vec![1], ..limits.clone() }, 4, VOCAB);
    assert!(Handle::start(Box::new(EchoExecutor::new(VOCAB, limits)), none).is_err());
}

/// Fills all slots of a gated engine, whose first step then waits at the gate.
fn fill(handle: &Handle) -> Generation {
    let mut filling = handle.submit(Request { choices: 8, ..request(&prompt(40), 100) }).unwrap();
    assert!(matches!(filling.events.blocking_recv(), Some(Event::Started { .. })));
    filling
}

#[test]
fn a_full_waiting_room_refuses_at_once() {
    let (handle, gate) = gated();
    let filling = fill(&handle);
    let waiting: Vec<Generation> = (0..16).map(|_| handle.submit(request(&prompt(9), 2)).unwrap()).collect();
    let busy = handle.submit(request(&prompt(9), 2)).map(|g| g.id);
    assert_eq!(busy, Err(RequestError::Busy { waiting: 16 }));
    assert_eq!(handle.stats().waiting, 16);
    drop(gate);
    assert!(all_events(filling).len() > 800);
    assert!(waiting.into_iter().all(|g| all_events(g).len() == 4));
    assert_eq!(handle.stats().waiting, 0);
    assert_eq!(all_events(handle.submit(request(&prompt(9), 2)).unwrap()).len(), 4);
}

#[test]
fn hanging_up_frees_what_runs_and_what_waits() {
    let (handle, gate) = gated();
    let filling = fill(&handle);
    let waiting = handle.submit(request(&prompt(9), 50)).unwrap();
    drop(waiting);
    drop(filling);
    drop(gate);
    let last = handle.submit(request(&prompt(10), 3)).unwrap();
    assert_eq!(all_events(last).len(), 5);
    let stats = handle.stats();
    assert_eq!((stats.running, stats.waiting, stats.pages_used), (0, 0, 0));
    assert_eq!(stats.prompt_tokens, 50, "the one that waited never started");
}

#[test]
fn a_choice_is_ended_from_outside() {
    let (handle, gate) = gated();
    let mut generation = handle.submit(request(&prompt(10), 400)).unwrap();
    gate.send(()).unwrap();
    assert!(matches!(generation.events.blocking_recv(), Some(Event::Started { .. })));
    assert!(matches!(generation.events.blocking_recv(), Some(Event::Token { .. })));
    handle.stop(generation.id, 0);
    handle.stop(generation.id, 3);
    drop(gate);
    let events = all_events(generation);
    assert!(matches!(events.last(), Some(Event::Finished { choice: 0, reason: FinishReason::Stopped })));
    assert!(events.len() <= 2, "one step was under way: {events:?}");
}

#[test]
fn a_failed_step_is_told_and_survived() {
    let handle = start(echo().failing_every(3));
    let events = all_events(handle.submit(request(&prompt(10), 50)).unwrap());
    assert_eq!(tokens(&events, 0).len(), 2);
    assert!(matches!(events.last(), Some(Event::Failed(RequestError::Device(_)))));
    let events = all_events(handle.submit(request(&prompt(10), 2)).unwrap());
    assert_eq!(tokens(&events, 0), expected_run(VOCAB, &prompt(10), 2, &Sampling::greedy()));
    assert!(handle.is_ready());
}

/// Runs a future to its end on this thread.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            return value;
        }
        std::thread::park();
    }
}

#[test]
fn shutdown_finishes_what_was_accepted() {
    let (handle, gate) = gated();
    let filling = fill(&handle);
    let waiting = handle.submit(request(&prompt(9), 2)).unwrap();
    assert!(handle.is_ready());
    handle.shutdown();
    assert!(!handle.is_ready());
    assert_eq!(handle.submit(request(&prompt(9), 2)).map(|g| g.id), Err(RequestError::Shutdown));
    drop(gate);
    assert_eq!(tokens(&all_events(filling), 7).len(), 100);
    assert_eq!(all_events(waiting).len(), 4);
    block_on(handle.closed());
    assert_eq!(handle.stats().pages_used, 0);
}

#[test]
fn an_idle_engine_shuts_down() {
    let handle = start(echo());
    handle.shutdown();
    block_on(handle.closed());
    handle.stop(mainstay_engine::RequestId(0), 0);
}

#[test]
fn an_engine_without_handles_finishes_what_it_has() {
    let (handle, gate) = gated();
    let generation = handle.submit(request(&prompt(9), 20)).unwrap();
    drop(handle);
    drop(gate);
    assert_eq!(tokens(&all_events(generation), 0).len(), 20);
}

#[test]
fn a_panic_of_the_engine_ends_the_process() {
    const CHILD: &str = "MAINSTAY_TEST_ENGINE_PANIC";
    if std::env::var_os(CHILD).is_some() {
        // An executor with smaller limits than the engine was told asserts.
        let executor = EchoExecutor::new(VOCAB, Limits { tokens_per_step: 4, ..limits() });
        let mut generation = start(executor).submit(request(&prompt(40), 1)).unwrap();
        while generation.events.blocking_recv().is_some() {}
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_panic_of_the_engine_ends_the_process", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the engine panicked"), "{said}");
}

#[test]
fn a_smaller_model_that_guesses_changes_no_token() {
    for draft in [echo(), echo().failing_every(7)] {
        let options = EngineOptions::new(limits(), 16, VOCAB);
        let handle =
            Handle::start_with(Box::new(echo()), Some((Box::new(draft), limits())), options).unwrap();
        let wanted: Vec<Request> = (0..6)
            .map(|i| {
                let mut wanted = request(&prompt(40 + i), 60);
                (wanted.sampling.temperature, wanted.sampling.seed) = (0.8, i as u64);
                wanted
            })
            .collect();
        let running: Vec<Generation> = wanted.iter().map(|w| handle.submit(w.clone()).unwrap()).collect();
        for (wanted, generation) in wanted.iter().zip(running) {
            let sampling = Sampling { temperature: 0.8, seed: wanted.sampling.seed, ..Sampling::greedy() };
            let expected = expected_run(VOCAB, &wanted.prompt, 60, &sampling);
            assert_eq!(tokens(&all_events(generation), 0), expected);
        }
        let stats = handle.stats();
        assert!(stats.draft_kept_tokens > 0 && stats.draft_kept_tokens <= stats.drafted_tokens, "{stats:?}");
    }
}
