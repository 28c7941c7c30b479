//! Numbers for those who watch a store: cheap to read, without a lock that anything waits for long.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{
    key::TenantId,
    pages::lock,
    store::{Inner, Store},
};

/// Syncs of one kind of file, and what waits for the next.
#[derive(Debug, Default)]
pub struct SyncCounts {
    /// Syncs, each of all that was written before it.
    pub syncs: AtomicU64,
    /// How long they took in all, microseconds.
    pub sync_us: AtomicU64,
    /// When the oldest write that is not synced was made, 1 above the clock's milliseconds; 0 where there is none.
    since_ms: AtomicU64,
}

impl SyncCounts {
    /// Something was written at this time.
    pub(crate) fn wrote(&self, now_ms: u64) {
        let _ = self.since_ms.compare_exchange(0, now_ms + 1, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// All was synced, but what was written from `since_ms` on.
    pub(crate) fn synced(&self, since_ms: Option<u64>) {
        self.since_ms.store(since_ms.map_or(0, |ms| ms + 1), Ordering::Relaxed);
    }

    pub(crate) fn took(&self, us: u64) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.sync_us.fetch_add(us, Ordering::Relaxed);
    }

    fn age_ms(&self, now_ms: u64) -> Option<u64> {
        let since_ms = self.since_ms.load(Ordering::Relaxed);
        (since_ms > 0).then(|| (now_ms + 1).saturating_sub(since_ms))
    }
}

/// How long the oldest write waits for a sync, milliseconds; `None` where none does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsynced {
    /// Journal entries.
    pub journal_ms: Option<u64>,
    /// Pages in segments.
    pub pages_ms: Option<u64>,
}

/// Pages that a store can find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageTotals {
    /// How many.
    pub pages: u64,
    /// Their bytes on disk, headers and padding included.
    pub bytes: u64,
}

impl Store {
    /// Sessions of all tenants.
    pub fn session_count(&self) -> usize {
        lock(&self.inner.state).table.len()
    }

    /// Sessions by tenant, those that have any.
    pub fn session_counts(&self) -> Vec<(TenantId, usize)> {
        lock(&self.inner.state).table.counts()
    }

    /// Pages of all tenants.
    pub fn page_totals(&self) -> PageTotals {
        let index = lock(&self.inner.pages.index);
        PageTotals { pages: index.len() as u64, bytes: index.all_bytes() }
    }

    /// How long what was written waits to be durable.
    pub fn unsynced(&self) -> Unsynced {
        let Inner { pages, counts, clock, .. } = &*self.inner;
        let now_ms = clock.monotonic_ms();
        Unsynced { journal_ms: counts.sync.age_ms(now_ms), pages_ms: pages.counts.sync.age_ms(now_ms) }
    }
}
