//! A store as its users see it, on a simulated disk.

mod crash;
mod damage;
mod faults;
mod object;
mod rig;
mod roundtrip;
