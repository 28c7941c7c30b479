//! What clients send and what they get back, as JSON: OpenAI's fields and, under vLLM's names, its extensions.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod constraint_fields;
pub(crate) mod embeddings;
pub(crate) mod fields;
pub(crate) mod file_form;
mod held;
pub(crate) mod logprobs;
pub(crate) mod messages;
pub(crate) mod options;
pub(crate) mod priority;
pub(crate) mod refused;
pub(crate) mod rerank;
pub(crate) mod session;
pub(crate) mod session_fields;
pub(crate) mod tools;
pub(crate) mod usage;
