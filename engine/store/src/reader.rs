//! Threads that read pages while the engine does something else.

use std::{
    sync::{
        Arc, Mutex,
        mpsc::{self, Sender},
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

struct Job {
    wanted: Vec<PageHeader>,
    until_ms: u64,
    done: Done,
}

/// The threads; dropping them waits for what they read.
pub(crate) struct Readers {
    inner: Arc<Inner>,
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    pub(crate) fn start(inner: &Arc<Inner>) -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let thread = |_| {
            let (inner, queue) = (inner.clone(), queue.clone());
            let named = std::thread::Builder::new().name("store-read".to_owned());
            let run = move || {
                loop {
                    let job = lock(&queue).recv();
                    let Ok(job) = job else { return };
                    (job.done)(read_in_order(&inner, &job.wanted, job.until_ms));
                }
            };
            named.spawn(run).expect("the system has a thread for the store")
        };
        let threads = (0..inner.pages.options.reader_threads.max(1)).map(thread).collect();
        Self { inner: inner.clone(), jobs: Some(jobs), threads }
    }

    pub(crate) fn start_job(&self, wanted: Vec<PageHeader>, patience: Duration, done: Done) {
        let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        let until_ms = self.inner.clock.monotonic_ms().saturating_add(patience_ms);
        let jobs = self.jobs.as_ref().expect("present until dropped");
        if let Err(mpsc::SendError(job)) = jobs.send(Job { wanted, until_ms, done }) {
            let late = job.wanted.iter().map(|_| Err(Miss::Late)).collect();
            (job.done)(late);
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
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
