//! What an operator chooses.

use crate::seal::MasterKey;

/// Limits of one tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of pages on disk.
    pub page_bytes: u64,
    /// Of these, bytes that pinned sessions may hold.
    pub pinned_bytes: u64,
    /// Sessions.
    pub sessions: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Self { page_bytes: u64::MAX, pinned_bytes: u64::MAX, sessions: u64::MAX }
    }
}

/// How a store works. The defaults fit a server with one disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Encrypts what tells of a prompt. A directory is made with or without one, and keeps to it.
    pub master_key: Option<MasterKey>,
    /// A segment is sealed when it has grown past this.
    pub segment_bytes: u64,
    /// Pages that wait to be written, payload bytes.
    pub ring_bytes: usize,
    /// Pages are synced after so many bytes,
    pub sync_bytes: u64,
    /// or so long.
    pub sync_ms: u64,
    /// Journal entries of level `async` are synced after so long.
    pub journal_sync_ms: u64,
    /// The journal is written anew when what was appended is more than this and more than its base.
    pub rebase_bytes: u64,
    /// Pages are not written when less is free: room for the journal.
    pub reserve_bytes: u64,
    /// Page bytes written in a day; more are dropped.
    pub write_budget_bytes_per_day: Option<u64>,
    /// How fast a store with threads proves its pages over and over, to find those that went bad; 0 is not at all.
    pub scrub_bytes_per_s: u64,
    /// Limits of tenants that have none of their own.
    pub quota: Quota,
    /// Whether the store writes and syncs on threads of its own; without them, the caller drives it by
    /// [`Store::step`](crate::Store::step), and it is deterministic.
    pub threads: bool,
    /// Threads that read pages for [`Store::start_read`](crate::Store::start_read).
    pub reader_threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            master_key: None,
            segment_bytes: 1 << 30,
            ring_bytes: 256 << 20,
            sync_bytes: 64 << 20,
            sync_ms: 250,
            journal_sync_ms: 50,
            rebase_bytes: 16 << 20,
            reserve_bytes: 64 << 20,
            write_budget_bytes_per_day: None,
            scrub_bytes_per_s: 8 << 20,
            quota: Quota::default(),
            threads: true,
            reader_threads: 4,
        }
    }
}
