//! Extents: pages of neighbouring indices in one object, compressed where that saves, named by their bytes.

use crate::{
    bundle::ExportPages,
    key::{ClassId, PAGE_TOKENS, PageKey, TenantId},
    pages::Page,
    record::{Kind, PAYLOAD_BYTES_MAX, PageHeader, PageName},
    store::Store,
    twin::{PREAMBLE_BYTES, preamble, version_of},
    wire::{Malformed, Reader, Writer},
};

const MAGIC: [u8; 8] = *b"MSTEXTN\n";
/// Longest extent, as stored and with its pages unpacked.
pub(crate) const EXTENT_BYTES_MAX: u64 = 512 << 20;
/// Indices an extent may span.
const SPAN_MAX: u32 = 4096;
const KINDS: [Kind; 2] = [Kind::Attention, Kind::State];

const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// What an extent says of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Described {
    /// In the session.
    pub(crate) index: u32,
    /// Valid tokens.
    pub(crate) len: u8,
    pub(crate) class: ClassId,
    pub(crate) group: u16,
    pub(crate) kind: Kind,
    pub(crate) digest: [u8; 32],
    codec: u8,
    raw_bytes: u64,
    stored_bytes: u64,
}

/// An extent that is being filled.
pub(crate) struct Extent {
    described: Vec<Described>,
    payload: Vec<u8>,
    level: i32,
}

impl Extent {
    /// An empty one; `level` is zstd's.
    pub(crate) fn new(level: i32) -> Self {
        Self { described: Vec::new(), payload: Vec::new(), level }
    }

    pub(crate) fn pages(&self) -> u32 {
        self.described.len() as u32
    }

    /// Bytes it would have, but for descriptions.
    pub(crate) fn payload_bytes(&self) -> usize {
        self.payload.len()
    }

    pub(crate) fn push(&mut self, index: u32, (name, len): (&PageName, u8), page: &[u8]) {
        let digest = *blake3::hash(page).as_bytes();
        let packed = zstd::bulk::compress(page, self.level).ok().filter(|packed| packed.len() < page.len());
        let (codec, stored) = packed.as_deref().map_or((RAW, page), |packed| (ZSTD, packed));
        self.payload.extend_from_slice(stored);
        self.described.push(Described {
            index,
            len,
            class: name.class,
            group: name.group,
            kind: name.kind,
            digest,
            codec,
            raw_bytes: page.len() as u64,
            stored_bytes: stored.len() as u64,
        });
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.raw(&preamble(MAGIC)).u32(self.pages());
        for page in &self.described {
            out.u32(page.index).u8(page.len).raw(&page.class.0).u16(page.group).u8(page.kind as u8);
            out.u8(page.codec).u64(page.raw_bytes).u64(page.stored_bytes).raw(&page.digest);
        }
        out.raw(&self.payload);
        out.0
    }
}

/// A page and what its extent says of it.
pub(crate) type Unpacked = (Described, Box<[u8]>);

/// The pages of an extent of this name, each proven; no length is believed.
pub(crate) fn decode(bytes: &[u8], name: &[u8; 32]) -> Result<Vec<Unpacked>, Malformed> {
    let mut r = Reader::new(bytes, "extent");
    if blake3::hash(bytes) != *name || version_of(r.raw(PREAMBLE_BYTES)?, MAGIC) != Some(crate::FORMAT) {
        return Err(r.malformed());
    }
    let mut described = Vec::new();
    for _ in 0..r.u32()? {
        described.push(describe(&mut r)?);
    }
    let raw_bytes: u64 = described.iter().map(|page| page.raw_bytes).sum();
    if raw_bytes > EXTENT_BYTES_MAX {
        return Err(r.malformed());
    }
    let mut pages = Vec::new();
    for page in described {
        let stored = r.raw(usize::try_from(page.stored_bytes).map_err(|_| r.malformed())?)?;
        let payload = match page.codec {
            RAW => stored.to_vec(),
            _ => zstd::bulk::decompress(stored, page.raw_bytes as usize).map_err(|_| r.malformed())?,
        };
        if payload.len() as u64 != page.raw_bytes || blake3::hash(&payload) != page.digest {
            return Err(r.malformed());
        }
        pages.push((page, payload.into_boxed_slice()));
    }
    r.end()?;
    Ok(pages)
}

fn describe(r: &mut Reader<'_>) -> Result<Described, Malformed> {
    let (index, len, class, group) = (r.u32()?, r.u8()?, ClassId(r.array()?), r.u16()?);
    let kind = match r.u8()? {
        0 => Kind::Attention,
        1 => Kind::State,
        _ => return Err(r.malformed()),
    };
    let (codec, raw_bytes, stored_bytes, digest) = (r.u8()?, r.u64()?, r.u64()?, r.array()?);
    if codec > ZSTD || raw_bytes > PAYLOAD_BYTES_MAX as u64 || len == 0 || usize::from(len) > PAGE_TOKENS {
        return Err(r.malformed());
    }
    Ok(Described { index, len, class, group, kind, digest, codec, raw_bytes, stored_bytes })
}

/// The pages of a session that a store has, by index.
pub(crate) struct Source<'a> {
    pub(crate) store: &'a Store,
    pub(crate) tenant: TenantId,
    pub(crate) made: ExportPages,
    pub(crate) tokens: &'a [u32],
    /// Of its pages, the root before the first.
    pub(crate) keys: Vec<PageKey>,
}

impl Source<'_> {
    /// How many indices there are.
    pub(crate) fn len(&self) -> u32 {
        self.tokens.len().div_ceil(PAGE_TOKENS) as u32
    }

    /// The session's tokens up to the end of page `index - 1`.
    pub(crate) fn tokens_before(&self, index: u32) -> u32 {
        (index as usize * PAGE_TOKENS).min(self.tokens.len()) as u32
    }

    /// Puts what the store has of page `index` into an extent; a page that is not there is left out.
    pub(crate) fn fill(&self, index: u32, extent: &mut Extent) {
        let at = index as usize;
        let full = &self.tokens[at * PAGE_TOKENS..self.tokens_before(index + 1) as usize];
        for group in 0..self.made.groups {
            for kind in KINDS {
                let like = PageName {
                    tenant: self.tenant,
                    key: self.keys[at + 1],
                    class: self.made.class,
                    group,
                    kind,
                };
                if let Some((name, len, page)) = self.page(&like, self.keys[at], full) {
                    extent.push(index, (&name, len), &page);
                }
            }
        }
    }

    fn page(&self, like: &PageName, parent: PageKey, full: &[u32]) -> Option<(PageName, u8, Page)> {
        // The last tokens of a session may have no keys and values yet.
        let (name, len) = match self.store.contains(like) {
            true => (*like, full.len()),
            false => self.store.find_tail(like, parent, full)?,
        };
        let (content, tokens) = (self.made.content, full[..len].to_vec());
        let page = self.store.read(&PageHeader { name, content, parent, tokens }).ok()?;
        Some((name, len as u8, page))
    }

    /// The indices an extent of about `extent_bytes` spans: a power of two, from the first page that is there, so that
    /// sessions that begin alike are cut alike. 0 where there is no page.
    pub(crate) fn span(&self, extent_bytes: usize) -> u32 {
        for index in 0..self.len() {
            let mut first = Extent::new(1);
            self.fill(index, &mut first);
            let bytes: u64 = first.described.iter().map(|page| page.raw_bytes).sum();
            if let Some(fit) = (extent_bytes as u64).checked_div(bytes) {
                return 1 << (fit.clamp(1, u64::from(SPAN_MAX)) as u32).ilog2();
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::PageKey;

    fn sample() -> Vec<u8> {
        let name = PageName {
            tenant: TenantId([1; 16]),
            key: PageKey([2; 32]),
            class: ClassId([3; 32]),
            group: 4,
            kind: Kind::State,
        };
        let mut extent = Extent::new(1);
        extent.push(7, (&name, 32), &[5; 300]);
        let noise: Vec<u8> = (0..200_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        extent.push(8, (&name, 9), &noise);
        assert!(extent.payload_bytes() < 500, "the first page is smaller compressed");
        extent.encode()
    }

    #[test]
    fn pages_come_back_and_no_damage_passes() {
        let bytes = sample();
        let name = *blake3::hash(&bytes).as_bytes();
        let pages = decode(&bytes, &name).unwrap();
        assert_eq!((pages[0].1[..].to_vec(), pages[1].1.len()), (vec![5; 300], 200));
        assert_eq!((pages[0].0.index, pages[1].0.len, pages[1].0.codec), (7, 9, RAW));
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 1 << (at % 8);
            assert!(decode(&other, &name).is_err(), "byte {at}");
            // Even under a name that fits: it is malformed, or differs only in what no digest of a page covers.
            let named = decode(&other, blake3::hash(&other).as_bytes());
            assert!(
                named.is_err() || named.unwrap().iter().zip(&pages).all(|(a, b)| a.1 == b.1),
                "byte {at}"
            );
            assert!(decode(&bytes[..at], &name).is_err(), "cut at {at}");
            assert!(decode(&bytes[..at], blake3::hash(&bytes[..at]).as_bytes()).is_err(), "cut at {at}");
        }
    }
}
