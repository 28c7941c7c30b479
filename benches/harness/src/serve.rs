//! A server under load: conversations made from a seed, sent as they arrive, and what came of them.

mod arrivals;
mod metrics;
mod report;
mod run;
#[cfg(test)]
mod tests;
mod trace;
mod words;
mod workload;

use std::future::Future;
use std::sync::Arc;

pub use arrivals::Arrivals;
pub use metrics::{Distribution, Outcome, Record, Slo, Summary, UnknownSlo};
pub use report::{About, json, table};
pub use run::{Load, Loaded, run};
pub use trace::{TraceError, read as read_trace};
pub use words::Words;
pub use workload::{Conversation, Sizes, Turn, Workload};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The instructions that come first.
    System,
    /// The client.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// As OpenAI's API writes it.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// One request, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// All that was said, or what is new where the server keeps the conversation.
    pub messages: Vec<(Role, String)>,
    /// Tokens to generate, neither fewer nor more if the server can do that.
    pub output_tokens: usize,
    /// Which conversation it belongs to.
    pub conversation: usize,
}

/// Where requests go.
pub trait Target: Send + Sync + 'static {
    /// Whether the server keeps conversations, so that a turn sends only what is new.
    fn keeps_conversations(&self) -> bool;

    /// Sends a request and waits for the end of its answer. Dropping the future cancels it.
    fn send(self: Arc<Self>, call: Call) -> impl Future<Output = Outcome> + Send;
}
