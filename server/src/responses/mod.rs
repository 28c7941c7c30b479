//! The Responses API on sessions: a response is a turn, a chain of them is a session, a conversation is a session with a
//! name of its own. What is recorded stands in the turn, so that there is one truth and one way to recover it.

pub(crate) mod answer;
pub(crate) mod background;
mod calling;
pub(crate) mod compact;
pub(crate) mod conversation;
pub(crate) mod create;
mod events;
pub(crate) mod feed;
pub(crate) mod ids;
pub(crate) mod items;
pub(crate) mod mcp;
pub(crate) mod object;
mod opening;
pub(crate) mod past;
pub(crate) mod read;
pub(crate) mod request;
mod rounds;
mod tools;

/// What sessions are to this API, in their records.
pub(crate) const RESPONSE: &str = "response";
pub(crate) const CONVERSATION: &str = "conversation";

/// The time, unix seconds.
pub(crate) fn now_s() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs()
}
