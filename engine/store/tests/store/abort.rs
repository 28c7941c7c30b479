//! A real process on a real disk that aborts at each of its steps: what it printed as done is there.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use mainstay_store::{
    Append, Durability, Options, RealDisk, Settings, Store,
    crash_disk::CrashDisk,
    disk::{Disk, SystemClock, SystemEntropy},
};

use crate::rig::{Rig, hand, headers, read_pages, settings, tokens};

const AT: &str = "MAINSTAY_TEST_ABORT_AT";
const PLACE: &str = "MAINSTAY_TEST_ABORT_PLACE";

/// A directory that is removed in the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let place = Self(std::env::temp_dir().join(format!("mainstay-{name}-{}", std::process::id())));
        place.clear();
        place
    }

    fn clear(&self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Runs one test of this binary in a process of its own, which aborts at `at`.
fn child(test: &str, place: &Path, at: u64) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("abort::{test}"), "--exact", "--nocapture", "--test-threads", "1"]);
    command.env(AT, at.to_string()).env(PLACE, place).output().unwrap()
}

/// The disk that a child was told to use; `None` where this is no child.
fn told() -> Option<Arc<dyn Disk>> {
    let at = std::env::var(AT).ok()?.parse().unwrap();
    let real = RealDisk::new(std::env::var_os(PLACE).unwrap()).unwrap();
    Some(Arc::new(CrashDisk::new(Arc::new(real), at)))
}

#[test]
fn a_child_that_writes_one_file() {
    let Some(disk) = told() else { return };
    let file = disk.create("new").unwrap();
    file.write_at(0, &[7; 100]).unwrap();
    file.sync().unwrap();
    disk.rename("new", "old").unwrap();
    disk.remove("old").unwrap();
}

#[test]
fn each_point_is_before_a_call_or_within_a_write() {
    let place = Place::new("points");
    let expected = [None, Some(("new", 0)), Some(("new", 50)), Some(("new", 100)), Some(("new", 100))];
    let expected = expected.into_iter().chain([Some(("old", 100)), None]);
    for (at, left) in (1..).zip(expected) {
        place.clear();
        let ended = child("a_child_that_writes_one_file", &place.0, at).status;
        assert_eq!(ended.success(), at == 7, "point {at}: {ended}");
        let found: Vec<_> = std::fs::read_dir(&place.0).unwrap().map(Result::unwrap).collect();
        let found = found.first().map(|f| (f.file_name(), f.metadata().unwrap().len()));
        assert_eq!(found, left.map(|(name, bytes)| (name.into(), bytes)), "point {at}");
    }
}

fn options() -> Options {
    Options { rebase_bytes: 400, segment_bytes: 12 << 10, reserve_bytes: 0, ..Rig::new(0).options }
}

#[test]
#[expect(clippy::print_stdout, reason = "a child tells its parent what is done")]
fn a_child_that_serves_turns() {
    let Some(disk) = told() else { return };
    let (store, _) =
        Store::open(disk, Arc::new(SystemClock::default()), Arc::new(SystemEntropy), options()).unwrap();
    let tenant = store.tenant("t").unwrap();
    let named = Settings { name: Some("n".into()), ..settings(&tenant, Durability::Full) };
    let id = match store.find(tenant.id, "n") {
        Ok(id) => id,
        Err(_) => store.create(tenant.id, named).unwrap().id,
    };
    let all = tokens(1, 99);
    loop {
        let held = store.tokens(tenant.id, id).unwrap().len();
        println!("done {held}");
        if held == all.len() {
            break;
        }
        for header in headers(&tenant, &all[..held + 33]) {
            hand(&store, header);
        }
        let append = Append { tokens: all[held..held + 33].to_vec(), ..Append::default() };
        store.append_turn(tenant.id, id, append).unwrap();
    }
    store.maintain().unwrap();
    store.close().unwrap();
}

#[test]
fn an_aborted_process_loses_nothing_acknowledged() {
    let place = Place::new("abort");
    let all = tokens(1, 99);
    let step = if cfg!(debug_assertions) { 29 } else { 1 };
    let mut at = 1;
    loop {
        place.clear();
        let output = child("a_child_that_serves_turns", &place.0, at);
        let text = String::from_utf8_lossy(&output.stdout);
        let done =
            text.lines().filter_map(|line| line.strip_prefix("done ")?.parse::<usize>().ok()).next_back();
        let (store, report) = Store::open_dir(&place.0, options()).unwrap();
        assert!(!report.is_damaged(), "point {at}: {report:?}");
        let tenant = store.tenant("t").unwrap();
        if let Some(done) = done {
            let id = store.find(tenant.id, "n").unwrap();
            let found = store.tokens(tenant.id, id).unwrap();
            assert!(found.len() >= done && all.starts_with(&found), "point {at}: {found:?} of {done}");
            let pages = done.saturating_sub(1) / 32;
            assert_eq!(read_pages(&store, &tenant, &all[..pages * 32]), pages, "point {at}");
        }
        drop(store);
        if output.status.success() {
            assert!(at > 60 && done == Some(all.len()), "{done:?} after {at} points");
            break;
        }
        at += step;
    }
}
