//! Every call on the object store fails once in turn, before or after it was done: nothing is lost, and the session is
//! open to one store alone.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use mainstay_store::object::{ObjectError, ObjectTier, Takeover};

use super::{
    Server,
    place::{Fault, Faulty, Place, memory, options},
};
use crate::rig::tokens;

/// A tier whose call number `at` fails, and a look at how many there were.
fn failing(place: &Place, at: u64, fault: Fault) -> (ObjectTier, Arc<Faulty>) {
    let store = Faulty::new(place.store.clone(), move |call, _| if call == at { fault } else { Fault::None });
    (ObjectTier::new(store.clone(), options()).unwrap(), store)
}

/// Both try to have the session, without force; exactly one can, and it is whole.
#[track_caller]
fn one_has_it(place: &Place, servers: [&Server; 2], id: mainstay_store::SessionId, all: &[u32], what: &str) {
    let opened: Vec<_> = servers.iter().map(|s| s.acquire(&place.tier(), id, Takeover::No)).collect();
    let ok: Vec<_> = (0..2).filter(|&i| opened[i].is_ok()).collect();
    assert_eq!(ok.len(), 1, "{what}: {opened:?}");
    let (winner, loser) = (servers[ok[0]], servers[1 - ok[0]]);
    assert_eq!(winner.store.tokens(winner.tenant.id, id).unwrap(), all, "{what}");
    let refused = opened[1 - ok[0]].as_ref().unwrap_err();
    assert!(matches!(refused, ObjectError::Held { .. }), "{what}: {refused}");
    // It may still have a copy, but can write it no more.
    if loser.has(id) {
        let fenced = loser.flush(&place.tier(), id);
        assert!(matches!(fenced, Err(ObjectError::Moved { .. })), "{what}: {fenced:?}");
    }
    winner.flush(&place.tier(), id).unwrap_or_else(|e| panic!("{what}: {e}"));
}

#[test]
fn a_release_that_fails_leaves_the_session_with_one() {
    for fault in [Fault::Before, Fault::After] {
        for is_first in [true, false] {
            let mut at = 1;
            loop {
                let what = format!("{fault:?} at {at}, first {is_first}");
                let (place, a, b) = (memory(), Server::new(1), Server::new(2));
                let mut all = tokens(1, 32 * 6);
                let id = a.session(&all);
                if !is_first {
                    a.flush(&place.tier(), id).unwrap();
                    a.turn(id, &[1, 2, 3]);
                    all.extend([1, 2, 3]);
                }
                let before = a.view(id);
                let (tier, calls) = failing(&place, at, fault);
                let result = a.release(&tier, id);
                assert_eq!(result.is_err(), a.has(id), "{what}: {result:?}");
                if result.is_err() {
                    assert_eq!(a.view(id), before, "{what}");
                    // What did not get away can be sent again, whatever of it had arrived.
                    if at % 2 == 0 {
                        a.release(&place.tier(), id).unwrap_or_else(|e| panic!("{what}: {e}"));
                    } else {
                        a.flush(&place.tier(), id).unwrap_or_else(|e| panic!("{what}: {e}"));
                    }
                }
                one_has_it(&place, [&b, &a], id, &all, &what);
                if calls.calls() < at {
                    break;
                }
                at += 1;
            }
            assert!(at > 8, "only {at} calls");
        }
    }
}

#[test]
fn an_acquisition_that_fails_leaves_the_session_with_one() {
    for fault in [Fault::Before, Fault::After] {
        for takeover in [Takeover::No, Takeover::Yes] {
            let mut at = 1;
            loop {
                let what = format!("{fault:?} at {at}, {takeover:?}");
                let (place, a, b) = (memory(), Server::new(1), Server::new(2));
                let all = tokens(2, 32 * 6);
                let id = a.session(&all);
                match takeover {
                    Takeover::No => a.release(&place.tier(), id).unwrap(),
                    Takeover::Yes => a.flush(&place.tier(), id).unwrap(),
                };
                let (tier, calls) = failing(&place, at, fault);
                let result = b.acquire(&tier, id, takeover);
                assert_eq!(result.is_ok(), b.has(id), "{what}: {result:?}");
                one_has_it(&place, [&b, &a], id, &all, &what);
                if calls.calls() < at {
                    result.unwrap();
                    break;
                }
                at += 1;
            }
            assert!(at > 6, "only {at} calls");
        }
    }
}

#[test]
fn a_create_whose_answer_is_lost_is_known_as_done() {
    for ending in ["0000000001-0000000000", "0000000001-0000000001"] {
        let (place, a, b, mut is_lost) = (memory(), Server::new(1), Server::new(2), false);
        let id = a.session(&tokens(7, 50));
        let store = Faulty::new(place.store.clone(), move |_, path| {
            let is_it = path.as_ref().ends_with(ending) && !is_lost;
            is_lost |= is_it;
            if is_it { Fault::After } else { Fault::None }
        });
        let tier = ObjectTier::new(store, options()).unwrap();
        assert_eq!(a.release(&tier, id).unwrap().epoch, 1, "{ending}");
        assert_eq!(b.acquire(&tier, id, Takeover::No).unwrap().epoch, 2, "{ending}");
    }
}

#[test]
fn a_store_that_cannot_read_a_session_in_gives_it_back() {
    let (place, a, b) = (memory(), Server::new(1), Server::new(2));
    let all = tokens(3, 100);
    let id = a.session(&all);
    a.release(&place.tier(), id).unwrap();
    b.store.set_quota(b.tenant.id, mainstay_store::Quota { sessions: 0, ..Default::default() });
    let result = b.acquire(&place.tier(), id, Takeover::No);
    assert!(matches!(result, Err(ObjectError::Store(_))), "{result:?}");
    assert!(!b.has(id));
    let acquired = a.acquire(&place.tier(), id, Takeover::No).unwrap();
    assert_eq!((acquired.epoch, acquired.session.token_count), (3, 100));
}

#[test]
fn a_disk_that_fails_once_loses_no_session() {
    let mut at = 1;
    loop {
        let (place, a, b) = (memory(), Server::new(1), Server::new(2));
        let all = tokens(4, 100);
        let id = a.session(&all);
        a.release(&place.tier(), id).unwrap();
        b.rig.disk.fail_at(at);
        let calls = b.rig.disk.calls();
        let result = b.acquire(&place.tier(), id, Takeover::No);
        let calls = b.rig.disk.calls() - calls;
        b.rig.disk.fail_at(u64::MAX >> 1);
        one_has_it(&place, [&b, &a], id, &all, &format!("disk call {at}, {result:?}"));
        if calls < at {
            break;
        }
        at += 1;
    }
    assert!(at > 10, "only {at} calls");
}

#[test]
fn a_collection_that_fails_removes_nothing_that_is_named() {
    let (mut at, removed) = (1, AtomicU64::new(0));
    loop {
        let (place, a, b) = (memory(), Server::new(1), Server::new(2));
        let all = tokens(5, 32 * 6);
        let id = a.session(&all);
        let gone = a.session_named(None, &tokens(6, 64));
        a.flush(&place.tier(), gone).unwrap();
        place.tier().delete(&a.store, a.tenant.id, gone, Takeover::No).unwrap();
        a.release(&place.tier(), id).unwrap();
        let eager = mainstay_store::object::ObjectOptions { grace_ms: 0, ..options() };
        let store = Faulty::new(
            place.store.clone(),
            move |call, _| if call == at { Fault::Before } else { Fault::None },
        );
        let result = ObjectTier::new(store.clone(), eager).unwrap().collect();
        removed.fetch_add(result.map_or(0, |collected| collected.removed).into(), Ordering::Relaxed);
        let acquired = b.acquire(&place.tier(), id, Takeover::No).unwrap();
        assert_eq!((acquired.pages, acquired.pages_missed), (6, 0), "call {at}");
        if store.calls() < at {
            break;
        }
        at += 1;
    }
    assert!(at > 5 && removed.load(Ordering::Relaxed) == 1, "{at} calls");
}
