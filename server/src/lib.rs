//! The HTTP side: OpenAI's API over the engine. Text stops here; below this crate there are only tokens.
//!
//! The way of a request: `routes/chat.rs` reads the body (`openai/chat.rs`), renders and tokenizes it (`prompt.rs`),
//! and hands a job (`job.rs`) to `generate.rs`, which submits it to the engine and turns its events back into text
//! (`choice.rs`: `detokenize.rs`, `stop.rs`), which `output/` takes apart into reasoning, text and calls. A turn of a
//! session begins in `sessions/chat.rs`: `opening.rs` finds what of the session's tokens stands for the conversation
//! (`history.rs`), `begin.rs` submits it, `turn.rs` writes the answer to it. Responses (`responses/create.rs`) take the
//! same way. `reply.rs` writes the answer as one JSON body or as a stream of events (`sse.rs`).

mod anthropic;
mod auth;
mod batches;
mod body;
mod choice;
mod detokenize;
mod error;
mod files;
mod generate;
mod grammar;
mod job;
mod kv;
mod mcp;
mod metrics;
mod openai;
mod openapi;
mod output;
mod pooling;
mod prefill;
mod prompt;
mod random;
mod registry;
mod reply;
mod responses;
mod routes;
mod serve;
mod sessions;
mod shutdown;
mod sse;
mod stop;
mod tool_prompt;

pub use auth::{ApiKey, ApiKeyError};
pub use mcp::{McpServer, McpServerError};
pub use output::{Format, FormatChoice, ReasoningFormat, ToolFormat, UnknownFormat};
pub use registry::{
    About, Listed, ListedAdapter, Loader, Loading, LoadingAdapter, NotLoaded, PooledShape, Registry,
    ServedModel,
};
pub use routes::store::{clean, damage_object, verification};
pub use serve::{ServerOptions, serve};
pub use shutdown::{ShutdownSignal, ShutdownStage, ShutdownTrigger, shutdown_channel};
