//! What the store asks of the outside world: files, time and randomness, each behind a trait.

use std::{
    any::Any,
    io,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use crate::aligned::AlignedBytes;

/// How an existing file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading through the page cache.
    Read,
    /// Reading past the page cache where the file system can; offset, length and buffer are multiples of
    /// [`BLOCK`](crate::aligned::BLOCK).
    Direct,
    /// Reading and writing.
    Write,
}

/// Bytes of the file system the store lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that may still be written.
    pub free: u64,
    /// Bytes in all.
    pub total: u64,
}

/// A directory tree that belongs to one store. Paths are relative to its root, with `/` between names.
pub trait Disk: Send + Sync {
    /// Makes an empty file that only the owner may read; fails if there is one.
    ///
    /// # Errors
    /// What the system reports.
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>>;

    /// Opens an existing file.
    ///
    /// # Errors
    /// What the system reports; [`io::ErrorKind::NotFound`] where there is none.
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn File>>;

    /// Gives a file another name, replacing what bears it. Durable after [`Disk::sync_dir`] of both directories.
    ///
    /// # Errors
    /// What the system reports.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system reports.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// Names in a directory, sorted; empty where there is none.
    ///
    /// # Errors
    /// What the system reports.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;

    /// Makes a directory that only the owner may enter, unless it exists.
    ///
    /// # Errors
    /// What the system reports.
    fn create_dir(&self, dir: &str) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// What the system reports.
    fn remove_dir(&self, dir: &str) -> io::Result<()>;

    /// Makes the names in a directory durable; the empty path is the root.
    ///
    /// # Errors
    /// What the system reports.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;

    /// Takes the one lock on `path`, held until the guard is dropped.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where another holds it.
    fn lock(&self, path: &str) -> io::Result<Box<dyn Any + Send + Sync>>;

    /// Room on the file system.
    ///
    /// # Errors
    /// What the system reports.
    fn space(&self) -> io::Result<Space>;
}

/// An open file. Reads and writes name their offset, so that a handle is shared without a lock.
pub trait File: Send + Sync {
    /// Reads at most `into.len()` bytes; fewer at the end of the file, and maybe elsewhere.
    ///
    /// # Errors
    /// What the system reports.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize>;

    /// Writes at most `bytes.len()` bytes.
    ///
    /// # Errors
    /// What the system reports.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;

    /// Makes what was written durable. After an error nothing may be assumed of the bytes written since the last
    /// success, and the call must not be repeated on this file.
    ///
    /// # Errors
    /// What the system reports.
    fn sync(&self) -> io::Result<()>;

    /// Length, bytes.
    ///
    /// # Errors
    /// What the system reports.
    fn size(&self) -> io::Result<u64>;

    /// Cuts the file to `bytes`.
    ///
    /// # Errors
    /// What the system reports.
    fn truncate(&self, bytes: u64) -> io::Result<()>;
}

/// Time.
pub trait Clock: Send + Sync {
    /// Milliseconds since 1970; may jump either way.
    fn wall_ms(&self) -> u64;
    /// Milliseconds since some instant; never falls.
    fn monotonic_ms(&self) -> u64;
    /// The same in microseconds, for measuring.
    fn monotonic_us(&self) -> u64 {
        self.monotonic_ms() * 1000
    }
}

/// Randomness fit for secrets.
pub trait Entropy: Send + Sync {
    /// Fills `into`.
    fn fill(&self, into: &mut [u8]);
}

/// The machine's clock.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn wall_ms(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
    }

    fn monotonic_ms(&self) -> u64 {
        self.0.elapsed().as_millis() as u64
    }

    fn monotonic_us(&self) -> u64 {
        self.0.elapsed().as_micros() as u64
    }
}

/// The machine's source of randomness.
#[derive(Debug)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&self, into: &mut [u8]) {
        getrandom::fill(into).expect("the system's random source works once the process has started");
    }
}

/// Fills as much of `into` as the file has from `offset` on, across short reads.
pub(crate) fn read_full(file: &dyn File, offset: u64, into: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(offset + done as u64, &mut into[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Like [`read_full`] into blocks, for handles opened with [`Access::Direct`]: a short read is continued from the
/// block it ended in.
pub(crate) fn read_blocks(file: &dyn File, offset: u64, into: &mut AlignedBytes) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        let count = match file.read_at(offset + done as u64, &mut into[done..]) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let whole = count - count % crate::aligned::BLOCK;
        if whole == 0 {
            return Ok(done + count);
        }
        done += whole;
    }
    Ok(done)
}

/// Writes all of `bytes`, across short writes.
pub(crate) fn write_full(file: &dyn File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.write_at(offset + done as u64, &bytes[done..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The whole of a file, or `None` where there is none.
pub(crate) fn read_file(disk: &dyn Disk, path: &str) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path, Access::Read) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = vec![0; file.size()? as usize];
    let read = read_full(&*file, 0, &mut bytes)?;
    bytes.truncate(read);
    Ok(Some(bytes))
}

/// Puts `bytes` in the place of a file at once: after a crash either the old or the new contents are there.
pub(crate) fn replace_file(disk: &dyn Disk, path: &str, bytes: &[u8]) -> io::Result<()> {
    let staged = format!("{path}.new");
    let file = create_anew(disk, &staged)?;
    write_full(&*file, 0, bytes)?;
    file.sync()?;
    disk.rename(&staged, path)?;
    disk.sync_dir(path.rsplit_once('/').map_or("", |(dir, _)| dir))
}

/// An empty file, also where a crash left one of that name.
pub(crate) fn create_anew(disk: &dyn Disk, path: &str) -> io::Result<Arc<dyn File>> {
    match disk.create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            disk.remove(path)?;
            disk.create(path)
        }
        made => made,
    }
}
