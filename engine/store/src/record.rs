//! A page on disk: a header of one block that says and proves everything about the payload behind it.

use crate::{
    aligned::{BLOCK, whole_blocks},
    key::{ClassId, ContentId, PAGE_TOKENS, PageKey, TenantId},
    seal::{CODEC_PLAIN, CODEC_SEALED, GcmTag, Keys, Nonce, Purpose, TAG_BYTES, nonce_of},
    twin::crc64,
    wire::{Malformed, Reader, Writer},
};

/// Payload bytes under one checksum.
pub const CHECK_BYTES: usize = 256 << 10;
/// Longest payload; its checksums still fit the header.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 20;

const MAGIC: u32 = u32::from_le_bytes(*b"MSPG");

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

impl Kind {
    pub(crate) fn parse(byte: u8) -> Result<Self, Malformed> {
        match byte {
            0 => Ok(Kind::Attention),
            1 => Ok(Kind::State),
            _ => Err(Malformed("kind of page")),
        }
    }
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

/// Proves that a sealed payload is the one its header is about, and opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PayloadSeal {
    nonce: Nonce,
    tag: GcmTag,
}

/// Header and proofs of a record on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) header: PageHeader,
    /// Orders the records of a store.
    pub(crate) serial: u64,
    pub(crate) epoch: u64,
    pub(crate) payload_bytes: usize,
    /// Of the payload as given.
    pub(crate) digest: Digest,
    /// Of the payload as it stands on disk.
    pub(crate) checks: Vec<u64>,
    pub(crate) seal: Option<PayloadSeal>,
}

/// Why a block gives no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRecord {
    /// It is no header of this store.
    Malformed,
    /// It is one of a tenant whose key is gone.
    Sealed { payload_bytes: usize },
}

impl From<Malformed> for NoRecord {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl Record {
    /// The record of a payload that was found to have this digest. In a store that seals, `payload` is sealed in its
    /// place; `None` where the tenant is gone.
    pub(crate) fn of(
        header: PageHeader,
        payload: &mut [u8],
        digest: Digest,
        (serial, epoch): (u64, u64),
        keys: &Keys,
    ) -> Option<Self> {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "a page of {} bytes", payload.len());
        assert!(header.tokens.len() <= PAGE_TOKENS, "a page of {} tokens", header.tokens.len());
        let (key, payload_bytes) = (keys.of(header.name.tenant)?, payload.len());
        let mut record =
            Self { header, serial, epoch, payload_bytes, digest, checks: Vec::new(), seal: None };
        record.seal = key.map(|key| {
            let nonce = keys.nonce();
            let aad = record.open_fields(CODEC_SEALED).0;
            PayloadSeal { nonce, tag: key.seal_in_place(Purpose::PagePayload, &nonce, &aad, payload) }
        });
        record.checks = payload.chunks(CHECK_BYTES).map(crc64).collect();
        Some(record)
    }

    /// Bytes on disk of a record with this payload.
    pub(crate) fn disk_bytes(payload_bytes: usize) -> u64 {
        BLOCK as u64 + whole_blocks(payload_bytes as u64)
    }

    /// What anyone may read, but the checksums.
    fn open_fields(&self, codec: u8) -> Writer {
        let mut out = Writer::default();
        out.u32(MAGIC).u32(crate::twin::FORMAT).u64(self.serial).u64(self.epoch);
        out.raw(&self.header.name.tenant.0).u8(codec).u64(self.payload_bytes as u64);
        out
    }

    /// What tells of a prompt.
    fn private_fields(&self) -> Writer {
        let PageHeader { name, content, parent, tokens } = &self.header;
        let mut out = Writer::default();
        out.raw(&content.0).raw(&name.class.0).raw(&name.key.0).raw(&parent.0);
        out.u16(name.group).u8(name.kind as u8).raw(&self.digest);
        out.u16(tokens.len() as u16);
        for &token in tokens {
            out.u32(token);
        }
        if let Some(seal) = &self.seal {
            out.raw(&seal.tag);
        }
        out
    }

    /// The header's block; `None` where the tenant is gone.
    pub(crate) fn encode(&self, keys: &Keys) -> Option<[u8; BLOCK]> {
        let mut out = self.open_fields(keys.codec());
        out.u16(self.checks.len() as u16);
        for &check in &self.checks {
            out.u64(check);
        }
        let private = self.private_fields().0;
        let private = match &self.seal {
            Some(PayloadSeal { nonce, .. }) => {
                let key = keys.of(self.header.name.tenant)??;
                key.seal(Purpose::PageHeader, nonce, &out.0, &private)
            }
            None => private,
        };
        out.bytes(&private);
        let mut block = [0; BLOCK];
        block[..out.0.len()].copy_from_slice(&out.0);
        let tag = keys.tag(&block[..BLOCK - TAG_BYTES]);
        block[BLOCK - TAG_BYTES..].copy_from_slice(&tag);
        Some(block)
    }

    /// Reads a header that this store wrote; anything else is malformed.
    pub(crate) fn decode(block: &[u8], keys: &Keys) -> Result<Self, NoRecord> {
        let mut reader = Reader::new(block, "page header");
        if block.len() != BLOCK
            || reader.u32()? != MAGIC
            || keys.tag(&block[..BLOCK - TAG_BYTES]) != block[BLOCK - TAG_BYTES..]
            || reader.u32()? > crate::twin::FORMAT
        {
            return Err(NoRecord::Malformed);
        }
        let (serial, epoch) = (reader.u64()?, reader.u64()?);
        let tenant = TenantId(reader.array()?);
        let codec = reader.u8()?;
        let payload_bytes = usize::try_from(reader.u64()?).map_err(|_| NoRecord::Malformed)?;
        let check_count = usize::from(reader.u16()?);
        if codec != keys.codec()
            || payload_bytes > PAYLOAD_BYTES_MAX
            || check_count != payload_bytes.div_ceil(CHECK_BYTES)
        {
            return Err(NoRecord::Malformed);
        }
        let checks = (0..check_count).map(|_| reader.u64()).collect::<Result<_, _>>()?;
        let aad = &block[..block.len() - reader.len()];
        let stored = reader.bytes()?;
        let private = keys.open(tenant, Purpose::PageHeader, aad, stored);
        let private = private.ok_or(NoRecord::Sealed { payload_bytes })?;
        let mut reader = Reader::new(&private, "page header");
        let content = ContentId(reader.array()?);
        let class = ClassId(reader.array()?);
        let (key, parent) = (PageKey(reader.array()?), PageKey(reader.array()?));
        let group = reader.u16()?;
        let kind = Kind::parse(reader.u8()?)?;
        let digest = reader.array()?;
        let token_count = usize::from(reader.u16()?);
        if token_count > PAGE_TOKENS {
            return Err(NoRecord::Malformed);
        }
        let tokens = (0..token_count).map(|_| reader.u32()).collect::<Result<_, _>>()?;
        let seal = match codec {
            CODEC_PLAIN => None,
            _ => Some(PayloadSeal { nonce: nonce_of(stored)?, tag: reader.array()? }),
        };
        reader.end()?;
        let name = PageName { tenant, key, class, group, kind };
        let header = PageHeader { name, content, parent, tokens };
        Ok(Self { header, serial, epoch, payload_bytes, digest, checks, seal })
    }

    /// Whether the payload is the one written, by its checksums.
    pub(crate) fn checks_hold(&self, stored: &[u8]) -> bool {
        stored.len() == self.payload_bytes
            && stored.chunks(CHECK_BYTES).map(crc64).eq(self.checks.iter().copied())
    }

    /// Makes the payload what was given, in its place. `None` where its seal is another, or the tenant is gone.
    pub(crate) fn open_payload(&self, stored: &mut [u8], keys: &Keys) -> Option<()> {
        let Some(PayloadSeal { nonce, tag }) = &self.seal else { return Some(()) };
        let aad = self.open_fields(CODEC_SEALED).0;
        keys.of(self.header.name.tenant)??.open_in_place(Purpose::PagePayload, (nonce, tag), &aad, stored)
    }

    /// Whether the payload is the one given, by its digest.
    pub(crate) fn digest_holds(&self, payload: &[u8]) -> bool {
        digest(payload) == self.digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::tests::{TENANT, keys};

    fn header(tokens: usize) -> PageHeader {
        let name = PageName {
            tenant: TENANT,
            key: PageKey([2; 32]),
            class: ClassId([3; 32]),
            group: 4,
            kind: Kind::State,
        };
        let tokens = (0..tokens as u32).collect();
        PageHeader { name, content: ContentId([5; 32]), parent: PageKey([6; 32]), tokens }
    }

    fn record(tokens: usize, payload: &mut [u8], keys: &Keys) -> Record {
        let digest = digest(payload);
        Record::of(header(tokens), payload, digest, (7, 8), keys).unwrap()
    }

    #[test]
    fn a_header_roundtrips_and_no_bit_of_it_may_change() {
        for master in [None, Some(9)] {
            let keys = keys(1, master);
            let mut payload = vec![9; CHECK_BYTES + 1];
            let record = record(31, &mut payload, &keys);
            let block = record.encode(&keys).unwrap();
            assert_eq!(Record::decode(&block, &keys).as_ref(), Ok(&record));
            assert!(Record::decode(&block, &self::keys(2, master)).is_err(), "another store's header");
            for bit in 0..BLOCK * 8 {
                let mut flipped = block;
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(Record::decode(&flipped, &keys).is_err(), "bit {bit}");
            }
            assert!(Record::decode(&block[..BLOCK - 1], &keys).is_err());
            keys.forget(TENANT);
            let sealed = NoRecord::Sealed { payload_bytes: CHECK_BYTES + 1 };
            let expected = if master.is_some() { Err(sealed) } else { Ok(record) };
            assert_eq!(Record::decode(&block, &keys), expected);
        }
    }

    #[test]
    fn checks_and_digest_cover_every_payload_byte() {
        for master in [None, Some(9)] {
            let keys = keys(1, master);
            let given: Vec<u8> = (0..CHECK_BYTES + 100).map(|i| i as u8).collect();
            let mut stored = given.clone();
            let record = record(32, &mut stored, &keys);
            assert_eq!(stored == given, master.is_none());
            for at in [0, 1, CHECK_BYTES - 1, CHECK_BYTES, CHECK_BYTES + 99] {
                stored[at] ^= 1;
                assert!(!record.checks_hold(&stored), "byte {at}");
                let mut opened = stored.clone();
                let open = record.open_payload(&mut opened, &keys);
                assert!(open.is_none() == master.is_some() && !record.digest_holds(&opened), "byte {at}");
                stored[at] ^= 1;
            }
            assert!(!record.checks_hold(&stored[..CHECK_BYTES]));
            assert!(record.checks_hold(&stored));
            let other = Record { serial: 8, ..record.clone() };
            assert_eq!(other.open_payload(&mut stored.clone(), &keys).is_none(), master.is_some());
            record.open_payload(&mut stored, &keys).unwrap();
            assert!(stored == given && record.digest_holds(&stored));
        }
    }

    #[test]
    fn the_longest_payload_fits_its_header() {
        for master in [None, Some(9)] {
            let keys = keys(1, master);
            let checks = vec![0; PAYLOAD_BYTES_MAX.div_ceil(CHECK_BYTES)];
            let payload_bytes = PAYLOAD_BYTES_MAX;
            let record = Record { payload_bytes, checks, ..record(32, &mut [], &keys) };
            assert_eq!(Record::decode(&record.encode(&keys).unwrap(), &keys), Ok(record));
        }
    }
}
