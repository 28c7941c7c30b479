//! A store on a simulated disk, and pages whose bytes follow from their tokens.

use std::sync::Arc;

use mainstay_store::{
    Append, ClassId, Content, ContentId, Durability, Handed, Kind, MasterKey, Miss, Options, PAGE_TOKENS,
    PageHeader, PageKey, PageName, RecoveryReport, Root, SessionId, SessionInfo, Settings, Store, StoreError,
    Tenant,
    sim::{Random, SimClock, SimDisk, SimEntropy},
};

/// Bytes of a test page: less than a block, so that small stores stay small.
pub(crate) const PAGE_BYTES: usize = 500;

/// The defaults, with this binary's master key.
pub(crate) fn options() -> Options {
    Options { master_key: crate::MASTER.map(|byte| MasterKey::new([byte; 32])), ..Options::default() }
}

pub(crate) struct Rig {
    pub(crate) disk: SimDisk,
    pub(crate) clock: Arc<SimClock>,
    pub(crate) options: Options,
}

impl Rig {
    pub(crate) fn new(seed: u64) -> Self {
        let options = Options { threads: false, reserve_bytes: 0, ..options() };
        Self { disk: SimDisk::new(seed), clock: Arc::new(SimClock::new(1_700_000_000_000)), options }
    }

    pub(crate) fn try_open(&self) -> Result<(Store, RecoveryReport), StoreError> {
        // Another start draws other numbers.
        let entropy = Arc::new(SimEntropy::new(self.disk.calls()));
        Store::open(Arc::new(self.disk.clone()), self.clock.clone(), entropy, self.options.clone())
    }

    #[track_caller]
    pub(crate) fn open(&self) -> (Store, RecoveryReport) {
        self.try_open().unwrap()
    }
}

pub(crate) fn class() -> ClassId {
    ClassId::of(&[("path", b"test")])
}

pub(crate) fn content() -> ContentId {
    ContentId::of(&Content {
        weights_root: [1; 32],
        config_hash: [2; 32],
        kv_dtype: "f32",
        kv_scales_hash: [0; 32],
        payload_layout: b"test",
    })
}

pub(crate) fn root(tenant: &Tenant) -> PageKey {
    tenant.chain.root(&Root { content: content(), adapter: None, rope_table: 0, salt: b"" })
}

pub(crate) fn settings(tenant: &Tenant, durability: Durability) -> Settings {
    Settings { durability, root: Some(root(tenant)), model: "m".to_owned(), ..Settings::default() }
}

/// The headers of all pages of a sequence, the tail included.
pub(crate) fn headers(tenant: &Tenant, tokens: &[u32]) -> Vec<PageHeader> {
    headers_from(root(tenant), tenant, tokens)
}

/// The same, of a chain with this root.
pub(crate) fn headers_from(root: PageKey, tenant: &Tenant, tokens: &[u32]) -> Vec<PageHeader> {
    let mut parent = root;
    let page = |tokens: &[u32]| {
        let key = tenant.chain.next(parent, tokens, &[]);
        let name = PageName { tenant: tenant.id, key, class: class(), group: 0, kind: Kind::Attention };
        let header = PageHeader { name, content: content(), parent, tokens: tokens.to_vec() };
        parent = key;
        header
    };
    tokens.chunks(PAGE_TOKENS).map(page).collect()
}

/// What a device would have computed for a page: a function of all that comes before it.
pub(crate) fn payload(header: &PageHeader) -> Box<[u8]> {
    let seed = u64::from_le_bytes(header.name.key.0[..8].try_into().unwrap());
    let mut random = Random::new(seed);
    (0..PAGE_BYTES).map(|_| random.bits() as u8).collect()
}

/// Hands a page over as a device would.
pub(crate) fn hand(store: &Store, header: PageHeader) -> Handed {
    let bytes = payload(&header);
    let digest = *blake3::hash(&bytes).as_bytes();
    store.write(header, bytes, digest)
}

pub(crate) fn write_pages(store: &Store, tenant: &Tenant, tokens: &[u32]) {
    for header in headers(tenant, tokens) {
        assert_ne!(hand(store, header), Handed::Dropped);
    }
}

/// How many pages of a sequence can be read; those that can are right.
#[track_caller]
pub(crate) fn read_pages(store: &Store, tenant: &Tenant, tokens: &[u32]) -> usize {
    let all = headers(tenant, tokens);
    let hits = all.iter().filter(|header| match store.read(header) {
        Ok(page) => {
            assert_eq!(page[..], payload(header)[..], "a page was accepted whose bytes are not its own");
            assert_eq!(page.digest(), *blake3::hash(&page).as_bytes());
            true
        }
        Err(miss) => {
            assert_ne!(miss, Miss::Collision);
            false
        }
    });
    hits.count()
}

pub(crate) fn tokens(seed: u64, count: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.below(200_000) as u32).collect()
}

pub(crate) fn turn(store: &Store, tenant: &Tenant, id: SessionId, tokens: &[u32]) -> Result<u32, StoreError> {
    let append = Append { tokens: tokens.to_vec(), meta: b"meta".to_vec(), ..Append::default() };
    store.append_turn(tenant.id, id, append).map(|done| done.turn)
}

/// A session, its tokens, and its turns.
pub(crate) type View = (SessionInfo, Vec<u32>, Vec<(u32, Vec<u32>)>);

/// All of a session that a client can see.
pub(crate) fn view(store: &Store, tenant: &Tenant, id: SessionId) -> View {
    let turns = store.turns(tenant.id, id).unwrap();
    let turns = turns.iter().map(|turn| (turn.number, turn.tokens.clone())).collect();
    (store.get(tenant.id, id).unwrap(), store.tokens(tenant.id, id).unwrap(), turns)
}
