//! Looking at everything: a whole check, a slow one in steps, and a copy of a live store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    aligned::BLOCK,
    disk::{Access, Disk, create_anew, read_full, write_full},
    error::{Miss, StoreError},
    event::Event,
    index::Entry,
    journal::{self, FileName, Piece},
    key::hex,
    pages::{count, lock},
    record::PageName,
    recover::{CONFIG, CONFIG_MAGIC, EpochFile, QUARANTINE, epoch_twin},
    report::Damage,
    segment::{self, Segment},
    store::{Inner, Store},
    tenant,
    twin::{Found, Twin},
};

/// What a whole check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Sessions.
    pub sessions: usize,
    /// Journal entries proven.
    pub entries: u64,
    /// Pages proven, by their digests.
    pub pages: u64,
    /// Their payload bytes.
    pub page_bytes: u64,
    /// What is not as it was written.
    pub damage: Vec<Damage>,
}

/// Where the scrubber is: the last page it looked at.
pub(crate) type ScrubPlace = Option<PageName>;

/// Counts of the scrubber since the store was opened.
#[derive(Debug, Default)]
pub struct ScrubCounts {
    /// Pages proven.
    pub pages: AtomicU64,
    /// Bytes read, headers and padding included.
    pub bytes: AtomicU64,
    /// Pages that were damaged, and are let go.
    pub damaged: AtomicU64,
    /// Pages that the disk did not give.
    pub unreadable: AtomicU64,
    /// Times that all pages were looked at.
    pub passes: AtomicU64,
}

/// What a step of the scrubber did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Pages proven.
    pub pages: u64,
    /// Pages that were damaged, and are let go.
    pub damaged: u64,
    /// Bytes read, headers and padding included.
    pub bytes: u64,
    /// All pages have been seen; the next step begins anew.
    pub done: bool,
}

/// Between two passes of the scrubber.
const SCRUB_REST: Duration = Duration::from_secs(60);
/// Bytes copied at once.
const COPY_BYTES: usize = 1 << 20;

impl Store {
    /// Reads everything and compares it with its checksums and digests. Changes nothing.
    ///
    /// # Errors
    /// The disk's.
    pub fn verify(&self) -> Result<VerifyReport, StoreError> {
        let inner = &*self.inner;
        let mut report = VerifyReport::default();
        self.verify_twins(&mut report)?;
        {
            // Nobody appends meanwhile.
            let state = lock(&inner.state);
            report.sessions = state.table.all().count();
            let mut files = journal::files(&*inner.disk)?;
            let base = files.iter().rposition(|file| file.is_base).unwrap_or(0);
            for name in files.drain(..).skip(base) {
                inner.verify_journal(name, &mut report)?;
            }
        }
        let mut entries = inner.pages.gather(None, |entry| Some(entry.clone()));
        entries.sort_unstable_by_key(|e| (e.segment.tenant, e.segment.number, e.slot.offset));
        for entry in entries {
            match inner.prove(&entry) {
                Ok(bytes) => {
                    report.pages += 1;
                    report.page_bytes += bytes;
                }
                Err(Miss::Unreadable(_)) if !inner.is_current(&entry) => {}
                Err(miss) => {
                    let what = if let Miss::Damaged(what) = miss { what } else { "unreadable" };
                    let (path, offset, bytes) =
                        (entry.segment.path(), entry.slot.offset, entry.slot.disk_bytes());
                    report.damage.push(Damage { path, offset, bytes, what, session: None });
                }
            }
        }
        Ok(report)
    }

    fn verify_twins(&self, report: &mut VerifyReport) -> Result<(), StoreError> {
        let disk = &*self.inner.disk;
        let config = Twin { disk, path: CONFIG, magic: CONFIG_MAGIC }.read()?;
        let mut found = vec![(CONFIG.to_owned(), config), ("EPOCH".to_owned(), epoch_twin(disk).read()?)];
        let tenants = lock(&self.inner.tenants).all();
        for (id, _) in tenants {
            let path = format!("{}/{}", tenant::DIR, hex(&id.0));
            let twin = Twin { disk, path: &path, magic: tenant::MAGIC }.read()?;
            found.push((path, twin));
        }
        for (path, twin) in found {
            if !matches!(twin, Found::Whole { damaged: false, .. }) {
                let what = "a copy is damaged";
                report.damage.push(Damage { path, offset: 0, bytes: 0, what, session: None });
            }
        }
        Ok(())
    }

    /// Proves the next page; one that is damaged is let go. A store with threads does so by itself, see
    /// [`Options::scrub_bytes_per_s`](crate::Options::scrub_bytes_per_s).
    pub fn scrub(&self) -> Scrubbed {
        self.inner.scrub()
    }

    /// Counts of the scrubber.
    pub fn scrub_counts(&self) -> &ScrubCounts {
        &self.inner.scrub_counts
    }

    /// Copies the store, as it is at one moment, to an empty directory.
    ///
    /// # Errors
    /// [`StoreError::Io`] where `to` is not empty, or either disk fails.
    pub fn snapshot(&self, to: &dyn Disk) -> Result<(), StoreError> {
        let inner = &*self.inner;
        if !to.list("")?.is_empty() {
            return Err(StoreError::Io(std::io::ErrorKind::DirectoryNotEmpty.into()));
        }
        for dir in [journal::DIR, segment::DIR, tenant::DIR, QUARANTINE] {
            to.create_dir(dir)?;
        }
        let copy_twin = |path: &str, magic| -> Result<(), StoreError> {
            match (Twin { disk: &*inner.disk, path, magic }).read()? {
                Found::Whole { bodies, .. } => Ok(Twin { disk: to, path, magic }.write(&bodies[0])?),
                _ => Err(StoreError::Lost { path: path.to_owned() }),
            }
        };
        copy_twin(CONFIG, CONFIG_MAGIC)?;
        let tenants = lock(&inner.tenants).all();
        for (id, _) in tenants {
            copy_twin(&format!("{}/{}", tenant::DIR, hex(&id.0)), tenant::MAGIC)?;
        }
        let (entries, wall_ms) = {
            let mut state = lock(&inner.state);
            (state.table.entries(), inner.now_ms(&mut state))
        };
        let epoch = inner.pages.epoch;
        let (name, start) = (FileName { lsn: 1, is_base: true }, Event::Start { epoch, wall_ms });
        let base = journal::write_base(to, &inner.pages.keys, name, &start, &entries)?;
        journal::publish_base(to, &base, name)?;
        self.copy_segments(to)?;
        EpochFile { epoch, closed_lsn: base.last_lsn() }.write(to)?;
        to.sync_dir("")?;
        Ok(())
    }

    fn copy_segments(&self, to: &dyn Disk) -> Result<(), StoreError> {
        let disk = &*self.inner.disk;
        let segments: Vec<Arc<Segment>> = lock(&self.inner.pages.index).segments.values().cloned().collect();
        for segment in segments {
            let path = segment.path();
            let from = match disk.open(&path, Access::Read) {
                // Compacted meanwhile: pages are a cache.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                opened => opened?,
            };
            to.create_dir(&segment::tenant_dir(segment.tenant))?;
            let file = create_anew(to, &path)?;
            let (mut at, mut buffer) = (0, vec![0; COPY_BYTES]);
            loop {
                let read = read_full(&*from, at, &mut buffer)?;
                if read == 0 {
                    break;
                }
                write_full(&*file, at, &buffer[..read])?;
                at += read as u64;
            }
            file.sync()?;
            to.sync_dir(&segment::tenant_dir(segment.tenant))?;
        }
        Ok(to.sync_dir(segment::DIR)?)
    }
}

impl Inner {
    pub(crate) fn scrub(&self) -> Scrubbed {
        let mut place = lock(&self.scrub);
        let next = lock(&self.pages.index).after(None, *place).next().cloned();
        *place = next.as_ref().map(|entry| entry.slot.name);
        let Some(entry) = next else {
            count(&self.scrub_counts.passes);
            return Scrubbed { done: true, ..Scrubbed::default() };
        };
        let bytes = entry.slot.disk_bytes();
        let mut scrubbed = Scrubbed { bytes, ..Scrubbed::default() };
        self.scrub_counts.bytes.fetch_add(bytes, Ordering::Relaxed);
        match self.prove(&entry) {
            Ok(_) => {
                scrubbed.pages = 1;
                count(&self.scrub_counts.pages);
            }
            Err(Miss::Damaged(_)) => {
                scrubbed.damaged = 1;
                count(&self.scrub_counts.damaged);
                count(&self.pages.counts.damaged);
                lock(&self.pages.index).remove_at(&entry);
            }
            // The disk may answer another time; a file that is gone was compacted.
            Err(_) => count(&self.scrub_counts.unreadable),
        }
        scrubbed
    }

    /// Proves pages one after another at the rate that was chosen, until the store closes.
    pub(crate) fn scrub_on(&self) {
        let rate = self.pages.options.scrub_bytes_per_s as f64;
        loop {
            let scrubbed = self.scrub();
            let rest = if scrubbed.done {
                SCRUB_REST
            } else {
                Duration::from_secs_f64(scrubbed.bytes as f64 / rate)
            };
            if self.pages.wait_closed(rest) {
                break;
            }
        }
    }

    fn verify_journal(&self, name: FileName, report: &mut VerifyReport) -> Result<(), StoreError> {
        let bytes = journal::read(&*self.disk, name)?;
        for piece in journal::scan(&bytes, &self.pages.keys) {
            let (from, to, session) = match piece {
                Piece::Entry(_) => {
                    report.entries += 1;
                    continue;
                }
                Piece::Erased { .. } => continue,
                Piece::Damage { from, to, owners } => (from, to, owners.first().map(|owner| owner.session)),
                Piece::Tail { from } => (from, bytes.len(), None),
            };
            let (offset, bytes, what) = (from as u64, (to - from) as u64, "journal entry");
            report.damage.push(Damage { path: name.path(), offset, bytes, what, session });
        }
        Ok(())
    }

    /// Reads a page and compares its digest; its payload bytes.
    fn prove(&self, entry: &Entry) -> Result<u64, Miss> {
        let memory = self.pages.spare.take(entry.slot.disk_bytes() as usize);
        let (record, bytes) = entry.segment.read(&*self.disk, &self.pages.keys, &entry.slot, memory)?;
        let holds = record.digest_holds(&bytes[BLOCK..BLOCK + record.payload_bytes]);
        self.pages.spare.give(bytes);
        holds.then_some(record.payload_bytes as u64).ok_or(Miss::Damaged("digest"))
    }

    fn is_current(&self, entry: &Entry) -> bool {
        let segment = &entry.segment;
        lock(&self.pages.index).segments.contains_key(&(segment.tenant, segment.number))
    }

    /// The pages of a segment, in the order they lie in.
    pub(crate) fn entries_of(&self, segment: &Arc<Segment>) -> Vec<Entry> {
        let is_in = |entry: &Entry| Arc::ptr_eq(&entry.segment, segment).then(|| entry.clone());
        let mut entries = self.pages.gather(Some(segment.tenant), is_in);
        entries.sort_unstable_by_key(|entry| entry.slot.offset);
        entries
    }
}
