//! Writing a session to the tier, and letting go of it there.

use std::{collections::VecDeque, time::Duration};

use object_store::path::Path;

use crate::{
    bundle::ExportPages,
    error::StoreError,
    event::{Durability, Event, SessionId, Settings, Whose},
    key::{PAGE_TOKENS, TenantId},
    object::{
        ObjectError, ObjectTier, OwnerId, State, after,
        extent::{EXTENT_BYTES_MAX, Extent, Source},
        link::{Pending, Put},
        manifest::{self, Contents, Entry, Extents, Place, dir},
        new_head, now_ms,
    },
    pages::lock,
    store::Store,
};

/// How long a flush waits for pages that are on their way to the local disk.
const WRITTEN: Duration = Duration::from_secs(5);
/// Extents that are asked for at a time, whether they are there.
const HEADS: usize = 16;

/// A session in the tier, as a flush left it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// The number of this store's ownership.
    pub epoch: u32,
    /// The number of the manifest in it.
    pub number: u32,
    /// Pages the manifest names.
    pub pages: u32,
    /// Extents the manifest names.
    pub extents: u32,
    /// Of these, extents that were written; the others were there.
    pub extents_written: u32,
    /// Their bytes.
    pub bytes_written: u64,
}

/// Who has a session, as a store sees it that wants to write it.
enum Stand {
    /// The tier does not know it, or it is free and was this store's: epoch to claim.
    Free { epoch: u32 },
    /// This store's.
    Own(Place),
}

/// What must not change while a session is released.
#[derive(PartialEq)]
struct Stamp {
    settings: Settings,
    hash: [u8; 16],
    turn_count: u32,
}

fn stamp(store: &Store, tenant: TenantId, id: SessionId) -> Result<Stamp, ObjectError> {
    let state = lock(&store.inner.state);
    let session = state.table.get(tenant, id).ok_or(StoreError::NotFound)?;
    if session.in_flight.is_some() {
        return Err(ObjectError::Busy);
    }
    let settings = session.settings.clone();
    Ok(Stamp { settings, hash: session.hash(), turn_count: session.turn_count() })
}

/// A session of a store, without its pages.
fn local(store: &Store, tenant: TenantId, id: SessionId) -> Result<Contents, ObjectError> {
    let info = store.get(tenant, id)?;
    let mut bundle = Vec::new();
    store.export(tenant, id, None, &mut bundle)?;
    let contents = Contents::of_bundle(id, &bundle)?;
    let (created_ms, used_ms, parent) = (info.created_ms, info.used_ms, info.parent);
    Ok(Contents { created_ms, used_ms, parent, ..contents })
}

impl ObjectTier {
    /// Writes a session, with its pages if wanted: first the extents that are not there, then a manifest under the next
    /// number. The session stays this store's.
    ///
    /// # Errors
    /// [`ObjectError::Moved`] where another store has it now; nothing of that store's is touched.
    /// [`ObjectError::Busy`], [`ObjectError::Store`], [`ObjectError::Remote`].
    pub fn flush(
        &self,
        store: &Store,
        tenant: TenantId,
        id: SessionId,
        pages: Option<ExportPages>,
    ) -> Result<Flushed, ObjectError> {
        let _busy = self.begin(tenant, id)?;
        self.write(store, (tenant, id), pages, State::Held)
    }

    /// Writes a session, marks it as free for another store, and removes it from this one; its pages stay here as a
    /// cache.
    ///
    /// # Errors
    /// Those of [`ObjectTier::flush`], [`ObjectError::Busy`] while an answer is being made, and
    /// [`ObjectError::Changed`]. After any error the session is still in this store. It may be free for others all the
    /// same: the next flush takes it back, or tells that it was moved.
    pub fn release(
        &self,
        store: &Store,
        tenant: TenantId,
        id: SessionId,
        pages: Option<ExportPages>,
    ) -> Result<Flushed, ObjectError> {
        let _busy = self.begin(tenant, id)?;
        let before = stamp(store, tenant, id)?;
        let flushed = self.write(store, (tenant, id), pages, State::Released)?;
        remove_unchanged(store, (tenant, id), &before)?;
        Ok(flushed)
    }

    fn write(
        &self,
        store: &Store,
        (tenant, id): (TenantId, SessionId),
        pages: Option<ExportPages>,
        state: State,
    ) -> Result<Flushed, ObjectError> {
        let own = store.owner_id();
        let stand = self.stand((tenant, id), own)?;
        let mut contents = local(store, tenant, id)?;
        // What is there is only reused: where it is damaged all is written anew.
        let old = match self.newest_contents(tenant, id) {
            Ok(old) => old,
            Err(ObjectError::Damaged { .. }) => None,
            Err(e) => return Err(e),
        };
        let mut flushed = Flushed::default();
        contents.extents = match (pages, contents.settings.root) {
            (Some(made), Some(_)) => {
                store.wait_written(WRITTEN);
                let made = (made, old.as_ref());
                Some(self.put_extents(store, (tenant, &contents), made, &mut flushed)?)
            }
            // Without a word on pages, those that fit stay named.
            (None, _) => old.as_ref().and_then(|old| fitting(old, &contents.tokens)),
            (Some(_), None) => None,
        };
        let place = match stand {
            Stand::Own(newest) => Place { number: after(newest.number)?, ..newest },
            Stand::Free { epoch } => {
                if !self.claim((tenant, id), epoch, (own, State::Held))? {
                    return Err(ObjectError::Moved { epoch });
                }
                Place { epoch, number: 1 }
            }
        };
        self.put_manifest((tenant, id), place, (own, state), &contents)?;
        self.prune((tenant, id), place);
        (flushed.epoch, flushed.number) = (place.epoch, place.number);
        let named = contents.extents.iter().flat_map(|extents| &extents.list);
        (flushed.extents, flushed.pages) =
            named.fold((0, 0_u32), |(n, pages), e| (n + 1, pages.saturating_add(e.pages)));
        Ok(flushed)
    }

    fn stand(&self, session: (TenantId, SessionId), own: OwnerId) -> Result<Stand, ObjectError> {
        let Some(newest) = self.newest(session.0, session.1)? else { return Ok(Stand::Free { epoch: 1 }) };
        if newest.owner != own {
            return Err(ObjectError::Moved { epoch: newest.place.epoch });
        }
        match newest.state {
            State::Held => Ok(Stand::Own(newest.place)),
            // From the moment it was free, another may be about to take the next epoch: so must this store.
            State::Released | State::Deleted => Ok(Stand::Free { epoch: after(newest.place.epoch)? }),
        }
    }

    /// Makes the manifest of a session, and fails where another store has taken it meanwhile.
    pub(super) fn put_manifest(
        &self,
        (tenant, id): (TenantId, SessionId),
        place: Place,
        (owner, state): (OwnerId, State),
        contents: &Contents,
    ) -> Result<(), ObjectError> {
        let head = new_head((tenant, id), place, (owner, state))?;
        let bytes = manifest::encode(&head, Some(contents))?;
        let put = self.link.create(&head.path(), bytes)?;
        let newest = self.places(tenant, id)?.last().map_or(place.epoch, |newest| newest.epoch);
        match put {
            _ if newest > place.epoch => Err(ObjectError::Moved { epoch: newest }),
            Put::Taken => Err(ObjectError::Lost),
            Put::Made => Ok(()),
        }
    }

    /// Removes manifests that a newer one made useless. Claims stay: they keep the numbers of epochs taken, even for a
    /// store that sees an old list.
    fn prune(&self, (tenant, id): (TenantId, SessionId), newest: Place) {
        // What is left is removed by the next flush.
        let places = self.places(tenant, id).unwrap_or_default();
        for place in places.into_iter().filter(|&place| place < newest && !place.is_claim()) {
            let _ = self.link.delete(&Path::from(format!("{}/{place}", dir(tenant, id))));
        }
    }

    /// Sees to it that the tier has all pages the store has; extents of `old` that hold no less are kept.
    fn put_extents(
        &self,
        store: &Store,
        (tenant, contents): (TenantId, &Contents),
        (made, old): (ExportPages, Option<&Contents>),
        flushed: &mut Flushed,
    ) -> Result<Extents, ObjectError> {
        let chain = lock(&store.inner.tenants).chain(tenant).ok_or(StoreError::NotFound)?;
        let Some(root) = contents.settings.root else { return Ok(Extents { made, list: Vec::new() }) };
        let mut keys = vec![root];
        keys.extend(chain.keys(root, &contents.tokens));
        let source = Source { store, tenant, made, tokens: &contents.tokens, keys };
        let kept = old.and_then(|old| fitting(old, &contents.tokens));
        let kept = kept.filter(|old| same(&old.made, &made)).map_or(Vec::new(), |old| old.list);
        let kept = self.present(kept)?;
        let span = kept.first().map_or_else(|| source.span(self.options.extent_bytes), |entry| entry.span);
        let mut list = Vec::new();
        let mut under_way = VecDeque::new();
        for first in (0..source.len()).step_by(span.max(1) as usize).take_while(|_| span > 0) {
            let old = kept.iter().find(|old| (old.first, old.span) == (first, span));
            let entry = self.put_extent(&source, (first, span), old, &mut under_way)?;
            list.extend(entry);
            while under_way.len() >= self.options.transfers.max(1) {
                landed(&mut under_way, flushed)?;
            }
        }
        while !under_way.is_empty() {
            landed(&mut under_way, flushed)?;
        }
        Ok(Extents { made, list })
    }

    fn put_extent(
        &self,
        source: &Source<'_>,
        (first, span): (u32, u32),
        old: Option<&Entry>,
        under_way: &mut VecDeque<(Pending<()>, u64)>,
    ) -> Result<Option<Entry>, ObjectError> {
        let is_whole = |old: &&Entry| {
            let tokens = (u64::from(first) + u64::from(span)) * PAGE_TOKENS as u64;
            old.pages >= span.saturating_mul(source.made.groups.into()) && u64::from(old.tokens_end) == tokens
        };
        if let Some(old) = old.filter(is_whole) {
            return Ok(Some(*old));
        }
        let mut extent = Extent::new(self.options.level);
        let last = first.saturating_add(span).min(source.len());
        (first..last).for_each(|index| source.fill(index, &mut extent));
        let has_less = extent.pages() == 0 || old.is_some_and(|old| extent.pages() < old.pages);
        if has_less || extent.payload_bytes() as u64 > EXTENT_BYTES_MAX / 2 {
            return Ok(old.copied());
        }
        let stored = extent.encode();
        let (bytes, name) = (stored.len() as u64, *blake3::hash(&stored).as_bytes());
        let (tokens_end, pages) = (source.tokens_before(last), extent.pages());
        let entry = Entry { first, span, tokens_end, pages, bytes, name };
        // One that is there is written again when it is old, for it may be about to be collected.
        let young = |at_ms: i64| now_ms().saturating_sub(at_ms as u64) < self.options.grace_ms / 2;
        let there = self.link.start_head(entry.path()).wait()?;
        if !there.is_some_and(|there| there.size == bytes && young(there.last_modified.timestamp_millis())) {
            under_way.push_back((self.link.start_put(entry.path(), stored), bytes));
        }
        Ok(Some(entry))
    }

    /// Those of the extents that the tier still has.
    fn present(&self, mut extents: Vec<Entry>) -> Result<Vec<Entry>, ObjectError> {
        let mut found = Vec::new();
        for some in extents.chunks(HEADS) {
            let asked: Vec<_> = some.iter().map(|entry| self.link.start_head(entry.path())).collect();
            for (entry, head) in some.iter().zip(asked) {
                found.push(head.wait()?.is_some_and(|head| head.size == entry.bytes));
            }
        }
        let mut found = found.into_iter();
        extents.retain(|_| found.next().unwrap_or_default());
        Ok(extents)
    }
}

fn landed(under_way: &mut VecDeque<(Pending<()>, u64)>, flushed: &mut Flushed) -> Result<(), ObjectError> {
    if let Some((pending, bytes)) = under_way.pop_front() {
        pending.wait()?;
        flushed.extents_written += 1;
        flushed.bytes_written += bytes;
    }
    Ok(())
}

fn same(a: &ExportPages, b: &ExportPages) -> bool {
    (a.content, a.class, a.groups) == (b.content, b.class, b.groups)
}

/// The extents of `old` that hold pages of a session of these tokens.
fn fitting(old: &Contents, tokens: &[u32]) -> Option<Extents> {
    let alike = old.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
    let mut extents = old.extents.clone()?;
    extents.list.retain(|entry| entry.tokens_end as usize <= alike);
    Some(extents)
}

/// Removes a released session, unless it went on.
fn remove_unchanged(
    store: &Store,
    (tenant, id): (TenantId, SessionId),
    before: &Stamp,
) -> Result<(), ObjectError> {
    let inner = &*store.inner;
    let mut state = lock(&inner.state);
    let session = state.table.get(tenant, id).ok_or(StoreError::NotFound)?;
    let level = session.settings.durability;
    let now =
        Stamp { settings: session.settings.clone(), hash: session.hash(), turn_count: session.turn_count() };
    if now != *before || session.in_flight.is_some() {
        return Err(ObjectError::Changed);
    }
    let (_, lsn) = inner.record(&mut state, Whose { tenant, session: id }, Event::Delete, level)?;
    drop(state);
    if level >= Durability::Turn {
        inner.commit(lsn)?;
    }
    Ok(())
}
