//! A session whose model changed while the server was down: its tokens stay, its keys and values are computed anew, and
//! the answer says why.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::program::{Scratch, Server};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/default");
const FILES: [&str; 5] =
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
/// More than a page of tokens.
const STORY: &str = "My name is Anna. I live in Riga, in a house beside the river, with two cats and a dog. My favourite \
    colour is the green of an old glass bottle in the sun, and every morning I walk to the market to buy bread, apples \
    and a newspaper, which I read on the way home.";

/// A copy of a model that may be changed, a data directory, and an empty one.
struct Place {
    scratch: Scratch,
}

impl Place {
    fn new() -> Self {
        let place = Self { scratch: Scratch::new() };
        fs::create_dir(place.model()).unwrap();
        for name in FILES {
            fs::copy(Path::new(MODEL).join(name), place.file(name)).unwrap();
        }
        place
    }

    fn model(&self) -> PathBuf {
        self.scratch.0.join("model")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.model().join(name)
    }

    fn start(&self, data: &str, words: &[&str]) -> Server {
        let (model, data) = (self.model().display().to_string(), self.scratch.0.join(data));
        let data = data.display().to_string();
        Server::start(&[&[&*model, "--data-dir", &data, "--threads", "1"], words].concat())
    }
}

fn post(server: &Server, path: &str, body: &Value) -> Value {
    let reply = server.post(path, &body.to_string());
    assert!((200..300).contains(&reply.status), "{path}: {}", reply.body);
    reply.json()
}

fn turn(server: &Server, text: &str) -> Value {
    let messages = json!([{"role": "user", "content": text}]);
    let body = json!({"model": "model", "session_id": "talk", "session_mode": "append", "messages": messages, "temperature": 0,
        "max_tokens": 16, "return_token_ids": true});
    post(server, "/v1/chat/completions", &body)
}

fn end(server: Server) {
    server.signal("TERM");
    assert_eq!(server.wait().0, Some(0));
}

fn is_prefix(short: &[Value], long: &[Value]) -> bool {
    long.len() > short.len() && long.starts_with(short)
}

fn tokens(value: &Value) -> Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("expected token ids, found {value}")).clone()
}

/// One turn, a change while no server runs, and a second turn by a server that is started with `words`. Gives the second
/// turn's answer, whose tokens are those that an empty server of the changed model draws after the same prompt.
fn after_a_change(change: impl FnOnce(&Place), words: &[&str]) -> Value {
    let place = Place::new();
    let server = place.start("data", &[]);
    post(&server, "/v1/sessions", &json!({"name": "talk"}));
    let first = turn(&server, STORY);
    assert!(first["usage"]["prompt_tokens"].as_u64().unwrap() > 64, "{first}");
    end(server);

    change(&place);
    let server = place.start("data", words);
    let second = turn(&server, "What is my name?");
    end(server);
    let prompt = tokens(&second["prompt_token_ids"]);
    let had = [tokens(&first["prompt_token_ids"]), tokens(&first["choices"][0]["token_ids"])].concat();
    assert!(is_prefix(&had, &prompt), "the tokens stay: {first} {second}");

    let server = place.start("empty", words);
    let ask = json!({"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": 16, "return_token_ids": true});
    let fresh = post(&server, "/v1/completions", &ask);
    end(server);
    assert_eq!(tokens(&fresh["choices"][0]["prompt_token_ids"]), prompt);
    assert_eq!(second["choices"][0]["token_ids"], fresh["choices"][0]["token_ids"], "{second} {fresh}");
    second
}

#[track_caller]
fn assert_cold(second: &Value, reason: &str) {
    let kv = &second["kv"];
    assert_eq!((&kv["state"], &kv["reason"]), (&json!("cold"), &json!(reason)), "{second}");
    assert_eq!(kv["restored_tokens"], json!(0), "{second}");
}

#[test]
fn the_same_model_goes_on_from_disk() {
    let second = after_a_change(|_| (), &[]);
    let kv = &second["kv"];
    assert_eq!((&kv["state"], &kv["tier"]), (&json!("exact"), &json!("disk")), "{second}");
    assert!(kv["reason"].is_null() && kv["restored_tokens"].as_u64().unwrap() > 64, "{second}");
}

#[test]
fn one_byte_of_the_weights_is_another_model() {
    let flip = |place: &Place| {
        let file = place.file("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
    };
    assert_cold(&after_a_change(flip, &[]), "weights");
}

#[test]
fn a_byte_of_tokenizer_or_template_is_told() {
    for (name, reason) in [("tokenizer.json", "tokenizer"), ("tokenizer_config.json", "template")] {
        // A line's end changes no token; what it stands for is another file all the same.
        let grow = |place: &Place| {
            let text = fs::read_to_string(place.file(name)).unwrap();
            fs::write(place.file(name), text + "\n").unwrap();
        };
        assert_cold(&after_a_change(grow, &[]), reason);
    }
}

#[test]
fn another_type_of_keys_and_values_is_told() {
    for kv_type in ["f32", "q8"] {
        assert_cold(&after_a_change(|_| (), &["--kv-type", kv_type]), "kv_type");
    }
}
