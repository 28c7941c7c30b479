//! `mainstay bench sessions`: what sessions save and cost on this machine.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use mainstay_bench::sessions::{CHILD_ENV, Plan, SessionsError, Subject, Task, child, json, sessions, table};
use mainstay_models::graph::Graph;
use serde_json::json;

use super::{SubjectArgs, describe, peaks};
use crate::exit::Usage;
use crate::{data_dir, start};

/// Options of `mainstay bench sessions`.
#[derive(Args, Clone, Debug)]
pub(super) struct SessionsArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Tokens of a session before its second turn, separated by commas [default: of 2048, 8192 and 32768 those that the
    /// model has room for].
    #[arg(long, env = "MAINSTAY_BENCH_CONTEXTS", value_name = "TOKENS", value_delimiter = ',')]
    contexts: Vec<usize>,
    /// Tokens of each answer.
    #[arg(long, env = "MAINSTAY_BENCH_ANSWER", value_name = "TOKENS", default_value_t = 16)]
    answer: usize,
    /// Tokens that the second turn sends.
    #[arg(long, env = "MAINSTAY_BENCH_NEW", value_name = "TOKENS", default_value_t = 32)]
    new: usize,
    /// Runs of each case; the median counts.
    #[arg(long, env = "MAINSTAY_BENCH_REPEAT", value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Of these, such that also compute everything again, which takes minutes in a long session.
    #[arg(long, env = "MAINSTAY_BENCH_COLD_REPEAT", value_name = "N", default_value_t = 1)]
    cold_repeat: usize,
    /// Tokens of the answers that show what writing pages behind costs.
    #[arg(long, env = "MAINSTAY_BENCH_DECODE", value_name = "TOKENS", default_value_t = 256)]
    decode: usize,
    /// Pairs of these answers.
    #[arg(long, env = "MAINSTAY_BENCH_PAIRS", value_name = "N", default_value_t = 5)]
    pairs: usize,
    /// Sessions in the store that is killed and opened again.
    #[arg(long, env = "MAINSTAY_BENCH_SESSIONS", value_name = "N", default_value_t = 10_000)]
    sessions: usize,
    /// Where the stores are made, in a directory that is removed afterwards; beside the user's sessions without it.
    #[arg(long, env = "MAINSTAY_BENCH_DIR", value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Write every run to this file.
    #[arg(long, env = "MAINSTAY_BENCH_JSON", value_name = "FILE")]
    json: Option<PathBuf>,
    /// For the process that is killed: what it is to make.
    #[arg(long, env = CHILD_ENV, value_name = "CONTEXT:DIR", hide = true)]
    child: Option<Task>,
}

/// Lengths of sessions where none are given.
const CONTEXTS: [usize; 3] = [2048, 8192, 32_768];

impl SessionsArgs {
    fn plan(&self, graph: &Graph) -> Plan {
        let fits = |tokens: &usize| tokens + self.new + self.answer <= graph.context;
        let contexts = match self.contexts.is_empty() {
            true => CONTEXTS.into_iter().filter(fits).collect(),
            false => self.contexts.clone(),
        };
        let above = self.dir.clone().or_else(|| data_dir::resolve(None)).unwrap_or_else(std::env::temp_dir);
        Plan {
            contexts,
            answer: self.answer,
            new: self.new,
            repeats: self.repeat,
            cold_repeats: self.cold_repeat,
            decode: self.decode,
            pairs: self.pairs,
            sessions: self.sessions,
            dir: above.join(format!("bench-sessions-{}", std::process::id())),
        }
    }
}

/// Runs the measurement, or its child.
pub(super) fn run(args: &SessionsArgs) -> Result<()> {
    let engine = &args.subject.model.engine;
    let backend = start::backend(engine)?;
    let (name, graph, weights) = args.subject.open()?;
    let kv_dtype = start::kv_dtype(engine.kv_type, &weights);
    let threads = start::threads(engine);
    let how = (kv_dtype, engine.tokens_per_step);
    let subject = Subject::new(&*backend, (&graph, &weights), how, threads);
    let plan = args.plan(&graph);
    if let Some(task) = &args.child {
        return Ok(child(&subject, &plan, task, &mut io::stdout())?);
    }
    eprintln!("measuring the machine");
    let peaks = peaks(threads);
    let figures = sessions(&subject, &plan, &again, |what| eprintln!("{what}"));
    let figures = figures.map_err(|error| match error {
        SessionsError::Plan(what) => Usage(what).into(),
        other => anyhow::Error::from(other),
    })?;
    let (device, kv) = (start::device_name(&*backend), kv_dtype.name());
    println!("{name} on {device}, KV {kv}, pages of {} bytes", figures.page_bytes);
    println!("machine: {}\n", describe(&peaks));
    print!("{}", table(&figures));
    if let Some(file) = &args.json {
        let mut report = json(&figures, &peaks);
        report["model"] = json!(name);
        report["device"] = json!(device);
        report["kv_type"] = json!(kv);
        report["version"] = json!(env!("CARGO_PKG_VERSION"));
        fs::write(file, format!("{report:#}\n")).with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}

/// This program with this command line.
fn again() -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1));
    Ok(command)
}
