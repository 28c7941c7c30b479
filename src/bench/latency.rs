//! `mainstay bench latency`: prefill and decode speed of one model.

use std::fs;
use std::io::{BufRead, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use mainstay_bench::{Bench, Case, LatencyError, Peaks, Plan};
use serde_json::{Value, json};

use super::{SubjectArgs, describe, peaks, positive};
use crate::exit::Usage;
use crate::options::switch;
use crate::start;

/// Options of `mainstay bench latency`.
#[derive(Args, Clone, Debug)]
pub(super) struct LatencyArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Tokens of the measured prompt.
    #[arg(long, env = "MAINSTAY_BENCH_PROMPT", value_name = "TOKENS", default_value_t = 512)]
    prompt: usize,
    /// Tokens that lie before, separated by commas.
    #[arg(
        long,
        env = "MAINSTAY_BENCH_DEPTH",
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "0,2048"
    )]
    depth: Vec<usize>,
    /// Sequences that decode together, separated by commas.
    #[arg(
        long,
        env = "MAINSTAY_BENCH_BATCH",
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,8"
    )]
    batch: Vec<usize>,
    /// Instead of that grid, these cells, separated by commas: prefill@DEPTH, decode@DEPTHxSEQUENCES.
    #[arg(long, env = "MAINSTAY_BENCH_CASES", value_name = "CELL", value_delimiter = ',')]
    cases: Vec<Case>,
    /// Decode steps of each run.
    #[arg(long = "gen", env = "MAINSTAY_BENCH_GEN", value_name = "STEPS", default_value_t = 64)]
    gen_steps: usize,
    /// Runs of each case; the median counts.
    #[arg(long, env = "MAINSTAY_BENCH_REPEAT", value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Measure a cell once for each line on stdin that names one, and answer each with a line of JSON: for scripts that
    /// have two programs take turns.
    #[arg(long, env = "MAINSTAY_BENCH_TURNS", value_parser = switch())]
    turns: bool,
    /// What an hour of the machine costs, in any currency: adds the cost of a million tokens.
    #[arg(long, env = "MAINSTAY_PRICE_PER_HOUR", value_name = "PRICE", value_parser = positive)]
    price_per_hour: Option<f64>,
    /// Write every run to this file.
    #[arg(long, env = "MAINSTAY_BENCH_JSON", value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the measurement.
pub(super) fn run(args: &LatencyArgs) -> Result<()> {
    let backend = start::backend(&args.subject.model.engine)?;
    let (name, graph, weights) = args.subject.open()?;
    let plan = Plan {
        prompt: args.prompt,
        cases: if args.cases.is_empty() { Case::grid(&args.depth, &args.batch) } else { args.cases.clone() },
        gen_steps: args.gen_steps,
        repeats: args.repeat,
        tokens_per_step: args.subject.model.engine.tokens_per_step,
        kv_dtype: start::kv_dtype(args.subject.model.engine.kv_type, &weights),
    };
    eprintln!("measuring the machine");
    let peaks = peaks(start::threads(&args.subject.model.engine));
    let device = start::device_name(&*backend);
    if args.turns {
        let bench = Bench::new(&*backend, (&graph, &weights), &plan, |what| eprintln!("{what}"));
        let about = json!({
            "model": name, "device": device, "kv_type": plan.kv_dtype.name(), "version": env!("CARGO_PKG_VERSION"),
            "read_bytes_per_s": peaks.read_bytes_per_s, "fma_flops_per_s": peaks.fma_flops_per_s,
        });
        return turns(bench.map_err(told)?, &about, &peaks);
    }
    let measured = mainstay_bench::latency(&*backend, (&graph, &weights), &plan, |what| eprintln!("{what}"));
    let measured = measured.map_err(told)?;
    let kv = plan.kv_dtype.name();
    println!("{name} on {device}, prompt {}, {} decode steps, KV {kv}", plan.prompt, plan.gen_steps);
    println!("machine: {}\n", describe(&peaks));
    print!("{}", mainstay_bench::table(&measured, &peaks, args.price_per_hour));
    if let Some(file) = &args.json {
        let mut report = mainstay_bench::json(&measured, &peaks, args.price_per_hour);
        report["model"] = json!(name);
        report["device"] = json!(device);
        report["kv_type"] = json!(kv);
        report["version"] = json!(env!("CARGO_PKG_VERSION"));
        fs::write(file, format!("{report:#}\n")).with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}

fn told(error: LatencyError) -> anyhow::Error {
    match error {
        LatencyError::Plan(what) => Usage(what).into(),
        other => other.into(),
    }
}

/// Says what it is, then answers each line with a run of the cell that it names.
fn turns(mut bench: Bench<'_>, about: &Value, peaks: &Peaks) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{about}")?;
    for line in std::io::stdin().lock().lines() {
        let case: Case = line?.trim().parse().map_err(|e| Usage(format!("{e}")))?;
        let mut run = bench.empty(case);
        bench.measure(&mut run).map_err(told)?;
        writeln!(out, "{}", mainstay_bench::row(&run, peaks, None))?;
    }
    Ok(())
}
