//! A page on disk: a header of one block that says and proves everything about the payload behind it.

use crate::{
    aligned::{BLOCK, whole_blocks},
    key::{ClassId, ContentId, PAGE_TOKENS, PageKey, TenantId},
    twin::crc64,
    wire::{Malformed, Reader, Writer},
};

/// Payload bytes under one checksum.
pub const CHECK_BYTES: usize = 256 << 10;
/// Longest payload; its checksums still fit the header.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 20;

const MAGIC: u32 = u32::from_le_bytes(*b"MSPG");
const TAG_BYTES: usize = 16;
/// Payload as given. Other codecs are left to a cold tier.
const CODEC_RAW: u8 = 0;

/// Proves that this store wrote a header: bytes of a payload cannot pass for one, whoever chose them.
pub(crate) type StoreKey = [u8; 32];

/// BLAKE3 of a payload.
pub(crate) type Digest = [u8; 32];

/// The digest of these bytes.
pub(crate) fn digest(payload: &[u8]) -> Digest {
    *blake3::hash(payload).as_bytes()
}

/// What the bytes of a record are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// Keys and values of attention.
    Attention = 0,
    /// State at a page border of a layer that keeps no pages: convolution, recurrence, a window.
    State = 1,
}

/// Names a page: unique in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageName {
    /// Whose.
    pub tenant: TenantId,
    /// After what tokens, of which model.
    pub key: PageKey,
    /// Computed by whom.
    pub class: ClassId,
    /// Group of layers.
    pub group: u16,
    /// What it holds.
    pub kind: Kind,
}

/// What a page says of itself. The parent and the tokens are compared on every hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// Its name.
    pub name: PageName,
    /// The model and layout.
    pub content: ContentId,
    /// The page before, or the chain's root.
    pub parent: PageKey,
    /// At most [`PAGE_TOKENS`]; fewer in a tail.
    pub tokens: Vec<u32>,
}

/// Header and proofs of a record on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) header: PageHeader,
    /// Orders the records of a store.
    pub(crate) serial: u64,
    pub(crate) epoch: u64,
    pub(crate) payload_bytes: usize,
    pub(crate) digest: Digest,
    pub(crate) checks: Vec<u64>,
}

impl Record {
    /// The record of a payload that was found to have this digest.
    pub(crate) fn of(header: PageHeader, payload: &[u8], digest: Digest, serial: u64, epoch: u64) -> Self {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "a page of {} bytes", payload.len());
        assert!(header.tokens.len() <= PAGE_TOKENS, "a page of {} tokens", header.tokens.len());
        let checks = payload.chunks(CHECK_BYTES).map(crc64).collect();
        Self { header, serial, epoch, payload_bytes: payload.len(), digest, checks }
    }

    /// Bytes on disk of a record with this payload.
    pub(crate) fn disk_bytes(payload_bytes: usize) -> u64 {
        BLOCK as u64 + whole_blocks(payload_bytes as u64)
    }

    pub(crate) fn encode(&self, key: &StoreKey) -> [u8; BLOCK] {
        let PageHeader { name, content, parent, tokens } = &self.header;
        let mut out = Writer::default();
        out.u32(MAGIC).u32(crate::twin::FORMAT).u64(self.serial).u64(self.epoch);
        out.raw(&name.tenant.0).raw(&content.0).raw(&name.class.0).raw(&name.key.0).raw(&parent.0);
        out.u16(name.group).u8(name.kind as u8).u8(CODEC_RAW).u64(self.payload_bytes as u64);
        out.raw(&self.digest);
        out.u16(tokens.len() as u16);
        for &token in tokens {
            out.u32(token);
        }
        out.u16(self.checks.len() as u16);
        for &check in &self.checks {
            out.u64(check);
        }
        let mut block = [0; BLOCK];
        block[..out.0.len()].copy_from_slice(&out.0);
        let tag = tag(key, &block[..BLOCK - TAG_BYTES]);
        block[BLOCK - TAG_BYTES..].copy_from_slice(&tag);
        block
    }

    /// Reads a header that this store wrote; anything else is malformed.
    pub(crate) fn decode(block: &[u8], key: &StoreKey) -> Result<Self, Malformed> {
        let mut reader = Reader::new(block, "page header");
        if block.len() != BLOCK
            || reader.u32()? != MAGIC
            || tag(key, &block[..BLOCK - TAG_BYTES]) != block[BLOCK - TAG_BYTES..]
        {
            return Err(reader.malformed());
        }
        if reader.u32()? > crate::twin::FORMAT {
            return Err(reader.malformed());
        }
        let (serial, epoch) = (reader.u64()?, reader.u64()?);
        let tenant = TenantId(reader.array()?);
        let content = ContentId(reader.array()?);
        let class = ClassId(reader.array()?);
        let page = PageKey(reader.array()?);
        let parent = PageKey(reader.array()?);
        let group = reader.u16()?;
        let kind = match reader.u8()? {
            0 => Kind::Attention,
            1 => Kind::State,
            _ => return Err(reader.malformed()),
        };
        let codec = reader.u8()?;
        let payload_bytes = usize::try_from(reader.u64()?).map_err(|_| reader.malformed())?;
        let digest = reader.array()?;
        let token_count = usize::from(reader.u16()?);
        if codec != CODEC_RAW || payload_bytes > PAYLOAD_BYTES_MAX || token_count > PAGE_TOKENS {
            return Err(reader.malformed());
        }
        let tokens = (0..token_count).map(|_| reader.u32()).collect::<Result<_, _>>()?;
        let check_count = usize::from(reader.u16()?);
        if check_count != payload_bytes.div_ceil(CHECK_BYTES) {
            return Err(reader.malformed());
        }
        let checks = (0..check_count).map(|_| reader.u64()).collect::<Result<_, _>>()?;
        let name = PageName { tenant, key: page, class, group, kind };
        let header = PageHeader { name, content, parent, tokens };
        Ok(Self { header, serial, epoch, payload_bytes, digest, checks })
    }

    /// Whether the payload is the one written, by its checksums.
    pub(crate) fn checks_hold(&self, payload: &[u8]) -> bool {
        payload.len() == self.payload_bytes
            && payload.chunks(CHECK_BYTES).map(crc64).eq(self.checks.iter().copied())
    }

    /// Whether the payload is the one written, by its digest.
    pub(crate) fn digest_holds(&self, payload: &[u8]) -> bool {
        digest(payload) == self.digest
    }
}

/// A keyed hash: 128 bits of BLAKE3.
pub(crate) fn tag(key: &StoreKey, bytes: &[u8]) -> [u8; TAG_BYTES] {
    *blake3::keyed_hash(key, bytes).as_bytes().first_chunk().expect("a hash has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(tokens: usize) -> PageHeader {
        let name = PageName {
            tenant: TenantId([1; 16]),
            key: PageKey([2; 32]),
            class: ClassId([3; 32]),
            group: 4,
            kind: Kind::State,
        };
        let tokens = (0..tokens as u32).collect();
        PageHeader { name, content: ContentId([5; 32]), parent: PageKey([6; 32]), tokens }
    }

    #[test]
    fn a_header_roundtrips_and_no_bit_of_it_may_change() {
        let payload = vec![9; CHECK_BYTES + 1];
        let record = Record::of(header(31), &payload, digest(&payload), 7, 8);
        let block = record.encode(&[1; 32]);
        assert_eq!(Record::decode(&block, &[1; 32]).as_ref(), Ok(&record));
        assert!(Record::decode(&block, &[2; 32]).is_err(), "another store's header");
        for bit in 0..BLOCK * 8 {
            let mut flipped = block;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Record::decode(&flipped, &[1; 32]).is_err(), "bit {bit}");
        }
        assert!(Record::decode(&block[..BLOCK - 1], &[1; 32]).is_err());
    }

    #[test]
    fn checks_cover_every_payload_byte() {
        let mut payload: Vec<u8> = (0..CHECK_BYTES + 100).map(|i| i as u8).collect();
        let record = Record::of(header(32), &payload, digest(&payload), 0, 0);
        assert!(record.checks_hold(&payload) && record.digest_holds(&payload));
        for at in [0, 1, CHECK_BYTES - 1, CHECK_BYTES, CHECK_BYTES + 99] {
            payload[at] ^= 1;
            assert!(!record.checks_hold(&payload) && !record.digest_holds(&payload), "byte {at}");
            payload[at] ^= 1;
        }
        assert!(!record.checks_hold(&payload[..CHECK_BYTES]));
    }

    #[test]
    fn the_longest_payload_fits_its_header() {
        let record = Record {
            header: header(32),
            serial: 0,
            epoch: 0,
            payload_bytes: PAYLOAD_BYTES_MAX,
            digest: [0; 32],
            checks: vec![0; PAYLOAD_BYTES_MAX.div_ceil(CHECK_BYTES)],
        };
        assert_eq!(Record::decode(&record.encode(&[0; 32]), &[0; 32]), Ok(record));
    }
}
