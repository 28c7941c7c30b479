//! Letting go: expired sessions, pages over quota, segments that are mostly dead, tenants.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
};

use crate::{
    aligned::BLOCK,
    error::{Miss, StoreError},
    event::{Durability, Event, SessionId, Whose},
    evict::Reason,
    key::TenantId,
    options::Quota,
    pages::{count, lock},
    segment::{self, Segment},
    store::{Inner, Store},
};

/// A tenant with more small segments than this gets them written together.
const SMALL_SEGMENTS_MAX: usize = 8;

/// What one round of maintenance did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Maintained {
    /// Sessions past their time.
    pub expired_sessions: usize,
    /// Pages let go for a quota or room on the disk.
    pub evicted_pages: usize,
    /// Segments removed, their live pages copied.
    pub compacted_segments: usize,
}

impl Store {
    /// Sets a tenant's limits, for as long as the store is open.
    pub fn set_quota(&self, tenant: TenantId, quota: Quota) {
        lock(&self.inner.pages.quotas).insert(tenant, quota);
    }

    /// Bytes on disk of a tenant's pages.
    pub fn page_bytes(&self, tenant: TenantId) -> u64 {
        lock(&self.inner.pages.index).bytes(tenant)
    }

    /// Removes expired sessions, evicts pages over quota, compacts segments. A store with threads does so by itself.
    ///
    /// # Errors
    /// What stopped it; the rest is done the next time.
    pub fn maintain(&self) -> Result<Maintained, StoreError> {
        self.inner.maintain()
    }

    /// Removes a tenant: its sessions, its pages, and its secret, without which no copy of its pages can be named and,
    /// where the store has a master key, no copy of its tokens or pages can be read.
    ///
    /// # Errors
    /// What stopped it; it may be called again.
    pub fn delete_tenant(&self, tenant: TenantId) -> Result<(), StoreError> {
        let inner = &*self.inner;
        inner.check_epoch()?;
        {
            // Nobody makes a session of it meanwhile.
            let mut state = lock(&inner.state);
            let ids: Vec<SessionId> = state.table.ids(tenant, None).collect();
            for session in ids {
                let durability =
                    state.table.get(tenant, session).map_or(Durability::Async, |s| s.settings.durability);
                let whose = Whose { tenant, session };
                inner.record(&mut state, whose, Event::Delete, durability.min(Durability::Async))?;
            }
            // From here on the rest is unreadable as pages of anyone, and sealed tokens are so at all.
            lock(&inner.tenants).remove(&*inner.disk, tenant)?;
            // Tokens that are not sealed stand in the journal until it is written anew.
            inner.rebase(&mut state).map_err(StoreError::Journal)?;
        }
        lock(&inner.pages.writer).drop_tenant(tenant);
        inner.pages.remove_tenant(tenant);
        lock(&inner.pages.quotas).remove(&tenant);
        let dir = segment::tenant_dir(tenant);
        for name in inner.disk.list(&dir)? {
            inner.disk.remove(&format!("{dir}/{name}"))?;
        }
        let removed = inner.disk.sync_dir(&dir).and_then(|()| inner.disk.remove_dir(&dir));
        Ok(removed.or_else(absent_is_well)?)
    }
}

fn absent_is_well(e: std::io::Error) -> std::io::Result<()> {
    if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(e) }
}

impl Inner {
    pub(crate) fn maintain(&self) -> Result<Maintained, StoreError> {
        self.check_epoch()?;
        let expired_sessions = self.expire()?;
        let tenants = lock(&self.pages.index).tenants();
        let over = |tenant| self.pages.evict(tenant, self.pages.quota(tenant).page_bytes, Reason::Quota);
        let mut evicted_pages = tenants.into_iter().map(over).sum();
        evicted_pages += self.make_room();
        let mut compacted_segments = 0;
        for segment in self.dying_segments() {
            // What is copied must not take the journal's room.
            let copied = segment.live_bytes.load(Ordering::Relaxed);
            if copied > 0 && self.free_bytes() < self.pages.options.reserve_bytes.saturating_add(copied) {
                continue;
            }
            self.compact(&segment)?;
            compacted_segments += 1;
        }
        Ok(Maintained { expired_sessions, evicted_pages, compacted_segments })
    }

    fn free_bytes(&self) -> u64 {
        self.disk.space().map_or(u64::MAX, |space| space.free)
    }

    /// Where less than the reserve is free, lets go of a tenth of the pages of the tenant that has most, or as many as
    /// are missing.
    fn make_room(&self) -> usize {
        let missing = self.pages.options.reserve_bytes.saturating_sub(self.free_bytes());
        let most = {
            let index = lock(&self.pages.index);
            index.tenants().into_iter().map(|tenant| (index.bytes(tenant), tenant)).max()
        };
        let Some((bytes, tenant)) = most.filter(|_| missing > 0) else { return 0 };
        self.pages.evict(tenant, bytes.saturating_sub(missing.max(bytes / 10)), Reason::DiskFull)
    }

    fn expire(&self) -> Result<usize, StoreError> {
        let mut state = lock(&self.state);
        let now_ms = self.now_ms(&mut state);
        if !state.time.is_trusted() {
            return Ok(0);
        }
        let expired: Vec<_> = state
            .table
            .all()
            .filter(|(_, s)| s.expires_ms().is_some_and(|end_ms| end_ms <= now_ms) && !s.settings.pinned)
            .map(|(session, s)| {
                (Whose { tenant: s.tenant, session }, s.settings.durability.min(Durability::Async))
            })
            .collect();
        for &(whose, level) in &expired {
            self.record(&mut state, whose, Event::Delete, level)?;
        }
        Ok(expired.len())
    }

    /// Sealed segments of which less than half is live, and small ones where there are many.
    fn dying_segments(&self) -> Vec<Arc<Segment>> {
        let writer = lock(&self.pages.writer);
        let index = lock(&self.pages.index);
        let sealed = index.segments.values().filter(|segment| !writer.is_open(segment));
        let (mut dying, mut small) = (Vec::new(), HashMap::<TenantId, Vec<Arc<Segment>>>::new());
        for segment in sealed {
            let bytes = segment.bytes.load(Ordering::Relaxed);
            if segment.live_bytes.load(Ordering::Relaxed) * 2 < bytes || bytes == 0 {
                dying.push(segment.clone());
            } else if bytes < self.pages.options.segment_bytes / 8 {
                small.entry(segment.tenant).or_default().push(segment.clone());
            }
        }
        dying.extend(small.into_values().filter(|all| all.len() > SMALL_SEGMENTS_MAX).flatten());
        dying.sort_unstable_by_key(|segment| (segment.tenant, segment.number));
        dying
    }

    /// Copies a segment's live pages to the tenant's open one, makes them durable, and removes the file.
    fn compact(&self, segment: &Arc<Segment>) -> Result<(), StoreError> {
        for entry in self.entries_of(segment) {
            let memory = self.pages.spare.take(entry.slot.disk_bytes() as usize);
            match segment.read_stored(&*self.disk, &self.pages.keys, &entry.slot, memory) {
                Ok((record, bytes)) => {
                    let (block, payload) =
                        bytes.split_first_chunk::<BLOCK>().expect("a header is read first");
                    let payload = &payload[..record.payload_bytes];
                    // Under the writer's lock nobody else replaces the page between the look and the copy.
                    let mut writer = lock(&self.pages.writer);
                    if lock(&self.pages.index).contains(&record.header.name) {
                        writer.append(&self.pages, &record, block, payload)?;
                    }
                    drop(writer);
                    self.pages.spare.give(bytes);
                }
                Err(Miss::Damaged(_)) => {
                    count(&self.pages.counts.damaged);
                    lock(&self.pages.index).remove_at(&entry);
                }
                // The tenant was deleted meanwhile.
                Err(Miss::Absent) => {}
                Err(miss) => return Err(StoreError::Pages(miss.to_string())),
            }
        }
        lock(&self.pages.writer).sync(&self.pages).map_err(|e| StoreError::Pages(e.to_string()))?;
        lock(&self.pages.index).segments.remove(&(segment.tenant, segment.number));
        self.disk.remove(&segment.path()).or_else(absent_is_well)?;
        Ok(())
    }
}
