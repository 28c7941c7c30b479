//! Results of all measurements as plots, and as one HTML page that needs nothing from elsewhere.

mod plot;

use std::fmt::Write;

use serde_json::Value;

use plot::Series;
pub use plot::{Plot, PlotError};

/// The plot of a run: latency against the rate where there are several, else the time to the first token against length.
pub fn main_plot(results: &[Value]) -> Option<Plot> {
    plots(results).into_iter().next()
}

/// Every plot that the results have figures for.
pub fn plots(results: &[Value]) -> Vec<Plot> {
    let of = |key: &str| results.iter().filter(|r| !r[key].is_null()).collect::<Vec<_>>();
    let served: Vec<&Value> = results.iter().filter(|result| result["kind"] == "serve").collect();
    let all = [
        against_rate(&served, "ttft", "Time to the first token against the rate"),
        against_rate(&served, "tpot", "Time for each token after it against the rate"),
        by_length(&served),
        sessions(&of("resumes")),
        speed(&of("measurements"), "prefill", "What depth costs: prefill"),
        speed(&of("measurements"), "decode", "What depth costs: decode"),
    ];
    all.into_iter().flatten().collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .map(|list| list.iter().map(|n| n.as_f64().unwrap_or(f64::NAN)).collect())
        .unwrap_or_default()
}

fn against_rate(served: &[&Value], name: &str, title: &str) -> Option<Plot> {
    let mut runs: Vec<(f64, &Value)> =
        served.iter().filter_map(|run| Some((run["request_rate"].as_f64()?, *run))).collect();
    if runs.len() < 2 {
        return None;
    }
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let series = ["p50", "p90", "p99"].map(|word| {
        let at = |(rate, run): &(f64, &Value)| Some((*rate, run[format!("{word}_{name}_ms")].as_f64()?));
        Series { name: word.to_owned(), points: runs.iter().filter_map(at).collect(), is_joined: true }
    });
    let (x, y) = ("conversations per second", "ms");
    Some(Plot { title: title.to_owned(), x, y, is_logarithmic: false, series: series.to_vec() })
}

/// Every request: what was computed whole apart from what went on from what was there.
fn by_length(served: &[&Value]) -> Option<Plot> {
    let (mut cold, mut resumed) = (Vec::new(), Vec::new());
    for run in served {
        let lists = ["input_lens", "ttfts", "cached_tokens"].map(|name| numbers(&run[name]));
        let errors = run["errors"].as_array().map_or(&[][..], Vec::as_slice);
        for (i, (len, ttft)) in lists[0].iter().zip(&lists[1]).enumerate() {
            let failed = errors.get(i).and_then(Value::as_str).is_some_and(|error| !error.is_empty());
            let cached = lists[2].get(i).copied().unwrap_or(0.0);
            // half of it or more
            let to = if cached >= len / 2.0 { &mut resumed } else { &mut cold };
            if !failed {
                to.push((*len, ttft * 1e3));
            }
        }
    }
    let named = [("cold", cold), ("resumed, half of the prompt or more", resumed)];
    let series: Vec<Series> = named
        .into_iter()
        .filter(|(_, points)| !points.is_empty())
        .map(|(name, points)| Series { name: name.to_owned(), points, is_joined: false })
        .collect();
    let title = "What length costs: time to the first token".to_owned();
    let plot = Plot { title, x: "tokens of the prompt", y: "ms", is_logarithmic: false, series };
    (!plot.series.is_empty()).then_some(plot)
}

fn sessions(results: &[&Value]) -> Option<Plot> {
    let mut series: Vec<Series> = Vec::new();
    let runs = results.iter().filter_map(|result| result["resumes"].as_array()).flatten();
    for run in runs {
        let (Some(case), Some(x), Some(y)) =
            (run["case"].as_str(), run["context"].as_f64(), run["ttft_ms"].as_f64())
        else {
            continue;
        };
        match series.iter_mut().find(|series| series.name == case) {
            Some(series) => series.points.push((x, y)),
            None => {
                series.push(Series { name: case.to_owned(), points: vec![(x, y)], is_joined: false });
            }
        }
    }
    let title = "Sessions: time to the first token of the second turn".to_owned();
    let plot = Plot { title, x: "tokens of the session", y: "ms", is_logarithmic: true, series };
    (!plot.series.is_empty()).then_some(plot)
}

fn speed(results: &[&Value], phase: &str, title: &str) -> Option<Plot> {
    let mut series: Vec<Series> = Vec::new();
    for result in results {
        let rows = result["measurements"].as_array().map_or(&[][..], Vec::as_slice);
        for row in rows.iter().filter(|row| row["phase"] == phase) {
            let name = format!("{}, {} at a time", result["model"].as_str().unwrap_or("model"), row["batch"]);
            let at = (row["depth"].as_f64(), row["tokens_per_s_median"].as_f64());
            let (Some(x), Some(y)) = at else { continue };
            match series.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push((x, y)),
                None => series.push(Series { name, points: vec![(x, y)], is_joined: true }),
            }
        }
    }
    for series in &mut series {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    let (x, y) = ("tokens before", "tokens/s");
    let plot = Plot { title: title.to_owned(), x, y, is_logarithmic: false, series };
    (!plot.series.is_empty()).then_some(plot)
}

/// One page with every plot, and the figures of each run.
///
/// # Errors
/// [`PlotError`] where a plot cannot be drawn.
pub fn html(title: &str, results: &[Value]) -> Result<String, PlotError> {
    let title = escaped(title);
    let mut body = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n<style>{STYLE}</style>\
         </head>\n<body><h1>{title}</h1>\n"
    );
    let served: Vec<&Value> = results.iter().filter(|result| result["kind"] == "serve").collect();
    if !served.is_empty() {
        body.push_str(&served_table(&served));
    }
    for plot in plots(results) {
        body.push_str("<figure>");
        body.push_str(&plot.svg()?);
        body.push_str("</figure>\n");
    }
    body.push_str("</body></html>\n");
    Ok(body)
}

const STYLE: &str = "body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}\
                     table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}\
                     td:first-child,th:first-child{text-align:left}figure{margin:2em 0}svg{max-width:100%;height:auto}";

fn served_table(served: &[&Value]) -> String {
    const COLUMNS: [(&str, &str); 9] = [
        ("requests", "completed"),
        ("failed", "failed"),
        ("req/s", "request_throughput"),
        ("good/s", "request_goodput"),
        ("tok/s out", "output_throughput"),
        ("TTFT p50 ms", "p50_ttft_ms"),
        ("TTFT p99 ms", "p99_ttft_ms"),
        ("TPOT p50 ms", "p50_tpot_ms"),
        ("TPOT p99 ms", "p99_tpot_ms"),
    ];
    let mut text = "<table><tr><th>run</th>".to_owned();
    for (name, _) in COLUMNS {
        // writing to a String cannot fail
        let _ = write!(text, "<th>{name}</th>");
    }
    text.push_str("</tr>\n");
    for run in served {
        let word = |key: &str| escaped(run[key].as_str().unwrap_or_default());
        let rate = match run["request_rate"].as_f64() {
            Some(rate) => format!("{rate}/s"),
            None => format!("{} clients", run["max_concurrency"]),
        };
        let _ = write!(
            text,
            "<tr><td>{}, {} on {}: {rate}</td>",
            word("workload"),
            word("model_id"),
            word("label")
        );
        for (_, key) in COLUMNS {
            let shown = match (run[key].as_u64(), run[key].as_f64()) {
                (Some(count), _) => count.to_string(),
                (None, Some(number)) => format!("{number:.2}"),
                _ => "-".to_owned(),
            };
            let _ = write!(text, "<td>{shown}</td>");
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</table>\n");
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn served(rate: Value) -> Value {
        json!({
            "kind": "serve", "workload": "chat", "model_id": "<m>", "label": "cpu", "request_rate": rate,
            "max_concurrency": 8, "completed": 3, "failed": 1, "request_throughput": 2.5, "request_goodput": Value::Null,
            "p50_ttft_ms": 10.0, "p90_ttft_ms": 12.0, "p99_ttft_ms": 20.0,
            "p50_tpot_ms": 1.0, "p90_tpot_ms": 1.0, "p99_tpot_ms": 2.0,
            "input_lens": [100, 200, 300, 400], "ttfts": [0.1, 0.2, 0.05, 9.0], "cached_tokens": [0, 99, 150, Value::Null],
            "errors": ["", "", "", "refused"],
        })
    }

    #[test]
    fn requests_are_cold_or_resumed_and_failures_are_left_out() {
        let plot = by_length(&[&served(json!("inf"))]).unwrap();
        let points: Vec<&[(f64, f64)]> = plot.series.iter().map(|series| &series.points[..]).collect();
        assert_eq!(points, [&[(100.0, 100.0), (200.0, 200.0)][..], &[(300.0, 50.0)][..]]);
    }

    #[test]
    fn rates_are_sorted_and_one_alone_is_no_line() {
        let runs = [served(json!(8.0)), served(json!("inf")), served(json!(2.0))];
        let plot = main_plot(&runs).unwrap();
        assert_eq!(plot.series[2].points, [(2.0, 20.0), (8.0, 20.0)]);
        assert!(main_plot(&runs[..2]).unwrap().title.contains("length"), "one rate only");
    }

    #[test]
    fn the_page_has_every_plot_and_nothing_from_elsewhere() {
        let latency = json!({"model": "q", "measurements": [
            {"phase": "decode", "depth": 4096, "batch": 1, "tokens_per_s_median": 20.0},
            {"phase": "decode", "depth": 0, "batch": 1, "tokens_per_s_median": 40.0},
            {"phase": "prefill", "depth": 0, "batch": 1, "tokens_per_s_median": 400.0}]});
        let sessions = json!({"resumes": [
            {"case": "cold", "context": 2048, "ttft_ms": 18_000.0}, {"case": "disk", "context": 2048, "ttft_ms": 800.0}]});
        let results = [served(json!(1.0)), served(json!(2.0)), latency, sessions];
        let page = html("Bench \"here\"", &results).unwrap();
        assert_eq!(page.matches("<svg").count(), 6);
        assert!(
            page.contains("Bench &quot;here&quot;") && page.contains("&lt;m&gt;") && !page.contains("<m>")
        );
        let outside = ["href=", "src=", "@import", "<script"];
        assert!(outside.iter().all(|word| !page.contains(word)), "{page}");
        assert_eq!(plots(&results)[5].series[0].points, [(0.0, 40.0), (4096.0, 20.0)]);
    }
}
