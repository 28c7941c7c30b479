//! Bad arguments: exit code 2 and one clear line.

use std::net::TcpListener;

use crate::program::{Scratch, mainstay, run};

fn refused(words: &[&str]) -> String {
    let ended = run(words);
    assert_eq!(ended.code, Some(2), "{words:?}: {}", ended.stderr);
    assert_eq!(ended.stdout, "", "{words:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{words:?}: {}", ended.stderr);
    ended.stderr
}

#[test]
fn bad_arguments_end_with_2_and_one_line() {
    let cases: [(&[&str], &str); 13] = [
        (&["serve", "--no-such-option"], "--no-such-option"),
        (&["serve", "--port", "many"], "many"),
        (&["no-such-command"], "no-such-command"),
        (&["serve", "--backend", "cuda"], "not in this version"),
        (&["serve", "--backend", "neuron"], "not in this version"),
        (&["serve", "model.gguf"], "no such file"),
        (&["serve", "/no/such/dir"], "no such directory"),
        (&["serve", "--host", "0.0.0.0"], "--insecure"),
        (&["serve", "--kv-memory", "lots"], "lots"),
        (&["serve", "--kv-memory", "1K"], "--kv-memory"),
        (&["serve", "--context", "100000"], "8192"),
        (&["run"], "-p"),
        (&["chat", "--url", "ftp://x"], "http://"),
    ];
    for (words, part) in cases {
        let line = refused(words);
        assert!(line.contains(part), "{words:?}: {line}");
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    let version = run(&["--version"]);
    assert_eq!(
        (version.code, version.stdout.trim()),
        (Some(0), concat!("mainstay ", env!("CARGO_PKG_VERSION")))
    );
    let help = run(&["serve", "--help"]);
    assert_eq!(help.code, Some(0));
    assert!(help.stdout.contains("--kv-memory"));
}

#[test]
fn a_file_is_checked_like_the_command_line() {
    let scratch = Scratch::new();
    let refuse = |name: &str, text: &str| {
        let file = scratch.0.join(name);
        std::fs::write(&file, text).unwrap();
        refused(&["serve", "--config", &file.to_string_lossy()])
    };
    let line = refuse("key.toml", "prot = 80\n");
    assert!(line.contains("`prot`") && line.contains("key.toml"), "{line}");
    let line = refuse("value.toml", "port = \"many\"\n");
    assert!(line.contains("many") && line.contains("value.toml"), "{line}");
    let line = refuse("syntax.toml", "port =\n");
    assert!(line.contains("syntax.toml"), "{line}");
    let line = refuse("open.toml", "host = \"0.0.0.0\"\n");
    assert!(line.contains("--insecure"), "{line}");
    let line = refused(&["serve", "--config", "/no/such/file.toml"]);
    assert!(line.contains("/no/such/file.toml"), "{line}");
}

#[test]
fn the_environment_counts_below_flags() {
    let ended = mainstay(&["serve"]).env("MAINSTAY_BACKEND", "cuda").output().unwrap();
    assert_eq!(ended.status.code(), Some(2));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let words = ["serve", "--backend", "auto", "--port", &port];
    let ended = mainstay(&words).env("MAINSTAY_BACKEND", "cuda").output().unwrap();
    // the flag's backend is fine; the port is taken
    assert_eq!(ended.status.code(), Some(1));
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert!(stderr.contains("in use"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}
