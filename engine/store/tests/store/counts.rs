//! The numbers that a server shows are those of what happened.

use std::sync::atomic::{AtomicU64, Ordering};

use mainstay_store::{Durability, PageTotals, Unsynced};

use crate::rig::{PAGE_BYTES, Rig, read_pages, settings, tokens, turn, write_pages};

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn sessions_pages_and_waits_are_counted() {
    let rig = Rig::new(1);
    let (store, _) = rig.open();
    let [a, b] = ["a", "b"].map(|name| store.tenant(name).unwrap());
    assert_eq!((store.session_count(), store.page_totals()), (0, PageTotals::default()));
    assert_eq!(store.unsynced(), Unsynced::default());
    let id = store.create(a.id, settings(&a, Durability::Async)).unwrap().id;
    store.create(b.id, settings(&b, Durability::Async)).unwrap();
    let gone = store.create(b.id, settings(&b, Durability::Async)).unwrap().id;
    store.create(a.id, settings(&a, Durability::Ephemeral)).unwrap();
    rig.clock.advance(7);
    turn(&store, &a, id, &[1]).unwrap();
    let all = tokens(1, 64);
    write_pages(&store, &a, &all);
    store.wait_written(std::time::Duration::ZERO);
    rig.clock.advance(5);
    assert_eq!(store.unsynced(), Unsynced { journal_ms: Some(12), pages_ms: Some(5) });
    let before = load(&store.journal_counts().sync.syncs);
    store.flush().unwrap();
    assert_eq!(store.unsynced(), Unsynced::default());
    assert_eq!(load(&store.journal_counts().sync.syncs), before + 1);
    assert_eq!(load(&store.page_counts().sync.syncs), 1);
    let mut counts = store.session_counts();
    counts.sort_unstable();
    let mut expected = vec![(a.id, 2), (b.id, 2)];
    expected.sort_unstable();
    assert_eq!((counts, store.session_count()), (expected, 4));
    assert_eq!(store.page_totals(), PageTotals { pages: 2, bytes: 4 * 4096 });
    read_pages(&store, &a, &all);
    read_pages(&store, &b, &all);
    let counts = store.page_counts();
    let read = [&counts.read, &counts.read_bytes, &counts.missed].map(load);
    assert_eq!(read, [2, 2 * PAGE_BYTES as u64, 2]);
    store.delete(b.id, gone).unwrap();
    assert_eq!(store.session_count(), 3);
    assert_eq!(load(&store.journal_counts().quarantined), 0);
}

#[test]
fn files_put_aside_and_time_spent_are_counted() {
    let rig = Rig::new(2);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    for i in 0..3 {
        turn(&store, &tenant, id, &[i]).unwrap();
    }
    store.kill();
    let (path, mut bytes) =
        rig.disk.files().into_iter().find(|(path, _)| path.starts_with("journal")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    rig.disk.set(&path, bytes);
    rig.disk.restart(mainstay_store::sim::Ending::Kill);
    let (store, report) = rig.open();
    assert_eq!((load(&store.journal_counts().quarantined), report.quarantined.len()), (1, 1));
    drop(store);

    // A real disk takes time.
    let place =
        std::env::temp_dir().join(format!("mainstay-counts-{}-{:?}", std::process::id(), crate::MASTER));
    let (store, _) = mainstay_store::Store::open_dir(&place, crate::rig::options()).unwrap();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    let all = tokens(2, 320);
    write_pages(&store, &tenant, &all);
    turn(&store, &tenant, id, &all).unwrap();
    store.flush().unwrap();
    assert_eq!(read_pages(&store, &tenant, &all), 10);
    let (pages, journal) = (store.page_counts(), store.journal_counts());
    assert!(load(&journal.sync.sync_us) > 0 && load(&pages.read_us) > 0);
    store.close().unwrap();
    std::fs::remove_dir_all(&place).unwrap();
}
