//! Batches: files of requests that are answered when there is room, however often the server is started in between.
//!
//! A batch has a directory: its record, its input (which it shares with the file that was uploaded), and the answers so
//! far. When it is over, only the record is left of it, and what it wrote are files.

mod input;
mod journal;
pub(crate) mod record;
mod run;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use self::record::{BatchRecord, Counts, Status};
pub(crate) use self::run::{Work, Worker};
use crate::files::{self, Files, durable};

/// Names in the directory of a batch.
const RECORD: &str = "batch.json";
const INPUT: &str = "input.jsonl";
const ANSWERS: &str = "answers";

/// The batches of all tenants. Cheap to clone; its calls wait for the disk.
#[derive(Clone)]
pub(crate) struct Batches {
    root: Arc<PathBuf>,
    files: Files,
    index: Arc<Mutex<Index>>,
    queue: UnboundedSender<Arc<Batch>>,
}

/// By the directory of its tenant and its id: ids are in the order of their making.
type Index = BTreeMap<(String, String), Arc<Batch>>;

/// Batches that are to be worked on, in order.
pub(crate) type Queue = UnboundedReceiver<Arc<Batch>>;

/// A batch, under way or over.
pub(crate) struct Batch {
    directory: PathBuf,
    record: Mutex<BatchRecord>,
    /// Held while the record is written, so that changes come one after another.
    writing: Mutex<()>,
    counts: Mutex<Counts>,
    cancelled: Notify,
}

/// What a client asks for.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) tenant: Arc<str>,
    pub(crate) endpoint: String,
    pub(crate) input_file_id: String,
    pub(crate) completion_window: String,
    pub(crate) window_s: u64,
    pub(crate) metadata: Option<serde_json::Map<String, Value>>,
    pub(crate) output_lifetime_s: Option<u64>,
}

impl Batches {
    /// Finds what is there; what was not over is queued. Removes what never came to be.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn open(root: PathBuf, files: Files) -> io::Result<(Self, Queue)> {
        durable::make_dir(&root)?;
        let (queue, queued) = unbounded_channel();
        let mut index = Index::new();
        for tenant in durable::entries(&root)?.into_iter().filter(|path| path.is_dir()) {
            for directory in durable::entries(&tenant)? {
                let Some(batch) = recover(&directory)? else { continue };
                let key = (files::name(&tenant), files::name(&directory));
                index.insert(key, Arc::new(batch));
            }
        }
        for batch in index.values().filter(|batch| !batch.record().status.is_over()) {
            // The other end is in hand.
            let _ = queue.send(Arc::clone(batch));
        }
        Ok((Self { root: Arc::new(root), files, index: Arc::new(Mutex::new(index)), queue }, queued))
    }

    /// Makes a batch of a file that exists.
    ///
    /// # Errors
    /// The disk's; `NotFound` where the file has gone.
    pub(crate) fn create(&self, order: Order) -> io::Result<Arc<Batch>> {
        let id = files::new_id("batch_");
        let tenant = files::directory_of(&order.tenant);
        let directory = self.root.join(&tenant).join(&id);
        durable::make_dir(&directory)?;
        let input = directory.join(INPUT);
        let uploaded = self.files.contents(&order.tenant, &order.input_file_id);
        // Some file systems have no links.
        let shared =
            std::fs::hard_link(&uploaded, &input).or_else(|_| std::fs::copy(&uploaded, &input).map(|_| ()));
        if let Err(error) = shared {
            std::fs::remove_dir_all(&directory)?;
            return Err(error);
        }
        let now = files::now_s();
        let record = BatchRecord {
            id: id.clone(),
            tenant: order.tenant.to_string(),
            endpoint: order.endpoint,
            input_file_id: order.input_file_id,
            completion_window: order.completion_window,
            metadata: order.metadata,
            output_lifetime_s: order.output_lifetime_s,
            status: Status::Validating,
            created_at: now,
            expires_at: now.saturating_add(order.window_s),
            reached: serde_json::Map::new(),
            total: 0,
            counts: Counts::default(),
            errors: Vec::new(),
            output_files: [files::new_id("file-"), files::new_id("file-")],
            has_files: [false, false],
        };
        durable::write_whole(&directory.join(RECORD), record.to_json().to_string().as_bytes())?;
        let batch = Arc::new(Batch::new(directory, record));
        self.index().insert((tenant, id), Arc::clone(&batch));
        // Nobody works any longer only where the server ends; the next one finds it.
        let _ = self.queue.send(Arc::clone(&batch));
        Ok(batch)
    }

    /// A tenant's batch.
    pub(crate) fn get(&self, tenant: &str, id: &str) -> Option<Arc<Batch>> {
        self.index().get(&(files::directory_of(tenant), id.to_owned())).cloned()
    }

    /// A tenant's batches, oldest first.
    pub(crate) fn list(&self, tenant: &str) -> Vec<Arc<Batch>> {
        let first = (files::directory_of(tenant), String::new());
        let index = self.index();
        let own = index.range(first.clone()..).take_while(|((tenant, _), _)| *tenant == first.0);
        own.map(|(_, batch)| Arc::clone(batch)).collect()
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Batch {
    fn new(directory: PathBuf, record: BatchRecord) -> Self {
        Self {
            directory,
            counts: Mutex::new(record.counts),
            record: Mutex::new(record),
            writing: Mutex::default(),
            cancelled: Notify::new(),
        }
    }

    pub(crate) fn record(&self) -> BatchRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// As the API shows it.
    pub(crate) fn object(&self) -> Value {
        self.record().object(self.counts())
    }

    fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_counts(&self, counts: Counts) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    /// Changes the record, on disk before anybody sees it.
    ///
    /// # Errors
    /// The disk's; then nothing is changed.
    fn change(&self, change: impl FnOnce(&mut BatchRecord)) -> io::Result<BatchRecord> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = self.record();
        change(&mut record);
        durable::write_whole(&self.directory.join(RECORD), record.to_json().to_string().as_bytes())?;
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&record);
        Ok(record)
    }

    /// Asks that no more of its lines be answered; `false` where it is too late for that.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn cancel(&self) -> io::Result<bool> {
        let record = self.change(|record| {
            if matches!(record.status, Status::Validating | Status::InProgress) {
                record.reach(Status::Cancelling, files::now_s());
            }
        })?;
        self.cancelled.notify_one();
        Ok(matches!(record.status, Status::Cancelling | Status::Cancelled))
    }

    fn input(&self) -> PathBuf {
        self.directory.join(INPUT)
    }

    fn answers(&self) -> PathBuf {
        self.directory.join(ANSWERS)
    }

    /// Removes what is of no use when it is over.
    fn tidy(&self) -> io::Result<()> {
        durable::remove(&self.input())?;
        durable::remove(&self.answers())
    }
}

/// The batch of a directory; one that never came to be is removed.
fn recover(directory: &Path) -> io::Result<Option<Batch>> {
    let path = directory.join(RECORD);
    durable::remove(&durable::temporary(&path))?;
    if !path.exists() {
        std::fs::remove_dir_all(directory)?;
        return Ok(None);
    }
    match BatchRecord::of_json(&std::fs::read(&path)?) {
        Ok(record) => {
            let batch = Batch::new(directory.to_owned(), record);
            if batch.record().status.is_over() {
                batch.tidy()?;
            }
            Ok(Some(batch))
        }
        // It may be a newer version's: what is not understood is let alone.
        Err(what) => {
            tracing::warn!(path = %path.display(), what, "a batch is left out");
            Ok(None)
        }
    }
}
