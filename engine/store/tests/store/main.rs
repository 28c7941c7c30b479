//! A store as its users see it, on a simulated disk.

mod abort;
mod counts;
mod crash;
mod damage;
mod faults;
mod moves;
mod object;
mod rig;
mod roundtrip;

/// The same tests run with a master key in `tests/sealed`.
const MASTER: Option<u8> = None;
/// Of the many cases of a loop every so many is tried.
const STRIDE: u64 = 1;
