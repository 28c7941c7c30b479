//! The engine over a real store in a directory: what was computed once is read back after any kind of end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mainstay_backend_api::echo::{EchoExecutor, expected_run};
use mainstay_backend_api::{KvDType, Limits, Sampling};
use mainstay_engine::store::{Durability, Options, Store};
use mainstay_engine::{
    EngineOptions, Event, Generation, Handle, Keep, KvReport, KvState, ModelIdentity, Request, RestorePolicy,
    Reuse, SamplingRequest, StopRule,
};

const VOCAB: usize = 100;

struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("mainstay-engine-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn limits() -> Limits {
    Limits {
        context: 4096,
        tokens_per_step: 64,
        chunks: 8,
        output_rows: 8,
        pages: vec![300],
        kv_dtype: KvDType::F32,
    }
}

struct Engine {
    handle: Handle,
    store: Arc<Store>,
}

fn start(dir: &Path, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let store = Arc::new(Store::open_dir(dir, Options::default()).unwrap().0);
    let mut options = EngineOptions::new(limits(), 64, VOCAB);
    options.store = Some(Arc::clone(&store));
    change(&mut options);
    let handle = Handle::start(Box::new(EchoExecutor::new(VOCAB, limits())), options).unwrap();
    Engine { handle, store }
}

impl Engine {
    fn run(&self, prompt: &[u32], keep: Keep) -> (KvReport, Vec<u32>) {
        hear(self.handle.submit(request(prompt, keep)).unwrap())
    }

    fn settle(&self) -> bool {
        block_on(self.handle.settle(Duration::from_secs(20)))
    }

    fn end(self) -> Arc<Store> {
        self.handle.shutdown();
        block_on(self.handle.closed());
        drop(self.handle);
        self.store
    }

    /// Ends as after a signal.
    fn close(self) {
        Arc::into_inner(self.end()).expect("nobody else has the store").close().unwrap();
    }

    /// Ends as a killed process does.
    fn kill(self) {
        Arc::into_inner(self.end()).expect("nobody else has the store").kill();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(done) = future.as_mut().poll(&mut context) {
            return done;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn request(prompt: &[u32], keep: Keep) -> Request {
    Request {
        tenant: "t".into(),
        prompt: prompt.to_vec(),
        drawn: Vec::new(),
        choices: 1,
        sampling: SamplingRequest::greedy(),
        stop: StopRule { max_tokens: 8, ..StopRule::default() },
        logprobs: None,
        prompt_logprobs: None,
        keep,
        priority: 0,
        adapter: None,
        grammar: None,
    }
}

fn hear(mut generation: Generation) -> (KvReport, Vec<u32>) {
    let (mut report, mut tokens) = (None, Vec::new());
    while let Some(event) = generation.events.blocking_recv() {
        match event {
            Event::Started { kv } => report = Some(kv),
            Event::Token { token, .. } => tokens.push(token),
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
    (report.expect("it began"), tokens)
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + i / 5 + 7) % VOCAB as u32).collect()
}

/// The next turn of a conversation: what was said, and something new.
fn next(prompt: &[u32], answer: &[u32]) -> Vec<u32> {
    [prompt, answer, &[5, 6, 7]].concat()
}

fn expected(prompt: &[u32]) -> Vec<u32> {
    expected_run(VOCAB, prompt, 8, &Sampling::greedy())
}

#[test]
fn pages_survive_a_close_and_a_kill_at_rest() {
    for kills in [false, true] {
        let dir = Dir::new();
        let mut said = prompt(1000);
        for turn in 0..4 {
            let engine = start(&dir.0, |_| {});
            let (kv, answer) = engine.run(&said, Keep::default());
            assert_eq!(answer, expected(&said));
            if turn > 0 {
                // All but the new tokens and the last one drawn.
                let had = said.len() - 4;
                assert_eq!((kv.state, kv.restored_tokens, kv.cached_tokens), (KvState::Exact, had, had));
                assert!(kv.restore_ms > 0.0);
            }
            assert!(engine.settle());
            said = next(&said, &answer);
            if kills { engine.kill() } else { engine.close() }
        }
    }
}

#[test]
fn without_settling_a_close_loses_no_page() {
    let dir = Dir::new();
    let engine = start(&dir.0, |_| {});
    let said = prompt(3000);
    let (_, answer) = engine.run(&said, Keep::default());
    engine.close();
    let engine = start(&dir.0, |_| {});
    let (kv, _) = engine.run(&next(&said, &answer), Keep::default());
    assert_eq!(kv.restored_tokens, 3007);
    engine.close();
}

#[test]
fn what_else_makes_pages_cold_makes_them_cold() {
    let dir = Dir::new();
    let said = prompt(200);
    let engine = start(&dir.0, |_| {});
    engine.run(&said, Keep::default());
    engine.close();
    let parts = ["weights", "config", "tokenizer", "template", "probe"];
    for part in parts {
        let engine = start(&dir.0, |options| {
            let model = &mut options.model;
            *match part {
                "weights" => &mut model.weights,
                "config" => &mut model.config,
                "tokenizer" => &mut model.tokenizer,
                "template" => &mut model.template,
                _ => &mut model.probe,
            } = [1; 32];
        });
        let keep = Keep { durability: Durability::Ephemeral, ..Keep::default() };
        let (kv, answer) = engine.run(&said, keep);
        assert_eq!((kv.state, kv.cached_tokens), (KvState::Cold, 0), "{part}");
        assert_eq!(kv.reason, (part == "probe").then_some("numeric_class"), "{part}");
        assert_eq!(answer, expected(&said));
        engine.close();
    }
}

#[test]
fn another_class_is_used_when_asked_for_and_told_apart() {
    let dir = Dir::new();
    let said = prompt(200);
    let engine = start(&dir.0, |_| {});
    engine.run(&said, Keep::default());
    engine.close();
    let other =
        |options: &mut EngineOptions| options.model = ModelIdentity { probe: [1; 32], ..Default::default() };
    let engine = start(&dir.0, other);
    let equivalent = Keep { reuse: Reuse::Equivalent, ..Keep::default() };
    let (kv, answer) = engine.run(&next(&said, &expected(&said)), equivalent.clone());
    assert_eq!((kv.state, kv.restored_tokens), (KvState::Equivalent, 207));
    assert_eq!(answer, expected(&next(&said, &expected(&said))));
    // Nothing of that may pass for this class's own, in memory or on disk.
    assert!(engine.settle());
    let (kv, _) = engine.run(&said, Keep::default());
    assert_eq!((kv.state, kv.reason, kv.cached_tokens), (KvState::Cold, Some("numeric_class"), 0));
    engine.close();
}

#[test]
fn the_operator_may_forbid_reading_back() {
    let dir = Dir::new();
    let said = prompt(200);
    let engine = start(&dir.0, |_| {});
    engine.run(&said, Keep::default());
    engine.close();
    let engine = start(&dir.0, |options| options.restore = RestorePolicy::Never);
    let (kv, answer) = engine.run(&said, Keep::default());
    assert_eq!((kv.state, kv.reason, kv.cached_tokens), (KvState::Recomputed, Some("planner"), 0));
    assert_eq!(answer, expected(&said));
    assert_eq!(engine.handle.stats().restores_declined, 1);
    engine.close();
}

/// Flips a byte in the middle of every segment.
fn damage(dir: &Path) {
    let tenants = std::fs::read_dir(dir.join("seg")).unwrap();
    for segment in tenants.flat_map(|t| std::fs::read_dir(t.unwrap().path()).unwrap()) {
        let path = segment.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        // A segment's header, then records of a header and a payload block each: the payload of the fifth.
        bytes[4096 * 10 + 100] ^= 4;
        std::fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn a_damaged_page_costs_time_and_no_token() {
    let dir = Dir::new();
    let said = prompt(900);
    let engine = start(&dir.0, |_| {});
    engine.run(&said, Keep::default());
    engine.close();
    damage(&dir.0);
    let engine = start(&dir.0, |_| {});
    let (kv, answer) = engine.run(&said, Keep::default());
    assert_eq!(answer, expected(&said));
    assert_eq!((kv.state, kv.reason, kv.restored_tokens), (KvState::Exact, Some("damaged"), 4 * 32));
    assert!(engine.settle());
    engine.close();
    // What was computed in its place was stored.
    let engine = start(&dir.0, |_| {});
    assert_eq!(engine.run(&said, Keep::default()).0.restored_tokens, 28 * 32);
    engine.close();
}

#[test]
fn many_loads_and_cancels_at_once_end_well() {
    let dir = Dir::new();
    let engine = start(&dir.0, |_| {});
    let prompts: Vec<Vec<u32>> =
        (0..12).map(|i| [&[i][..], &prompt(600 + i as usize * 31)].concat()).collect();
    prompts.iter().for_each(|p| {
        engine.run(p, Keep::default());
    });
    engine.close();
    // Fewer pages than all of them need together: some are preempted, or wait.
    let engine = start(&dir.0, |_| {});
    let running: Vec<Generation> =
        prompts.iter().map(|p| engine.handle.submit(request(p, Keep::default())).unwrap()).collect();
    for (i, (generation, prompt)) in running.into_iter().zip(&prompts).enumerate() {
        if i % 3 == 1 {
            continue;
        }
        let (kv, answer) = hear(generation);
        assert_eq!(answer, expected(prompt));
        assert!(kv.restored_tokens >= 570, "{kv:?}");
    }
    assert!(engine.settle());
    assert_eq!(engine.handle.stats().pages_used, 0);
    engine.close();
}
