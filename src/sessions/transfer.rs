//! Sessions as files: exporting and importing, a piece at a time.

use std::fs::File;
use std::io::{IsTerminal, Read, Write, stdin, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use futures_util::stream;
use reqwest::{Body, Method, Response};

use super::{Place, PlaceArgs, path};
use crate::api::piece;
use crate::exit::Usage;
use crate::options::switch;
use crate::size;

const PIECE_BYTES: usize = 256 << 10;

#[derive(Args, Clone, Debug)]
pub(super) struct ExportArgs {
    /// Id or name.
    id: String,
    /// The file to write; stdout without it.
    #[arg(short, long, env = "MAINSTAY_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
    /// Leave stored keys and values out.
    #[arg(long, env = "MAINSTAY_TOKENS_ONLY", value_parser = switch())]
    tokens_only: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args, Clone, Debug)]
pub(super) struct ImportArgs {
    /// The file to read; - reads stdin.
    #[arg(env = "MAINSTAY_IMPORT_FILE")]
    file: PathBuf,
    /// Name of the session; it has none without it.
    #[arg(long, env = "MAINSTAY_SESSION_NAME", value_name = "NAME")]
    name: Option<String>,
    /// Leave keys and values out: nothing proves who computed them.
    #[arg(long, env = "MAINSTAY_TOKENS_ONLY", value_parser = switch())]
    tokens_only: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

pub(super) async fn export(args: &ExportArgs) -> Result<()> {
    if args.output.is_none() && stdout().is_terminal() {
        return Err(Usage("sessions export: give a file with -o, or send stdout to one".into()).into());
    }
    let place = Place::open(&args.place).await?;
    let include = if args.tokens_only { "?include=tokens" } else { "" };
    let request = place.api.request(Method::POST, &format!("{}/export{include}", path(&args.id)));
    let reply = place.api.send(request).await.with_context(|| args.id.clone())?;
    let bytes = match &args.output {
        Some(file) => to_file(reply, file).await?,
        None => copy(reply, &mut stdout()).await?,
    };
    eprintln!("{} written", size::show(bytes));
    place.close().await
}

/// Under another name until it is whole, so that half a session is never taken for one.
async fn to_file(reply: Response, file: &Path) -> Result<u64> {
    let told = || format!("{}", file.display());
    let partial = file.with_added_extension("partial");
    let mut out = File::create(&partial).with_context(told)?;
    let written = match copy(reply, &mut out).await {
        Ok(bytes) => out.sync_all().map(|()| bytes).with_context(told),
        Err(error) => Err(error),
    };
    let kept = written.and_then(|bytes| {
        std::fs::rename(&partial, file).with_context(told)?;
        Ok(bytes)
    });
    if kept.is_err() {
        // The failure itself is what the caller hears.
        let _ = std::fs::remove_file(&partial);
    }
    kept
}

async fn copy(mut reply: Response, out: &mut dyn Write) -> Result<u64> {
    let mut bytes = 0;
    while let Some(piece) = reply.chunk().await.context("the session broke off")? {
        out.write_all(&piece).context("the session could not be written")?;
        bytes += piece.len() as u64;
    }
    out.flush()?;
    Ok(bytes)
}

pub(super) async fn import(args: &ImportArgs) -> Result<()> {
    let told = args.file.display().to_string();
    let input: Box<dyn Read + Send + Sync> = match told.as_str() {
        "-" => Box::new(stdin()),
        _ => Box::new(File::open(&args.file).with_context(|| told.clone())?),
    };
    let place = Place::open_or_make(&args.place).await?;
    let name = args.name.as_deref().map(|name| format!("&name={}", piece(name))).unwrap_or_default();
    let include = if args.tokens_only { "tokens" } else { "kv" };
    let request = place.api.request(Method::POST, &format!("/v1/sessions/import?include={include}{name}"));
    let reply = place.api.send(request.body(body(input))).await.with_context(|| told)?;
    let made: serde_json::Value = reply.json().await.context("the server sent no JSON")?;
    println!("{}", made["id"].as_str().unwrap_or_default());
    let (kv, count) = (&made["kv"], &made["token_count"]);
    if !args.tokens_only {
        let (taken, left) = (&kv["pages"], &kv["pages_refused"]);
        eprintln!("{count} tokens; {taken} pages of keys and values taken, {left} left");
    }
    place.close().await
}

/// The input piece by piece.
fn body(input: Box<dyn Read + Send + Sync>) -> Body {
    Body::wrap_stream(stream::unfold(Some(input), |input| async move {
        let mut input = input?;
        let mut piece = vec![0; PIECE_BYTES];
        match input.read(&mut piece) {
            Ok(0) => None,
            Ok(len) => {
                piece.truncate(len);
                Some((Ok(piece), Some(input)))
            }
            Err(error) => Some((Err(error), None)),
        }
    }))
}
