//! Sessions and their pages on disk: a journal of tokens that is the truth, and segments of pages that are a proven
//! cache of it.
//!
//! A page that cannot be proven to be the one asked for is a [`Miss`]: it costs time, never a wrong token. What a
//! session's owner was told to be durable is in the journal. See `docs/store-format.md` for the bytes.

pub mod aligned;
mod api;
mod bundle;
mod counts;
pub mod crash_disk;
pub mod disk;
mod error;
mod event;
mod evict;
#[doc(hidden)]
pub mod fuzz;
mod gc;
mod index;
mod journal;
pub mod key;
pub mod object;
mod options;
mod pages;
mod reader;
mod realdisk;
mod record;
mod recover;
mod report;
mod seal;
mod segment;
mod session;
pub mod sim;
mod store;
mod tenant;
mod time;
mod twin;
mod verify;
mod wire;
mod writer;

pub use api::{Append, Appended, At, SessionInfo};
pub use bundle::{BundlePages, ExportPages, ImportAs, Imported};
pub use counts::{PageTotals, SyncCounts, Unsynced};
pub use error::{Miss, StoreError};
pub use event::{Durability, InFlight, META_BYTES_MAX, NAME_BYTES_MAX, SessionId, Settings};
pub use gc::Maintained;
pub use key::{
    ClassId, Content, ContentId, KeyChain, PAGE_TOKENS, PageKey, Root, Span, TenantId, TenantSecret,
};
pub use options::{Options, Quota};
pub use pages::{Handed, Page, PageCounts};
pub use realdisk::RealDisk;
pub use record::{CHECK_BYTES, Kind, PAYLOAD_BYTES_MAX, PageHeader, PageName};
pub use report::{Damage, RecoveryReport};
pub use seal::MasterKey;
pub use session::Turn;
pub use store::{JournalCounts, Store};
pub use tenant::{TENANT_BYTES_MAX, Tenant};
pub use twin::FORMAT;
pub use verify::{ScrubCounts, Scrubbed, VerifyReport};
pub use wire::Malformed;
