//! The tests of a store on an encrypted one, and what only that has.

#[path = "../store/abort.rs"]
mod abort;
#[path = "../store/counts.rs"]
mod counts;
#[path = "../store/crash.rs"]
mod crash;
#[path = "../store/damage.rs"]
mod damage;
mod erase;
#[path = "../store/faults.rs"]
mod faults;
mod keys;
#[path = "../store/moves.rs"]
mod moves;
#[path = "../store/rig.rs"]
mod rig;
#[path = "../store/roundtrip.rs"]
mod roundtrip;

/// The master key's bytes.
const MASTER: Option<u8> = Some(7);
/// Of the many cases of a loop every so many is tried: what has nothing to do with keys is tried without.
const STRIDE: u64 = 4;
