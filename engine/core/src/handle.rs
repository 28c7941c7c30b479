//! The engine seen from outside its thread: a cloneable handle that sends requests and reads counters.

use std::sync::Arc;

use mainstay_backend_api::{Executor, Limits, NumericClass};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::{Event, Request, RequestError, Stats};

/// What the operator decided.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The limits that the executor was loaded with.
    pub limits: Limits,
    /// Sequences (choices) that may wait to be started; one more is refused with [`RequestError::Busy`].
    pub waiting: usize,
}

/// Names a request inside its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Starts engines and talks to them.
#[derive(Clone)]
pub struct Handle {}

/// A request under way. Dropping it cancels the request and frees its pages.
pub struct Generation {
    /// The request's id.
    pub id: RequestId,
    /// What happens to it.
    pub events: UnboundedReceiver<Event>,
}

impl Handle {
    /// Starts the engine's thread, which owns the executor from now on. A panic in it aborts the process.
    pub fn start(_executor: Box<dyn Executor>, _options: EngineOptions) -> std::io::Result<Self> {
        unimplemented!()
    }

    /// Checks and queues a request; never blocks.
    ///
    /// # Errors
    /// [`RequestError::ContextLength`], [`RequestError::Invalid`], [`RequestError::Busy`], [`RequestError::Shutdown`].
    pub fn submit(&self, _request: Request) -> Result<Generation, RequestError> {
        unimplemented!()
    }

    /// Ends one choice of a request, as if it had met its stop rule (a stop string was found in its text).
    pub fn stop(&self, _id: RequestId, _choice: u32) {
        unimplemented!()
    }

    /// The counters as of the last step.
    pub fn stats(&self) -> Stats {
        unimplemented!()
    }

    /// The limits it was started with.
    pub fn limits(&self) -> Arc<Limits> {
        unimplemented!()
    }

    /// What decides the bits of its results.
    pub fn numeric_class(&self) -> NumericClass {
        unimplemented!()
    }

    /// Refuses new requests from now on, lets what runs finish, then ends the thread. Returns at once.
    pub fn shutdown(&self) {
        unimplemented!()
    }

    /// Whether the thread is alive and takes requests.
    pub fn is_ready(&self) -> bool {
        unimplemented!()
    }
}
