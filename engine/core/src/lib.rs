//! The engine: sequences, scheduler, page pool and the loop that drives one executor. Tokens only: no text, no
//! JSON, no clock in any decision, no locks.

#![warn(missing_docs)]

pub mod handle;
mod key;
mod pool;
pub mod request;
mod run;
mod scheduler;
mod sequence;
mod stats;

pub use handle::{EngineOptions, Generation, Handle, RequestId};
pub use request::{Event, FinishReason, Request, RequestError, SamplingRequest, Score, Stats, StopRule};
