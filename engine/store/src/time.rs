//! What time it is for expiry: a wall clock that may jump is held against one that may not.

use crate::disk::Clock;

/// A forward jump beyond this stops expiry until an operator confirms the clock.
const JUMP_MS: u64 = 60 * 60 * 1000;

/// Time that never falls.
#[derive(Debug)]
pub(crate) struct Time {
    wall_ms: u64,
    monotonic_ms: u64,
    jumped: bool,
}

impl Time {
    /// Time goes on from the later of the clock's and what was seen before.
    pub(crate) fn new(clock: &dyn Clock, seen_ms: u64) -> Self {
        Self { wall_ms: clock.wall_ms().max(seen_ms), monotonic_ms: clock.monotonic_ms(), jumped: false }
    }

    /// Milliseconds since 1970. A backward jump of the clock is not followed, so no deadline moves away by it.
    pub(crate) fn now_ms(&mut self, clock: &dyn Clock) -> u64 {
        let (wall_ms, monotonic_ms) = (clock.wall_ms(), clock.monotonic_ms());
        let elapsed_ms = monotonic_ms.saturating_sub(self.monotonic_ms);
        let expected_ms = self.wall_ms + elapsed_ms;
        self.jumped |= wall_ms > expected_ms.saturating_add(JUMP_MS);
        let now_ms = if self.jumped { expected_ms } else { wall_ms.max(expected_ms) };
        (self.wall_ms, self.monotonic_ms) = (now_ms, monotonic_ms);
        now_ms
    }

    /// Whether sessions may expire.
    pub(crate) fn is_trusted(&self) -> bool {
        !self.jumped
    }

    /// Takes the wall clock as it is.
    pub(crate) fn confirm(&mut self, clock: &dyn Clock) {
        *self = Self::new(clock, self.wall_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimClock;

    #[test]
    fn jumps_neither_extend_nor_expire() {
        let clock = SimClock::new(1_000_000);
        let mut time = Time::new(&clock, 0);
        clock.advance(10);
        assert_eq!(time.now_ms(&clock), 1_000_010);
        clock.jump(-500_000);
        clock.advance(10);
        assert_eq!(time.now_ms(&clock), 1_000_020, "a backward jump");
        clock.jump(500_000 + 2 * JUMP_MS as i64);
        assert_eq!(time.now_ms(&clock), 1_000_020, "a forward jump");
        assert!(!time.is_trusted());
        time.confirm(&clock);
        assert_eq!(time.now_ms(&clock), 1_000_020 + 2 * JUMP_MS);
        assert!(time.is_trusted());
        assert_eq!(Time::new(&clock, u64::MAX / 2).now_ms(&clock), u64::MAX / 2, "seen before a restart");
    }
}
