//! `mainstay bench`: measurements of this machine with a real model or the shape of one.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use mainstay_backend_api::KvDType;
use mainstay_bench::{LatencyError, Peaks, Plan, Shape};
use mainstay_kernels_cpu::measure;
use mainstay_models::graph::Graph;
use mainstay_models::weights::DType;
use mainstay_models::{Model, Weights};
use serde_json::json;

use crate::exit::Usage;
use crate::options::ModelArgs;
use crate::source::Source;
use crate::start;

/// Options of `mainstay bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum BenchCommand {
    /// Prefill and decode speed of one model, and the share of the machine's limits that it reaches.
    Latency(LatencyArgs),
}

/// Element type of made-up weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WeightType {
    F32,
    F16,
    Bf16,
}

/// Options of `mainstay bench latency`.
#[derive(Args, Clone, Debug)]
struct LatencyArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Instead of a model, random weights in the shape of one: qwen3-0.6b, llama-3.2-1b.
    #[arg(long, env = "MAINSTAY_SHAPE", conflicts_with = "model")]
    shape: Option<Shape>,
    /// Element type of those weights.
    #[arg(long, env = "MAINSTAY_WEIGHT_TYPE", value_enum, default_value = "bf16")]
    weight_type: WeightType,
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

/// Runs a measurement.
pub(crate) fn run(args: BenchArgs) -> Result<()> {
    let BenchCommand::Latency(args) = args.command;
    latency(&args)
}

fn latency(args: &LatencyArgs) -> Result<()> {
    let backend = start::backend(&args.model.engine)?;
    let (name, graph, weights) = subject(args)?;
    let plan = Plan {
        prompt: args.prompt,
        depths: args.depth.clone(),
        batches: args.batch.clone(),
        gen_steps: args.gen_steps,
        repeats: args.repeat,
        tokens_per_step: args.model.engine.tokens_per_step,
        kv_dtype: start::kv_dtype(args.model.engine.kv_type, &weights),
    };
    eprintln!("measuring the machine");
    let threads = start::threads(&args.model.engine);
    let peaks = peaks(threads);
    let measured = mainstay_bench::latency(&*backend, (&graph, &weights), &plan, |what| eprintln!("{what}"));
    let measured = measured.map_err(|error| match error {
        LatencyError::Plan(what) => Usage(what).into(),
        other => anyhow::Error::from(other),
    })?;
    let device = start::device_name(&*backend);
    let kv = match plan.kv_dtype {
        KvDType::F32 => "f32",
        KvDType::BF16 => "bf16",
    };
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

/// The graph and weights to measure, with a name for people.
fn subject(args: &LatencyArgs) -> Result<(String, Graph, Weights)> {
    if let Some(shape) = args.shape {
        let dtype = match args.weight_type {
            WeightType::F32 => DType::F32,
            WeightType::F16 => DType::F16,
            WeightType::Bf16 => DType::BF16,
        };
        eprintln!("making weights");
        let (graph, weights) = shape.build(dtype)?;
        return Ok((format!("{shape} {dtype:?} (random weights)"), graph, weights));
    }
    let source = Source::parse(args.model.model.as_deref())?;
    let name = source.name();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let Model { graph, weights, .. } = runtime.block_on(source.open())?;
    Ok((name, graph, weights))
}

/// Reads memory and multiplies for about a second.
pub(crate) fn peaks(threads: usize) -> Peaks {
    Peaks {
        read_bytes_per_s: Some(measure::read_bytes_per_second(threads)),
        fma_flops_per_s: Some(measure::fma_flops_per_second(threads)),
    }
}

/// One line for people.
pub(crate) fn describe(peaks: &Peaks) -> String {
    let show = |value: Option<f64>, unit: &str| {
        value.map_or_else(|| format!("unknown {unit}"), |v| format!("{:.1} {unit}", v / 1e9))
    };
    format!("{} read, {} f32", show(peaks.read_bytes_per_s, "GB/s"), show(peaks.fma_flops_per_s, "GFLOP/s"))
}
