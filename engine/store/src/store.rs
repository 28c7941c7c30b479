//! The store: one directory, opened once; its journal, its pages and the threads that drive them.

use std::{
    any::Any,
    path::Path,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    counts::SyncCounts,
    disk::{Clock, Disk, Entropy, SystemClock, SystemEntropy},
    error::StoreError,
    event::{Durability, Event, SessionId, Whose},
    journal::Journal,
    key::TenantId,
    options::Options,
    pages::{PageCounts, Pages, lock},
    realdisk::RealDisk,
    recover::{self, EpochFile},
    report::RecoveryReport,
    session::Table,
    tenant::{Tenant, Tenants},
    time::Time,
    verify::{ScrubCounts, ScrubPlace},
    writer::Writer,
};

/// After a base could not be written, entries are refused for so long before the next try.
const REBASE_PAUSE_MS: u64 = 1000;
/// How often a store with threads looks for expired sessions, full quotas and segments to compact.
const MAINTAIN_MS: u64 = 10_000;

/// Sessions and pages on disk.
///
/// A store with [`Options::threads`] writes and syncs by itself; without, [`Store::step`] does. Dropping it closes it.
pub struct Store {
    pub(crate) inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
    readers: Option<crate::reader::Readers>,
    _lock: Box<dyn Any + Send + Sync>,
}

/// The journal and what it makes.
pub(crate) struct State {
    pub(crate) table: Table,
    pub(crate) journal: Journal,
    /// Entries up to this one are durable through a base.
    durable_lsn: u64,
    rebase_after_ms: u64,
    /// Ids of turns that are never written.
    next_unwritten: u64,
    pub(crate) time: Time,
}

#[derive(Default)]
struct Commits {
    synced_lsn: u64,
    is_syncing: bool,
}

/// Counts of the journal since the store was opened.
#[derive(Debug, Default)]
pub struct JournalCounts {
    /// Entries appended.
    pub entries: AtomicU64,
    /// Syncs of entries.
    pub sync: SyncCounts,
    /// Appends and syncs that failed.
    pub errors: AtomicU64,
    /// Bases written.
    pub bases: AtomicU64,
    /// Damaged files that the opening put aside.
    pub quarantined: AtomicU64,
}

pub(crate) struct Inner {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) pages: Pages,
    pub(crate) state: Mutex<State>,
    pub(crate) tenants: Mutex<Tenants>,
    commits: Mutex<Commits>,
    committed: Condvar,
    fenced: AtomicBool,
    pub(crate) counts: JournalCounts,
    pub(crate) scrub: Mutex<ScrubPlace>,
    pub(crate) scrub_counts: ScrubCounts,
}

impl Store {
    /// Opens the store in a directory of the machine, made if it does not exist.
    ///
    /// # Errors
    /// See [`Store::open`].
    pub fn open_dir(root: &Path, options: Options) -> Result<(Self, RecoveryReport), StoreError> {
        let disk = Arc::new(RealDisk::new(root)?);
        Self::open(disk, Arc::new(SystemClock::default()), Arc::new(SystemEntropy), options)
    }

    /// Opens a store, or makes one in an empty directory. Damage is put aside and reported.
    ///
    /// # Errors
    /// [`StoreError::Locked`], [`StoreError::Newer`], [`StoreError::Lost`], [`StoreError::Sealed`] and
    /// [`StoreError::NotSealed`] where the master key is not the directory's, or the disk's.
    pub fn open(
        disk: Arc<dyn Disk>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        options: Options,
    ) -> Result<(Self, RecoveryReport), StoreError> {
        let found = recover::open(&disk, &*clock, &entropy, options.master_key.as_ref())?;
        let mut time = Time::new(&*clock, found.wall_ms_seen);
        let start = Event::Start { epoch: found.epoch, wall_ms: time.now_ms(&*clock) };
        let mut journal = Journal::begin(disk.clone(), found.keys.clone(), found.next_lsn, &start)?;
        journal.base_bytes = found.journal_bytes;
        let writer = Writer::new(found.next_number, found.next_serial);
        let world = (disk.clone(), clock.clone());
        let pages = Pages::new(world, (found.keys, found.epoch), options, found.index, writer);
        let state = State {
            table: found.table,
            durable_lsn: journal.last_lsn(),
            journal,
            rebase_after_ms: 0,
            next_unwritten: 1 << 63,
            time,
        };
        let inner = Arc::new(Inner {
            disk,
            clock,
            pages,
            state: Mutex::new(state),
            tenants: Mutex::new(found.tenants),
            commits: Mutex::default(),
            committed: Condvar::new(),
            fenced: AtomicBool::new(false),
            counts: JournalCounts {
                quarantined: AtomicU64::new(found.report.quarantined.len() as u64),
                ..JournalCounts::default()
            },
            scrub: Mutex::default(),
            scrub_counts: ScrubCounts::default(),
        });
        if found.wants_base {
            // What was read is in memory and in the old files: a full disk must not keep the store from opening.
            let _ = inner.rebase(&mut lock(&inner.state));
        }
        let sessions = Arc::downgrade(&inner);
        let keeper = move |tenant| sessions.upgrade().map(|inner| inner.kept(tenant)).unwrap_or_default();
        assert!(inner.pages.keeper.set(Box::new(keeper)).is_ok(), "set once, here");
        let threads = if inner.pages.options.threads { inner.start_threads() } else { Vec::new() };
        let readers = inner.pages.options.threads.then(|| crate::reader::Readers::start(&inner));
        Ok((Self { inner, threads, readers, _lock: found.lock }, found.report))
    }

    /// The tenant of this name; new ones get a secret of their own.
    ///
    /// # Errors
    /// [`StoreError::TooLong`], or the disk's where it is new.
    pub fn tenant(&self, name: &str) -> Result<Tenant, StoreError> {
        self.inner.check_epoch()?;
        lock(&self.inner.tenants).tenant(&*self.inner.disk, name)
    }

    /// Ids and names of all tenants.
    pub fn tenants(&self) -> Vec<(TenantId, Arc<str>)> {
        lock(&self.inner.tenants).all()
    }

    /// The number of this opening.
    pub fn epoch(&self) -> u64 {
        self.inner.pages.epoch
    }

    /// Counts of pages.
    pub fn page_counts(&self) -> &PageCounts {
        &self.inner.pages.counts
    }

    /// Counts of the journal.
    pub fn journal_counts(&self) -> &JournalCounts {
        &self.inner.counts
    }

    /// Payload bytes that wait to be written.
    pub fn ring_bytes(&self) -> usize {
        self.inner.pages.ring_bytes()
    }

    /// Threads that read, where the store has threads.
    pub(crate) fn readers(&self) -> Option<&crate::reader::Readers> {
        self.readers.as_ref()
    }

    /// Does what the threads of a store do: writes waiting pages, syncs what is due. For stores without threads.
    pub fn step(&self) {
        while self.inner.pages.write_next(Duration::ZERO) {}
        lock(&self.inner.pages.writer).sync_if_due(&self.inner.pages);
        self.inner.sync_journal();
    }

    /// Writes and syncs everything handed over before this call.
    ///
    /// # Errors
    /// [`StoreError::Pages`] or [`StoreError::Journal`] where a sync failed.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.inner.sync_pages()?;
        let last = lock(&self.inner.state).journal.last_lsn();
        self.inner.commit(last)
    }

    /// Takes the wall clock as right after a jump forward had stopped expiry.
    pub fn confirm_clock(&self) {
        lock(&self.inner.state).time.confirm(&*self.inner.clock);
    }

    /// Whether sessions expire: not after the wall clock jumped forward by more than an hour.
    pub fn trusts_clock(&self) -> bool {
        lock(&self.inner.state).time.is_trusted()
    }

    /// Writes everything out and ends. The next opening knows that nothing may be missing.
    ///
    /// # Errors
    /// Where something could not be made durable.
    pub fn close(mut self) -> Result<(), StoreError> {
        self.shut()
    }

    fn shut(&mut self) -> Result<(), StoreError> {
        self.inner.pages.close();
        self.readers = None;
        for thread in self.threads.drain(..) {
            // A panic of a thread was reported when it happened; the rest is still written.
            let _ = thread.join();
        }
        while self.inner.pages.write_next(Duration::ZERO) {}
        self.inner.check_epoch()?;
        let pages = lock(&self.inner.pages.writer).seal_all(&self.inner.pages);
        let mut state = lock(&self.inner.state);
        if state.journal.is_broken {
            self.inner.rebase(&mut state).map_err(StoreError::Journal)?;
        }
        let last = state.journal.last_lsn();
        drop(state);
        self.inner.commit(last)?;
        EpochFile { epoch: self.epoch(), closed_lsn: last }.write(&*self.inner.disk)?;
        pages.map_err(|e| StoreError::Pages(e.to_string()))
    }

    /// Ends as a killed process does: nothing more is written. For tests.
    pub fn kill(mut self) {
        self.inner.fenced.store(true, Ordering::Relaxed);
        self.inner.pages.give_up();
        self.readers = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if !self.inner.pages.is_closed() {
            // What could not be written is as after a crash; close() tells those who ask.
            let _ = self.shut();
        }
    }
}

impl Inner {
    /// Fails once another store has opened the directory.
    pub(crate) fn check_epoch(&self) -> Result<(), StoreError> {
        let expected = self.pages.epoch;
        if self.fenced.load(Ordering::Relaxed) {
            return Err(StoreError::Fenced { expected, found: 0 });
        }
        self.pages.check_epoch().inspect_err(|e| {
            if matches!(e, StoreError::Fenced { .. }) {
                self.fenced.store(true, Ordering::Relaxed);
                self.pages.give_up();
            }
        })
    }

    /// Writes an entry of a session and applies it; how durable it is at least without a sync, and its number.
    ///
    /// At `turn` and above nothing is changed where the journal fails. At `async` the change is kept in memory, told by
    /// [`Durability::Ephemeral`], and written with the next base.
    pub(crate) fn record(
        &self,
        state: &mut State,
        whose: Whose,
        event: Event,
        level: Durability,
    ) -> Result<(Durability, u64), StoreError> {
        self.record_all(state, whose, vec![event], level)
    }

    /// The same for several entries of which only the last makes a difference, so that a crash between them makes none.
    pub(crate) fn record_all(
        &self,
        state: &mut State,
        whose: Whose,
        events: Vec<Event>,
        level: Durability,
    ) -> Result<(Durability, u64), StoreError> {
        let id = whose.session;
        if level == Durability::Ephemeral {
            for event in events {
                state.next_unwritten += 1;
                apply(&mut state.table, state.next_unwritten, id, event);
            }
            return Ok((level, 0));
        }
        let appended = self.mend(state)?.and_then(|()| {
            let first = state.journal.next_lsn;
            let (end, before) = events.split_last().expect("an entry at least");
            before.iter().try_for_each(|event| state.journal.append(whose, event).map(drop))?;
            if !before.is_empty() && level >= Durability::Turn {
                // A power loss must not keep the end without what it ends.
                state.journal.file.sync().inspect_err(|_| state.journal.is_broken = true)?;
            }
            state.journal.append(whose, end)?;
            Ok((first, state.journal.last_lsn()))
        });
        match appended {
            Ok((first, last)) => {
                self.counts.entries.fetch_add(events.len() as u64, Ordering::Relaxed);
                self.counts.sync.wrote(self.clock.monotonic_ms());
                for (lsn, event) in (first..).zip(events) {
                    apply(&mut state.table, lsn, id, event);
                }
                let grown = state.journal.base_bytes.max(self.pages.options.rebase_bytes);
                if state.journal.tail_bytes > grown {
                    // The entry stands in the old file; a failure is met again by the next one.
                    let _ = self.try_rebase(state);
                }
                Ok((Durability::Async, last))
            }
            Err(e) if level >= Durability::Turn || e.kind() == std::io::ErrorKind::InvalidInput => {
                self.counts.errors.fetch_add(1, Ordering::Relaxed);
                Err(StoreError::Journal(e))
            }
            Err(_) => {
                self.counts.errors.fetch_add(1, Ordering::Relaxed);
                state.journal.is_broken = true;
                for event in events {
                    let lsn = state.journal.next_lsn;
                    state.journal.next_lsn += 1;
                    apply(&mut state.table, lsn, id, event);
                }
                Ok((Durability::Ephemeral, 0))
            }
        }
    }

    /// Makes a broken journal whole, if that is possible; the outer error is for good.
    pub(crate) fn mend(&self, state: &mut State) -> Result<std::io::Result<()>, StoreError> {
        match self.check_epoch() {
            Err(StoreError::Io(e)) => Ok(Err(e)),
            Err(e) => Err(e),
            Ok(()) if state.journal.is_broken => Ok(self.try_rebase(state)),
            Ok(()) => Ok(Ok(())),
        }
    }

    fn try_rebase(&self, state: &mut State) -> std::io::Result<()> {
        let now_ms = self.clock.monotonic_ms();
        if now_ms < state.rebase_after_ms {
            return Err(std::io::Error::other("the journal failed a moment ago"));
        }
        self.rebase(state).inspect_err(|_| state.rebase_after_ms = now_ms + REBASE_PAUSE_MS)
    }

    /// Writes the journal anew from the table.
    pub(crate) fn rebase(&self, state: &mut State) -> std::io::Result<()> {
        self.check_epoch().map_err(std::io::Error::other)?;
        let wall_ms = state.time.now_ms(&*self.clock);
        let start = Event::Start { epoch: self.pages.epoch, wall_ms };
        state.journal.rebase(&start, &state.table.entries())?;
        state.durable_lsn = state.journal.last_lsn();
        self.counts.sync.synced(None);
        self.counts.bases.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Waits until the entry `lsn` is durable; one sync serves all who wait.
    pub(crate) fn commit(&self, lsn: u64) -> Result<(), StoreError> {
        let mut commits = lock(&self.commits);
        loop {
            if commits.synced_lsn >= lsn {
                return Ok(());
            }
            if !commits.is_syncing {
                break;
            }
            commits = self.committed.wait(commits).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        commits.is_syncing = true;
        drop(commits);
        let synced = self.sync_entries();
        let mut commits = lock(&self.commits);
        commits.is_syncing = false;
        if let Ok(synced) = synced {
            commits.synced_lsn = commits.synced_lsn.max(synced);
        }
        drop(commits);
        self.committed.notify_all();
        match synced {
            Ok(synced) if synced >= lsn => Ok(()),
            Ok(_) => self.commit(lsn),
            Err(e) => Err(e),
        }
    }

    /// Syncs the journal; the last entry that is durable by it.
    fn sync_entries(&self) -> Result<u64, StoreError> {
        let (file, last) = {
            let state = lock(&self.state);
            if state.durable_lsn >= state.journal.last_lsn() {
                return Ok(state.durable_lsn);
            }
            (state.journal.file.clone(), state.journal.last_lsn())
        };
        self.check_epoch()?;
        let (begun_us, begun_ms) = (self.clock.monotonic_us(), self.clock.monotonic_ms());
        let synced = file.sync();
        self.counts.sync.took(self.clock.monotonic_us().saturating_sub(begun_us));
        let failed = match synced {
            Ok(()) => {
                let mut state = lock(&self.state);
                // Entries that failed to be written, and wait for a base, are not in the file.
                if !state.journal.is_broken || state.durable_lsn >= last {
                    state.durable_lsn = state.durable_lsn.max(last);
                    // Entries that came meanwhile wait since then at most.
                    let waits = state.durable_lsn < state.journal.last_lsn();
                    self.counts.sync.synced(waits.then_some(begun_ms));
                    return Ok(last);
                }
                std::io::Error::other("entries wait for a new base")
            }
            Err(e) => {
                self.counts.errors.fetch_add(1, Ordering::Relaxed);
                e
            }
        };
        let mut state = lock(&self.state);
        if state.durable_lsn >= last {
            return Ok(state.durable_lsn);
        }
        // The file must not be synced again: its bytes may be gone. The table has them.
        state.journal.is_broken = true;
        match self.rebase(&mut state) {
            Ok(()) => Ok(state.durable_lsn),
            Err(_) => Err(StoreError::Journal(failed)),
        }
    }

    fn sync_journal(&self) {
        let last = lock(&self.state).journal.last_lsn();
        // A failure is counted, and met again by the next turn that must be durable.
        let _ = self.commit(last);
    }

    pub(crate) fn sync_pages(&self) -> Result<(), StoreError> {
        self.pages.wait_written(Duration::MAX);
        lock(&self.pages.writer).sync(&self.pages).map_err(|e| StoreError::Pages(e.to_string()))
    }

    pub(crate) fn now_ms(&self, state: &mut State) -> u64 {
        state.time.now_ms(&*self.clock)
    }

    fn start_threads(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        let spawn = |name: &str, inner: Arc<Inner>, run: fn(&Inner)| {
            let named = std::thread::Builder::new().name(name.to_owned());
            named.spawn(move || run(&inner)).expect("the system has a thread for the store")
        };
        let mut threads = vec![
            spawn("store-pages", self.clone(), |inner| {
                let patience = Duration::from_millis(inner.pages.options.sync_ms.clamp(1, 50));
                while !inner.pages.is_closed() || inner.pages.ring_bytes() > 0 {
                    inner.pages.write_next(patience);
                    lock(&inner.pages.writer).sync_if_due(&inner.pages);
                }
            }),
            spawn("store-journal", self.clone(), |inner| {
                let tick = Duration::from_millis(inner.pages.options.journal_sync_ms.max(1));
                let mut maintained_ms = inner.clock.monotonic_ms();
                while !inner.pages.is_closed() {
                    std::thread::sleep(tick);
                    inner.sync_journal();
                    if inner.clock.monotonic_ms() - maintained_ms >= MAINTAIN_MS {
                        maintained_ms = inner.clock.monotonic_ms();
                        // What fails now is tried again the next time.
                        let _ = inner.maintain();
                    }
                }
            }),
        ];
        if self.pages.options.scrub_bytes_per_s > 0 {
            threads.push(spawn("store-scrub", self.clone(), Inner::scrub_on));
        }
        threads
    }
}

/// Applies an entry that was checked against this very table.
fn apply(table: &mut Table, lsn: u64, id: SessionId, event: Event) {
    let applied = table.apply(lsn, id, event);
    assert!(applied.is_ok(), "an entry checked under the same lock was rejected: {applied:?}");
}
