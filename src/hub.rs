//! Models from a hub: the files of `org/name[:FILE][@revision]`, fetched once into the cache that other hub clients share.
//!
//! The layout is that of the hub's own clients: `blobs/<etag>`, `snapshots/<commit>/<file>` linking to a blob,
//! `refs/<revision>` naming a commit, and `blobs/<etag>.incomplete` for what was interrupted, which is continued
//! with a range request. Endpoint, token and cache directory follow HF_ENDPOINT, HF_TOKEN, HF_HOME.

pub(crate) mod cache;
mod choice;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use futures_util::StreamExt;
use hf_hub::repository::{HFRepository, RepoTreeEntry, RepoTypeModel};
use hf_hub::{HFClient, HFError};
use sha2::{Digest, Sha256};

use self::choice::{Choice, choose};
use crate::progress::Progress;

/// How often a broken transfer of one file is taken up again without a single new byte.
const TRIES_WITHOUT_PROGRESS: u32 = 3;

/// A model on a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HubId {
    pub(crate) owner: String,
    pub(crate) name: String,
    /// A GGUF file of the repository, or the quantization of one.
    pub(crate) file: Option<String>,
    pub(crate) revision: String,
}

/// Where files may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The hub, or the cache.
    Hub,
    /// The cache only.
    Cache,
}

/// The revision where nobody names one.
pub(crate) const MAIN: &str = "main";

impl HubId {
    /// Reads `org/name[:FILE][@revision]`; `None` if the text is no such thing.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let (id, file) = id.split_once(':').map_or((id, None), |(id, file)| (id, Some(file)));
        let (owner, name) = id.split_once('/')?;
        let word = |s: &str, extra: &str| {
            let fits = |c: char| c.is_ascii_alphanumeric() || extra.contains(c);
            !s.is_empty() && s.chars().all(fits) && !s.starts_with(['.', '-']) && !s.contains("..")
        };
        let fits = file.is_none_or(|file| word(file, "._-/"));
        (fits && word(owner, "._-") && word(name, "._-") && word(revision, "._-/")).then(|| Self {
            owner: owner.into(),
            name: name.into(),
            file: file.map(str::to_owned),
            revision: revision.into(),
        })
    }

    /// `org/name`.
    pub(crate) fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The same, and which file where that was said.
    pub(crate) fn model_name(&self) -> String {
        self.file.as_ref().map_or_else(|| self.id(), |file| format!("{}:{file}", self.id()))
    }

    /// Where the cache keeps it.
    pub(crate) fn cache_dir(&self) -> PathBuf {
        hf_hub::resolve_cache_dir().join(format!("models--{}--{}", self.owner, self.name))
    }
}

/// A file of a repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RemoteFile {
    path: String,
    /// 0 where the hub did not tell.
    size: u64,
    /// Names the content: SHA-256 of large files, a git blob's id of small ones.
    etag: String,
}

/// The directory of a snapshot that holds every file a model needs, or its GGUF file there, after fetching what is
/// missing.
///
/// # Errors
/// Says what the hub answered and what to do about it. If the hub cannot be reached and a snapshot of the revision is
/// in the cache, that one is used with a warning instead.
pub(crate) async fn fetch(hub: &HubId, reach: Reach) -> Result<PathBuf> {
    if reach == Reach::Cache {
        let found = cached(hub)?;
        return found.with_context(|| {
            let (id, revision, dir) = (hub.id(), &hub.revision, hub.cache_dir());
            format!("{id}: offline, and revision `{revision}` is not in the cache ({})", dir.display())
        });
    }
    let client = HFClient::new().map_err(|e| anyhow!(explain(hub, &e)))?;
    let repo = client.model(&hub.owner, &hub.name);
    let cache = hub.cache_dir();
    let info = match repo.info().revision(hub.revision.clone()).send().await {
        Ok(info) => info,
        Err(error) => match cached(hub) {
            Ok(Some(copy)) if unreachable(&error) => {
                tracing::warn!("{}; using the copy in {}", explain(hub, &error), copy.display());
                return Ok(copy);
            }
            _ => bail!(explain(hub, &error)),
        },
    };
    let commit = info.sha.with_context(|| format!("{}: the hub names no commit", hub.id()))?;
    ensure!(file_name(&commit), "{}: the hub names the commit `{commit}`", hub.id());
    let names = info.siblings.unwrap_or_default().into_iter().map(|s| s.rfilename).collect();
    let snapshot = cache.join("snapshots").join(&commit);
    let (choice, files) = list(hub, &repo, &commit, names).await?;
    for file in &missing(files, &snapshot) {
        let blob = fetch_blob(hub, &repo, &commit, file).await?;
        link(&blob, &snapshot, &file.path)?;
    }
    let reference = cache.join("refs").join(&hub.revision);
    if hub.revision != commit {
        write_whole(&reference, commit.as_bytes())?;
    }
    Ok(opened_by(&choice, &snapshot))
}

/// What the loader opens of a snapshot.
fn opened_by(choice: &Choice, snapshot: &Path) -> PathBuf {
    match choice {
        Choice::Safetensors => snapshot.to_owned(),
        Choice::Gguf(parts) => snapshot.join(parts.first().map_or("", String::as_str)),
    }
}

/// The model, as the cache holds it.
///
/// # Errors
/// Where the snapshot has not the file that was asked for.
fn cached(hub: &HubId) -> Result<Option<PathBuf>> {
    let cache = hub.cache_dir();
    let reference = fs::read_to_string(cache.join("refs").join(&hub.revision));
    let commit = reference.unwrap_or_else(|_| hub.revision.clone());
    let snapshot = cache.join("snapshots").join(commit.trim());
    if !snapshot.is_dir() {
        return Ok(None);
    }
    let files = cache::files(&snapshot)?;
    let inside =
        files.iter().filter(|file| file.exists()).filter_map(|file| file.strip_prefix(&snapshot).ok());
    let names: Vec<&str> = inside.filter_map(Path::to_str).collect();
    let choice = choose(names.iter().copied(), hub.file.as_deref());
    let choice = choice.map_err(|what| anyhow!("{}: in the cache: {what}", hub.id()))?;
    Ok(Some(opened_by(&choice, &snapshot)))
}

fn missing(files: Vec<RemoteFile>, snapshot: &Path) -> Vec<RemoteFile> {
    files.into_iter().filter(|f| !snapshot.join(&f.path).exists()).collect()
}

/// Whether the text can be one component of a path and nothing else.
fn file_name(text: &str) -> bool {
    !text.is_empty() && !text.starts_with('.') && !text.contains(['/', '\\', '\0'])
}

/// The needed files, and those with sizes and etags: of the tree, or where a hub has no trees, by asking for each name.
async fn list(
    hub: &HubId,
    repo: &HFRepository<RepoTypeModel>,
    commit: &str,
    names: Vec<String>,
) -> Result<(Choice, Vec<RemoteFile>)> {
    let of = |names: &mut dyn Iterator<Item = &str>| {
        let names: Vec<&str> = names.collect();
        choose(names.iter().copied(), hub.file.as_deref()).map_err(|what| anyhow!("{}: {what}", hub.id()))
    };
    let (choice, mut files) = match tree(repo, commit).await {
        Ok(files) => (of(&mut files.iter().map(|file| file.path.as_str()))?, files),
        Err(_) if !names.is_empty() => {
            let choice = of(&mut names.iter().map(String::as_str))?;
            let mut files = Vec::new();
            for path in names.into_iter().filter(|name| choice.needs(name)) {
                let asked = repo.get_file_metadata().filepath(path.clone()).revision(commit).send().await;
                let found = asked.map_err(|e| anyhow!(explain(hub, &e)))?;
                files.push(RemoteFile { path, size: found.file_size, etag: found.etag });
            }
            (choice, files)
        }
        Err(error) => bail!(explain(hub, &error)),
    };
    files.retain(|f| choice.needs(&f.path));
    for name in ["config.json", "tokenizer.json"].iter().filter(|_| choice == Choice::Safetensors) {
        ensure!(files.iter().any(|f| f.path == *name), "{}: the repository has no {name}", hub.id());
    }
    if let Some(odd) = files.iter().find(|f| !file_name(&f.etag)) {
        bail!("{}: {}: the hub's etag `{}` is no file name", hub.id(), odd.path, odd.etag);
    }
    files.sort_by(|a, b| a.size.cmp(&b.size).then_with(|| a.path.cmp(&b.path)));
    Ok((choice, files))
}

async fn tree(repo: &HFRepository<RepoTypeModel>, commit: &str) -> Result<Vec<RemoteFile>, HFError> {
    let entries = repo.list_tree().revision(commit.to_owned()).send()?;
    let mut entries = std::pin::pin!(entries);
    let mut files = Vec::new();
    while let Some(entry) = entries.next().await {
        if let RepoTreeEntry::File { oid, size, path, lfs, .. } = entry? {
            let etag = lfs.and_then(|l| l.sha256).unwrap_or(oid);
            files.push(RemoteFile { path, size, etag });
        }
    }
    Ok(files)
}

/// The blob of a file, fetched unless the cache has it. What an interrupted run left is continued; while a transfer
/// breaks off but brings new bytes it is taken up again.
async fn fetch_blob(
    hub: &HubId,
    repo: &HFRepository<RepoTypeModel>,
    commit: &str,
    file: &RemoteFile,
) -> Result<PathBuf> {
    let blob = hub.cache_dir().join("blobs").join(&file.etag);
    let partial = blob.with_file_name(format!("{}.incomplete", file.etag));
    create_parent(&blob)?;
    let open = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial);
    let mut out = open.with_context(|| format!("{}", partial.display()))?;
    // another process may be fetching the same file; it renames the file that both hold open
    out.lock().with_context(|| format!("{}", partial.display()))?;
    if blob.exists() {
        let _ = fs::remove_file(&partial);
        return Ok(blob);
    }
    let mut progress = Progress::start(format!("fetching {}", file.path), file.size);
    progress.advance(out.metadata()?.len().min(file.size));
    let mut fruitless = 0;
    while let Transfer::BrokenOff { why, fruitful } =
        transfer(hub, repo, (commit, file), &mut out, &mut progress).await?
    {
        fruitless = if fruitful { 0 } else { fruitless + 1 };
        ensure!(
            fruitless < TRIES_WITHOUT_PROGRESS,
            "{}: {}: {why}; what was fetched is kept, the same command continues it",
            hub.id(),
            file.path
        );
        tracing::warn!("{}: {}: {why}; continuing", hub.id(), file.path);
    }
    drop(progress);
    if let Err(error) = verify(&mut out, file) {
        fs::remove_file(&partial).with_context(|| format!("{}", partial.display()))?;
        return Err(error).with_context(|| format!("{}: {}", hub.id(), file.path));
    }
    out.sync_all()?;
    fs::rename(&partial, &blob).with_context(|| format!("{}", blob.display()))?;
    Ok(blob)
}

/// How one transfer ended.
enum Transfer {
    Complete,
    /// The connection failed before the end; `fruitful` if it brought new bytes.
    BrokenOff {
        why: String,
        fruitful: bool,
    },
}

/// Appends to `out` what it lacks of the file. Only what cannot get better by trying again is an error.
async fn transfer(
    hub: &HubId,
    repo: &HFRepository<RepoTypeModel>,
    (commit, file): (&str, &RemoteFile),
    out: &mut File,
    progress: &mut Progress,
) -> Result<Transfer> {
    let mut start = out.seek(SeekFrom::End(0))?;
    if start > file.size {
        restart(out)?;
        start = 0;
    }
    if start == file.size && start > 0 {
        return Ok(Transfer::Complete);
    }
    let range = (start > 0).then_some(start..file.size);
    let request = repo.download_file_stream().filename(file.path.clone()).revision(commit.to_owned());
    let mut stream = match request.maybe_range(range).send().await {
        Ok((_, stream)) => stream,
        Err(error) if unreachable(&error) => {
            return Ok(Transfer::BrokenOff { why: explain(hub, &error), fruitful: false });
        }
        Err(error) => bail!(explain(hub, &error)),
    };
    let mut end = start;
    while let Some(piece) = stream.next().await {
        let bytes = match piece {
            Ok(bytes) => bytes,
            Err(error) => {
                return Ok(Transfer::BrokenOff { why: explain(hub, &error), fruitful: end > start });
            }
        };
        end += bytes.len() as u64;
        if file.size > 0 && end > file.size {
            ensure!(start > 0, "expected {} bytes, found more", file.size);
            restart(out)?;
            let why = "the server sent the whole file where the rest was asked for".to_owned();
            return Ok(Transfer::BrokenOff { why, fruitful: false });
        }
        out.write_all(&bytes)?;
        progress.advance(bytes.len() as u64);
    }
    if file.size > 0 && end < file.size {
        let why = format!("{end} of {} bytes came", file.size);
        return Ok(Transfer::BrokenOff { why, fruitful: end > start });
    }
    Ok(Transfer::Complete)
}

fn restart(out: &mut File) -> Result<()> {
    out.set_len(0)?;
    out.seek(SeekFrom::Start(0))?;
    Ok(())
}

/// Compares the content with the etag where that is a SHA-256; others name a git blob and are checked by size alone.
fn verify(out: &mut File, file: &RemoteFile) -> Result<()> {
    let sha256 = file.etag.len() == 64 && file.etag.bytes().all(|b| b.is_ascii_hexdigit());
    if !sha256 {
        return Ok(());
    }
    out.seek(SeekFrom::Start(0))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match out.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    ensure!(found.eq_ignore_ascii_case(&file.etag), "expected SHA-256 {}, found {found}", file.etag);
    Ok(())
}

/// Makes a snapshot's file lead to `blob`, relatively where the system has links, so that the cache can be moved.
fn link(blob: &Path, snapshot: &Path, file: &str) -> Result<()> {
    let pointer = &snapshot.join(file);
    create_parent(pointer)?;
    // a link that leads nowhere does not exist for its readers and would still stand in the way
    let _ = fs::remove_file(pointer);
    let wrong = || format!("{}", pointer.display());
    #[cfg(unix)]
    {
        let name = blob.file_name().with_context(wrong)?;
        // snapshots/<commit>/<file> -> ../../blobs/<etag>
        let up = "../".repeat(2 + file.matches('/').count());
        std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(name), pointer).with_context(wrong)
    }
    #[cfg(not(unix))]
    fs::copy(blob, pointer).map(|_| ()).with_context(wrong)
}

fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().context("a path in the cache has a parent")?;
    fs::create_dir_all(parent).with_context(|| format!("{}", parent.display()))
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    create_parent(path)?;
    fs::write(path, bytes).with_context(|| format!("{}", path.display()))
}

/// Whether no answer came, or one that says to try later.
fn unreachable(error: &HFError) -> bool {
    match error {
        HFError::Request { .. } | HFError::RateLimited { .. } => true,
        HFError::Http { context } => context.status.is_server_error(),
        _ => false,
    }
}

/// What the hub's answer means to the operator.
fn explain(hub: &HubId, error: &HFError) -> String {
    let id = hub.id();
    match error {
        HFError::AuthRequired { .. } => format!(
            "{id}: the hub wants a token (401): the model is private, gated or does not exist; set HF_TOKEN to one that may read it"
        ),
        HFError::Forbidden { .. } => {
            format!("{id}: the token may not read this model (403); ask for access on its page")
        }
        HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } => {
            format!("{id}: the hub has no such model with revision `{}` (404)", hub.revision)
        }
        HFError::EntryNotFound { path, .. } => format!("{id}: the hub has no file {path} (404)"),
        HFError::Request { source, .. } => format!("{id}: the hub cannot be reached: {}", root_cause(source)),
        other => format!("{id}: {other}"),
    }
}

/// The innermost reason, which says more than the layers around it.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        let id = |o: &str, n: &str, r: &str| HubId {
            owner: o.into(),
            name: n.into(),
            file: None,
            revision: r.into(),
        };
        let file = HubId::parse("o/n:Q4_K_M@v1").unwrap();
        assert_eq!((file.file.as_deref(), file.revision.as_str()), (Some("Q4_K_M"), "v1"));
        assert_eq!(file.model_name(), "o/n:Q4_K_M");
        assert_eq!(HubId::parse("org/name"), Some(id("org", "name", "main")));
        assert_eq!(HubId::parse("a-b/c.d_e@v1.0"), Some(id("a-b", "c.d_e", "v1.0")));
        assert_eq!(HubId::parse("o/n@refs/pr/3"), Some(id("o", "n", "refs/pr/3")));
        for no in [
            "name",
            "/abs/dir",
            "./rel/dir",
            "a/b/c",
            "a/",
            "../up",
            "a/..",
            "o/n@",
            "o/n@../../x",
            "o/na me",
            "o/n:",
            "o/n:../x.gguf",
        ] {
            assert_eq!(HubId::parse(no), None, "{no}");
        }
    }
}
