//! Sessions that come from another server: under their own id or a new one, whole or not at all.

use mainstay_store::{
    At, BundlePages, Durability, ImportAs, Imported, Options, Quota, Settings, Store, StoreError, Tenant,
    sim::Ending,
};

use crate::rig::{Rig, settings, tokens, turn, view};

/// A bundle of a session of three turns, and the session's view.
fn bundle(durability: Durability) -> (Vec<u8>, crate::rig::View) {
    let rig = Rig::new(1);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let named = Settings { name: Some("n".into()), ..settings(&tenant, durability) };
    let id = store.create(tenant.id, named).unwrap().id;
    let all = tokens(1, 120);
    for new in all.chunks(40) {
        turn(&store, &tenant, id, new).unwrap();
    }
    let mut bundle = Vec::new();
    store.export(tenant.id, id, None, &mut bundle).unwrap();
    (bundle, view(&store, &tenant, id))
}

fn import(store: &Store, tenant: &Tenant, bundle: &[u8], called: ImportAs) -> Result<Imported, StoreError> {
    store.import(tenant, &mut &bundle[..], called, BundlePages::Refuse)
}

#[test]
fn a_session_keeps_its_id_or_gets_a_new_one() {
    let (bundle, (info, all, turns)) = bundle(Durability::Turn);
    let rig = Rig::new(2);
    rig.clock.advance(5000);
    let (store, _) = rig.open();
    let [tenant, other] = ["t", "u"].map(|name| store.tenant(name).unwrap());
    let moved = ImportAs { id: Some(info.id), name: Some("m".into()) };
    let imported = import(&store, &tenant, &bundle, moved.clone()).unwrap().session;
    assert_eq!((imported.id, imported.settings.name.as_deref()), (info.id, Some("m")));
    assert_eq!(imported.created_ms, info.created_ms, "it is as old as it was");
    // The id is taken, also for another tenant, and whatever the name.
    for tenant in [&tenant, &other] {
        let again = import(&store, tenant, &bundle, ImportAs { name: None, ..moved.clone() });
        assert!(matches!(again, Err(StoreError::IdTaken(id)) if id == info.id), "{again:?}");
    }
    let named = import(&store, &tenant, &bundle, ImportAs { id: None, ..moved });
    assert!(matches!(named, Err(StoreError::NameTaken(_))), "{named:?}");
    let new = import(&store, &tenant, &bundle, ImportAs::default()).unwrap().session;
    assert!(new.id != info.id && new.created_ms > info.created_ms);
    turn(&store, &tenant, info.id, &[1, 2]).unwrap();
    let fork = store.fork(tenant.id, new.id, At::Token(50), None).unwrap().id;
    store.kill();
    rig.disk.restart(Ending::PowerLoss);
    let (store, report) = rig.open();
    assert!(!report.is_damaged(), "{report:?}");
    assert_eq!(store.tokens(tenant.id, info.id).unwrap(), [&all[..], &[1, 2]].concat());
    assert_eq!((&view(&store, &tenant, new.id).1, &view(&store, &tenant, new.id).2), (&all, &turns));
    assert_eq!(store.tokens(tenant.id, fork).unwrap(), all[..50]);
}

/// An import that is cut off at any call leaves all of the session or nothing, so that it can be tried again.
#[test]
fn an_import_is_whole_or_not_there() {
    for (durability, ending) in [(Durability::Async, Ending::Kill), (Durability::Turn, Ending::PowerLoss)] {
        let (bundle, (info, all, _)) = bundle(durability);
        let called = ImportAs { id: Some(info.id), name: None };
        for fails in [false, true] {
            for at in 1.. {
                let rig =
                    Rig { options: Options { rebase_bytes: 300, ..Rig::new(0).options }, ..Rig::new(at) };
                let (store, _) = rig.open();
                let tenant = store.tenant("t").unwrap();
                store.flush().unwrap();
                let before = rig.disk.calls();
                if fails {
                    rig.disk.fail_at(at)
                } else {
                    rig.disk.die_at(at)
                }
                let imported = import(&store, &tenant, &bundle, called.clone());
                let used = rig.disk.calls() - before;
                let told = imported.is_ok() && !rig.disk.is_dead();
                if told {
                    // What comes after builds on it.
                    let _ = turn(&store, &tenant, info.id, &[7]);
                }
                let held = store.tokens(tenant.id, info.id);
                store.kill();
                rig.disk.restart(ending);
                let (store, report) = rig.open();
                let what = format!("{durability:?}, call {at}, fails {fails}");
                assert!(ending == Ending::PowerLoss || !report.is_damaged(), "{what}: {report:?}");
                assert!(report.damaged_sessions.is_empty(), "{what}: {report:?}");
                let found = store.tokens(store.tenant("t").unwrap().id, info.id);
                match found {
                    Ok(found) if found.len() > all.len() => assert_eq!(found, [&all[..], &[7]].concat()),
                    Ok(found) => assert_eq!(found, all, "{what}"),
                    Err(_) if told => {
                        // At `async` what the journal could not take was in memory.
                        assert!(fails && durability == Durability::Async, "{what}: {held:?}");
                    }
                    Err(_) => {
                        let tenant = store.tenant("t").unwrap();
                        import(&store, &tenant, &bundle, called.clone()).unwrap();
                    }
                }
                if used < at {
                    assert!(told && at > 4, "{what}");
                    break;
                }
            }
        }
    }
}

#[test]
fn an_import_is_bound_by_the_quota() {
    let (bundle, _) = bundle(Durability::Async);
    let rig = Rig::new(3);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    store.set_quota(tenant.id, Quota { sessions: 1, ..Quota::default() });
    import(&store, &tenant, &bundle, ImportAs::default()).unwrap();
    let refused = import(&store, &tenant, &bundle, ImportAs::default());
    assert!(matches!(refused, Err(StoreError::Quota { limit: 1, .. })), "{refused:?}");
}
