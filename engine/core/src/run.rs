//! The engine's thread: takes messages in, drives the executor step by step, sends events out.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstay_backend_api::{AdapterId, Executor, Step, StepOutput};
use mainstay_models::{AdapterWeights, LoadError};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::oneshot;

use crate::copies::Copies;
use crate::drafter::Drafter;
use crate::mask::{MaskThreads, Masked};
use crate::planner::Planner;
use crate::pool::KvPool;
use crate::scheduler::Scheduler;
use crate::sequence::{Sequence, SequenceId};
use crate::stats::Counters;
use crate::tier::{Loaded, Tier};
use crate::{Event, RequestError};

/// What the engine is told.
pub(crate) enum Message {
    /// Queue this.
    Submit(Box<Sequence>),
    /// End this choice.
    Stop(SequenceId),
    /// Pages came from the store.
    Loaded(Loaded),
    /// A mask was computed.
    Masked(Masked),
    /// Tell when the pages of what has finished are with the system; `false` if that takes longer.
    Flush(Duration, oneshot::Sender<bool>),
    /// Bring an adapter to the device, and tell when it is there.
    LoadAdapter(AdapterId, Box<AdapterWeights>, oneshot::Sender<Result<(), LoadError>>),
    /// Nobody has this adapter any more.
    DropAdapter(AdapterId),
    /// Finish what was accepted, then end.
    Shutdown,
}

/// Everything that the thread owns, all by value: nothing here is shared but the counters.
pub(crate) struct Engine {
    pub(crate) executor: Box<dyn Executor>,
    pub(crate) scheduler: Scheduler,
    pub(crate) pool: KvPool,
    pub(crate) inbox: UnboundedReceiver<Message>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) planner: Planner,
    pub(crate) copies: Copies,
    /// A smaller model that guesses, until its device fails.
    pub(crate) drafter: Option<Drafter>,
    pub(crate) masks: MaskThreads,
    /// Until when the next step is put off for masks.
    pub(crate) put_off: Option<Instant>,
    /// The store, if there is one.
    pub(crate) tier: Option<Tier>,
}

/// For masks, the next step is put off by this part of the time that the last one took, at most: without it, a
/// choice under a grammar would sit out every other step.
const MASK_SHARE: u32 = 8;

/// How often it is looked whether they have come.
const MASK_PAUSE: Duration = Duration::from_micros(20);

/// How often an asynchronous device is asked for its copies while there is nothing to compute.
const POLL_PAUSE: Duration = Duration::from_micros(100);

/// Ends the process if the engine panics: its books can no longer be trusted, and whoever waits for an event would
/// wait forever.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "the engine panicked (see above); the process ends");
            std::process::abort();
        }
    }
}

impl Engine {
    /// Runs until shutdown, or until nobody is left to send a message.
    pub(crate) fn run(mut self) {
        let _guard = AbortOnPanic;
        let (mut step, mut out) = (Step::default(), StepOutput::default());
        let mut open = true;
        self.report();
        // Nothing can be computed before something arrives.
        let mut stalled = true;
        while self.receive(&mut open, stalled) {
            self.take_copies();
            self.guess();
            self.scheduler.plan(&mut self.pool, &mut step, &mut self.planner);
            self.begin_copies();
            self.report();
            stalled = step.chunks.is_empty();
            if !stalled {
                self.compute(&step, &mut out);
                self.ask_masks();
                self.report();
                self.begin_copies();
            }
        }
        self.end_copies();
        drop((self.tier, self.executor));
        // Requests that were on their way when the end was decided; later ones find the inbox closed.
        self.inbox.close();
        while let Some(message) = self.inbox.blocking_recv() {
            if let Message::Submit(sequence) = message {
                let _ = sequence.submission.events.send(Event::Failed(RequestError::Shutdown));
            }
        }
    }

    /// Has the smaller model guess, if there is one.
    fn guess(&mut self) {
        let Some(drafter) = &mut self.drafter else { return };
        let wanted = self.scheduler.wants();
        if wanted.is_empty() {
            return;
        }
        let begun = Instant::now();
        match drafter.guess(&wanted) {
            Ok(guesses) => {
                let count = guesses.iter().map(|(_, draft)| draft.len()).sum();
                drop(wanted);
                if let Some(pace) = &mut self.scheduler.pace {
                    pace.has_guessed(count, begun.elapsed());
                }
                self.scheduler.offer(guesses);
            }
            // Requests do without.
            Err(_) => self.drafter = None,
        }
    }

    fn compute(&mut self, step: &Step, out: &mut StepOutput) {
        let begun = Instant::now();
        match self.executor.submit(step).and_then(|()| self.executor.finish(out)) {
            Ok(()) => {
                let rows = (out.tokens.len(), step.outputs.len());
                assert!(rows.0 == rows.1, "the executor returned {} output rows of {}", rows.0, rows.1);
                let took = begun.elapsed();
                self.put_off = Some(Instant::now() + took / MASK_SHARE);
                self.planner.has_computed(step.tokens.len(), took);
                if let Some(pace) = &mut self.scheduler.pace {
                    pace.has_computed(step.tokens.len(), took);
                }
                self.scheduler.commit(&mut self.pool, out);
            }
            Err(error) => self.scheduler.fail(&mut self.pool, &error),
        }
    }

    /// Takes all messages in, and waits for one if there is nothing else to do. `false` at the end.
    fn receive(&mut self, open: &mut bool, mut stalled: bool) -> bool {
        loop {
            let message = match self.inbox.try_recv() {
                Ok(message) => message,
                Err(TryRecvError::Empty) if !stalled && self.is_put_off() => {
                    std::thread::sleep(MASK_PAUSE);
                    continue;
                }
                Err(TryRecvError::Empty) if !self.scheduler.is_idle() && !stalled => return true,
                Err(TryRecvError::Empty) if self.copies.is_busy() => {
                    std::thread::sleep(POLL_PAUSE);
                    return true;
                }
                Err(TryRecvError::Empty) if *open || self.scheduler.is_waiting() => {
                    match self.inbox.blocking_recv() {
                        Some(message) => message,
                        None => return false,
                    }
                }
                Err(_) => return !self.scheduler.is_idle(),
            };
            stalled = false;
            match message {
                Message::Submit(sequence) => {
                    self.scheduler.submit(*sequence);
                    self.ask_masks();
                }
                Message::Stop(id) => {
                    self.scheduler.stop(id, &mut self.pool);
                    self.begin_copies();
                    self.report();
                }
                Message::Loaded(loaded) => self.loaded(loaded),
                Message::Masked(masked) => {
                    self.scheduler.masked(masked, &mut self.pool);
                    self.begin_copies();
                    self.report();
                }
                Message::Flush(patience, reply) => self.flush(patience, reply),
                Message::LoadAdapter(id, weights, reply) => {
                    let loaded = self.executor.set_adapter(id, Some(&weights));
                    if let Err(Ok(())) = reply.send(loaded) {
                        // Whoever asked has left, so that nobody can name it.
                        let _ = self.executor.set_adapter(id, None);
                    }
                }
                Message::DropAdapter(id) => {
                    // To let go of what is there needs nothing that may lack.
                    let _ = self.executor.set_adapter(id, None);
                }
                Message::Shutdown => *open = false,
            }
        }
    }

    /// Whether a mask that is due soon is worth a moment.
    fn is_put_off(&self) -> bool {
        self.scheduler.is_masking() && self.put_off.is_some_and(|until| Instant::now() < until)
    }

    /// Has the masks computed that the scheduler asked for.
    fn ask_masks(&mut self) {
        for ask in self.scheduler.asks.drain(..) {
            self.masks.ask(ask);
        }
    }

    /// Counters first: who hears that a request has finished finds it counted.
    fn report(&mut self) {
        self.counters.store(&self.scheduler.stats(&self.pool));
        self.scheduler.send_events();
    }
}
