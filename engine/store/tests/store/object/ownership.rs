//! Who may have a session: fencing, races, crashes, and sessions that change under way.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use mainstay_store::{
    InFlight, SessionId, StoreError,
    object::{ObjectError, ObjectOptions, ObjectTier, State, Takeover, TierSession},
    sim::Ending,
};

use super::{
    Server, made,
    place::{Fault, Faulty, Place, memory, options, places},
};
use crate::rig::tokens;

/// Every object with its bytes.
fn all_of(place: &Place) -> Vec<(String, Vec<u8>)> {
    place.names("").into_iter().map(|name| (name.clone(), place.get(&name))).collect()
}

fn listed(tier: &ObjectTier, server: &Server, id: SessionId) -> TierSession {
    tier.list(server.tenant.id).unwrap().into_iter().find(|session| session.id == id).unwrap()
}

#[test]
fn a_stale_writer_is_fenced_and_overwrites_nothing() {
    for place in places() {
        let tier = place.tier();
        let (a, b) = (Server::new(1), Server::new(2));
        let all = tokens(1, 100);
        let id = a.session(&all);
        a.flush(&tier, id).unwrap();
        a.turn(id, &[1, 2, 3]);
        let held = b.acquire(&tier, id, Takeover::No);
        assert!(matches!(held, Err(ObjectError::Held { owner }) if owner == a.store.owner_id()), "{held:?}");
        let acquired = b.acquire(&tier, id, Takeover::Yes).unwrap();
        assert_eq!((acquired.epoch, acquired.session.token_count), (2, 100), "as of the last flush");
        let before = all_of(&place);
        for result in [a.flush(&tier, id), a.release(&tier, id)] {
            assert!(matches!(result, Err(ObjectError::Moved { epoch: 2 })), "{result:?}");
        }
        assert_eq!(all_of(&place), before);
        assert_eq!(a.store.tokens(a.tenant.id, id).unwrap(), [&all[..], &[1, 2, 3]].concat());
        assert!(matches!(a.acquire(&tier, id, Takeover::No), Err(ObjectError::Held { .. })));
        // What it has is a fork, under an id of its own.
        let fork = a.store.fork(a.tenant.id, id, mainstay_store::At::Head, None).unwrap().id;
        a.flush(&tier, fork).unwrap();
        b.flush(&tier, id).unwrap();
        b.release(&tier, id).unwrap();
        assert!(matches!(a.flush(&tier, id), Err(ObjectError::Moved { epoch: 2 })));
        let exists = a.acquire(&tier, id, Takeover::No);
        assert!(matches!(exists, Err(ObjectError::Exists)), "{exists:?}");
        assert_eq!(listed(&tier, &a, id).state, State::Released, "a refusal claims nothing");
        a.store.delete(a.tenant.id, id).unwrap();
        assert_eq!(a.acquire(&tier, id, Takeover::No).unwrap().epoch, 3);
    }
}

#[test]
fn of_two_who_acquire_one_wins() {
    for place in places() {
        let servers = [2, 3, 4].map(|seed| Arc::new(Server::new(seed)));
        let a = Server::new(1);
        for round in 0..10 {
            let id = a.session_named(None, &tokens(round, 70));
            a.release(&place.tier(), id).unwrap();
            let start = Arc::new(std::sync::Barrier::new(servers.len()));
            let threads = servers.clone().map(|server| {
                let (tier, start) = (place.tier(), start.clone());
                std::thread::spawn(move || {
                    start.wait();
                    server.acquire(&tier, id, Takeover::No)
                })
            });
            let results = threads.map(|thread| thread.join().unwrap());
            let won: Vec<_> = (0..3).filter(|&i| results[i].is_ok()).collect();
            assert_eq!(won.len(), 1, "round {round}: {results:?}");
            for (i, result) in results.iter().enumerate().filter(|(_, result)| result.is_err()) {
                let error = result.as_ref().unwrap_err();
                assert!(matches!(error, ObjectError::Lost | ObjectError::Held { .. }), "{error}");
                assert!(!servers[i].has(id), "the loser has nothing");
            }
            let winner = &servers[won[0]];
            assert_eq!(listed(&place.tier(), &a, id).owner, winner.store.owner_id());
            winner.flush(&place.tier(), id).unwrap();
        }
    }
}

/// Runs `act` once, right before the object whose name ends with `ending` is made.
fn before_put(place: &Place, ending: &'static str, act: impl Fn() + Send + 'static) -> ObjectTier {
    let done = AtomicBool::new(false);
    let hook = move |_: u64, path: &object_store::path::Path| {
        if path.as_ref().ends_with(ending) && !done.swap(true, Ordering::SeqCst) {
            act();
        }
        Fault::None
    };
    ObjectTier::new(Faulty::new(place.store.clone(), hook), options()).unwrap()
}

#[test]
fn a_takeover_has_every_flush_that_was_acknowledged() {
    let place = memory();
    let (a, b) = (Arc::new(Server::new(1)), Server::new(2));
    let id = a.session(&tokens(1, 50));
    a.flush(&place.tier(), id).unwrap();
    a.turn(id, &[7; 20]);
    let (theirs, tier) = (a.clone(), place.tier());
    // After the taker looked, and before it claims.
    let slow = before_put(&place, "0000000002-0000000000", move || {
        assert_eq!(theirs.flush(&tier, id).unwrap().number, 2);
    });
    let acquired = b.acquire(&slow, id, Takeover::Yes).unwrap();
    assert_eq!((acquired.epoch, acquired.session.token_count), (2, 70));
    assert_eq!(b.view(id), a.view(id));

    // The other way round: the taker comes between a flush's look and its manifest.
    let (c, d) = (Server::new(3), Arc::new(Server::new(4)));
    let id = c.session(&tokens(2, 50));
    c.flush(&place.tier(), id).unwrap();
    c.turn(id, &[8; 20]);
    let (taker, tier) = (d.clone(), place.tier());
    let slow = before_put(&place, "0000000001-0000000002", move || {
        taker.acquire(&tier, id, Takeover::Yes).unwrap();
    });
    assert!(matches!(c.release(&slow, id), Err(ObjectError::Moved { epoch: 2 })));
    assert!(c.has(id), "what was not acknowledged is still here");
    assert_eq!(d.store.get(d.tenant.id, id).unwrap().token_count, 50);
    d.flush(&place.tier(), id).unwrap();
}

#[test]
fn a_released_session_is_taken_back_or_lost_but_not_both() {
    let place = memory();
    let (a, b) = (Arc::new(Server::new(1)), Arc::new(Server::new(2)));
    let id = a.session(&tokens(1, 50));
    let theirs = a.clone();
    let tier = before_put(&place, "0000000001-0000000001", move || theirs.turn(id, &[9]));
    assert!(matches!(a.release(&tier, id), Err(ObjectError::Changed)));
    assert_eq!(a.store.tokens(a.tenant.id, id).unwrap().last(), Some(&9), "the turn is not lost");
    // While its owner writes it again, another takes it.
    let (taker, free) = (b.clone(), place.tier());
    let tier = before_put(&place, "0000000002-0000000000", move || {
        taker.acquire(&free, id, Takeover::No).unwrap();
    });
    assert!(matches!(a.flush(&tier, id), Err(ObjectError::Moved { epoch: 2 })));
    assert_eq!(b.store.get(b.tenant.id, id).unwrap().token_count, 50);

    let id = a.session_named(None, &tokens(2, 50));
    let theirs = a.clone();
    let tier = before_put(&place, "0000000001-0000000001", move || theirs.turn(id, &[9]));
    assert!(matches!(a.release(&tier, id), Err(ObjectError::Changed)));
    assert_eq!(a.flush(&place.tier(), id).unwrap().epoch, 2, "it was free, so a new epoch");
    assert!(matches!(b.acquire(&place.tier(), id, Takeover::No), Err(ObjectError::Held { .. })));
}

#[test]
fn a_session_in_use_is_not_released() {
    let place = memory();
    let tier = place.tier();
    let a = Server::new(1);
    let id = a.session(&tokens(1, 50));
    a.store.begin_answer(a.tenant.id, id, None, InFlight { meta: vec![], tokens: vec![1] }).unwrap();
    assert!(matches!(a.release(&tier, id), Err(ObjectError::Busy)));
    assert!(place.names("").is_empty());
    a.flush(&tier, id).unwrap();
    a.store.drop_answer(a.tenant.id, id).unwrap();
    a.release(&tier, id).unwrap();
    let unknown = tier.flush(&a.store, a.tenant.id, SessionId(7), Some(made()));
    assert!(matches!(unknown, Err(ObjectError::Store(StoreError::NotFound))), "{unknown:?}");
    assert!(matches!(a.acquire(&tier, SessionId(7), Takeover::Yes), Err(ObjectError::NotFound)));
}

#[test]
fn a_crash_while_acquiring_leaves_a_session_that_can_be_acquired_again() {
    let (mut at, mut came) = (1, 0);
    let all = tokens(1, 100);
    loop {
        let place = memory();
        let (tier, a, mut b) = (place.tier(), Server::new(1), Server::new(2));
        let id = a.session(&all);
        let before = a.view(id);
        a.release(&tier, id).unwrap();
        b.rig.disk.die_at(at);
        let result = b.acquire(&tier, id, Takeover::No);
        let died = b.rig.disk.is_dead();
        std::mem::replace(&mut b.store, Server::new(9).store).kill();
        b.rig.disk.restart(Ending::Kill);
        b.store = b.rig.open().0;
        b.tenant = b.store.tenant("t").unwrap();
        // It is there whole, or not at all.
        match b.store.get(b.tenant.id, id) {
            Ok(_) => {
                came += 1;
                assert_eq!(b.view(id), before, "call {at}");
            }
            Err(e) => assert!(matches!(e, StoreError::NotFound), "{e}"),
        }
        // Where it could not be read in it is free again, else still this store's.
        let again = b.acquire(&tier, id, Takeover::No).unwrap_or_else(|e| panic!("call {at}: {e}"));
        assert!(again.epoch == 2 || again.epoch == 3);
        assert_eq!(b.view(id), before, "call {at}");
        assert!(matches!(a.acquire(&tier, id, Takeover::No), Err(ObjectError::Held { .. })));
        b.release(&tier, id).unwrap();
        assert_eq!(a.acquire(&tier, id, Takeover::No).unwrap().session.token_count, 100);
        if !died {
            result.unwrap();
            break;
        }
        at += 1;
    }
    assert!(at > 10 && (1..at).contains(&came), "{at} calls, after {came} it was there");
}

#[test]
fn its_own_session_is_given_as_it_is() {
    let place = memory();
    let tier = place.tier();
    let a = Server::new(1);
    let id = a.session(&tokens(1, 50));
    a.flush(&tier, id).unwrap();
    a.turn(id, &[5]);
    let acquired = a.acquire(&tier, id, Takeover::No).unwrap();
    assert_eq!((acquired.epoch, acquired.session.token_count), (1, 51), "no newer tokens are lost");
    // Its disk lost it: what was flushed is read again.
    a.store.delete(a.tenant.id, id).unwrap();
    let acquired = a.acquire(&tier, id, Takeover::No).unwrap();
    assert_eq!((acquired.epoch, acquired.session.token_count, acquired.pages), (1, 50, 2));
    a.flush(&tier, id).unwrap();
}

#[test]
fn turns_that_a_disk_lost_are_read_again() {
    let (place, mut a) = (memory(), Server::new(1));
    let all = tokens(1, 100);
    let journal = |a: &Server| a.rig.disk.files().into_iter().rfind(|(p, _)| p.starts_with("journal"));
    let id = a.session(&all[..50]);
    let (path, before) = journal(&a).unwrap();
    a.turn(id, &all[50..80]);
    a.turn(id, &all[80..]);
    a.flush(&place.tier(), id).unwrap();
    let view = a.view(id);
    std::mem::replace(&mut a.store, Server::new(9).store).kill();
    a.rig.disk.restart(Ending::Kill);
    let (_, mut bytes) = journal(&a).unwrap();
    bytes[before.len() + 80] ^= 1;
    a.rig.disk.set(&path, bytes);
    a.store = a.rig.open().0;
    let lost = a.store.get(a.tenant.id, id).unwrap();
    assert!(lost.is_damaged && lost.token_count == 50, "{lost:?}");
    let acquired = a.acquire(&place.tier(), id, Takeover::No).unwrap();
    assert_eq!((acquired.epoch, acquired.session.is_damaged), (1, false));
    assert_eq!(a.view(id), view);
}

#[test]
fn a_deleted_session_leaves_a_mark_for_a_while() {
    for place in places() {
        let tier = place.tier();
        let (a, b) = (Server::new(1), Server::new(2));
        let id = a.session(&tokens(1, 100));
        a.flush(&tier, id).unwrap();
        let held = tier.delete(&b.store, b.tenant.id, id, Takeover::No);
        assert!(matches!(held, Err(ObjectError::Held { .. })), "{held:?}");
        tier.delete(&b.store, b.tenant.id, id, Takeover::Yes).unwrap();
        assert!(tier.list(a.tenant.id).unwrap().is_empty());
        assert_eq!(place.names("session").len(), 1);
        assert!(matches!(a.flush(&tier, id), Err(ObjectError::Moved { epoch: 2 })));
        assert!(matches!(b.acquire(&tier, id, Takeover::Yes), Err(ObjectError::NotFound)));
        assert!(matches!(tier.delete(&b.store, b.tenant.id, id, Takeover::Yes), Err(ObjectError::NotFound)));
        let kept = tier.collect().unwrap();
        assert_eq!((kept.removed, kept.marks), (0, 0));
        let eager = place.tier_with(ObjectOptions { grace_ms: 0, ..options() });
        let collected = eager.collect().unwrap();
        assert_eq!((collected.removed, collected.kept, collected.marks), (1, 0, 1));
        assert!(place.names("").is_empty());
    }
}
