//! A run as a table for people, and as the object that `vllm bench serve` saves, so that tools which read that read this.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::{Arrivals, Distribution, Loaded, Slo, Summary};

/// What a run was.
#[derive(Clone, Debug)]
pub struct About<'a> {
    /// When it began, such as 20261127-120000.
    pub date: String,
    /// The model's name.
    pub model: String,
    /// Which server answered.
    pub server: String,
    /// The workload's name.
    pub workload: &'static str,
    /// When conversations began.
    pub arrivals: &'a Arrivals,
    /// Most of them at a time.
    pub clients_max: Option<usize>,
    /// Bounds for goodput.
    pub slos: &'a [Slo],
    /// Requests that were to be sent.
    pub requests: usize,
    /// Part of the processors' time that other programs took.
    pub foreign_cpu_share: Option<f64>,
    /// Energy that the machine used.
    pub joules: Option<f64>,
    /// What the machine costs.
    pub price_per_hour: Option<f64>,
}

impl About<'_> {
    /// In the price's currency.
    fn cost_per_million(&self, summary: &Summary) -> Option<f64> {
        let cost = self.price_per_hour? / 3600.0 * summary.duration_s;
        (summary.output_tokens > 0).then(|| cost * 1e6 / summary.output_tokens as f64)
    }

    fn joules_per_token(&self, summary: &Summary) -> Option<f64> {
        let joules = self.joules?;
        (summary.output_tokens > 0).then(|| joules / summary.output_tokens as f64)
    }
}

/// One line a run, then the times of each: at most 100 columns.
pub fn table(runs: &[(&About<'_>, &Loaded)]) -> String {
    let mut text = format!(
        "{:<10} {:<16} {:>9} {:>7} {:>9} {:>15} {:>15} {:>8}\n",
        "workload", "load", "answered", "req/s", "out tok/s", "TTFT ms p50/p99", "TPOT ms p50/p99", "good"
    );
    let summaries: Vec<Summary> = runs.iter().map(|(about, loaded)| summary(about, loaded)).collect();
    for ((about, _), s) in runs.iter().zip(&summaries) {
        // writing to a String cannot fail
        let _ = writeln!(
            text,
            "{:<10} {:<16} {:>9} {:>7.2} {:>9.1} {:>15} {:>15} {:>8}",
            about.workload,
            about.arrivals.describe(),
            format!("{}/{}", s.completed, about.requests),
            s.per_s(s.completed),
            s.per_s(s.output_tokens),
            format!("{:.1}/{:.1}", s.ttft.p50, s.ttft.p99),
            format!("{:.2}/{:.2}", s.tpot.p50, s.tpot.p99),
            s.good.map_or_else(|| "-".to_owned(), |good| format!("{:.2}/s", s.per_s(good))),
        );
    }
    for ((about, loaded), s) in runs.iter().zip(&summaries) {
        let _ = writeln!(text, "\n{}", details(about, loaded, s).trim_end());
    }
    text
}

fn summary(about: &About<'_>, loaded: &Loaded) -> Summary {
    Summary::of(&loaded.records, loaded.duration_s, about.slos)
}

fn details(about: &About<'_>, loaded: &Loaded, s: &Summary) -> String {
    let mut text = format!(
        "{}: {:.1} s, {} tokens in, {} out, at most {} at a time\n{:<14} {:>9} {:>9} {:>9} {:>9}\n",
        about.arrivals.describe(),
        s.duration_s,
        s.input_tokens,
        s.output_tokens,
        s.concurrent_max,
        "ms",
        "mean",
        "p50",
        "p90",
        "p99"
    );
    for (name, d) in named(s) {
        let _ = writeln!(
            text,
            "{:<14} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
            name.to_uppercase(),
            d.mean,
            d.p50,
            d.p90,
            d.p99
        );
    }
    if let Some(share) = about.foreign_cpu_share {
        let _ = writeln!(text, "others took {:.0} % of the processors' time", 100.0 * share);
    }
    if let Some(joules) = about.joules_per_token(s) {
        let _ = writeln!(text, "{joules:.3} joules per token of output");
    }
    if let Some(cost) = about.cost_per_million(s) {
        let _ = writeln!(text, "{cost:.4} per million tokens of output at the given price");
    }
    if loaded.unsent > 0 {
        let _ =
            writeln!(text, "{} requests were not sent: the time was up, or one before failed", loaded.unsent);
    }
    let first = loaded.records.iter().find_map(|record| record.outcome.error.as_deref());
    if let Some(error) = first {
        let shown: String = error.chars().take(70).collect();
        let _ = writeln!(text, "{} failed, the first: {shown}", s.failed);
    }
    text
}

fn named(s: &Summary) -> [(&'static str, Distribution); 4] {
    [("ttft", s.ttft), ("tpot", s.tpot), ("itl", s.itl), ("e2el", s.e2el)]
}

/// The run as one object, with every request.
pub fn json(about: &About<'_>, loaded: &Loaded) -> Value {
    let s = summary(about, loaded);
    let mut fields = head(about, &s, loaded.unsent);
    for (name, d) in named(&s) {
        let values = [
            ("mean", d.mean),
            ("median", d.p50),
            ("std", d.std),
            ("p50", d.p50),
            ("p90", d.p90),
            ("p99", d.p99),
        ];
        for (word, value) in values {
            fields.insert(format!("{word}_{name}_ms"), json!(value));
        }
    }
    let records = || loaded.records.iter();
    let of = |value: fn(&super::Record) -> Value| Value::Array(records().map(value).collect());
    let lists = [
        ("input_lens", of(|r| json!(r.outcome.input_tokens))),
        ("output_lens", of(|r| json!(r.outcome.output_tokens))),
        ("ttfts", of(|r| json!(r.outcome.first_s.unwrap_or(0.0)))),
        ("itls", of(|r| json!(r.outcome.gaps_s))),
        ("latencies", of(|r| json!(r.outcome.total_s))),
        ("start_times", of(|r| json!(r.start_s))),
        ("queue_times", of(|r| json!(r.queue_s))),
        ("generated_texts", of(|r| json!(r.outcome.text))),
        ("errors", of(|r| json!(r.outcome.error.as_deref().unwrap_or_default()))),
        ("cached_tokens", of(|r| json!(r.outcome.cached_tokens))),
        ("conversations", of(|r| json!(r.conversation))),
        ("turns", of(|r| json!(r.turn))),
    ];
    fields.extend(lists.map(|(name, list)| (name.to_owned(), list)));
    Value::Object(fields)
}

fn head(about: &About<'_>, s: &Summary, unsent: usize) -> Map<String, Value> {
    let clients = match about.arrivals {
        Arrivals::Closed { clients } => Some(*clients),
        _ => about.clients_max,
    };
    let whole = json!({
        "kind": "serve",
        "version": env!("CARGO_PKG_VERSION"),
        "workload": about.workload,
        "date": about.date,
        "endpoint_type": "openai-chat",
        "backend": "openai-chat",
        "label": about.server,
        "model_id": about.model,
        "tokenizer_id": about.model,
        "num_prompts": about.requests,
        "request_rate": about.arrivals.rate().map_or_else(|| json!("inf"), |rate| json!(rate)),
        "burstiness": 1.0,
        "max_concurrency": clients,
        "duration": s.duration_s,
        "completed": s.completed,
        "failed": s.failed,
        "unsent": unsent,
        "total_input_tokens": s.input_tokens,
        "total_output_tokens": s.output_tokens,
        "request_throughput": s.per_s(s.completed),
        "request_goodput": s.good.map(|good| s.per_s(good)),
        "output_throughput": s.per_s(s.output_tokens),
        "total_token_throughput": s.per_s(s.input_tokens + s.output_tokens),
        "max_output_tokens_per_s": s.output_tokens_per_s_max,
        "max_concurrent_requests": s.concurrent_max,
        "foreign_cpu_share": about.foreign_cpu_share,
    });
    let Value::Object(mut fields) = whole else { return Map::new() };
    let known = [
        ("joules_per_output_token", about.joules_per_token(s)),
        ("cost_per_million_output_tokens", about.cost_per_million(s)),
    ];
    fields.extend(known.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))));
    fields
}
