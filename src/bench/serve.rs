//! `mainstay bench serve`: a server under load, over HTTP; the one that is named, or one started here.

mod target;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use mainstay_bench::serve::{
    self, About, Arrivals, Conversation, Load, Loaded, Sizes, Slo, Words, Workload, read_trace,
};
use mainstay_bench::{Energy, Watch, page};
use serde_json::Value;

use super::positive;
use crate::client::RemoteArgs;
use crate::exit::Usage;
use crate::local::Connection;
use crate::options::{ModelArgs, switch};
use crate::progress::Counter;
use crate::sessions;
use crate::store::DirArgs;
use target::Server;

/// Kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WorkloadChoice {
    /// Requests of equal length that have nothing in common.
    Fixed,
    /// Lengths from half to one and a half of the given ones.
    Random,
    /// Requests behind shared instructions of --prefix tokens.
    Prefix,
    /// Conversations of --turns turns.
    Chat,
    /// Questions to documents of --prefix tokens, each asked several times.
    Documents,
    /// Instructions, then --turns results of tools, each after a pause.
    Agent,
}

impl From<WorkloadChoice> for Workload {
    fn from(choice: WorkloadChoice) -> Self {
        match choice {
            WorkloadChoice::Fixed => Self::Fixed,
            WorkloadChoice::Random => Self::Random,
            WorkloadChoice::Prefix => Self::Prefix,
            WorkloadChoice::Chat => Self::Chat,
            WorkloadChoice::Documents => Self::Documents,
            WorkloadChoice::Agent => Self::Agent,
        }
    }
}

/// Options of `mainstay bench serve`.
#[derive(Args, Clone, Debug)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    remote: RemoteArgs,
    #[command(flatten)]
    load: LoadArgs,
    /// Let the server keep each conversation as a session, so that a turn sends only what is new (Mainstay only).
    #[arg(long, env = "MAINSTAY_BENCH_KEEP", value_parser = switch())]
    sessions: bool,
    /// Bounds that a request has to keep to count as good, milliseconds, separated by commas: ttft:MS, tpot:MS, e2el:MS.
    #[arg(long, env = "MAINSTAY_BENCH_GOODPUT", value_name = "NAME:MS", value_delimiter = ',')]
    goodput: Vec<Slo>,
    /// What an hour of the machine costs, in any currency: adds the cost of a million tokens of output.
    #[arg(long, env = "MAINSTAY_PRICE_PER_HOUR", value_name = "PRICE", value_parser = positive)]
    price_per_hour: Option<f64>,
    /// Write the result to this file, a line for each rate, as `vllm bench serve` saves it.
    #[arg(long, env = "MAINSTAY_BENCH_JSON", value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the result into this file: latency against the rate, or time to the first token against length.
    #[arg(long, env = "MAINSTAY_BENCH_PLOT", value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// What is sent, and when.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Load")]
struct LoadArgs {
    /// What clients say.
    #[arg(long, env = "MAINSTAY_BENCH_WORKLOAD", value_enum, default_value = "fixed")]
    workload: WorkloadChoice,
    /// Instead, replay this recording in Mooncake's format (lines with timestamp, input_length, output_length, hash_ids).
    #[arg(long, env = "MAINSTAY_BENCH_TRACE", value_name = "FILE.jsonl", conflicts_with_all = ["workload", "rate"])]
    trace: Option<PathBuf>,
    /// Multiplies the recording's lengths.
    #[arg(long, env = "MAINSTAY_BENCH_TRACE_SCALE", value_name = "FACTOR", default_value = "1", value_parser = positive)]
    trace_scale: f64,
    /// How many times faster than recorded.
    #[arg(long, env = "MAINSTAY_BENCH_TRACE_SPEED", value_name = "FACTOR", default_value = "1", value_parser = positive)]
    trace_speed: f64,
    /// Requests in all, for each rate.
    #[arg(long, env = "MAINSTAY_BENCH_REQUESTS", value_name = "N", default_value_t = 64)]
    requests: usize,
    /// Conversations at a time: without --rate 8, each begun when another ends; with it a bound, and none by default.
    #[arg(long, env = "MAINSTAY_BENCH_CLIENTS", value_name = "N")]
    clients: Option<usize>,
    /// Conversations that begin per second, as a Poisson process; several rates, separated by commas, one after another.
    #[arg(long, env = "MAINSTAY_BENCH_RATE", value_name = "PER_SECOND", value_delimiter = ',', value_parser = positive)]
    rate: Vec<f64>,
    /// Tokens that a turn sends.
    #[arg(long, env = "MAINSTAY_BENCH_INPUT", value_name = "TOKENS", default_value_t = 256)]
    input: usize,
    /// Tokens that it gets.
    #[arg(long, env = "MAINSTAY_BENCH_OUTPUT", value_name = "TOKENS", default_value_t = 32)]
    output: usize,
    /// Tokens of shared instructions, of a document, of an agent's instructions.
    #[arg(long, env = "MAINSTAY_BENCH_PREFIX", value_name = "TOKENS", default_value_t = 1024)]
    prefix: usize,
    /// Different prefixes or documents.
    #[arg(long, env = "MAINSTAY_BENCH_GROUPS", value_name = "N", default_value_t = 4)]
    groups: usize,
    /// Turns of a conversation.
    #[arg(long, env = "MAINSTAY_BENCH_TURNS_EACH", value_name = "N", default_value_t = 4)]
    turns: usize,
    /// Seconds between an answer and the next turn [default: 0.2 of an agent, else none].
    #[arg(long, env = "MAINSTAY_BENCH_PAUSE_S", value_name = "SECONDS")]
    pause_s: Option<f64>,
    /// When what is not over is cut, seconds, for all rates together.
    #[arg(long, env = "MAINSTAY_BENCH_LIMIT_S", value_name = "SECONDS", default_value = "50", value_parser = positive)]
    limit_s: f64,
    /// What texts and arrivals are made from.
    #[arg(long, env = "MAINSTAY_BENCH_SEED", value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Pauses of an agent while its tools run, seconds.
const TOOL_PAUSE_S: f64 = 0.2;
const CLIENTS: usize = 8;

/// Runs the measurement.
pub(super) fn run(args: &ServeArgs) -> Result<()> {
    let counts = [args.load.requests, args.load.input, args.load.output, args.load.prefix, args.load.turns];
    if counts.contains(&0) || args.load.clients == Some(0) || args.load.groups == 0 {
        let what =
            "requests, clients, input, output, prefix, groups, turns: expected at least 1 each, found 0";
        return Err(Usage(what.into()).into());
    }
    if args.load.pause_s.is_some_and(|s| !(0.0..=3600.0).contains(&s)) {
        return Err(Usage("--pause-s: expected 0 to 3600 seconds".into()).into());
    }
    let trace =
        args.load.trace.as_deref().map(|path| {
            fs::read_to_string(path).map_err(|e| Usage(format!("--trace {}: {e}", path.display())))
        });
    let trace = trace.transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let kept = (args.sessions && args.remote.url.is_none()).then(Scratch::new).transpose()?;
    let store = kept.as_ref().map(Scratch::open).transpose()?;
    let result = runtime.block_on(async {
        let connection = Connection::open(&args.remote, &args.model, store).await?;
        let measured = measure(args, &connection, trace.as_deref()).await;
        connection.close().await?;
        measured
    });
    runtime.shutdown_background();
    result
}

/// A data directory that is removed at the end.
struct Scratch(DirArgs);

impl Scratch {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("mainstay-bench-serve-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self(DirArgs::at(dir)))
    }

    fn open(&self) -> Result<Arc<mainstay_store::Store>> {
        sessions::open_store(&self.0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(dir) = &self.0.data_dir {
            // what cannot be removed lies in a directory that the system clears
            let _ = fs::remove_dir_all(dir);
        }
    }
}

async fn measure(args: &ServeArgs, connection: &Connection, trace: Option<&str>) -> Result<()> {
    let server = Arc::new(Server::new(&connection.client, args.sessions));
    let words = server.probe().await?;
    let plan = Plan { args, words, trace };
    let begun = Instant::now();
    let arrivals = plan.arrivals()?;
    let mut runs = Vec::new();
    for (at, arrival) in arrivals.iter().enumerate() {
        let left = args.load.limit_s - begun.elapsed().as_secs_f64();
        let load = plan.load(arrival, at as u64, left.max(0.1) / (arrivals.len() - at) as f64)?;
        let date = chrono::Local::now().format("%Y%m%d-%H%M%S").to_string();
        let requests = load.requests();
        let mut bar = Counter::start(&format!("requests at {}", plan.describe(arrival)), requests as u64);
        let (watch, energy) = (Watch::start(), Energy::now());
        let loaded = serve::run(server.clone(), load, |done| bar.set(done as u64)).await;
        let is_inside = connection.device.is_some();
        runs.push((
            About {
                date,
                model: connection.client.model().to_owned(),
                server: connection.device.clone().unwrap_or_else(|| connection.client.api.base().to_owned()),
                workload: plan.workload(),
                arrivals: arrival,
                clients_max: args.load.clients,
                slos: &args.goodput,
                requests,
                // a server elsewhere would count among the others
                foreign_cpu_share: watch.foreign().filter(|_| is_inside),
                joules: energy.filter(|_| is_inside).and_then(|energy| energy.joules()),
                price_per_hour: args.price_per_hour,
            },
            loaded,
        ));
    }
    server.clear().await;
    tell(args, &runs)
}

fn tell(args: &ServeArgs, runs: &[(About<'_>, Loaded)]) -> Result<()> {
    let shown: Vec<(&About<'_>, &Loaded)> = runs.iter().map(|(about, loaded)| (about, loaded)).collect();
    if let Some((about, _)) = runs.first() {
        println!("{} on {}\n", about.model, about.server);
    }
    print!("{}", serve::table(&shown));
    let results: Vec<Value> = shown.iter().map(|(about, loaded)| serve::json(about, loaded)).collect();
    let write = |path: &Path, text: String| fs::write(path, text).with_context(|| path.display().to_string());
    if let Some(path) = &args.json {
        write(path, results.iter().map(|result| format!("{result}\n")).collect())?;
    }
    if let Some(path) = &args.plot {
        write(path, page::main_plot(&results).context("there is nothing to draw")?.svg()?)?;
    }
    std::io::stdout().flush()?;
    if shown.iter().all(|(_, loaded)| loaded.records.iter().all(|r| r.outcome.error.is_some())) {
        bail!("no request was answered");
    }
    Ok(())
}

/// What the options and the server's tokens make of a load.
struct Plan<'a> {
    args: &'a ServeArgs,
    words: Words,
    trace: Option<&'a str>,
}

impl Plan<'_> {
    fn workload(&self) -> &'static str {
        if self.trace.is_some() { "trace" } else { Workload::from(self.args.load.workload).name() }
    }

    fn describe(&self, arrivals: &Arrivals) -> String {
        match arrivals {
            Arrivals::Closed { clients } => format!("{clients} clients"),
            Arrivals::Poisson { rate } => format!("{rate} per second"),
            Arrivals::Trace { .. } => "recorded times".to_owned(),
        }
    }

    fn recorded(&self, text: &str) -> Result<(Vec<Conversation>, Arrivals)> {
        let LoadArgs { requests, trace_scale, trace_speed, .. } = self.args.load;
        let (made, arrivals) = read_trace(text, &self.words, (requests, trace_scale, trace_speed))
            .map_err(|e| Usage(format!("--trace: {e}")))?;
        if made.is_empty() {
            return Err(Usage("--trace: expected a line at least, found none".into()).into());
        }
        Ok((made, arrivals))
    }

    fn arrivals(&self) -> Result<Vec<Arrivals>> {
        let load = &self.args.load;
        if let Some(text) = self.trace {
            return Ok(vec![self.recorded(text)?.1]);
        }
        if load.rate.is_empty() {
            return Ok(vec![Arrivals::Closed { clients: load.clients.unwrap_or(CLIENTS) }]);
        }
        Ok(load.rate.iter().map(|&rate| Arrivals::Poisson { rate }).collect())
    }

    /// The load of one rate; each has texts of its own, so that none finds what another left.
    fn load(&self, arrivals: &Arrivals, at: u64, limit_s: f64) -> Result<Load> {
        let load = &self.args.load;
        let is_agent = load.workload == WorkloadChoice::Agent;
        let seed = load.seed.wrapping_add(at << 50);
        let sizes = Sizes {
            requests: load.requests,
            input: load.input,
            output: load.output,
            prefix: load.prefix,
            groups: load.groups,
            turns: load.turns,
            pause_s: load.pause_s.unwrap_or(if is_agent { TOOL_PAUSE_S } else { 0.0 }),
            seed,
        };
        let conversations = match self.trace {
            Some(text) => self.recorded(text)?.0,
            None => Workload::from(load.workload).conversations(&sizes, &self.words),
        };
        Ok(Load { conversations, arrivals: arrivals.clone(), clients_max: load.clients, limit_s, seed })
    }
}
