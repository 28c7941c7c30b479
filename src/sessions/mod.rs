//! `mainstay sessions`: looking at sessions and moving them, in a data directory or on a server.
//!
//! A data directory is served by this process to itself, without a model, so that both are the same code. What only
//! the owner of a directory may do goes to the store directly.

mod keep;
mod resume;
mod table;
mod transfer;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use clap::{Args, Subcommand};
use mainstay_engine::store::{Store, StoreError};
use mainstay_server::Registry;
use reqwest::Method;
use serde_json::{Map, Value, json};

pub(crate) use self::resume::{Resumed, begin, resume};
use crate::api::{Api, piece};
use crate::client::RemoteArgs;
use crate::exit::Usage;
use crate::local::Inside;
use crate::options::switch;
use crate::store::DirArgs;
use crate::{data_dir, store};

/// Options of `mainstay sessions`.
#[derive(Args, Clone, Debug)]
pub(crate) struct SessionsArgs {
    #[command(subcommand)]
    command: SessionsCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum SessionsCommand {
    /// List sessions.
    Ls(LsArgs),
    /// Show a session and its turns.
    Show(ShowArgs),
    /// Make a session that begins like another.
    Fork(ForkArgs),
    /// Write a session to a file.
    Export(transfer::ExportArgs),
    /// Read a session from a file.
    Import(transfer::ImportArgs),
    /// Remove expired sessions, pages over quota and space that is no longer used.
    Gc(keep::GcArgs),
    /// Read everything and compare it with its checksums.
    Verify(keep::VerifyArgs),
    /// Copy the data directory, as it is at one moment, to an empty directory.
    Snapshot(keep::SnapshotArgs),
}

/// Where the sessions are.
#[derive(Args, Clone, Debug)]
pub(crate) struct PlaceArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// Whose sessions of the data directory; a server knows that by the key.
    #[arg(long, env = "MAINSTAY_TENANT", value_name = "NAME", default_value = "default")]
    tenant: String,
    #[command(flatten)]
    remote: RemoteArgs,
}

#[derive(Args, Clone, Debug)]
struct LsArgs {
    /// Print JSON.
    #[arg(long, env = "MAINSTAY_JSON", value_parser = switch())]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args, Clone, Debug)]
struct ShowArgs {
    /// Id or name.
    id: String,
    /// Print JSON.
    #[arg(long, env = "MAINSTAY_JSON", value_parser = switch())]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args, Clone, Debug)]
struct ForkArgs {
    /// Id or name.
    id: String,
    /// Begin with the turns up to this one; with all of them without it.
    #[arg(long, env = "MAINSTAY_AT_TURN", value_name = "N", conflicts_with = "at_token")]
    at_turn: Option<u32>,
    /// Begin with so many tokens.
    #[arg(long, env = "MAINSTAY_AT_TOKEN", value_name = "N")]
    at_token: Option<u32>,
    /// Name of the new session.
    #[arg(long, env = "MAINSTAY_SESSION_NAME", value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Runs a command on sessions.
pub(crate) fn run(args: SessionsArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        match &args.command {
            SessionsCommand::Ls(args) => ls(args).await,
            SessionsCommand::Show(args) => show(args).await,
            SessionsCommand::Fork(args) => fork(args).await,
            SessionsCommand::Export(args) => transfer::export(args).await,
            SessionsCommand::Import(args) => transfer::import(args).await,
            SessionsCommand::Gc(args) => keep::gc(args).await,
            SessionsCommand::Verify(args) => keep::verify(args).await,
            SessionsCommand::Snapshot(args) => keep::snapshot(args).await,
        }
    });
    runtime.shutdown_background();
    result
}

/// Opens the store of a data directory, or says how to reach the server that has it.
///
/// # Errors
/// Names the directory.
pub(crate) fn open_store(dir: &DirArgs) -> Result<Arc<Store>> {
    dir.open_plain().map_err(in_use)
}

/// What to do about a directory that another process has.
fn in_use(error: anyhow::Error) -> anyhow::Error {
    let is_locked = error.chain().any(|e| matches!(e.downcast_ref(), Some(StoreError::Locked)));
    if is_locked { anyhow!("{error:#}; if that is a server, use it by --url") } else { error }
}

/// Finds a data directory that exists: looking must not make one.
fn check_directory(place: &PlaceArgs) -> Result<()> {
    let dir = data_dir::resolve(place.dir.data_dir.as_deref());
    let dir = dir.ok_or_else(|| Usage("no HOME is set: give --data-dir or --url".into()))?;
    if !dir.join("journal").is_dir() {
        return Err(anyhow!("no sessions are kept in {}", dir.display()));
    }
    Ok(())
}

/// The sessions' server: a real one, or the data directory served by this process.
struct Place {
    api: Api,
    here: Option<(Inside, Arc<Store>)>,
}

impl Place {
    /// Opens the sessions that exist.
    async fn open(args: &PlaceArgs) -> Result<Self> {
        if args.remote.url.is_none() {
            check_directory(args)?;
        }
        Self::open_or_make(args).await
    }

    async fn open_or_make(args: &PlaceArgs) -> Result<Self> {
        if let Some(url) = &args.remote.url {
            return Ok(Self { api: Api::new(url, args.remote.api_key.as_deref())?, here: None });
        }
        let store = open_store(&args.dir)?;
        let inside = Inside::start(Registry::default(), &args.tenant, Some(store.clone())).await;
        let inside = inside.map_err(|e| Usage(format!("--tenant {}: {e:#}", args.tenant)))?;
        Ok(Self { api: Api::new(&inside.url, Some(&inside.key))?, here: Some((inside, store)) })
    }

    /// Writes a data directory out.
    async fn close(self) -> Result<()> {
        let Some((inside, store)) = self.here else { return Ok(()) };
        inside.stop().await?;
        store::close(store).await
    }

    async fn get(&self, path: &str) -> Result<Value> {
        self.api.json(Method::GET, path, None).await
    }

    /// All items of a list, page by page.
    async fn all(&self, path: &str) -> Result<Vec<Value>> {
        let (mut items, mut after) = (Vec::new(), String::new());
        loop {
            let page = self.get(&format!("{path}?limit=100&after={after}")).await?;
            items.extend(page["data"].as_array().into_iter().flatten().cloned());
            if page["has_more"] != true {
                return Ok(items);
            }
            let last = &page["last_id"];
            after = last.as_str().map_or_else(|| last.to_string(), str::to_owned);
        }
    }
}

fn path(id: &str) -> String {
    format!("/v1/sessions/{}", piece(id))
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

async fn ls(args: &LsArgs) -> Result<()> {
    let place = Place::open(&args.place).await?;
    let sessions = place.all("/v1/sessions").await?;
    if args.json {
        println!("{:#}", Value::Array(sessions));
    } else {
        print!("{}", table::sessions(&sessions, now_s()));
    }
    place.close().await
}

async fn show(args: &ShowArgs) -> Result<()> {
    let place = Place::open(&args.place).await?;
    let mut session = place.get(&path(&args.id)).await.with_context(|| args.id.clone())?;
    let turns = place.all(&format!("{}/turns", path(&args.id))).await?;
    if args.json {
        session["turns"] = Value::Array(turns);
        println!("{session:#}");
    } else {
        print!("{}", table::session(&session, &turns, now_s()));
    }
    place.close().await
}

async fn fork(args: &ForkArgs) -> Result<()> {
    let place = Place::open(&args.place).await?;
    let mut body = Map::new();
    let at = [("at_turn", args.at_turn), ("at_token", args.at_token)];
    body.extend(at.into_iter().filter_map(|(field, at)| Some((field.to_owned(), json!(at?)))));
    body.extend(args.name.iter().map(|name| ("name".to_owned(), json!(name))));
    let path = format!("{}/fork", path(&args.id));
    let made = place.api.json(Method::POST, &path, Some(&Value::Object(body))).await;
    let made = made.with_context(|| args.id.clone())?;
    println!("{}", made["id"].as_str().unwrap_or_default());
    place.close().await
}
