//! What can go wrong, by who can act on it.

use std::io;

use crate::{event::SessionId, wire::Malformed};

/// A call on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process, or another store of this one, has the directory.
    #[error("the data directory is in use by another process")]
    Locked,
    /// A later version wrote the file; nothing was touched.
    #[error("{path} has format {found}; this version reads up to {known}")]
    Newer {
        /// The file.
        path: String,
        /// Its version.
        found: u32,
        /// The newest this build reads.
        known: u32,
    },
    /// Both copies of the file are damaged or one is missing where it must not be; nothing was touched.
    #[error("{path} is damaged; restore it from a snapshot")]
    Lost {
        /// The file.
        path: String,
    },
    /// The directory was made with a master key, and none or another was given; nothing was touched.
    #[error("the directory is encrypted: expected master key {expected}, found {found}")]
    Sealed {
        /// The id of the key it was made with.
        expected: String,
        /// The id of the one given, or "none".
        found: String,
    },
    /// A master key was given for a directory that was made without; nothing was touched.
    #[error(
        "the directory is not encrypted: expected no master key, found {found}; export its sessions to one that is"
    )]
    NotSealed {
        /// The id of the key given.
        found: String,
    },
    /// Another store opened the directory after this one.
    #[error("the directory was opened again: epoch {found}, expected {expected}")]
    Fenced {
        /// The epoch this store opened.
        expected: u64,
        /// The epoch in the directory.
        found: u64,
    },
    /// No such session of this tenant.
    #[error("no such session")]
    NotFound,
    /// The session is at another turn.
    #[error("the session is at turn {found}, expected {expected}")]
    Conflict {
        /// What the caller believed.
        expected: u32,
        /// What it is.
        found: u32,
    },
    /// Another session of the tenant has the name.
    #[error("a session named {0:?} exists")]
    NameTaken(String),
    /// A session of this id exists, of this tenant or another.
    #[error("a session of id {0} exists")]
    IdTaken(SessionId),
    /// The tenant may have no more.
    #[error("the tenant may have {limit} {what}")]
    Quota {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: u64,
    },
    /// The request names a turn or token that the session does not have.
    #[error("the session has {have} {what}, asked for {asked}")]
    Range {
        /// Turns or tokens.
        what: &'static str,
        /// How many there are.
        have: u32,
        /// What was asked for.
        asked: u32,
    },
    /// A field is longer than the format holds.
    #[error("{what} has {found} bytes, at most {limit}")]
    TooLong {
        /// The field.
        what: &'static str,
        /// Its bytes.
        found: usize,
        /// The most.
        limit: usize,
    },
    /// Tokens could not be made durable at the level asked for.
    #[error("journal: {0}")]
    Journal(io::Error),
    /// Pages could not be made durable at level `full`.
    #[error("pages were not made durable: {0}")]
    Pages(String),
    /// A bundle was refused.
    #[error("bundle: {0}")]
    Bundle(String),
    /// The disk.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Malformed> for StoreError {
    fn from(e: Malformed) -> Self {
        StoreError::Bundle(e.to_string())
    }
}

/// Why a page was not given: the caller computes it. Never a failure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Miss {
    /// The store has no such page.
    #[error("absent")]
    Absent,
    /// A page of that key has another parent or other tokens.
    #[error("another page has this key")]
    Collision,
    /// The bytes on disk are not those that were written; the page is dropped.
    #[error("damaged: {0}")]
    Damaged(&'static str),
    /// The disk failed or the file is gone.
    #[error("unreadable: {0}")]
    Unreadable(String),
    /// The disk did not answer in time.
    #[error("the disk did not answer in time")]
    Late,
}
