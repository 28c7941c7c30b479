//! The store's part of /metrics: sessions, pages on disk, the journal, what was read back and what was not.

use std::sync::atomic::{AtomicU64, Ordering};

use mainstay_engine::Stats;
use mainstay_engine::store::{JournalCounts, PageCounts, Store};

use super::SCAN;
use crate::metrics::Page;
use crate::routes::App;
use crate::routes::metrics::Number;

/// What the engines count of the store; one sample for each model.
pub(in crate::routes) const ENGINE: [Number; 4] = [
    ("mainstay_kv_restore_total", "counter", "Requests that read pages from the store.", |s| {
        s.restores as f64
    }),
    ("mainstay_kv_restore_tokens_total", "counter", "Prompt tokens read from the store.", |s| {
        s.restored_tokens as f64
    }),
    ("mainstay_kv_restore_seconds_total", "counter", "Time that these reads took.", |s| {
        s.restore_ms as f64 / 1000.0
    }),
    ("mainstay_kv_page_spill_total", "counter", "Pages handed to the store.", |s| s.pages_spilled as f64),
];

type PageNumber = (&'static str, &'static str, fn(&PageCounts) -> &AtomicU64);

const PAGES: [PageNumber; 7] = [
    ("mainstay_kv_page_write_total", "Pages written to disk.", |c| &c.written),
    ("mainstay_kv_page_write_bytes_total", "Bytes of these, headers and padding included.", |c| {
        &c.written_bytes
    }),
    ("mainstay_kv_page_read_total", "Pages read from disk and proven.", |c| &c.read),
    ("mainstay_kv_restore_bytes_total", "Bytes of these.", |c| &c.read_bytes),
    ("mainstay_kv_page_miss_total", "Pages asked for and not found.", |c| &c.missed),
    ("mainstay_kv_page_verify_fail_total", "Pages whose bytes were not those written; never used.", |c| {
        &c.damaged
    }),
    ("mainstay_kv_segment_abandoned_total", "Segments given up after an error of the disk.", |c| {
        &c.abandoned_segments
    }),
];

type JournalNumber = (&'static str, &'static str, fn(&JournalCounts) -> &AtomicU64);

const JOURNAL: [JournalNumber; 5] = [
    ("mainstay_journal_entries_total", "Entries appended to the journal.", |c| &c.entries),
    ("mainstay_journal_syncs_total", "Syncs of the journal, each for all entries before it.", |c| {
        &c.sync.syncs
    }),
    ("mainstay_journal_errors_total", "Appends and syncs that failed.", |c| &c.errors),
    ("mainstay_journal_bases_total", "Times the journal was written anew.", |c| &c.bases),
    ("mainstay_journal_quarantine_total", "Journals put aside because they were damaged.", |c| {
        &c.quarantined
    }),
];

/// Adds the store's families. Waits for the store's locks.
pub(in crate::routes) fn add(page: &mut Page, app: &App, stats: &[(String, Stats)]) {
    let Some(sessions) = &app.sessions else { return };
    let store = &*sessions.store;
    let name = "mainstay_restore_vs_compute_decision_total";
    page.family(name, "counter", "Whether a request with stored pages read them or computed them again.");
    for (model, stats) in stats {
        for (decision, count) in [("restore", stats.restores), ("compute", stats.restores_declined)] {
            page.sample(name, &[("model_name", model), ("decision", decision)], count as f64);
        }
    }
    let name = "mainstay_kv_page_drop_total";
    page.family(name, "counter", "Pages not written, by where there was no room.");
    let queued: u64 = stats.iter().map(|(_, stats)| stats.pages_dropped).sum();
    page.sample(name, &[("at", "queue")], queued as f64);
    page.sample(name, &[("at", "store")], read(&store.page_counts().dropped));
    for (name, help, counter) in PAGES {
        page.family(name, "counter", help);
        page.sample(name, &[("tier", "disk")], read(counter(store.page_counts())));
    }
    let (pages, journal, scrub) = (store.page_counts(), store.journal_counts(), store.scrub_counts());
    page.family("mainstay_eviction_total", "counter", "Pages let go, by why.");
    page.sample("mainstay_eviction_total", &[("reason", "quota")], read(&pages.evicted));
    page.sample("mainstay_eviction_total", &[("reason", "disk_full")], read(&pages.evicted_disk_full));
    for (name, help, us) in [
        (
            "mainstay_kv_read_seconds_total",
            "Time that reads of pages took, of those side by side each.",
            &pages.read_us,
        ),
        ("mainstay_kv_sync_seconds_total", "Time that syncs of segments took.", &pages.sync.sync_us),
        (
            "mainstay_journal_fsync_seconds_total",
            "Time that syncs of the journal took.",
            &journal.sync.sync_us,
        ),
    ] {
        page.family(name, "counter", help);
        page.sample(name, &[], read(us) / 1e6);
    }
    let spilled: u64 = stats.iter().map(|(_, stats)| stats.pages_spilled).sum();
    page.family("mainstay_dedup_ratio", "gauge", "Pages written of those that were handed over.");
    page.sample("mainstay_dedup_ratio", &[], read(&pages.written) / (spilled.max(1) as f64));
    for (name, help, counter) in [
        ("mainstay_scrub_pages_total", "Pages proven by the scrubber.", &scrub.pages),
        ("mainstay_scrub_bytes_total", "Bytes that it has read.", &scrub.bytes),
        ("mainstay_scrub_damaged_total", "Pages that it found damaged, which are let go.", &scrub.damaged),
        ("mainstay_scrub_passes_total", "Times that it has seen all pages.", &scrub.passes),
    ] {
        page.family(name, "counter", help);
        page.sample(name, &[], read(counter));
    }
    for (name, help, counter) in JOURNAL {
        page.family(name, "counter", help);
        page.sample(name, &[], read(counter(store.journal_counts())));
    }
    page.family("mainstay_ring_occupancy_bytes", "gauge", "Pages that wait to be written.");
    page.sample("mainstay_ring_occupancy_bytes", &[], store.ring_bytes() as f64);
    let tenants = store.tenants();
    let bytes: u64 = tenants.iter().map(|(tenant, _)| store.page_bytes(*tenant)).sum();
    page.family("mainstay_kv_bytes", "gauge", "Bytes of stored pages.");
    page.sample("mainstay_kv_bytes", &[("tier", "disk")], bytes as f64);
    page.family(
        "mainstay_sessions",
        "gauge",
        "Sessions: with a turn running, having lost entries, all others.",
    );
    for (state, count) in census(app, store) {
        page.sample("mainstay_sessions", &[("state", state)], count as f64);
    }
    if let Some(recovery) = app.options.recovery {
        page.family("mainstay_recovery_seconds", "gauge", "How long opening the store took.");
        page.sample("mainstay_recovery_seconds", &[], recovery.as_secs_f64());
    }
}

fn read(counter: &AtomicU64) -> f64 {
    counter.load(Ordering::Relaxed) as f64
}

/// Sessions of all tenants by state.
fn census(app: &App, store: &Store) -> [(&'static str, u64); 3] {
    let is_busy = |id| app.sessions.as_ref().is_some_and(|sessions| sessions.is_busy(id));
    let [mut running, mut damaged, mut idle] = [0; 3];
    for (tenant, _) in store.tenants() {
        let mut after = None;
        loop {
            let part = store.list(tenant, after, SCAN);
            for info in &part {
                let count = match (info.in_flight || is_busy(info.id), info.is_damaged) {
                    (true, _) => &mut running,
                    (false, true) => &mut damaged,
                    (false, false) => &mut idle,
                };
                *count += 1;
            }
            if part.len() < SCAN {
                break;
            }
            after = part.last().map(|info| info.id);
        }
    }
    [("running", running), ("damaged", damaged), ("idle", idle)]
}
