//! The `mainstay` command from outside: arguments, exit codes, one line on stdout, signals, HTTP, the hub.

mod arguments;
mod bench;
mod hub;
mod hub_server;
mod identity;
mod memory;
mod program;
mod quantizing;
mod serving;
mod sessions;
mod several;
mod talking;
