//! `mainstay pull` and `mainstay models`: the cache of fetched models.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use crate::exit::Usage;
use crate::hub::{self, HubId};
use crate::size;

/// Options of `mainstay pull`.
#[derive(Args, Clone, Debug)]
pub(crate) struct PullArgs {
    /// org/name or org/name@revision.
    id: String,
}

/// Options of `mainstay models`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    command: ModelsCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum ModelsCommand {
    /// List fetched models with their sizes.
    Ls,
    /// Remove a fetched model in all its revisions.
    Rm {
        /// org/name.
        id: String,
    },
}

fn parse(text: &str) -> Result<HubId> {
    let id = HubId::parse(text);
    Ok(id.ok_or_else(|| Usage(format!("{text}: expected a hub id, org/name or org/name@revision")))?)
}

/// Fetches a model and prints the directory it lies in.
pub(crate) fn pull(args: &PullArgs) -> Result<()> {
    let id = parse(&args.id)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let dir = runtime.block_on(hub::fetch(&id))?;
    println!("{}", dir.display());
    Ok(())
}

/// Lists or removes.
pub(crate) fn run(args: ModelsArgs) -> Result<()> {
    match args.command {
        ModelsCommand::Ls => {
            for (id, dir) in cached()? {
                println!("{:>10}  {id}", size::show(blob_bytes(&dir)?));
            }
            Ok(())
        }
        ModelsCommand::Rm { id } => {
            let dir = parse(&id)?.cache_dir();
            fs::remove_dir_all(&dir).with_context(|| format!("{id}: {}", dir.display()))
        }
    }
}

/// Models in the cache by id, in order.
fn cached() -> Result<Vec<(String, PathBuf)>> {
    let root = hf_hub::resolve_cache_dir();
    let entries = match fs::read_dir(&root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("{}", root.display())),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some((owner, model)) = name.strip_prefix("models--").and_then(|n| n.split_once("--")) {
            found.push((format!("{owner}/{model}"), path));
        }
    }
    found.sort();
    Ok(found)
}

fn blob_bytes(dir: &std::path::Path) -> Result<u64> {
    let blobs = dir.join("blobs");
    let entries = fs::read_dir(&blobs).with_context(|| format!("{}", blobs.display()))?;
    entries.map(|e| Ok(e?.metadata()?.len())).sum()
}
