//! Counters and histograms that the server keeps, and the Prometheus text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mainstay_engine::KvState;

/// Upper bounds of time to first token, seconds.
const FIRST_TOKEN_S: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Upper bounds of the time between tokens, seconds.
const BETWEEN_TOKENS_S: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5];

/// A histogram of durations.
pub(crate) struct Histogram {
    bounds_s: &'static [f64],
    /// One per bound, and one for everything above.
    buckets: Vec<AtomicU64>,
    sum_us: AtomicU64,
}

impl Histogram {
    fn new(bounds_s: &'static [f64]) -> Self {
        let buckets = (0..=bounds_s.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds_s, buckets, sum_us: AtomicU64::new(0) }
    }

    pub(crate) fn observe(&self, time: Duration) {
        let bucket = self.bounds_s.partition_point(|bound| *bound < time.as_secs_f64());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }
}

/// How a choice ended, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stop,
    Length,
    /// The client left, a time limit was reached or the device failed.
    Abort,
}

impl Outcome {
    pub(crate) const ALL: [Self; 3] = [Self::Stop, Self::Length, Self::Abort];

    fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// What the server counts per model; the engine counts the rest.
pub(crate) struct ModelMetrics {
    pub(crate) first_token: Histogram,
    pub(crate) between_tokens: Histogram,
    outcomes: [AtomicU64; Outcome::ALL.len()],
    late_pages: AtomicU64,
    /// By [`KV_STATES`].
    kv_states: [AtomicU64; KV_STATES.len()],
}

/// What may have become of a prompt's keys and values.
pub(crate) const KV_STATES: [KvState; 4] =
    [KvState::Exact, KvState::Equivalent, KvState::Recomputed, KvState::Cold];

impl Default for ModelMetrics {
    fn default() -> Self {
        Self {
            first_token: Histogram::new(&FIRST_TOKEN_S),
            between_tokens: Histogram::new(&BETWEEN_TOKENS_S),
            outcomes: Default::default(),
            late_pages: AtomicU64::new(0),
            kv_states: Default::default(),
        }
    }
}

impl ModelMetrics {
    pub(crate) fn finished(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// An answer did not wait any longer for its pages to be with the system.
    pub(crate) fn page_late(&self) {
        self.late_pages.fetch_add(1, Ordering::Relaxed);
    }

    /// A prompt was begun.
    pub(crate) fn reused(&self, state: KvState) {
        let counts = KV_STATES.iter().zip(&self.kv_states);
        counts.filter(|(known, _)| **known == state).for_each(|(_, n)| {
            n.fetch_add(1, Ordering::Relaxed);
        });
    }

    /// Prompts by state.
    pub(crate) fn kv_states(&self) -> impl Iterator<Item = (KvState, u64)> {
        KV_STATES.into_iter().zip(&self.kv_states).map(|(state, n)| (state, n.load(Ordering::Relaxed)))
    }

    pub(crate) fn late_pages(&self) -> u64 {
        self.late_pages.load(Ordering::Relaxed)
    }

    pub(crate) fn outcome(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome as usize].load(Ordering::Relaxed)
    }
}

/// Answered requests by route and status.
#[derive(Default)]
pub(crate) struct HttpMetrics {
    answered: Mutex<BTreeMap<(String, u16), u64>>,
}

impl HttpMetrics {
    /// `route` is the pattern that matched, never the path: there must be few of them.
    pub(crate) fn answered(&self, route: &str, status: u16) {
        let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        *answered.entry((route.to_owned(), status)).or_default() += 1;
    }

    pub(crate) fn snapshot(&self) -> BTreeMap<(String, u16), u64> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A page of metrics in Prometheus' text format, version 0.0.4.
#[derive(Default)]
pub(crate) struct Page {
    text: String,
}

impl Page {
    pub(crate) fn finish(self) -> String {
        self.text
    }

    /// Opens a family; its samples must follow.
    pub(crate) fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    pub(crate) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        self.line(format_args!("{name}{{{}}} {value}", labels.join(",")));
    }

    pub(crate) fn histogram(&mut self, name: &str, model: &str, histogram: &Histogram) {
        let mut count = 0;
        let bounds = histogram.bounds_s.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bucket, bound) in histogram.buckets.iter().zip(bounds) {
            count += bucket.load(Ordering::Relaxed);
            self.sample(&format!("{name}_bucket"), &[("model_name", model), ("le", &bound)], count as f64);
        }
        let sum_s = Duration::from_micros(histogram.sum_us.load(Ordering::Relaxed)).as_secs_f64();
        self.sample(&format!("{name}_sum"), &[("model_name", model)], sum_s);
        self.sample(&format!("{name}_count"), &[("model_name", model)], count as f64);
    }

    pub(crate) fn outcomes(&mut self, name: &str, model: &str, metrics: &ModelMetrics) {
        for outcome in Outcome::ALL {
            let labels = [("model_name", model), ("finished_reason", outcome.label())];
            self.sample(name, &labels, metrics.outcome(outcome) as f64);
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.text, "{line}").expect("writing to a string does not fail");
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_bounds_inclusive() {
        let metrics = ModelMetrics::default();
        metrics.first_token.observe(Duration::from_millis(1));
        metrics.first_token.observe(Duration::from_millis(20));
        metrics.first_token.observe(Duration::from_secs(100));
        let mut page = Page::default();
        page.histogram("t", "a\"b", &metrics.first_token);
        let text = page.finish();
        assert!(text.contains("t_bucket{model_name=\"a\\\"b\",le=\"0.001\"} 1\n"), "{text}");
        assert!(text.contains("le=\"0.01\"} 1\n") && text.contains("le=\"0.02\"} 2\n"), "{text}");
        assert!(text.contains("le=\"30\"} 2\n") && text.contains("le=\"+Inf\"} 3\n"), "{text}");
        assert!(
            text.contains("t_count{model_name=\"a\\\"b\"} 3\n")
                && text.contains("t_sum{model_name=\"a\\\"b\"} 100.021")
        );
    }
}
