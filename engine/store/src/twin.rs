//! Small files that must not be lost: a format version, a body and a checksum, each kept twice.

use std::io;

use crate::{
    disk::{Disk, read_file, replace_file},
    error::StoreError,
    wire::{Malformed, Reader, Writer},
};

/// The version of every format this build writes, and the newest it reads.
pub const FORMAT: u32 = 1;

/// Bytes of what every file of the store begins with: magic, version and their checksum. It stays the same in all
/// versions, so that a newer file is known as such.
pub(crate) const PREAMBLE_BYTES: usize = 16;

/// CRC-64/NVME.
pub(crate) fn crc64(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// The first bytes of a file of this kind.
pub(crate) fn preamble(magic: [u8; 8]) -> [u8; PREAMBLE_BYTES] {
    preamble_of(magic, FORMAT)
}

fn preamble_of(magic: [u8; 8], version: u32) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&magic);
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    let check = crc64(&bytes[..12]) as u32;
    bytes[12..].copy_from_slice(&check.to_le_bytes());
    bytes
}

/// The version a file says it has, if its first bytes are whole.
pub(crate) fn version_of(bytes: &[u8], magic: [u8; 8]) -> Option<u32> {
    let version = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
    (bytes.get(..PREAMBLE_BYTES)? == preamble_of(magic, version)).then_some(version)
}

/// Fails where the file is whole and of a version that this build does not know.
pub(crate) fn refuse_newer(path: &str, bytes: &[u8], magic: [u8; 8]) -> Result<(), StoreError> {
    match version_of(bytes, magic) {
        Some(found) if found > FORMAT => {
            Err(StoreError::Newer { path: path.to_owned(), found, known: FORMAT })
        }
        _ => Ok(()),
    }
}

/// One file kept as two, `<path>.a` and `<path>.b`.
pub(crate) struct Twin<'a> {
    pub(crate) disk: &'a dyn Disk,
    pub(crate) path: &'a str,
    pub(crate) magic: [u8; 8],
}

/// What was found of a twin.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Neither copy exists.
    Absent,
    /// Copies exist and none is whole.
    Damaged,
    /// The whole copies' bodies, `a` first.
    Whole {
        bodies: Vec<Vec<u8>>,
        /// A copy exists and is not whole.
        damaged: bool,
    },
}

impl Twin<'_> {
    fn paths(&self) -> [String; 2] {
        ["a", "b"].map(|copy| format!("{}.{copy}", self.path))
    }

    pub(crate) fn read(&self) -> Result<Found, StoreError> {
        let (mut exists, mut bodies) = (0, Vec::new());
        for path in self.paths() {
            let Some(bytes) = read_file(self.disk, &path)? else { continue };
            exists += 1;
            refuse_newer(&path, &bytes, self.magic)?;
            bodies.extend(self.body(&bytes).ok());
        }
        Ok(match (exists, bodies.len()) {
            (0, _) => Found::Absent,
            (_, 0) => Found::Damaged,
            (exists, whole) => Found::Whole { bodies, damaged: whole < exists },
        })
    }

    /// Writes the copies anew where they are not two that are whole.
    pub(crate) fn mend(&self, bodies: &[Vec<u8>]) -> io::Result<()> {
        if bodies.len() < 2 { self.write(&bodies[0]) } else { Ok(()) }
    }

    fn body(&self, bytes: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut reader = Reader::new(bytes, "small file");
        if reader.raw(PREAMBLE_BYTES)? != preamble(self.magic) {
            return Err(reader.malformed());
        }
        let body = reader.bytes()?;
        let check = crc64(&bytes[..PREAMBLE_BYTES + 4 + body.len()]);
        if reader.u64()? != check {
            return Err(reader.malformed());
        }
        reader.end()?;
        Ok(body.to_vec())
    }

    /// Replaces both copies, one after the other, so that one of them is whole at every moment.
    pub(crate) fn write(&self, body: &[u8]) -> io::Result<()> {
        let bytes = self.bytes(body);
        self.paths().iter().try_for_each(|path| replace_file(self.disk, path, &bytes))
    }

    pub(crate) fn bytes(&self, body: &[u8]) -> Vec<u8> {
        let mut out = Writer::default();
        out.raw(&preamble(self.magic)).bytes(body);
        let check = crc64(&out.0);
        out.u64(check);
        out.0
    }

    pub(crate) fn remove(&self) -> io::Result<()> {
        for path in self.paths() {
            match self.disk.remove(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}
