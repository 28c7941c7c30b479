//! Opening a session of the tier in this store.

use std::{collections::VecDeque, time::Duration};

use crate::{
    api::SessionInfo,
    bundle::{BundlePages, ImportAs},
    error::StoreError,
    event::SessionId,
    key::{ContentId, PAGE_TOKENS, PageKey, TenantId},
    object::{
        ObjectError, ObjectTier, OwnerId, State, after,
        extent::{self, Described, EXTENT_BYTES_MAX},
        manifest::{Contents, Entry, Extents, Head, Place},
    },
    pages::Handed,
    record::{Kind, PageHeader, PageName},
    store::Store,
    tenant::Tenant,
};

/// How long a page waits for room in the ring.
const ROOM: Duration = Duration::from_secs(5);

/// Whether a session that another store holds may be taken from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Takeover {
    /// Only a released one is taken.
    #[default]
    No,
    /// The holder is fenced: what it did not flush before this call is not in the session, and its next flush fails.
    Yes,
}

/// How a session is acquired.
#[derive(Clone, Copy, Debug)]
pub struct Acquire {
    /// What to do with its pages.
    pub pages: BundlePages,
    /// What to do if it is held.
    pub takeover: Takeover,
}

/// A session that this store now has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquired {
    /// It, under the id it had.
    pub session: SessionInfo,
    /// The number of this store's ownership.
    pub epoch: u32,
    /// Pages that came along, or that this store had.
    pub pages: u32,
    /// Pages that did not: of other content, damaged, or no room. They are computed again.
    pub pages_missed: u32,
}

/// What the local store has under the id.
enum Local {
    None,
    /// Nothing that the tier has not.
    Less,
    Other,
}

fn local(store: &Store, tenant: TenantId, contents: &Contents) -> Result<Local, ObjectError> {
    let id = contents.id;
    match store.get(tenant, id) {
        Err(StoreError::NotFound) => Ok(Local::None),
        Err(e) => Err(e.into()),
        Ok(info) if info.in_flight => Ok(Local::Other),
        Ok(_) if contents.tokens.starts_with(&store.tokens(tenant, id)?) => Ok(Local::Less),
        Ok(_) => Ok(Local::Other),
    }
}

impl ObjectTier {
    /// Takes a session that was released, under the id it had, with its pages where they are of this engine's content:
    /// they are named anew under this store's secret. One that this store holds itself, as after a crash, is given as it
    /// is, or read again where it is not here or lost turns.
    ///
    /// # Errors
    /// [`ObjectError::NotFound`], [`ObjectError::Held`], [`ObjectError::Lost`], [`ObjectError::Exists`],
    /// [`ObjectError::Damaged`], [`ObjectError::Remote`]; [`ObjectError::Store`] where it could not be read in: it is
    /// then free in the tier again.
    pub fn acquire(
        &self,
        store: &Store,
        tenant: &Tenant,
        id: SessionId,
        how: Acquire,
    ) -> Result<Acquired, ObjectError> {
        let _busy = self.begin(tenant.id, id)?;
        let own = store.owner_id();
        let newest = self.newest(tenant.id, id)?.ok_or(ObjectError::NotFound)?;
        let is_own = newest.owner == own && newest.state == State::Held;
        if let State::Deleted = newest.state {
            return Err(ObjectError::NotFound);
        }
        if newest.state == State::Held && !is_own && how.takeover == Takeover::No {
            return Err(ObjectError::Held { owner: newest.owner });
        }
        let here = store.get(tenant.id, id).ok().filter(|_| is_own);
        let as_it_is =
            |session| Ok(Acquired { session, epoch: newest.place.epoch, pages: 0, pages_missed: 0 });
        if let Some(session) = here.clone().filter(|here| !here.is_damaged) {
            return as_it_is(session);
        }
        // What cannot be read is not claimed.
        let contents = self.contents(tenant.id, id)?;
        if let Local::Other = local(store, tenant.id, &contents)? {
            // A damaged one may have what the tier has not.
            return here.map_or(Err(ObjectError::Exists), as_it_is);
        }
        let (place, contents) = match is_own {
            true => (newest.place, contents),
            false => self.fence(&newest, own)?,
        };
        self.take(store, tenant, &contents, how.pages).map_or_else(
            |e| Err(self.give_back((tenant.id, id), place, (own, &contents), e)),
            |(session, pages, pages_missed)| {
                Ok(Acquired { session, epoch: place.epoch, pages, pages_missed })
            },
        )
    }

    fn contents(&self, tenant: TenantId, id: SessionId) -> Result<Contents, ObjectError> {
        self.newest_contents(tenant, id)?.ok_or(ObjectError::NotFound)
    }

    /// Takes the epoch after `newest`. What the owner before wrote until then is read after, so nothing that it was told
    /// to be in the tier is left out: a flush looks for a newer epoch after its manifest.
    fn fence(&self, newest: &Head, own: OwnerId) -> Result<(Place, Contents), ObjectError> {
        let session = (newest.tenant, newest.id);
        let place = Place { epoch: after(newest.place.epoch)?, number: 0 };
        if !self.claim(session, place.epoch, (own, State::Held))? {
            return Err(ObjectError::Lost);
        }
        let last = self.newest(session.0, session.1)?.ok_or(ObjectError::Lost)?;
        if last.place > place {
            return Err(ObjectError::Lost);
        }
        Ok((place, self.contents(session.0, session.1)?))
    }

    /// Frees a session that could not be read in; the error to tell.
    fn give_back(
        &self,
        session: (TenantId, SessionId),
        place: Place,
        (own, contents): (OwnerId, &Contents),
        error: ObjectError,
    ) -> ObjectError {
        let Ok(number) = after(place.number) else { return error };
        // Where this fails too, this store still has the session, and may acquire it again.
        let _ = self.put_manifest(session, Place { number, ..place }, (own, State::Released), contents);
        error
    }

    /// Reads a session into the store; it, pages that came along, and pages that did not.
    fn take(
        &self,
        store: &Store,
        tenant: &Tenant,
        contents: &Contents,
        pages: BundlePages,
    ) -> Result<(SessionInfo, u32, u32), ObjectError> {
        let id = contents.id;
        match local(store, tenant.id, contents)? {
            Local::None => {}
            Local::Less => store.delete(tenant.id, id)?,
            Local::Other => return Err(ObjectError::Exists),
        }
        let wanted = contents.extents.as_ref().and_then(|extents| {
            let content = extents.made.content;
            let root = pages.root_of(content)?;
            Some((Naming::new(tenant, (content, root), &contents.tokens), extents))
        });
        let listed = contents.extents.iter().flat_map(|extents| &extents.list).map(|entry| entry.pages);
        let listed = listed.fold(0, u32::saturating_add);
        let came = wanted.map_or(0, |(naming, extents)| self.take_pages(store, &naming, extents));
        let bundle = contents.bundle()?;
        let import = |name| store.import(tenant, &mut &bundle[..], ImportAs { id: Some(id), name }, pages);
        let imported = match import(contents.settings.name.clone()) {
            // Another session has the name by now.
            Err(StoreError::NameTaken(_)) => import(None),
            imported => imported,
        };
        Ok((imported?.session, came, listed.saturating_sub(came)))
    }

    /// Reads the extents that are not here and hands their pages to the store; how many pages it has then. An extent that
    /// is gone is passed over, and one that is damaged is removed, so that the next flush writes it anew; after an error
    /// of the object store no more are asked for.
    fn take_pages(&self, store: &Store, naming: &Naming<'_>, extents: &Extents) -> u32 {
        let (mut came, mut under_way) = (0, VecDeque::new());
        let mut left = extents.list.iter();
        loop {
            while under_way.len() < self.options.transfers.max(1) {
                let Some(entry) = left.next() else { break };
                if naming.has_all(store, extents, entry) {
                    came += entry.pages;
                    continue;
                }
                let pending = self.link.start_get(entry.path(), entry.bytes.min(EXTENT_BYTES_MAX));
                under_way.push_back((entry, pending));
            }
            let Some((entry, pending)) = under_way.pop_front() else { return came };
            match pending.wait() {
                Ok(Some(Ok(bytes))) if blake3::hash(&bytes) == entry.name => {
                    came += naming.write(store, entry, &bytes);
                }
                // It is a miss, whether it can be removed or not.
                Ok(Some(_)) => drop(self.link.delete(&entry.path())),
                Ok(None) => {}
                Err(_) => left = [].iter(),
            }
        }
    }
}

/// Names the pages of a session as this store names them.
struct Naming<'a> {
    tenant: &'a Tenant,
    content: ContentId,
    tokens: &'a [u32],
    /// The root before the first.
    keys: Vec<PageKey>,
}

impl<'a> Naming<'a> {
    fn new(tenant: &'a Tenant, (content, root): (ContentId, PageKey), tokens: &'a [u32]) -> Self {
        let mut keys = vec![root];
        keys.extend(tenant.chain.keys(root, tokens));
        Self { tenant, content, tokens, keys }
    }

    /// Whether the store has as many pages of an extent as it holds, as where it released the session itself.
    fn has_all(&self, store: &Store, extents: &Extents, entry: &Entry) -> bool {
        let keys = self.keys.iter().skip(entry.first as usize + 1).take(entry.span as usize);
        let mut found = 0;
        for &key in keys {
            for group in 0..extents.made.groups {
                let (tenant, class) = (self.tenant.id, extents.made.class);
                found += [Kind::Attention, Kind::State]
                    .into_iter()
                    .filter(|&kind| store.contains(&PageName { tenant, key, class, group, kind }))
                    .count();
            }
        }
        found >= entry.pages as usize
    }

    /// Hands the pages of an extent to the store, those of other places passed over; how many it took.
    fn write(&self, store: &Store, entry: &Entry, bytes: &[u8]) -> u32 {
        let Ok(pages) = extent::decode(bytes, &entry.name) else { return 0 };
        let (mut came, last) = (0, entry.first.saturating_add(entry.span));
        for (page, payload) in pages {
            if !(entry.first..last).contains(&page.index) {
                continue;
            }
            let Some(header) = self.header(&page) else { continue };
            let digest = page.digest;
            if store.write_patiently(header, payload, digest, ROOM) != Handed::Dropped {
                came += 1;
            }
        }
        came
    }

    fn header(&self, page: &Described) -> Option<PageHeader> {
        let index = page.index as usize;
        let all = self.tokens.chunks(PAGE_TOKENS).nth(index)?;
        let (parent, tokens) = (self.keys[index], all.get(..usize::from(page.len))?.to_vec());
        let key = self.tenant.chain.next(parent, &tokens, &[]);
        let (tenant, class, group, kind) = (self.tenant.id, page.class, page.group, page.kind);
        let name = PageName { tenant, key, class, group, kind };
        Some(PageHeader { name, content: self.content, parent, tokens })
    }
}
