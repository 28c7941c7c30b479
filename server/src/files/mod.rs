//! Files that clients uploaded or batches wrote: each is on disk whole, with what is known of it beside it, or not at all.
//!
//! A tenant has a directory. The contents of a file come first, under a temporary name; then its record, by which it
//! begins to exist. Deleting goes the other way. What a crash leaves between the two is removed at the next start.

pub(crate) mod durable;
mod record;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_engine::store::TenantId;

pub(crate) use self::record::FileRecord;
use crate::error::ApiError;
use crate::random;

/// Endings of the contents of a file and of its record.
const CONTENTS: &str = "data";
const RECORD: &str = "json";

/// The files of all tenants. Cheap to clone; its calls wait for the disk.
#[derive(Clone)]
pub(crate) struct Files {
    root: Arc<PathBuf>,
    index: Arc<Mutex<Index>>,
}

/// What exists, by the directory of its tenant and its id: ids are in the order of their making.
type Index = BTreeMap<(String, String), FileRecord>;

/// A file that is being written. Dropped before it is kept, it leaves nothing.
pub(crate) struct Draft {
    file: File,
    path: PathBuf,
    tenant: String,
    id: String,
    bytes: u64,
    stage: Stage,
}

/// What there is of a draft.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Temporary,
    /// Its contents, with no record.
    Contents,
    Kept,
}

/// What is told of a file when it is kept.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) filename: String,
    pub(crate) purpose: String,
    /// Seconds from its making on after which it is gone.
    pub(crate) lifetime_s: Option<u64>,
}

impl Files {
    /// Finds what is there, and removes what never became whole.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn open(root: PathBuf) -> io::Result<Self> {
        durable::make_dir(&root)?;
        let mut index = Index::new();
        for directory in durable::entries(&root)?.into_iter().filter(|path| path.is_dir()) {
            let tenant = name(&directory);
            for record in recover(&directory)? {
                index.insert((tenant.clone(), record.id.clone()), record);
            }
        }
        let files = Self { root: Arc::new(root), index: Arc::new(Mutex::new(index)) };
        files.sweep(now_s())?;
        Ok(files)
    }

    /// A new file of a tenant.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn begin(&self, tenant: &str) -> io::Result<Draft> {
        self.begin_as(tenant, new_id("file-"))
    }

    /// The same under an id that was made before; a file that has it already is replaced.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn begin_as(&self, tenant: &str, id: String) -> io::Result<Draft> {
        let tenant = directory_of(tenant);
        let directory = self.root.join(&tenant);
        durable::make_dir(&directory)?;
        let path = directory.join(&id).with_extension(CONTENTS);
        let file = durable::create(&durable::temporary(&path))?;
        Ok(Draft { file, path, tenant, id, bytes: 0, stage: Stage::Temporary })
    }

    /// Makes a draft a file.
    ///
    /// # Errors
    /// The disk's; then there is no file.
    pub(crate) fn keep(&self, mut draft: Draft, about: About) -> io::Result<FileRecord> {
        let now = now_s();
        let record = FileRecord {
            id: draft.id.clone(),
            bytes: draft.bytes,
            created_at: now,
            expires_at: about.lifetime_s.map(|seconds| now.saturating_add(seconds)),
            filename: about.filename,
            purpose: about.purpose,
        };
        draft.publish_contents()?;
        let path = draft.path.with_extension(RECORD);
        durable::write_whole(&path, record.to_json().to_string().as_bytes())?;
        draft.stage = Stage::Kept;
        self.index().insert((draft.tenant.clone(), record.id.clone()), record.clone());
        Ok(record)
    }

    /// A tenant's file.
    pub(crate) fn get(&self, tenant: &str, id: &str) -> Option<FileRecord> {
        let found = self.index().get(&(directory_of(tenant), id.to_owned())).cloned();
        found.filter(|record| !record.is_expired(now_s()))
    }

    /// A tenant's files, oldest first.
    pub(crate) fn list(&self, tenant: &str) -> Vec<FileRecord> {
        let (first, now) = ((directory_of(tenant), String::new()), now_s());
        let index = self.index();
        let own = index.range(first.clone()..).take_while(|((tenant, _), _)| *tenant == first.0);
        own.map(|(_, record)| record).filter(|record| !record.is_expired(now)).cloned().collect()
    }

    /// Where the contents of a file are.
    pub(crate) fn contents(&self, tenant: &str, id: &str) -> PathBuf {
        self.root.join(directory_of(tenant)).join(id).with_extension(CONTENTS)
    }

    /// Removes a file; `false` where there is none.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn delete(&self, tenant: &str, id: &str) -> io::Result<bool> {
        if self.get(tenant, id).is_none() {
            return Ok(false);
        }
        self.remove(&(directory_of(tenant), id.to_owned()))?;
        Ok(true)
    }

    /// Removes files whose time is over.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn sweep(&self, now: u64) -> io::Result<()> {
        let expired =
            |(key, record): (&(String, String), &FileRecord)| record.is_expired(now).then(|| key.clone());
        let expired: Vec<_> = self.index().iter().filter_map(expired).collect();
        expired.iter().try_for_each(|key| self.remove(key))
    }

    fn remove(&self, key: &(String, String)) -> io::Result<()> {
        let directory = self.root.join(&key.0);
        let path = directory.join(&key.1);
        durable::remove(&path.with_extension(RECORD))?;
        durable::sync_dir(&directory)?;
        self.index().remove(key);
        durable::remove(&path.with_extension(CONTENTS))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Draft {
    /// Appends.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn publish_contents(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        durable::publish(&durable::temporary(&self.path), &self.path)?;
        self.stage = Stage::Contents;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let left = match self.stage {
            Stage::Temporary => durable::temporary(&self.path),
            Stage::Contents => self.path.clone(),
            Stage::Kept => return,
        };
        if let Err(error) = durable::remove(&left) {
            tracing::warn!(%error, "a file that was not kept stays until the next start");
        }
    }
}

/// The records of a tenant's directory. Removes temporary files and contents without a record.
fn recover(directory: &Path) -> io::Result<Vec<FileRecord>> {
    let mut records = Vec::new();
    for path in durable::entries(directory)? {
        if durable::is_temporary(&path) {
            durable::remove(&path)?;
        } else if path.extension().is_some_and(|end| end == CONTENTS) {
            if !path.with_extension(RECORD).exists() {
                durable::remove(&path)?;
            }
        } else if path.extension().is_some_and(|end| end == RECORD) {
            match read(&path) {
                Ok(record) => records.push(record),
                // It may be a newer version's: what is not understood is let alone.
                Err(what) => tracing::warn!(path = %path.display(), what, "a file is left out"),
            }
        }
    }
    Ok(records)
}

fn read(path: &Path) -> Result<FileRecord, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let record = FileRecord::of_json(&bytes)?;
    let contents = path.with_extension(CONTENTS).metadata().map_err(|error| error.to_string())?;
    if contents.len() != record.bytes {
        return Err(format!("expected {} bytes of contents, found {}", record.bytes, contents.len()));
    }
    if path.file_stem().is_none_or(|stem| *stem != *record.id) {
        return Err(format!("it is the record of `{}`", record.id));
    }
    Ok(record)
}

/// Runs work that waits for the disk on a thread that may wait.
///
/// # Errors
/// What the disk says, as the client hears it.
pub(crate) async fn waiting<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(ApiError::disk(&error)),
        Err(_) => Err(ApiError::internal("the file could not be worked on")),
    }
}

/// The directory of a tenant: no name can lead out of the root.
pub(crate) fn directory_of(tenant: &str) -> String {
    TenantId::of(tenant).0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An id that comes after those made in milliseconds before.
pub(crate) fn new_id(prefix: &str) -> String {
    let ms = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis();
    format!("{prefix}{ms:012x}{:016x}", random::seed())
}

pub(crate) fn now_s() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs()
}

/// The last part of a path.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
