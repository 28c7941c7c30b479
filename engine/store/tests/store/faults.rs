//! A disk that fails: errors at any call, no room, syncs that do not, other processes.

use std::{sync::atomic::Ordering, time::Duration};

use mainstay_store::{Append, At, Durability, Handed, Miss, Options, Settings, StoreError, sim::Ending};

use crate::rig::{Rig, hand, headers, payload, read_pages, settings, tokens, turn, write_pages};

/// One EIO at each call in turn until the work meets none: every error is answered or passed over, never believed.
#[test]
fn one_error_at_any_call_loses_nothing_acknowledged() {
    for at in 1.. {
        let rig = Rig {
            options: Options { rebase_bytes: 600, segment_bytes: 20 << 10, ..Rig::new(0).options },
            ..Rig::new(at)
        };
        rig.disk.fail_at(at);
        let all = tokens(at, 200);
        let mut told = None;
        let calls = rig.disk.calls();
        if let Ok((store, _)) = rig.try_open()
            && let Ok(tenant) = store.tenant("t")
        {
            if let Ok(info) = store.create(tenant.id, settings(&tenant, Durability::Turn)) {
                let mut len = 0;
                for new in all.chunks(40) {
                    write_pages(&store, &tenant, &all[..len + new.len()]);
                    store.step();
                    match turn(&store, &tenant, info.id, new) {
                        Ok(_) => len += new.len(),
                        // It is there or it is not: the client looks, and goes on from there.
                        Err(_) => len = store.tokens(tenant.id, info.id).unwrap().len(),
                    }
                    if len % 40 != 0 || len < 40 {
                        break;
                    }
                }
                told = Some((info.id, store.tokens(tenant.id, info.id).unwrap()));
            }
            let _ = store.maintain();
            read_pages(&store, &tenant, &all);
        }
        let used = rig.disk.calls() - calls;
        rig.disk.restart(Ending::Kill);
        let (store, report) = rig.open();
        assert!(!report.is_damaged(), "error at call {at}: {report:?}");
        let tenant = store.tenant("t").unwrap();
        if let Some((id, told)) = told {
            assert_eq!(store.tokens(tenant.id, id).unwrap(), told, "error at call {at}");
        }
        read_pages(&store, &tenant, &all);
        if used < at {
            assert!(at > 100, "the work takes more than {at} calls");
            break;
        }
    }
}

#[test]
fn a_failed_sync_gives_up_the_file_and_acknowledges_nothing() {
    let rig = Rig::new(1);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let full = store.create(tenant.id, settings(&tenant, Durability::Full)).unwrap().id;
    let strict = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    let loose = store.create(tenant.id, settings(&tenant, Durability::Async)).unwrap().id;
    let all = tokens(1, 64);
    turn(&store, &tenant, strict, &[1]).unwrap();
    write_pages(&store, &tenant, &all);
    rig.disk.fail_syncs(true);
    assert!(matches!(turn(&store, &tenant, full, &all), Err(StoreError::Pages(_))));
    assert_eq!(store.get(tenant.id, full).unwrap().turn_count, 0, "a refused turn changes nothing");
    assert_eq!(read_pages(&store, &tenant, &all), 0, "pages of a segment given up are not found");
    assert_eq!(store.page_counts().abandoned_segments.load(Ordering::Relaxed), 1);
    assert!(matches!(turn(&store, &tenant, strict, &[2]), Err(StoreError::Journal(_))));
    // The journal is known to be in doubt: strict turns are refused before they change anything.
    let before = store.tokens(tenant.id, strict).unwrap();
    assert!(matches!(turn(&store, &tenant, strict, &[3]), Err(StoreError::Journal(_))));
    assert_eq!(store.tokens(tenant.id, strict).unwrap(), before);
    let append = Append { tokens: vec![4], ..Append::default() };
    let done = store.append_turn(tenant.id, loose, append).unwrap();
    assert_eq!(done.durability, Durability::Ephemeral, "async goes on in memory and says so");
    // The disk is well again: everything in memory goes to a new file.
    rig.disk.fail_syncs(false);
    rig.clock.advance(2000);
    turn(&store, &tenant, strict, &[5]).unwrap();
    write_pages(&store, &tenant, &all);
    turn(&store, &tenant, full, &all).unwrap();
    let expected: Vec<_> =
        [full, strict, loose].iter().map(|&id| store.tokens(tenant.id, id).unwrap()).collect();
    assert_eq!(expected[2], [4]);
    store.kill();
    rig.disk.restart(Ending::PowerLoss);
    let (store, report) = rig.open();
    assert!(!report.is_damaged(), "{report:?}");
    let found: Vec<_> =
        [full, strict, loose].iter().map(|&id| store.tokens(tenant.id, id).unwrap()).collect();
    assert_eq!(found, expected);
    assert_eq!(read_pages(&store, &tenant, &all), 2);
}

#[test]
fn a_failed_journal_sync_is_mended_from_memory_where_another_file_can_be_synced() {
    let rig = Rig::new(2);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    // Of the calls of a turn some are the sync; each is failed in turn, and the turn holds all the same.
    let mut expected = Vec::new();
    for at in 1..30 {
        rig.disk.fail_at(at);
        match turn(&store, &tenant, id, &[at as u32]) {
            Ok(_) => expected.push(at as u32),
            Err(_) => expected = store.tokens(tenant.id, id).unwrap(),
        }
        rig.clock.advance(2000);
    }
    assert!(store.journal_counts().bases.load(Ordering::Relaxed) > 0, "a sync was failed");
    turn(&store, &tenant, id, &[99]).unwrap();
    expected.push(99);
    store.kill();
    rig.disk.restart(Ending::PowerLoss);
    let (store, report) = rig.open();
    assert!(!report.is_damaged(), "{report:?}");
    assert_eq!(store.tokens(tenant.id, id).unwrap(), expected);
}

#[test]
fn a_full_disk_stops_pages_first_and_then_strict_turns() {
    let rig = Rig { options: Options { reserve_bytes: 64 << 10, ..Rig::new(3).options }, ..Rig::new(3) };
    rig.disk.set_capacity(256 << 10);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let strict = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    let mut expected = Vec::new();
    let dropped = || store.page_counts().dropped.load(Ordering::Relaxed);
    let add = |expected: &mut Vec<u32>, new: Vec<u32>| {
        for header in headers(&tenant, &[&expected[..], &new].concat()) {
            assert_ne!(hand(&store, header), Handed::Dropped);
        }
        store.step();
        turn(&store, &tenant, strict, &new).map(|_| expected.extend(new))
    };
    let mut turns_without_pages = 0;
    let refused = loop {
        let before = dropped();
        let new = tokens(expected.len() as u64, 300);
        match add(&mut expected, new) {
            Ok(()) => turns_without_pages += u32::from(dropped() > before),
            Err(e) => break e,
        }
        rig.clock.advance(5000);
    };
    assert!(turns_without_pages > 20, "the journal goes on in the reserve, {turns_without_pages} turns");
    assert!(matches!(refused, StoreError::Journal(_)), "{refused}");
    assert_eq!(store.tokens(tenant.id, strict).unwrap(), expected, "a refused turn changes nothing");
    // Room again: everything goes on.
    rig.disk.set_capacity(10 << 20);
    rig.clock.advance(5000);
    add(&mut expected, tokens(1, 40)).unwrap();
    write_pages(&store, &tenant, &expected);
    store.flush().unwrap();
    assert_eq!(read_pages(&store, &tenant, &expected), expected.len().div_ceil(32));
    store.kill();
    rig.disk.restart(Ending::PowerLoss);
    let (store, report) = rig.open();
    assert!(!report.is_damaged(), "{report:?}");
    assert_eq!(store.tokens(tenant.id, strict).unwrap(), expected);
}

#[test]
fn a_full_disk_is_emptied_of_the_oldest_pages() {
    let options = Options { reserve_bytes: 64 << 10, segment_bytes: 32 << 10, ..Rig::new(0).options };
    let rig = Rig { options, ..Rig::new(10) };
    rig.disk.set_capacity(256 << 10);
    let (store, _) = rig.open();
    let [tenant, small] = ["t", "u"].map(|name| store.tenant(name).unwrap());
    let little = tokens(1000, 64);
    write_pages(&store, &small, &little);
    let mut newest = Vec::new();
    for seed in 0..40 {
        newest = tokens(seed, 64);
        write_pages(&store, &tenant, &newest);
        store.flush().unwrap();
        rig.clock.advance(5000);
        store.maintain().unwrap();
    }
    assert_eq!(read_pages(&store, &tenant, &newest), 2, "it goes on");
    assert_eq!(read_pages(&store, &small, &little), 2, "who has little keeps it");
    assert_eq!(read_pages(&store, &tenant, &tokens(0, 64)), 0);
    let counts = store.page_counts();
    assert!(counts.evicted_disk_full.load(Ordering::Relaxed) > 10);
    assert_eq!(counts.evicted.load(Ordering::Relaxed), 0);
    let used: usize = rig.disk.files().values().map(Vec::len).sum();
    assert!(used < (256 - 64 + 32) << 10, "{used} bytes: the journal has its room");
}

#[test]
fn a_second_store_is_refused_and_a_stale_one_is_fenced() {
    let rig = Rig::new(4);
    let (first, _) = rig.open();
    let tenant = first.tenant("t").unwrap();
    let id = first.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    turn(&first, &tenant, id, &[1]).unwrap();
    assert!(matches!(rig.try_open(), Err(StoreError::Locked)));
    // A lock that does not hold, as on some network file systems.
    rig.disk.break_lock("LOCK");
    let (second, report) = rig.open();
    assert_eq!((report.epoch, first.epoch()), (2, 1));
    assert!(matches!(turn(&first, &tenant, id, &[2]), Err(StoreError::Fenced { expected: 1, found: 2 })));
    assert!(matches!(first.create(tenant.id, Settings::default()), Err(StoreError::Fenced { .. })));
    assert!(matches!(first.flush(), Err(StoreError::Fenced { .. }) | Ok(())));
    turn(&second, &tenant, id, &[3]).unwrap();
    assert!(first.close().is_err());
    second.close().unwrap();
    let (third, report) = rig.open();
    assert!(!report.is_damaged() && report.was_closed, "{report:?}");
    assert_eq!(third.tokens(tenant.id, id).unwrap(), [1, 3]);
}

#[test]
fn what_a_stale_writer_appends_to_its_own_file_is_passed_over() {
    let rig = Rig::new(5);
    let (first, _) = rig.open();
    let tenant = first.tenant("t").unwrap();
    let id = first.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    turn(&first, &tenant, id, &[1]).unwrap();
    let before = rig.disk.files();
    // The same store, as if it had looked at the epoch just before the other bumped it.
    turn(&first, &tenant, id, &[2]).unwrap();
    let late = rig.disk.files();
    first.kill();
    let (journal, late_bytes) =
        late.iter().find(|(path, bytes)| path.starts_with("journal") && before[*path] != **bytes).unwrap();
    rig.disk.set(journal, before[journal].clone());
    rig.disk.restart(Ending::Kill);
    let (second, _) = rig.open();
    assert_eq!(second.tokens(tenant.id, id).unwrap(), [1]);
    turn(&second, &tenant, id, &[3]).unwrap();
    second.kill();
    rig.disk.set(journal, late_bytes.clone());
    rig.disk.restart(Ending::Kill);
    let (third, report) = rig.open();
    assert_eq!(report.fenced_entries, 1);
    assert_eq!(third.tokens(tenant.id, id).unwrap(), [1, 3]);
}

#[test]
fn ephemeral_sessions_leave_nothing_on_disk() {
    let rig = Rig::new(6);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Ephemeral)).unwrap().id;
    let before = rig.disk.files();
    turn(&store, &tenant, id, &tokens(6, 50)).unwrap();
    let fork = store.fork(tenant.id, id, At::Token(20), None).unwrap();
    store.patch(tenant.id, id, |s| s.durability = Durability::Full).unwrap();
    assert_eq!(store.get(tenant.id, id).unwrap().settings.durability, Durability::Ephemeral);
    assert_eq!(fork.settings.durability, Durability::Ephemeral);
    assert_eq!(rig.disk.files(), before);
    store.close().unwrap();
    let (store, report) = rig.open();
    assert!(!report.is_damaged());
    assert!(store.list(tenant.id, None, 9).is_empty());
}

#[test]
fn a_hung_disk_makes_reads_late_and_holds_nobody() {
    let rig = Rig { options: Options { reader_threads: 1, ..crate::rig::options() }, ..Rig::new(7) };
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let all = tokens(7, 64);
    write_pages(&store, &tenant, &all);
    store.flush().unwrap();
    rig.disk.stall_reads(true);
    let (done, read) = std::sync::mpsc::channel();
    let patience = Duration::from_millis(100);
    // The second waits behind the first.
    for _ in 0..2 {
        let done = done.clone();
        store.start_read(headers(&tenant, &all), patience, move |pages| done.send(pages).unwrap());
    }
    rig.clock.advance(101);
    for _ in 0..2 {
        let pages = read.recv().unwrap();
        assert!(pages.len() == 2 && pages.iter().all(|page| matches!(page, Err(Miss::Late))));
    }
    rig.disk.stall_reads(false);
    store.start_read(headers(&tenant, &all), patience, move |pages| done.send(pages).unwrap());
    let pages = read.recv().unwrap();
    assert!(pages.iter().all(Result::is_ok), "it goes on when the disk does");
    assert!(read.recv().is_err(), "each is answered once");
}

#[test]
fn a_page_that_is_not_what_the_device_sealed_never_reaches_the_disk() {
    let rig = Rig::new(9);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let all = tokens(9, 64);
    let [good, bad] = headers(&tenant, &all).try_into().unwrap();
    let sealed = *blake3::hash(&payload(&bad)).as_bytes();
    let mut raced = payload(&bad);
    raced[77] ^= 1;
    assert_eq!(hand(&store, good.clone()), Handed::Queued);
    assert_eq!(store.write(bad.clone(), raced.clone(), sealed), Handed::Queued);
    store.flush().unwrap();
    let counts = store.page_counts();
    let counted = [&counts.written, &counts.mismatched, &counts.dropped].map(|c| c.load(Ordering::Relaxed));
    assert_eq!(counted, [1, 1, 0]);
    assert_eq!(store.read(&good).unwrap().digest(), *blake3::hash(&payload(&good)).as_bytes());
    assert_eq!(store.read(&bad).unwrap_err(), Miss::Absent);
    let is_on_disk = |bytes: &[u8]| {
        let wanted = &bytes[64..128];
        rig.disk.files().values().any(|file| file.windows(64).any(|window| window == wanted))
    };
    assert!(!is_on_disk(&raced));
    // Sealed again it is taken: nothing remembers the failure.
    assert_eq!(hand(&store, bad.clone()), Handed::Queued);
    store.flush().unwrap();
    assert_eq!(read_pages(&store, &tenant, &all), 2);
    assert!(store.verify().unwrap().damage.is_empty());
}

#[test]
fn a_full_turn_is_refused_while_its_pages_are_missing() {
    let rig = Rig::new(8);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Full)).unwrap().id;
    let all = tokens(8, 65);
    write_pages(&store, &tenant, &all[..32]);
    assert!(matches!(turn(&store, &tenant, id, &all), Err(StoreError::Pages(_))));
    assert_eq!(store.get(tenant.id, id).unwrap().turn_count, 0);
    // The last token has not been computed, so the third page is not asked for.
    write_pages(&store, &tenant, &all[..64]);
    turn(&store, &tenant, id, &all).unwrap();
}
