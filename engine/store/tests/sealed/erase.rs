//! Nothing of a prompt can be read without the master key, and nothing of a deleted tenant with it.

use mainstay_store::{
    At, Durability, InFlight, MasterKey, Options, Settings, Store, StoreError, Tenant,
    disk::Disk,
    sim::{Ending, SimDisk},
};

use crate::rig::{Rig, headers, payload, read_pages, root, settings, tokens, turn, write_pages};

const NAME: &str = "a session's name";
const META: &[u8] = b"the server's metadata";

/// What must not be found, each with what it is.
fn needles(tenant: &Tenant, all: &[u32]) -> Vec<(String, Vec<u8>)> {
    let mut needles: Vec<(String, Vec<u8>)> = vec![
        ("name".into(), NAME.into()),
        ("metadata".into(), META.into()),
        ("tenant".into(), b"a tenant's name".to_vec()),
        ("model".into(), b"the model's name".to_vec()),
        ("root".into(), root(tenant).0.to_vec()),
    ];
    for header in headers(tenant, all) {
        let payload = payload(&header);
        needles.push(("key".into(), header.name.key.0.to_vec()));
        needles.push(("payload".into(), payload[100..132].to_vec()));
        needles.push(("digest".into(), blake3::hash(&payload).as_bytes().to_vec()));
        for run in header.tokens.chunks_exact(4) {
            needles.push(("tokens of a page".into(), run.iter().flat_map(|t| t.to_le_bytes()).collect()));
        }
    }
    for run in all.chunks_exact(4) {
        let mut leb = Vec::new();
        for &token in run {
            let mut rest = token;
            while rest >= 0x80 {
                leb.push(rest as u8 | 0x80);
                rest >>= 7;
            }
            leb.push(rest as u8);
        }
        needles.push(("tokens of a turn".into(), leb));
    }
    needles
}

fn found(disk: &SimDisk, needles: &[(String, Vec<u8>)]) -> Vec<String> {
    let files = disk.files();
    let is_there = |needle: &[u8]| files.values().any(|file| file.windows(needle.len()).any(|w| w == needle));
    needles.iter().filter(|(_, needle)| is_there(needle)).map(|(what, _)| what.clone()).collect()
}

/// Everything a session can leave on disk: turns, a fork, an answer, a base, pages, tails, an index.
fn work(rig: &Rig, all: &[u32]) -> (Store, Tenant) {
    let (store, _) = rig.open();
    let tenant = store.tenant("a tenant's name").unwrap();
    let named = Settings {
        name: Some(NAME.into()),
        meta: META.into(),
        model: "the model's name".into(),
        ..settings(&tenant, Durability::Turn)
    };
    let id = store.create(tenant.id, named).unwrap().id;
    turn(&store, &tenant, id, &all[..70]).unwrap();
    write_pages(&store, &tenant, all);
    store.flush().unwrap();
    let in_flight = InFlight { meta: META.into(), tokens: all[70..].to_vec() };
    store.begin_answer(tenant.id, id, None, in_flight).unwrap();
    let fork = store.fork(tenant.id, id, At::Token(40), None).unwrap().id;
    turn(&store, &tenant, fork, &all[40..]).unwrap();
    (store, tenant)
}

fn rig(master: Option<u8>) -> Rig {
    let master_key = master.map(|byte| MasterKey::new([byte; 32]));
    let base = Rig::new(1);
    Rig {
        options: Options { master_key, rebase_bytes: 900, segment_bytes: 30 << 10, ..base.options },
        ..base
    }
}

#[test]
fn nothing_of_a_prompt_is_on_disk() {
    let all = tokens(5, 120);
    for master in [None, Some(7)] {
        let rig = rig(master);
        let (store, tenant) = work(&rig, &all);
        let needles = needles(&tenant, &all);
        let live = found(&rig.disk, &needles);
        store.close().unwrap();
        let closed = found(&rig.disk, &needles);
        if master.is_some() {
            assert_eq!((live, closed), (vec![], vec![]));
            continue;
        }
        // Where nothing is sealed all of it is found: the search works.
        let missing: Vec<_> = needles.iter().map(|(what, _)| what).filter(|w| !closed.contains(w)).collect();
        assert!(missing.is_empty() && closed.len() > needles.len() / 2, "{missing:?} of {}", needles.len());
    }
}

#[test]
fn equal_pages_and_turns_of_two_tenants_are_stored_as_other_bytes() {
    let rig = rig(Some(7));
    let (store, _) = rig.open();
    let all = vec![5; 32];
    let (mut sizes, zeros) = (Vec::new(), vec![0; 500].into_boxed_slice());
    for name in ["a", "b", "c"] {
        let tenant = store.tenant(name).unwrap();
        let header = headers(&tenant, &all).remove(0);
        store.write(header, zeros.clone(), *blake3::hash(&zeros).as_bytes());
        store.flush().unwrap();
        sizes.push(store.page_bytes(tenant.id));
    }
    store.close().unwrap();
    let files = rig.disk.files();
    let payloads: Vec<_> =
        files.iter().filter(|(p, _)| p.starts_with("seg")).map(|(_, b)| &b[8192..8692]).collect();
    assert_eq!((payloads.len(), sizes), (3, vec![8192; 3]));
    assert!(payloads[0] != payloads[1] && payloads[1] != payloads[2] && payloads[0] != payloads[2]);
}

#[test]
fn what_a_deleted_tenant_left_in_older_files_opens_no_more() {
    let all = tokens(6, 100);
    let rig = Rig { options: Options { rebase_bytes: 1 << 20, ..rig(Some(7)).options }, ..rig(Some(7)) };
    let (store, gone) = work(&rig, &all);
    let other = store.tenant("other").unwrap();
    let id = store.create(other.id, settings(&other, Durability::Turn)).unwrap().id;
    turn(&store, &other, id, &all).unwrap();
    write_pages(&store, &other, &all);
    store.flush().unwrap();
    // Somebody kept all files but those of the keys.
    let kept = rig.disk.copy(2);
    store.delete_tenant(gone.id).unwrap();
    assert!(store.list(gone.id, None, 9).is_empty());
    let left: Vec<_> = rig.disk.files().into_keys().filter(|path| path.starts_with("tenants")).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    drop(store);
    for path in kept.files().into_keys().filter(|path| path.starts_with("tenants") && !left.contains(path)) {
        kept.remove(&path).unwrap();
    }
    kept.sync_dir("tenants").unwrap();
    let used = |disk: &SimDisk| disk.files().into_keys().filter(|path| path.starts_with("seg")).count();
    let thief = Rig { disk: kept.clone(), ..self::rig(Some(7)) };
    for comes_back in [false, true] {
        let (store, report) = thief.open();
        assert!(!report.is_damaged(), "{report:?}");
        // Told once; the new base is without them.
        assert_eq!(report.erased_entries > 0, !comes_back, "{report:?}");
        let tenant = if comes_back { store.tenant("a tenant's name").unwrap() } else { gone };
        assert!(store.list(tenant.id, None, 9).is_empty());
        assert!(store.list(gone.id, None, 9).is_empty());
        assert_eq!((read_pages(&store, &tenant, &all), read_pages(&store, &gone, &all)), (0, 0));
        assert_eq!(store.tokens(other.id, id).unwrap(), all);
        assert_eq!(read_pages(&store, &other, &all), 4);
        let files = used(&kept);
        store.maintain().unwrap();
        assert_eq!(used(&kept) < files, !comes_back, "its segments go");
        assert!(store.verify().unwrap().damage.is_empty());
        store.close().unwrap();
        kept.restart(Ending::Kill);
    }
}

#[test]
fn a_deleted_tenant_takes_nothing_more() {
    let rig = rig(Some(7));
    let (store, gone) = work(&rig, &tokens(7, 100));
    store.delete_tenant(gone.id).unwrap();
    let made = store.create(gone.id, settings(&gone, Durability::Async));
    assert!(matches!(made, Err(StoreError::Journal(_))), "{made:?}");
    write_pages(&store, &gone, &tokens(8, 64));
    store.flush().unwrap();
    assert_eq!(read_pages(&store, &gone, &tokens(8, 64)), 0);
    let other = store.tenant("other").unwrap();
    let id = store.create(other.id, settings(&other, Durability::Turn)).unwrap().id;
    turn(&store, &other, id, &[1]).unwrap();
    store.close().unwrap();
    let (store, report) = rig.open();
    assert!(report.was_closed && !report.is_damaged() && report.erased_entries == 0, "{report:?}");
    assert_eq!(store.tokens(other.id, id).unwrap(), [1]);
}
