//! Opening: the lock, the epoch, the journal replayed, the segments read.

use std::{any::Any, sync::Arc};

use crate::{
    disk::{Access, Clock, Disk, Entropy, read_full},
    error::StoreError,
    event::Event,
    index::Index,
    journal::{self, FileName, Piece},
    key::{PAGE_TOKENS, TenantId, hex},
    report::{Damage, RecoveryReport},
    seal::{Keys, MasterKey, Purpose, SealKey},
    segment::{self, Segment},
    session::Table,
    tenant::{self, Tenants},
    twin::{FORMAT, Found, PREAMBLE_BYTES, Twin, refuse_newer, version_of},
    wire::{Malformed, Reader, Writer},
};

pub(crate) const CONFIG: &str = "config";
pub(crate) const CONFIG_MAGIC: [u8; 8] = *b"MSTCONF\n";
pub(crate) const EPOCH: &str = "EPOCH";
pub(crate) const EPOCH_MAGIC: [u8; 8] = *b"MSTEPOC\n";
pub(crate) const QUARANTINE: &str = "quarantine";
const LOCK: &str = "LOCK";

/// What was on disk, in memory.
pub(crate) struct Recovered {
    pub(crate) lock: Box<dyn Any + Send + Sync>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) epoch: u64,
    pub(crate) tenants: Tenants,
    pub(crate) table: Table,
    pub(crate) next_lsn: u64,
    /// The journal should be written anew: something in it is damaged, or it has many files.
    pub(crate) wants_base: bool,
    pub(crate) journal_bytes: u64,
    /// No wall time before this was seen.
    pub(crate) wall_ms_seen: u64,
    pub(crate) index: Index,
    pub(crate) next_number: u64,
    pub(crate) next_serial: u64,
    pub(crate) report: RecoveryReport,
}

/// The number of this opening and the last entry of a store that was closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EpochFile {
    pub(crate) epoch: u64,
    pub(crate) closed_lsn: u64,
}

impl EpochFile {
    fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(body, EPOCH);
        let found = Self { epoch: r.u64()?, closed_lsn: r.u64()? };
        r.end()?;
        Ok(found)
    }

    pub(crate) fn write(self, disk: &dyn Disk) -> std::io::Result<()> {
        epoch_twin(disk).write(&self.body())
    }

    pub(crate) fn body(self) -> Vec<u8> {
        let mut body = Writer::default();
        body.u64(self.epoch).u64(self.closed_lsn);
        body.0
    }
}

pub(crate) fn epoch_twin(disk: &dyn Disk) -> Twin<'_> {
    Twin { disk, path: EPOCH, magic: EPOCH_MAGIC }
}

/// The newest epoch in the directory; `None` where neither copy is whole.
pub(crate) fn read_epoch(disk: &dyn Disk) -> Result<Option<EpochFile>, StoreError> {
    let Found::Whole { bodies, .. } = epoch_twin(disk).read()? else { return Ok(None) };
    Ok(bodies.iter().filter_map(|body| EpochFile::parse(body).ok()).max())
}

pub(crate) fn open(
    disk: &Arc<dyn Disk>,
    clock: &dyn Clock,
    entropy: &Arc<dyn Entropy>,
    master: Option<&MasterKey>,
) -> Result<Recovered, StoreError> {
    let begun_ms = clock.monotonic_ms();
    let disk = &**disk;
    let lock = disk.lock(LOCK).map_err(|e| match e.kind() {
        std::io::ErrorKind::WouldBlock => StoreError::Locked,
        _ => StoreError::Io(e),
    })?;
    let mut report = RecoveryReport::default();
    refuse_newer_files(disk)?;
    let keys = Arc::new(config(disk, entropy, master, &mut report)?);
    for dir in [journal::DIR, segment::DIR, tenant::DIR, QUARANTINE] {
        disk.create_dir(dir)?;
    }
    disk.sync_dir("")?;
    let tenants = tenants(disk, &keys, &mut report)?;
    let found = read_epoch(disk)?;
    let before = match found {
        Some(before) => before,
        None if report.is_new => EpochFile::default(),
        None => {
            let what = "both copies are damaged";
            report.damage.push(Damage { path: EPOCH.to_owned(), offset: 0, bytes: 0, what, session: None });
            EpochFile { epoch: newest_epoch(disk, &keys)?, closed_lsn: 0 }
        }
    };
    let epoch = before.epoch + 1;
    EpochFile { epoch, closed_lsn: 0 }.write(disk)?;
    report.epoch = epoch;

    let mut replay =
        Replay { disk, keys: &keys, epoch, report, table: Table::default(), last_lsn: 0, wall_ms_seen: 0 };
    let (journal_bytes, file_count) = replay.run()?;
    let Replay { mut report, table, last_lsn, wall_ms_seen, .. } = replay;
    if before.closed_lsn > last_lsn {
        report.lost_entries += before.closed_lsn - last_lsn;
    }
    report.was_closed = before.closed_lsn != 0 && before.closed_lsn == last_lsn;
    report.sessions = table.all().count();
    report.damaged_sessions = table.all().filter(|(_, s)| s.damaged).map(|(id, _)| id).collect();
    let pages = segments(disk, &keys, &mut report)?;
    report.elapsed_ms = clock.monotonic_ms() - begun_ms;
    Ok(Recovered {
        lock,
        keys,
        epoch,
        tenants,
        table,
        next_lsn: last_lsn.max(before.closed_lsn) + 1,
        wants_base: report.lost_entries > 0 || !report.quarantined.is_empty() || file_count > 8,
        journal_bytes,
        wall_ms_seen,
        index: pages.index,
        next_number: pages.next_number,
        next_serial: pages.next_serial,
        report,
    })
}

/// Looks at the version of every file before anything is touched.
fn refuse_newer_files(disk: &dyn Disk) -> Result<(), StoreError> {
    let check = |path: String, magic| -> Result<(), StoreError> {
        let mut first = [0; PREAMBLE_BYTES];
        let file = match disk.open(&path, Access::Read) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        let read = read_full(&*file, 0, &mut first)?;
        refuse_newer(&path, &first[..read], magic)
    };
    for copy in ["a", "b"] {
        check(format!("{CONFIG}.{copy}"), CONFIG_MAGIC)?;
        check(format!("{EPOCH}.{copy}"), EPOCH_MAGIC)?;
    }
    for name in disk.list(tenant::DIR)? {
        check(format!("{}/{name}", tenant::DIR), tenant::MAGIC)?;
    }
    for name in journal::files(disk)? {
        check(name.path(), journal::MAGIC)?;
    }
    for dir in disk.list(segment::DIR)? {
        for name in disk.list(&format!("{}/{dir}", segment::DIR))? {
            check(format!("{}/{dir}/{name}", segment::DIR), segment::MAGIC)?;
        }
    }
    Ok(())
}

/// Reads the store's key, or makes it where there is no store yet.
fn config(
    disk: &dyn Disk,
    entropy: &Arc<dyn Entropy>,
    master: Option<&MasterKey>,
    report: &mut RecoveryReport,
) -> Result<Keys, StoreError> {
    let twin = Twin { disk, path: CONFIG, magic: CONFIG_MAGIC };
    let lost = || StoreError::Lost { path: CONFIG.to_owned() };
    match twin.read()? {
        Found::Whole { bodies, damaged } => {
            let keys = parse_config(&bodies[0], entropy, master)?;
            // Nothing is journaled before the config is whole: then it is a store that was being made.
            report.is_new = journal::files(disk)?.is_empty();
            if damaged {
                let (path, what) = (CONFIG.to_owned(), "one copy is damaged");
                report.damage.push(Damage { path, offset: 0, bytes: 0, what, session: None });
            }
            twin.mend(&bodies)?;
            Ok(keys)
        }
        Found::Damaged => Err(lost()),
        // The key comes before all else: where anything else is, it was there.
        Found::Absent if !journal::files(disk)?.is_empty() => Err(lost()),
        Found::Absent => {
            let mut key = [0; 32];
            entropy.fill(&mut key);
            let keys = Keys::new(key, entropy.clone(), master.map(SealKey::of_master));
            let mut body = Writer::default();
            body.u32(PAGE_TOKENS as u32).option(master, |out, master| {
                out.raw(&master.id());
            });
            body.bytes(&keys.wrap(Purpose::Config, &[], &key));
            twin.write(&body.0)?;
            report.is_new = true;
            Ok(keys)
        }
    }
}

/// The keys of a store by the body of its config; fails where the master key is not the one it was made with.
fn parse_config(
    body: &[u8],
    entropy: &Arc<dyn Entropy>,
    master: Option<&MasterKey>,
) -> Result<Keys, StoreError> {
    let lost = || StoreError::Lost { path: CONFIG.to_owned() };
    let mut r = Reader::new(body, CONFIG);
    let mut parse = || -> Result<_, Malformed> {
        let found = (r.u32()?, r.option(Reader::array)?, r.bytes()?);
        r.end()?;
        Ok(found)
    };
    let (page_tokens, made_with, stored) = parse().map_err(|_| lost())?;
    if page_tokens as usize != PAGE_TOKENS {
        return Err(lost());
    }
    let given = master.map(MasterKey::id);
    match (made_with, given) {
        (None, Some(given)) => return Err(StoreError::NotSealed { found: hex(&given) }),
        (Some(expected), given) if given != Some(expected) => {
            let found = given.map_or("none".to_owned(), |given| hex(&given));
            return Err(StoreError::Sealed { expected: hex(&expected), found });
        }
        _ => {}
    }
    let master = master.map(SealKey::of_master);
    let key = match &master {
        Some(master) => master.open(Purpose::Config, &[], stored).ok_or_else(lost)?,
        None => stored.to_vec(),
    };
    Ok(Keys::new(key.try_into().map_err(|_| lost())?, entropy.clone(), master))
}

fn tenants(disk: &dyn Disk, keys: &Arc<Keys>, report: &mut RecoveryReport) -> Result<Tenants, StoreError> {
    let mut damaged = Vec::new();
    let tenants = Tenants::load(disk, keys, &mut damaged)?;
    let what = "tenant file";
    let damage = |path| Damage { path, offset: 0, bytes: 0, what, session: None };
    report.damage.extend(damaged.into_iter().map(damage));
    Ok(tenants)
}

/// The newest epoch that a journal file names, for a store whose own was lost.
fn newest_epoch(disk: &dyn Disk, keys: &Keys) -> Result<u64, StoreError> {
    let mut newest = 0;
    for name in journal::files(disk)? {
        for piece in journal::scan(&journal::read(disk, name)?, keys) {
            if let Piece::Entry(journal::Entry { event: Event::Start { epoch, .. }, .. }) = piece {
                newest = newest.max(epoch);
            }
        }
    }
    Ok(newest)
}

struct Replay<'a> {
    disk: &'a dyn Disk,
    keys: &'a Keys,
    epoch: u64,
    report: RecoveryReport,
    table: Table,
    last_lsn: u64,
    wall_ms_seen: u64,
}

impl Replay<'_> {
    /// Bytes and number of the files that count.
    fn run(&mut self) -> Result<(u64, usize), StoreError> {
        let mut files = journal::files(self.disk)?;
        if let Some(base) = files.iter().rposition(|file| file.is_base) {
            files.drain(..base);
        }
        let mut bytes = 0;
        for (i, &name) in files.iter().enumerate() {
            bytes += self.file(name, files.get(i + 1).copied(), i == 0)?;
        }
        self.table.end_replay();
        Ok((bytes, files.len()))
    }

    fn file(&mut self, name: FileName, next: Option<FileName>, is_first: bool) -> Result<u64, StoreError> {
        let bytes = journal::read(self.disk, name)?;
        let pieces = journal::scan(&bytes, self.keys);
        let (mut damaged, mut erased) = (false, false);
        if version_of(&bytes, journal::MAGIC) != Some(FORMAT) {
            // A file that was being made when the process ended has nothing else in it.
            if pieces.iter().any(|piece| matches!(piece, Piece::Entry(_))) {
                damaged = true;
                self.damage(name, (0, PREAMBLE_BYTES), "file header", None);
            } else if !pieces.iter().any(|piece| matches!(piece, Piece::Tail { .. })) {
                self.report.torn_bytes += bytes.len() as u64;
            }
        }
        if is_first {
            // A journal begins with its first entry, or with a base.
            let lost = if name.is_base { 0 } else { name.lsn.saturating_sub(1) };
            self.report.lost_entries += lost;
            damaged |= lost > 0;
            self.last_lsn = name.lsn.saturating_sub(1);
        }
        let mut base_open = name.is_base;
        for piece in pieces {
            match piece {
                Piece::Entry(entry) => {
                    // A writer that lost the directory went on in its own file; the next one tells where it ended.
                    if next.is_some_and(|next| entry.lsn >= next.lsn) {
                        self.report.fenced_entries += 1;
                        continue;
                    }
                    base_open &= !matches!(entry.event, Event::BaseEnd { .. });
                    damaged |= !self.entry(name, entry);
                }
                Piece::Erased { lsn } => {
                    if next.is_some_and(|next| lsn >= next.lsn) {
                        self.report.fenced_entries += 1;
                        continue;
                    }
                    erased = true;
                    self.report.erased_entries += 1;
                    damaged |= !self.follow(lsn);
                }
                Piece::Damage { from, to, owners } => {
                    damaged = true;
                    self.damage(name, (from, to), "journal entry", owners.first().map(|owner| owner.session));
                    for owner in owners {
                        match owner.is_answer {
                            // It is made again.
                            true => self.table.drop_answer(owner.session),
                            false => self.table.mark_damaged(owner.session),
                        }
                    }
                }
                Piece::Tail { from } => {
                    self.report.torn_bytes += (bytes.len() - from) as u64;
                    if next.is_none() {
                        // Without it the next start finds the same bytes again, no more.
                        let _ = journal::cut_tail(self.disk, name, from);
                    }
                }
            }
        }
        if base_open {
            damaged = true;
            self.damage(name, (bytes.len(), bytes.len()), "base ends early", None);
        }
        if let Some(next) = next
            && next.lsn > self.last_lsn + 1
        {
            damaged = true;
            self.report.lost_entries += next.lsn - self.last_lsn - 1;
            self.last_lsn = next.lsn - 1;
        }
        // Who put a store back without its tenants' files finds there what a base leaves out.
        if damaged || erased {
            self.quarantine(name, &bytes);
        }
        Ok(bytes.len() as u64)
    }

    /// Counts what is missing before this entry; false where anything is.
    fn follow(&mut self, lsn: u64) -> bool {
        let lost = lsn.saturating_sub(self.last_lsn + 1);
        self.report.lost_entries += lost;
        self.last_lsn = lsn;
        lost == 0
    }

    /// False where it does not fit.
    fn entry(&mut self, name: FileName, entry: journal::Entry) -> bool {
        let mut fits = self.follow(entry.lsn);
        if let Event::Start { wall_ms, .. } = entry.event {
            self.wall_ms_seen = self.wall_ms_seen.max(wall_ms);
        }
        let (is_node, is_answer) = (matches!(entry.event, Event::Node(_)), entry.event.is_answer());
        match self.table.apply(entry.lsn, entry.session, entry.event) {
            Ok(()) => self.report.entries += 1,
            Err(rejected) => {
                fits = false;
                self.damage(name, (0, 0), rejected.0, Some(entry.session));
                if is_answer {
                    self.table.drop_answer(entry.session);
                } else if !is_node {
                    // A turn of a base is missed by its session, at that one's entry.
                    self.table.mark_damaged(entry.session);
                }
            }
        }
        fits
    }

    fn damage(
        &mut self,
        name: FileName,
        (from, to): (usize, usize),
        what: &'static str,
        session: Option<crate::SessionId>,
    ) {
        let (offset, bytes) = (from as u64, (to - from) as u64);
        self.report.damage.push(Damage { path: name.path(), offset, bytes, what, session });
    }

    /// Keeps a copy of a damaged file: the journal will be written anew without what cannot be read.
    fn quarantine(&mut self, name: FileName, bytes: &[u8]) {
        let path = name.path();
        let file = path.rsplit_once('/').map_or(&*path, |(_, file)| file);
        let copy = format!("{QUARANTINE}/{}-{file}", self.epoch);
        // The report stands without the copy: a full disk must not keep a store from opening.
        if crate::disk::replace_file(self.disk, &copy, bytes).is_ok() {
            self.report.quarantined.push(copy);
        }
    }
}

struct FoundPages {
    index: Index,
    next_number: u64,
    next_serial: u64,
}

fn segments(disk: &dyn Disk, keys: &Keys, report: &mut RecoveryReport) -> Result<FoundPages, StoreError> {
    let (mut index, mut next_number, mut next_serial) = (Index::default(), 1, 1);
    let mut found = Vec::new();
    for dir in disk.list(segment::DIR)? {
        let Some(tenant) = parse_tenant(&dir) else { continue };
        for name in disk.list(&segment::tenant_dir(tenant))? {
            let Some(number) = Segment::number_of(&name) else { continue };
            next_number = next_number.max(number + 1);
            let segment = Arc::new(Segment::new(tenant, number));
            let contents = match segment.open(disk, keys) {
                Ok(contents) => contents,
                Err(StoreError::Io(_)) => {
                    let (path, what) = (segment.path(), "segment is unreadable");
                    report.damage.push(Damage { path, offset: 0, bytes: 0, what, session: None });
                    continue;
                }
                Err(e) => return Err(e),
            };
            if contents.damaged_bytes > 0 {
                let (path, bytes, what) = (segment.path(), contents.damaged_bytes, "page records");
                report.damage.push(Damage { path, offset: 0, bytes, what, session: None });
            }
            report.torn_page_bytes += contents.torn_bytes;
            let whole = contents.torn_bytes == 0 && contents.erased_bytes == 0;
            if let Some(end) = contents.unsealed_end.filter(|_| whole) {
                // It is walked again the next time if this fails.
                let _ = segment::seal_recovered(disk, keys, &segment, end, &contents.slots);
            }
            index.segments.insert((tenant, number), segment.clone());
            found.extend(contents.slots.into_iter().map(|slot| (segment.clone(), slot)));
        }
    }
    // Older first, so that a page written twice is found where it was written last, and recency survives.
    found.sort_unstable_by_key(|(_, slot)| slot.serial);
    for (segment, slot) in found {
        next_serial = next_serial.max(slot.serial + 1);
        let tokens = slot.tail.clone();
        index.insert(&segment, slot, &tokens);
    }
    report.pages = index.len();
    report.page_bytes = index.all_bytes();
    Ok(FoundPages { index, next_number, next_serial })
}

fn parse_tenant(dir: &str) -> Option<TenantId> {
    let mut id = [0; 16];
    if dir.len() != 32 {
        return None;
    }
    for (byte, digits) in id.iter_mut().zip(dir.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    (hex(&id) == dir).then_some(TenantId(id))
}
