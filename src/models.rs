//! `mainstay pull` and `mainstay models`: the cache of fetched models.

use std::io::{BufRead, IsTerminal, stdin};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::exit::Usage;
use crate::hub::cache::{self, Cached, Snapshot};
use crate::hub::{self, HubId, MAIN};
use crate::options::{HubArgs, switch};
use crate::size;
use crate::source::Source;

/// Options of `mainstay pull`.
#[derive(Args, Clone, Debug)]
pub(crate) struct PullArgs {
    /// org/name[:FILE.gguf][@revision].
    id: String,
    #[command(flatten)]
    hub: HubArgs,
}

/// Options of `mainstay models`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    command: ModelsCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum ModelsCommand {
    /// List fetched models with their sizes and revisions; `*` stands at what a model's name without a revision is.
    Ls,
    /// Remove a fetched model, or one revision of it.
    Rm(RmArgs),
}

#[derive(Args, Clone, Debug)]
struct RmArgs {
    /// org/name, or org/name@revision for one revision, which may be a commit too.
    id: String,
    /// Do not ask.
    #[arg(short, long, env = "MAINSTAY_YES", value_parser = switch())]
    yes: bool,
}

fn parse(text: &str) -> Result<HubId> {
    let id = HubId::parse(text);
    Ok(id.ok_or_else(|| Usage(format!("{text}: expected a hub id, org/name[:FILE.gguf][@revision]")))?)
}

/// Fetches a model and prints where it lies.
pub(crate) fn pull(args: &PullArgs) -> Result<()> {
    let source = Source::Hub(parse(&args.id)?, args.hub.reach()).told(&args.hub)?;
    let Source::Hub(id, reach) = source else { bail!("{}: no model of a hub", args.id) };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let path = runtime.block_on(hub::fetch(&id, reach))?;
    println!("{}", path.display());
    Ok(())
}

/// Lists or removes.
pub(crate) fn run(args: ModelsArgs) -> Result<()> {
    match args.command {
        ModelsCommand::Ls => list(),
        ModelsCommand::Rm(args) => remove(&args),
    }
}

fn list() -> Result<()> {
    for model in cache::models()? {
        println!("{:>10}  {}", size::show(model.bytes()?), model.id);
        for snapshot in &model.snapshots {
            let mark = if snapshot.revisions.iter().any(|revision| revision == MAIN) { '*' } else { ' ' };
            println!("{:>10}  {mark} {}", size::show(snapshot.bytes), told(snapshot));
        }
        if model.partial_bytes > 0 {
            println!("{:>10}    not whole: pull it again", size::show(model.partial_bytes));
        }
    }
    Ok(())
}

/// `main v1 (0123456789ab)`.
fn told(snapshot: &Snapshot) -> String {
    let commit = snapshot.commit.get(..12).unwrap_or(&snapshot.commit);
    match snapshot.revisions.as_slice() {
        [] => commit.to_owned(),
        revisions => format!("{} ({commit})", revisions.join(" ")),
    }
}

fn remove(args: &RmArgs) -> Result<()> {
    let id = parse(&args.id)?;
    let models = cache::models()?;
    let model = models.iter().find(|model| model.id == id.id());
    let model = model.with_context(|| format!("{}: not in the cache (see mainstay models ls)", id.id()))?;
    if !args.id.contains('@') {
        confirm(args, &format!("remove {} in all its revisions, {}", model.id, size::show(model.bytes()?)))?;
        return model.remove();
    }
    let snapshot = snapshot(model, &id.revision)?;
    confirm(args, &format!("remove {} at {}", model.id, told(snapshot)))?;
    let freed = model.remove_snapshot(snapshot)?;
    println!("{} freed", size::show(freed));
    Ok(())
}

fn snapshot<'a>(model: &'a Cached, revision: &str) -> Result<&'a Snapshot> {
    model.snapshot(revision).with_context(|| {
        let found: Vec<String> = model.snapshots.iter().map(told).collect();
        format!(
            "{}: expected a revision in the cache, found `{revision}`; there are {}",
            model.id,
            found.join(", ")
        )
    })
}

/// Asks whoever sits at the terminal.
fn confirm(args: &RmArgs, what: &str) -> Result<()> {
    if args.yes {
        return Ok(());
    }
    if !stdin().is_terminal() {
        return Err(Usage(format!("{what}: say --yes, since nobody can be asked")).into());
    }
    eprint!("{what}? [y/N] ");
    let mut answer = String::new();
    stdin().lock().read_line(&mut answer)?;
    if !matches!(answer.trim(), "y" | "Y" | "yes") {
        bail!("nothing was removed");
    }
    Ok(())
}
