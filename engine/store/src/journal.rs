//! The journal: append-only files of entries, each with a keyed tag over itself and the entry before it.

use std::{io, sync::Arc};

use crate::{
    disk::{Access, Disk, File, create_anew, read_file, write_full},
    event::{Event, SessionId, Whose},
    key::TenantId,
    seal::{CODEC_PLAIN, CODEC_SEALED, Keys, Purpose, SEAL_BYTES, TAG_BYTES, Tag},
    segment::tenant_is_gone,
    twin::{PREAMBLE_BYTES, preamble, refuse_newer},
    wire::Reader,
};

/// Where journal files lie.
pub(crate) const DIR: &str = "journal";
/// Begins each of them.
pub(crate) const MAGIC: [u8; 8] = *b"MSTJRNL\n";

const ENTRY_MAGIC: [u8; 4] = *b"MSJ1";
/// Bytes before an entry's payload.
const HEAD_BYTES: usize = 80;
/// Bytes of the head that its own tag covers.
const HEAD_TAGGED_BYTES: usize = 72;
/// Longest payload.
const PAYLOAD_BYTES_MAX: usize = 64 << 20;

/// An entry as found.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) lsn: u64,
    pub(crate) session: SessionId,
    pub(crate) event: Event,
}

/// Whose a damaged entry was, where its head is still readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) session: SessionId,
    /// It was of an answer in flight, which is no part of the session yet.
    pub(crate) is_answer: bool,
}

/// What stands in a file, in order.
#[derive(Debug)]
pub(crate) enum Piece {
    Entry(Entry),
    /// An entry of a tenant whose key is gone.
    Erased {
        lsn: u64,
    },
    /// Bytes that are no entry, with entries after them.
    Damage {
        from: usize,
        to: usize,
        owners: Vec<Owner>,
    },
    /// Bytes that are no entry, at the end.
    Tail {
        from: usize,
    },
}

/// The bytes of an entry, and its tag.
pub(crate) fn encode(
    keys: &Keys,
    lsn: u64,
    before: Tag,
    whose: Whose,
    event: &Event,
) -> io::Result<(Vec<u8>, Tag)> {
    let payload = event.encode();
    let codec = if event.is_of_file() { CODEC_PLAIN } else { keys.codec() };
    let stored_bytes = payload.len() + if codec == CODEC_SEALED { SEAL_BYTES } else { 0 };
    if payload.len() > PAYLOAD_BYTES_MAX {
        let what = format!("a journal entry has {} bytes, at most {PAYLOAD_BYTES_MAX}", payload.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut bytes = Vec::with_capacity(HEAD_BYTES + stored_bytes + TAG_BYTES);
    bytes.extend_from_slice(&ENTRY_MAGIC);
    bytes.extend_from_slice(&(stored_bytes as u32).to_le_bytes());
    bytes.extend_from_slice(&lsn.to_le_bytes());
    bytes.extend_from_slice(&whose.session.0.to_le_bytes());
    bytes.extend_from_slice(&whose.tenant.0);
    bytes.extend_from_slice(&before);
    bytes.extend_from_slice(&[event.kind(), codec, 0, 0, 0, 0, 0, 0]);
    let stored = match codec {
        CODEC_PLAIN => payload,
        _ => keys.seal(whose.tenant, Purpose::JournalEntry, &bytes, payload).ok_or_else(tenant_is_gone)?,
    };
    let head_tag = keys.tag(&bytes);
    bytes.extend_from_slice(&head_tag[..HEAD_BYTES - HEAD_TAGGED_BYTES]);
    bytes.extend_from_slice(&stored);
    let own = keys.tag(&bytes);
    bytes.extend_from_slice(&own);
    Ok((bytes, own))
}

struct Head {
    payload_bytes: usize,
    lsn: u64,
    whose: Whose,
    before: Tag,
    kind: u8,
    codec: u8,
}

impl Head {
    /// What the entry says. The inner is `None` where the tenant's key is gone, the outer where it says nothing.
    fn event(&self, head: &[u8], stored: &[u8], keys: &Keys) -> Option<Option<Event>> {
        if Event::is_file_kind(self.kind) {
            return (self.codec == CODEC_PLAIN).then(|| Event::decode(self.kind, stored).ok().map(Some))?;
        }
        if self.codec != keys.codec() {
            return None;
        }
        let aad = &head[..HEAD_TAGGED_BYTES];
        match keys.open(self.whose.tenant, Purpose::JournalEntry, aad, stored) {
            Some(payload) => Event::decode(self.kind, &payload).ok().map(Some),
            None => Some(None),
        }
    }
}

fn head(bytes: &[u8], keys: &Keys) -> Option<Head> {
    let bytes = bytes.get(..HEAD_BYTES)?;
    if bytes[..4] != ENTRY_MAGIC
        || keys.tag(&bytes[..HEAD_TAGGED_BYTES])[..HEAD_BYTES - HEAD_TAGGED_BYTES]
            != bytes[HEAD_TAGGED_BYTES..]
    {
        return None;
    }
    let mut r = Reader::new(&bytes[4..], "journal head");
    let payload_bytes = r.u32().ok()? as usize;
    let lsn = r.u64().ok()?;
    let session = SessionId(u128::from_le_bytes(r.array().ok()?));
    let whose = Whose { tenant: TenantId(r.array().ok()?), session };
    let before = r.array().ok()?;
    let (kind, codec) = (r.u8().ok()?, r.u8().ok()?);
    let is_sound = r.array().ok()? == [0; 6] && payload_bytes <= PAYLOAD_BYTES_MAX + SEAL_BYTES;
    is_sound.then_some(Head { payload_bytes, lsn, whose, before, kind, codec })
}

/// Reads the entries of a file. A place that is no entry does not end the reading: what is whole behind it is found
/// again. An entry is taken only if it follows the one before it by its chain, or a gap.
pub(crate) fn scan(bytes: &[u8], keys: &Keys) -> Vec<Piece> {
    let (mut pieces, mut at) = (Vec::new(), PREAMBLE_BYTES.min(bytes.len()));
    // Where the bytes since the last entry begin, and whose they are.
    let mut gap: Option<(usize, Vec<Owner>)> = None;
    let (mut last_lsn, mut last_tag) = (0, None);
    while at < bytes.len() {
        let Some(head) = head(&bytes[at..], keys) else {
            gap.get_or_insert((at, Vec::new()));
            // The next place that may begin an entry.
            let next = bytes[at + 1..].windows(4).position(|w| w == ENTRY_MAGIC);
            at = next.map_or(bytes.len(), |skip| at + 1 + skip);
            continue;
        };
        let end = at + HEAD_BYTES + head.payload_bytes;
        let whole = bytes.get(at..end + TAG_BYTES);
        let own =
            whole.map(|_| keys.tag(&bytes[at..end])).filter(|own| own[..] == bytes[end..end + TAG_BYTES]);
        let follows = head.lsn > last_lsn && (gap.is_some() || last_tag.is_none_or(|tag| tag == head.before));
        let event = own
            .filter(|_| follows)
            .and_then(|own| Some((own, head.event(&bytes[at..], &bytes[at + HEAD_BYTES..end], keys)?)));
        let Some((own, event)) = event else {
            let (_, owners) = gap.get_or_insert((at, Vec::new()));
            owners.push(Owner { session: head.whose.session, is_answer: Event::is_answer_kind(head.kind) });
            // A head is proven, so its length is; but one that reaches past the end says nothing of what follows.
            at = if whole.is_some() { end + TAG_BYTES } else { at + 4 };
            continue;
        };
        if let Some((from, owners)) = gap.take() {
            pieces.push(Piece::Damage { from, to: at, owners });
        }
        let (lsn, session) = (head.lsn, head.whose.session);
        pieces.push(match event {
            Some(event) => Piece::Entry(Entry { lsn, session, event }),
            None => Piece::Erased { lsn },
        });
        (last_lsn, last_tag) = (head.lsn, Some(own));
        at = end + TAG_BYTES;
    }
    pieces.extend(gap.map(|(from, _)| Piece::Tail { from }));
    pieces
}

/// A file of the journal by its name: entries from `lsn` on; a base makes all before it unneeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileName {
    pub(crate) lsn: u64,
    pub(crate) is_base: bool,
}

impl FileName {
    pub(crate) fn path(self) -> String {
        let letter = if self.is_base { 'b' } else { 'j' };
        format!("{DIR}/{letter}-{:016x}.log", self.lsn)
    }

    fn parse(name: &str) -> Option<Self> {
        let (letter, number) = name.strip_suffix(".log")?.split_once('-')?;
        let is_base = match letter {
            "b" => true,
            "j" => false,
            _ => return None,
        };
        if number.len() != 16 {
            return None;
        }
        Some(Self { lsn: u64::from_str_radix(number, 16).ok()?, is_base })
    }
}

/// The journal's files, oldest first.
pub(crate) fn files(disk: &dyn Disk) -> io::Result<Vec<FileName>> {
    let mut files: Vec<_> = disk.list(DIR)?.iter().filter_map(|name| FileName::parse(name)).collect();
    files.sort_unstable();
    Ok(files)
}

/// The bytes of a journal file; fails where a newer version wrote it.
pub(crate) fn read(disk: &dyn Disk, name: FileName) -> Result<Vec<u8>, crate::StoreError> {
    let path = name.path();
    let bytes = read_file(disk, &path)?.unwrap_or_default();
    refuse_newer(&path, &bytes, MAGIC)?;
    Ok(bytes)
}

/// The end of the journal, where entries are appended.
pub(crate) struct Journal {
    disk: Arc<dyn Disk>,
    keys: Arc<Keys>,
    pub(crate) file: Arc<dyn File>,
    name: FileName,
    end: u64,
    last_tag: Tag,
    pub(crate) next_lsn: u64,
    /// Bytes of the newest base, and those after it.
    pub(crate) base_bytes: u64,
    pub(crate) tail_bytes: u64,
    /// The end of the file is not known: nothing may be appended before a new base.
    pub(crate) is_broken: bool,
}

impl Journal {
    /// Begins a file whose first entry is `start`, durable with its name.
    pub(crate) fn begin(
        disk: Arc<dyn Disk>,
        keys: Arc<Keys>,
        next_lsn: u64,
        start: &Event,
    ) -> Result<Self, io::Error> {
        let name = FileName { lsn: next_lsn, is_base: false };
        let file = create_anew(&*disk, &name.path())?;
        let mut journal = Self {
            disk,
            keys,
            file,
            name,
            end: PREAMBLE_BYTES as u64,
            last_tag: [0; TAG_BYTES],
            next_lsn,
            base_bytes: 0,
            tail_bytes: 0,
            is_broken: false,
        };
        write_full(&*journal.file, 0, &preamble(MAGIC))?;
        journal.append(Whose::FILE, start)?;
        journal.file.sync()?;
        journal.disk.sync_dir(DIR)?;
        Ok(journal)
    }

    /// The last entry's number.
    pub(crate) fn last_lsn(&self) -> u64 {
        self.next_lsn - 1
    }

    /// Hands an entry to the system; its number. After an error the file ends where it did.
    pub(crate) fn append(&mut self, whose: Whose, event: &Event) -> io::Result<u64> {
        if self.is_broken {
            return Err(io::Error::other("the journal's end is unknown since an earlier error"));
        }
        let lsn = self.next_lsn;
        let (bytes, own) = encode(&self.keys, lsn, self.last_tag, whose, event)?;
        if let Err(e) = write_full(&*self.file, self.end, &bytes) {
            // A part of the entry may stand there. Were it left, a shorter entry over it would leave a rest behind.
            self.is_broken = self.file.truncate(self.end).is_err();
            return Err(e);
        }
        self.end += bytes.len() as u64;
        self.tail_bytes += bytes.len() as u64;
        self.last_tag = own;
        self.next_lsn += 1;
        Ok(lsn)
    }

    /// Writes all of `entries` as a new base and goes on in it; the files before are removed. After an error the
    /// journal is as it was, or broken until the next base.
    pub(crate) fn rebase(&mut self, start: &Event, entries: &[(Whose, Event)]) -> io::Result<()> {
        let name = FileName { lsn: self.next_lsn, is_base: true };
        let base = write_base(&*self.disk, &self.keys, name, start, entries)?;
        // From here on a crash may find the new base: appending to the old file would lose entries.
        self.is_broken = true;
        publish_base(&*self.disk, &base, name)?;
        let old = files(&*self.disk)?;
        self.file = base.file;
        (self.name, self.end, self.last_tag) = (name, base.bytes, base.last_tag);
        (self.base_bytes, self.tail_bytes) = (base.bytes, 0);
        self.next_lsn = base.next_lsn;
        self.is_broken = false;
        for file in old.into_iter().filter(|file| file.lsn < name.lsn) {
            // One that stays is ignored, and removed at the next time.
            let _ = self.disk.remove(&file.path());
        }
        Ok(())
    }
}

/// A base that is whole on disk and not yet in its place.
pub(crate) struct Base {
    staged: String,
    file: Arc<dyn File>,
    bytes: u64,
    last_tag: Tag,
    next_lsn: u64,
}

impl Base {
    pub(crate) fn last_lsn(&self) -> u64 {
        self.next_lsn - 1
    }
}

/// Bytes gathered before they are written.
const WRITE_BYTES: usize = 1 << 20;

/// Writes a base under a name that recovery ignores, and makes it durable.
pub(crate) fn write_base(
    disk: &dyn Disk,
    keys: &Keys,
    name: FileName,
    start: &Event,
    entries: &[(Whose, Event)],
) -> io::Result<Base> {
    let staged = format!("{}.new", name.path());
    let file = create_anew(disk, &staged)?;
    let (mut buffer, mut written) = (preamble(MAGIC).to_vec(), 0);
    let (mut last_tag, mut next_lsn) = ([0; TAG_BYTES], name.lsn);
    let end = Event::BaseEnd { entries: entries.len() as u64 };
    let first = std::iter::once((Whose::FILE, start));
    let all = first.chain(entries.iter().map(|(whose, event)| (*whose, event))).chain([(Whose::FILE, &end)]);
    for (whose, event) in all {
        let (bytes, own) = encode(keys, next_lsn, last_tag, whose, event)?;
        buffer.extend_from_slice(&bytes);
        (last_tag, next_lsn) = (own, next_lsn + 1);
        if buffer.len() >= WRITE_BYTES {
            write_full(&*file, written, &buffer)?;
            written += buffer.len() as u64;
            buffer.clear();
        }
    }
    write_full(&*file, written, &buffer)?;
    file.sync()?;
    Ok(Base { staged, file, bytes: written + buffer.len() as u64, last_tag, next_lsn })
}

/// Puts a base in its place.
pub(crate) fn publish_base(disk: &dyn Disk, base: &Base, name: FileName) -> io::Result<()> {
    disk.rename(&base.staged, &name.path())?;
    disk.sync_dir(DIR)
}

/// Cuts bytes that are no entry off a file's end.
pub(crate) fn cut_tail(disk: &dyn Disk, name: FileName, from: usize) -> io::Result<()> {
    let file = disk.open(&name.path(), Access::Write)?;
    file.truncate(from as u64)?;
    file.sync()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::tests::{TENANT, keys};

    const WHOSE: Whose = Whose { tenant: TENANT, session: SessionId(7) };
    const MASTERS: [Option<u8>; 2] = [None, Some(9)];

    fn file(keys: &Keys, events: &[Event]) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut starts, mut before) = (preamble(MAGIC).to_vec(), Vec::new(), [0; 16]);
        for (i, event) in events.iter().enumerate() {
            starts.push(bytes.len());
            let (entry, own) = encode(keys, i as u64 + 1, before, WHOSE, event).unwrap();
            bytes.extend(entry);
            before = own;
        }
        (bytes, starts)
    }

    fn events() -> Vec<Event> {
        (0..4).map(|at| Event::Extend { at, tokens: vec![at; 9] }).collect()
    }

    fn lsns(pieces: &[Piece]) -> Vec<u64> {
        pieces.iter().filter_map(|p| if let Piece::Entry(e) = p { Some(e.lsn) } else { None }).collect()
    }

    #[test]
    fn a_torn_end_is_a_tail_at_every_length() {
        for keys in MASTERS.map(|master| keys(1, master)) {
            let (bytes, mut starts) = file(&keys, &events());
            starts.push(bytes.len());
            for cut in PREAMBLE_BYTES..bytes.len() {
                let pieces = scan(&bytes[..cut], &keys);
                let whole = starts.iter().filter(|&&start| start <= cut).count() - 1;
                assert_eq!(lsns(&pieces), (1..=whole as u64).collect::<Vec<_>>(), "cut at {cut}");
                let torn = !starts.contains(&cut);
                assert_eq!(matches!(pieces.last(), Some(Piece::Tail { .. })), torn, "cut at {cut}");
            }
        }
    }

    #[test]
    fn damage_in_the_middle_costs_one_entry_and_is_told() {
        for keys in MASTERS.map(|master| keys(1, master)) {
            let (bytes, starts) = file(&keys, &events());
            for at in starts[1]..starts[2] {
                let mut flipped = bytes.clone();
                flipped[at] ^= 0x10;
                let pieces = scan(&flipped, &keys);
                assert_eq!(lsns(&pieces), [1, 3, 4], "byte {at}");
                let Some(Piece::Damage { from, to, owners }) = pieces.get(1) else { panic!("{pieces:?}") };
                assert_eq!((*from, *to), (starts[1], starts[2]));
                assert_eq!(!owners.is_empty(), at >= starts[1] + HEAD_BYTES, "the head tells whose it was");
            }
        }
    }

    #[test]
    fn entries_inside_a_payload_or_of_another_store_are_none() {
        let (ours, theirs) = (keys(1, None), keys(2, None));
        let (inner, own) = encode(&theirs, 2, [0; 16], WHOSE, &Event::Delete).unwrap();
        assert_ne!(own, [0; 16]);
        let holder =
            Event::Begin { in_flight: crate::event::InFlight { meta: inner.clone(), tokens: vec![] } };
        let (mut bytes, starts) = file(&ours, &[holder]);
        bytes[starts[0]] ^= 1;
        assert!(lsns(&scan(&bytes, &ours)).is_empty());
        assert!(lsns(&scan(&[&preamble(MAGIC)[..], &inner].concat(), &ours)).is_empty());
    }

    #[test]
    fn an_entry_that_is_not_sealed_does_not_pass_where_others_are() {
        let (bytes, _) = file(&keys(1, None), &events());
        assert_eq!(lsns(&scan(&bytes, &keys(1, None))).len(), 4);
        assert!(lsns(&scan(&bytes, &keys(1, Some(9)))).is_empty());
    }

    #[test]
    fn entries_without_a_key_keep_their_place_in_the_chain() {
        let keys = keys(1, Some(9));
        let start = Event::Start { epoch: 1, wall_ms: 2 };
        let (bytes, _) = file(&keys, &[vec![start], events()].concat());
        keys.forget(TENANT);
        let pieces = scan(&bytes, &keys);
        assert_eq!(lsns(&pieces), [1], "entries of a file are not sealed");
        let erased = pieces.iter().filter(|piece| matches!(piece, Piece::Erased { .. })).count();
        assert_eq!((erased, pieces.len()), (4, 5), "{pieces:?}");
    }

    #[test]
    fn an_entry_put_elsewhere_breaks_the_chain() {
        for keys in MASTERS.map(|master| keys(1, master)) {
            let (bytes, starts) = file(&keys, &events());
            // The third stands where the second did: both are proven, but it does not follow the first.
            let spliced = [&bytes[..starts[1]], &bytes[starts[2]..]].concat();
            let pieces = scan(&spliced, &keys);
            assert!(matches!(pieces[1], Piece::Damage { .. }), "{pieces:?}");
            assert_eq!(lsns(&pieces), [1, 4]);
        }
    }
}
