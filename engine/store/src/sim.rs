//! A disk, a clock and randomness that follow from a seed, and fail on command: for tests.

use std::{
    any::Any,
    collections::{BTreeMap, HashMap, HashSet},
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    aligned::BLOCK,
    disk::{Access, Clock, Disk, Entropy, File, Space},
    pages::lock,
};

/// Numbers from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`; 0 where `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.bits() % end }
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What happens to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The process ends: everything handed to the system stays.
    Kill,
    /// The power goes: of what was not synced, any part may be there, torn at any sector, in any order.
    PowerLoss,
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Truncate(usize),
}

impl Change {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Change::Write { offset, bytes } => {
                let end = offset + bytes.len();
                if to.len() < end {
                    to.resize(end, 0);
                }
                to[*offset..end].copy_from_slice(bytes);
            }
            Change::Truncate(len) => to.resize(*len, 0),
        }
    }
}

#[derive(Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Clone)]
enum NameChange {
    Set(String, u64),
    Remove(String),
    MakeDir(String),
    RemoveDir(String),
}

#[derive(Clone, Default)]
struct Names {
    files: BTreeMap<String, u64>,
    dirs: HashSet<String>,
}

impl Names {
    fn apply(&mut self, change: &NameChange) {
        match change {
            NameChange::Set(path, inode) => {
                self.files.insert(path.clone(), *inode);
            }
            NameChange::Remove(path) => {
                self.files.remove(path);
            }
            NameChange::MakeDir(dir) => {
                self.dirs.insert(dir.clone());
            }
            NameChange::RemoveDir(dir) => {
                self.dirs.remove(dir);
            }
        }
    }
}

struct State {
    random: Random,
    inodes: HashMap<u64, Inode>,
    next_inode: u64,
    now: Names,
    durable: Names,
    /// Changes of names by directory, in order.
    unsynced: BTreeMap<String, Vec<NameChange>>,
    locked: HashMap<String, Arc<AtomicBool>>,
    calls: u64,
    dies_at: Option<u64>,
    is_dead: bool,
    fails_at: Option<u64>,
    sync_fails: bool,
    capacity: u64,
    short_io: bool,
    reads_stall: bool,
    /// Handles of an earlier life are of no use.
    life: u64,
}

/// A disk in memory. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

const SECTOR: usize = 512;

fn dir_of(path: &str) -> String {
    path.rsplit_once('/').map_or("", |(dir, _)| dir).to_owned()
}

impl State {
    /// Counts a call and fails it where it is the one that must.
    fn call(&mut self) -> io::Result<()> {
        self.calls += 1;
        if self.dies_at == Some(self.calls) {
            self.is_dead = true;
        }
        if self.is_dead {
            return Err(io::Error::other("the simulated machine is off"));
        }
        if self.fails_at == Some(self.calls) {
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }

    fn name(&mut self, dir: &str, change: NameChange) {
        self.now.apply(&change);
        self.unsynced.entry(dir.to_owned()).or_default().push(change);
    }

    fn used(&self) -> u64 {
        self.now.files.values().filter_map(|inode| self.inodes.get(inode)).map(|i| i.now.len() as u64).sum()
    }

    /// Leaves what a power loss leaves.
    fn lose_power(&mut self) {
        let changes = std::mem::take(&mut self.unsynced);
        for (_, changes) in changes {
            let kept = self.random.below(changes.len() as u64 + 1) as usize;
            changes[..kept].iter().for_each(|change| self.durable.apply(change));
        }
        self.now = self.durable.clone();
        let mut ids: Vec<_> = self.inodes.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let inode = self.inodes.get_mut(&id).expect("listed");
            for change in std::mem::take(&mut inode.unsynced) {
                match (self.random.below(4), change) {
                    (0, _) => {}
                    (1, Change::Write { offset, bytes }) => {
                        // Some of its sectors, those at odd places too.
                        for (i, part) in bytes.chunks(SECTOR).enumerate() {
                            if self.random.one_in(2) {
                                let offset = offset + i * SECTOR;
                                Change::Write { offset, bytes: part.to_vec() }.apply(&mut inode.durable);
                            }
                        }
                    }
                    (_, change) => change.apply(&mut inode.durable),
                }
            }
            inode.now = inode.durable.clone();
        }
    }
}

impl SimDisk {
    /// An empty disk.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            random: Random::new(seed),
            inodes: HashMap::new(),
            next_inode: 0,
            now: Names::default(),
            durable: Names::default(),
            unsynced: BTreeMap::new(),
            locked: HashMap::new(),
            calls: 0,
            dies_at: None,
            is_dead: false,
            fails_at: None,
            sync_fails: false,
            capacity: u64::MAX,
            short_io: false,
            reads_stall: false,
            life: 0,
        })))
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        lock(&self.0).calls
    }

    /// The machine goes off at the `n`th call from now, 1 being the next.
    pub fn die_at(&self, n: u64) {
        let mut state = lock(&self.0);
        state.dies_at = Some(state.calls + n);
    }

    /// The `n`th call from now fails with EIO, once.
    pub fn fail_at(&self, n: u64) {
        let mut state = lock(&self.0);
        state.fails_at = Some(state.calls + n);
    }

    /// Syncs of files fail from now on, or no longer; a failed one loses what it was to keep, as Linux does.
    pub fn fail_syncs(&self, fail: bool) {
        lock(&self.0).sync_fails = fail;
    }

    /// How many bytes fit.
    pub fn set_capacity(&self, bytes: u64) {
        lock(&self.0).capacity = bytes;
    }

    /// Reads and writes are cut short at random.
    pub fn cut_short(&self) {
        lock(&self.0).short_io = true;
    }

    /// Reads of files hang from now on, or no longer.
    pub fn stall_reads(&self, stall: bool) {
        lock(&self.0).reads_stall = stall;
    }

    /// Whether it went off.
    pub fn is_dead(&self) -> bool {
        lock(&self.0).is_dead
    }

    /// Starts the machine again; all handles and locks are gone.
    pub fn restart(&self, after: Ending) {
        let mut state = lock(&self.0);
        if after == Ending::PowerLoss {
            state.lose_power();
        }
        state.life += 1;
        (state.is_dead, state.dies_at, state.fails_at, state.sync_fails) = (false, None, None, false);
        state.locked.clear();
    }

    /// Lets another take a lock that is held, as happens on shared file systems.
    pub fn break_lock(&self, path: &str) {
        lock(&self.0).locked.remove(path);
    }

    /// A disk with the same files, all of them durable.
    pub fn copy(&self, seed: u64) -> Self {
        let copy = Self::new(seed);
        for (path, bytes) in self.files() {
            copy.set(&path, bytes);
        }
        let dirs = lock(&self.0).now.dirs.clone();
        lock(&copy.0).now.dirs.clone_from(&dirs);
        lock(&copy.0).durable.dirs = dirs;
        copy
    }

    /// All files with their bytes.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let state = lock(&self.0);
        state.now.files.iter().map(|(path, inode)| (path.clone(), state.inodes[inode].now.clone())).collect()
    }

    /// Puts a file there, durable.
    pub fn set(&self, path: &str, bytes: Vec<u8>) {
        let mut state = lock(&self.0);
        let id = state.next_inode;
        state.next_inode += 1;
        state.inodes.insert(id, Inode { now: bytes.clone(), durable: bytes, unsynced: Vec::new() });
        state.now.files.insert(path.to_owned(), id);
        state.durable.files.insert(path.to_owned(), id);
    }
}

impl Disk for SimDisk {
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let mut state = lock(&self.0);
        state.call()?;
        if state.now.files.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let dir = dir_of(path);
        if !dir.is_empty() && !state.now.dirs.contains(&dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let id = state.next_inode;
        state.next_inode += 1;
        state.inodes.insert(id, Inode::default());
        state.name(&dir, NameChange::Set(path.to_owned(), id));
        Ok(Arc::new(SimFile { disk: self.clone(), inode: id, life: state.life, is_direct: false }))
    }

    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn File>> {
        let mut state = lock(&self.0);
        state.call()?;
        let inode = *state.now.files.get(path).ok_or(io::ErrorKind::NotFound)?;
        let is_direct = access == Access::Direct;
        Ok(Arc::new(SimFile { disk: self.clone(), inode, life: state.life, is_direct }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = lock(&self.0);
        state.call()?;
        let inode = *state.now.files.get(from).ok_or(io::ErrorKind::NotFound)?;
        assert_eq!(dir_of(from), dir_of(to), "a rename stays in its directory");
        let dir = dir_of(to);
        // One step, for the file system's own journal makes it one.
        state.name(&dir, NameChange::Set(to.to_owned(), inode));
        state.name(&dir, NameChange::Remove(from.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut state = lock(&self.0);
        state.call()?;
        if !state.now.files.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.name(&dir_of(path), NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let mut state = lock(&self.0);
        state.call()?;
        let paths = state.now.files.keys().chain(&state.now.dirs);
        let mut names: Vec<_> = paths
            .filter(|path| dir_of(path) == dir && !path.is_empty())
            .map(|path| path.rsplit('/').next().unwrap_or_default().to_owned())
            .collect();
        names.sort();
        Ok(names)
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        let mut state = lock(&self.0);
        state.call()?;
        if !state.now.dirs.contains(dir) {
            state.name(&dir_of(dir), NameChange::MakeDir(dir.to_owned()));
        }
        Ok(())
    }

    fn remove_dir(&self, dir: &str) -> io::Result<()> {
        let mut state = lock(&self.0);
        state.call()?;
        state.name(&dir_of(dir), NameChange::RemoveDir(dir.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let mut state = lock(&self.0);
        state.call()?;
        let changes = state.unsynced.remove(dir).unwrap_or_default();
        changes.iter().for_each(|change| state.durable.apply(change));
        Ok(())
    }

    fn lock(&self, path: &str) -> io::Result<Box<dyn Any + Send + Sync>> {
        let mut state = lock(&self.0);
        state.call()?;
        if state.locked.get(path).is_some_and(|held| held.load(Ordering::SeqCst)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let held = Arc::new(AtomicBool::new(true));
        state.locked.insert(path.to_owned(), held.clone());
        Ok(Box::new(Guard(held)))
    }

    fn space(&self) -> io::Result<Space> {
        let mut state = lock(&self.0);
        state.call()?;
        Ok(Space { free: state.capacity.saturating_sub(state.used()), total: state.capacity })
    }
}

struct Guard(Arc<AtomicBool>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

struct SimFile {
    disk: SimDisk,
    inode: u64,
    life: u64,
    is_direct: bool,
}

impl SimFile {
    fn with<T>(&self, run: impl FnOnce(&mut State, u64) -> io::Result<T>) -> io::Result<T> {
        let mut state = lock(&self.disk.0);
        if state.life != self.life {
            return Err(io::Error::other("a handle from before the restart"));
        }
        run(&mut state, self.inode)
    }
}

impl File for SimFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        while lock(&self.disk.0).reads_stall {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.with(|state, id| {
            state.call()?;
            let wanted = match state.short_io {
                // Past the page cache whole blocks are read, but at the end of a file.
                true if self.is_direct => {
                    BLOCK * (1 + state.random.below((into.len() / BLOCK) as u64) as usize)
                }
                true if into.len() > 1 => 1 + state.random.below(into.len() as u64) as usize,
                _ => into.len(),
            };
            let bytes = &state.inodes[&id].now;
            let from = bytes.len().min(offset as usize);
            let count = wanted.min(bytes.len() - from);
            into[..count].copy_from_slice(&bytes[from..from + count]);
            Ok(count)
        })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.with(|state, id| {
            let called = state.call();
            let mut count = bytes.len();
            if called.is_err() {
                // The call that fails may have written a part.
                count = state.random.below(bytes.len() as u64 + 1) as usize;
                if state.dies_at != Some(state.calls) && state.is_dead {
                    return called.map(|()| 0);
                }
            } else if state.short_io && bytes.len() > 1 {
                count = 1 + state.random.below(bytes.len() as u64) as usize;
            }
            let size = state.inodes[&id].now.len() as u64;
            let grows = (offset + count as u64).saturating_sub(size);
            let free = state.capacity.saturating_sub(state.used());
            if grows > free {
                count = (count as u64 - (grows - free).min(count as u64)) as usize;
                if count == 0 {
                    return Err(io::ErrorKind::StorageFull.into());
                }
            }
            let change = Change::Write { offset: offset as usize, bytes: bytes[..count].to_vec() };
            let inode = state.inodes.get_mut(&id).expect("a handle's inode lives");
            change.apply(&mut inode.now);
            inode.unsynced.push(change);
            called.map(|()| count)
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|state, id| {
            let called = state.call();
            let failed = called.is_err() || state.sync_fails;
            let dead = state.is_dead;
            let inode = state.inodes.get_mut(&id).expect("a handle's inode lives");
            if failed {
                if !dead {
                    // The dirty bytes are marked clean, and lost at the next power loss.
                    inode.unsynced.clear();
                }
                return called.and(Err(io::Error::from_raw_os_error(5)));
            }
            inode.unsynced.clear();
            inode.durable = inode.now.clone();
            Ok(())
        })
    }

    fn size(&self) -> io::Result<u64> {
        self.with(|state, id| {
            state.call()?;
            Ok(state.inodes[&id].now.len() as u64)
        })
    }

    fn truncate(&self, bytes: u64) -> io::Result<()> {
        self.with(|state, id| {
            state.call()?;
            let change = Change::Truncate(bytes as usize);
            let inode = state.inodes.get_mut(&id).expect("a handle's inode lives");
            change.apply(&mut inode.now);
            inode.unsynced.push(change);
            Ok(())
        })
    }
}

/// A clock that moves when told.
#[derive(Debug)]
pub struct SimClock {
    wall_ms: AtomicU64,
    monotonic_ms: AtomicU64,
}

impl SimClock {
    /// A clock at this wall time.
    pub fn new(wall_ms: u64) -> Self {
        Self { wall_ms: wall_ms.into(), monotonic_ms: 0.into() }
    }

    /// Time passes.
    pub fn advance(&self, ms: u64) {
        self.wall_ms.fetch_add(ms, Ordering::SeqCst);
        self.monotonic_ms.fetch_add(ms, Ordering::SeqCst);
    }

    /// Someone sets the wall clock.
    pub fn jump(&self, ms: i64) {
        self.wall_ms.fetch_add(ms as u64, Ordering::SeqCst);
    }
}

impl Clock for SimClock {
    fn wall_ms(&self) -> u64 {
        self.wall_ms.load(Ordering::SeqCst)
    }

    fn monotonic_ms(&self) -> u64 {
        self.monotonic_ms.load(Ordering::SeqCst)
    }
}

/// Randomness from a seed: no secret.
#[derive(Debug)]
pub struct SimEntropy(Mutex<Random>);

impl SimEntropy {
    /// The bytes of this seed.
    pub fn new(seed: u64) -> Self {
        Self(Mutex::new(Random::new(seed)))
    }
}

impl Entropy for SimEntropy {
    fn fill(&self, into: &mut [u8]) {
        let mut random = lock(&self.0);
        into.iter_mut().for_each(|byte| *byte = random.bits() as u8);
    }
}
