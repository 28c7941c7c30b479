//! Looking after the tier: what sessions it has, removing them, and removing what nothing names.

use std::collections::{BTreeMap, HashSet};

use object_store::{ObjectMeta, path::Path};

use crate::{
    event::SessionId,
    key::{TenantId, hex},
    object::{
        ObjectError, ObjectTier, OwnerId, State, Takeover, after,
        manifest::{Place, dir},
        now_ms,
    },
    store::Store,
};

/// A session in the tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierSession {
    /// Its id.
    pub id: SessionId,
    /// Whether it may be taken.
    pub state: State,
    /// Who has it, or had it last.
    pub owner: OwnerId,
    /// The number of that ownership.
    pub epoch: u32,
    /// When its newest manifest was made, milliseconds since 1970 on that owner's clock.
    pub at_ms: u64,
}

/// What a collection removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Extents that are named or young.
    pub kept: u32,
    /// Extents removed.
    pub removed: u32,
    /// Their bytes.
    pub removed_bytes: u64,
    /// Marks of deleted sessions that were removed.
    pub marks: u32,
}

/// Manifests by tenant and session.
type Listed = BTreeMap<(TenantId, SessionId), Vec<Place>>;

fn parse(location: &Path) -> Option<((TenantId, SessionId), Place)> {
    let parts: Vec<_> = location.parts().collect();
    let [_, tenant, id, place] = parts.as_slice() else { return None };
    let id: SessionId = id.as_ref().parse().ok()?;
    let text = tenant.as_ref();
    let byte = |at: usize| u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok();
    let bytes: Vec<u8> = (0..16).map_while(byte).collect();
    let tenant = TenantId(bytes.try_into().ok()?);
    (hex(&tenant.0) == text).then_some(((tenant, id), Place::parse(place.as_ref())?))
}

impl ObjectTier {
    fn listed(&self, prefix: &str) -> Result<Listed, ObjectError> {
        let mut listed = Listed::new();
        for object in self.link.list(prefix)? {
            if let Some((session, place)) = parse(&object.location) {
                listed.entry(session).or_default().push(place);
            }
        }
        Ok(listed)
    }

    /// The sessions of a tenant, oldest first.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`] for the first manifest that is, or [`ObjectError::Remote`].
    pub fn list(&self, tenant: TenantId) -> Result<Vec<TierSession>, ObjectError> {
        let mut sessions = Vec::new();
        for ((_, id), places) in self.listed(&format!("session/{}", hex(&tenant.0)))? {
            let last = places.into_iter().max();
            let head = last.map_or(Ok(None), |last| self.head((tenant, id), last))?;
            // It is gone where its owner just made a newer one.
            let Some(head) = head.map_or_else(|| self.newest(tenant, id), |head| Ok(Some(head)))? else {
                continue;
            };
            if head.state != State::Deleted {
                let (state, owner, epoch, at_ms) = (head.state, head.owner, head.place.epoch, head.at_ms);
                sessions.push(TierSession { id, state, owner, epoch, at_ms });
            }
        }
        Ok(sessions)
    }

    /// Removes a session from the tier, but for a mark by which a store that still has it finds out. The store's own copy
    /// is not touched.
    ///
    /// # Errors
    /// [`ObjectError::NotFound`], [`ObjectError::Held`] where another store has it and `takeover` is no,
    /// [`ObjectError::Lost`], [`ObjectError::Busy`], [`ObjectError::Remote`].
    pub fn delete(
        &self,
        store: &Store,
        tenant: TenantId,
        id: SessionId,
        takeover: Takeover,
    ) -> Result<(), ObjectError> {
        let _busy = self.begin(tenant, id)?;
        let own = store.owner_id();
        let newest = self.newest(tenant, id)?.ok_or(ObjectError::NotFound)?;
        match newest.state {
            State::Deleted => return Err(ObjectError::NotFound),
            State::Held if newest.owner != own && takeover == Takeover::No => {
                return Err(ObjectError::Held { owner: newest.owner });
            }
            State::Held | State::Released => {}
        }
        let mark = Place { epoch: after(newest.place.epoch)?, number: 0 };
        if !self.claim((tenant, id), mark.epoch, (own, State::Deleted))? {
            return Err(ObjectError::Lost);
        }
        for place in self.places(tenant, id)?.into_iter().filter(|&place| place < mark) {
            self.link.delete(&Path::from(format!("{}/{place}", dir(tenant, id))))?;
        }
        Ok(())
    }

    /// Removes extents that no manifest names, and marks of deleted sessions, once they are older than the grace period.
    /// It may run beside everything else.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`] where a manifest cannot be read, for what it names is not known: nothing is removed.
    /// [`ObjectError::Remote`].
    pub fn collect(&self) -> Result<Collected, ObjectError> {
        // Extents first: what is put from now on is no candidate.
        let extents = self.link.list("extent")?;
        let mut named = HashSet::new();
        let mut marks = Vec::new();
        for (session, places) in self.listed("session")? {
            self.names(session, &places, &mut named)?;
            if let [mark] = places[..] {
                marks.push((session, mark));
            }
        }
        let mut collected = Collected::default();
        for object in extents {
            let path = object.location.clone();
            let is_named = path.filename().is_some_and(|name| named.contains(name));
            // A flush that found it may have put it again since.
            let still_is = || self.link.start_head(path.clone()).wait();
            let is_old = !is_named && self.is_old(&object) && still_is()?.is_some_and(|o| self.is_old(&o));
            if !is_old {
                collected.kept += 1;
                continue;
            }
            self.link.delete(&path)?;
            collected.removed += 1;
            collected.removed_bytes += object.size;
        }
        for (session, mark) in marks {
            let Some(head) = self.head(session, mark)? else { continue };
            if head.state == State::Deleted && now_ms().saturating_sub(head.at_ms) >= self.options.grace_ms {
                self.link.delete(&head.path())?;
                collected.marks += 1;
            }
        }
        Ok(collected)
    }

    fn is_old(&self, object: &ObjectMeta) -> bool {
        let at_ms = u64::try_from(object.last_modified.timestamp_millis()).unwrap_or(u64::MAX);
        now_ms().saturating_sub(at_ms) >= self.options.grace_ms
    }

    /// Adds what the manifests of a session name.
    fn names(
        &self,
        session: (TenantId, SessionId),
        places: &[Place],
        named: &mut HashSet<String>,
    ) -> Result<(), ObjectError> {
        for &place in places.iter().filter(|place| !place.is_claim()) {
            let contents = match self.manifest(session, place)? {
                Some(contents) => contents,
                // Pruned meanwhile: a newer one has what is left of it.
                None => match self.newest_contents(session.0, session.1)? {
                    Some(newest) => newest,
                    None => continue,
                },
            };
            named.extend(
                contents.extents.iter().flat_map(|extents| &extents.list).map(|entry| hex(&entry.name)),
            );
        }
        Ok(())
    }
}
