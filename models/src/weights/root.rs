//! The Merkle root over the bytes of all tensors: the same model has the same root wherever its files lie.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use super::{Entry, Weights};

/// Whether a root that was computed before is believed while its files look the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootCheck {
    /// Files of equal size, times and inode are taken to be equal.
    Trust,
    /// All bytes are read.
    Verify,
}

/// What a sidecar says: the root, and what the files looked like when it was computed.
#[derive(Serialize, Deserialize, PartialEq)]
struct Sidecar {
    version: u32,
    root: String,
    files: Vec<Stat>,
}

/// What a file looks like without reading it. The time of change, which no program sets at will, is part of it.
#[derive(Serialize, Deserialize, PartialEq)]
struct Stat {
    path: PathBuf,
    size_bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
    inode: u64,
}

const SIDECAR_VERSION: u32 = 1;
const SIDECAR_BYTES_MAX: u64 = 1 << 20;

impl Weights {
    /// The root, computed from all bytes on this many threads.
    pub fn root(&self, threads: usize) -> [u8; 32] {
        let entries: Vec<(&String, &Entry)> = self.stored.iter().collect();
        let next = AtomicUsize::new(0);
        let work = || {
            let mut leaves = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some((name, entry)) = entries.get(at) else { return leaves };
                leaves.push((at, self.leaf(name, entry)));
                self.release_span(&entry.span);
            }
        };
        let mut leaves: Vec<(usize, [u8; 32])> = std::thread::scope(|scope| {
            let workers: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
            let own = work();
            let others = workers.into_iter().flat_map(|w| w.join().expect("hashing does not panic"));
            own.into_iter().chain(others.collect::<Vec<_>>()).collect()
        });
        leaves.sort_unstable();
        let mut root = blake3::Hasher::new_derive_key("mainstay weights root 1");
        root.update(&(leaves.len() as u64).to_le_bytes());
        leaves.iter().for_each(|(_, leaf)| {
            root.update(leaf);
        });
        *root.finalize().as_bytes()
    }

    fn leaf(&self, name: &str, entry: &Entry) -> [u8; 32] {
        let mut leaf = blake3::Hasher::new_derive_key("mainstay weights leaf 1");
        for text in [name, &entry.type_name] {
            leaf.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        leaf.update(&(entry.shape.len() as u64).to_le_bytes());
        entry.shape.iter().for_each(|&n| {
            leaf.update(&(n as u64).to_le_bytes());
        });
        leaf.update(self.bytes(&entry.span));
        *leaf.finalize().as_bytes()
    }

    /// The root, taken from a sidecar where one of these files has it and `check` allows, else computed and written to
    /// the first of them that can be written. Weights that lie in memory have no files to look at and are computed.
    pub fn cached_root(&self, sidecars: &[PathBuf], check: RootCheck, threads: usize) -> [u8; 32] {
        let Some(files) = self.stats() else { return self.root(threads) };
        let known = sidecars.iter().find_map(|path| read(path)).filter(|found| found.files == files);
        if let Some(root) = known.filter(|_| check == RootCheck::Trust).and_then(|found| parse(&found.root)) {
            return root;
        }
        let root = self.root(threads);
        let text = root.iter().map(|b| format!("{b:02x}")).collect();
        let sidecar = Sidecar { version: SIDECAR_VERSION, root: text, files };
        // Without a sidecar the next start reads the weights again; that is no reason to fail.
        let _ = sidecars.iter().find(|path| write(path, &sidecar).is_ok());
        root
    }

    fn stats(&self) -> Option<Vec<Stat>> {
        // What was computed at load is not part of the root.
        let stored = || self.stored.values().map(|entry| &self.files[entry.span.file]);
        let mapped = stored().all(|file| matches!(file.bytes, super::Bytes::File(_)));
        let files = self.files.iter().filter(|file| matches!(file.bytes, super::Bytes::File(_)));
        mapped.then(|| files.map(|file| stat(&file.path)).collect::<Option<Vec<_>>>())?
    }
}

fn stat(path: &Path) -> Option<Stat> {
    let path = path.canonicalize().ok()?;
    let found = fs::metadata(&path).ok()?;
    let modified = found.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    #[cfg(unix)]
    let (changed_ns, inode) = {
        use std::os::unix::fs::MetadataExt;
        (i128::from(found.ctime()) * 1_000_000_000 + i128::from(found.ctime_nsec()), found.ino())
    };
    #[cfg(not(unix))]
    let (changed_ns, inode) = (0, 0);
    let (size_bytes, modified_ns) = (found.len(), modified.as_nanos() as i128);
    Some(Stat { path, size_bytes, modified_ns, changed_ns, inode })
}

fn read(path: &Path) -> Option<Sidecar> {
    let size = fs::metadata(path).ok()?.len();
    let bytes = (size <= SIDECAR_BYTES_MAX).then(|| fs::read(path).ok())??;
    let sidecar: Sidecar = serde_json::from_slice(&bytes).ok()?;
    (sidecar.version == SIDECAR_VERSION).then_some(sidecar)
}

/// Writes aside and renames, so that nobody reads a half.
fn write(path: &Path, sidecar: &Sidecar) -> std::io::Result<()> {
    let aside = path.with_extension(format!("new-{}", std::process::id()));
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&aside, serde_json::to_vec_pretty(sidecar)?)?;
    fs::rename(&aside, path)
}

fn parse(hex: &str) -> Option<[u8; 32]> {
    let mut root = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    for (byte, at) in root.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
    }
    Some(root)
}
