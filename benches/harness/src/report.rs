//! Measurements as a table for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::latency::{Measurement, Peaks};

/// A table with one line a case: medians, ranges, shares of the machine's limits; energy where the machine tells it, and
/// what a million tokens cost where an hour has a price. At most 100 columns.
pub fn table(measurements: &[Measurement], peaks: &Peaks, price_per_hour: Option<f64>) -> String {
    let has_energy = measurements.iter().any(|m| m.joules().is_some());
    let mut text = format!(
        "{:<8} {:>7} {:>6} {:>10} {:>19} {:>10} {:>8} {:>8}",
        "phase", "depth", "batch", "tokens/s", "range", "bandwidth", "FMA", "foreign"
    );
    text.push_str(if has_energy { " J/token" } else { "" });
    text.push_str(if price_per_hour.is_some() { "  cost/M" } else { "" });
    text.push('\n');
    for m in measurements {
        let (low, high) = range(&m.tokens_per_s);
        let worst = m.foreign.iter().flatten().copied().reduce(f64::max);
        // writing to a String cannot fail
        let _ = write!(
            text,
            "{:<8} {:>7} {:>6} {:>10.1} {:>19} {:>10} {:>8} {:>8}",
            m.case.phase.name(),
            m.case.depth,
            m.case.batch,
            m.median(),
            format!("{low:.1} - {high:.1}"),
            percent(m.bandwidth_share(peaks)),
            percent(m.fma_share(peaks)),
            percent(worst),
        );
        if has_energy {
            let _ = write!(text, " {:>7}", m.joules().map_or_else(|| "-".to_owned(), |j| format!("{j:.3}")));
        }
        if let Some(price) = price_per_hour {
            let _ = write!(text, " {:>7.2}", m.cost_per_million(price));
        }
        text.push('\n');
    }
    text
}

/// The same with every run.
pub fn json(measurements: &[Measurement], peaks: &Peaks, price_per_hour: Option<f64>) -> Value {
    let rows: Vec<Value> = measurements.iter().map(|m| row(m, peaks, price_per_hour)).collect();
    json!({
        "kind": "latency",
        "read_bytes_per_s": peaks.read_bytes_per_s,
        "fma_flops_per_s": peaks.fma_flops_per_s,
        "measurements": rows,
    })
}

/// One measurement as an object, with energy and cost where they are known.
pub fn row(m: &Measurement, peaks: &Peaks, price_per_hour: Option<f64>) -> Value {
    let mut row = json!({
        "phase": m.case.phase.name(),
        "depth": m.case.depth,
        "batch": m.case.batch,
        "tokens_per_s_median": m.median(),
        "tokens_per_s": m.tokens_per_s,
        "bytes_per_token": m.bytes_per_token,
        "flops_per_token": m.flops_per_token,
        "bandwidth_share": m.bandwidth_share(peaks),
        "fma_share": m.fma_share(peaks),
        "foreign_cpu_share": m.foreign,
    });
    if let Some(joules) = m.joules() {
        row["joules_per_token"] = json!(joules);
    }
    if let Some(price) = price_per_hour {
        row["cost_per_million_tokens"] = json!(m.cost_per_million(price));
    }
    row
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
    use crate::latency::{Case, Phase};

    fn measured() -> Measurement {
        Measurement {
            case: Case { phase: Phase::Decode, depth: 2048, batch: 8 },
            tokens_per_s: vec![10.0, 30.0, 20.0],
            foreign: vec![Some(0.01), None, Some(0.04)],
            joules_per_token: vec![None; 3],
            bytes_per_token: 1e9,
            flops_per_token: 1e9,
        }
    }

    #[test]
    fn table_shows_median_range_and_shares() {
        let peaks = Peaks { read_bytes_per_s: Some(40e9), fma_flops_per_s: None };
        let text = table(&[measured()], &peaks, None);
        let line: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(line, ["decode", "2048", "8", "20.0", "10.0", "-", "30.0", "50", "%", "-", "4", "%"]);
    }

    #[test]
    fn energy_and_cost_are_there_where_they_are_known() {
        let (bare, peaks) = (measured(), Peaks::default());
        assert!(!table(std::slice::from_ref(&bare), &peaks, None).contains("J/token"));
        assert!(row(&bare, &peaks, None).get("joules_per_token").is_none(), "absent, not zero");
        let told = Measurement { joules_per_token: vec![Some(0.5), None, Some(1.0)], ..bare };
        let text = table(std::slice::from_ref(&told), &peaks, Some(3.6));
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
        let line: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().rev().take(2).collect();
        assert_eq!(line, ["50.00", "0.750"]);
        let found = row(&told, &peaks, Some(3.6));
        assert_eq!(
            (&found["joules_per_token"], &found["cost_per_million_tokens"]),
            (&json!(0.75), &json!(50.0))
        );
    }

    #[test]
    fn json_holds_every_run() {
        let found = json(&[measured()], &Peaks::default(), None);
        assert_eq!(found["measurements"][0]["tokens_per_s"], json!([10.0, 30.0, 20.0]));
        assert_eq!(found["measurements"][0]["bandwidth_share"], Value::Null);
    }
}
