//! Anthropic's Messages API: another way to write a chat request and its answer down.

pub(crate) mod error;
pub(crate) mod message;
pub(crate) mod request;
