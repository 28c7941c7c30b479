//! `mainstay quantize`, and models in GGUF files.

use crate::program::{Scratch, run};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/qwen3");
const GREEDY: [&str; 5] = ["--temperature", "0", "--max-tokens", "24", "--threads=1"];

fn ask(words: &[&str]) -> String {
    let ended = run(&[&["run"], words, &GREEDY].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout
}

#[test]
fn a_file_answers_as_its_checkpoint() {
    let scratch = Scratch::new();
    let path = scratch.0.join("small.gguf").display().to_string();
    let made = run(&["quantize", MODEL, &path, "--type", "f32"]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    assert!(made.stdout.contains("bits a weight"), "{}", made.stdout);
    let raw = ["--raw", "-p", "Long most people they"];
    let answers = [&path, MODEL].map(|model| ask(&[&[model], &raw[..]].concat()));
    assert_eq!(answers[0], answers[1], "f32 is what the checkpoint is in");

    let again = run(&["quantize", MODEL, &path, "--type", "q8_0"]);
    assert_eq!(again.code, Some(2), "{}", again.stderr);
    assert!(again.stderr.contains("this file exists"), "{}", again.stderr);
    let forced = run(&["quantize", MODEL, &path, "--type", "q8_0", "--force", "--threads", "1"]);
    assert_eq!(forced.code, Some(0), "{}", forced.stderr);
    let bytes = std::fs::read(&path).expect("a file");
    let other = scratch.0.join("other.gguf").display().to_string();
    assert_eq!(run(&["quantize", MODEL, &other, "--type", "Q8_0", "--threads", "3"]).code, Some(0));
    assert!(bytes == std::fs::read(&other).expect("a file"), "threads do not show");
    let entries = std::fs::read_dir(&scratch.0).expect("a directory").count();
    assert_eq!(entries, 2, "nothing half-done is left");
    assert!(!ask(&[&[path.as_str()], &raw[..]].concat()).is_empty());
}

#[test]
fn weights_are_quantized_at_load() {
    for quant in ["q8", "q4"] {
        let answer = ask(&["-p", "My name is Anna. What is my name?", "--quant", quant]);
        assert!(answer.contains("Anna"), "{quant}: {answer:?}");
    }
    assert_eq!(run(&["run", "-p", "x", "--quant", "q2"]).code, Some(2));
}

#[test]
fn bad_arguments_are_told() {
    let scratch = Scratch::new();
    let path = scratch.0.join("x.gguf").display().to_string();
    for (words, expected) in [
        (["quantize", "/no/such/dir", &path, "--type=q8_0"], "expected a directory"),
        (["quantize", MODEL, "x.bin", "--type=q8_0"], "ending in .gguf"),
        (["quantize", MODEL, &path, "--type=q9"], "expected one of f32"),
    ] {
        let ended = run(&words);
        assert_eq!(ended.code, Some(2), "{words:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{words:?}: {}", ended.stderr);
    }
    std::fs::write(&path, b"GGUF").expect("a file");
    let ended = run(&["run", &path, "-p", "x"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("the version: expected 4 bytes"), "{}", ended.stderr);
}
