//! What forks of a long session cost.

use std::time::Instant;

use mainstay_engine::store::At;

use super::stats::median;
use super::world::{World, ms};
use super::{Bench, SessionsError};

/// Forks whose time is taken.
const TIMED: usize = 1000;
/// Forks that go on.
const CONTINUED: usize = 8;

/// Forks of one session.
#[derive(Clone, Debug, PartialEq)]
pub struct Forks {
    /// Tokens of the session.
    pub context: usize,
    /// The middle of 1000 forks at its end, milliseconds.
    pub fork_ms: f64,
    /// Bytes of pages that these wrote.
    pub fork_bytes: u64,
    /// Forks that went on by one turn.
    pub continued: usize,
    /// Bytes of the session's pages on disk.
    pub prefix_bytes: u64,
    /// The same with those of the forks that went on.
    pub stored_bytes: u64,
    /// Prompt tokens of those turns that were not computed, and all.
    pub cached_tokens: (usize, usize),
}

impl Forks {
    /// Stored bytes over those that so many copies of the session would take.
    pub fn ratio(&self) -> f64 {
        self.stored_bytes as f64 / (self.continued as f64 * self.prefix_bytes as f64).max(1.0)
    }
}

/// Forks the session of a world.
pub(crate) fn forks(bench: &Bench<'_>, world: &World, context: usize) -> Result<Forks, SessionsError> {
    let (store, tenant) = (&world.store, world.tenant.id);
    let (session, history) = world.session()?;
    let before = world.written_bytes();
    let mut times = Vec::with_capacity(TIMED);
    for _ in 0..TIMED {
        let begun = Instant::now();
        store.fork(tenant, session, At::Head, None)?;
        times.push(ms(begun));
    }
    world.settle()?;
    let fork_bytes = world.written_bytes() - before;
    let prefix_bytes = store.page_bytes(tenant);
    let mut cached_tokens = (0, 0);
    for i in 0..CONTINUED {
        let fork = store.fork(tenant, session, At::Head, None)?.id;
        let new = bench.subject.tokens(bench.plan.new, 2_000_003 + i as u64);
        let answer = world.turn(fork, &new, bench.plan.answer)?;
        cached_tokens.0 += answer.kv.cached_tokens;
        cached_tokens.1 += history.len() + new.len();
    }
    world.settle()?;
    Ok(Forks {
        context,
        fork_ms: median(&times),
        fork_bytes,
        continued: CONTINUED,
        prefix_bytes,
        stored_bytes: store.page_bytes(tenant),
        cached_tokens,
    })
}
