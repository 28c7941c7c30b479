//! Bytes that change, files that are cut, records that move: the same content or a report, never other tokens.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use mainstay_store::{
    Append, At, Durability, Options, RecoveryReport, SessionId, Settings, Store, StoreError,
    sim::{Ending, SimDisk},
};

use crate::rig::{Rig, headers, read_pages, settings, tokens, turn, write_pages};

/// Sessions with their tokens; tenants with tokens whose pages are held.
struct Golden {
    sessions: BTreeMap<SessionId, Vec<u32>>,
    pages: Vec<(&'static str, Vec<u32>)>,
}

/// A closed store of every kind of file: several journal files and a base, sealed segments, two tenants.
fn small_store(closed: bool) -> (SimDisk, Golden) {
    let options = Options { rebase_bytes: 700, ..Rig::new(0).options };
    let rig = Rig { options, ..Rig::new(1) };
    let mut golden = Golden { sessions: BTreeMap::new(), pages: Vec::new() };
    for round in 0..2 {
        let (store, report) = rig.open();
        assert!(!report.is_damaged());
        for name in ["a", "b"] {
            let tenant = store.tenant(name).unwrap();
            let named = Settings { name: Some(format!("n{round}")), ..settings(&tenant, Durability::Turn) };
            let id = store.create(tenant.id, named).unwrap().id;
            let all = tokens(round * 2 + u64::from(name == "a"), 40);
            turn(&store, &tenant, id, &all[..20]).unwrap();
            if round == 0 {
                let held = if name == "a" { &all[..] } else { &all[..20] };
                write_pages(&store, &tenant, held);
                golden.pages.push((name, held.to_vec()));
            }
            let fork = store.fork(tenant.id, id, At::Token(10), None).unwrap().id;
            turn(&store, &tenant, fork, &[round as u32]).unwrap();
            turn(&store, &tenant, id, &all[20..]).unwrap();
            golden.sessions.insert(fork, store.tokens(tenant.id, fork).unwrap());
            golden.sessions.insert(id, all);
        }
        if round == 1 && !closed {
            store.flush().unwrap();
            store.kill();
        } else {
            store.close().unwrap();
        }
    }
    rig.disk.restart(Ending::Kill);
    (rig.disk, golden)
}

/// Opens a damaged store and looks at everything. `true` where all is as it was.
fn look(disk: &SimDisk, golden: &Golden, what: &str) -> bool {
    let rig = Rig { disk: disk.clone(), ..Rig::new(0) };
    let (store, report) = match rig.try_open() {
        Ok(opened) => opened,
        // A lost key or a file of another version is told, and nothing is touched.
        Err(StoreError::Lost { .. } | StoreError::Newer { .. }) => return false,
        Err(e) => panic!("{what}: {e}"),
    };
    let mut same = true;
    for tenant in ["a", "b"].map(|name| store.tenant(name).unwrap()) {
        for info in store.list(tenant.id, None, usize::MAX) {
            let found = store.tokens(tenant.id, info.id).unwrap();
            let expected = &golden.sessions[&info.id];
            if found != *expected {
                same = false;
                // What is left of a session is a state it was in, and it is known to be less.
                assert!(expected.starts_with(&found), "{what}: other tokens");
            }
        }
    }
    let count: usize =
        ["a", "b"].iter().map(|name| store.list(store.tenant(name).unwrap().id, None, 99).len()).sum();
    same &= count == golden.sessions.len();
    if !same {
        assert!(is_told(&report), "{what}: {report:?}");
    }
    for (name, tokens) in &golden.pages {
        same &= read_pages(&store, &store.tenant(name).unwrap(), tokens) == tokens.len().div_ceil(32);
    }
    // It goes on, and what is written now stays.
    let tenant = store.tenant("a").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    turn(&store, &tenant, id, &[1, 2, 3]).unwrap();
    store.kill();
    disk.restart(Ending::PowerLoss);
    let (store, _) = rig.open();
    let tenant = store.tenant("a").unwrap();
    assert_eq!(store.tokens(tenant.id, id).unwrap(), [1, 2, 3], "{what}");
    same
}

fn is_told(report: &RecoveryReport) -> bool {
    report.is_damaged() || report.torn_bytes > 0 || report.fenced_entries > 0
}

#[test]
fn a_flip_of_any_byte_is_harmless_or_told() {
    for closed in [true, false] {
        let (disk, golden) = small_store(closed);
        let files = disk.files();
        let bytes: usize = files.values().map(Vec::len).sum();
        assert!(bytes <= 64 << 10, "{bytes} bytes");
        assert!(look(&disk.copy(0), &golden, "untouched"));
        let (mut changed, mut tried) = (0, 0);
        for (path, bytes) in &files {
            // Every byte of a closed store; of the other and without optimization, a part will do.
            let stride = if cfg!(debug_assertions) || !closed { 13 } else { crate::STRIDE as usize };
            for at in (0..bytes.len()).step_by(stride) {
                let copy = disk.copy(at as u64);
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << (at.wrapping_mul(7) % 8);
                copy.set(path, flipped);
                tried += 1;
                changed += u32::from(!look(&copy, &golden, &format!("{path}, byte {at}")));
            }
        }
        assert!(changed > tried / 10, "{changed} of {tried} flips were noticed");
    }
}

#[test]
fn a_file_cut_at_any_length_is_harmless_or_told() {
    for closed in [true, false] {
        let (disk, golden) = small_store(closed);
        for (path, bytes) in &disk.files() {
            let stride =
                if cfg!(debug_assertions) || path.starts_with("seg") { 29 } else { crate::STRIDE as usize };
            for len in (0..bytes.len()).step_by(stride) {
                if !closed && path.starts_with("journal") {
                    // Without the mark of a closed store, a journal cut between entries is a shorter journal.
                    continue;
                }
                let copy = disk.copy(len as u64);
                copy.set(path, bytes[..len].to_vec());
                look(&copy, &golden, &format!("{path} cut to {len}"));
            }
        }
    }
}

#[test]
fn records_swapped_between_tenants_and_places_are_not_taken() {
    let (disk, golden) = small_store(true);
    let files = disk.files();
    let segments: Vec<_> = files.iter().filter(|(path, _)| path.starts_with("seg")).collect();
    assert!(segments.len() >= 2);
    let mut missed = 0;
    for (i, (path, bytes)) in segments.iter().enumerate() {
        for (other, other_bytes) in &segments[i + 1..] {
            // Whole files, then single records of two blocks.
            let copy = disk.copy(0);
            copy.set(path, (*other_bytes).clone());
            copy.set(other, (*bytes).clone());
            missed += u32::from(!look(&copy, &golden, "files swapped"));
            let (mut a, mut b) = ((*bytes).clone(), (*other_bytes).clone());
            a[4096..3 * 4096].swap_with_slice(&mut b[4096..3 * 4096]);
            let copy = disk.copy(0);
            copy.set(path, a);
            copy.set(other, b);
            missed += u32::from(!look(&copy, &golden, "records swapped"));
        }
    }
    assert!(missed > 0);
    // One tenant's secret under another's name.
    let tenants: Vec<_> = files.iter().filter(|(path, _)| path.starts_with("tenants")).collect();
    let copy = disk.copy(0);
    copy.set(tenants[0].0, tenants[2].1.clone());
    copy.set(tenants[1].0, tenants[3].1.clone());
    look(&copy, &golden, "tenants swapped");
}

#[test]
fn a_damaged_turn_ends_its_session_there_and_no_other() {
    let rig = Rig::new(3);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let make = || store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    let (hit, well) = (make(), make());
    let journal = || rig.disk.files().into_iter().find(|(path, _)| path.starts_with("journal")).unwrap();
    turn(&store, &tenant, hit, &[1]).unwrap();
    let before = journal().1.len();
    turn(&store, &tenant, hit, &[77_777; 12]).unwrap();
    // Behind the entry's head.
    let at = before + 100;
    assert!(at + 16 < journal().1.len());
    turn(&store, &tenant, hit, &[3]).unwrap();
    turn(&store, &tenant, well, &[4]).unwrap();
    let fork = store.fork(tenant.id, hit, At::Turn(1), None).unwrap().id;
    let late = store.fork(tenant.id, hit, At::Turn(2), None).unwrap().id;
    store.kill();
    let (path, mut bytes) = journal();
    bytes[at] ^= 1;
    rig.disk.set(&path, bytes.clone());
    rig.disk.restart(Ending::Kill);
    for again in [false, true] {
        let (store, report) = rig.open();
        assert_eq!(report.damaged_sessions, [hit], "{report:?}");
        assert_eq!(store.tokens(tenant.id, hit).unwrap(), [1]);
        assert!(store.get(tenant.id, hit).unwrap().is_damaged);
        assert_eq!(store.tokens(tenant.id, well).unwrap(), [4]);
        assert_eq!(store.tokens(tenant.id, fork).unwrap(), [1]);
        assert!(matches!(store.get(tenant.id, late), Err(StoreError::NotFound)), "its tokens are lost");
        if again {
            assert!(report.quarantined.is_empty() && report.damage.is_empty(), "told once: {report:?}");
            continue;
        }
        assert!(report.damage.iter().any(|damage| damage.session == Some(late)), "{report:?}");
        assert_eq!(rig.disk.files()[&report.quarantined[0]], bytes, "the damaged file is kept");
        let append = Append { expected_turn: Some(1), tokens: vec![5], ..Append::default() };
        store.append_turn(tenant.id, hit, append).unwrap();
        store.rollback(tenant.id, hit, At::Turn(1), Some(2)).unwrap();
        store.kill();
        rig.disk.restart(Ending::PowerLoss);
    }
}

#[test]
fn a_newer_format_is_refused_and_nothing_is_touched() {
    let (disk, _) = small_store(true);
    for (path, bytes) in disk.files() {
        if bytes.len() < 16 {
            continue;
        }
        let copy = disk.copy(0);
        let mut newer = bytes.clone();
        newer[8..12].copy_from_slice(&2_u32.to_le_bytes());
        let check = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &newer[..12]) as u32;
        newer[12..16].copy_from_slice(&check.to_le_bytes());
        copy.set(&path, newer);
        let before = copy.files();
        let refused = Rig { disk: copy.clone(), ..Rig::new(0) }.try_open().map(|_| ());
        assert!(matches!(refused, Err(StoreError::Newer { found: 2, known: 1, .. })), "{path}: {refused:?}");
        assert_eq!(copy.files(), before, "{path}");
    }
}

#[test]
fn a_store_with_threads_proves_its_pages_by_itself() {
    let rig = Rig::new(5);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let all = tokens(5, 320);
    write_pages(&store, &tenant, &all);
    store.close().unwrap();
    let (path, mut bytes) = rig.disk.files().into_iter().find(|(path, _)| path.starts_with("seg")).unwrap();
    bytes[6 * 4096] ^= 1;
    rig.disk.set(&path, bytes);
    // Ten records of two blocks at this rate take half a second.
    let scrub_bytes_per_s = 20 * 2 * 4096;
    let options = Options { scrub_bytes_per_s, ..crate::rig::options() };
    let begun = std::time::Instant::now();
    let (store, _) = Rig { options, ..rig }.open();
    let counts = store.scrub_counts();
    while counts.passes.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(begun.elapsed().as_millis() >= 490, "{:?}", begun.elapsed());
    let found = [&counts.pages, &counts.damaged, &counts.unreadable].map(|c| c.load(Ordering::Relaxed));
    assert_eq!((found, counts.bytes.load(Ordering::Relaxed)), ([9, 1, 0], 20 * 4096));
    assert!(!store.contains(&headers(&tenant, &all)[2].name));
    // Its rest does not hold up the end.
    let begun = std::time::Instant::now();
    store.close().unwrap();
    assert!(begun.elapsed().as_secs() < 30);
}

#[test]
fn the_scrubber_and_the_check_find_a_bad_page_first() {
    let rig = Rig::new(4);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let all = tokens(4, 128);
    write_pages(&store, &tenant, &all);
    store.close().unwrap();
    let (path, mut bytes) = rig.disk.files().into_iter().find(|(path, _)| path.starts_with("seg")).unwrap();
    // The third payload: a block of the file, and two for each record.
    bytes[6 * 4096] ^= 1;
    rig.disk.set(&path, bytes);
    let (store, report): (Store, _) = rig.open();
    assert!(!report.is_damaged(), "payloads are proven when read");
    let found = store.verify().unwrap();
    assert_eq!((found.pages, found.damage.len()), (3, 1));
    let steps: Vec<_> = std::iter::repeat_with(|| store.scrub()).take(5).collect();
    assert_eq!(steps.iter().map(|step| (step.pages, step.damaged)).max(), Some((1, 0)), "a page at a time");
    let sums = (steps.iter().map(|s| s.pages).sum(), steps.iter().map(|s| s.damaged).sum());
    assert_eq!(sums, (3_u64, 1_u64));
    assert_eq!(steps.iter().map(|step| step.done).collect::<Vec<_>>(), [false, false, false, false, true]);
    assert!(!store.contains(&headers(&tenant, &all)[2].name), "it is let go");
    assert_eq!(read_pages(&store, &tenant, &all), 3);
}
