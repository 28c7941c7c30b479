//! The `mainstay` command: the composition root, the only code that names concrete backends.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks to its terminal")]

mod api;
mod bench;
mod chat;
mod client;
mod config;
mod data_dir;
mod doctor;
mod drafting;
mod exit;
mod hub;
mod loader;
mod local;
mod machine;
mod mcp;
mod memory;
mod models;
mod options;
mod progress;
mod quantize;
mod roster;
mod run;
mod serve;
mod sessions;
mod size;
mod source;
mod start;
mod store;

use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::options::GeneralArgs;

/// A self-hosted inference server for language models.
#[derive(Parser, Debug)]
#[command(name = "mainstay", version, max_term_width = 110, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    general: GeneralArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve models over the OpenAI API.
    Serve(Box<serve::ServeArgs>),
    /// Talk to a model in the terminal.
    Chat(chat::ChatArgs),
    /// Print one completion.
    Run(run::RunArgs),
    /// Measure how fast this machine runs a model.
    Bench(bench::BenchArgs),
    /// Tell what this machine has and whether it works.
    Doctor(doctor::DoctorArgs),
    /// Fetch a model from the hub.
    Pull(models::PullArgs),
    /// List or remove fetched models.
    Models(models::ModelsArgs),
    /// Write a checkpoint as a GGUF file of smaller weights.
    Quantize(quantize::QuantizeArgs),
    /// Look at sessions, move them, check them.
    Sessions(sessions::SessionsArgs),
}

fn main() -> ExitCode {
    let matches = match arguments() {
        Ok(matches) => matches,
        Err(code) => return code,
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => return exit::arguments(&error),
    };
    // a server's log is its record; at a prompt only trouble is worth a line
    let quiet = if matches!(cli.command, Command::Serve(_)) { "info" } else { "warn" };
    exit::code(log(&cli.general, quiet).and_then(|()| dispatch(cli.command, cli.general.config.as_deref())))
}

/// The command line, with the values of the options file under it if there is one.
fn arguments() -> Result<ArgMatches, ExitCode> {
    let parse = |command: clap::Command| command.try_get_matches_from(std::env::args_os());
    let matches = parse(Cli::command()).map_err(|e| exit::arguments(&e))?;
    let Some(path) = matches.get_one::<PathBuf>("config") else { return Ok(matches) };
    let usage = |what: String| exit::code(Err(exit::Usage(what).into()));
    let command = config::apply(path, Cli::command()).map_err(|e| usage(format!("{e:#}")))?;
    // the first pass took the same command line, so what is wrong now stands in the file
    parse(command).map_err(|e| usage(format!("{}: {}", path.display(), exit::one_line(&e.to_string()))))
}

/// Sends logs to stderr, down to the level `quiet` unless the options say otherwise.
fn log(args: &GeneralArgs, quiet: &str) -> Result<()> {
    let level = match (args.log_level.as_deref(), args.verbose) {
        (Some(level), 0) => level,
        (_, 0) => quiet,
        (_, 1) => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_new(level).map_err(|e| exit::Usage(format!("--log-level {level}: {e}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .init();
    Ok(())
}

/// `file` is the options file: what of it is no option is read by the command that wants it.
fn dispatch(command: Command, file: Option<&Path>) -> Result<()> {
    match command {
        Command::Serve(args) => serve::run(*args, file),
        Command::Chat(args) => chat::run(args),
        Command::Run(args) => run::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Pull(args) => models::pull(&args),
        Command::Models(args) => models::run(args),
        Command::Sessions(args) => sessions::run(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    fn check_environment(command: &clap::Command) {
        for arg in command.get_arguments() {
            let name = arg.get_id().as_str();
            match arg.get_env().map(|v| v.to_string_lossy().into_owned()) {
                Some(variable) => assert!(variable.starts_with("MAINSTAY_"), "{name}: {variable}"),
                None => {
                    assert!(["verbose", "prompt", "id"].contains(&name), "{name} has no environment variable")
                }
            }
        }
        command.get_subcommands().for_each(check_environment);
    }

    #[test]
    fn every_option_has_its_environment_variable() {
        check_environment(&Cli::command());
    }
}
