//! `mainstay bench report`: results of measurements as one HTML page.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use mainstay_bench::page;
use serde_json::{Deserializer, Value};

use crate::exit::Usage;

/// Options of `mainstay bench report`.
#[derive(Args, Clone, Debug)]
pub(super) struct ReportArgs {
    /// Files that `bench latency`, `bench sessions` or `bench serve` wrote with --json.
    #[arg(env = "MAINSTAY_BENCH_RESULTS", value_name = "RESULT.json", required = true)]
    results: Vec<PathBuf>,
    /// The page to write.
    #[arg(long, env = "MAINSTAY_BENCH_HTML", value_name = "FILE.html", default_value = "bench.html")]
    html: PathBuf,
    /// Its title.
    #[arg(long, env = "MAINSTAY_BENCH_TITLE", value_name = "TEXT", default_value = "Mainstay benchmarks")]
    title: String,
}

/// Writes the page.
pub(super) fn run(args: &ReportArgs) -> Result<()> {
    let mut results = Vec::new();
    for path in &args.results {
        let wrong = |what: String| Usage(format!("{}: {what}", path.display()));
        let text = fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
        for value in Deserializer::from_str(&text).into_iter::<Value>() {
            results.push(value.map_err(|e| wrong(format!("expected JSON, found: {e}")))?);
        }
    }
    let count = page::plots(&results).len();
    if count == 0 {
        return Err(Usage("expected results of mainstay bench, found none in these files".into()).into());
    }
    let text = page::html(&args.title, &results)?;
    fs::write(&args.html, text).with_context(|| args.html.display().to_string())?;
    println!("{}: {count} {}", args.html.display(), if count == 1 { "plot" } else { "plots" });
    Ok(())
}
