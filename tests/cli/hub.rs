//! Models from a hub: what is fetched, what a broken transfer leaves, what the hub's refusals become.

use std::fs;
use std::path::PathBuf;

use crate::hub_server::{Asked, COMMIT, Hub, Manners, OLD_COMMIT, OLD_CONFIG};
use crate::program::{Ended, Scratch, mainstay};

const WEIGHTS: &str = "model.safetensors";

fn weights() -> Vec<u8> {
    (0..200_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761)).to_le_bytes()).collect()
}

fn files() -> std::collections::BTreeMap<&'static str, Vec<u8>> {
    [
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"a\": 1}".to_vec()),
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
        (WEIGHTS, weights()),
        ("pytorch_model.bin", b"not wanted".to_vec()),
        ("README.md", b"not wanted either".to_vec()),
        ("onnx/config.json", b"nor this".to_vec()),
    ]
    .into()
}

fn pull(hub: &Hub, home: &Scratch, token: Option<&str>) -> Ended {
    let mut command = mainstay(&["pull", "org/name"]);
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", &home.0);
    command.envs(token.map(|t| ("HF_TOKEN", t)));
    command.output().unwrap().into()
}

fn with_hub(hub: &Hub, home: &Scratch, words: &[&str]) -> Ended {
    let mut command = mainstay(words);
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", &home.0);
    command.output().unwrap().into()
}

fn snapshot(home: &Scratch) -> PathBuf {
    home.0.join("hub/models--org--name/snapshots").join(COMMIT)
}

fn gets(asked: &[Asked]) -> Vec<&Asked> {
    asked.iter().filter(|a| a.method == "GET" && a.path.ends_with(WEIGHTS)).collect()
}

fn good(ended: &Ended, home: &Scratch) {
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(PathBuf::from(ended.stdout.trim()), snapshot(home));
    assert!(fs::read(snapshot(home).join(WEIGHTS)).unwrap() == weights(), "the weights differ");
    let blobs = fs::read_dir(home.0.join("hub/models--org--name/blobs")).unwrap();
    let left = blobs.flatten().filter(|e| e.file_name().to_string_lossy().ends_with(".incomplete")).count();
    assert_eq!(left, 0, "a partial file is left");
}

#[test]
fn only_what_is_needed_is_fetched_and_only_once() {
    let (hub, home) = (Hub::start(files(), Manners::default()), Scratch::new());
    good(&pull(&hub, &home, None), &home);
    let mut names: Vec<_> = fs::read_dir(snapshot(&home))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["chat_template.jinja", "config.json", WEIGHTS, "tokenizer.json"]);
    let reference = fs::read_to_string(home.0.join("hub/models--org--name/refs/main")).unwrap();
    assert_eq!(reference, COMMIT);
    hub.asked();
    good(&pull(&hub, &home, None), &home);
    let again = hub.asked();
    assert!(again.iter().all(|a| a.path.starts_with("/api/")), "files are asked for again: {again:?}");
}

#[test]
fn a_broken_transfer_is_continued() {
    let manners = Manners { cuts: vec![(WEIGHTS, vec![300_000, 100_000, usize::MAX])], ..Manners::default() };
    let (hub, home) = (Hub::start(files(), manners), Scratch::new());
    good(&pull(&hub, &home, None), &home);
    let asked = hub.asked();
    let ranges: Vec<_> = gets(&asked).iter().map(|a| a.range.clone()).collect();
    assert_eq!(ranges.len(), 3, "{ranges:?}");
    assert_eq!(ranges[0], None);
    // how much of a cut transfer arrives is the network's choice; that it is continued there is ours
    let starts: Vec<usize> = ranges[1..]
        .iter()
        .map(|r| {
            r.as_deref().unwrap().strip_prefix("bytes=").unwrap().split('-').next().unwrap().parse().unwrap()
        })
        .collect();
    assert!(0 < starts[0] && starts[0] <= 300_000 && starts[0] < starts[1], "{starts:?}");
}

#[test]
fn the_next_run_continues_what_a_failed_one_left() {
    let broken = Manners { cuts: vec![(WEIGHTS, vec![500_000, 0])], ..Manners::default() };
    let (hub, home) = (Hub::start(files(), broken), Scratch::new());
    let failed = pull(&hub, &home, None);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("continues it"), "{}", failed.stderr);
    hub.asked();
    hub.behave(Manners::default());
    good(&pull(&hub, &home, None), &home);
    let asked = hub.asked();
    assert!(gets(&asked)[0].range.is_some(), "it began again: {asked:?}");
}

#[test]
fn a_hub_that_ignores_ranges_costs_time_only() {
    let cuts = vec![(WEIGHTS, vec![300_000, usize::MAX])];
    let manners = Manners { cuts, ignores_ranges: true, ..Manners::default() };
    let (hub, home) = (Hub::start(files(), manners), Scratch::new());
    good(&pull(&hub, &home, None), &home);
}

#[test]
fn a_hub_without_trees_is_asked_for_each_name() {
    let manners = Manners { no_tree: true, ..Manners::default() };
    let (hub, home) = (Hub::start(files(), manners), Scratch::new());
    good(&pull(&hub, &home, None), &home);
}

#[test]
fn wrong_bytes_are_not_kept() {
    let manners = Manners { lies: true, ..Manners::default() };
    let (hub, home) = (Hub::start(files(), manners), Scratch::new());
    let failed = pull(&hub, &home, None);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("SHA-256"), "{}", failed.stderr);
    hub.behave(Manners::default());
    good(&pull(&hub, &home, None), &home);
}

#[test]
fn a_token_is_asked_for_and_sent() {
    let manners = Manners { token: Some("hf_secret"), ..Manners::default() };
    let (hub, home) = (Hub::start(files(), manners), Scratch::new());
    let failed = pull(&hub, &home, None);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("HF_TOKEN") && failed.stderr.contains("401"), "{}", failed.stderr);
    good(&pull(&hub, &home, Some("hf_secret")), &home);
}

#[test]
fn what_does_not_exist_is_said() {
    let (hub, home) = (Hub::start(files(), Manners::default()), Scratch::new());
    for (id, part) in [("org/other", "404"), ("org/name@v9", "`v9`")] {
        let mut command = mainstay(&["pull", id]);
        command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", &home.0);
        let failed = Ended::from(command.output().unwrap());
        assert_eq!(failed.code, Some(1));
        assert!(failed.stderr.contains(part), "{id}: {}", failed.stderr);
    }
}

#[test]
fn without_the_hub_the_cache_serves() {
    let (hub, home) = (Hub::start(files(), Manners::default()), Scratch::new());
    good(&pull(&hub, &home, None), &home);
    let nobody = hub.unreachable();
    let ended = pull(&nobody, &home, None);
    good(&ended, &home);
    assert!(ended.stderr.contains("using the copy"), "{}", ended.stderr);
    let empty = Scratch::new();
    let failed = pull(&nobody, &empty, None);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("cannot be reached"), "{}", failed.stderr);
}

#[test]
fn a_fetched_model_answers() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/default");
    let names = ["config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"];
    let files = names.map(|name| (name, fs::read(dir.join(name)).unwrap()));
    let (hub, home) = (Hub::start(files.into(), Manners::default()), Scratch::new());
    let words = ["-p", "Hello!", "--temperature", "0", "--max-tokens", "8"];
    let mut command = mainstay(&["run", "org/name"]);
    command.args(words).env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", &home.0);
    let fetched = Ended::from(command.output().unwrap());
    assert_eq!(fetched.code, Some(0), "{}", fetched.stderr);
    let embedded = Ended::from(mainstay(&["run"]).args(words).output().unwrap());
    assert_eq!(fetched.stdout, embedded.stdout);
}

#[test]
fn a_model_that_is_not_given_to_everybody_says_what_to_do() {
    let manners = Manners { is_gated: true, ..Manners::default() };
    let (hub, home) = (Hub::start(files(), manners), Scratch::new());
    let failed = pull(&hub, &home, Some("hf_secret"));
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("403") && failed.stderr.contains("ask for access"), "{}", failed.stderr);
    assert!(!failed.stderr.contains("hf_secret"), "{}", failed.stderr);
}

#[test]
fn offline_asks_nobody() {
    let (hub, home) = (Hub::start(files(), Manners::default()), Scratch::new());
    let failed = with_hub(&hub, &home, &["pull", "org/name", "--offline"]);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("offline") && failed.stderr.contains("`main`"), "{}", failed.stderr);
    good(&pull(&hub, &home, None), &home);
    hub.asked();
    good(&with_hub(&hub, &home, &["pull", "org/name", "--offline"]), &home);
    let mut command = mainstay(&["pull", "org/name"]);
    command.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", &home.0).env("HF_HUB_OFFLINE", "1");
    good(&command.output().unwrap().into(), &home);
    assert_eq!(hub.asked(), []);
}

#[test]
fn a_revision_is_pinned_listed_and_removed() {
    let (hub, home) = (Hub::start(files(), Manners::default()), Scratch::new());
    good(&pull(&hub, &home, None), &home);
    let old = with_hub(&hub, &home, &["pull", "org/name", "--revision", "v1"]);
    let old_snapshot = home.0.join("hub/models--org--name/snapshots").join(OLD_COMMIT);
    assert_eq!(PathBuf::from(old.stdout.trim()), old_snapshot, "{}", old.stderr);
    assert_eq!(fs::read(old_snapshot.join("config.json")).unwrap(), OLD_CONFIG);
    assert_eq!(with_hub(&hub, &home, &["pull", "org/name@v1"]).stdout, old.stdout);
    let refused = with_hub(&hub, &home, &["pull", "org/name@v1", "--revision", "main"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    let listed = with_hub(&hub, &home, &["models", "ls"]).stdout;
    for part in ["org/name", "* main (0123456789ab)", "  v1 (89abcdef0123)", "781 KiB"] {
        assert!(listed.contains(part), "{part}: {listed}");
    }
    let unasked = with_hub(&hub, &home, &["models", "rm", "org/name@v1"]);
    assert_eq!(unasked.code, Some(2));
    assert!(unasked.stderr.contains("--yes") && old_snapshot.exists(), "{}", unasked.stderr);
    let unknown = with_hub(&hub, &home, &["models", "rm", "org/name@v2", "--yes"]);
    assert_eq!(unknown.code, Some(1));
    assert!(unknown.stderr.contains("`v2`") && unknown.stderr.contains("v1 (89"), "{}", unknown.stderr);
    let removed = with_hub(&hub, &home, &["models", "rm", "org/name@v1", "--yes"]);
    assert_eq!((removed.code, removed.stdout.trim()), (Some(0), "13 B freed"), "{}", removed.stderr);
    assert!(!old_snapshot.exists());
    // What the other revision needs is still there, without the hub.
    good(&with_hub(&hub.unreachable(), &home, &["pull", "org/name", "--offline"]), &home);
    let removed =
        with_hub(&Hub::start(files(), Manners::default()), &home, &["models", "rm", "org/name", "--yes"]);
    assert_eq!(removed.code, Some(0), "{}", removed.stderr);
    assert!(!home.0.join("hub/models--org--name").exists());
}

#[test]
fn one_gguf_file_of_many_is_fetched() {
    let names =
        ["m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "mmproj-F16.gguf"];
    let files = names.map(|name| (name, name.as_bytes().to_vec()));
    let (hub, home) = (Hub::start(files.into(), Manners::default()), Scratch::new());
    let fetched = |id: &str| {
        let ended = with_hub(&hub, &home, &["pull", id]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let asked = hub.asked();
        let gets = asked.iter().filter(|a| a.method == "GET" && a.path.ends_with(".gguf")).count();
        (ended.stdout.trim().rsplit('/').next().unwrap().to_owned(), gets)
    };
    assert_eq!(fetched("org/name:q8_0"), (names[1].to_owned(), 2));
    assert_eq!(fetched("org/name"), (names[0].to_owned(), 1));
    assert_eq!(fetched("org/name:m-Q4_K_M.gguf"), (names[0].to_owned(), 0));
    let failed = with_hub(&hub, &home, &["pull", "org/name:Q5_K_M"]);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("m-Q8_0.gguf") && failed.stderr.contains("`Q5_K_M`"), "{}", failed.stderr);
    let offline = with_hub(&hub, &home, &["pull", "org/name:Q8_0", "--offline"]);
    assert!(offline.stdout.trim().ends_with(names[1]), "{}", offline.stderr);
}
