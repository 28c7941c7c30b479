//! The store as the engine's thread sees it: messages out, messages back; looking up and waiting happen elsewhere.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mainstay_backend_api::{PageBytes, PageDigest, StoredPage};
use mainstay_store::{Handed, Miss, PageHeader, Store};
use tokio::sync::mpsc::WeakUnboundedSender;
use tokio::sync::oneshot;

use crate::run::Message;
use crate::sequence::LoadId;

/// How long pages may take to be read before they are computed instead.
const READ_PATIENCE: Duration = Duration::from_secs(5);
/// How long a page of level `full` waits for room.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes that may be on their way to the store's own queue.
const QUEUE_BYTES_MAX: usize = 128 << 20;

/// A page to be written.
pub(crate) struct PageOut {
    pub(crate) header: PageHeader,
    pub(crate) bytes: PageBytes,
    pub(crate) digest: PageDigest,
    /// It may not be left out for lack of room.
    pub(crate) must: bool,
}

enum Job {
    Write(Box<PageOut>),
    /// Tell when all before is with the system; `false` if that takes longer.
    Flush(Duration, oneshot::Sender<bool>),
}

/// Pages that were asked for, in order, up to the first that is not to be had.
pub(crate) struct Loaded {
    pub(crate) load: LoadId,
    /// Which batch of the load.
    pub(crate) batch: usize,
    pub(crate) pages: Vec<StoredPage>,
    pub(crate) miss: Option<Miss>,
}

/// Talks to one store. Dropping it waits until everything handed over has reached the store's queue.
pub(crate) struct Tier {
    store: Arc<Store>,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    queued_bytes: Arc<AtomicUsize>,
    inbox: WeakUnboundedSender<Message>,
}

impl Tier {
    /// Starts the thread that hands pages over: looking up what the store has takes a lock of its index.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(crate) fn start(store: Arc<Store>, inbox: WeakUnboundedSender<Message>) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let thread = {
            let (store, queued) = (Arc::clone(&store), Arc::clone(&queued_bytes));
            let run = move || queue.iter().for_each(|job| do_job(&store, &queued, job));
            std::thread::Builder::new().name("engine-spill".to_owned()).spawn(run)?
        };
        Ok(Self { store, jobs: Some(jobs), thread: Some(thread), queued_bytes, inbox })
    }

    fn send(&self, job: Job) {
        let jobs = self.jobs.as_ref().expect("present until dropped");
        jobs.send(job).expect("the thread ends after the channel");
    }

    /// Hands a page over; `false` where it is left out. Only a page that must not be waits for room.
    pub(crate) fn write(&self, page: PageOut) -> bool {
        let bytes = page.bytes.len();
        let has_room = || self.queued_bytes.load(Ordering::Relaxed) + bytes <= QUEUE_BYTES_MAX;
        let until = Instant::now() + ROOM_PATIENCE;
        while page.must && !has_room() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        if !has_room() {
            return false;
        }
        self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.send(Job::Write(Box::new(page)));
        true
    }

    /// Answers when all pages handed over before are with the system.
    pub(crate) fn flush(&self, patience: Duration, reply: oneshot::Sender<bool>) {
        self.send(Job::Flush(patience, reply));
    }

    /// Begins to read a batch of a load; its pages come as a message. `false` where no message can come any more.
    pub(crate) fn read(&self, load: LoadId, batch: usize, headers: Vec<PageHeader>) -> bool {
        let Some(inbox) = self.inbox.upgrade() else { return false };
        self.store.start_read(headers, READ_PATIENCE, move |results| {
            let mut loaded = Loaded { load, batch, pages: Vec::with_capacity(results.len()), miss: None };
            for result in results {
                match result {
                    Ok(page) => loaded.pages.push(Box::new(page)),
                    Err(miss) => {
                        loaded.miss = Some(miss);
                        break;
                    }
                }
            }
            // An engine that has ended needs no pages.
            let _ = inbox.send(Message::Loaded(loaded));
        });
        true
    }
}

impl Drop for Tier {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn do_job(store: &Store, queued_bytes: &AtomicUsize, job: Job) {
    match job {
        Job::Write(page) => {
            let PageOut { header, bytes, digest, must } = *page;
            queued_bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
            let patience = if must { ROOM_PATIENCE } else { Duration::ZERO };
            // A page that is left out is counted by the store, and computed again when it is missed.
            let _: Handed = store.write_patiently(header, bytes, digest, patience);
        }
        Job::Flush(patience, reply) => {
            // Whoever asked may have gone.
            let _ = reply.send(store.wait_written(patience));
        }
    }
}

/// Why pages are computed although the store had them.
pub(crate) fn reason(miss: &Miss) -> &'static str {
    match miss {
        Miss::Absent | Miss::Collision => "absent",
        Miss::Damaged(_) => "damaged",
        Miss::Unreadable(_) => "unreadable",
        Miss::Late => "late",
    }
}
