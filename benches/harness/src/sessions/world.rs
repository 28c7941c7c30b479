//! An engine over a store in a directory, and requests to it with the time of every token.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mainstay_backend_api::kv::Group;
use mainstay_backend_api::{
    Backend, CopyDone, Executor, KvDType, KvLayout, Limits, NumericClass, PAGE_TOKENS, PageRead, PageRef,
    Step, StepError, StepOutput, StoredPage, Ticket, oldest_page,
};
use mainstay_engine::store::aligned::BLOCK;
use mainstay_engine::store::{Append, Durability, Options, SessionId, Settings, Store, Tenant};
use mainstay_engine::{
    EngineOptions, Event, Handle, Keep, KvReport, ModelIdentity, Request, RestorePolicy, SamplingRequest,
    StopRule,
};
use mainstay_models::Weights;
use mainstay_models::graph::Graph;

use super::SessionsError;
use crate::noise;

pub(crate) const TENANT: &str = "bench";
/// How long pages may take to reach the system.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pages beside those of the longest sequence: for the tails of its forks.
const SPARE_PAGES: usize = 64;
/// Sequences at a time, at most.
const CHUNKS: usize = 4;

/// The model under measurement: weights are made or read once, and loaded for every world.
pub struct Subject<'a> {
    backend: &'a dyn Backend,
    graph: &'a Graph,
    weights: &'a Weights,
    kv_dtype: KvDType,
    tokens_per_step: usize,
    root: [u8; 32],
}

impl<'a> Subject<'a> {
    /// A model on a backend. Reads all weights once, on this many threads.
    pub fn new(
        backend: &'a dyn Backend,
        (graph, weights): (&'a Graph, &'a Weights),
        (kv_dtype, tokens_per_step): (KvDType, usize),
        threads: usize,
    ) -> Self {
        Self { backend, graph, weights, kv_dtype, tokens_per_step, root: weights.root(threads) }
    }

    /// Tokens that the model was made for.
    pub(crate) fn context(&self) -> usize {
        self.graph.context
    }

    /// Bytes of a page in all groups.
    pub(crate) fn page_bytes(&self) -> usize {
        KvLayout::of(self.graph, self.kv_dtype).groups.iter().map(|group| group.page_bytes()).sum()
    }

    /// Bytes of the largest page on disk, its header included.
    pub(crate) fn record_bytes(&self) -> usize {
        let groups = KvLayout::of(self.graph, self.kv_dtype).groups;
        let largest = groups.iter().map(|group| group.page_bytes()).max().unwrap_or(0);
        BLOCK + largest.next_multiple_of(BLOCK)
    }

    /// The windows of the groups of pages.
    pub(crate) fn windows(&self) -> Vec<Option<usize>> {
        KvLayout::of(self.graph, self.kv_dtype).windows()
    }

    /// Bytes of the pages that a sequence needs to go on after so many tokens.
    pub(crate) fn bytes_after(&self, tokens: usize) -> u64 {
        let bytes = |group: &Group| {
            let pages = tokens.div_ceil(PAGE_TOKENS) - oldest_page(group.window, tokens);
            (pages * group.page_bytes()) as u64
        };
        KvLayout::of(self.graph, self.kv_dtype).groups.iter().map(bytes).sum()
    }

    /// Made-up tokens; equal salts give equal tokens.
    pub(crate) fn tokens(&self, len: usize, salt: u64) -> Vec<u32> {
        let mut random = crate::shape::Random(salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        (0..len).map(|_| ((random.next() >> 33) % self.graph.vocab.max(1) as u64) as u32).collect()
    }

    fn limits(&self, tokens: usize) -> Limits {
        let groups = KvLayout::of(self.graph, self.kv_dtype).groups.len();
        Limits {
            context: self.graph.context.min(tokens.next_multiple_of(PAGE_TOKENS)),
            tokens_per_step: self.tokens_per_step.max(CHUNKS),
            chunks: CHUNKS,
            output_rows: CHUNKS,
            pages: vec![tokens.div_ceil(PAGE_TOKENS) + SPARE_PAGES; groups],
            kv_dtype: self.kv_dtype,
        }
    }
}

/// How long the engine's thread was held by page copies. An executor that copies beside it shows next to nothing here.
#[derive(Default)]
pub(crate) struct CopyTimes {
    to_device_us: AtomicU64,
    from_device_us: AtomicU64,
}

impl CopyTimes {
    /// Milliseconds of copies to the device, and from it, since the last call.
    pub(crate) fn take_ms(&self) -> (f64, f64) {
        let take = |us: &AtomicU64| us.swap(0, Ordering::Relaxed) as f64 / 1e3;
        (take(&self.to_device_us), take(&self.from_device_us))
    }
}

struct Timed {
    inner: Box<dyn Executor>,
    times: Arc<CopyTimes>,
}

fn add(counter: &AtomicU64, begun: Instant) {
    counter.fetch_add(begun.elapsed().as_micros() as u64, Ordering::Relaxed);
}

impl Executor for Timed {
    fn kv_layout(&self) -> &KvLayout {
        self.inner.kv_layout()
    }

    fn numeric_class(&self) -> NumericClass {
        self.inner.numeric_class()
    }

    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        self.inner.submit(step)
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), StepError> {
        self.inner.finish(out)
    }

    fn start_read(&mut self, pages: &[PageRead], ticket: Ticket) {
        let begun = Instant::now();
        self.inner.start_read(pages, ticket);
        add(&self.times.from_device_us, begun);
    }

    fn start_write(&mut self, pages: Vec<(PageRef, StoredPage)>, ticket: Ticket) {
        let begun = Instant::now();
        self.inner.start_write(pages, ticket);
        add(&self.times.to_device_us, begun);
    }

    fn poll(&mut self, done: &mut Vec<CopyDone>) {
        self.inner.poll(done);
    }
}

/// What a request gave.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    /// From the submission to each token.
    pub(crate) at: Vec<Duration>,
    pub(crate) kv: KvReport,
    /// Part of the processors' time that other programs took.
    pub(crate) foreign: Option<f64>,
}

impl Answer {
    /// From the submission to the first token, milliseconds.
    pub(crate) fn ttft_ms(&self) -> f64 {
        self.at.first().map_or(f64::NAN, |at| at.as_secs_f64() * 1e3)
    }
}

/// What a request asks for.
pub(crate) struct Ask<'a> {
    pub(crate) prompt: &'a [u32],
    pub(crate) count: usize,
    pub(crate) durability: Durability,
    /// Requests of different salts share no pages.
    pub(crate) salt: u64,
}

/// One engine over one store.
pub(crate) struct World {
    pub(crate) handle: Handle,
    pub(crate) store: Arc<Store>,
    pub(crate) tenant: Tenant,
    pub(crate) copies: Arc<CopyTimes>,
    /// To open the store, and to load the model.
    pub(crate) open_ms: f64,
    pub(crate) load_ms: f64,
}

impl World {
    /// Opens the store of a directory and starts an engine with room for a sequence of so many tokens.
    pub(crate) fn open(
        subject: &Subject<'_>,
        dir: &Path,
        tokens: usize,
        restore: RestorePolicy,
    ) -> Result<Self, SessionsError> {
        let begun = Instant::now();
        let (store, _) = Store::open_dir(dir, Options::default())?;
        let (store, open_ms) = (Arc::new(store), ms(begun));
        let begun = Instant::now();
        let limits = subject.limits(tokens);
        let inner = subject.backend.load(subject.graph, subject.weights, &limits)?;
        let copies = Arc::new(CopyTimes::default());
        let mut executor = Timed { inner, times: Arc::clone(&copies) };
        let probe = mainstay_engine::probe(&mut executor, &limits, subject.graph.vocab)?;
        let options = EngineOptions {
            model: ModelIdentity { weights: subject.root, probe, ..ModelIdentity::default() },
            store: Some(Arc::clone(&store)),
            restore,
            ..EngineOptions::new(limits, CHUNKS, subject.graph.vocab)
        };
        let handle = Handle::start(Box::new(executor), options)?;
        let tenant = store.tenant(TENANT)?;
        copies.take_ms();
        Ok(Self { handle, store, tenant, copies, open_ms, load_ms: ms(begun) })
    }

    /// A session without tokens.
    pub(crate) fn create(&self) -> Result<SessionId, SessionsError> {
        let root = self.handle.root(TENANT, (None, b""), 0)?;
        let settings = Settings { root, durability: Durability::Async, ..Settings::default() };
        Ok(self.store.create(self.tenant.id, settings)?.id)
    }

    /// The only session, and its tokens.
    pub(crate) fn session(&self) -> Result<(SessionId, Vec<u32>), SessionsError> {
        let found = self.store.list(self.tenant.id, None, usize::MAX);
        let id = found.last().ok_or_else(|| SessionsError::Broken("the session is gone".into()))?.id;
        Ok((id, self.store.tokens(self.tenant.id, id)?))
    }

    /// One turn of a session: `new` tokens are sent, `count` drawn, and both appended.
    pub(crate) fn turn(&self, id: SessionId, new: &[u32], count: usize) -> Result<Answer, SessionsError> {
        let mut prompt = self.store.tokens(self.tenant.id, id)?;
        prompt.extend(new);
        let ask = Ask { prompt: &prompt, count, durability: Durability::Async, salt: 0 };
        let answer = self.ask(&ask)?;
        let append = Append { tokens: [new, &answer.tokens].concat(), ..Append::default() };
        self.store.append_turn(self.tenant.id, id, append)?;
        Ok(answer)
    }

    /// Sends a request and waits for its end.
    pub(crate) fn ask(&self, ask: &Ask<'_>) -> Result<Answer, SessionsError> {
        let salt = if ask.salt == 0 { Vec::new() } else { ask.salt.to_le_bytes().to_vec() };
        let request = Request {
            tenant: TENANT.into(),
            prompt: ask.prompt.to_vec(),
            drawn: Vec::new(),
            choices: 1,
            // Draws at temperature 1 show a difference of logits that the most probable token may hide.
            sampling: SamplingRequest { temperature: 1.0, seed: 7, ..SamplingRequest::greedy() },
            stop: StopRule { max_tokens: ask.count, ..StopRule::default() },
            logprobs: None,
            prompt_logprobs: None,
            keep: Keep { salt, durability: ask.durability, ..Keep::default() },
            priority: 0,
            adapter: None,
            grammar: None,
        };
        let (before, begun) = (noise::ticks(), Instant::now());
        let mut generation = self.handle.submit(request)?;
        let (mut tokens, mut at, mut began) = (Vec::new(), Vec::new(), None);
        while let Some(event) = generation.events.blocking_recv() {
            match event {
                Event::Started { kv } => began = Some(kv),
                Event::Token { token, .. } => {
                    at.push(begun.elapsed());
                    tokens.push(token);
                }
                Event::Failed(error) => return Err(error.into()),
                Event::Prompt(_) | Event::Pooled(_) | Event::Finished { .. } => {}
            }
        }
        let foreign = noise::foreign(before, noise::ticks());
        let kv = began.ok_or_else(|| SessionsError::Broken("a request ended before it began".into()))?;
        if tokens.len() != ask.count {
            let what = format!("expected {} tokens, found {}", ask.count, tokens.len());
            return Err(SessionsError::Broken(what));
        }
        Ok(Answer { tokens, at, kv, foreign })
    }

    /// Waits until all pages are with the system.
    pub(crate) fn settle(&self) -> Result<(), SessionsError> {
        let settled = block_on(self.handle.settle(PATIENCE))?;
        let late = || SessionsError::Broken("pages were not written in time".into());
        settled.then_some(()).ok_or_else(late)
    }

    /// Bytes of pages written since the store was opened, headers included.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.store.page_counts().written_bytes.load(Ordering::Relaxed)
    }

    /// Ends the engine, then the store.
    pub(crate) fn close(self) -> Result<(), SessionsError> {
        self.handle.shutdown();
        block_on(self.handle.closed())?;
        drop(self.handle);
        let until = Instant::now() + PATIENCE;
        let mut store = self.store;
        loop {
            store = match Arc::try_unwrap(store) {
                Ok(store) => return Ok(store.close()?),
                Err(_) if Instant::now() > until => {
                    return Err(SessionsError::Broken("somebody keeps the store".into()));
                }
                Err(shared) => shared,
            };
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().build()?.block_on(future))
}

pub(crate) fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}
