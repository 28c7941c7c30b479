//! The engine seen from outside its thread: a cloneable handle that sends requests and reads counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use mainstay_backend_api::{Executor, Invariance, Limits, NumericClass, PAGE_TOKENS, pages_max};
use mainstay_store::{
    BundlePages, Durability, ExportPages, KeyChain, PageKey, Store, StoreError, Tenant, TenantId,
    TenantSecret,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, TryAcquireError, oneshot};

use crate::chain::Chain;
use crate::copies::Copies;
use crate::draft::{DraftPolicy, Pace};
use crate::drafter::Drafter;
use crate::identity::{Identity, ModelIdentity};
use crate::mask::MaskThreads;
use crate::planner::{Planner, RestorePolicy};
use crate::pool::KvPool;
use crate::request::{Bounds, Goal, PoolRequest};
use crate::run::{Engine, Message};
use crate::scheduler::{Scheduler, TierUse, slots_max};
use crate::sequence::{Sequence, SequenceId, Submission};
use crate::stats::Counters;
use crate::tier::Tier;
use crate::{Adapter, Event, Keep, Request, RequestError, Stats};

/// What the operator decided.
#[derive(Clone)]
pub struct EngineOptions {
    /// The limits that the executor was loaded with.
    pub limits: Limits,
    /// Sequences (choices) that may wait to be started; one more is refused with [`RequestError::Busy`].
    pub waiting: usize,
    /// Token ids of the model lie below this.
    pub vocab: usize,
    /// Width of the row that a sequence can become (`Graph::pooled`).
    pub pooled_width: Option<usize>,
    /// What of the model decides the bytes of its pages.
    pub model: ModelIdentity,
    /// Where pages and sessions outlive the process.
    pub store: Option<Arc<Store>>,
    /// Whether stored pages are read back.
    pub restore: RestorePolicy,
    /// Whether tokens are guessed ahead.
    pub draft: DraftPolicy,
}

impl EngineOptions {
    /// An engine without a store.
    pub fn new(limits: Limits, waiting: usize, vocab: usize) -> Self {
        Self {
            limits,
            waiting,
            vocab,
            pooled_width: None,
            model: ModelIdentity::default(),
            store: None,
            restore: RestorePolicy::default(),
            draft: DraftPolicy::default(),
        }
    }
}

/// Names a request inside its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Starts engines and talks to them. When the last handle is gone, the engine finishes what it has and ends.
#[derive(Clone)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    /// Not bounded itself, since no stop may be lost: requests are bounded by seats, stops by what was accepted.
    pub(crate) inbox: UnboundedSender<Message>,
    /// One permit per sequence that may wait to be started; closed by shutdown.
    seats: Arc<Semaphore>,
    seat_count: usize,
    next_id: AtomicU64,
    pub(crate) next_adapter: AtomicU32,
    counters: Arc<Counters>,
    limits: Arc<Limits>,
    bounds: Bounds,
    class: NumericClass,
    identity: Identity,
    windows: Vec<Option<usize>>,
    store: Option<Arc<Store>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The engine's own threads hold senders too, so that it would not see that nobody is left.
        let _ = self.inbox.send(Message::Shutdown);
    }
}

/// A request under way. Dropping it cancels the request and frees its pages.
pub struct Generation {
    /// The request's id.
    pub id: RequestId,
    /// What happens to it.
    pub events: UnboundedReceiver<Event>,
}

impl Handle {
    /// Starts the engine's thread, which owns the executor from now on. A panic in it aborts the process.
    ///
    /// # Errors
    /// If the system gives no thread, or the limits leave no room for a single token.
    pub fn start(executor: Box<dyn Executor>, options: EngineOptions) -> std::io::Result<Self> {
        Self::start_with(executor, None, options)
    }

    /// The same, with a smaller model of the same vocabulary, and the limits it was loaded with, that guesses what the
    /// executor draws. It changes no token, and is not asked where that would not be faster.
    ///
    /// # Errors
    /// As [`Handle::start`].
    pub fn start_with(
        executor: Box<dyn Executor>,
        draft: Option<(Box<dyn Executor>, Limits)>,
        options: EngineOptions,
    ) -> std::io::Result<Self> {
        let limits = usable(options.limits, &executor.kv_layout().windows())?;
        let (sender, inbox) = unbounded_channel();
        let seat_count = options.waiting.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        let counters = Arc::new(Counters::default());
        let (class, layout) = (executor.numeric_class(), executor.kv_layout());
        let page_bytes = layout.groups.iter().map(|group| group.page_bytes()).collect();
        let planner = Planner::new(options.restore, page_bytes);
        let tier = options.store.clone().map(|store| Tier::start(store, sender.downgrade())).transpose()?;
        let uses = TierUse { spills: tier.is_some(), is_invariant: class.invariance == Invariance::Full };
        let masks = MaskThreads::new(sender.clone());
        let shared = Arc::new(Shared {
            inbox: sender,
            seats: Arc::new(Semaphore::new(seat_count)),
            seat_count,
            next_id: AtomicU64::new(0),
            next_adapter: AtomicU32::new(0),
            counters: Arc::clone(&counters),
            bounds: Bounds {
                context: limits.context,
                vocab: options.vocab,
                choices: slots_max(&limits).min(seat_count),
                generates: !limits.pages.is_empty(),
                pools: options.pooled_width.is_some(),
            },
            identity: Identity::of(&options.model, layout, &class),
            windows: layout.windows(),
            store: options.store,
            limits: Arc::new(limits.clone()),
            class,
        });
        let pool = KvPool::new(&limits.pages, &shared.windows);
        let (mut scheduler, copies) = (Scheduler::new(limits, uses), Copies::default());
        let guesses = options.draft == DraftPolicy::Auto && uses.is_invariant;
        scheduler.pace = guesses.then(Pace::default);
        let engine = Engine {
            executor,
            scheduler,
            pool,
            inbox,
            counters,
            planner,
            copies,
            drafter: draft.map(|(executor, limits)| Drafter::new(executor, limits)),
            masks,
            put_off: None,
            tier,
        };
        std::thread::Builder::new().name("engine".to_owned()).spawn(|| engine.run())?;
        Ok(Self { shared })
    }

    /// Checks and queues a request; never blocks.
    ///
    /// # Errors
    /// [`RequestError::ContextLength`], [`RequestError::Invalid`], [`RequestError::Busy`], [`RequestError::Shutdown`].
    pub fn submit(&self, request: Request) -> Result<Generation, RequestError> {
        self.queue(request, Goal::Tokens)
    }

    /// As [`Handle::submit`], for a sequence that is to become one row: [`Event::Pooled`].
    ///
    /// # Errors
    /// As [`Handle::submit`].
    pub fn pool(&self, request: PoolRequest) -> Result<Generation, RequestError> {
        let (request, goal) = request.into_parts();
        self.queue(request, goal)
    }

    fn queue(&self, mut request: Request, goal: Goal) -> Result<Generation, RequestError> {
        let shared = &*self.shared;
        request.check(goal, &shared.bounds)?;
        let is_here = request.adapter.as_ref().is_none_or(|adapter| adapter.is_of(&shared.inbox));
        assert!(is_here, "a request names {:?}, which another engine has", request.adapter);
        let seats = Arc::clone(&shared.seats).try_acquire_many_owned(request.choices);
        let seat = seats.map_err(|error| match error {
            TryAcquireError::NoPermits => RequestError::Busy { waiting: shared.seat_count },
            TryAcquireError::Closed => RequestError::Shutdown,
        })?;
        // Such tokens cannot be drawn; without them, the executor need not look out for them.
        request.stop.tokens.retain(|&token| (token as usize) < shared.bounds.vocab);
        let id = RequestId(shared.next_id.fetch_add(1, Ordering::Relaxed));
        let mut tokens = std::mem::take(&mut request.prompt);
        let prompt_len = tokens.len();
        tokens.append(&mut request.drawn);
        let (tenant, store) = self.tenant(&request.tenant);
        let keep = &request.keep;
        let chain = Chain::new(tenant, &shared.identity, (request.adapter.as_ref(), &keep.salt));
        let stored = match store {
            Some(store) => chain.look_up(store, &shared.windows, &tokens, keep.reuse),
            None => (chain.nothing(), Vec::new()),
        };
        if store.is_none() {
            // Its pages have names that only this process knows.
            request.keep.durability = Durability::Ephemeral;
        }
        let (sender, events) = unbounded_channel();
        let submission = Submission { prompt_len, chain, request, goal, events: sender };
        let sequence = Sequence::new(id, Arc::new(submission), tokens, seat, stored);
        let sent = shared.inbox.send(Message::Submit(Box::new(sequence)));
        sent.map_err(|_| RequestError::Shutdown)?;
        Ok(Generation { id, events })
    }

    /// Whose keys name the pages of a request, and the store if it knows them.
    fn tenant(&self, name: &str) -> (Tenant, Option<&Store>) {
        let store = self.shared.store.as_deref();
        match store.map(|store| store.tenant(name)) {
            Some(Ok(tenant)) => (tenant, store),
            // A store that fails makes pages cold and is no reason to fail.
            Some(Err(_)) | None => {
                let secret = TenantSecret(blake3::derive_key("mainstay tenant 1", name.as_bytes()));
                (Tenant { id: TenantId::of(name), chain: KeyChain::new(secret) }, None)
            }
        }
    }

    /// The store that it was started with.
    pub fn store(&self) -> Option<&Arc<Store>> {
        self.shared.store.as_ref()
    }

    /// What decides the bytes of its pages.
    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// Where the chain of page keys of a tenant's session of this many tokens begins.
    ///
    /// # Errors
    /// [`StoreError`] where the tenant is not to be had.
    pub fn root(
        &self,
        tenant: &str,
        (adapter, salt): (Option<&Adapter>, &[u8]),
        len: usize,
    ) -> Result<Option<PageKey>, StoreError> {
        let Some(store) = &self.shared.store else { return Ok(None) };
        let chain = Chain::new(store.tenant(tenant)?, &self.shared.identity, (adapter, salt));
        Ok(Some(chain.root(self.shared.identity.rope_table(len))))
    }

    /// How many of these tokens, from the first on, have stored pages that a request of this engine would use, with what
    /// `keep` says and under this adapter; where there are none, why, if that is known.
    pub fn stored_len(
        &self,
        tenant: &str,
        (keep, adapter): (&Keep, Option<&Adapter>),
        tokens: &[u32],
    ) -> (usize, Option<&'static str>) {
        let (tenant, Some(store)) = self.tenant(tenant) else { return (0, None) };
        let chain = Chain::new(tenant, &self.shared.identity, (adapter, &keep.salt));
        let (stored, _) = chain.look_up(store, &self.shared.windows, tokens, keep.reuse);
        (stored.tokens(), stored.lack)
    }

    /// Which pages an export of a session of this model and of this many tokens takes along.
    pub fn export_pages(&self, len: usize) -> ExportPages {
        let identity = &self.shared.identity;
        ExportPages {
            content: identity.contents[identity.rope_table(len)],
            class: identity.class,
            groups: u16::try_from(self.shared.windows.len()).unwrap_or(u16::MAX),
        }
    }

    /// How an import for this model takes pages.
    ///
    /// # Errors
    /// [`StoreError`] where the tenant is not to be had.
    pub fn import_pages(&self, tenant: &str, adapter: Option<&Adapter>) -> Result<BundlePages, StoreError> {
        let Some(store) = &self.shared.store else { return Ok(BundlePages::Refuse) };
        let identity = &self.shared.identity;
        let chain = Chain::new(store.tenant(tenant)?, identity, (adapter, b""));
        let chains = [0, 1].map(|table| (identity.contents[table], chain.root(table)));
        Ok(BundlePages::Accept { chains })
    }

    /// Waits until the pages of all requests that have finished are with the system, where a killed process leaves
    /// them; `false` after `patience`.
    pub async fn settle(&self, patience: Duration) -> bool {
        if self.shared.store.is_none() {
            return true;
        }
        let (reply, settled) = oneshot::channel();
        if self.shared.inbox.send(Message::Flush(patience, reply)).is_err() {
            return false;
        }
        settled.await.unwrap_or(false)
    }

    /// Ends one choice of a request, as if it had met its stop rule (a stop string was found in its text). Tokens
    /// drawn in the meantime may still be reported before [`Event::Finished`]. A choice that has drawn nothing yet
    /// is let alone.
    pub fn stop(&self, id: RequestId, choice: u32) {
        // An engine that has ended has stopped everything.
        let _ = self.shared.inbox.send(Message::Stop(SequenceId { request: id, choice }));
    }

    /// The counters as of the last step; requests still on their way count as waiting.
    pub fn stats(&self) -> Stats {
        let stats = self.shared.counters.load();
        let seated = self.shared.seat_count - self.shared.seats.available_permits();
        Stats { waiting: stats.waiting.max(seated), ..stats }
    }

    /// The limits it was started with; the context is lowered to what the pages hold.
    pub fn limits(&self) -> Arc<Limits> {
        Arc::clone(&self.shared.limits)
    }

    /// The most choices that a request may have.
    pub fn choices_max(&self) -> usize {
        self.shared.bounds.choices
    }

    /// What decides the bits of its results.
    pub fn numeric_class(&self) -> NumericClass {
        self.shared.class.clone()
    }

    /// Refuses new requests from now on, lets those accepted finish, then ends the thread. Returns at once; see
    /// [`Handle::closed`]. Dropping the generations that remain ends it sooner.
    pub fn shutdown(&self) {
        self.shared.seats.close();
        // Sent in vain only to an engine that has ended.
        let _ = self.shared.inbox.send(Message::Shutdown);
    }

    /// Waits until the thread has let go of the executor.
    pub async fn closed(&self) {
        self.shared.inbox.closed().await;
    }

    /// Whether the thread is alive and takes requests.
    pub fn is_ready(&self) -> bool {
        !self.shared.seats.is_closed() && !self.shared.inbox.is_closed()
    }
}

/// Lowers the context to what the pages hold, or, of a model that keeps nothing, to what a step holds, so that every
/// sequence that is accepted fits alone.
fn usable(mut limits: Limits, windows: &[Option<usize>]) -> std::io::Result<Limits> {
    let holds = limits.pages.iter().zip(windows).map(|(&pages, &window)| {
        let pages = pages.saturating_sub(1);
        let is_enough = pages_max(window, limits.context, limits.tokens_per_step) <= pages;
        if is_enough { limits.context } else { pages * PAGE_TOKENS }
    });
    limits.context = limits.context.min(holds.min().unwrap_or(limits.tokens_per_step));
    if limits.context == 0 || slots_max(&limits) == 0 {
        let what = format!("the limits leave no room for a token: {limits:?}");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what));
    }
    Ok(limits)
}
