//! Keys of a store: tags that prove who wrote a record and, with a master key, seals that nobody else can open.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce as GcmNonce, UnboundKey};
use zeroize::Zeroize;

use crate::{
    disk::Entropy,
    key::{TenantId, TenantSecret, hex},
    wire::{Malformed, Reader},
};

/// Proves that this store wrote a record: bytes of a payload cannot pass for one, whoever chose them.
pub(crate) type StoreKey = [u8; 32];
/// A keyed hash, cut.
pub(crate) type Tag = [u8; TAG_BYTES];
pub(crate) const TAG_BYTES: usize = 16;

/// A message's own number, never drawn twice: 192 random bits.
pub(crate) type Nonce = [u8; NONCE_BYTES];
const NONCE_BYTES: usize = 24;
/// What AES-GCM puts beside a message.
pub(crate) type GcmTag = [u8; GCM_TAG_BYTES];
const GCM_TAG_BYTES: usize = 16;
/// How much longer a sealed message is.
pub(crate) const SEAL_BYTES: usize = NONCE_BYTES + GCM_TAG_BYTES;

/// As given.
pub(crate) const CODEC_PLAIN: u8 = 0;
/// Sealed.
pub(crate) const CODEC_SEALED: u8 = 1;

/// What a message is: seals of one kind do not pass for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Purpose {
    Config = 1,
    Tenant = 2,
    PageHeader = 3,
    PagePayload = 4,
    SegmentIndex = 5,
    JournalEntry = 6,
}

/// The operator's key, under which those of the tenants are kept. It is never on disk.
#[derive(Clone)]
pub struct MasterKey([u8; 32]);

impl MasterKey {
    /// The key of these bytes: 256 random bits.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Tells keys apart and says nothing else of them: it may be shown and is on disk.
    pub fn id(&self) -> [u8; 8] {
        *blake3::derive_key("kvs1.master.id", &self.0).first_chunk().expect("a hash has 32 bytes")
    }
}

impl PartialEq for MasterKey {
    fn eq(&self, other: &Self) -> bool {
        // Not byte by byte, which would take longer the more of a guess is right.
        blake3::hash(&self.0) == blake3::hash(&other.0)
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({})", hex(&self.id()))
    }
}

impl Drop for MasterKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Seals messages under AES-256-GCM with a key of their own, a hash of this one and the message's random number: so
/// neither a count of messages nor a directory that was copied or put back can use a key and nonce twice.
#[derive(Clone)]
pub(crate) struct SealKey([u8; 32]);

impl Drop for SealKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl SealKey {
    pub(crate) fn of_master(master: &MasterKey) -> Self {
        Self(blake3::derive_key("kvs1.master", &master.0))
    }

    /// The key of a tenant's data follows from its secret: one file to lose, and names and bytes go together.
    pub(crate) fn of_tenant(secret: &TenantSecret) -> Self {
        Self(blake3::derive_key("kvs1.data", &secret.0))
    }

    fn of_message(&self, purpose: Purpose, nonce: &Nonce) -> LessSafeKey {
        let mut message = [0; 1 + NONCE_BYTES];
        message[0] = purpose as u8;
        message[1..].copy_from_slice(nonce);
        let key = blake3::keyed_hash(&self.0, &message);
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_bytes()).expect("a hash is as long as a key"))
    }

    /// Seals `bytes` where they are.
    pub(crate) fn seal_in_place(
        &self,
        purpose: Purpose,
        nonce: &Nonce,
        aad: &[u8],
        bytes: &mut [u8],
    ) -> GcmTag {
        let key = self.of_message(purpose, nonce);
        let sealed = key.seal_in_place_separate_tag(zero_nonce(), Aad::from(aad), bytes);
        let tag = sealed.expect("a message is shorter than 64 GiB");
        tag.as_ref().try_into().expect("a tag of AES-GCM has 16 bytes")
    }

    /// Opens `bytes` where they are. `None` where they were sealed by another key, or beside other `aad`.
    pub(crate) fn open_in_place(
        &self,
        purpose: Purpose,
        (nonce, tag): (&Nonce, &GcmTag),
        aad: &[u8],
        bytes: &mut [u8],
    ) -> Option<()> {
        let key = self.of_message(purpose, nonce);
        key.open_in_place_separate_tag(zero_nonce(), Aad::from(aad), tag, bytes).ok().map(|_| ())
    }

    /// Nonce, sealed bytes and tag.
    pub(crate) fn seal(&self, purpose: Purpose, nonce: &Nonce, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(plain.len() + SEAL_BYTES);
        out.extend_from_slice(nonce);
        out.extend_from_slice(plain);
        let tag = self.seal_in_place(purpose, nonce, aad, &mut out[NONCE_BYTES..]);
        out.extend_from_slice(&tag);
        out
    }

    /// Undoes [`SealKey::seal`].
    pub(crate) fn open(&self, purpose: Purpose, aad: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, rest) = sealed.split_first_chunk()?;
        let (bytes, tag) = rest.split_last_chunk()?;
        let mut plain = bytes.to_vec();
        self.open_in_place(purpose, (nonce, tag), aad, &mut plain)?;
        Some(plain)
    }
}

/// A message's key is used once.
fn zero_nonce() -> GcmNonce {
    GcmNonce::assume_unique_for_key([0; NONCE_LEN])
}

/// The keys of a store that is open.
pub(crate) struct Keys {
    store: StoreKey,
    entropy: Arc<dyn Entropy>,
    /// Where there is a master key: it, and the keys of the tenants.
    seals: Option<(SealKey, RwLock<HashMap<TenantId, SealKey>>)>,
}

impl Keys {
    pub(crate) fn new(store: StoreKey, entropy: Arc<dyn Entropy>, master: Option<SealKey>) -> Self {
        Self { store, entropy, seals: master.map(|key| (key, RwLock::default())) }
    }

    /// Random and of this store alone.
    pub(crate) fn store_key(&self) -> &StoreKey {
        &self.store
    }

    /// The codec of everything that tells of a prompt.
    pub(crate) fn codec(&self) -> u8 {
        if self.seals() { CODEC_SEALED } else { CODEC_PLAIN }
    }

    /// Whether there is a master key.
    pub(crate) fn seals(&self) -> bool {
        self.seals.is_some()
    }

    pub(crate) fn entropy(&self) -> &dyn Entropy {
        &*self.entropy
    }

    pub(crate) fn nonce(&self) -> Nonce {
        let mut nonce = [0; NONCE_BYTES];
        self.entropy.fill(&mut nonce);
        nonce
    }

    /// 128 bits of BLAKE3 under the store's key.
    pub(crate) fn tag(&self, bytes: &[u8]) -> Tag {
        *blake3::keyed_hash(&self.store, bytes).as_bytes().first_chunk().expect("a hash has 32 bytes")
    }

    pub(crate) fn learn(&self, tenant: TenantId, secret: &TenantSecret) {
        if let Some((_, tenants)) = &self.seals {
            let mut tenants = tenants.write().unwrap_or_else(PoisonError::into_inner);
            tenants.insert(tenant, SealKey::of_tenant(secret));
        }
    }

    pub(crate) fn forget(&self, tenant: TenantId) {
        if let Some((_, tenants)) = &self.seals {
            tenants.write().unwrap_or_else(PoisonError::into_inner).remove(&tenant);
        }
    }

    /// Seals under the master key, where there is one.
    pub(crate) fn wrap(&self, purpose: Purpose, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        match &self.seals {
            Some((master, _)) => master.seal(purpose, &self.nonce(), aad, plain),
            None => plain.to_vec(),
        }
    }

    /// Undoes [`Keys::wrap`].
    pub(crate) fn unwrap(&self, purpose: Purpose, aad: &[u8], stored: &[u8]) -> Option<Vec<u8>> {
        match &self.seals {
            Some((master, _)) => master.open(purpose, aad, stored),
            None => Some(stored.to_vec()),
        }
    }

    /// The key of a tenant's data: the inner is `None` in a store that does not seal, the outer where the tenant is
    /// gone.
    pub(crate) fn of(&self, tenant: TenantId) -> Option<Option<SealKey>> {
        let Some((_, tenants)) = &self.seals else { return Some(None) };
        let tenants = tenants.read().unwrap_or_else(PoisonError::into_inner);
        tenants.get(&tenant).cloned().map(Some)
    }

    /// Seals under a tenant's key, where the store does; `None` where the tenant is gone.
    pub(crate) fn seal(
        &self,
        tenant: TenantId,
        purpose: Purpose,
        aad: &[u8],
        plain: Vec<u8>,
    ) -> Option<Vec<u8>> {
        Some(match self.of(tenant)? {
            Some(key) => key.seal(purpose, &self.nonce(), aad, &plain),
            None => plain,
        })
    }

    /// Undoes [`Keys::seal`]; `None` where the key is gone.
    pub(crate) fn open<'a>(
        &self,
        tenant: TenantId,
        purpose: Purpose,
        aad: &[u8],
        stored: &'a [u8],
    ) -> Option<Cow<'a, [u8]>> {
        match self.of(tenant)? {
            Some(key) => key.open(purpose, aad, stored).map(Cow::Owned),
            None => Some(Cow::Borrowed(stored)),
        }
    }
}

/// The nonce that a sealed message begins with.
pub(crate) fn nonce_of(sealed: &[u8]) -> Result<Nonce, Malformed> {
    Reader::new(sealed, "seal").array()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sim::SimEntropy;

    pub(crate) const TENANT: TenantId = TenantId([1; 16]);

    /// The keys of a store that knows one tenant.
    pub(crate) fn keys(store: u8, master: Option<u8>) -> Keys {
        let master = master.map(|byte| SealKey::of_master(&MasterKey::new([byte; 32])));
        let keys = Keys::new([store; 32], Arc::new(SimEntropy::new(1)), master);
        keys.learn(TENANT, &TenantSecret([2; 32]));
        keys
    }

    #[test]
    fn a_seal_opens_for_its_key_purpose_and_place_alone() {
        let keys = keys(1, Some(3));
        let plain = b"a prompt".to_vec();
        let sealed = keys.seal(TENANT, Purpose::JournalEntry, b"here", plain.clone()).unwrap();
        let open = |keys: &Keys, tenant, purpose, aad: &[u8], sealed: &[u8]| {
            keys.open(tenant, purpose, aad, sealed).map(Cow::into_owned)
        };
        assert_eq!(open(&keys, TENANT, Purpose::JournalEntry, b"here", &sealed), Some(plain.clone()));
        assert_eq!(open(&keys, TENANT, Purpose::PageHeader, b"here", &sealed), None);
        assert_eq!(open(&keys, TENANT, Purpose::JournalEntry, b"there", &sealed), None);
        for at in 0..sealed.len() {
            let mut flipped = sealed.clone();
            flipped[at] ^= 1;
            assert_eq!(open(&keys, TENANT, Purpose::JournalEntry, b"here", &flipped), None, "byte {at}");
            assert_eq!(open(&keys, TENANT, Purpose::JournalEntry, b"here", &sealed[..at]), None, "cut {at}");
        }
        let again = keys.seal(TENANT, Purpose::JournalEntry, b"here", plain.clone()).unwrap();
        assert!(again[NONCE_BYTES..] != sealed[NONCE_BYTES..], "each message has a key of its own");
        keys.learn(TENANT, &TenantSecret([4; 32]));
        assert_eq!(open(&keys, TENANT, Purpose::JournalEntry, b"here", &sealed), None, "another secret");
        keys.forget(TENANT);
        assert_eq!(open(&keys, TENANT, Purpose::JournalEntry, b"here", &again), None, "no secret");
        assert_eq!(keys.seal(TENANT, Purpose::JournalEntry, b"here", plain), None);
    }

    #[test]
    fn a_master_key_is_never_shown() {
        let key = MasterKey::new([0xab; 32]);
        let shown =
            format!("{key:?} {:?}", crate::Options { master_key: Some(key.clone()), ..Default::default() });
        assert!(!shown.contains("abab") && !shown.contains("171, 171"), "{shown}");
        assert!(key == MasterKey::new([0xab; 32]) && key != MasterKey::new([0xac; 32]));
        assert_ne!(key.id(), MasterKey::new([0xac; 32]).id());
    }
}
