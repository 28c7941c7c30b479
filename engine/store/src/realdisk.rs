//! The store's files on a real file system.

use std::{
    any::Any,
    ffi::OsStr,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{self, AtFlags, FlockOperation, Mode, OFlags};

use crate::disk::{Access, Disk, File, Space};

/// A directory on the machine's file system.
#[derive(Debug)]
pub struct RealDisk {
    root: PathBuf,
}

impl RealDisk {
    /// The directory, made with mode 0700 if it does not exist.
    ///
    /// # Errors
    /// What the system reports.
    pub fn new(root: impl Into<PathBuf>) -> io::Result<Self> {
        let disk = Self { root: root.into() };
        if let Some(above) = disk.root.parent() {
            std::fs::create_dir_all(above)?;
        }
        disk.create_dir("")?;
        Ok(disk)
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, relative: &str) -> PathBuf {
        if relative.is_empty() { self.root.clone() } else { self.root.join(relative) }
    }

    fn open_fd(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        fs::open(self.path(path), flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))
    }
}

#[cfg(target_os = "linux")]
const DIRECT: OFlags = OFlags::DIRECT;
#[cfg(not(target_os = "linux"))]
const DIRECT: OFlags = OFlags::empty();

impl Disk for RealDisk {
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let fd = self.open_fd(path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        Ok(Arc::new(RealFile { fd }))
    }

    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn File>> {
        let fd = match access {
            Access::Read => self.open_fd(path, OFlags::RDONLY)?,
            Access::Write => self.open_fd(path, OFlags::RDWR)?,
            // Not every file system has it (tmpfs before 6.6): the page cache serves then.
            Access::Direct => match self.open_fd(path, OFlags::RDONLY | DIRECT) {
                Err(rustix::io::Errno::INVAL) => self.open_fd(path, OFlags::RDONLY)?,
                opened => opened?,
            },
        };
        Ok(Arc::new(RealFile { fd }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(fs::rename(self.path(from), self.path(to))?)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        Ok(fs::unlink(self.path(path))?)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let entries = match std::fs::read_dir(self.path(dir)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut names = Vec::new();
        for entry in entries {
            // The store writes only names of ASCII letters; others are not its own.
            names.extend(entry?.file_name().to_str().map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        match fs::mkdir(self.path(dir), Mode::from_raw_mode(0o700)) {
            Err(rustix::io::Errno::EXIST) => Ok(()),
            made => Ok(made?),
        }
    }

    fn remove_dir(&self, dir: &str) -> io::Result<()> {
        Ok(fs::unlinkat(fs::CWD, self.path(dir), AtFlags::REMOVEDIR)?)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let fd = self.open_fd(dir, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(fs::fsync(fd)?)
    }

    fn lock(&self, path: &str) -> io::Result<Box<dyn Any + Send + Sync>> {
        let fd = self.open_fd(path, OFlags::RDWR | OFlags::CREATE)?;
        fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Box::new(fd))
    }

    fn space(&self) -> io::Result<Space> {
        let found = fs::statvfs::<&OsStr>(self.root.as_os_str())?;
        Ok(Space { free: found.f_bavail * found.f_frsize, total: found.f_blocks * found.f_frsize })
    }
}

struct RealFile {
    fd: OwnedFd,
}

impl File for RealFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::pread(&self.fd, into, offset)?)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::pwrite(&self.fd, bytes, offset)?)
    }

    fn sync(&self) -> io::Result<()> {
        // macOS has no fdatasync that reaches the platter; std asks for the full barrier there.
        #[cfg(target_os = "macos")]
        return Ok(fs::fcntl_fullfsync(&self.fd)?);
        #[cfg(not(target_os = "macos"))]
        Ok(fs::fdatasync(&self.fd)?)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(fs::fstat(&self.fd)?.st_size as u64)
    }

    fn truncate(&self, bytes: u64) -> io::Result<()> {
        Ok(fs::ftruncate(&self.fd, bytes)?)
    }
}
