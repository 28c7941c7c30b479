//! The cache of fetched models: what is in it, and how it goes.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// A model in the cache.
pub(crate) struct Cached {
    /// `org/name`.
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    pub(crate) snapshots: Vec<Snapshot>,
    /// Bytes of interrupted fetches.
    pub(crate) partial_bytes: u64,
}

/// A model at one commit.
pub(crate) struct Snapshot {
    pub(crate) commit: String,
    /// The revisions that were found to be this commit when they were last asked for.
    pub(crate) revisions: Vec<String>,
    pub(crate) bytes: u64,
}

/// All models in the cache, in the order of their names.
///
/// # Errors
/// Names the directory that cannot be read.
pub(crate) fn models() -> Result<Vec<Cached>> {
    let root = hf_hub::resolve_cache_dir();
    let mut found = Vec::new();
    for dir in entries(&root)? {
        let name = file_name(&dir);
        if let Some((owner, model)) = name.strip_prefix("models--").and_then(|n| n.split_once("--")) {
            found.push(read(format!("{owner}/{model}"), dir)?);
        }
    }
    found.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(found)
}

fn read(id: String, dir: PathBuf) -> Result<Cached> {
    let refs = revisions(&dir.join("refs"), "")?;
    let mut snapshots = Vec::new();
    for snapshot in entries(&dir.join("snapshots"))? {
        let commit = file_name(&snapshot);
        let named = refs.iter().filter(|(_, found)| *found == commit);
        let revisions = named.map(|(revision, _)| revision.clone()).collect();
        let bytes = files(&snapshot)?.iter().map(|file| size(file)).sum();
        snapshots.push(Snapshot { commit, revisions, bytes });
    }
    snapshots.sort_by(|a, b| b.revisions.cmp(&a.revisions).then_with(|| a.commit.cmp(&b.commit)));
    let partial =
        entries(&dir.join("blobs"))?.into_iter().filter(|blob| file_name(blob).ends_with(".incomplete"));
    let partial_bytes = partial.map(|blob| size(&blob)).sum();
    Ok(Cached { id, dir, snapshots, partial_bytes })
}

impl Cached {
    /// Bytes of all of it.
    ///
    /// # Errors
    /// Names the directory that cannot be read.
    pub(crate) fn bytes(&self) -> Result<u64> {
        Ok(entries(&self.dir.join("blobs"))?.iter().map(|blob| size(blob)).sum())
    }

    /// The snapshot that a revision, or a commit, names.
    pub(crate) fn snapshot(&self, revision: &str) -> Option<&Snapshot> {
        let is_meant = |s: &&Snapshot| s.commit == revision || s.revisions.iter().any(|own| own == revision);
        self.snapshots.iter().find(is_meant)
    }

    /// Removes it whole.
    ///
    /// # Errors
    /// Names what cannot be removed.
    pub(crate) fn remove(&self) -> Result<()> {
        fs::remove_dir_all(&self.dir).with_context(|| format!("{}", self.dir.display()))
    }

    /// Removes one snapshot, and the blobs that no other needs. What it frees.
    ///
    /// # Errors
    /// Names what cannot be removed.
    pub(crate) fn remove_snapshot(&self, snapshot: &Snapshot) -> Result<u64> {
        ensure!(super::file_name(&snapshot.commit), "{}: `{}` is no commit", self.id, snapshot.commit);
        for revision in &snapshot.revisions {
            let path = self.dir.join("refs").join(revision);
            fs::remove_file(&path).with_context(|| format!("{}", path.display()))?;
        }
        let dir = self.dir.join("snapshots").join(&snapshot.commit);
        let own = blobs(&dir)?;
        fs::remove_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
        let mut needed = BTreeSet::new();
        for other in entries(&self.dir.join("snapshots"))? {
            needed.extend(blobs(&other)?);
        }
        let mut freed = 0;
        for blob in own.difference(&needed) {
            freed += size(blob);
            fs::remove_file(blob).with_context(|| format!("{}", blob.display()))?;
        }
        Ok(freed)
    }
}

/// The blobs that the files of a snapshot lead to.
fn blobs(snapshot: &Path) -> Result<BTreeSet<PathBuf>> {
    let links = files(snapshot)?.into_iter().filter(|file| file.is_symlink());
    // a link that leads nowhere holds nothing
    Ok(links.filter_map(|file| file.canonicalize().ok()).collect())
}

/// Revisions below `refs`, whose names may contain `/`, and the commits that they name.
fn revisions(dir: &Path, prefix: &str) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for path in entries(dir)? {
        let name = format!("{prefix}{}", file_name(&path));
        if path.is_dir() {
            found.extend(revisions(&path, &format!("{name}/"))?);
        } else {
            let commit = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
            found.push((name, commit.trim().to_owned()));
        }
    }
    Ok(found)
}

/// All files below a directory.
pub(super) fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in entries(dir)? {
        if path.is_dir() { found.extend(files(&path)?) } else { found.push(path) }
    }
    found.sort();
    Ok(found)
}

/// What lies in a directory; nothing where there is none.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let wrong = || format!("{}", dir.display());
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry.with_context(wrong)?.path())).collect(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(wrong),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Bytes of the file, or of what a link leads to; 0 where there is none.
fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.len())
}
