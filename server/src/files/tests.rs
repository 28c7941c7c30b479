//! What a crash leaves between any two steps is a file or nothing; tenants do not see each other's.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// A directory of its own, gone with it.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let made = MADE.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("mainstay-files-{}-{made}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.clone()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open(directory: &Directory) -> Files {
    Files::open(directory.path().join("files")).unwrap()
}

fn about(filename: &str) -> About {
    About { filename: filename.to_owned(), purpose: "batch".to_owned(), lifetime_s: None }
}

fn write(files: &Files, tenant: &str, text: &str) -> FileRecord {
    let mut draft = files.begin(tenant).unwrap();
    let (first, second) = text.split_at(text.len() / 2);
    draft.write(first.as_bytes()).unwrap();
    draft.write(second.as_bytes()).unwrap();
    files.keep(draft, about(text)).unwrap()
}

fn on_disk(files: &Files, tenant: &str) -> Vec<String> {
    let paths = durable::entries(&files.root.join(directory_of(tenant))).unwrap();
    let mut names: Vec<String> = paths.iter().map(|path| name(path)).collect();
    names.sort();
    names
}

#[test]
fn files_are_found_again_and_belong_to_their_tenant() {
    let directory = Directory::new();
    let files = open(&directory);
    let made = [write(&files, "a", "one"), write(&files, "a", "two!"), write(&files, "b", "three")];
    for files in [files, open(&directory)] {
        let mut own = made[..2].to_vec();
        own.sort_by(|a, b| a.id.cmp(&b.id));
        assert_eq!(files.list("a"), own);
        assert_eq!(files.list("b"), made[2..]);
        assert_eq!(files.list("c"), []);
        assert_eq!(std::fs::read_to_string(files.contents("a", &made[1].id)).unwrap(), "two!");
        assert_eq!(files.get("a", &made[0].id).as_ref(), Some(&made[0]));
        for (tenant, id) in [("a", &made[2].id), ("b", &made[0].id), ("a", &"../x".to_owned())] {
            assert_eq!(files.get(tenant, id), None);
            assert!(!files.delete(tenant, id).unwrap());
        }
    }
    let files = open(&directory);
    assert!(files.delete("a", &made[0].id).unwrap());
    assert!(!files.delete("a", &made[0].id).unwrap());
    assert_eq!(on_disk(&files, "a").len(), 2);
    assert_eq!(open(&directory).list("a"), made[1..2]);
}

#[test]
fn a_crash_between_two_steps_leaves_a_file_or_nothing() {
    let directory = Directory::new();
    let files = open(&directory);
    let kept = write(&files, "a", "kept");
    let mut half = files.begin("a").unwrap();
    half.write(b"half").unwrap();
    std::mem::forget(half);
    let mut nameless = files.begin("a").unwrap();
    nameless.write(b"without a record").unwrap();
    nameless.publish_contents().unwrap();
    std::mem::forget(nameless);
    let deleted = write(&files, "a", "deleted");
    durable::remove(&files.contents("a", &deleted.id).with_extension(RECORD)).unwrap();
    std::fs::write(files.contents("a", "file-torn").with_extension("json.tmp"), b"{\"form").unwrap();
    assert_eq!(on_disk(&files, "a").len(), 6);
    let files = open(&directory);
    assert_eq!(files.list("a"), std::slice::from_ref(&kept));
    assert_eq!(on_disk(&files, "a"), [format!("{}.data", kept.id), format!("{}.json", kept.id)]);
}

#[test]
fn what_is_not_understood_is_left_out_and_let_alone() {
    let directory = Directory::new();
    let files = open(&directory);
    let [newer, cut, swapped] = ["newer", "cut", "swapped"].map(|text| write(&files, "a", text));
    let record = |id: &str| files.contents("a", id).with_extension(RECORD);
    let text = std::fs::read_to_string(record(&newer.id)).unwrap();
    std::fs::write(record(&newer.id), text.replace("\"format\":1", "\"format\":2")).unwrap();
    std::fs::write(files.contents("a", &cut.id), b"c").unwrap();
    let text = std::fs::read_to_string(record(&swapped.id)).unwrap();
    std::fs::write(record(&swapped.id), text.replace(&swapped.id, "file-other")).unwrap();
    let before = on_disk(&files, "a");
    let files = open(&directory);
    assert_eq!(files.list("a"), []);
    assert_eq!(on_disk(&files, "a"), before);
}

#[test]
fn a_draft_that_is_dropped_and_a_file_whose_time_is_over_leave_nothing() {
    let directory = Directory::new();
    let files = open(&directory);
    drop(files.begin("a").unwrap());
    assert_eq!(on_disk(&files, "a"), [""; 0]);
    let draft = files.begin("a").unwrap();
    let short = files.keep(draft, About { lifetime_s: Some(60), ..about("short") }).unwrap();
    let long = write(&files, "a", "long");
    assert_eq!(short.expires_at, Some(short.created_at + 60));
    files.sweep(short.created_at + 59).unwrap();
    assert_eq!(files.list("a").len(), 2);
    files.sweep(short.created_at + 60).unwrap();
    assert_eq!(files.list("a"), [long]);
    assert_eq!(on_disk(&files, "a").len(), 2);
    let draft = files.begin("a").unwrap();
    let over = files.keep(draft, About { lifetime_s: Some(0), ..about("over") }).unwrap();
    assert_eq!(files.get("a", &over.id), None);
    assert_eq!(open(&directory).list("a").len(), 1);
}

#[test]
fn a_file_can_be_written_again_under_its_id() {
    let directory = Directory::new();
    let files = open(&directory);
    for text in ["first", "second, longer"] {
        let mut draft = files.begin_as("a", "file-x".to_owned()).unwrap();
        draft.write(text.as_bytes()).unwrap();
        files.keep(draft, about("out")).unwrap();
        assert_eq!(std::fs::read_to_string(files.contents("a", "file-x")).unwrap(), text);
    }
    assert_eq!(open(&directory).list("a").len(), 1);
}
