//! The counters that the engine writes and anyone reads, without a lock between them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::Stats;

/// [`Stats`] in atomics. A reader may see some of them a step younger than others.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    running: AtomicU64,
    waiting: AtomicU64,
    pages_used: AtomicU64,
    pages_cached: AtomicU64,
    pages_total: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    preemptions: AtomicU64,
    steps: AtomicU64,
}

impl Counters {
    pub(crate) fn store(&self, stats: &Stats) {
        self.running.store(stats.running as u64, Relaxed);
        self.waiting.store(stats.waiting as u64, Relaxed);
        self.pages_used.store(stats.pages_used as u64, Relaxed);
        self.pages_cached.store(stats.pages_cached as u64, Relaxed);
        self.pages_total.store(stats.pages_total as u64, Relaxed);
        self.prompt_tokens.store(stats.prompt_tokens, Relaxed);
        self.cached_tokens.store(stats.cached_tokens, Relaxed);
        self.generated_tokens.store(stats.generated_tokens, Relaxed);
        self.preemptions.store(stats.preemptions, Relaxed);
        self.steps.store(stats.steps, Relaxed);
    }

    pub(crate) fn load(&self) -> Stats {
        Stats {
            running: self.running.load(Relaxed) as usize,
            waiting: self.waiting.load(Relaxed) as usize,
            pages_used: self.pages_used.load(Relaxed) as usize,
            pages_cached: self.pages_cached.load(Relaxed) as usize,
            pages_total: self.pages_total.load(Relaxed) as usize,
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            cached_tokens: self.cached_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
            preemptions: self.preemptions.load(Relaxed),
            steps: self.steps.load(Relaxed),
        }
    }
}
