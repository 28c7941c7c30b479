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
    /// Bytes of a page of each group.
    page_bytes: Vec<usize>,
    /// Bytes a second, from a read's start until its pages are on the device.
    read: f64,
    /// Tokens a second of prompts.
    compute: Option<f64>,
}

impl Planner {
    pub(crate) fn new(policy: RestorePolicy, page_bytes: Vec<usize>) -> Self {
        Self { policy, page_bytes, read: READ_RATE_BELIEVED, compute: None }
    }

    /// Whether pages of these groups are to be read back, that spare so many tokens their computing.
    pub(crate) fn restores(&self, groups: impl Iterator<Item = usize>, tokens: usize) -> bool {
        match self.policy {
            RestorePolicy::Always => return true,
            RestorePolicy::Never => return false,
            RestorePolicy::Auto => {}
        }
        let bytes: usize = groups.map(|group| self.page_bytes[group]).sum();
        let read_s = bytes as f64 / self.read;
        read_s <= READ_S_FREE || self.compute.is_none_or(|rate| read_s < tokens as f64 / rate)
    }

    /// Takes in that pages were not read back.
    pub(crate) fn has_refused(&mut self) {
        self.read *= HOPE;
    }

    /// Takes in how long bytes took from the store to the device.
    pub(crate) fn has_read(&mut self, bytes: usize, elapsed: Duration) {
        let rate = bytes as f64 / elapsed.as_secs_f64().max(1e-6);
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
        let mut planner = Planner::new(RestorePolicy::Auto, vec![MIB]);
        (0..40).for_each(|_| planner.has_read(read_mib * MIB, Duration::from_secs(1)));
        planner.has_computed(tokens, Duration::from_secs(1));
        planner
    }

    /// The groups of this many pages.
    fn pages(count: usize) -> impl Iterator<Item = usize> {
        std::iter::repeat_n(0, count)
    }

    #[test]
    fn the_faster_way_is_taken() {
        // 100 pages hold 3200 tokens: 1 s of reading against 32 s or 0.32 s of computing.
        assert!(planner(100, 100).restores(pages(100), 3200));
        assert!(!planner(100, 10_000).restores(pages(100), 3200));
        // A page that is read in 10 ms is read, whatever computing it takes.
        assert!(planner(100, 1_000_000).restores(pages(1), 32));
    }

    #[test]
    fn pages_count_by_the_size_of_their_group() {
        let planner = Planner { page_bytes: vec![MIB, 10 * MIB], ..planner(100, 10_000) };
        // 0.1 s against 0.2 s; the larger ones take 1 s.
        assert!(planner.restores([0; 10].into_iter(), 2000));
        assert!(!planner.restores([1; 10].into_iter(), 2000));
    }

    #[test]
    fn before_anything_was_computed_pages_are_read() {
        assert!(Planner::new(RestorePolicy::Auto, vec![MIB]).restores(pages(10_000), 320_000));
    }

    #[test]
    fn small_steps_say_nothing_about_prompts() {
        let mut planner = Planner::new(RestorePolicy::Auto, vec![MIB]);
        planner.has_computed(8, Duration::from_secs(8));
        assert_eq!(planner.compute, None);
    }

    #[test]
    fn a_refusal_is_not_for_ever() {
        let mut planner = planner(1, 1000);
        let mut refused = 0;
        while !planner.restores(pages(100), 3200) {
            planner.has_refused();
            refused += 1;
        }
        assert!((1..100).contains(&refused), "{refused}");
    }

    #[test]
    fn the_operator_decides_first() {
        let always = Planner { policy: RestorePolicy::Always, ..planner(1, 1_000_000) };
        assert!(always.restores(pages(100), 3200));
        assert!(!Planner { policy: RestorePolicy::Never, ..planner(1000, 1) }.restores(pages(1), 32));
    }
}
