//! The engine: sequences, scheduler, page pool and the loop that drives one executor. Tokens only: no text, no
//! JSON, no clock in the scheduler's decisions, no lock that its thread takes.

#![warn(missing_docs)]

mod adapter;
mod chain;
mod copies;
mod draft;
mod drafter;
pub mod handle;
pub mod identity;
mod mask;
mod planner;
mod pool;
mod prefix;
pub mod request;
mod run;
mod scheduler;
mod sequence;
mod stats;
mod tier;

pub use adapter::Adapter;
pub use draft::DraftPolicy;
pub use handle::{EngineOptions, Generation, Handle, RequestId};
pub use identity::{Identity, ModelIdentity, probe};
/// Sessions and their pages on disk, for those above the engine.
pub use mainstay_store as store;
pub use mask::{Grammar, Masker};
pub use planner::RestorePolicy;
pub use request::{
    Event, FinishReason, Keep, KvReport, KvState, PoolRequest, Request, RequestError, Reuse, SamplingRequest,
    Score, StopRule,
};
pub use stats::Stats;
