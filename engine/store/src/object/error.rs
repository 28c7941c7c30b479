//! What can go wrong between a store and the object tier, by who can act on it.

use crate::{error::StoreError, object::OwnerId};

/// A call on the object tier failed. The local store is as it was before, unless the error says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The address names no object store that is known, or its settings are wrong.
    #[error("object store: {0}")]
    Address(String),
    /// The object store overwrites where it was asked to create: two servers could own one session.
    #[error("the object store answered a second create with success; it cannot hold sessions")]
    NotExclusive,
    /// The object store failed, after retries.
    #[error("object store: {0}")]
    Remote(#[from] object_store::Error),
    /// The tier has no such session of this tenant.
    #[error("no such session in the object tier")]
    NotFound,
    /// Another store has the session open.
    #[error("the session is held by store {owner}")]
    Held {
        /// The store.
        owner: OwnerId,
    },
    /// Another store took the session over: what this one has is a fork of it.
    #[error("the session was moved: another store has its epoch {epoch}")]
    Moved {
        /// The number of that store's ownership.
        epoch: u32,
    },
    /// Another store was faster.
    #[error("another store took the session at the same moment")]
    Lost,
    /// A call on the same session is under way, or an answer of it is being made.
    #[error("the session is in use")]
    Busy,
    /// This store has a session of the same id that holds more than the tier's: fork it, delete it, try again.
    #[error("this store has the session with other tokens")]
    Exists,
    /// The session went on while it was released. The tier has it as it was before; it is still in this store, and the
    /// next flush takes it back if nobody else took it.
    #[error("the session changed while it was released")]
    Changed,
    /// An object is not what was written.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// The local store.
    #[error(transparent)]
    Store(#[from] StoreError),
}
