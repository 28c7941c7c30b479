//! `mainstay run`, `chat` and `doctor`, on an engine of their own and on a server.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::program::{Ended, Scratch, Server, mainstay, run};

fn chat(words: &[&str], input: &str) -> Ended {
    let mut command = mainstay(&["chat"]);
    let mut child = command.args(words).stdin(Stdio::piped()).spawn().expect("the command starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(input.as_bytes()).expect("the child reads");
    drop(stdin);
    child.wait_with_output().expect("the child ends").into()
}

#[test]
fn run_prints_one_answer() {
    let words = ["run", "-p", "Hello!", "--temperature", "0", "--max-tokens", "16"];
    let first = run(&words);
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    assert!(first.stdout.ends_with('\n') && first.stdout.trim().len() > 1, "{:?}", first.stdout);
    assert_eq!(run(&words).stdout, first.stdout, "greedy answers are equal");
    let raw = run(&["run", "--raw", "-p", "Hello!", "--temperature", "0", "--max-tokens", "16"]);
    assert_eq!(raw.code, Some(0), "{}", raw.stderr);
}

#[test]
fn chat_remembers_until_reset() {
    let greedy = ["--temperature", "0", "--max-tokens", "32"];
    let told = chat(&greedy, "My name is Anna.\nWhat is my name?\n");
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    let lines: Vec<&str> = told.stdout.lines().collect();
    assert_eq!(lines.len(), 2, "one answer for each line: {:?}", told.stdout);
    let again = chat(&greedy, "My name is Anna.\n/reset\nWhat is my name?\n\n/quit\nMore\n");
    let alone = chat(&greedy, "What is my name?\n");
    let lines: Vec<&str> = again.stdout.lines().collect();
    assert_eq!(lines.len(), 2, "{:?}", again.stdout);
    assert_eq!(lines[1], alone.stdout.trim_end(), "after /reset nothing is left");
    assert!(chat(&[], "/nonsense\n").stderr.contains("/help"));
}

#[test]
fn a_server_is_used_like_an_engine() {
    let server = Server::start(&["--api-key", "secret"]);
    let url = format!("http://{}", server.address);
    let options = ["--url", &url, "--api-key", "secret", "--temperature", "0", "--max-tokens", "16"];
    let far = chat(&options, "Hello!\n");
    assert_eq!(far.code, Some(0), "{}", far.stderr);
    let near = chat(&options[4..], "Hello!\n");
    assert_eq!(far.stdout, near.stdout);
    let refused = chat(&["--url", &url], "Hello!\n");
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("401"), "{}", refused.stderr);
}

#[test]
fn doctor_tells_in_json() {
    let scratch = Scratch::new();
    let ended = run(&["doctor", "--json", "--data-dir", &scratch.0.to_string_lossy()]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["model"]["answers"], true);
    assert!(report["read_bytes_per_s"].as_f64().unwrap() > 1e8);
    assert_eq!(report["data_dir"]["writable"], true);
    let backends = report["backends"].as_array().unwrap();
    let state = |name: &str| backends.iter().find(|b| b["name"] == name).unwrap()["available"].clone();
    assert_eq!((state("cpu"), state("candle"), state("cuda")), (true.into(), true.into(), false.into()));
}
