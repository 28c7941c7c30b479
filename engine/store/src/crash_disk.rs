//! A disk that ends the process at one of its calls, so that a test can kill a real server at every step of its writing.

use std::{
    any::Any,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::disk::{Access, Disk, File, Space};

/// Another disk with a point at which the process aborts.
///
/// Points are counted from 1 over all calls that change something: one before each, and for a write a second one after
/// half of its bytes.
pub struct CrashDisk {
    inner: Arc<dyn Disk>,
    points: Arc<Points>,
}

struct Points {
    passed: AtomicU64,
    at: u64,
}

impl Points {
    /// Whether this point is the one.
    fn is_here(&self) -> bool {
        self.passed.fetch_add(1, Ordering::SeqCst) + 1 == self.at
    }

    fn pass(&self) {
        if self.is_here() {
            std::process::abort();
        }
    }
}

impl CrashDisk {
    /// `inner`, until point `at`; at 0 the process lives.
    pub fn new(inner: Arc<dyn Disk>, at: u64) -> Self {
        Self { inner, points: Arc::new(Points { passed: AtomicU64::new(0), at }) }
    }

    fn file(&self, inner: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(CrashFile { inner, points: self.points.clone() })
    }
}

impl Disk for CrashDisk {
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        self.points.pass();
        self.inner.create(path).map(|file| self.file(file))
    }

    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn File>> {
        self.inner.open(path, access).map(|file| self.file(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.points.pass();
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.points.pass();
        self.inner.remove(path)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        self.points.pass();
        self.inner.create_dir(dir)
    }

    fn remove_dir(&self, dir: &str) -> io::Result<()> {
        self.points.pass();
        self.inner.remove_dir(dir)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.points.pass();
        self.inner.sync_dir(dir)
    }

    fn lock(&self, path: &str) -> io::Result<Box<dyn Any + Send + Sync>> {
        self.inner.lock(path)
    }

    fn space(&self) -> io::Result<Space> {
        self.inner.space()
    }
}

struct CrashFile {
    inner: Arc<dyn File>,
    points: Arc<Points>,
}

impl File for CrashFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, into)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.points.pass();
        if self.points.is_here() {
            // What becomes of the half is as good as unknown: the process ends.
            let _ = self.inner.write_at(offset, &bytes[..bytes.len() / 2]);
            std::process::abort();
        }
        self.inner.write_at(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.points.pass();
        self.inner.sync()
    }

    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    fn truncate(&self, bytes: u64) -> io::Result<()> {
        self.points.pass();
        self.inner.truncate(bytes)
    }
}
