//! How soon a store of many sessions is ready after its process was killed.

use std::fs;
use std::time::{Duration, Instant};

use mainstay_engine::store::{
    Append, ClassId, Content, ContentId, Kind, Options, PAGE_TOKENS, PageHeader, PageName, Root, Settings,
    Store,
};

use super::world::ms;
use super::{Bench, SessionsError};

/// Turns of each session, and tokens of each turn.
const TURNS: usize = 3;
const TURN_TOKENS: usize = 200;
/// Bytes of the one page of each session: what is found at a start is the page's header, whatever its size.
const PAGE_BYTES: usize = 8 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// A start after a kill.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recovery {
    /// Until the store was open, milliseconds.
    pub open_ms: f64,
    /// Sessions made, and found.
    pub sessions: (usize, usize),
    /// Turns of each.
    pub turns: usize,
    /// Pages made, and found.
    pub pages: (usize, usize),
    /// Journal entries read.
    pub entries: u64,
}

/// Makes the plan's sessions, ends as a killed process does, and opens the store again.
pub(crate) fn recovery(bench: &Bench<'_>) -> Result<Recovery, SessionsError> {
    let (dir, sessions) = (bench.plan.dir.join("recovery"), bench.plan.sessions);
    let (store, _) = Store::open_dir(&dir, Options::default())?;
    let tenant = store.tenant("bench")?;
    let content = ContentId::of(&Content {
        weights_root: [0; 32],
        config_hash: [0; 32],
        kv_dtype: "bf16",
        kv_scales_hash: [0; 32],
        payload_layout: b"",
    });
    for i in 0..sessions {
        let salt = (i as u64).to_le_bytes();
        let parent = tenant.chain.root(&Root { content, adapter: None, rope_table: 0, salt: &salt });
        let settings = Settings { root: Some(parent), ..Settings::default() };
        let id = store.create(tenant.id, settings)?.id;
        for turn in 0..TURNS {
            let tokens = bench.subject.tokens(TURN_TOKENS, (TURNS * i + turn) as u64);
            if turn == 0 {
                let first = tokens[..PAGE_TOKENS].to_vec();
                let key = tenant.chain.next(parent, &first, &[]);
                let kind = Kind::Attention;
                let name = PageName { tenant: tenant.id, key, class: ClassId([0; 32]), group: 0, kind };
                let header = PageHeader { name, content, parent, tokens: first };
                let payload = vec![i as u8; PAGE_BYTES];
                let digest = mainstay_backend_api::kv::digest(&payload);
                store.write_patiently(header, payload.into(), digest, PATIENCE);
            }
            store.append_turn(tenant.id, id, Append { tokens, ..Append::default() })?;
        }
    }
    if !store.wait_written(PATIENCE) {
        return Err(SessionsError::Broken("pages were not written in time".into()));
    }
    store.kill();
    let begun = Instant::now();
    let (store, report) = Store::open_dir(&dir, Options::default())?;
    let open_ms = ms(begun);
    store.close()?;
    fs::remove_dir_all(dir)?;
    Ok(Recovery {
        open_ms,
        sessions: (sessions, report.sessions),
        turns: TURNS,
        pages: (sessions, report.pages),
        entries: report.entries,
    })
}
