//! A segment: an append-only file of one tenant's page records, with an index of them at its end once it is sealed.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    aligned::{AlignedBytes, BLOCK, whole_blocks},
    disk::{Access, Disk, File, read_blocks, read_full, write_full},
    error::{Miss, StoreError},
    key::{ClassId, PAGE_TOKENS, PageKey, TenantId, hex},
    record::{Kind, NoRecord, PageName, Record},
    seal::{Keys, Purpose, TAG_BYTES},
    twin::{PREAMBLE_BYTES, preamble, refuse_newer},
    wire::{Malformed, Reader, Writer},
};

/// Where tenants' directories of segments lie.
pub(crate) const DIR: &str = "seg";

pub(crate) const MAGIC: [u8; 8] = *b"MSTSEGM\n";
const TRAILER_MAGIC: [u8; 8] = *b"MSTSEGT\n";

/// The directory of a tenant's segments.
pub(crate) fn tenant_dir(tenant: TenantId) -> String {
    format!("{DIR}/{}", hex(&tenant.0))
}

/// A segment file.
pub(crate) struct Segment {
    pub(crate) tenant: TenantId,
    pub(crate) number: u64,
    /// Opened past the page cache, where records are read.
    reader: std::sync::OnceLock<Arc<dyn File>>,
    /// Bytes of its records, and of those that are still indexed.
    pub(crate) bytes: AtomicU64,
    pub(crate) live_bytes: AtomicU64,
}

/// A record in an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) name: PageName,
    pub(crate) parent: PageKey,
    pub(crate) serial: u64,
    pub(crate) offset: u64,
    pub(crate) payload_bytes: usize,
    /// How many tokens; and which, where it is a tail.
    pub(crate) token_count: u8,
    pub(crate) tail: Vec<u32>,
}

impl Slot {
    /// Where a record's index entry says it is.
    pub(crate) fn of(record: &Record, offset: u64) -> Self {
        let header = &record.header;
        let is_tail = header.tokens.len() < PAGE_TOKENS;
        Self {
            name: header.name,
            parent: header.parent,
            serial: record.serial,
            offset,
            payload_bytes: record.payload_bytes,
            token_count: header.tokens.len() as u8,
            tail: if is_tail { header.tokens.clone() } else { Vec::new() },
        }
    }

    pub(crate) fn disk_bytes(&self) -> u64 {
        Record::disk_bytes(self.payload_bytes)
    }

    fn write(&self, out: &mut Writer) {
        out.raw(&self.name.key.0).raw(&self.name.class.0).u16(self.name.group).u8(self.name.kind as u8);
        out.raw(&self.parent.0).u64(self.serial).u64(self.offset).u64(self.payload_bytes as u64);
        out.u8(self.token_count).tokens(&self.tail);
    }

    fn read(r: &mut Reader<'_>, tenant: TenantId) -> Result<Self, Malformed> {
        let (key, class, group) = (PageKey(r.array()?), ClassId(r.array()?), r.u16()?);
        let kind = Kind::parse(r.u8()?)?;
        Ok(Self {
            name: PageName { tenant, key, class, group, kind },
            parent: PageKey(r.array()?),
            serial: r.u64()?,
            offset: r.u64()?,
            payload_bytes: r.u64()? as usize,
            token_count: r.u8()?,
            tail: r.tokens()?,
        })
    }
}

/// What opening a segment found.
#[derive(Debug, Default)]
pub(crate) struct SegmentContents {
    pub(crate) slots: Vec<Slot>,
    /// Bytes that are no record though they should be, in a segment that was sealed.
    pub(crate) damaged_bytes: u64,
    /// The same in one that has no index: not all of it was synced.
    pub(crate) torn_bytes: u64,
    /// Where records end, if there is no index behind them.
    pub(crate) unsealed_end: Option<u64>,
    /// Records of a tenant whose key is gone.
    pub(crate) erased_bytes: u64,
}

impl Segment {
    pub(crate) fn new(tenant: TenantId, number: u64) -> Self {
        Self {
            tenant,
            number,
            reader: std::sync::OnceLock::new(),
            bytes: AtomicU64::new(0),
            live_bytes: AtomicU64::new(0),
        }
    }

    pub(crate) fn path(&self) -> String {
        format!("{}/seg-{:08x}.kvs", tenant_dir(self.tenant), self.number)
    }

    /// The number in a segment's file name.
    pub(crate) fn number_of(name: &str) -> Option<u64> {
        u64::from_str_radix(name.strip_prefix("seg-")?.strip_suffix(".kvs")?, 16).ok()
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.live_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn reader(&self, disk: &dyn Disk) -> io::Result<&Arc<dyn File>> {
        if let Some(file) = self.reader.get() {
            return Ok(file);
        }
        let file = disk.open(&self.path(), Access::Direct)?;
        Ok(self.reader.get_or_init(|| file))
    }

    /// Reads a record and proves that it is this tenant's and whole. The payload lies behind the first block, as it was
    /// given. `memory` has room for the record.
    pub(crate) fn read(
        &self,
        disk: &dyn Disk,
        keys: &Keys,
        slot: &Slot,
        memory: AlignedBytes,
    ) -> Result<(Record, AlignedBytes), Miss> {
        let (record, mut bytes) = self.read_stored(disk, keys, slot, memory)?;
        let payload = &mut bytes[BLOCK..BLOCK + record.payload_bytes];
        record.open_payload(payload, keys).ok_or(Miss::Damaged("seal"))?;
        Ok((record, bytes))
    }

    /// The same, with the payload as it stands on disk.
    pub(crate) fn read_stored(
        &self,
        disk: &dyn Disk,
        keys: &Keys,
        slot: &Slot,
        mut bytes: AlignedBytes,
    ) -> Result<(Record, AlignedBytes), Miss> {
        let unreadable = |e: io::Error| Miss::Unreadable(e.to_string());
        let file = self.reader(disk).map_err(unreadable)?;
        let read = read_blocks(&**file, slot.offset, &mut bytes).map_err(unreadable)?;
        if read < BLOCK + slot.payload_bytes {
            return Err(Miss::Damaged("record is cut"));
        }
        let record = Record::decode(&bytes[..BLOCK], keys).map_err(|e| match e {
            NoRecord::Malformed => Miss::Damaged("header"),
            NoRecord::Sealed { .. } => Miss::Absent,
        })?;
        if record.header.name != slot.name || record.payload_bytes != slot.payload_bytes {
            return Err(Miss::Damaged("another record stands here"));
        }
        if !record.checks_hold(&bytes[BLOCK..BLOCK + record.payload_bytes]) {
            return Err(Miss::Damaged("payload"));
        }
        Ok((record, bytes))
    }

    /// Finds the records of a file: by its index, or by walking the headers.
    pub(crate) fn open(&self, disk: &dyn Disk, keys: &Keys) -> Result<SegmentContents, StoreError> {
        let path = self.path();
        let file = disk.open(&path, Access::Read)?;
        let size = file.size()?;
        let mut first = [0; BLOCK];
        let read = read_full(&*file, 0, &mut first)?;
        refuse_newer(&path, &first[..read], MAGIC)?;
        let sound = read == BLOCK && first == file_header(keys, self.tenant, self.number);
        let mut contents = match self.footer(&*file, size, keys)? {
            Some(slots) => SegmentContents { slots, ..SegmentContents::default() },
            None => self.walk(&*file, size, keys)?,
        };
        match (sound, contents.unsealed_end) {
            (true, _) => {}
            (false, None) => contents.damaged_bytes += BLOCK as u64,
            (false, Some(_)) => contents.torn_bytes += read as u64,
        }
        for slot in &contents.slots {
            self.add(slot.disk_bytes());
        }
        self.bytes.fetch_add(contents.erased_bytes, Ordering::Relaxed);
        Ok(contents)
    }

    fn footer(&self, file: &dyn File, size: u64, keys: &Keys) -> io::Result<Option<Vec<Slot>>> {
        if size < 2 * BLOCK as u64 || !size.is_multiple_of(BLOCK as u64) {
            return Ok(None);
        }
        let mut trailer = [0; BLOCK];
        read_full(file, size - BLOCK as u64, &mut trailer)?;
        let Some((offset, bytes)) = parse_trailer(&trailer, keys) else { return Ok(None) };
        if offset.saturating_add(bytes) > size {
            return Ok(None);
        }
        let mut footer = vec![0; bytes as usize];
        read_full(file, offset, &mut footer)?;
        Ok(self.parse_footer(&footer, keys).ok())
    }

    fn parse_footer(&self, footer: &[u8], keys: &Keys) -> Result<Vec<Slot>, Malformed> {
        let mut r = Reader::new(footer, "segment index");
        let stored = r.bytes()?;
        if r.array()? != keys.tag(stored) {
            return Err(r.malformed());
        }
        let body = keys.open(self.tenant, Purpose::SegmentIndex, &self.number.to_le_bytes(), stored);
        let body = body.ok_or(r.malformed())?;
        let mut r = Reader::new(&body, "segment index");
        if r.array()? != self.tenant.0 || r.u64()? != self.number {
            return Err(r.malformed());
        }
        let count = r.u32()?;
        let slots = (0..count).map(|_| Slot::read(&mut r, self.tenant)).collect::<Result<_, _>>()?;
        r.end()?;
        Ok(slots)
    }

    /// Reads the body of an index that lacks nothing but its length and tag.
    pub(crate) fn parse_any_index(&self, body: &[u8], keys: &Keys) -> Option<Vec<Slot>> {
        let mut out = Writer::default();
        out.bytes(body).raw(&keys.tag(body));
        self.parse_footer(&out.0, keys).ok()
    }

    fn walk(&self, file: &dyn File, size: u64, keys: &Keys) -> io::Result<SegmentContents> {
        let mut contents = SegmentContents::default();
        let (mut at, mut end, mut skipped) = (BLOCK as u64, BLOCK as u64, 0);
        let mut block = [0; BLOCK];
        while at + BLOCK as u64 <= size {
            read_full(file, at, &mut block)?;
            let fits = |payload_bytes: usize| at + (BLOCK + payload_bytes) as u64 <= size;
            let bytes = match Record::decode(&block, keys) {
                Ok(record) if record.header.name.tenant == self.tenant && fits(record.payload_bytes) => {
                    contents.slots.push(Slot::of(&record, at));
                    Record::disk_bytes(record.payload_bytes)
                }
                Err(NoRecord::Sealed { payload_bytes }) if fits(payload_bytes) => {
                    contents.erased_bytes += Record::disk_bytes(payload_bytes);
                    Record::disk_bytes(payload_bytes)
                }
                _ => {
                    skipped += BLOCK as u64;
                    at += BLOCK as u64;
                    continue;
                }
            };
            contents.torn_bytes += std::mem::take(&mut skipped);
            at += bytes;
            end = at;
        }
        contents.unsealed_end = Some(end);
        Ok(contents)
    }
}

/// Reads a trailer that lacks nothing but its tag.
pub(crate) fn parse_any_trailer(bytes: &[u8], keys: &Keys) -> Option<(u64, u64)> {
    let mut block = [0; BLOCK];
    let len = bytes.len().min(BLOCK - TAG_BYTES);
    block[..len].copy_from_slice(&bytes[..len]);
    tag_block(keys, &mut block);
    parse_trailer(&block, keys)
}

fn file_header(keys: &Keys, tenant: TenantId, number: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block[..PREAMBLE_BYTES].copy_from_slice(&preamble(MAGIC));
    block[PREAMBLE_BYTES..][..16].copy_from_slice(&tenant.0);
    block[PREAMBLE_BYTES + 16..][..8].copy_from_slice(&number.to_le_bytes());
    tag_block(keys, &mut block);
    block
}

fn tag_block(keys: &Keys, block: &mut [u8; BLOCK]) {
    let tag = keys.tag(&block[..BLOCK - TAG_BYTES]);
    block[BLOCK - TAG_BYTES..].copy_from_slice(&tag);
}

fn parse_trailer(block: &[u8; BLOCK], keys: &Keys) -> Option<(u64, u64)> {
    if keys.tag(&block[..BLOCK - TAG_BYTES]) != block[BLOCK - TAG_BYTES..] {
        return None;
    }
    let mut r = Reader::new(&block[..], "segment trailer");
    (r.array().ok()? == TRAILER_MAGIC).then_some((r.u64().ok()?, r.u64().ok()?))
}

pub(crate) fn index_body(segment: &Segment, slots: &[Slot]) -> Vec<u8> {
    let mut body = Writer::default();
    body.raw(&segment.tenant.0).u64(segment.number).u32(slots.len() as u32);
    slots.iter().for_each(|slot| slot.write(&mut body));
    body.0
}

/// The bytes of the index behind the records, trailer included; whole blocks.
fn footer_bytes(keys: &Keys, segment: &Segment, end: u64, slots: &[Slot]) -> io::Result<Vec<u8>> {
    let body = index_body(segment, slots);
    let mut out = Writer::default();
    let number = segment.number.to_le_bytes();
    let stored =
        keys.seal(segment.tenant, Purpose::SegmentIndex, &number, body).ok_or_else(tenant_is_gone)?;
    out.bytes(&stored).raw(&keys.tag(&stored));
    let bytes = out.0.len();
    out.0.resize(whole_blocks(bytes as u64) as usize, 0);
    let mut trailer = Writer::default();
    trailer.raw(&TRAILER_MAGIC).u64(end).u64(bytes as u64);
    let mut block = [0; BLOCK];
    block[..trailer.0.len()].copy_from_slice(&trailer.0);
    tag_block(keys, &mut block);
    out.raw(&block);
    Ok(out.0)
}

/// What is written for a tenant that was deleted meanwhile.
pub(crate) fn tenant_is_gone() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "the tenant was deleted")
}

/// Puts an index behind the records of a file that a crash left without, so that the next opening need not walk it.
pub(crate) fn seal_recovered(
    disk: &dyn Disk,
    keys: &Keys,
    segment: &Segment,
    end: u64,
    slots: &[Slot],
) -> io::Result<()> {
    let footer = footer_bytes(keys, segment, end, slots)?;
    let file = disk.open(&segment.path(), Access::Write)?;
    file.truncate(end)?;
    write_full(&*file, end, &footer)?;
    file.sync()
}

/// The end of a tenant's pages, where records are appended.
pub(crate) struct Active {
    pub(crate) segment: Arc<Segment>,
    file: Arc<dyn File>,
    /// Where the next record goes.
    pub(crate) end: u64,
    pub(crate) slots: Vec<Slot>,
    /// How many of `slots` are durable.
    pub(crate) synced_count: usize,
    named: bool,
}

impl Active {
    /// Begins a segment. Its name is durable after the first [`Active::sync`].
    pub(crate) fn begin(disk: &dyn Disk, keys: &Keys, segment: Segment) -> io::Result<Self> {
        disk.create_dir(&tenant_dir(segment.tenant))?;
        let file = disk.create(&segment.path())?;
        write_full(&*file, 0, &file_header(keys, segment.tenant, segment.number))?;
        Ok(Self {
            segment: Arc::new(segment),
            file,
            end: BLOCK as u64,
            slots: Vec::new(),
            synced_count: 0,
            named: false,
        })
    }

    /// Hands a record to the system: its header's block and its payload as it is to stand on disk.
    pub(crate) fn append(
        &mut self,
        record: &Record,
        block: &[u8; BLOCK],
        payload: &[u8],
    ) -> io::Result<Slot> {
        // The payload goes first: a process that ends between the two leaves no header that promises bytes.
        let mut tail = [0; BLOCK];
        let (whole, rest) = payload.split_at(payload.len() - payload.len() % BLOCK);
        write_full(&*self.file, self.end + BLOCK as u64, whole)?;
        if !rest.is_empty() {
            tail[..rest.len()].copy_from_slice(rest);
            write_full(&*self.file, self.end + (BLOCK + whole.len()) as u64, &tail)?;
        }
        write_full(&*self.file, self.end, block)?;
        let slot = Slot::of(record, self.end);
        self.segment.add(slot.disk_bytes());
        self.slots.push(slot.clone());
        self.end += slot.disk_bytes();
        Ok(slot)
    }

    /// Makes all records durable. After an error the segment must be given up.
    pub(crate) fn sync(&mut self, disk: &dyn Disk) -> io::Result<()> {
        if self.synced_count == self.slots.len() && self.named {
            return Ok(());
        }
        self.file.sync()?;
        if !self.named {
            disk.sync_dir(&tenant_dir(self.segment.tenant))?;
            disk.sync_dir(DIR)?;
            self.named = true;
        }
        self.synced_count = self.slots.len();
        Ok(())
    }

    /// Writes the index and makes everything durable; no record follows.
    pub(crate) fn seal(&mut self, disk: &dyn Disk, keys: &Keys) -> io::Result<()> {
        let footer = footer_bytes(keys, &self.segment, self.end, &self.slots)?;
        write_full(&*self.file, self.end, &footer)?;
        self.named &= self.synced_count == self.slots.len();
        self.file.sync()?;
        self.synced_count = self.slots.len();
        if !self.named {
            disk.sync_dir(&tenant_dir(self.segment.tenant))?;
            disk.sync_dir(DIR)?;
            self.named = true;
        }
        Ok(())
    }
}
