//! A store as its users see it, on a simulated disk.

mod rig;
mod roundtrip;
