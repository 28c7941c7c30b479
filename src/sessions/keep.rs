//! What the operator does with a data directory, or has its server do: cleaning it, checking it, copying it.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use mainstay_server::{damage_object, verification};
use mainstay_store::{Quota, RealDisk, RecoveryReport, Store, StoreError};
use reqwest::Method;
use serde_json::{Value, json};

use super::{PlaceArgs, check_directory, in_use};
use crate::api::Api;
use crate::exit::Usage;
use crate::options::switch;
use crate::size;

#[derive(Args, Clone, Debug)]
pub(super) struct GcArgs {
    /// Let pages of every tenant go until they take at most this; without it none is let go. A server has quotas of its
    /// own.
    #[arg(long, env = "MAINSTAY_PAGE_QUOTA", value_name = "BYTES", value_parser = size::parse)]
    page_quota: Option<u64>,
    /// Of these, what pinned sessions may hold; half without it.
    #[arg(long, env = "MAINSTAY_PINNED_QUOTA", value_name = "BYTES", value_parser = size::parse)]
    pinned_quota: Option<u64>,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args, Clone, Debug)]
pub(super) struct VerifyArgs {
    /// Print JSON.
    #[arg(long, env = "MAINSTAY_JSON", value_parser = switch())]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args, Clone, Debug)]
pub(super) struct SnapshotArgs {
    /// The directory to copy to; empty, or made. A server's is on its own machine.
    #[arg(env = "MAINSTAY_SNAPSHOT_DIR")]
    dir: PathBuf,
    #[command(flatten)]
    place: PlaceArgs,
}

/// The server that has the data directory, if one was named. It wants a key of the operator.
fn server(place: &PlaceArgs) -> Result<Option<Api>> {
    let Some(url) = &place.remote.url else { return Ok(None) };
    Api::new(url, place.remote.api_key.as_deref()).map(Some)
}

fn open(place: &PlaceArgs) -> Result<(Store, RecoveryReport)> {
    check_directory(place)?;
    place.dir.open_reported().map_err(in_use)
}

pub(super) async fn gc(args: &GcArgs) -> Result<()> {
    let done = match server(&args.place)? {
        Some(_) if args.page_quota.is_some() || args.pinned_quota.is_some() => {
            let what = "sessions gc --url: a server has quotas of its own; leave --page-quota and --pinned-quota out";
            return Err(Usage(what.into()).into());
        }
        Some(api) => api.json(Method::POST, "/v1/store/gc", Some(&json!({}))).await?,
        None => clean(args)?,
    };
    if done["trusts_clock"] == false {
        eprintln!("the clock has jumped forward: no session is removed");
    }
    println!("sessions expired   {}", done["expired_sessions"]);
    println!("pages let go       {}", done["evicted_pages"]);
    println!("segments compacted {}", done["compacted_segments"]);
    Ok(())
}

fn clean(args: &GcArgs) -> Result<Value> {
    let (store, _) = open(&args.place)?;
    if let Some(page_bytes) = args.page_quota {
        let pinned_bytes = args.pinned_quota.unwrap_or(page_bytes / 2);
        for (tenant, _) in store.tenants() {
            store.set_quota(tenant, Quota { page_bytes, pinned_bytes, ..Quota::default() });
        }
    }
    let done = mainstay_server::clean(&store)?;
    store.close()?;
    Ok(done)
}

pub(super) async fn verify(args: &VerifyArgs) -> Result<()> {
    let report = match server(&args.place)? {
        Some(api) => api.json(Method::POST, "/v1/store/verify", Some(&json!({}))).await?,
        None => {
            let (store, opened) = open(&args.place)?;
            let report = report(&opened, verification(&store.verify()?));
            store.close()?;
            report
        }
    };
    if args.json {
        println!("{report:#}");
    } else {
        tell(&report);
    }
    let lost = usize::from(report["lost_entries"].as_u64() > Some(0));
    match list(&report, "damage").len() + list(&report, "damaged_sessions").len() + lost {
        0 => Ok(()),
        1 => bail!("the data directory has damage in 1 place"),
        places => bail!("the data directory has damage in {places} places"),
    }
}

/// What opening the directory found, added to what reading it did.
fn report(opened: &RecoveryReport, mut found: Value) -> Value {
    let mut damage: Vec<Value> = opened.damage.iter().map(damage_object).collect();
    damage.extend_from_slice(list(&found, "damage"));
    let lost = opened.damaged_sessions.iter().map(|id| format!("sess_{id}"));
    found["damage"] = json!(damage);
    found["damaged_sessions"] = json!(lost.collect::<Vec<_>>());
    found["lost_entries"] = json!(opened.lost_entries);
    found["torn_bytes"] = json!(opened.torn_bytes + opened.torn_page_bytes);
    found["quarantined"] = json!(opened.quarantined);
    found
}

fn list<'a>(report: &'a Value, field: &str) -> &'a [Value] {
    report[field].as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn tell(report: &Value) {
    let bytes = size::show(report["page_bytes"].as_u64().unwrap_or(0));
    println!("sessions        {}", report["sessions"]);
    println!("journal entries {} proven", report["entries"]);
    println!("pages           {} proven, {bytes}", report["pages"]);
    if report["torn_bytes"].as_u64() > Some(0) {
        println!("cut off         {} bytes that were being written at the end", report["torn_bytes"]);
    }
    for damage in list(report, "damage") {
        let whose = damage["session"].as_str().map(|id| format!(" of {id}")).unwrap_or_default();
        let (path, what) = (text(&damage["path"]), text(&damage["what"]));
        println!("damaged         {path}, {} bytes at {}: {what}{whose}", damage["bytes"], damage["offset"]);
    }
    for id in list(report, "damaged_sessions") {
        println!("damaged         {} has lost its end; it is whole up to its last turn", text(id));
    }
    if report["lost_entries"].as_u64() > Some(0) {
        println!("damaged         {} journal entries are missing", report["lost_entries"]);
    }
    for copy in list(report, "quarantined") {
        println!("put aside       {}", text(copy));
    }
}

pub(super) async fn snapshot(args: &SnapshotArgs) -> Result<()> {
    if let Some(api) = server(&args.place)? {
        let body = json!({ "dir": args.dir });
        return api.json(Method::POST, "/v1/store/snapshot", Some(&body)).await.map(drop);
    }
    let (store, _) = open(&args.place)?;
    let told = || format!("{}", args.dir.display());
    let to = RealDisk::new(&args.dir).with_context(told)?;
    store.snapshot(&to).map_err(|error| match error {
        StoreError::Io(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            anyhow!("{}: expected an empty directory, found files", told())
        }
        other => anyhow::Error::from(other).context(told()),
    })?;
    Ok(store.close()?)
}
