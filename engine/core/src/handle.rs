//! The engine seen from outside its thread: a cloneable handle that sends requests and reads counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mainstay_backend_api::{Executor, Limits, NumericClass, PAGE_TOKENS};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, TryAcquireError};

use crate::key::{Identity, KeyChain};
use crate::pool::KvPool;
use crate::request::Bounds;
use crate::run::{Engine, Message};
use crate::scheduler::{Scheduler, slots_max};
use crate::sequence::{Sequence, SequenceId, Submission};
use crate::stats::Counters;
use crate::{Event, Request, RequestError, Stats};

/// What the operator decided.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The limits that the executor was loaded with.
    pub limits: Limits,
    /// Sequences (choices) that may wait to be started; one more is refused with [`RequestError::Busy`].
    pub waiting: usize,
    /// Token ids of the model lie below this.
    pub vocab: usize,
}

/// Names a request inside its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Starts engines and talks to them. When the last handle is gone, the engine finishes what it has and ends.
#[derive(Clone)]
pub struct Handle {
    /// Not bounded itself, since no stop may be lost: requests are bounded by seats, stops by what was accepted.
    inbox: UnboundedSender<Message>,
    shared: Arc<Shared>,
}

struct Shared {
    /// One permit per sequence that may wait to be started; closed by shutdown.
    seats: Arc<Semaphore>,
    seat_count: usize,
    next_id: AtomicU64,
    counters: Arc<Counters>,
    limits: Arc<Limits>,
    bounds: Bounds,
    class: NumericClass,
    identity: Identity,
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
        let limits = usable(options.limits)?;
        let (sender, inbox) = unbounded_channel();
        let seat_count = options.waiting.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        let counters = Arc::new(Counters::default());
        let class = executor.numeric_class();
        let shared = Arc::new(Shared {
            seats: Arc::new(Semaphore::new(seat_count)),
            seat_count,
            next_id: AtomicU64::new(0),
            counters: Arc::clone(&counters),
            bounds: Bounds {
                context: limits.context,
                vocab: options.vocab,
                choices: slots_max(&limits).min(seat_count),
            },
            identity: Identity::of(executor.kv_layout(), &class),
            limits: Arc::new(limits.clone()),
            class,
        });
        let pool = KvPool::new(&limits.pages);
        let engine = Engine { executor, scheduler: Scheduler::new(limits), pool, inbox, counters };
        std::thread::Builder::new().name("engine".to_owned()).spawn(|| engine.run())?;
        Ok(Self { inbox: sender, shared })
    }

    /// Checks and queues a request; never blocks.
    ///
    /// # Errors
    /// [`RequestError::ContextLength`], [`RequestError::Invalid`], [`RequestError::Busy`], [`RequestError::Shutdown`].
    pub fn submit(&self, mut request: Request) -> Result<Generation, RequestError> {
        let shared = &*self.shared;
        request.check(&shared.bounds)?;
        let seats = Arc::clone(&shared.seats).try_acquire_many_owned(request.choices);
        let seat = seats.map_err(|error| match error {
            TryAcquireError::NoPermits => RequestError::Busy { waiting: shared.seat_count },
            TryAcquireError::Closed => RequestError::Shutdown,
        })?;
        // Such tokens cannot be drawn; without them, the executor need not look out for them.
        request.stop.tokens.retain(|&token| (token as usize) < shared.bounds.vocab);
        let id = RequestId(shared.next_id.fetch_add(1, Ordering::Relaxed));
        let prompt = std::mem::take(&mut request.prompt);
        let (sender, events) = unbounded_channel();
        let submission = Submission {
            prompt_len: prompt.len(),
            chain: KeyChain::new(&request.tenant, &shared.identity),
            request,
            events: sender,
        };
        let sequence = Sequence::new(id, Arc::new(submission), prompt, seat);
        let sent = self.inbox.send(Message::Submit(Box::new(sequence)));
        sent.map_err(|_| RequestError::Shutdown)?;
        Ok(Generation { id, events })
    }

    /// Ends one choice of a request, as if it had met its stop rule (a stop string was found in its text). Tokens
    /// drawn in the meantime may still be reported before [`Event::Finished`]. A choice that has drawn nothing yet
    /// is let alone.
    pub fn stop(&self, id: RequestId, choice: u32) {
        // An engine that has ended has stopped everything.
        let _ = self.inbox.send(Message::Stop(SequenceId { request: id, choice }));
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
        let _ = self.inbox.send(Message::Shutdown);
    }

    /// Waits until the thread has let go of the executor.
    pub async fn closed(&self) {
        self.inbox.closed().await;
    }

    /// Whether the thread is alive and takes requests.
    pub fn is_ready(&self) -> bool {
        !self.shared.seats.is_closed() && !self.inbox.is_closed()
    }
}

/// Lowers the context to what the pages hold, so that every sequence that is accepted fits alone.
fn usable(mut limits: Limits) -> std::io::Result<Limits> {
    let pages = limits.pages.iter().map(|n| n.saturating_sub(1)).min().unwrap_or(0);
    limits.context = limits.context.min(pages * PAGE_TOKENS);
    if limits.context == 0 || slots_max(&limits) == 0 {
        let what = format!("the limits leave no room for a token: {limits:?}");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what));
    }
    Ok(limits)
}
