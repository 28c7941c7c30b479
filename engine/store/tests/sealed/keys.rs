//! A directory keeps to the master key it was made with, and nothing is touched for another.

use std::collections::BTreeMap;

use mainstay_store::{Durability, MasterKey, Options, StoreError, disk::Disk, sim::SimDisk};

use crate::rig::{Rig, read_pages, settings, tokens, turn, write_pages};

fn with(disk: &SimDisk, master: Option<u8>) -> Rig {
    let master_key = master.map(|byte| MasterKey::new([byte; 32]));
    Rig { disk: disk.clone(), options: Options { master_key, ..Rig::new(0).options }, ..Rig::new(0) }
}

/// A closed store with a session of two pages.
fn filled(master: Option<u8>) -> (SimDisk, Vec<u32>) {
    let rig = with(&SimDisk::new(1), master);
    let (store, _) = rig.open();
    let tenant = store.tenant("t").unwrap();
    let id = store.create(tenant.id, settings(&tenant, Durability::Full)).unwrap().id;
    let all = tokens(1, 64);
    write_pages(&store, &tenant, &all);
    turn(&store, &tenant, id, &all).unwrap();
    store.close().unwrap();
    (rig.disk, all)
}

fn refused(disk: &SimDisk, master: Option<u8>) -> (StoreError, BTreeMap<String, Vec<u8>>) {
    (with(disk, master).try_open().map(|_| ()).unwrap_err(), disk.files())
}

#[test]
fn no_key_or_another_is_refused_and_nothing_is_touched() {
    let (disk, all) = filled(Some(7));
    // Copies that could be mended stay as they are, too.
    disk.remove("config.b").unwrap();
    let before = disk.files();
    let id = |byte| {
        let id = MasterKey::new([byte; 32]).id();
        id.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    for (given, shown) in [(None, "none".to_owned()), (Some(8), id(8))] {
        let (e, after) = refused(&disk, given);
        let StoreError::Sealed { expected, found } = e else { panic!("{e}") };
        assert_eq!((expected, found), (id(7), shown));
        assert_eq!(after, before);
    }
    let (store, report) = with(&disk, Some(7)).open();
    assert!(report.was_closed && !report.is_damaged(), "{report:?}");
    assert_eq!(read_pages(&store, &store.tenant("t").unwrap(), &all), 2);
}

#[test]
fn a_key_for_a_directory_that_was_made_without_is_refused() {
    let (disk, all) = filled(None);
    let before = disk.files();
    let (e, after) = refused(&disk, Some(7));
    assert!(matches!(e, StoreError::NotSealed { .. }), "{e}");
    assert_eq!(after, before);
    let (store, _) = with(&disk, None).open();
    assert_eq!(read_pages(&store, &store.tenant("t").unwrap(), &all), 2);
}

#[test]
fn a_tenant_whose_two_copies_are_damaged_is_lost_only_by_will() {
    let (disk, _) = filled(Some(7));
    let paths: Vec<_> = disk.files().into_keys().filter(|path| path.starts_with("tenants")).collect();
    assert_eq!(paths.len(), 2);
    for path in &paths {
        let mut bytes = disk.files()[path].clone();
        *bytes.last_mut().unwrap() ^= 1;
        disk.set(path, bytes);
    }
    let before = disk.files();
    let (e, after) = refused(&disk, Some(7));
    assert!(matches!(&e, StoreError::Lost { path } if path.starts_with("tenants/")), "{e}");
    assert_eq!(after, before);
    for path in &paths {
        disk.remove(path).unwrap();
    }
    let (store, report) = with(&disk, Some(7)).open();
    let tenant = store.tenant("t").unwrap();
    assert!(store.list(tenant.id, None, 9).is_empty());
    // Its ciphertext is kept for the case that it was no will.
    assert!(report.erased_entries >= 2 && !report.quarantined.is_empty(), "{report:?}");
}

#[test]
fn a_master_key_of_the_directory_is_not_in_it() {
    let (disk, _) = filled(Some(7));
    let key = [7; 32];
    assert!(!disk.files().values().any(|file| file.windows(32).any(|window| window == key)));
}
