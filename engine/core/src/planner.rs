//! Whether a stored prefix is read back or computed again: decided from rates measured here, never assumed.

use std::time::Duration;

/// What the operator decided about stored prefixes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RestorePolicy {
    /// Read back where that is faster.
    #[default]
    Auto,
    /// Always read back.
    Always,
    /// Always compute again.
    Never,
}

/// Bytes a second that a disk is believed to give before it was measured.
const READ_RATE_BELIEVED: f64 = 1e9;
/// Reading that takes no longer than this is not worth a comparison: it leaves the arithmetic to others.
const READ_S_FREE: f64 = 0.02;
/// Weight of a new measurement.
const WEIGHT: f64 = 0.25;
/// Steps of fewer tokens tell how fast weights are read, not how fast a prompt is computed.
const PREFILL_TOKENS_MIN: usize = 64;
/// What a refusal adds to the believed rate, so that one slow read does not decide for ever.
const HOPE: f64 = 1.1;

/// The measured rates of one engine.
#[derive(Clone, Debug)]
pub(crate) struct Planner {
    policy: RestorePolicy,
    /// Bytes of a page in all groups.
    page_bytes: usize,
    /// Bytes a second, from a read's start until its pages are on the device.
    read: f64,
    /// Tokens a second of prompts.
    compute: Option<f64>,
}

impl Planner {
    pub(crate) fn new(policy: RestorePolicy, page_bytes: usize) -> Self {
        Self { policy, page_bytes, read: READ_RATE_BELIEVED, compute: None }
    }

    /// Whether these pages, which hold this many tokens, are to be read back.
    pub(crate) fn restores(&mut self, pages: usize, tokens: usize) -> bool {
        match self.policy {
            RestorePolicy::Always => return true,
            RestorePolicy::Never => return false,
            RestorePolicy::Auto => {}
        }
        let read_s = (pages * self.page_bytes) as f64 / self.read;
        let wins = read_s <= READ_S_FREE || self.compute.is_none_or(|rate| read_s < tokens as f64 / rate);
        if !wins {
            self.read *= HOPE;
        }
        wins
    }

    /// Takes in how long pages took from the store to the device.
    pub(crate) fn has_read(&mut self, pages: usize, elapsed: Duration) {
        let rate = (pages * self.page_bytes) as f64 / elapsed.as_secs_f64().max(1e-6);
        self.read += (rate - self.read) * WEIGHT;
    }

    /// Takes in how long a step took.
    pub(crate) fn has_computed(&mut self, tokens: usize, elapsed: Duration) {
        if tokens < PREFILL_TOKENS_MIN {
            return;
        }
        let rate = tokens as f64 / elapsed.as_secs_f64().max(1e-6);
        let before = self.compute.unwrap_or(rate);
        self.compute = Some(before + (rate - before) * WEIGHT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn planner(read_mib: usize, tokens: usize) -> Planner {
        let mut planner = Planner::new(RestorePolicy::Auto, MIB);
        (0..40).for_each(|_| planner.has_read(read_mib, Duration::from_secs(1)));
        planner.has_computed(tokens, Duration::from_secs(1));
        planner
    }

    #[test]
    fn the_faster_way_is_taken() {
        // 100 pages hold 3200 tokens: 1 s of reading against 32 s or 0.32 s of computing.
        assert!(planner(100, 100).restores(100, 3200));
        assert!(!planner(100, 10_000).restores(100, 3200));
        // A page that is read in 10 ms is read, whatever computing it takes.
        assert!(planner(100, 1_000_000).restores(1, 32));
    }

    #[test]
    fn before_anything_was_computed_pages_are_read() {
        assert!(Planner::new(RestorePolicy::Auto, MIB).restores(10_000, 320_000));
    }

    #[test]
    fn small_steps_say_nothing_about_prompts() {
        let mut planner = Planner::new(RestorePolicy::Auto, MIB);
        planner.has_computed(8, Duration::from_secs(8));
        assert_eq!(planner.compute, None);
    }

    #[test]
    fn a_refusal_is_not_for_ever() {
        let mut planner = planner(1, 1000);
        let refused = (0..).take_while(|_| !planner.restores(100, 3200)).count();
        assert!((1..100).contains(&refused), "{refused}");
    }

    #[test]
    fn the_operator_decides_first() {
        assert!(Planner { policy: RestorePolicy::Always, ..planner(1, 1_000_000) }.restores(100, 3200));
        assert!(!Planner { policy: RestorePolicy::Never, ..planner(1000, 1) }.restores(1, 32));
    }
}
