//! The object tier: sessions in an object store, from where another server opens them.
//!
//! A session is moved by flush, release and acquire. Numbered manifests, each made once and never changed, say who has
//! it; extents named by their bytes hold its pages. Whoever may write the object store is trusted with its pages, see
//! [`BundlePages`](crate::BundlePages).

mod acquire;
mod error;
mod extent;
mod flush;
mod keep;
mod link;
mod manifest;

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex},
};

use object_store::{ObjectStore, path::Path};

pub use self::{
    acquire::{Acquire, Acquired, Takeover},
    error::ObjectError,
    flush::Flushed,
    keep::{Collected, TierSession},
};
use self::{
    link::{Link, Put},
    manifest::{Contents, Head, MANIFEST_BYTES_MAX, Place, damaged, dir},
};
use crate::{
    event::SessionId,
    key::{TenantId, hex},
    pages::lock,
    store::Store,
};

/// Names a store, as the owner of sessions in the tier. It follows from the store's key, which it does not tell.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerId(pub [u8; 16]);

impl fmt::Display for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnerId({self})")
    }
}

impl Store {
    /// What this store is called as the owner of sessions in an object tier. A snapshot of it has the same name, so only
    /// one of the two may use the tier.
    pub fn owner_id(&self) -> OwnerId {
        let hash = blake3::derive_key("kvs1.owner", self.inner.pages.keys.store_key());
        OwnerId(*hash.first_chunk().expect("a hash has 32 bytes"))
    }
}

/// Whether a session may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// A store has it open.
    Held = 0,
    /// Whoever comes first may have it.
    Released = 1,
    /// It was removed; only this mark is left.
    Deleted = 2,
}

/// How the tier works.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectOptions {
    /// Bytes of pages in an extent, about.
    pub extent_bytes: usize,
    /// Level of zstd.
    pub level: i32,
    /// Extents on their way at a time.
    pub transfers: usize,
    /// A call that failed is tried again for so long; one that makes a manifest is two calls then.
    pub retry_ms: u64,
    /// Longest single try.
    pub request_ms: u64,
    /// Objects that nothing names are kept for so long.
    pub grace_ms: u64,
}

impl Default for ObjectOptions {
    fn default() -> Self {
        Self {
            extent_bytes: 32 << 20,
            level: 1,
            transfers: 4,
            retry_ms: 4_000,
            request_ms: 30_000,
            grace_ms: 24 * 60 * 60 * 1000,
        }
    }
}

/// Sessions in an object store. Its calls block; those on one session exclude each other, so a store uses one tier.
pub struct ObjectTier {
    link: Link,
    options: ObjectOptions,
    busy: Mutex<HashSet<(TenantId, SessionId)>>,
}

/// Ends the exclusion of other calls on a session.
struct Busy<'a> {
    tier: &'a ObjectTier,
    session: (TenantId, SessionId),
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        lock(&self.tier.busy).remove(&self.session);
    }
}

/// A name that must be there is gone again and again.
const MOVING: &str = "it is gone each time it is read";
/// How often a session's names are listed anew because what they named was gone.
const LISTS_MAX: usize = 4;

impl ObjectTier {
    /// The tier at an address: `file:///DIRECTORY`, `s3://BUCKET/PREFIX` with the usual `AWS_*` variables, or `memory:`.
    /// Two objects are made there and removed, to see that it makes no object twice.
    ///
    /// # Errors
    /// [`ObjectError::Address`], [`ObjectError::NotExclusive`], [`ObjectError::Remote`].
    pub fn open(url: &str, options: ObjectOptions) -> Result<Self, ObjectError> {
        let tier = Self::new(link::open(url, &options)?, options)?;
        tier.prove_exclusive()?;
        Ok(tier)
    }

    /// The tier in this object store.
    ///
    /// # Errors
    /// [`ObjectError::Address`] where the system has no thread for it.
    pub fn new(store: Arc<dyn ObjectStore>, options: ObjectOptions) -> Result<Self, ObjectError> {
        Ok(Self { link: Link::new(store)?, options, busy: Mutex::default() })
    }

    /// Makes an object twice and sees that the second time fails: ownership of sessions rests on this.
    ///
    /// # Errors
    /// [`ObjectError::NotExclusive`], [`ObjectError::Remote`].
    pub fn prove_exclusive(&self) -> Result<(), ObjectError> {
        let path = Path::from(format!("probe/{}", hex(&random()?)));
        let first = self.link.create(&path, b"first".to_vec())?;
        let second = self.link.create(&path, b"second".to_vec());
        self.link.delete(&path)?;
        match (first, second?) {
            (Put::Made, Put::Taken) => Ok(()),
            _ => Err(ObjectError::NotExclusive),
        }
    }

    fn begin(&self, tenant: TenantId, id: SessionId) -> Result<Busy<'_>, ObjectError> {
        let session = (tenant, id);
        if lock(&self.busy).insert(session) {
            Ok(Busy { tier: self, session })
        } else {
            Err(ObjectError::Busy)
        }
    }

    /// The numbers of a session's manifests, in order.
    fn places(&self, tenant: TenantId, id: SessionId) -> Result<Vec<Place>, ObjectError> {
        let objects = self.link.list(&dir(tenant, id))?;
        let mut places: Vec<_> =
            objects.iter().filter_map(|object| Place::parse(object.location.filename()?)).collect();
        places.sort_unstable();
        Ok(places)
    }

    /// Reads a manifest that is no claim; `None` where it is gone.
    fn manifest(
        &self,
        session: (TenantId, SessionId),
        place: Place,
    ) -> Result<Option<Contents>, ObjectError> {
        let path = Path::from(format!("{}/{place}", dir(session.0, session.1)));
        let Some(bytes) = self.link.get(&path, MANIFEST_BYTES_MAX)? else { return Ok(None) };
        let contents = manifest::decode(&bytes, (session.0, session.1, place));
        Ok(Some(contents.map_err(|e| damaged(&path, e))?))
    }

    /// The head of a manifest; `None` where it is gone.
    fn head(&self, session: (TenantId, SessionId), place: Place) -> Result<Option<Head>, ObjectError> {
        let path = Path::from(format!("{}/{place}", dir(session.0, session.1)));
        let Some(bytes) = self.link.get_range(&path, 0..manifest::BEGIN_BYTES)? else { return Ok(None) };
        let head = Head::read(&bytes, (session.0, session.1, place));
        Ok(Some(head.map_err(|e| damaged(&path, e))?))
    }

    /// Who has a session: the head of its newest manifest; `None` where the tier does not know it.
    fn newest(&self, tenant: TenantId, id: SessionId) -> Result<Option<Head>, ObjectError> {
        for _ in 0..LISTS_MAX {
            let Some(&last) = self.places(tenant, id)?.last() else { return Ok(None) };
            // An owner removes old manifests after it made a newer one.
            if let Some(head) = self.head((tenant, id), last)? {
                return Ok(Some(head));
            }
        }
        Err(ObjectError::Damaged { path: dir(tenant, id), what: MOVING.to_owned() })
    }

    /// The session as its newest manifest that is no claim has it.
    fn newest_contents(&self, tenant: TenantId, id: SessionId) -> Result<Option<Contents>, ObjectError> {
        for _ in 0..LISTS_MAX {
            let places = self.places(tenant, id)?;
            let Some(&last) = places.iter().rfind(|place| !place.is_claim()) else { return Ok(None) };
            if let Some(contents) = self.manifest((tenant, id), last)? {
                return Ok(Some(contents));
            }
        }
        Err(ObjectError::Damaged { path: dir(tenant, id), what: MOVING.to_owned() })
    }

    /// Takes the next epoch. False where another store was faster.
    fn claim(
        &self,
        (tenant, id): (TenantId, SessionId),
        epoch: u32,
        (owner, state): (OwnerId, State),
    ) -> Result<bool, ObjectError> {
        let head = new_head((tenant, id), Place { epoch, number: 0 }, (owner, state))?;
        let bytes = manifest::encode(&head, None)?;
        Ok(self.link.create(&head.path(), bytes)? == Put::Made)
    }
}

fn new_head(
    (tenant, id): (TenantId, SessionId),
    place: Place,
    (owner, state): (OwnerId, State),
) -> Result<Head, ObjectError> {
    Ok(Head { tenant, id, place, owner, state, at_ms: now_ms(), nonce: random()? })
}

/// An epoch or number after another.
fn after(number: u32) -> Result<u32, ObjectError> {
    let what = "its numbers are used up".to_owned();
    number.checked_add(1).ok_or(ObjectError::Damaged { path: "session".to_owned(), what })
}

fn random() -> Result<[u8; 16], ObjectError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| ObjectError::Address(format!("no randomness: {e}")))?;
    Ok(bytes)
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}
