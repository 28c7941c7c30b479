//! benches/harness
