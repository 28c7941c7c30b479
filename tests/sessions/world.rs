//! An engine on the cpu backend over a store in a directory, and the turns of sessions on it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mainstay_backend_api::kv::Group;
use mainstay_backend_api::{Backend, Executor, KvDType, KvLayout, Limits, PAGE_TOKENS, pages_max};
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_engine::store::{
    Append, Durability, ExportPages, Kind, Options, PageHeader, PageName, SessionId, Settings, Store,
};
use mainstay_engine::{
    EngineOptions, Event, Handle, Keep, KvReport, ModelIdentity, Request, RestorePolicy, SamplingRequest,
    StopRule,
};
use mainstay_models::Model;

pub(crate) const TENANT: &str = "acme";

/// Wraps an executor: the controls that must fail are made so.
pub(crate) type Wrap = fn(Box<dyn Executor>) -> Box<dyn Executor>;

/// How a world computes: what must not change a bit.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) threads: usize,
    pub(crate) tokens_per_step: usize,
    /// Of each group that keeps all.
    pub(crate) pages: usize,
    pub(crate) kv_dtype: KvDType,
    pub(crate) wrap: Wrap,
}

/// What a turn gave: tokens, and the log-probability of every token of the vocabulary at each of them, as bits.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) scores: Vec<Vec<(u32, u32)>>,
}

/// A directory of one test, removed at its end.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("mainstay-sessions-{}-{count}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One engine over one store.
pub(crate) struct World {
    pub(crate) handle: Handle,
    pub(crate) store: Arc<Store>,
    vocab: usize,
    pub(crate) last: Option<KvReport>,
}

impl World {
    pub(crate) fn open(model: &Model, dir: &Scratch, shape: Shape) -> Self {
        let layout = KvLayout::of(&model.graph, shape.kv_dtype);
        let context = model.graph.context.min((shape.pages - 1) * PAGE_TOKENS);
        // A window has no room for more than one sequence needs.
        let pages = |group: &Group| match group.window {
            None => shape.pages,
            window => pages_max(window, context, shape.tokens_per_step) + 1,
        };
        let limits = Limits {
            context,
            tokens_per_step: shape.tokens_per_step,
            chunks: 16,
            output_rows: 16,
            pages: layout.groups.iter().map(pages).collect(),
            kv_dtype: shape.kv_dtype,
        };
        let backend = CpuBackend::new(CpuOptions { threads: Some(shape.threads), isa: None }).unwrap();
        let executor = backend.load(&model.graph, &model.weights, &limits).unwrap();
        let mut executor = (shape.wrap)(executor);
        let store = Arc::new(Store::open_dir(&dir.0, Options::default()).unwrap().0);
        let probe = mainstay_engine::probe(&mut *executor, &limits, model.graph.vocab).unwrap();
        let mut options = EngineOptions::new(limits, 64, model.graph.vocab);
        options.model = ModelIdentity { weights: model.weights.root(2), probe, ..ModelIdentity::default() };
        options.store = Some(Arc::clone(&store));
        options.restore = RestorePolicy::Always;
        let handle = Handle::start(executor, options).unwrap();
        Self { handle, store, vocab: model.graph.vocab, last: None }
    }

    pub(crate) fn create(&self) -> SessionId {
        let tenant = self.store.tenant(TENANT).unwrap().id;
        let root = self.handle.root(TENANT, (None, b""), 0).unwrap();
        let settings = Settings { root, durability: Durability::Async, ..Settings::default() };
        self.store.create(tenant, settings).unwrap().id
    }

    /// One turn: `new` tokens are sent, `count` drawn at temperature 1, and both appended.
    pub(crate) fn turn(&mut self, session: SessionId, new: &[u32], count: usize) -> Answer {
        let tenant = self.store.tenant(TENANT).unwrap().id;
        let mut prompt = self.store.tokens(tenant, session).unwrap();
        prompt.extend(new);
        let answer = self.generate(&prompt, count);
        let append = Append { tokens: [new, &answer.tokens].concat(), ..Append::default() };
        self.store.append_turn(tenant, session, append).unwrap();
        answer
    }

    pub(crate) fn generate(&mut self, prompt: &[u32], count: usize) -> Answer {
        let sampling = SamplingRequest { temperature: 1.0, seed: 7, ..SamplingRequest::greedy() };
        let request = Request {
            tenant: TENANT.into(),
            prompt: prompt.to_vec(),
            drawn: Vec::new(),
            choices: 1,
            sampling,
            stop: StopRule { max_tokens: count, ..StopRule::default() },
            logprobs: Some(self.vocab),
            prompt_logprobs: None,
            priority: 0,
            adapter: None,
            grammar: None,
            keep: Keep::default(),
        };
        let mut generation = self.handle.submit(request).unwrap();
        let mut answer = Answer::default();
        while let Some(event) = generation.events.blocking_recv() {
            match event {
                Event::Started { kv } => self.last = Some(kv),
                Event::Token { token, score, .. } => {
                    answer.tokens.push(token);
                    let top = score.expect("scores were asked for").top;
                    answer.scores.push(top.into_iter().map(|(t, p)| (t, p.to_bits())).collect());
                }
                Event::Failed(error) => panic!("{error}"),
                Event::Prompt(_) | Event::Pooled(_) | Event::Finished { .. } => {}
            }
        }
        assert!(block_on(self.handle.settle(Duration::from_secs(20))), "pages are written");
        answer
    }

    /// The payloads of all pages of a session, its tail included: the last token has none yet.
    pub(crate) fn pages(&self, session: SessionId) -> Vec<Vec<u8>> {
        let tenant = self.store.tenant(TENANT).unwrap();
        let mut tokens = self.store.tokens(tenant.id, session).unwrap();
        let export = self.export_pages(session);
        let mut parent = self.handle.root(TENANT, (None, b""), tokens.len()).unwrap().unwrap();
        tokens.pop();
        let mut payloads = Vec::new();
        for tokens in tokens.chunks(PAGE_TOKENS) {
            let key = tenant.chain.next(parent, tokens, &[]);
            for group in 0..export.groups {
                let kind = Kind::Attention;
                let name = PageName { tenant: tenant.id, key, class: export.class, group, kind };
                let header = PageHeader { name, content: export.content, parent, tokens: tokens.to_vec() };
                payloads.push(self.store.read(&header).map(|page| page.to_vec()).unwrap_or_default());
            }
            parent = key;
        }
        payloads
    }

    /// What of a session's pages goes along with it.
    pub(crate) fn export_pages(&self, session: SessionId) -> ExportPages {
        let tenant = self.store.tenant(TENANT).unwrap().id;
        self.handle.export_pages(self.store.tokens(tenant, session).unwrap().len())
    }

    fn end(self) -> Store {
        self.handle.shutdown();
        block_on(self.handle.closed());
        drop(self.handle);
        let until = Instant::now() + Duration::from_secs(20);
        let mut store = self.store;
        loop {
            store = match Arc::try_unwrap(store) {
                Ok(store) => return store,
                Err(shared) => shared,
            };
            assert!(Instant::now() < until, "somebody keeps the store");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn close(self) {
        self.end().close().unwrap();
    }

    /// Ends as a killed process does: what was not handed to the system is lost.
    pub(crate) fn kill(self) {
        self.end().kill();
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(done) = future.as_mut().poll(&mut context) {
            return done;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
