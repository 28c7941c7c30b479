//! The server as a client sees it: over TCP, on an engine whose executor is a fake.

mod chat;
mod completions;
mod errors;
mod kv;
mod lifecycle;
mod streams;
mod testbed;
