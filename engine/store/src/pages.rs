//! Pages on disk: found by key, proven on every read, written behind by a thread of their own.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    aligned::{AlignedBytes, BLOCK, Spare},
    counts::SyncCounts,
    disk::{Clock, Disk},
    error::{Miss, StoreError},
    index::Index,
    key::{ClassId, PageKey, TenantId},
    options::{Options, Quota},
    record::{Digest, PageHeader, PageName, Record, digest},
    seal::Keys,
    writer::Writer,
};

/// A page's payload, proven. Its memory is read into again when it is dropped.
#[derive(Debug)]
pub struct Page {
    /// Present until dropped.
    bytes: Option<AlignedBytes>,
    len: usize,
    digest: Digest,
    spare: Arc<Spare>,
}

impl Page {
    /// BLAKE3 of the payload, made by the device that sealed the page: what it must be when it is back on one.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

impl std::ops::Deref for Page {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.as_ref().map_or(&[], |bytes| &bytes[BLOCK..BLOCK + self.len])
    }
}

impl AsRef<[u8]> for Page {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.bytes.take().into_iter().for_each(|bytes| self.spare.give(bytes));
    }
}

/// What became of a page that was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handed {
    /// It waits to be written.
    Queued,
    /// The store has it, or one of its name waits already.
    Known,
    /// There is no room in the ring, on the disk or in the budget: it is dropped and counted.
    Dropped,
}

/// Counts since the store was opened.
#[derive(Debug, Default)]
pub struct PageCounts {
    /// Pages written.
    pub written: AtomicU64,
    /// Bytes written, headers and padding included.
    pub written_bytes: AtomicU64,
    /// Pages not written: ring, disk, quota or budget full, or the disk failed.
    pub dropped: AtomicU64,
    /// Pages whose payload was not what the device had sealed: the copy raced with something. None reaches the disk.
    pub mismatched: AtomicU64,
    /// Pages read and proven.
    pub read: AtomicU64,
    /// Their payload bytes.
    pub read_bytes: AtomicU64,
    /// How long that took in all, microseconds; of reads side by side each counts.
    pub read_us: AtomicU64,
    /// Reads that found nothing.
    pub missed: AtomicU64,
    /// Pages whose bytes were not those written.
    pub damaged: AtomicU64,
    /// Pages let go for a quota.
    pub evicted: AtomicU64,
    /// Pages let go because the disk was full.
    pub evicted_disk_full: AtomicU64,
    /// Segments given up after an error.
    pub abandoned_segments: AtomicU64,
    /// Syncs of segments.
    pub sync: SyncCounts,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Keys of a tenant that eviction treats apart.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Never let go.
    pub(crate) pinned: HashSet<PageKey>,
    /// Let go after all others; the pinned ones among them.
    pub(crate) preferred: HashSet<PageKey>,
}

/// Asks the sessions of a tenant what to keep.
pub(crate) type Keeper = Box<dyn Fn(TenantId) -> Kept + Send + Sync>;

/// A page on its way to the disk.
pub(crate) struct PageWrite {
    pub(crate) header: PageHeader,
    pub(crate) payload: Box<[u8]>,
    /// What the device made of the payload when it sealed the page.
    pub(crate) digest: Digest,
}

#[derive(Default)]
struct Ring {
    queue: VecDeque<PageWrite>,
    /// Names of the pages in the queue and of the one that is being written.
    names: HashSet<PageName>,
    bytes: usize,
    /// Pages ever queued, and those no longer in hand.
    queued: u64,
    done: u64,
    closed: bool,
}

/// The pages of a store.
pub(crate) struct Pages {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) epoch: u64,
    pub(crate) options: Options,
    pub(crate) index: Mutex<Index>,
    pub(crate) writer: Mutex<Writer>,
    pub(crate) quotas: Mutex<HashMap<TenantId, Quota>>,
    /// Tells what to keep, once there are sessions to ask.
    pub(crate) keeper: OnceLock<Keeper>,
    ring: Mutex<Ring>,
    /// Something was queued, or written, or the ring closed.
    moved: Condvar,
    pub(crate) counts: PageCounts,
    /// Memory for reads.
    pub(crate) spare: Arc<Spare>,
}

/// Takes a lock that no panic can have left half-changed: state under these locks is changed last.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Pages {
    pub(crate) fn new(
        (disk, clock): (Arc<dyn Disk>, Arc<dyn Clock>),
        (keys, epoch): (Arc<Keys>, u64),
        options: Options,
        index: Index,
        writer: Writer,
    ) -> Self {
        Self {
            disk,
            clock,
            keys,
            epoch,
            options,
            index: Mutex::new(index),
            writer: Mutex::new(writer),
            quotas: Mutex::default(),
            keeper: OnceLock::new(),
            ring: Mutex::default(),
            moved: Condvar::new(),
            counts: PageCounts::default(),
            spare: Arc::default(),
        }
    }

    /// Reads the page that `wanted` describes. Whatever is wrong with it makes a miss; a damaged one is let go.
    pub(crate) fn read(&self, wanted: &PageHeader) -> Result<Page, Miss> {
        self.read_if(&wanted.name, |found| found == wanted).map(|(_, page)| page)
    }

    /// What stands over the page of this name, proven as in [`Pages::read`].
    pub(crate) fn header(&self, name: &PageName) -> Result<PageHeader, Miss> {
        self.read_if(name, |_| true).map(|(header, _)| header)
    }

    fn read_if(
        &self,
        name: &PageName,
        is_wanted: impl FnOnce(&PageHeader) -> bool,
    ) -> Result<(PageHeader, Page), Miss> {
        let entry = lock(&self.index).get(name);
        let Some(entry) = entry else {
            count(&self.counts.missed);
            return Err(Miss::Absent);
        };
        let begun_us = self.clock.monotonic_us();
        let memory = self.spare.take(entry.slot.disk_bytes() as usize);
        match entry.segment.read(&*self.disk, &self.keys, &entry.slot, memory) {
            Ok((record, bytes)) if is_wanted(&record.header) => {
                let took_us = self.clock.monotonic_us().saturating_sub(begun_us);
                count(&self.counts.read);
                self.counts.read_bytes.fetch_add(record.payload_bytes as u64, Ordering::Relaxed);
                self.counts.read_us.fetch_add(took_us, Ordering::Relaxed);
                let page = Page {
                    bytes: Some(bytes),
                    len: record.payload_bytes,
                    digest: record.digest,
                    spare: Arc::clone(&self.spare),
                };
                Ok((record.header, page))
            }
            Ok(_) => {
                count(&self.counts.missed);
                Err(Miss::Collision)
            }
            Err(miss) => {
                if matches!(miss, Miss::Damaged(_)) {
                    count(&self.counts.damaged);
                    lock(&self.index).remove_at(&entry);
                }
                Err(miss)
            }
        }
    }

    pub(crate) fn contains(&self, name: &PageName) -> bool {
        lock(&self.index).contains(name)
    }

    /// How many of `keys`, from the first on, have a page like `like`.
    pub(crate) fn chain_len(&self, like: &PageName, keys: &[PageKey]) -> usize {
        let index = lock(&self.index);
        keys.iter().take_while(|&&key| index.contains(&PageName { key, ..*like })).count()
    }

    /// Of each of `keys`, whether there is a page like `like`.
    pub(crate) fn held(&self, like: &PageName, keys: &[PageKey]) -> Vec<bool> {
        let index = lock(&self.index);
        keys.iter().map(|&key| index.contains(&PageName { key, ..*like })).collect()
    }

    pub(crate) fn classes(&self) -> Vec<ClassId> {
        lock(&self.index).classes().collect()
    }

    /// Puts a page in the ring unless it is known or there is no room. `patience` is how long to wait for room.
    pub(crate) fn hand(&self, page: PageWrite, patience: Duration) -> Handed {
        let PageWrite { header, payload, .. } = &page;
        if self.contains(&header.name) {
            return Handed::Known;
        }
        if payload.len() > crate::record::PAYLOAD_BYTES_MAX || header.tokens.len() > crate::key::PAGE_TOKENS {
            count(&self.counts.dropped);
            return Handed::Dropped;
        }
        let has_room =
            |ring: &Ring| ring.queue.is_empty() || ring.bytes + payload.len() <= self.options.ring_bytes;
        let ring = lock(&self.ring);
        let waits = |ring: &mut Ring| !has_room(ring) && !ring.closed && !ring.names.contains(&header.name);
        let waited = self.moved.wait_timeout_while(ring, patience, waits);
        let (mut ring, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        if ring.names.contains(&header.name) {
            return Handed::Known;
        }
        if ring.closed || !has_room(&ring) {
            count(&self.counts.dropped);
            return Handed::Dropped;
        }
        ring.bytes += payload.len();
        ring.queued += 1;
        ring.names.insert(header.name);
        ring.queue.push_back(page);
        self.moved.notify_all();
        Handed::Queued
    }

    /// Writes one page of the ring, waiting for it up to `patience`. False where there was none.
    pub(crate) fn write_next(&self, patience: Duration) -> bool {
        let ring = lock(&self.ring);
        let waited = self.moved.wait_timeout_while(ring, patience, |r| r.queue.is_empty() && !r.closed);
        let (mut ring, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(mut page) = ring.queue.pop_front() else { return false };
        ring.bytes -= page.payload.len();
        drop(ring);
        if digest(&page.payload) != page.digest {
            count(&self.counts.mismatched);
        } else if !lock(&self.writer).write(self, &mut page) {
            count(&self.counts.dropped);
        }
        let mut ring = lock(&self.ring);
        ring.names.remove(&page.header.name);
        ring.done = ring.queued.min(ring.done + 1);
        drop(ring);
        self.moved.notify_all();
        true
    }

    /// Waits until all pages handed over before this call are with the system. False after `patience`.
    pub(crate) fn wait_written(&self, patience: Duration) -> bool {
        if !self.options.threads {
            while self.write_next(Duration::ZERO) {}
            return true;
        }
        let ring = lock(&self.ring);
        let target = ring.queued;
        let waited = self.moved.wait_timeout_while(ring, patience, |ring| ring.done < target);
        let (ring, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        ring.done >= target
    }

    pub(crate) fn quota(&self, tenant: TenantId) -> Quota {
        lock(&self.quotas).get(&tenant).copied().unwrap_or(self.options.quota)
    }

    /// Drops what waits and takes nothing more: another store owns the directory.
    pub(crate) fn give_up(&self) {
        let mut ring = lock(&self.ring);
        ring.closed = true;
        self.counts.dropped.fetch_add(ring.queue.len() as u64, Ordering::Relaxed);
        ring.queue.clear();
        ring.names.clear();
        (ring.bytes, ring.done) = (0, ring.queued);
        self.moved.notify_all();
    }

    /// Fails once another store has opened the directory.
    pub(crate) fn check_epoch(&self) -> Result<(), StoreError> {
        match crate::recover::read_epoch(&*self.disk)? {
            Some(file) if file.epoch > self.epoch => {
                Err(StoreError::Fenced { expected: self.epoch, found: file.epoch })
            }
            _ => Ok(()),
        }
    }

    /// Lets the writing thread end once the ring is empty.
    pub(crate) fn close(&self) {
        lock(&self.ring).closed = true;
        self.moved.notify_all();
    }

    /// Waits until the store closes; false after `patience`.
    pub(crate) fn wait_closed(&self, patience: Duration) -> bool {
        let waited = self.moved.wait_timeout_while(lock(&self.ring), patience, |ring| !ring.closed);
        let (ring, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        ring.closed
    }

    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.ring).closed
    }

    pub(crate) fn ring_bytes(&self) -> usize {
        lock(&self.ring).bytes
    }

    /// Bytes on disk of a page with this payload.
    pub(crate) fn disk_bytes(payload_bytes: usize) -> u64 {
        Record::disk_bytes(payload_bytes)
    }
}
