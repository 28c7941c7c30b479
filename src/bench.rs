//! `mainstay bench`: measurements of this machine with a real model or the shape of one.

mod latency;
mod report;
mod serve;
mod sessions;
mod shape;

use anyhow::Result;
use clap::{Args, Subcommand};
use mainstay_bench::{Mix, Peaks, Shape};
use mainstay_kernels_cpu::measure;
use mainstay_models::graph::Graph;
use mainstay_models::weights::AtLoad;
use mainstay_models::{Model, Weights};

use crate::options::ModelArgs;
use crate::{quantize, start};

/// Options of `mainstay bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum BenchCommand {
    /// Prefill and decode speed of one model, and the share of the machine's limits that it reaches.
    Latency(latency::LatencyArgs),
    /// What sessions save and cost: resumed from memory, disk, a killed process, another directory.
    Sessions(sessions::SessionsArgs),
    /// A server under load: latencies, throughput, goodput; at several rates, for several kinds of clients.
    Serve(Box<serve::ServeArgs>),
    /// Results of all these as one HTML page with plots, which opens without a network.
    Report(report::ReportArgs),
    /// Write a model of random weights in the shape of a real one as a directory in Hugging Face layout.
    Shape(shape::ShapeArgs),
}

/// What is measured.
#[derive(Args, Clone, Debug)]
struct SubjectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Instead of a model, random weights in the shape of one, such as qwen3-0.6b or llama-3.1-8b.
    #[arg(long, env = "MAINSTAY_SHAPE", conflicts_with = "model")]
    shape: Option<Shape>,
    /// Types of those weights: a float, a block format or a mix, such as bf16, q8_0 or q4_k_m.
    #[arg(long, env = "MAINSTAY_WEIGHT_TYPE", value_name = "TYPE", default_value = "bf16")]
    weight_type: Mix,
    /// Only the first layers of the shape: enough to compare types of weights.
    #[arg(long, env = "MAINSTAY_SHAPE_LAYERS", value_name = "N", requires = "shape")]
    layers: Option<usize>,
}

/// Runs a measurement.
pub(crate) fn run(args: BenchArgs) -> Result<()> {
    match args.command {
        BenchCommand::Latency(args) => latency::run(&args),
        BenchCommand::Sessions(args) => sessions::run(&args),
        BenchCommand::Serve(args) => serve::run(&args),
        BenchCommand::Report(args) => report::run(&args),
        BenchCommand::Shape(args) => shape::run(&args),
    }
}

impl SubjectArgs {
    /// The graph and weights to measure, with a name for people.
    fn open(&self) -> Result<(String, Graph, Weights)> {
        let (mut name, graph, mut weights) = match self.shape {
            Some(shape) => {
                eprintln!("making weights");
                let (graph, weights) = shape.build(self.weight_type, self.layers)?;
                let (mix, layers) = (self.weight_type.name(), graph.layers.len());
                let told = if self.layers.is_some() { format!(", {layers} layers") } else { String::new() };
                (format!("{shape} {mix} (random weights{told})"), graph, weights)
            }
            None => {
                let source = self.model.source()?;
                let name = source.name();
                let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
                let Model { graph, weights, .. } = runtime.block_on(source.open())?;
                (name, graph, weights)
            }
        };
        if let Some(quant) = self.model.engine.quant.map(AtLoad::from) {
            quantize::weights_at_load(&mut weights, quant, start::threads(&self.model.engine))?;
            name = format!("{name}, {} at load", quant.name());
        }
        Ok((name, graph, weights))
    }
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|n: &f64| *n > 0.0 && n.is_finite());
    number.ok_or_else(|| format!("expected a number above 0, found `{text}`"))
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
