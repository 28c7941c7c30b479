//! What only the owner of a data directory does: cleaning it, checking it, copying it.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use mainstay_store::{Damage, Quota, RealDisk, RecoveryReport, Store, VerifyReport};
use serde_json::{Value, json};

use super::{PlaceArgs, check_directory, in_use};
use crate::exit::Usage;
use crate::options::switch;
use crate::size;

#[derive(Args, Clone, Debug)]
pub(super) struct GcArgs {
    /// Let pages of every tenant go until they take at most this; without it none is let go.
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
    /// The directory to copy to; empty, or made.
    #[arg(env = "MAINSTAY_SNAPSHOT_DIR")]
    dir: PathBuf,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Opens the data directory; a server's is out of reach.
fn open(place: &PlaceArgs, command: &str) -> Result<(Store, RecoveryReport)> {
    if place.remote.url.is_some() {
        let what = "a server's data directory is not supported yet; stop it and give --data-dir";
        return Err(Usage(format!("sessions {command} --url: {what}")).into());
    }
    check_directory(place)?;
    place.dir.open_reported().map_err(in_use)
}

pub(super) async fn gc(args: &GcArgs) -> Result<()> {
    let (store, _) = open(&args.place, "gc")?;
    if let Some(page_bytes) = args.page_quota {
        let pinned_bytes = args.pinned_quota.unwrap_or(page_bytes / 2);
        for (tenant, _) in store.tenants() {
            store.set_quota(tenant, Quota { page_bytes, pinned_bytes, ..Quota::default() });
        }
    }
    if !store.trusts_clock() {
        eprintln!("the clock has jumped forward: no session is removed");
    }
    let done = store.maintain()?;
    println!("sessions expired   {}", done.expired_sessions);
    println!("pages let go       {}", done.evicted_pages);
    println!("segments compacted {}", done.compacted_segments);
    Ok(store.close()?)
}

pub(super) async fn verify(args: &VerifyArgs) -> Result<()> {
    let (store, opened) = open(&args.place, "verify")?;
    let found = store.verify()?;
    let lost = opened.damaged_sessions.len();
    let problems = opened.damage.len() + found.damage.len() + lost + usize::from(opened.lost_entries > 0);
    if args.json {
        println!("{:#}", report(&opened, &found));
    } else {
        tell(&opened, &found);
    }
    store.close()?;
    match problems {
        0 => Ok(()),
        1 => bail!("the data directory has damage in 1 place"),
        places => bail!("the data directory has damage in {places} places"),
    }
}

fn tell(opened: &RecoveryReport, found: &VerifyReport) {
    println!("sessions        {}", found.sessions);
    println!("journal entries {} proven", found.entries);
    println!("pages           {} proven, {}", found.pages, size::show(found.page_bytes));
    if opened.torn_bytes + opened.torn_page_bytes > 0 {
        let bytes = opened.torn_bytes + opened.torn_page_bytes;
        println!("cut off         {bytes} bytes that were being written at the end");
    }
    for damage in opened.damage.iter().chain(&found.damage) {
        let Damage { path, offset, bytes, what, session } = damage;
        let whose = session.map(|id| format!(" of sess_{id}")).unwrap_or_default();
        println!("damaged         {path}, {bytes} bytes at {offset}: {what}{whose}");
    }
    for id in &opened.damaged_sessions {
        println!("damaged         sess_{id} has lost its end; it is whole up to its last turn");
    }
    if opened.lost_entries > 0 {
        println!("damaged         {} journal entries are missing", opened.lost_entries);
    }
    for copy in &opened.quarantined {
        println!("put aside       {copy}");
    }
}

fn report(opened: &RecoveryReport, found: &VerifyReport) -> Value {
    let damage = opened.damage.iter().chain(&found.damage).map(|damage| {
        json!({
            "path": damage.path,
            "offset": damage.offset,
            "bytes": damage.bytes,
            "what": damage.what,
            "session": damage.session.map(|id| format!("sess_{id}")),
        })
    });
    let lost = opened.damaged_sessions.iter().map(|id| format!("sess_{id}"));
    json!({
        "sessions": found.sessions,
        "entries": found.entries,
        "pages": found.pages,
        "page_bytes": found.page_bytes,
        "damage": damage.collect::<Vec<_>>(),
        "damaged_sessions": lost.collect::<Vec<_>>(),
        "lost_entries": opened.lost_entries,
        "torn_bytes": opened.torn_bytes + opened.torn_page_bytes,
        "quarantined": opened.quarantined,
    })
}

pub(super) async fn snapshot(args: &SnapshotArgs) -> Result<()> {
    let (store, _) = open(&args.place, "snapshot")?;
    let told = || format!("{}", args.dir.display());
    let to = RealDisk::new(&args.dir).with_context(told)?;
    store.snapshot(&to).map_err(|error| match error {
        mainstay_store::StoreError::Io(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            anyhow!("{}: expected an empty directory, found files", told())
        }
        other => anyhow::Error::from(other).context(told()),
    })?;
    Ok(store.close()?)
}
