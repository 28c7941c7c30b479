//! What opening or checking a store found.

use crate::event::SessionId;

/// A place that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub path: String,
    /// Its offset, bytes.
    pub offset: u64,
    /// How long it is, bytes.
    pub bytes: u64,
    /// What is wrong.
    pub what: &'static str,
    /// Whose it was, where that can be told.
    pub session: Option<SessionId>,
}

/// What opening a store found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// This opening's number.
    pub epoch: u64,
    /// There was no store before.
    pub is_new: bool,
    /// The store was closed, and nothing is missing since.
    pub was_closed: bool,
    /// Sessions.
    pub sessions: usize,
    /// Of these, such that lost entries: whole up to their last turn, and may have been longer.
    pub damaged_sessions: Vec<SessionId>,
    /// Pages found; each is proven when it is read.
    pub pages: usize,
    /// Their bytes on disk.
    pub page_bytes: u64,
    /// Journal entries applied.
    pub entries: u64,
    /// Journal entries that must have been there and are not.
    pub lost_entries: u64,
    /// Journal entries of a writer that had lost the directory; they are ignored.
    pub fenced_entries: u64,
    /// Journal entries of tenants whose key is gone: deleted, and not yet left out.
    pub erased_entries: u64,
    /// Bytes cut off the journal's end: an entry that was being written.
    pub torn_bytes: u64,
    /// Bytes of segments that were being written and hold no whole record.
    pub torn_page_bytes: u64,
    /// Everything else.
    pub damage: Vec<Damage>,
    /// Copies of damaged files.
    pub quarantined: Vec<String>,
    /// How long it took.
    pub elapsed_ms: u64,
}

impl RecoveryReport {
    /// Whether anything that was acknowledged may be missing.
    pub fn is_damaged(&self) -> bool {
        self.lost_entries > 0 || !self.damage.is_empty() || !self.damaged_sessions.is_empty()
    }
}
