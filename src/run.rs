//! `mainstay run`: one completion to stdout.

use std::io::{Read, Write, stdin, stdout};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use crate::client::{RemoteArgs, Route, SamplingArgs};
use crate::exit::Usage;
use crate::local::Connection;
use crate::options::{ModelArgs, switch};

/// Options of `mainstay run`.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What to complete; `-` reads it from stdin.
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// What stands before the conversation.
    #[arg(long, env = "MAINSTAY_SYSTEM", value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the text as it is, without the chat template.
    #[arg(long, env = "MAINSTAY_RAW", value_parser = switch())]
    raw: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    remote: RemoteArgs,
}

/// Prints the answer as it is made, and ends the last line.
pub(crate) fn run(args: RunArgs) -> Result<()> {
    let prompt = match args.prompt.as_deref() {
        Some("-") => {
            let mut text = String::new();
            stdin().read_to_string(&mut text).context("stdin")?;
            text
        }
        Some(text) => text.to_owned(),
        None => return Err(Usage("run: give the prompt with -p TEXT, or -p - to read stdin".into()).into()),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(answer(&args, &prompt));
    runtime.shutdown_background();
    result
}

async fn answer(args: &RunArgs, prompt: &str) -> Result<()> {
    let connection = Connection::open(&args.remote, &args.model, None).await?;
    let mut body = args.sampling.fields();
    let route = if args.raw { Route::Completions } else { Route::Chat };
    match route {
        Route::Completions => body.insert("prompt".into(), json!(prompt)),
        Route::Chat => {
            let system = args.system.iter().map(|text| json!({"role": "system", "content": text}));
            let messages: Vec<_> = system.chain([json!({"role": "user", "content": prompt})]).collect();
            body.insert("messages".into(), json!(messages))
        }
    };
    let mut out = stdout();
    let mut ends_line = false;
    let shown = connection.client.stream(route, body, |text| {
        ends_line = text.is_empty() && ends_line || text.ends_with('\n');
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    });
    shown.await?;
    if !ends_line {
        println!();
    }
    Ok(())
}
