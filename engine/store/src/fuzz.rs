//! Entrances for fuzzers: each takes any bytes, gives them the tags and hashes that would keep them out, and panics where
//! a parser accepts what it does not write. Not for use.

use std::sync::Arc;

use crate::{
    BundlePages, ContentId, ImportAs, Options, PageKey, Store,
    aligned::BLOCK,
    event::{Event, SessionId, Whose},
    journal::{self, Piece},
    key::{PAGE_TOKENS, TenantId, TenantSecret},
    record::Record,
    seal::{Keys, TAG_BYTES},
    segment::Segment,
    session::Table,
    sim::{SimClock, SimDisk, SimEntropy},
    twin::preamble,
    wire::Reader,
};

const TENANT: TenantId = TenantId([1; 16]);
/// Shortest payload that is cut off the input.
const LEN_BYTES: usize = 2;

fn keys() -> Keys {
    let keys = Keys::new([1; 32], Arc::new(SimEntropy::new(1)), None);
    keys.learn(TENANT, &TenantSecret([2; 32]));
    keys
}

/// The input as pieces: a byte, and bytes as many as the two behind it say.
fn pieces(data: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut reader = Reader::new(data, "input");
    std::iter::from_fn(move || {
        let (kind, len) = (reader.u8().ok()?, usize::from(reader.u16().ok()?));
        let len = len.min(reader.len());
        Some((kind, reader.raw(len).ok()?))
    })
}

/// Puts a piece where [`journal`] and [`bundle`] find it.
pub fn piece(kind: u8, payload: &[u8]) -> Vec<u8> {
    let len = payload.len().min(usize::from(u16::MAX));
    let mut out = Vec::with_capacity(1 + LEN_BYTES + len);
    out.push(kind);
    out.extend_from_slice(&(len as u16).to_le_bytes());
    out.extend_from_slice(&payload[..len]);
    out
}

/// A journal entry's payload behind its kind. True where it is one.
pub fn event(data: &[u8]) -> bool {
    let Some((&kind, payload)) = data.split_first() else { return false };
    let Ok(event) = Event::decode(kind, payload) else { return false };
    assert_eq!((event.kind(), &*event.encode()), (kind, payload), "an entry has one form");
    true
}

/// A journal file of entries with these payloads, replayed; how many were applied.
pub fn journal(data: &[u8]) -> usize {
    let keys = keys();
    let (mut bytes, mut before) = (preamble(journal::MAGIC).to_vec(), [0; TAG_BYTES]);
    for (lsn, (kind, payload)) in (1..).zip(pieces(data)) {
        let whose = Whose { tenant: TENANT, session: SessionId(u128::from(kind >> 5)) };
        let (entry, tag) = journal::encode_raw(&keys, (lsn, before), whose, (kind & 31, payload));
        bytes.extend(entry);
        before = tag;
    }
    let (mut table, mut applied) = (Table::default(), 0);
    for piece in journal::scan(&bytes, &keys) {
        if let Piece::Entry(entry) = piece {
            applied += usize::from(table.apply(entry.lsn, entry.session, entry.event).is_ok());
        }
    }
    table.end_replay();
    let base = table.entries();
    let mut again = Table::default();
    for (whose, event) in base.clone() {
        // Sessions made of turns that do not fit are told, and may be rejected again.
        let _ = again.apply(0, whose.session, event);
    }
    again.end_replay();
    assert!(again.len() <= table.len(), "{} sessions of {}", again.len(), table.len());
    // As it comes from a disk that lies.
    let _ = journal::scan(data, &keys);
    applied
}

/// A page's header. True where it is one.
pub fn record(data: &[u8]) -> bool {
    let keys = keys();
    let mut block = [0; BLOCK];
    let len = data.len().min(BLOCK - TAG_BYTES);
    block[..len].copy_from_slice(&data[..len]);
    let tag = keys.tag(&block[..BLOCK - TAG_BYTES]);
    block[BLOCK - TAG_BYTES..].copy_from_slice(&tag);
    let Ok(record) = Record::decode(&block, &keys) else { return false };
    let again = record.encode(&keys).map(|block| Record::decode(&block, &keys));
    assert!(record.header.tokens.len() <= PAGE_TOKENS, "{} tokens", record.header.tokens.len());
    assert_eq!(again, Some(Ok(record)), "a header is read as it is written");
    true
}

/// A segment's index, or its trailer. True where it is one.
pub fn index(data: &[u8]) -> bool {
    let keys = keys();
    let segment = Segment::new(TENANT, 1);
    crate::segment::parse_any_trailer(data, &keys);
    let Some(slots) = segment.parse_any_index(data, &keys) else { return false };
    assert_eq!(crate::segment::index_body(&segment, &slots), data, "an index has one form");
    true
}

/// The bodies of the files that are kept twice. True where it is one of them.
pub fn small_file(data: &[u8]) -> bool {
    crate::recover::parse_any(data) | crate::tenant::parse_any(data)
}

fn store() -> Option<(Store, crate::Tenant)> {
    let options = Options { threads: false, reserve_bytes: 0, ..Options::default() };
    let (clock, entropy) = (Arc::new(SimClock::new(1)), Arc::new(SimEntropy::new(1)));
    let (store, _) = Store::open(Arc::new(SimDisk::new(1)), clock, entropy, options).ok()?;
    let tenant = store.tenant("t").ok()?;
    Some((store, tenant))
}

/// A bundle as it arrives. True where it is taken.
pub fn raw_bundle(data: &[u8]) -> bool {
    let Some((store, tenant)) = store() else { return false };
    let accept = BundlePages::accept(ContentId([3; 32]), PageKey([4; 32]));
    let imported = store.import(&tenant, &mut &data[..], ImportAs::default(), accept);
    let Ok(imported) = imported else {
        assert_eq!(store.session_count(), 0, "a refused bundle leaves no session");
        return false;
    };
    let mut out = Vec::new();
    let id = imported.session.id;
    let exported = store.export(tenant.id, id, None, &mut out);
    assert!(exported.is_ok(), "what was taken can be given: {exported:?}");
    let again = store.import(&tenant, &mut &out[..], ImportAs::default(), BundlePages::Refuse);
    let again = again.map(|again| store.tokens(tenant.id, again.session.id).ok()).ok();
    assert_eq!(again, Some(store.tokens(tenant.id, id).ok()), "and is the same");
    true
}

/// A bundle of these parts, its hashes right. True where it is taken.
pub fn bundle(data: &[u8]) -> bool {
    let mut out = crate::bundle::start();
    for (kind, payload) in pieces(data) {
        out.push(kind);
        out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        out.extend_from_slice(payload);
        let hash = *blake3::hash(&out).as_bytes();
        out.extend_from_slice(&hash);
    }
    raw_bundle(&out)
}
