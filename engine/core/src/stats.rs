//! The counters that the engine writes and anyone reads, without a lock between them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters for metrics, read at any time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Sequences that have pages.
    pub running: usize,
    /// Sequences not yet started.
    pub waiting: usize,
    /// Pages referenced by a sequence.
    pub pages_used: usize,
    /// Pages not referenced that still hold a known prefix.
    pub pages_cached: usize,
    /// All pages that can be given out.
    pub pages_total: usize,
    /// Prompt tokens computed or found since start.
    pub prompt_tokens: u64,
    /// Of these, found.
    pub cached_tokens: u64,
    /// Tokens generated since start.
    pub generated_tokens: u64,
    /// Sequences preempted since start.
    pub preemptions: u64,
    /// Steps since start.
    pub steps: u64,
    /// Tokens guessed since start.
    pub drafted_tokens: u64,
    /// Of these, drawn.
    pub draft_kept_tokens: u64,
    /// Prompt tokens read from the store since start.
    pub restored_tokens: u64,
    /// Requests that read pages from the store since start.
    pub restores: u64,
    /// How long these took, milliseconds.
    pub restore_ms: u64,
    /// Requests whose stored pages were computed again, because that was faster, since start.
    pub restores_declined: u64,
    /// Pages handed to the store since start.
    pub pages_spilled: u64,
    /// Pages not handed over, for lack of room in the queue, since start.
    pub pages_dropped: u64,
}

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
    drafted_tokens: AtomicU64,
    draft_kept_tokens: AtomicU64,
    restored_tokens: AtomicU64,
    restores: AtomicU64,
    restore_ms: AtomicU64,
    restores_declined: AtomicU64,
    pages_spilled: AtomicU64,
    pages_dropped: AtomicU64,
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
        self.drafted_tokens.store(stats.drafted_tokens, Relaxed);
        self.draft_kept_tokens.store(stats.draft_kept_tokens, Relaxed);
        self.restored_tokens.store(stats.restored_tokens, Relaxed);
        self.restores.store(stats.restores, Relaxed);
        self.restore_ms.store(stats.restore_ms, Relaxed);
        self.restores_declined.store(stats.restores_declined, Relaxed);
        self.pages_spilled.store(stats.pages_spilled, Relaxed);
        self.pages_dropped.store(stats.pages_dropped, Relaxed);
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
            drafted_tokens: self.drafted_tokens.load(Relaxed),
            draft_kept_tokens: self.draft_kept_tokens.load(Relaxed),
            restored_tokens: self.restored_tokens.load(Relaxed),
            restores: self.restores.load(Relaxed),
            restore_ms: self.restore_ms.load(Relaxed),
            restores_declined: self.restores_declined.load(Relaxed),
            pages_spilled: self.pages_spilled.load(Relaxed),
            pages_dropped: self.pages_dropped.load(Relaxed),
        }
    }
}
