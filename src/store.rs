//! Where sessions are kept: the options of the store, and opening it in the data directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use mainstay_engine::Reuse;
use mainstay_store::object::{ObjectError, ObjectOptions, ObjectTier};
use mainstay_store::{
    Durability, MasterKey, Options, Quota, RealDisk, RecoveryReport, Store, StoreError,
    crash_disk::CrashDisk, disk::Disk,
};

use crate::exit::Usage;
use crate::{data_dir, size};

/// When a turn is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DurabilityChoice {
    /// At once; nothing is kept.
    Ephemeral,
    /// When its tokens are with the system: they survive the end of the process.
    Async,
    /// When its tokens are synced: they survive a power loss.
    Turn,
    /// When its tokens, keys and values are synced.
    Full,
}

impl From<DurabilityChoice> for Durability {
    fn from(choice: DurabilityChoice) -> Self {
        match choice {
            DurabilityChoice::Ephemeral => Self::Ephemeral,
            DurabilityChoice::Async => Self::Async,
            DurabilityChoice::Turn => Self::Turn,
            DurabilityChoice::Full => Self::Full,
        }
    }
}

/// Which stored keys and values a request may go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReuseChoice {
    /// Those that this kind of machine computes itself: answers have the same bits.
    Exact,
    /// Also those of another kind of machine, of the same weights; answers say so.
    Equivalent,
}

impl From<ReuseChoice> for Reuse {
    fn from(choice: ReuseChoice) -> Self {
        match choice {
            ReuseChoice::Exact => Self::Exact,
            ReuseChoice::Equivalent => Self::Equivalent,
        }
    }
}

/// Which directory, and the key to it.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sessions")]
pub(crate) struct DirArgs {
    /// Where sessions are kept; the user's data directory without it.
    #[arg(long, env = "MAINSTAY_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// A file with 64 hexadecimal digits under which everything that tells of a prompt is encrypted on disk.
    #[arg(long, env = "MAINSTAY_ENCRYPTION_KEY_FILE", value_name = "FILE")]
    encryption_key_file: Option<PathBuf>,
}

impl DirArgs {
    /// A directory in plain.
    pub(crate) fn at(dir: PathBuf) -> Self {
        Self { data_dir: Some(dir), encryption_key_file: None }
    }

    /// Where files and batches are kept: not in a directory whose contents are to be encrypted, for they would not be.
    pub(crate) fn files(&self) -> Option<PathBuf> {
        match self.encryption_key_file {
            Some(_) => None,
            None => data_dir::resolve(self.data_dir.as_deref()),
        }
    }

    fn master_key(&self) -> Result<Option<MasterKey>> {
        let Some(path) = &self.encryption_key_file else { return Ok(None) };
        let shown = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("--encryption-key-file {shown}"))?;
        let text = text.trim();
        let digits = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits {
            let what =
                format!("--encryption-key-file {shown}: expected 64 hexadecimal digits, found other text");
            return Err(Usage(what).into());
        }
        let mut key = [0; 32];
        for (byte, at) in key.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16)?;
        }
        Ok(Some(MasterKey::new(key)))
    }

    /// Opens the store of the directory for a command beside the server, with no limits of its own.
    ///
    /// # Errors
    /// Names the directory; [`Usage`] where there is none to name.
    pub(crate) fn open_plain(&self) -> Result<Arc<Store>> {
        let (store, report) = self.open_reported()?;
        if let Some(dir) = data_dir::resolve(self.data_dir.as_deref()) {
            tell(&dir, &report);
        }
        Ok(Arc::new(store))
    }

    /// The same for a caller who tells what opening found.
    ///
    /// # Errors
    /// As [`DirArgs::open_plain`].
    pub(crate) fn open_reported(&self) -> Result<(Store, RecoveryReport)> {
        let dir = data_dir::resolve(self.data_dir.as_deref());
        let dir = dir.ok_or_else(|| Usage("no HOME is set: give --data-dir".into()))?;
        let options = Options { master_key: self.master_key()?, ..Options::default() };
        let named = || format!("the data directory {}", dir.display());
        Store::open_dir(&dir, options).with_context(named)
    }
}

/// A store, and what opening it took.
pub(crate) struct Opened {
    pub(crate) store: Arc<Store>,
    pub(crate) recovery: Duration,
}

/// Options of the store.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sessions")]
pub(crate) struct StoreArgs {
    #[command(flatten)]
    pub(crate) dir: DirArgs,
    /// When a turn of a session is acknowledged, where neither the session nor the request says.
    #[arg(long, env = "MAINSTAY_DURABILITY", value_enum, default_value = "async")]
    pub(crate) durability: DurabilityChoice,
    /// Which stored keys and values requests may go on from, where they do not say.
    #[arg(long, env = "MAINSTAY_KV_REUSE", value_enum, default_value = "exact")]
    pub(crate) kv_reuse: ReuseChoice,
    /// How often tokens of an answer under way are written to the journal, milliseconds; 0 writes whole turns only.
    #[arg(long, env = "MAINSTAY_JOURNAL_INTERVAL_MS", value_name = "MS", default_value_t = 100)]
    pub(crate) journal_interval_ms: u64,
    /// Keys and values kept on disk for one tenant, bytes; a tenth of the disk, 64G at most, without it.
    #[arg(long, env = "MAINSTAY_PAGE_QUOTA", value_name = "BYTES", value_parser = size::parse)]
    page_quota: Option<u64>,
    /// Of these, what pinned sessions may hold; half without it.
    #[arg(long, env = "MAINSTAY_PINNED_QUOTA", value_name = "BYTES", value_parser = size::parse)]
    pinned_quota: Option<u64>,
    /// Most sessions of one tenant.
    #[arg(long, env = "MAINSTAY_SESSION_QUOTA", value_name = "N", default_value_t = 1_000_000)]
    session_quota: u64,
    /// Most bytes of keys and values written in a day, so that a disk does not wear out.
    #[arg(long, env = "MAINSTAY_WRITE_BUDGET", value_name = "BYTES", value_parser = size::parse)]
    write_budget: Option<u64>,
    /// Object store that several servers share, to move sessions between them: file:///DIR or s3://BUCKET/PREFIX (with
    /// the usual AWS_* variables).
    #[arg(long, env = "MAINSTAY_OBJECT_STORE", value_name = "URL")]
    object_store: Option<String>,
    /// Size of a file of keys and values.
    #[arg(long, env = "MAINSTAY_SEGMENT_BYTES", value_name = "BYTES", default_value = "1G", value_parser = size::parse)]
    segment_bytes: u64,
}

/// Without --page-quota, a tenant's pages take this part of the disk,
const QUOTA_SHARE: u64 = 10;
/// and at most this much.
const QUOTA_BYTES_MAX: u64 = 64 << 30;
/// Part of the disk that is left free, so that the journal can always be written.
const RESERVE_SHARE: u64 = 50;
const RESERVE_BYTES_MIN: u64 = 64 << 20;
/// How long a store waits for its last users at the end.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

impl StoreArgs {
    /// How often tokens under way are written.
    pub(crate) fn journal_interval(&self) -> Option<Duration> {
        Some(Duration::from_millis(self.journal_interval_ms)).filter(|interval| !interval.is_zero())
    }

    /// Opens the object store, if there is one.
    ///
    /// # Errors
    /// [`Usage`] for a URL that is none; otherwise what the object store says.
    pub(crate) async fn open_tier(&self) -> Result<Option<Arc<ObjectTier>>> {
        let Some(url) = self.object_store.clone() else { return Ok(None) };
        let opened = tokio::task::spawn_blocking(move || ObjectTier::open(&url, ObjectOptions::default()));
        let tier = opened.await?.map_err(|error| match error {
            ObjectError::Address(what) => anyhow::Error::from(Usage(format!("--object-store: {what}"))),
            other => anyhow::Error::from(other).context("--object-store"),
        })?;
        Ok(Some(Arc::new(tier)))
    }

    fn options(&self, disk: &dyn Disk) -> Result<Options> {
        let total = disk.space().map_or(0, |space| space.total);
        let page_bytes = self.page_quota.unwrap_or((total / QUOTA_SHARE).min(QUOTA_BYTES_MAX));
        let quota = Quota {
            page_bytes,
            pinned_bytes: self.pinned_quota.unwrap_or(page_bytes / 2),
            sessions: self.session_quota,
        };
        Ok(Options {
            master_key: self.dir.master_key()?,
            quota,
            segment_bytes: self.segment_bytes,
            reserve_bytes: (total / RESERVE_SHARE).clamp(RESERVE_BYTES_MIN, QUOTA_BYTES_MAX),
            write_budget_bytes_per_day: self.write_budget,
            ..Options::default()
        })
    }

    /// Opens the store. Without an answer to where, a server that finds no place for sessions, or finds it taken by
    /// another, serves without them and says so; one that was told where fails.
    ///
    /// # Errors
    /// Names the directory.
    pub(crate) fn open(&self) -> Result<Option<Opened>> {
        let Some(dir) = data_dir::resolve(self.dir.data_dir.as_deref()) else {
            tracing::warn!("no HOME is set: sessions are not kept (give --data-dir)");
            return Ok(None);
        };
        match self.open_in(&dir) {
            Ok(store) => Ok(Some(store)),
            Err(error) if self.dir.data_dir.is_none() && is_taken(&error) => {
                tracing::warn!("{error:#}; this server keeps no sessions (give it a --data-dir of its own)");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn open_in(&self, dir: &Path) -> Result<Opened> {
        data_dir::prepare(dir)?;
        let mut disk: Arc<dyn Disk> = Arc::new(RealDisk::new(dir)?);
        if let Some(at) = crash_point()? {
            tracing::warn!(at, "{CRASH_AT} is set: the process will end itself, for a test");
            disk = Arc::new(CrashDisk::new(disk, at));
        }
        let options = self.options(&*disk)?;
        let (store, report) =
            open(disk, options).with_context(|| format!("the data directory {}", dir.display()))?;
        tell(dir, &report);
        let recovery = Duration::from_millis(report.elapsed_ms);
        Ok(Opened { store: Arc::new(store), recovery })
    }
}

fn open(disk: Arc<dyn Disk>, options: Options) -> Result<(Store, RecoveryReport), StoreError> {
    use mainstay_store::disk::{SystemClock, SystemEntropy};
    Store::open(disk, Arc::new(SystemClock::default()), Arc::new(SystemEntropy), options)
}

/// Ends the process at the N-th change on disk: for tests of what a kill at any step leaves.
const CRASH_AT: &str = "MAINSTAY_CRASH_AT";

fn crash_point() -> Result<Option<u64>, Usage> {
    let Some(value) = std::env::var_os(CRASH_AT) else { return Ok(None) };
    let at = value.to_str().and_then(|text| text.parse().ok()).filter(|&at| at > 0);
    at.map(Some).ok_or_else(|| Usage(format!("{CRASH_AT}: expected a number from 1 on, found {value:?}")))
}

fn is_taken(error: &anyhow::Error) -> bool {
    error.chain().any(|e| matches!(e.downcast_ref(), Some(StoreError::Locked)))
}

/// Logs what opening found.
fn tell(dir: &Path, report: &RecoveryReport) {
    let dir = dir.display();
    if report.is_new {
        tracing::debug!("{dir} holds no sessions yet");
        return;
    }
    tracing::info!(
        sessions = report.sessions,
        pages = report.pages,
        page_bytes = report.page_bytes,
        ms = report.elapsed_ms,
        was_closed = report.was_closed,
        "sessions of {dir} opened"
    );
    for damage in &report.damage {
        tracing::warn!(
            path = damage.path,
            offset = damage.offset,
            bytes = damage.bytes,
            "damaged in {dir}: {}",
            damage.what
        );
    }
    for session in &report.damaged_sessions {
        tracing::warn!(%session, "a session lost its last turns to damage; it is whole up to what is left");
    }
    if report.lost_entries > 0 {
        tracing::warn!(entries = report.lost_entries, "journal entries are missing");
    }
    for copy in &report.quarantined {
        tracing::warn!(copy, "a damaged file was put aside");
    }
}

/// Writes everything out, once its other users are gone.
///
/// # Errors
/// What could not be made durable.
pub(crate) async fn close(mut store: Arc<Store>) -> Result<()> {
    let until = tokio::time::Instant::now() + CLOSE_PATIENCE;
    loop {
        store = match Arc::try_unwrap(store) {
            Ok(store) => {
                let closed = tokio::task::spawn_blocking(move || store.close()).await?;
                return closed.context("the data directory could not be closed");
            }
            Err(shared) if tokio::time::Instant::now() >= until => {
                drop(shared);
                return Err(anyhow!("the data directory is still in use; its last writes may be missing"));
            }
            Err(shared) => shared,
        };
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
