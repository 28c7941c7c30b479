//! Measurements of a backend through its executor, of sessions through the engine and its store, and of a server under
//! load, with the share of the machine's limits that was reached.

mod energy;
mod latency;
mod mix;
mod noise;
pub mod page;
mod report;
pub mod serve;
pub mod sessions;
mod shape;

pub use energy::Energy;
pub use latency::{Bench, Case, LatencyError, Measurement, Peaks, Phase, Plan, UnknownCase, latency};
pub use mix::{MIXES, Mix, UnknownMix};
pub use noise::Watch;
pub use report::{json, row, table};
pub use shape::{SHAPES, Shape, UnknownShape, WriteError};
