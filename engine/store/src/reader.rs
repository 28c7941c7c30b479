//! Threads that read pages while the engine does something else.

use std::{
    sync::{
        Arc, Mutex, Weak,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    error::Miss,
    pages::{Page, lock},
    record::PageHeader,
    store::Inner,
};

type Done = Box<dyn FnOnce(Vec<Result<Page, Miss>>) + Send>;

/// How often overdue reads are looked for.
const TICK: Duration = Duration::from_millis(10);

struct Job {
    wanted: Vec<PageHeader>,
    until_ms: u64,
    /// Taken by whoever answers first: the thread that read, or the one that watches the time.
    done: Mutex<Option<Done>>,
}

impl Job {
    fn answer(&self, pages: Vec<Result<Page, Miss>>) {
        let done = lock(&self.done).take();
        if let Some(done) = done {
            done(pages);
        }
    }

    fn is_late(&self, inner: &Inner) -> bool {
        inner.clock.monotonic_ms() > self.until_ms
    }

    fn answer_late(&self) {
        self.answer(self.wanted.iter().map(|_| Err(Miss::Late)).collect());
    }
}

/// The threads; dropping them waits for what they read.
pub(crate) struct Readers {
    inner: Arc<Inner>,
    jobs: Option<Sender<Arc<Job>>>,
    open: Arc<Mutex<Vec<Weak<Job>>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    pub(crate) fn start(inner: &Arc<Inner>) -> Self {
        let (jobs, queue) = mpsc::channel::<Arc<Job>>();
        let queue = Arc::new(Mutex::new(queue));
        let (alive, ended) = mpsc::channel::<()>();
        let mut threads = Vec::new();
        for _ in 0..inner.pages.options.reader_threads.max(1) {
            let (inner, queue, alive) = (inner.clone(), queue.clone(), alive.clone());
            threads.push(spawn("store-read", move || {
                loop {
                    let job = lock(&queue).recv();
                    let Ok(job) = job else { break };
                    job.answer(read_in_order(&inner, &job.wanted, job.until_ms));
                }
                drop(alive);
            }));
        }
        drop(alive);
        let open: Arc<Mutex<Vec<Weak<Job>>>> = Arc::default();
        let (watched, inner_too) = (open.clone(), inner.clone());
        threads.push(spawn("store-late", move || {
            // A disk that hangs holds the threads that read; it must not hold those who wait for them.
            while ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                let jobs: Vec<_> = {
                    let mut open = lock(&watched);
                    open.retain(|job| job.strong_count() > 0);
                    open.iter().filter_map(Weak::upgrade).collect()
                };
                jobs.iter().filter(|job| job.is_late(&inner_too)).for_each(|job| job.answer_late());
            }
        }));
        Self { inner: inner.clone(), jobs: Some(jobs), open, threads }
    }

    pub(crate) fn start_job(&self, wanted: Vec<PageHeader>, patience: Duration, done: Done) {
        let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        let until_ms = self.inner.clock.monotonic_ms().saturating_add(patience_ms);
        let job = Arc::new(Job { wanted, until_ms, done: Mutex::new(Some(done)) });
        lock(&self.open).push(Arc::downgrade(&job));
        let jobs = self.jobs.as_ref().expect("present until dropped");
        if let Err(mpsc::SendError(job)) = jobs.send(job) {
            job.answer_late();
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    let named = std::thread::Builder::new().name(name.to_owned());
    named.spawn(run).expect("the system has a thread for the store")
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic of a thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// Reads until the first miss or the deadline; the rest is the same miss.
pub(crate) fn read_in_order(inner: &Inner, wanted: &[PageHeader], until_ms: u64) -> Vec<Result<Page, Miss>> {
    let mut results: Vec<Result<Page, Miss>> = Vec::with_capacity(wanted.len());
    for header in wanted {
        let result = match results.last() {
            Some(Err(miss)) => Err(miss.clone()),
            _ if inner.clock.monotonic_ms() > until_ms => Err(Miss::Late),
            _ => inner.pages.read(header),
        };
        results.push(result);
    }
    results
}
