//! `mainstay serve`: the ready line, keys, a streamed chat, signals.

use std::io::Read;
use std::net::TcpStream;

use serde_json::Value;

use crate::program::{PATIENCE, Scratch, Server, mainstay};

const CHAT: &str = r#"{"model": "mainstay-default", "messages": [{"role": "user", "content": "Hello!"}],
    "stream": true, "temperature": 0, "max_tokens": 24}"#;

#[test]
fn one_ready_line_then_a_streamed_chat_then_exit_0() {
    let server = Server::start(&[]);
    let line = server.ready_line.trim_end();
    assert!(line.starts_with("mainstay ready on http://127.0.0.1:"), "{line}");
    assert!(line.contains("(model mainstay-default, "), "{line}");
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "mainstay-default");
    let reply = server.post("/v1/chat/completions", CHAT);
    assert_eq!(reply.status, 200, "{}", reply.body);
    let events = reply.events();
    assert_eq!(events.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(!text.is_empty());
    server.signal("TERM");
    let (code, rest) = server.wait();
    assert_eq!((code, rest.as_str()), (Some(0), ""), "nothing but the ready line on stdout");
}

#[test]
fn a_running_answer_may_finish_after_the_signal() {
    let server = Server::start(&[]);
    let body = CHAT.replace("\"max_tokens\": 24", "\"max_tokens\": 200, \"ignore_eos\": true");
    let mut stream = server.send("POST", "/v1/chat/completions", "Content-Type: application/json\r\n", &body);
    // the first event shows that the answer is under way
    let mut reply = vec![0; 400];
    stream.read_exact(&mut reply).unwrap();
    server.signal("TERM");
    stream.read_to_end(&mut reply).unwrap();
    let reply = String::from_utf8(reply).unwrap();
    assert!(reply.contains("data: [DONE]"), "{reply}");
    assert_eq!(server.wait().0, Some(0));
}

#[test]
fn a_second_signal_ends_at_once() {
    let server = Server::start(&["--drain-s", "3600"]);
    let mut stream = long_stream(&server);
    server.signal("INT");
    while server.get("/health").status == 200 {}
    server.signal("TERM");
    assert_eq!(server.wait().0, Some(0));
    let mut rest = String::new();
    // the connection may be reset or closed
    let _ = stream.read_to_string(&mut rest);
    assert!(!rest.contains("[DONE]"), "the answer was finished all the same");
}

/// A stream that is under way and would go on for long.
fn long_stream(server: &Server) -> TcpStream {
    let body = CHAT.replace("\"max_tokens\": 24", "\"max_tokens\": 8000, \"ignore_eos\": true");
    let mut stream = server.send("POST", "/v1/chat/completions", "Content-Type: application/json\r\n", &body);
    stream.read_exact(&mut [0; 2000]).unwrap();
    stream
}

#[test]
fn keys_are_asked_for() {
    let server = Server::start(&["--api-key", "first", "--api-key", "acme:second", "--host", "0.0.0.0"]);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/v1/models").status, 401);
    assert_eq!(server.get("/metrics").status, 401, "other machines can connect");
    for key in ["first", "second"] {
        let header = format!("Authorization: Bearer {key}\r\n");
        assert_eq!(server.request("GET", "/v1/models", &header, "").status, 200, "{key}");
    }
    assert_eq!(server.request("GET", "/v1/models", "Authorization: Bearer third\r\n", "").status, 401);
}

#[test]
fn a_file_and_the_environment_configure() {
    let scratch = Scratch::new();
    let file = scratch.0.join("mainstay.toml");
    std::fs::write(&file, "port = 0\nserved-model-name = \"acme/small\"\nmax_sequences = 4\n").unwrap();
    let mut command = mainstay(&["serve"]);
    command.env("MAINSTAY_CONFIG", &file).env("MAINSTAY_API_KEYS", "one,two");
    let server = Server::spawn(command);
    assert!(server.ready_line.contains("(model acme/small, "), "{}", server.ready_line);
    let reply = server.request("GET", "/v1/models", "Authorization: Bearer two\r\n", "");
    assert_eq!(reply.json()["data"][0]["id"], "acme/small");
}

#[test]
fn a_model_that_does_not_load_ends_with_1() {
    let scratch = Scratch::new();
    std::fs::write(scratch.0.join("config.json"), r#"{"model_type": "abacus"}"#).unwrap();
    std::fs::write(scratch.0.join("tokenizer.json"), "{}").unwrap();
    let ended = mainstay(&["serve", "--port", "0", &scratch.0.to_string_lossy()]).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert!(stderr.contains("abacus"), "{stderr}");
    assert!(ended.stdout.is_empty());
}

#[test]
fn a_data_directory_is_made_or_refused() {
    let scratch = Scratch::new();
    let dir = scratch.0.join("data");
    let server = Server::start(&["--data-dir", &dir.to_string_lossy()]);
    assert!(dir.is_dir());
    drop(server);
    let file = scratch.0.join("file");
    std::fs::write(&file, "").unwrap();
    let ended = mainstay(&["serve", "--port", "0", "--data-dir", &file.to_string_lossy()]).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("data directory"));
}

/// The text of a streamed answer to a prompt of its own, at temperature 0.
fn told(server: &Server, number: usize) -> String {
    let words = "tree cat red river ".repeat(number % 7);
    let body = CHAT.replace("Hello!", &format!("{words}My number is {number}. What is my number?"));
    let reply = server.post("/v1/chat/completions", &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.events().last(), Some(&"[DONE]"));
    let chunks = reply.events().into_iter().filter_map(|e| serde_json::from_str::<Value>(e).ok());
    chunks.filter_map(|c| c["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
}

#[test]
fn sixty_four_streams_each_equal_their_lone_run() {
    let lone = Server::start(&["--max-sequences", "1"]);
    let expected: Vec<String> = (0..64).map(|i| told(&lone, i)).collect();
    drop(lone);
    let server = Server::start(&[]);
    let found: Vec<String> = std::thread::scope(|scope| {
        let streams: Vec<_> = (0..64)
            .map(|i| {
                scope.spawn({
                    let server = &server;
                    move || told(server, i)
                })
            })
            .collect();
        streams.into_iter().map(|s| s.join().unwrap()).collect()
    });
    assert_eq!(found, expected);
}

#[test]
fn a_client_that_goes_away_frees_its_pages() {
    let server = Server::start(&[]);
    let gauge = |name: &str, label: &str| -> f64 {
        let page = server.get("/metrics").body;
        let found = page.lines().find(|l| l.starts_with(name) && l.contains(label));
        let line = found.unwrap_or_else(|| panic!("no {name} with {label} in {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let used = || gauge("mainstay_pages{", "state=\"used\"");
    let stream = long_stream(&server);
    assert!(used() > 0.0);
    drop(stream);
    let begin = std::time::Instant::now();
    while used() > 0.0 || gauge("vllm:num_requests_running{", "") > 0.0 {
        assert!(begin.elapsed() < PATIENCE, "the pages are still in use");
    }
    assert!(gauge("vllm:generation_tokens_total{", "") < 8000.0, "it ran to its end");
}

/// The first sample of a metric.
fn sample(server: &Server, name: &str) -> f64 {
    let page = server.get("/metrics").body;
    let line = page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn guesses_change_no_answer() {
    let body =
        CHAT.replace("\"stream\": true", "\"seed\": 3").replace("\"temperature\": 0", "\"temperature\": 0.7");
    let body = body.replace("\"max_tokens\": 24", "\"max_tokens\": 120, \"ignore_eos\": true");
    let answer = |server: &Server| {
        let reply = server.post("/v1/chat/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()["choices"][0]["message"]["content"].clone()
    };
    let plain = Server::start(&["--draft", "off"]);
    let expected = answer(&plain);
    assert_eq!(sample(&plain, "vllm:spec_decode_num_draft_tokens_total"), 0.0);
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/default");
    for words in [&[][..], &["--draft-model", model]] {
        let server = Server::start(words);
        assert_eq!(answer(&server), expected, "{words:?}");
        assert!(words.is_empty() || sample(&server, "vllm:spec_decode_num_accepted_tokens_total") > 0.0);
    }
}

#[test]
fn a_model_that_cannot_guess_is_refused() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/default");
    let other = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama");
    let refused = |words: &[&str]| {
        let ended = mainstay(&[&["run", "-p", "x"], words].concat()).output().unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    let (code, line) = refused(&["--draft-model", other]);
    assert!(code == Some(2) && line.contains("--draft-model") && line.contains("expected the"), "{line}");
    let (code, line) = refused(&["--draft", "off", "--draft-model", model]);
    assert!(code == Some(2) && line.contains("--draft off"), "{line}");
    let (code, line) = refused(&["--draft-model", "/no/such/model"]);
    assert!(code == Some(1) && line.contains("/no/such/model"), "{line}");
}
