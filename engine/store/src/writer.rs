//! The writing side of pages: one open segment a tenant, synced in groups, given up after a failed sync.

use std::{collections::HashMap, io, sync::Arc};

use crate::{
    aligned::BLOCK,
    evict::Reason,
    key::TenantId,
    pages::{PageWrite, Pages, count, lock},
    record::Record,
    segment::{Active, Segment},
};

/// After the disk was found full, pages are dropped for so long before the next try.
const FULL_PAUSE_MS: u64 = 1000;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// Room is asked of the system after so many bytes written.
const SPACE_CHECK_BYTES: u64 = 16 << 20;

/// Owns the segments that are written.
pub(crate) struct Writer {
    actives: HashMap<TenantId, Active>,
    /// Above all numbers and serials in use.
    pub(crate) next_number: u64,
    pub(crate) next_serial: u64,
    unsynced_bytes: u64,
    unsynced_since_ms: Option<u64>,
    paused_until_ms: u64,
    unchecked_bytes: u64,
    /// Bytes of the write budget in hand, and when they were last counted.
    budget: Option<(f64, u64)>,
}

fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl Writer {
    pub(crate) fn new(next_number: u64, next_serial: u64) -> Self {
        Self {
            actives: HashMap::new(),
            next_number,
            next_serial,
            unsynced_bytes: 0,
            unsynced_since_ms: None,
            paused_until_ms: 0,
            unchecked_bytes: u64::MAX,
            budget: None,
        }
    }

    /// Writes a page into its tenant's segment. False where it is dropped.
    pub(crate) fn write(&mut self, pages: &Pages, page: &mut PageWrite) -> bool {
        if pages.contains(&page.header.name) {
            return true;
        }
        let bytes = Pages::disk_bytes(page.payload.len());
        let tenant = page.header.name.tenant;
        if !self.may_write(pages, bytes) || !Self::fits_quota(pages, tenant, bytes) {
            return false;
        }
        let place = (self.next_serial, pages.epoch);
        self.next_serial += 1;
        let record = Record::of(page.header.clone(), &mut page.payload, page.digest, place, &pages.keys);
        let block = record.as_ref().and_then(|record| record.encode(&pages.keys));
        let (Some(record), Some(block)) = (record, block) else { return false };
        self.append(pages, &record, &block, &page.payload).is_ok()
    }

    /// Appends a record, as it is to stand on disk, to its tenant's segment and enters it in the index.
    pub(crate) fn append(
        &mut self,
        pages: &Pages,
        record: &Record,
        block: &[u8; BLOCK],
        payload: &[u8],
    ) -> io::Result<()> {
        let tenant = record.header.name.tenant;
        let active = match self.actives.entry(tenant) {
            std::collections::hash_map::Entry::Occupied(active) => active.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let segment = Segment::new(tenant, self.next_number);
                self.next_number += 1;
                pages.check_epoch().map_err(io::Error::other)?;
                let begun = Active::begin(&*pages.disk, &pages.keys, segment);
                let active = begun.inspect_err(|e| {
                    self.paused_until_ms = pause(pages, e, self.paused_until_ms);
                })?;
                lock(&pages.index).segments.insert((tenant, active.segment.number), active.segment.clone());
                place.insert(active)
            }
        };
        match active.append(record, block, payload) {
            Ok(slot) => {
                let bytes = slot.disk_bytes();
                lock(&pages.index).insert(&active.segment, slot, &record.header.tokens);
                count(&pages.counts.written);
                pages.counts.written_bytes.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
                self.unsynced_bytes += bytes;
                self.unchecked_bytes = self.unchecked_bytes.saturating_add(bytes);
                let now_ms = pages.clock.monotonic_ms();
                self.unsynced_since_ms.get_or_insert(now_ms);
                pages.counts.sync.wrote(now_ms);
                self.seal_if_grown(pages, tenant);
                Ok(())
            }
            Err(e) => {
                // The next record goes where this one failed, and a full disk may be emptied.
                if is_full(&e) {
                    self.paused_until_ms = pause(pages, &e, self.paused_until_ms);
                } else {
                    self.abandon(pages, tenant);
                }
                Err(e)
            }
        }
    }

    fn seal_if_grown(&mut self, pages: &Pages, tenant: TenantId) {
        let Some(active) = self.actives.get_mut(&tenant) else { return };
        if active.end < pages.options.segment_bytes {
            return;
        }
        match active.seal(&*pages.disk, &pages.keys) {
            Ok(()) => {
                self.actives.remove(&tenant);
            }
            // Without its index a segment is as good, so a full disk costs a walk at the next start.
            Err(e) if is_full(&e) => {}
            Err(_) => self.abandon(pages, tenant),
        }
    }

    /// Whether disk and budget have room.
    fn may_write(&mut self, pages: &Pages, bytes: u64) -> bool {
        let now_ms = pages.clock.monotonic_ms();
        if now_ms < self.paused_until_ms {
            return false;
        }
        if self.unchecked_bytes >= SPACE_CHECK_BYTES {
            let free = pages.disk.space().map_or(u64::MAX, |space| space.free);
            if free < pages.options.reserve_bytes.saturating_add(bytes) {
                self.paused_until_ms = now_ms + FULL_PAUSE_MS;
                return false;
            }
            // Near the reserve every page is checked.
            let near = free < pages.options.reserve_bytes.saturating_add(2 * SPACE_CHECK_BYTES);
            self.unchecked_bytes = if near { SPACE_CHECK_BYTES } else { 0 };
        }
        let Some(per_day) = pages.options.write_budget_bytes_per_day else { return true };
        let per_day = per_day as f64;
        let (had, counted_ms) = self.budget.unwrap_or((per_day, now_ms));
        let gained = (now_ms - counted_ms) as f64 / DAY_MS as f64 * per_day;
        let has = (had + gained).min(per_day);
        let fits = has >= bytes as f64;
        self.budget = Some((if fits { has - bytes as f64 } else { has }, now_ms));
        fits
    }

    /// Makes room within the tenant's quota.
    fn fits_quota(pages: &Pages, tenant: TenantId, bytes: u64) -> bool {
        let quota = pages.quota(tenant).page_bytes;
        let fits = || lock(&pages.index).bytes(tenant).saturating_add(bytes) <= quota;
        if !fits() {
            // A tenth at once, so that not every page pays for the search.
            pages.evict(tenant, (quota - quota / 10).min(quota.saturating_sub(bytes)), Reason::Quota);
        }
        fits()
    }

    /// Syncs if enough was written or waited long enough.
    pub(crate) fn sync_if_due(&mut self, pages: &Pages) {
        let Some(since_ms) = self.unsynced_since_ms else { return };
        let waited_ms = pages.clock.monotonic_ms().saturating_sub(since_ms);
        if self.unsynced_bytes >= pages.options.sync_bytes || waited_ms >= pages.options.sync_ms {
            // Each failure has been counted, and its pages let go.
            let _ = self.sync(pages);
        }
    }

    /// Makes all pages written so far durable. A segment whose sync fails is given up: the system may have dropped
    /// its bytes and would report success the next time.
    pub(crate) fn sync(&mut self, pages: &Pages) -> io::Result<()> {
        let tenants: Vec<_> = self.actives.keys().copied().collect();
        let (begun_us, mut first_error) = (pages.clock.monotonic_us(), None);
        for tenant in tenants {
            let active = self.actives.get_mut(&tenant).expect("a key just listed");
            if let Err(e) = active.sync(&*pages.disk) {
                self.abandon(pages, tenant);
                first_error.get_or_insert(e);
            }
        }
        if self.unsynced_since_ms.take().is_some() {
            pages.counts.sync.took(pages.clock.monotonic_us().saturating_sub(begun_us));
        }
        self.unsynced_bytes = 0;
        // What could not be synced is given up, and waits no more.
        pages.counts.sync.synced(None);
        first_error.map_or(Ok(()), Err)
    }

    /// Gives up a tenant's open segment: what is not durable in it is forgotten.
    fn abandon(&mut self, pages: &Pages, tenant: TenantId) {
        let Some(active) = self.actives.remove(&tenant) else { return };
        count(&pages.counts.abandoned_segments);
        let mut index = lock(&pages.index);
        for slot in &active.slots[active.synced_count..] {
            let entry = index.get(&slot.name);
            if let Some(entry) = entry.filter(|e| Arc::ptr_eq(&e.segment, &active.segment)) {
                index.remove_at(&entry);
            }
        }
    }

    /// Seals all open segments, so that the next start reads their indexes.
    pub(crate) fn seal_all(&mut self, pages: &Pages) -> io::Result<()> {
        let mut first_error = None;
        for (_, mut active) in self.actives.drain() {
            if let Err(e) = active.seal(&*pages.disk, &pages.keys) {
                first_error.get_or_insert(e);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Forgets a tenant's open segment.
    pub(crate) fn drop_tenant(&mut self, tenant: TenantId) {
        self.actives.remove(&tenant);
    }

    /// Whether records are still appended to a segment.
    pub(crate) fn is_open(&self, segment: &Segment) -> bool {
        self.actives.get(&segment.tenant).is_some_and(|active| active.segment.number == segment.number)
    }
}

/// Until when to drop pages after an error.
fn pause(pages: &Pages, e: &io::Error, paused_until_ms: u64) -> u64 {
    if is_full(e) { pages.clock.monotonic_ms() + FULL_PAUSE_MS } else { paused_until_ms }
}
