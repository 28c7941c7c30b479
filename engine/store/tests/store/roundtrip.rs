//! What goes into a store comes out of it, also after a restart, on the simulated and on the real disk.

use std::{sync::Arc, time::Duration};

use crate::rig::{
    Rig, class, content, hand, headers, headers_from, payload, read_pages, root, settings, tokens, turn,
    view, write_pages,
};
use mainstay_store::{
    Append, At, BundlePages, Durability, ExportPages, Handed, ImportAs, InFlight, Miss, Options, PageHeader,
    PageName, Quota, Root, Settings, Store, StoreError, sim::Ending,
};

#[test]
fn sessions_and_pages_survive_a_restart() {
    let rig = Rig::new(1);
    let (store, report) = rig.open();
    assert!(report.is_new);
    let tenant = store.tenant("t").unwrap();
    let named = Settings {
        name: Some("chat".into()),
        meta: b"m".to_vec(),
        priority: 3,
        ttl_ms: Some(9000),
        ..settings(&tenant, Durability::Turn)
    };
    let id = store.create(tenant.id, named).unwrap().id;
    let all = tokens(1, 150);
    turn(&store, &tenant, id, &all[..70]).unwrap();
    turn(&store, &tenant, id, &all[70..]).unwrap();
    write_pages(&store, &tenant, &all);
    let fork = store.fork(tenant.id, id, At::Token(40), None).unwrap();
    assert_eq!((fork.parent, fork.token_count, fork.turn_count), (Some((id, 1)), 40, 1));
    turn(&store, &tenant, fork.id, &[7, 8]).unwrap();
    let rolled = store.fork(tenant.id, id, At::Head, None).unwrap().id;
    store.rollback(tenant.id, rolled, At::Turn(1), Some(2)).unwrap();
    store.begin_answer(tenant.id, id, Some(2), InFlight { meta: vec![5], tokens: vec![1] }).unwrap();
    store.extend_answer(tenant.id, id, &[2, 3]).unwrap();
    let before: Vec<_> = [id, fork.id, rolled].iter().map(|&id| view(&store, &tenant, id)).collect();
    assert_eq!(before[1].1, [&all[..40], &[7, 8]].concat());
    assert_eq!(before[2].1, all[..70]);
    for closed in [false, true] {
        let (reopened, report) = if closed {
            store_again(&rig, true)
        } else {
            rig.disk.restart(Ending::Kill);
            store_again(&rig, false)
        };
        assert!(!report.is_damaged(), "{report:?}");
        let tenant = reopened.tenant("t").unwrap();
        let after: Vec<_> = [id, fork.id, rolled].iter().map(|&id| view(&reopened, &tenant, id)).collect();
        assert_eq!(after, before);
        assert_eq!(reopened.find(tenant.id, "chat").unwrap(), id);
        assert_eq!(reopened.find(tenant.id, &id.to_string()).unwrap(), id);
        let answer = reopened.answer(tenant.id, id).unwrap();
        assert_eq!(answer, Some(InFlight { meta: vec![5], tokens: vec![1, 2, 3] }));
        if closed {
            assert!(report.was_closed);
            assert_eq!(read_pages(&reopened, &tenant, &all), 5);
        }
        reopened.close().unwrap();
    }
    drop(store);
}

/// Writes the pages once more, for those of a killed store were in its ring.
fn store_again(rig: &Rig, closed: bool) -> (Store, mainstay_store::RecoveryReport) {
    let (store, report) = rig.open();
    if !closed {
        let tenant = store.tenant("t").unwrap();
        write_pages(&store, &tenant, &tokens(1, 150));
        store.flush().unwrap();
    }
    (store, report)
}

#[test]
fn a_turn_takes_the_place_of_others_in_one_entry() {
    let rig = Rig::new(3);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    let append = |kept_turns, expected_turn, tokens: &[u32]| {
        let append = Append { expected_turn, kept_turns, tokens: tokens.to_vec(), ..Append::default() };
        store.append_turn(tenant.id, id, append)
    };
    for tokens in [[1, 2], [3, 4], [5, 6]] {
        append(None, None, &tokens).unwrap();
    }
    let fork = store.fork(tenant.id, id, At::Head, None).unwrap().id;
    let more = append(Some(4), Some(3), &[9]);
    assert!(matches!(more, Err(StoreError::Range { what: "turns", have: 3, asked: 4 })), "{more:?}");
    assert!(matches!(append(Some(1), Some(2), &[9]), Err(StoreError::Conflict { .. })));
    assert_eq!(append(Some(1), Some(3), &[7, 8, 9]).unwrap().turn, 2);
    rig.disk.restart(Ending::PowerLoss);
    let (store, report) = rig.open();
    assert!(!report.is_damaged(), "{report:?}");
    assert_eq!(view(&store, &tenant, id).1, [1, 2, 7, 8, 9]);
    assert_eq!(view(&store, &tenant, fork).1, [1, 2, 3, 4, 5, 6], "forks keep what was replaced");
}

#[test]
fn writers_to_one_session_are_told_of_each_other() {
    let rig = Rig::new(2);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Async)).unwrap().id;
    let append = |expected| Append { expected_turn: Some(expected), tokens: vec![1], ..Append::default() };
    store.append_turn(tenant.id, id, append(0)).unwrap();
    let lost = store.append_turn(tenant.id, id, append(0));
    assert!(matches!(lost, Err(StoreError::Conflict { expected: 0, found: 1 })), "{lost:?}");
    assert_eq!(store.get(tenant.id, id).unwrap().turn_count, 1);
    assert!(matches!(store.rollback(tenant.id, id, At::Head, Some(3)), Err(StoreError::Conflict { .. })));
    let name = |name: &str| Settings { name: Some(name.into()), ..Settings::default() };
    store.create(tenant.id, name("a")).unwrap();
    assert!(matches!(store.create(tenant.id, name("a")), Err(StoreError::NameTaken(_))));
    assert!(matches!(
        store.patch(tenant.id, id, |s| s.name = Some("a".into())),
        Err(StoreError::NameTaken(_))
    ));
    assert!(matches!(
        store.fork(tenant.id, id, At::Turn(2), None),
        Err(StoreError::Range { what: "turns", have: 1, asked: 2 })
    ));
    assert!(matches!(store.fork(tenant.id, id, At::Token(2), None), Err(StoreError::Range { .. })));
}

#[test]
fn a_tenant_sees_nothing_of_another() {
    let rig = Rig::new(3);
    let (store, _) = rig.open();
    let [a, b] = ["a", "b"].map(|name| store.tenant(name).unwrap());
    let named = Settings { name: Some("n".into()), ..settings(&a, Durability::Async) };
    let id = store.create(a.id, named).unwrap().id;
    let all = tokens(3, 64);
    write_pages(&store, &a, &all);
    store.flush().unwrap();
    assert!(matches!(store.get(b.id, id), Err(StoreError::NotFound)));
    assert!(matches!(store.tokens(b.id, id), Err(StoreError::NotFound)));
    assert!(matches!(store.delete(b.id, id), Err(StoreError::NotFound)));
    assert!(matches!(store.fork(b.id, id, At::Head, None), Err(StoreError::NotFound)));
    assert!(matches!(store.find(b.id, "n"), Err(StoreError::NotFound)));
    assert!(store.list(b.id, None, 10).is_empty());
    assert_eq!((read_pages(&store, &a, &all), read_pages(&store, &b, &all)), (2, 0));
    // Even the other's keys name nothing here.
    let stolen = headers(&a, &all).remove(0);
    let name = PageName { tenant: b.id, ..stolen.name };
    assert_eq!(store.read(&PageHeader { name, ..stolen }).unwrap_err(), Miss::Absent);
}

#[test]
fn a_hit_is_compared_in_every_field() {
    let rig = Rig::new(4);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let all = tokens(4, 32);
    write_pages(&store, &tenant, &all);
    store.flush().unwrap();
    let header = headers(&tenant, &all).remove(0);
    assert!(store.read(&header).is_ok());
    let mut other = header.clone();
    other.tokens[31] ^= 1;
    assert_eq!(store.read(&other).unwrap_err(), Miss::Collision);
    let other = PageHeader { parent: header.name.key, ..header.clone() };
    assert_eq!(store.read(&other).unwrap_err(), Miss::Collision);
    let other = PageHeader { content: mainstay_store::ContentId([0; 32]), ..header.clone() };
    assert_eq!(store.read(&other).unwrap_err(), Miss::Collision);
    let name = PageName { class: mainstay_store::ClassId([0; 32]), ..header.name };
    assert_eq!(store.read(&PageHeader { name, ..header }).unwrap_err(), Miss::Absent);
}

#[test]
fn a_tail_is_found_until_its_page_is_full() {
    let rig = Rig::new(5);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let all = tokens(5, 64);
    write_pages(&store, &tenant, &all[..40]);
    write_pages(&store, &tenant, &all[..50]);
    store.flush().unwrap();
    let full = headers(&tenant, &all);
    let found = |tokens| store.find_tail(&full[1].name, full[0].name.key, tokens);
    let tail = headers(&tenant, &all[..50]).remove(1);
    assert_eq!(found(&all[32..]), Some((tail.name, 18)));
    assert_eq!(found(&all[33..]), None);
    assert!(store.read(&headers(&tenant, &all[..40])[1]).is_err(), "a longer tail takes its place");
    write_pages(&store, &tenant, &all);
    store.flush().unwrap();
    assert_eq!(found(&all[32..]), None, "the full page takes the tail's place");
    assert_eq!(read_pages(&store, &tenant, &all), 2);
}

#[test]
fn a_bundle_carries_a_session_to_another_store() {
    let rig = Rig::new(6);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    let all = tokens(6, 100);
    turn(&store, &tenant, id, &all[..50]).unwrap();
    turn(&store, &tenant, id, &all[50..]).unwrap();
    write_pages(&store, &tenant, &all[..99]);
    store.flush().unwrap();
    let mut bundle = Vec::new();
    let pages = ExportPages { content: content(), class: class(), groups: 1 };
    store.export(tenant.id, id, Some(pages), &mut bundle).unwrap();

    let other_rig = Rig::new(7);
    let (other, _) = other_rig.open();
    let there = other.tenant("u").unwrap();
    let accept = BundlePages::accept(content(), root(&there));
    let imported = other
        .import(
            &there,
            &mut &bundle[..],
            ImportAs { name: Some("moved".into()), ..ImportAs::default() },
            accept,
        )
        .unwrap();
    assert_eq!((imported.pages, imported.pages_refused), (4, 0));
    let new = imported.session.id;
    assert_eq!(view(&other, &there, new).1, all);
    assert_eq!(view(&other, &there, new).2, view(&store, &tenant, id).2);
    other.flush().unwrap();
    let theirs = headers(&tenant, &all[..99]);
    for (own, theirs) in headers(&there, &all[..99]).iter().zip(&theirs) {
        assert_eq!(other.read(own).unwrap()[..], payload(theirs)[..]);
    }
    // Another model's pages are refused, the tokens are not.
    let accept = BundlePages::accept(mainstay_store::ContentId([9; 32]), root(&there));
    let cold = other.import(&there, &mut &bundle[..], ImportAs::default(), accept).unwrap();
    assert_eq!((cold.pages, cold.pages_refused), (0, 4));
    assert_eq!(other.tokens(there.id, cold.session.id).unwrap(), all);
    // No byte of it may differ, and none may be missing.
    let count = other.list(there.id, None, 99).len();
    for at in 0..bundle.len() {
        let mut flipped = bundle.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(other.import(&there, &mut &flipped[..], ImportAs::default(), accept).is_err(), "byte {at}");
        assert!(
            other.import(&there, &mut &bundle[..at], ImportAs::default(), accept).is_err(),
            "cut at {at}"
        );
    }
    assert_eq!(other.list(there.id, None, 99).len(), count, "a refused bundle leaves no session");
}

#[test]
fn a_store_without_a_model_tells_and_takes_pages_of_plain_sessions() {
    let rig = Rig::new(10);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let all = tokens(10, 70);
    let salted = Root { content: content(), adapter: None, rope_table: 0, salt: b"s" };
    let roots = [root(&tenant), tenant.chain.root(&salted)];
    let bundles = roots.map(|root| {
        let own = Settings { root: Some(root), ..settings(&tenant, Durability::Turn) };
        let id = store.create(tenant.id, own).unwrap().id;
        turn(&store, &tenant, id, &all).unwrap();
        assert_eq!(store.stored_pages(tenant.id, id).unwrap().map(|_| ()), None, "nothing is stored yet");
        for header in headers_from(root, &tenant, &all) {
            assert_ne!(hand(&store, header), Handed::Dropped);
        }
        store.flush().unwrap();
        let pages = store.stored_pages(tenant.id, id).unwrap().unwrap();
        assert_eq!((pages.content, pages.class, pages.groups), (content(), class(), 1));
        let mut bundle = Vec::new();
        store.export(tenant.id, id, Some(pages), &mut bundle).unwrap();
        bundle
    });
    let other_rig = Rig::new(11);
    let (other, _) = other_rig.open();
    let there = other.tenant("u").unwrap();
    let [plain, salted] = bundles
        .map(|bundle| other.import(&there, &mut &bundle[..], ImportAs::default(), BundlePages::Any).unwrap());
    assert_eq!((plain.pages, plain.pages_refused, plain.session.settings.root), (3, 0, Some(root(&there))));
    // The salt is in no bundle: under the plain root its pages would be another session's.
    assert_eq!((salted.pages, salted.pages_refused), (0, 0));
    other.flush().unwrap();
    assert_eq!(read_pages(&other, &there, &all), 3);
    // Less than a page has a name too.
    let short = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    turn(&store, &tenant, short, &[7; 5]).unwrap();
    write_pages(&store, &tenant, &[7; 4]);
    store.flush().unwrap();
    assert!(store.stored_pages(tenant.id, short).unwrap().is_some(), "a tail of four tokens of five");
}

#[test]
fn a_snapshot_is_a_store() {
    let rig = Rig::new(8);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Async)).unwrap().id;
    let all = tokens(8, 64);
    turn(&store, &tenant, id, &all).unwrap();
    write_pages(&store, &tenant, &all);
    store.step();
    let copy = Rig::new(9);
    store.snapshot(&copy.disk).unwrap();
    assert!(store.snapshot(&copy.disk).is_err(), "the directory is not empty");
    turn(&store, &tenant, id, &[1]).unwrap();
    copy.disk.restart(Ending::PowerLoss);
    let (again, report) = copy.open();
    assert!(!report.is_damaged() && report.was_closed, "{report:?}");
    let tenant = again.tenant("t").unwrap();
    assert_eq!(again.tokens(tenant.id, id).unwrap(), all);
    assert_eq!(read_pages(&again, &tenant, &all), 2);
    assert!(again.verify().unwrap().damage.is_empty());
}

#[test]
fn the_real_disk_holds_what_the_simulated_one_does() {
    let place = std::env::temp_dir().join(format!("mainstay-store-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&place);
    let options = Options { segment_bytes: 64 << 10, ..crate::rig::options() };
    let all = tokens(10, 32 * 40 + 5);
    let id = {
        let (store, _) = Store::open_dir(&place, options.clone()).unwrap();
        assert!(matches!(Store::open_dir(&place, options.clone()), Err(StoreError::Locked)));
        let tenant = store.tenant("t").unwrap();
        let id = store.create(tenant.id, settings(&tenant, Durability::Full)).unwrap().id;
        write_pages(&store, &tenant, &all);
        turn(&store, &tenant, id, &all).unwrap();
        let (done, read) = std::sync::mpsc::channel();
        let wanted = headers(&tenant, &all);
        store.start_read(wanted.clone(), Duration::from_secs(60), move |pages| done.send(pages).unwrap());
        let pages = read.recv().unwrap();
        assert_eq!(pages.len(), 41);
        for (page, header) in pages.into_iter().zip(&wanted) {
            assert_eq!(page.unwrap()[..], payload(header)[..]);
        }
        store.kill();
        id
    };
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&place), 0o700);
        assert_eq!(mode(&place.join("config.a")), 0o600);
        assert_eq!(mode(&place.join("journal")), 0o700);
    }
    let (store, report) = Store::open_dir(&place, options).unwrap();
    assert!(!report.is_damaged(), "{report:?}");
    let tenant = store.tenant("t").unwrap();
    assert_eq!(store.tokens(tenant.id, id).unwrap(), all);
    assert_eq!(read_pages(&store, &tenant, &all), 41);
    assert!(store.verify().unwrap().damage.is_empty());
    store.close().unwrap();
    std::fs::remove_dir_all(&place).unwrap();
}

#[test]
fn forks_of_one_parent_always_succeed() {
    let rig = Rig { options: crate::rig::options(), ..Rig::new(11) };
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let parent = store.create(tenant.id, settings(&tenant, Durability::Turn)).unwrap().id;
    let all = tokens(11, 20_000);
    turn(&store, &tenant, parent, &all).unwrap();
    let store = Arc::new(store);
    let bytes = store.page_counts().written_bytes.load(std::sync::atomic::Ordering::Relaxed);
    let forks: Vec<_> = (0..64)
        .map(|i| {
            let store = store.clone();
            std::thread::spawn(move || {
                let id = store.fork(tenant.id, parent, At::Head, None).unwrap().id;
                turn(&store, &tenant, id, &[i, i + 1]).unwrap();
                id
            })
        })
        .map(|thread| thread.join().unwrap())
        .collect();
    assert_eq!(store.page_counts().written_bytes.load(std::sync::atomic::Ordering::Relaxed), bytes);
    for (i, &id) in forks.iter().enumerate() {
        let own = [i as u32, i as u32 + 1];
        assert_eq!(store.tokens(tenant.id, id).unwrap(), [&all[..], &own].concat());
    }
    // The parent's tokens stand once in the journal, and its end does not end them.
    store.delete(tenant.id, parent).unwrap();
    drop(store);
    rig.disk.restart(Ending::PowerLoss);
    let journal: usize =
        rig.disk.files().iter().filter(|(p, _)| p.starts_with("journal")).map(|(_, b)| b.len()).sum();
    assert!(journal < 3 * 20_000 + 64 * 1024, "{journal} bytes");
    let (store, report) = rig.open();
    assert!(!report.is_damaged(), "{report:?}");
    for (i, &id) in forks.iter().enumerate() {
        let own = [i as u32, i as u32 + 1];
        assert_eq!(store.tokens(tenant.id, id).unwrap(), [&all[..], &own].concat());
    }
}

#[test]
fn a_long_history_is_written_anew_and_let_go_without_recursion() {
    let rig = Rig { options: Options { rebase_bytes: 4096, ..Rig::new(0).options }, ..Rig::new(12) };
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Async)).unwrap().id;
    let fork = store.fork(tenant.id, id, At::Head, None).unwrap().id;
    for i in 0..3000 {
        turn(&store, &tenant, id, &[i]).unwrap();
    }
    let middle = store.fork(tenant.id, id, At::Turn(1000), None).unwrap().id;
    assert!(store.journal_counts().bases.load(std::sync::atomic::Ordering::Relaxed) > 3);
    assert!(rig.disk.files().keys().filter(|path| path.starts_with("journal")).count() <= 2);
    store.close().unwrap();
    let (store, report) = rig.open();
    assert!(!report.is_damaged() && report.was_closed, "{report:?}");
    assert_eq!(store.tokens(tenant.id, id).unwrap(), (0..3000).collect::<Vec<_>>());
    assert_eq!(store.tokens(tenant.id, middle).unwrap(), (0..1000).collect::<Vec<_>>());
    assert!(store.tokens(tenant.id, fork).unwrap().is_empty());
}

#[test]
fn quotas_expiry_and_pins_hold() {
    let rig = Rig::new(13);
    let (store, _) = rig.open();
    let [a, b] = ["a", "b"].map(|name| store.tenant(name).unwrap());
    let quota = Quota { page_bytes: 10 * 8192, sessions: 3, ..Quota::default() };
    store.set_quota(a.id, quota);
    let pinned = tokens(20, 64);
    let settings = Settings { pinned: true, ..settings(&a, Durability::Async) };
    let keeper = store.create(a.id, settings).unwrap().id;
    turn(&store, &a, keeper, &pinned).unwrap();
    write_pages(&store, &a, &pinned);
    write_pages(&store, &b, &tokens(21, 320));
    store.flush().unwrap();
    for seed in 30..40 {
        write_pages(&store, &a, &tokens(seed, 32 * 4));
        store.flush().unwrap();
        assert!(store.page_bytes(a.id) <= quota.page_bytes);
    }
    assert_eq!(read_pages(&store, &a, &pinned), 2, "pinned pages stay");
    assert_eq!(read_pages(&store, &b, &tokens(21, 320)), 10, "another tenant's pages stay");
    for seed in 30..40 {
        // Leaf first: what is left of a sequence is its beginning.
        let held: Vec<_> = headers(&a, &tokens(seed, 128)).iter().map(|h| store.contains(&h.name)).collect();
        assert!(held.is_sorted_by(|a, b| a >= b), "{held:?}");
    }
    // Those of a session with a priority go last.
    let dear = tokens(22, 64);
    let keep = Settings { priority: 1, ..crate::rig::settings(&a, Durability::Async) };
    let dear_id = store.create(a.id, keep).unwrap().id;
    turn(&store, &a, dear_id, &dear).unwrap();
    write_pages(&store, &a, &dear);
    for seed in 40..50 {
        write_pages(&store, &a, &tokens(seed, 64));
        store.flush().unwrap();
    }
    assert_eq!((read_pages(&store, &a, &dear), read_pages(&store, &a, &pinned)), (2, 2));
    store.delete(a.id, dear_id).unwrap();
    // Evicted pages leave the disk when their segments are compacted.
    let used = |prefix: &str| -> usize {
        rig.disk.files().iter().filter(|(p, _)| p.starts_with(prefix)).map(|(_, b)| b.len()).sum()
    };
    store.close().unwrap();
    let (store, _) = rig.open();
    store.set_quota(a.id, quota);
    let before = used("seg");
    while store.maintain().unwrap().compacted_segments > 0 {}
    store.flush().unwrap();
    assert!(used("seg") < before, "{} of {before} bytes", used("seg"));
    assert_eq!(read_pages(&store, &b, &tokens(21, 320)), 10);
    assert!(store.verify().unwrap().damage.is_empty());

    let short = Settings { ttl_ms: Some(1000), ..Settings::default() };
    let id = store.create(a.id, short.clone()).unwrap().id;
    store.create(a.id, short.clone()).unwrap();
    let full = store.create(a.id, short);
    assert!(matches!(full, Err(StoreError::Quota { what: "sessions", limit: 3 })), "{full:?}");
    rig.clock.advance(600);
    turn(&store, &a, id, &[1]).unwrap();
    rig.clock.advance(600);
    assert_eq!(store.maintain().unwrap().expired_sessions, 1);
    assert!(store.get(a.id, id).is_ok(), "it was used since");
    rig.clock.jump(-5000);
    rig.clock.advance(600);
    assert_eq!(store.maintain().unwrap().expired_sessions, 1, "a backward jump extends nothing");
    rig.clock.jump(90 * 24 * 3600 * 1000);
    store.create(a.id, Settings { ttl_ms: Some(1000), ..Settings::default() }).unwrap();
    assert_eq!(store.maintain().unwrap().expired_sessions, 0);
    assert!(!store.trusts_clock());

    store.delete_tenant(a.id).unwrap();
    assert_eq!((store.list(a.id, None, 9).len(), store.page_bytes(a.id)), (0, 0));
    let again = store.tenant("a").unwrap();
    assert_ne!(root(&again), root(&a), "its secret is another");
    assert_eq!(read_pages(&store, &b, &tokens(21, 320)), 10);
}

#[test]
fn a_page_that_waits_is_not_queued_twice() {
    let options = Options { ring_bytes: 2 * crate::rig::PAGE_BYTES, ..Rig::new(0).options };
    let rig = Rig { options, ..Rig::new(15) };
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let [one, two, three] = headers(&tenant, &tokens(15, 96)).try_into().unwrap();
    assert_eq!([&one, &two].map(|header| hand(&store, header.clone())), [Handed::Queued; 2]);
    // Also where the ring is full.
    assert_eq!([&one, &two].map(|header| hand(&store, header.clone())), [Handed::Known; 2]);
    assert_eq!(hand(&store, three.clone()), Handed::Dropped);
    assert_eq!(store.ring_bytes(), 2 * crate::rig::PAGE_BYTES);
    store.flush().unwrap();
    assert_eq!(store.page_counts().written.load(std::sync::atomic::Ordering::Relaxed), 2);
    assert_eq!(hand(&store, one), Handed::Known);
    assert_eq!(hand(&store, three), Handed::Queued);
}

#[test]
fn a_full_ring_and_a_spent_budget_drop_and_count() {
    let options = Options {
        ring_bytes: 2 * crate::rig::PAGE_BYTES,
        write_budget_bytes_per_day: Some(4 * 8192),
        ..Rig::new(0).options
    };
    let rig = Rig { options, ..Rig::new(14) };
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let all = tokens(14, 320);
    let handed: Vec<_> = headers(&tenant, &all).into_iter().map(|header| hand(&store, header)).collect();
    assert_eq!(handed.iter().filter(|&&h| h == Handed::Queued).count(), 2);
    let dropped = || store.page_counts().dropped.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(dropped(), 8);
    for header in headers(&tenant, &all) {
        let bytes = payload(&header);
        let digest = *blake3::hash(&bytes).as_bytes();
        store.write_patiently(header, bytes, digest, Duration::ZERO);
    }
    store.flush().unwrap();
    assert_eq!(read_pages(&store, &tenant, &all), 4, "the day's budget");
    rig.clock.advance(12 * 3600 * 1000);
    write_pages(&store, &tenant, &all[..192]);
    store.flush().unwrap();
    assert_eq!(read_pages(&store, &tenant, &all), 6, "half a day's more");
}
