//! `mainstay serve` with several models: one budget of memory, loads on demand, models that go and come back.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::{PATIENCE, Scratch, Server, mainstay, run};

/// The built-in model, as a directory like any other.
fn default_model() -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/default").display().to_string()
}

/// Holds the weights of one such model and some thousand tokens, but not those of two.
const ROOM_FOR_ONE: &str = "6M";

fn chat(server: &Server, model: &str, more: Value) -> Value {
    let mut body = json!({"model": model, "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0,
        "max_tokens": 12});
    for (key, value) in more.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    let reply = server.post("/v1/chat/completions", &body.to_string());
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.json()
}

fn states(server: &Server) -> Vec<(String, String)> {
    let listed = server.get("/v1/models").json();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    listed["data"].as_array().unwrap().iter().map(|m| (text(&m["id"]), text(&m["state"]))).collect()
}

fn is_loaded(server: &Server, model: &str) -> bool {
    states(server).contains(&(model.to_owned(), "loaded".to_owned()))
}

#[test]
fn models_that_fit_are_served_beside_each_other() {
    let (a, b) = (format!("a={}", default_model()), format!("b={}", default_model()));
    let server = Server::start(&[&a, &b]);
    assert!(server.ready_line.contains("(models a, b, "), "{}", server.ready_line);
    assert!(is_loaded(&server, "a") && is_loaded(&server, "b"));
    let text = |model| chat(&server, model, json!({}))["choices"][0]["message"]["content"].clone();
    assert_eq!(text("a"), text("b"));
    let missing = server.post("/v1/chat/completions", r#"{"model": "c", "messages": []}"#);
    assert_eq!((missing.status, &missing.json()["error"]["code"]), (404, &json!("model_not_found")));
    server.signal("TERM");
    assert_eq!(server.wait().0, Some(0));
}

#[test]
fn those_that_do_not_fit_take_turns() {
    let scratch = Scratch::new();
    let file = scratch.0.join("mainstay.toml");
    let table = |name: &str, more: &str| {
        format!("[[models]]\nname = \"{name}\"\nmodel = \"{}\"\nload = \"demand\"\n{more}", default_model())
    };
    std::fs::write(&file, table("a", "context = 256\n") + &table("b", "kv-type = \"f32\"\n")).unwrap();
    let mut command = mainstay(&["serve", "--port", "0", "--memory", ROOM_FOR_ONE]);
    command.arg("--config").arg(&file).stderr(Stdio::null());
    let server = Server::spawn(command);
    assert!(server.ready_line.contains("(models a, b, none loaded)"), "{}", server.ready_line);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/v1/models/a").json()["max_model_len"], 256);
    let session = json!({"model": "a", "name": "s"}).to_string();
    assert_eq!(server.post("/v1/sessions", &session).status, 201);
    let turn = |text: &str| {
        let messages = json!([{"role": "user", "content": text}]);
        chat(&server, "a", json!({"session_id": "s", "session_mode": "append", "messages": messages}))
    };
    turn("My name is Ada and my favourite colour is the green of an old glass bottle in the sun.");
    assert!(is_loaded(&server, "a") && !is_loaded(&server, "b"));
    chat(&server, "b", json!({}));
    assert!(!is_loaded(&server, "a") && is_loaded(&server, "b"));
    let found = turn("What is my name?");
    assert_eq!((&found["kv"]["state"], &found["kv"]["tier"]), (&json!("exact"), &json!("disk")), "{found}");
    server.signal("TERM");
    assert_eq!(server.wait().0, Some(0));
}

#[test]
fn what_nobody_uses_goes() {
    let server = Server::start(&["--model-idle-s", "0.2"]);
    chat(&server, "mainstay-default", json!({}));
    let begun = Instant::now();
    while is_loaded(&server, "mainstay-default") {
        assert!(begun.elapsed() < PATIENCE, "the model stays");
        std::thread::sleep(Duration::from_millis(20));
    }
    chat(&server, "mainstay-default", json!({}));
    server.signal("TERM");
    assert_eq!(server.wait().0, Some(0));
}

#[test]
fn what_memory_can_never_hold_is_refused_with_numbers() {
    let model = default_model();
    let ended = run(&["serve", "--port", "0", &model, "--memory", "1M"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    for part in ["`default` needs", "keys and values of 512 tokens", "--memory gives 1.0 MiB", "are missing"]
    {
        assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
    }
    let (a, b) = (format!("a={model}"), format!("b={model}"));
    let ended = run(&["serve", "--port", "0", &a, &b, "--memory", ROOM_FOR_ONE]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("`a`, `b` need") && ended.stderr.contains("on demand"), "{}", ended.stderr);
}

fn fixture(name: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name).display().to_string()
}

/// What the llama fixture writes under a name.
fn written(server: &Server, model: &str) -> Value {
    chat(server, model, json!({"ignore_eos": true}))["choices"][0]["message"]["content"].clone()
}

#[test]
fn adapters_are_served_beside_their_model() {
    let (attention, mlp) = (fixture("lora/attention"), fixture("lora/mlp"));
    let modules = format!("one={attention},two={mlp}");
    let server = Server::start(&[
        &fixture("llama"),
        "--lora-modules",
        &modules,
        "--lora-dir",
        &fixture("lora"),
        "--admin-key",
        "operator",
    ]);
    let listed = server.get("/v1/models").json();
    assert_eq!((&listed["data"][1]["id"], &listed["data"][1]["parent"]), (&json!("one"), &json!("llama")));
    let (plain, one, two) = (written(&server, "llama"), written(&server, "one"), written(&server, "two"));
    assert!(plain != one && one != two && plain != two, "{plain} {one} {two}");
    let load = |name: &str, path: &str| {
        let body = json!({"lora_name": name, "lora_path": path}).to_string();
        let headers = "Content-Type: application/json\r\nAuthorization: Bearer operator\r\n";
        server.request("POST", "/v1/load_lora_adapter", headers, &body)
    };
    assert_eq!(load("three", &attention).status, 200);
    assert_eq!(written(&server, "three"), one);
    let refused = load("four", &fixture("llama"));
    assert_eq!(refused.status, 400, "{}", refused.body);
    let refused = load("four", &fixture("lora"));
    assert!(refused.status == 400 && refused.body.contains("adapter_config.json"), "{}", refused.body);
    server.signal("TERM");
    assert_eq!(server.wait().0, Some(0));
}

#[test]
fn an_adapter_of_another_model_ends_the_start_with_1() {
    let module = format!("one={}", fixture("lora/attention"));
    let ended = run(&["serve", "--port", "0", &default_model(), "--lora-modules", &module]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("`one`") && ended.stderr.contains("expected shape"), "{}", ended.stderr);
}
