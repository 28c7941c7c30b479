//! `mainstay sessions` on a data directory and on a server, and `mainstay chat --session`.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use mainstay_store::{Append, Options, SessionId, Settings, Store};
use serde_json::{Value, json};

use crate::program::{Ended, Scratch, Server, mainstay, run};

const MODEL: &str = "mainstay-default";

/// `mainstay sessions` on a directory.
fn on(dir: &Path, words: &[&str]) -> Ended {
    let dir = dir.to_string_lossy();
    run(&[&["sessions"], words, &["--data-dir", &dir]].concat())
}

#[track_caller]
fn good(ended: Ended) -> String {
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    ended.stdout
}

/// One line on stderr and this exit code.
#[track_caller]
fn bad(ended: Ended, code: i32) -> String {
    assert_eq!(ended.code, Some(code), "{}{}", ended.stdout, ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    ended.stderr
}

fn turn(number: u32, len: u32) -> Append {
    let meta = json!({
        "id": format!("chatcmpl-{number}"),
        "messages": [{"role": "user", "content": format!("question {number}")}],
        "answer": {"role": "assistant", "content": format!("answer {number}")},
        "finish_reason": "stop",
    });
    let tokens = (0..len).map(|i| (number * 131 + i * 7) % 400).collect();
    Append { tokens, meta: meta.to_string().into_bytes(), ..Append::default() }
}

/// A directory with one session of two turns, `notes`, of the tenant `default`, and one of another tenant.
fn filled(dir: &Path) -> SessionId {
    let (store, _) = Store::open_dir(dir, Options::default()).unwrap();
    let tenant = store.tenant("default").unwrap();
    let named = |name: &str| Settings { name: Some(name.into()), model: MODEL.into(), ..Settings::default() };
    let id = store.create(tenant.id, named("notes")).unwrap().id;
    for number in 1..=2 {
        store.append_turn(tenant.id, id, turn(number, 100)).unwrap();
    }
    let other = store.tenant("acme").unwrap();
    store.create(other.id, named("theirs")).unwrap();
    store.close().unwrap();
    id
}

fn listed(dir: &Path) -> Vec<Value> {
    serde_json::from_str(&good(on(dir, &["ls", "--json"]))).unwrap()
}

#[test]
fn a_directory_is_looked_at() {
    let scratch = Scratch::new();
    let dir = scratch.0.join("data");
    let id = filled(&dir);
    let table = good(on(&dir, &["ls"]));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 2, "another tenant's are not shown: {table}");
    assert!(lines[0].starts_with("ID ") && lines[0].ends_with("FLAGS"), "{table}");
    let words: Vec<&str> = lines[1].split_whitespace().collect();
    assert_eq!(words[..5], [format!("sess_{id}").as_str(), "notes", MODEL, "2", "200"]);
    assert!(good(on(&dir, &["ls", "--tenant", "acme"])).contains("theirs"));
    let shown = good(on(&dir, &["show", "notes"]));
    for part in ["turn 2, tokens 100 to 200", "user: question 1", "assistant: answer 2", "durability   async"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let json: Value =
        serde_json::from_str(&good(on(&dir, &["show", &format!("sess_{id}"), "--json"]))).unwrap();
    assert_eq!((&json["object"], &json["turns"][1]["number"]), (&json!("session"), &json!(2)));
    assert_eq!(json["kv"]["reason"], "model_not_loaded");
    let fork = good(on(&dir, &["fork", "notes", "--at-turn", "1", "--name", "branch"]));
    assert!(fork.starts_with("sess_") && fork.lines().count() == 1, "{fork}");
    let sessions = listed(&dir);
    assert_eq!((sessions.len(), &sessions[1]["name"]), (2, &json!("branch")));
    assert_eq!((&sessions[1]["token_count"], &sessions[1]["id"]), (&json!(100), &json!(fork.trim())));
    assert!(bad(on(&dir, &["show", "nobody"]), 1).contains("nobody: there is no such session"));
    let line = bad(on(&dir, &["fork", "notes", "--at-token", "201"]), 1);
    assert!(line.contains("200") && line.contains("201"), "{line}");
    assert!(bad(on(&dir, &["fork", "notes", "--name", "branch"]), 1).contains("branch"));
}

#[test]
fn more_sessions_than_a_page_are_listed() {
    let scratch = Scratch::new();
    let (store, _) = Store::open_dir(&scratch.0, Options::default()).unwrap();
    let tenant = store.tenant("default").unwrap();
    (0..205).for_each(|_| drop(store.create(tenant.id, Settings::default()).unwrap()));
    store.close().unwrap();
    let sessions = listed(&scratch.0);
    let ids: std::collections::BTreeSet<&str> = sessions.iter().map(|s| s["id"].as_str().unwrap()).collect();
    assert_eq!((sessions.len(), ids.len()), (205, 205));
}

#[test]
fn a_session_moves_as_a_file() {
    let scratch = Scratch::new();
    let (from, to, file) = (scratch.0.join("from"), scratch.0.join("to"), scratch.0.join("notes.session"));
    filled(&from);
    let name = file.to_string_lossy();
    let written = on(&from, &["export", "notes", "-o", &name]);
    assert!(written.stderr.contains("written"), "{}", written.stderr);
    assert_eq!(good(written), "");
    let piped =
        mainstay(&["sessions", "export", "notes", "--tokens-only", "--data-dir", &from.to_string_lossy()]);
    let piped = { piped }.output().unwrap().stdout;
    assert_eq!(piped, fs::read(&file).unwrap(), "stdout takes the same");
    let id = good(on(&to, &["import", &name, "--name", "copy", "--tokens-only"]));
    let moved = listed(&to);
    assert_eq!((moved.len(), &moved[0]["id"], &moved[0]["name"]), (1, &json!(id.trim()), &json!("copy")));
    assert_eq!((&moved[0]["turn_count"], &moved[0]["token_count"]), (&json!(2), &json!(200)));
    let mut damaged = piped.clone();
    damaged[200] ^= 1;
    fs::write(&file, damaged).unwrap();
    assert!(bad(on(&to, &["import", &name, "--tokens-only"]), 1).contains("bundle"));
    assert_eq!(listed(&to).len(), 1);
    assert!(bad(on(&to, &["import", "/no/such/file"]), 1).contains("/no/such/file"));
    let gone = scratch.0.join("gone.session");
    bad(on(&from, &["export", "nobody", "--tokens-only", "-o", &gone.to_string_lossy()]), 1);
    let left: Vec<PathBuf> = fs::read_dir(&scratch.0).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.iter().all(|path| !path.to_string_lossy().contains("gone")), "{left:?}");
}

/// No model is loaded anywhere but in the servers: keys and values travel all the same, and are used where they belong.
#[test]
fn a_directory_gives_out_keys_and_values_and_takes_them_in() {
    let scratch = Scratch::new();
    let (from, to, file) = (scratch.0.join("from"), scratch.0.join("to"), scratch.0.join("notes.session"));
    let (near, far) = (from.to_string_lossy(), to.to_string_lossy());
    let name = file.to_string_lossy();
    good(chat(&["--session", "talk", "--data-dir", &near], "My name is Anna. I live in Riga.\n"));
    let unbroken = good(chat(&[], "My name is Anna. I live in Riga.\nWhat is my name?\n"));
    good(on(&from, &["export", "talk", "-o", &name]));
    let with_pages = fs::metadata(&file).unwrap().len();
    let taken = on(&to, &["import", &name, "--name", "talk"]);
    let counted = taken.stderr.contains("pages of keys and values taken, 0 left");
    assert!(counted && !taken.stderr.contains(" 0 pages"), "{}", taken.stderr);
    good(taken);
    let second = chat(&["--session", "talk", "--data-dir", &far], "What is my name?\n");
    assert_eq!(Some(good(second).trim_end()), unbroken.lines().nth(1));
    let server = Server::start(&["--data-dir", &far]);
    let url = format!("http://{}", server.address);
    let shown: Value =
        serde_json::from_str(&good(run(&["sessions", "show", "talk", "--json", "--url", &url]))).unwrap();
    assert_eq!(shown["kv"]["state"], "exact", "{shown}");
    good(on(&from, &["export", "talk", "-o", &name, "--tokens-only"]));
    assert!(fs::metadata(&file).unwrap().len() < with_pages);
}

#[test]
fn an_export_that_breaks_off_leaves_the_file_as_it_was() {
    let scratch = Scratch::new();
    let file = scratch.0.join("notes.session");
    fs::write(&file, "earlier").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let breaks_off = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // The request's head; what it says is of no interest.
        let read = stream.read(&mut [0; 4096]).unwrap();
        assert!(read > 0);
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").unwrap();
    });
    let line = bad(run(&["sessions", "export", "notes", "--url", &url, "-o", &file.to_string_lossy()]), 1);
    assert!(line.contains("broke off"), "{line}");
    breaks_off.join().unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "earlier");
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 1, "half a session is left");
}

#[test]
fn damage_is_found_and_told() {
    let scratch = Scratch::new();
    let dir = scratch.0.join("data");
    filled(&dir);
    let whole = good(on(&dir, &["verify"]));
    for part in ["sessions        2", "journal entries", "proven"] {
        assert!(whole.contains(part), "{whole}");
    }
    let report: Value = serde_json::from_str(&good(on(&dir, &["verify", "--json"]))).unwrap();
    assert!(report["entries"].as_u64().unwrap() >= 5 && report["damage"] == json!([]), "{report}");
    let copy = scratch.0.join("copy");
    good(on(&dir, &["snapshot", &copy.to_string_lossy()]));
    assert_eq!(listed(&copy), listed(&dir));
    let refused = bad(on(&dir, &["snapshot", &copy.to_string_lossy()]), 1);
    assert!(refused.contains("empty") && refused.contains("copy"), "{refused}");
    let journal = fs::read_dir(dir.join("journal")).unwrap().map(|e| e.unwrap().path());
    let journal = journal.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = fs::read(&journal).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&journal, bytes).unwrap();
    let ended = on(&dir, &["verify"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stdout);
    assert!(ended.stdout.contains("damaged") && ended.stdout.contains("journal"), "{}", ended.stdout);
    assert!(ended.stderr.contains("has damage"), "{}", ended.stderr);
    assert_eq!(good(on(&copy, &["verify"])).lines().next(), whole.lines().next());
}

#[test]
fn what_has_expired_is_removed() {
    let scratch = Scratch::new();
    filled(&scratch.0);
    let (store, _) = Store::open_dir(&scratch.0, Options::default()).unwrap();
    let tenant = store.tenant("default").unwrap();
    store.create(tenant.id, Settings { ttl_ms: Some(1), ..Settings::default() }).unwrap();
    store.close().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert!(good(on(&scratch.0, &["gc"])).contains("sessions expired   1"));
    assert!(good(on(&scratch.0, &["gc", "--page-quota", "1M"])).contains("sessions expired   0"));
    assert_eq!(listed(&scratch.0).len(), 1);
}

#[test]
fn a_server_is_asked_like_a_directory() {
    let scratch = Scratch::new();
    let (dir, other) = (scratch.0.join("data"), scratch.0.join("other"));
    filled(&dir);
    let key = ["--api-key", "secret"];
    let start = |dir: &Path| Server::start(&[&key[..], &["--data-dir", &dir.to_string_lossy()]].concat());
    let (server, second) = (start(&dir), start(&other));
    let on_server = |server: &Server, words: &[&str]| {
        let url = format!("http://{}", server.address);
        run(&[&["sessions"], words, &["--url", &url], &key].concat())
    };
    let line = bad(on(&dir, &["ls"]), 1);
    assert!(line.contains("--url") && line.contains(&*dir.to_string_lossy()), "{line}");
    assert!(good(on_server(&server, &["ls"])).contains("notes"));
    let prefetched =
        server.request("POST", "/v1/sessions/notes/prefetch", "Authorization: Bearer secret\r\n", "");
    assert_eq!(prefetched.status, 200, "{}", prefetched.body);
    let file = scratch.0.join("notes.session");
    let name = file.to_string_lossy();
    good(on_server(&server, &["export", "notes", "-o", &name]));
    let pages = fs::metadata(&file).unwrap().len();
    let moved = on_server(&second, &["import", &name, "--name", "moved"]);
    assert!(moved.stderr.contains("200 tokens; ") && moved.stderr.contains(" 0 left"), "{}", moved.stderr);
    good(moved);
    let shown: Value = serde_json::from_str(&good(on_server(&second, &["show", "moved", "--json"]))).unwrap();
    assert_eq!(shown["kv"]["state"], "exact");
    good(on_server(&server, &["export", "notes", "-o", &name, "--tokens-only"]));
    assert!(fs::metadata(&file).unwrap().len() < pages);
    good(on_server(&server, &["fork", "notes", "--name", "branch"]));
    let refused = bad(run(&["sessions", "ls", "--url", &format!("http://{}", server.address)]), 1);
    assert!(refused.contains("401"), "{refused}");
    assert!(bad(on_server(&server, &["show", "nobody"]), 1).contains("404"));
}

#[test]
fn a_server_is_looked_after_by_its_operator_alone() {
    let scratch = Scratch::new();
    let (dir, copy) = (scratch.0.join("data"), scratch.0.join("copy"));
    filled(&dir);
    let keys = ["--api-key", "secret", "--admin-key", "root"];
    let server = Server::start(&[&keys[..], &["--data-dir", &dir.to_string_lossy()]].concat());
    let url = format!("http://{}", server.address);
    let under =
        |key: &str, words: &[&str]| run(&[&["sessions"], words, &["--url", &url, "--api-key", key]].concat());
    let place = copy.to_string_lossy();
    for words in [&["gc"][..], &["verify"], &["snapshot", &place]] {
        let refused = bad(under("secret", words), 1);
        assert!(refused.contains("403") && refused.contains("--admin-key"), "{words:?}: {refused}");
    }
    assert!(!copy.exists());
    assert!(good(under("root", &["gc"])).contains("sessions expired   0"));
    assert!(bad(under("root", &["gc", "--page-quota", "1M"]), 2).contains("--page-quota"));
    let found: Value = serde_json::from_str(&good(under("root", &["verify", "--json"]))).unwrap();
    assert_eq!((&found["sessions"], &found["damage"]), (&json!(2), &json!([])), "every tenant's: {found}");
    assert!(good(under("root", &["verify"])).contains("sessions        2"));
    good(under("root", &["snapshot", &place]));
    assert_eq!(listed(&copy)[0]["name"], "notes", "a live store is copied");
    let again = bad(under("root", &["snapshot", &place]), 1);
    assert!(again.contains("expected an empty directory") && again.contains("400"), "{again}");
    assert!(bad(under("root", &["snapshot", "relative"]), 1).contains("absolute"));
    // Without keys whoever is on the machine is the operator.
    let open = Server::start(&["--data-dir", &scratch.0.join("open").to_string_lossy()]);
    good(run(&["sessions", "verify", "--url", &format!("http://{}", open.address)]));
}

#[test]
fn bad_arguments_end_with_2_and_one_line() {
    let scratch = Scratch::new();
    filled(&scratch.0);
    let cases: [(&[&str], &str); 5] = [
        (&["fork", "notes", "--at-turn", "1", "--at-token", "1"], "--at-token"),
        (&["fork", "notes", "--at-turn", "last"], "last"),
        (&["show"], "ID"),
        (&["ls", "--tenant", "two words"], "--tenant"),
        (&["ls", "--url", "ftp://x"], "http://"),
    ];
    for (words, part) in cases {
        let line = bad(on(&scratch.0, words), 2);
        assert!(line.contains(part), "{words:?}: {line}");
    }
    let line = bad(on(&scratch.0.join("nothing"), &["ls"]), 1);
    assert!(line.contains("no sessions are kept in") && line.contains("nothing"), "{line}");
    assert!(!scratch.0.join("nothing").exists(), "looking makes nothing");
}

fn chat(words: &[&str], input: &str) -> Ended {
    let mut command = mainstay(&["chat", "--temperature", "0", "--max-tokens", "24"]);
    let mut child = command.args(words).stdin(Stdio::piped()).spawn().expect("the command starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(input.as_bytes()).expect("the child reads");
    drop(stdin);
    child.wait_with_output().expect("the child ends").into()
}

#[test]
fn a_chat_goes_on_after_its_end_as_if_it_had_had_none() {
    let scratch = Scratch::new();
    let dir = scratch.0.to_string_lossy();
    let system = ["--system", "Be brief."];
    let near = [&["--session", "talk", "--data-dir", &*dir], &system[..]].concat();
    let unbroken = chat(&system, "My name is Anna.\nWhat is my name?\nThank you.\n");
    let expected: Vec<&str> = unbroken.stdout.lines().collect();
    assert_eq!(expected.len(), 3, "{}", unbroken.stdout);
    let first = chat(&near, "My name is Anna.\n");
    assert!(
        first.stderr.contains("session talk (sess_") && first.stderr.contains("begun"),
        "{}",
        first.stderr
    );
    assert_eq!(good(first).trim_end(), expected[0]);
    let second = chat(&near, "What is my name?\n");
    assert!(second.stderr.contains("1 turn resumed"), "{}", second.stderr);
    assert_eq!(good(second).trim_end(), expected[1]);
    let server = Server::start(&["--data-dir", &dir]);
    let url = format!("http://{}", server.address);
    let third = chat(&["--session", "talk", "--url", &url], "Thank you.\n");
    assert!(third.stderr.contains("2 turns resumed"), "{}", third.stderr);
    assert_eq!(good(third).trim_end(), expected[2]);
    let reset = chat(&["--session", "talk", "--url", &url], "/reset\nWhat is my name?\n");
    assert!(
        reset.stderr.contains("a new session, sess_") && reset.stderr.contains("stays"),
        "{}",
        reset.stderr
    );
    assert_eq!(good(reset), chat(&[], "What is my name?\n").stdout, "after /reset nothing is left");
    let listed = good(run(&["sessions", "ls", "--json", "--url", &url]));
    let turns: Vec<Value> = serde_json::from_str::<Vec<Value>>(&listed).unwrap();
    let turns: Vec<_> = turns.iter().map(|session| session["turn_count"].as_u64().unwrap()).collect();
    assert_eq!(turns, [3, 1]);
    let shown = good(run(&["sessions", "show", "talk", "--json", "--url", &url]));
    let talk: Value = serde_json::from_str(&shown).unwrap();
    let sent = |turn: usize| talk["turns"][turn]["messages"].clone();
    assert_eq!(sent(0).as_array().unwrap().len(), 2, "the system's message and the user's");
    for (turn, text) in [(1, "What is my name?"), (2, "Thank you.")] {
        assert_eq!(sent(turn), json!([{"role": "user", "content": text}]), "only what is new");
    }
}

#[test]
fn a_chat_finds_its_session_or_says_why_not() {
    let scratch = Scratch::new();
    let dir = scratch.0.join("data");
    let place = ["--session", "talk", "--data-dir", &dir.to_string_lossy()];
    let begun = chat(&place, "");
    assert!(
        begun.stderr.contains("session talk (sess_") && begun.stderr.contains("begun"),
        "{}",
        begun.stderr
    );
    good(begun);
    filled(&dir);
    let found = chat(&["--session", "notes", "--data-dir", &dir.to_string_lossy()], "");
    assert!(found.stderr.contains("2 turns resumed"), "{}", found.stderr);
    let reset = chat(&place, "/reset\n");
    assert!(
        reset.stderr.contains("a new session, sess_") && reset.stderr.contains("stays"),
        "{}",
        reset.stderr
    );
    assert_eq!(listed(&dir).len(), 3, "talk, notes and the new one");
    let unknown =
        chat(&["--session", "sess_01ARZ3NDEKTSV4RRFFQ69G5FAV", "--data-dir", &dir.to_string_lossy()], "");
    assert!(bad(unknown, 2).contains("no such session"));
    let server = Server::start(&["--data-dir", &dir.to_string_lossy()]);
    let line = bad(chat(&place, ""), 1);
    assert!(line.contains("--url"), "{line}");
    let url = format!("http://{}", server.address);
    let far = chat(&["--session", "notes", "--url", &url], "");
    assert!(far.stderr.contains("2 turns resumed"), "{}", far.stderr);
}
