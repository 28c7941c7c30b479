//! Measurements as a table for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::latency::{Measurement, Peaks, Phase};

/// A table with one line a case: medians, ranges, shares of the machine's limits.
pub fn table(measurements: &[Measurement], peaks: &Peaks) -> String {
    let mut text = format!(
        "{:<8} {:>7} {:>6} {:>10} {:>19} {:>10} {:>8} {:>8}\n",
        "phase", "depth", "batch", "tokens/s", "range", "bandwidth", "FMA", "foreign"
    );
    for m in measurements {
        let (low, high) = range(&m.tokens_per_s);
        let worst = m.foreign.iter().flatten().copied().reduce(f64::max);
        // writing to a String cannot fail
        let _ = writeln!(
            text,
            "{:<8} {:>7} {:>6} {:>10.1} {:>19} {:>10} {:>8} {:>8}",
            name(m.case.phase),
            m.case.depth,
            m.case.batch,
            m.median(),
            format!("{low:.1} - {high:.1}"),
            percent(m.bandwidth_share(peaks)),
            percent(m.fma_share(peaks)),
            percent(worst),
        );
    }
    text
}

/// The same with every run.
pub fn json(measurements: &[Measurement], peaks: &Peaks) -> Value {
    let rows: Vec<Value> = measurements
        .iter()
        .map(|m| {
            json!({
                "phase": name(m.case.phase),
                "depth": m.case.depth,
                "batch": m.case.batch,
                "tokens_per_s_median": m.median(),
                "tokens_per_s": m.tokens_per_s,
                "bytes_per_token": m.bytes_per_token,
                "flops_per_token": m.flops_per_token,
                "bandwidth_share": m.bandwidth_share(peaks),
                "fma_share": m.fma_share(peaks),
                "foreign_cpu_share": m.foreign,
            })
        })
        .collect();
    json!({
        "read_bytes_per_s": peaks.read_bytes_per_s,
        "fma_flops_per_s": peaks.fma_flops_per_s,
        "measurements": rows,
    })
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Prefill => "prefill",
        Phase::Decode => "decode",
    }
}

fn range(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, 0.0), |(low, high), &v| (v.min(low), v.max(high)))
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |s| format!("{:.0} %", 100.0 * s))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::latency::Case;

    fn measured() -> Measurement {
        Measurement {
            case: Case { phase: Phase::Decode, depth: 2048, batch: 8 },
            tokens_per_s: vec![10.0, 30.0, 20.0],
            foreign: vec![Some(0.01), None, Some(0.04)],
            bytes_per_token: 1e9,
            flops_per_token: 1e9,
        }
    }

    #[test]
    fn table_shows_median_range_and_shares() {
        let peaks = Peaks { read_bytes_per_s: Some(40e9), fma_flops_per_s: None };
        let text = table(&[measured()], &peaks);
        let line: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(line, ["decode", "2048", "8", "20.0", "10.0", "-", "30.0", "50", "%", "-", "4", "%"]);
    }

    #[test]
    fn json_holds_every_run() {
        let found = json(&[measured()], &Peaks::default());
        assert_eq!(found["measurements"][0]["tokens_per_s"], json!([10.0, 30.0, 20.0]));
        assert_eq!(found["measurements"][0]["bandwidth_share"], Value::Null);
    }
}
