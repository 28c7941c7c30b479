//! The server as a client sees it: over TCP, on an engine whose executor is a fake.

mod batches;
mod bundles;
mod chat;
mod completions;
mod embeddings;
mod errors;
mod files;
mod history;
mod kv;
mod lifecycle;
mod mcp;
mod messages;
mod openapi;
mod responses;
mod resume;
mod session_routes;
mod sessions;
mod several;
mod streams;
mod structured;
mod testbed;
mod tools;
mod websocket;
