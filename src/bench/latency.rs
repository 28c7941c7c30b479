//! `mainstay bench latency`: prefill and decode speed of one model.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use mainstay_bench::{LatencyError, Plan};
use serde_json::json;

use super::{SubjectArgs, describe, peaks};
use crate::exit::Usage;
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
    /// Decode steps of each run.
    #[arg(long = "gen", env = "MAINSTAY_BENCH_GEN", value_name = "STEPS", default_value_t = 64)]
    gen_steps: usize,
    /// Runs of each case; the median counts.
    #[arg(long, env = "MAINSTAY_BENCH_REPEAT", value_name = "N", default_value_t = 3)]
    repeat: usize,
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
        depths: args.depth.clone(),
        batches: args.batch.clone(),
        gen_steps: args.gen_steps,
        repeats: args.repeat,
        tokens_per_step: args.subject.model.engine.tokens_per_step,
        kv_dtype: start::kv_dtype(args.subject.model.engine.kv_type, &weights),
    };
    eprintln!("measuring the machine");
    let threads = start::threads(&args.subject.model.engine);
    let peaks = peaks(threads);
    let measured = mainstay_bench::latency(&*backend, (&graph, &weights), &plan, |what| eprintln!("{what}"));
    let measured = measured.map_err(|error| match error {
        LatencyError::Plan(what) => Usage(what).into(),
        other => anyhow::Error::from(other),
    })?;
    let device = start::device_name(&*backend);
    let kv = plan.kv_dtype.name();
    println!("{name} on {device}, prompt {}, {} decode steps, KV {kv}", plan.prompt, plan.gen_steps);
    println!("machine: {}\n", describe(&peaks));
    print!("{}", mainstay_bench::table(&measured, &peaks));
    if let Some(file) = &args.json {
        let mut report = mainstay_bench::json(&measured, &peaks);
        report["model"] = json!(name);
        report["device"] = json!(device);
        report["kv_type"] = json!(kv);
        report["version"] = json!(env!("CARGO_PKG_VERSION"));
        fs::write(file, format!("{report:#}\n")).with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}
