//! What answers tell about keys and values, and the fields that decide over them.

use serde_json::{Value, json};

use crate::testbed::{CHAT, COMPLETIONS, Directory, Server, Setup, chat, completion, start};

/// A prompt of several pages.
fn long(patch: Value) -> Value {
    let mut body =
        completion(json!({"prompt": "one two three ".repeat(60), "max_tokens": 3, "ignore_eos": true}));
    body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    body
}

async fn ask(server: &Server, patch: Value) -> Value {
    server.post(COMPLETIONS, &long(patch)).await.ok()
}

fn with_store(directory: &Directory) -> Setup {
    Setup { directory: Some(directory.path()), ..Setup::default() }
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[tokio::test]
async fn pages_come_from_memory_and_after_a_restart_from_disk() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let first = ask(&server, json!({})).await;
    let cold = json!({"state": "cold", "reason": null, "restored_tokens": 0, "tier": null, "restore_ms": 0.0,
                      "durability": "async"});
    assert_eq!(first["kv"]["state"], cold["state"]);
    assert_eq!(first["kv"]["durability"], "async");
    assert_eq!((&first["kv"]["tier"], &first["kv"]["restored_tokens"]), (&Value::Null, &json!(0)));
    let keys: Vec<&String> = first["kv"].as_object().unwrap().keys().collect();
    assert_eq!(keys, cold.as_object().unwrap().keys().collect::<Vec<_>>());
    let again = ask(&server, json!({})).await;
    assert_eq!((&again["kv"]["state"], &again["kv"]["tier"]), (&json!("exact"), &json!("device")));
    assert!(cached(&again) >= 64 && again["kv"]["restored_tokens"] == 0, "{again}");
    server.stop().await;
    let server = start(with_store(&directory)).await;
    let restored = ask(&server, json!({})).await;
    assert_eq!((&restored["kv"]["state"], &restored["kv"]["tier"]), (&json!("exact"), &json!("disk")));
    assert_eq!(restored["kv"]["restored_tokens"], cached(&restored));
    assert!(cached(&restored) >= 64, "{restored}");
    server.stop().await;
    let other = start(Setup { weights: 1, ..with_store(&directory) }).await;
    assert_eq!(cached(&ask(&other, json!({})).await), 0);
    other.stop().await;
}

#[tokio::test]
async fn a_server_without_a_store_keeps_nothing() {
    let server = start(Setup::default()).await;
    let answer = ask(&server, json!({})).await;
    assert_eq!((&answer["kv"]["state"], &answer["kv"]["durability"]), (&json!("cold"), &json!("ephemeral")));
}

#[tokio::test]
async fn ephemeral_pages_do_not_reach_the_disk() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    assert_eq!(ask(&server, json!({"durability": "ephemeral"})).await["kv"]["durability"], "ephemeral");
    server.stop().await;
    let server = start(with_store(&directory)).await;
    assert_eq!(cached(&ask(&server, json!({})).await), 0);
    server.stop().await;
}

#[tokio::test]
async fn a_salt_parts_a_tenants_pages() {
    let server = start(Setup::default()).await;
    let mut found = Vec::new();
    for salt in ["a", "b", "a"] {
        found.push(cached(&ask(&server, json!({"cache_salt": salt})).await));
    }
    assert!(found[0] == 0 && found[1] == 0 && found[2] >= 64, "{found:?}");
}

#[tokio::test]
async fn streams_tell_it_when_the_last_choice_ends_and_with_the_usage() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let patch = json!({"stream": true, "n": 2, "stream_options": {"include_usage": true}, "max_tokens": 4,
                       "ignore_eos": true, "temperature": 0});
    for (path, body) in [(CHAT, chat(patch.clone())), (COMPLETIONS, completion(patch.clone()))] {
        let events = server.stream(path, &body).await.events().await;
        let told: Vec<usize> = (0..events.len()).filter(|at| events[*at].get("kv").is_some()).collect();
        assert_eq!(told, [events.len() - 2, events.len() - 1]);
        let last = &events[events.len() - 2];
        assert_eq!(
            (&last["choices"][0]["finish_reason"], &last["kv"]["durability"]),
            (&json!("length"), &json!("async"))
        );
        assert_eq!(events.last().unwrap()["kv"], last["kv"]);
    }
    server.stop().await;
}

#[tokio::test]
async fn pages_of_an_answer_that_was_told_survive_a_crash() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    // One that a stop string ends, too: the engine goes on until it hears of it.
    let text = ask(&server, json!({"temperature": 0, "max_tokens": 40})).await["choices"][0]["text"].clone();
    let letter = text.as_str().unwrap().chars().nth(20).unwrap().to_string();
    let stopped =
        json!({"temperature": 0, "max_tokens": 40, "stop": letter, "prompt": "Other words. ".repeat(40)});
    ask(&server, stopped.clone()).await;
    let crashed = directory.copied();
    let after = start(with_store(&crashed)).await;
    for patch in [json!({}), stopped] {
        let answer = ask(&after, patch).await;
        let prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap();
        assert_eq!(answer["kv"]["tier"], "disk");
        assert!(cached(&answer) + 32 >= prompt, "{answer}");
    }
    after.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn wrong_values_are_refused_by_name() {
    let server = start(Setup::default()).await;
    for (field, value) in [
        ("durability", json!("most")),
        ("kv_reuse", json!("any")),
        ("cache_salt", json!("x".repeat(129))),
        ("cache_salt", json!("tab\t")),
        ("cache_salt", json!(7)),
    ] {
        for (path, body) in
            [(CHAT, chat(json!({field: value}))), (COMPLETIONS, completion(json!({field: value})))]
        {
            assert_eq!(server.post(path, &body).await.error(400)["param"], field);
        }
    }
    for field in ["session_id", "session_mode", "expected_turn", "truncation"] {
        let body = completion(json!({field: "a"}));
        assert_eq!(server.post(COMPLETIONS, &body).await.error(400)["param"], field);
    }
}

#[tokio::test]
async fn an_answer_does_not_wait_long_for_its_pages() {
    let directory = Directory::new();
    let (gate, blocked) = std::sync::mpsc::channel();
    let server = start(Setup { gate: Some(blocked), ..with_store(&directory) }).await;
    let other = ask(&server, json!({"max_tokens": 500, "prompt": "y"}));
    let short = async {
        while server.engine.stats().running + server.engine.stats().waiting == 0 {
            tokio::task::yield_now().await;
        }
        // The steps of the other request are so long that the engine does not hear of anything in time, unless the
        // question reached it just before the next one began.
        for _ in 0..20 {
            let answer = ask(&server, json!({"max_tokens": 1, "prompt": "x"}));
            tokio::pin!(answer);
            let answer = loop {
                match tokio::time::timeout(std::time::Duration::from_millis(300), &mut answer).await {
                    Ok(answer) => break answer,
                    Err(_) => gate.send(()).unwrap(),
                }
            };
            assert_eq!(answer["kv"]["durability"], "async");
            let page = String::from_utf8(server.get("/metrics").await.body.to_vec()).unwrap();
            if !page.contains("mainstay_kv_page_late_total{model_name=\"org/echo\"} 0\n") {
                assert!(page.contains("mainstay_kv_page_late_total{model_name=\"org/echo\"} 1\n"), "{page}");
                drop(gate);
                return;
            }
        }
        panic!("no answer was late for its pages");
    };
    tokio::join!(other, short);
    server.stop().await;
}
