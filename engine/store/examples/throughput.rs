//! Measures a store on a directory of this machine: `cargo run --release -p mainstay-store --example throughput DIR
//! [sealed]`.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use mainstay_store::{
    Append, At, ClassId, Content, ContentId, Durability, Kind, MasterKey, Options, PAGE_TOKENS, PageHeader,
    PageName, Root, Settings, Store, StoreError, Tenant,
};

const PAGE_BYTES: usize = 3584 << 10;
const PAGES: usize = 512;

fn headers(tenant: &Tenant, root: &Root<'_>, tokens: &[u32]) -> Vec<PageHeader> {
    let mut parent = tenant.chain.root(root);
    let page = |tokens: &[u32]| {
        let key = tenant.chain.next(parent, tokens, &[]);
        let name =
            PageName { tenant: tenant.id, key, class: ClassId([0; 32]), group: 0, kind: Kind::Attention };
        let header = PageHeader { name, content: root.content, parent, tokens: tokens.to_vec() };
        parent = key;
        header
    };
    tokens.chunks(PAGE_TOKENS).map(page).collect()
}

fn say(line: &str) {
    use std::io::Write;
    // A closed pipe ends the measurement's use, not its run.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn main() -> Result<(), StoreError> {
    let place = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from).join("throughput");
    let _ = std::fs::remove_dir_all(&place);
    let is_sealed = std::env::args().nth(2).is_some_and(|word| word == "sealed");
    let options = Options { master_key: is_sealed.then(|| MasterKey::new([1; 32])), ..Options::default() };
    let (store, _) = Store::open_dir(&place, options.clone())?;
    let tenant = store.tenant("t")?;
    let content = Content {
        weights_root: [0; 32],
        config_hash: [0; 32],
        kv_dtype: "bf16",
        kv_scales_hash: [0; 32],
        payload_layout: b"",
    };
    let root = Root { content: ContentId::of(&content), adapter: None, rope_table: 0, salt: b"" };
    let tokens: Vec<u32> = (0..(PAGES * PAGE_TOKENS) as u32).collect();
    let pages = headers(&tenant, &root, &tokens);

    let begun = Instant::now();
    for (i, header) in pages.iter().enumerate() {
        let payload = vec![i as u8; PAGE_BYTES].into_boxed_slice();
        let digest = *blake3::hash(&payload).as_bytes();
        store.write_patiently(header.clone(), payload, digest, Duration::from_secs(60));
    }
    store.flush()?;
    let gigabytes = (PAGES * PAGE_BYTES) as f64 / 1e9;
    say(&format!("write and sync: {:.2} GB/s", gigabytes / begun.elapsed().as_secs_f64()));

    let begun = Instant::now();
    let hits = pages.iter().filter(|header| store.read(header).is_ok()).count();
    say(&format!("read, {hits} of {PAGES} pages: {:.2} GB/s", gigabytes / begun.elapsed().as_secs_f64()));

    for durability in [Durability::Async, Durability::Turn] {
        let id = store.create(tenant.id, Settings { durability, ..Settings::default() })?.id;
        let mut times: Vec<_> = (0..200)
            .map(|i| {
                let begun = Instant::now();
                let append = Append { tokens: vec![i; 500], ..Append::default() };
                store.append_turn(tenant.id, id, append).map(|_| begun.elapsed())
            })
            .collect::<Result<_, _>>()?;
        times.sort();
        say(&format!("turn of 500 tokens, {durability:?}: p50 {:?}, p99 {:?}", times[100], times[198]));
    }
    let id = store.create(tenant.id, Settings::default())?.id;
    store.append_turn(tenant.id, id, Append { tokens: tokens.clone(), ..Append::default() })?;
    let begun = Instant::now();
    for _ in 0..1000 {
        store.fork(tenant.id, id, At::Head, None)?;
    }
    say(&format!("fork of {} tokens: {:?}", tokens.len(), begun.elapsed() / 1000));
    for _ in 0..9000 {
        let id = store.create(tenant.id, Settings::default())?.id;
        store.append_turn(tenant.id, id, Append { tokens: tokens[..2000].to_vec(), ..Append::default() })?;
    }
    store.flush()?;
    store.kill();
    let begun = Instant::now();
    let (store, report) = Store::open_dir(&place, options)?;
    say(&format!(
        "open after a kill: {:?} (reading {} ms), {} sessions, {} pages",
        begun.elapsed(),
        report.elapsed_ms,
        report.sessions,
        report.pages
    ));
    store.close()?;
    Ok(std::fs::remove_dir_all(&place)?)
}
