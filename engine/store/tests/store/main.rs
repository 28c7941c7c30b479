//! A store as its users see it, on a simulated disk.

mod abort;
mod crash;
mod damage;
mod faults;
mod rig;
mod roundtrip;
