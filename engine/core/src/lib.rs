//! The engine: sequences, scheduler, page pool and the loop that drives one executor. Tokens only: no text, no
//! JSON, no clock in any decision, no locks.

pub mod handle;
pub mod request;

pub use handle::{EngineOptions, Generation, Handle, RequestId};
pub use request::{Event, FinishReason, Request, RequestError, SamplingRequest, Score, Stats, StopRule};
