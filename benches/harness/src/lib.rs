//! Measurements of a backend through its executor, and of sessions through the engine and its store, with the share of
//! the machine's limits that was reached.

mod latency;
mod mix;
mod noise;
mod report;
pub mod sessions;
mod shape;

pub use latency::{Case, LatencyError, Measurement, Peaks, Phase, Plan, latency};
pub use mix::{MIXES, Mix, UnknownMix};
pub use report::{json, table};
pub use shape::{SHAPES, Shape, UnknownShape};
