//! Turns of sessions: what they write, who may, what they refuse.

use std::sync::Arc;
use std::sync::mpsc::channel;

use axum::body::Body;
use axum::http::Request;
use mainstay_engine::store::sim::{SimClock, SimDisk, SimEntropy};
use mainstay_engine::store::{Durability, Options, Settings, Store};
use serde_json::{Value, json};

use crate::testbed::{CHAT, Directory, Reply, Server, Setup, chat, request, start};

pub(crate) fn with_store(directory: &Directory) -> Setup {
    Setup { directory: Some(directory.path()), ..Setup::default() }
}

/// A short turn with these fields, whose tokens come back.
pub(crate) fn turn(session: &str, patch: Value) -> Value {
    let mut body =
        chat(json!({"session_id": session, "max_tokens": 24, "temperature": 0, "return_token_ids": true}));
    body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    body
}

pub(crate) fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

pub(crate) fn text(answer: &Value) -> String {
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

async fn send_with(server: &Server, body: &Value, headers: &[(&'static str, &str)]) -> Reply {
    let mut request = request(CHAT, body);
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    server.send(request).await
}

#[tokio::test]
async fn a_turn_is_answered_with_its_session_and_goes_on_after_a_restart() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings { name: Some("mine".to_owned()), ..Settings::default() });
    let long = user(&"one two three ".repeat(30));
    let reply = server.post(CHAT, &turn(&id, json!({"messages": [long]}))).await;
    let first = reply.ok();
    assert_eq!(reply.headers["x-session-id"], id.as_str());
    assert_eq!(first["session"], json!({"id": id, "name": "mine", "turn": 1}));
    assert_eq!(first["kv"]["durability"], "async");
    let tokens = [ids(&first["prompt_token_ids"]), ids(&first["choices"][0]["token_ids"])].concat();
    assert_eq!(server.turns(&id), std::slice::from_ref(&tokens));
    // Named by its name, in a header, with only what is new.
    let next = turn("mine", json!({"messages": [user("more")], "session_mode": "append"}));
    let second = send_with(&server, &next, &[("x-session-id", "mine"), ("if-match", "\"1\"")]).await.ok();
    assert_eq!(second["session"]["turn"], 2);
    let prompt = ids(&second["prompt_token_ids"]);
    assert!(prompt.starts_with(&tokens));
    server.stop().await;
    let server = start(with_store(&directory)).await;
    let third =
        turn(&id, json!({"messages": [user("and more")], "session_mode": "append", "expected_turn": 2}));
    let third = server.post(CHAT, &third).await.ok();
    let all = [prompt, ids(&second["choices"][0]["token_ids"])].concat();
    assert!(ids(&third["prompt_token_ids"]).starts_with(&all));
    assert_eq!((&third["kv"]["state"], &third["kv"]["tier"]), (&json!("exact"), &json!("disk")));
    let cached = third["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached as usize + 32 >= all.len(), "{cached} of {}", all.len());
    assert_eq!(third["session"], json!({"id": id, "name": "mine", "turn": 3}));
    server.stop().await;
}

#[tokio::test]
async fn the_whole_history_gives_the_same_prompt_as_what_is_new() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let (whole, new) = (server.session(Settings::default()), server.session(Settings::default()));
    let (mut messages, mut answers) = (Vec::new(), Vec::new());
    for (n, said) in ["a", "b b", "c c c"].iter().enumerate() {
        messages.push(user(said));
        let full = server.post(CHAT, &turn(&whole, json!({"messages": messages}))).await.ok();
        let append = turn(&new, json!({"messages": [user(said)], "session_mode": "append"}));
        let append = server.post(CHAT, &append).await.ok();
        assert_eq!(full["session"], json!({"id": whole, "name": null, "turn": n + 1}));
        assert_eq!(
            (&full["prompt_token_ids"], &full["choices"]),
            (&append["prompt_token_ids"], &append["choices"])
        );
        messages.push(json!({"role": "assistant", "content": text(&full)}));
        answers.push(full);
    }
    assert_eq!(server.turns(&whole), server.turns(&new));
    assert_eq!(server.turns(&whole).len(), 3);
    server.stop().await;
}

#[tokio::test]
async fn streams_of_turns_end_with_the_session_and_are_numbered() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings::default());
    let body =
        turn(&id, json!({"stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}));
    let mut stream = server.stream(CHAT, &body).await;
    assert_eq!(stream.response.headers()["x-session-id"], id.as_str());
    let mut events = Vec::new();
    while let Some(event) = stream.numbered().await {
        events.push(event);
    }
    let numbers: Vec<usize> = events.iter().map(|(number, _)| number.unwrap()).collect();
    assert!(numbers.is_sorted() && numbers[0] == 0, "{numbers:?}");
    let drawn: usize =
        events.iter().map(|(_, e)| e["choices"][0]["token_ids"].as_array().map_or(0, Vec::len)).sum();
    assert_eq!((drawn, numbers.last()), (24, Some(&24)));
    let session = json!({"id": id, "name": null, "turn": 1});
    let told: Vec<usize> = (0..events.len()).filter(|at| events[*at].1.get("session").is_some()).collect();
    assert_eq!(told, [events.len() - 2, events.len() - 1]);
    let (_, last) = &events[events.len() - 2];
    assert_eq!((&last["session"], &last["kv"]["durability"]), (&session, &json!("async")));
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    // The turn is there when its last event is.
    assert_eq!(server.turns(&id).len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_conflict_changes_nothing() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings::default());
    server.post(CHAT, &turn(&id, json!({"expected_turn": 0}))).await.ok();
    for (patch, headers) in [
        (json!({"expected_turn": 0}), vec![]),
        (json!({"expected_turn": 2}), vec![]),
        (json!({}), vec![("if-match", "0")]),
        (json!({"stream": true}), vec![("if-match", "W/\"7\"")]),
    ] {
        let error = send_with(&server, &turn(&id, patch), &headers).await.error(409);
        assert_eq!(error["code"], "turn_conflict");
        assert!(error["message"].as_str().unwrap().contains("at turn 1"), "{error}");
    }
    assert_eq!(server.turns(&id).len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_session_runs_one_turn_at_a_time() {
    let directory = Directory::new();
    let (gate, blocked) = channel();
    let server = start(Setup { gate: Some(blocked), ..with_store(&directory) }).await;
    let (id, other) = (server.session(Settings::default()), server.session(Settings::default()));
    for _ in 0..3 {
        gate.send(()).unwrap();
    }
    let mut stream = server.stream(CHAT, &turn(&id, json!({"stream": true}))).await;
    stream.event().await.unwrap();
    assert_eq!(server.post(CHAT, &turn(&id, json!({}))).await.error(409)["code"], "session_busy");
    drop(gate);
    server.post(CHAT, &turn(&other, json!({}))).await.ok();
    stream.events().await;
    server.post(CHAT, &turn(&id, json!({"session_mode": "append"}))).await.ok();
    server.stop().await;
}

#[tokio::test]
async fn foreign_and_unknown_sessions_are_the_same_404() {
    let directory = Directory::new();
    let mut setup = with_store(&directory);
    setup.options.api_keys = vec!["default:mine".parse().unwrap(), "b:yours".parse().unwrap()];
    let server = start(setup).await;
    let id = server.session(Settings { name: Some("mine".to_owned()), ..Settings::default() });
    let own = [("authorization", "Bearer mine")];
    send_with(&server, &turn(&id, json!({})), &own).await.ok();
    let mut found = Vec::new();
    for session in [id.as_str(), "mine", "sess_01ARZ3NDEKTSV4RRFFQ69G5FAV", "no such name"] {
        let reply = send_with(&server, &turn(session, json!({})), &[("authorization", "Bearer yours")]).await;
        assert_eq!(reply.error(404)["code"], "session_not_found");
        found.push(reply.body);
        let stream = Request::get(format!("/v1/sessions/{}/stream", session.replace(' ', "%20")));
        let stream = stream.header("authorization", "Bearer yours").body(Body::empty()).unwrap();
        found.push(server.send(stream).await.body);
    }
    assert!(found.iter().all(|body| *body == found[0]), "{found:?}");
    server.stop().await;
}

#[tokio::test]
async fn without_a_store_there_are_no_sessions() {
    let server = start(Setup::default()).await;
    assert_eq!(server.post(CHAT, &turn("x", json!({}))).await.error(404)["code"], "sessions_disabled");
    assert_eq!(server.get("/v1/sessions/x/stream").await.error(404)["code"], "sessions_disabled");
}

#[tokio::test]
async fn what_a_turn_cannot_be_is_refused_by_name() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings::default());
    let open = json!([user("a"), {"role": "assistant", "content": "b"}]);
    for (patch, param) in [
        (json!({"n": 2}), "n"),
        (json!({"continue_final_message": true, "messages": open}), "continue_final_message"),
        (json!({"session_mode": "half"}), "session_mode"),
        (json!({"expected_turn": "one"}), "expected_turn"),
        (json!({"truncation": true}), "truncation"),
        (json!({"durability": "most"}), "durability"),
        (json!({"session_id": 5}), "session_id"),
    ] {
        assert_eq!(server.post(CHAT, &turn(&id, patch)).await.error(400)["param"], param);
    }
    for (header, value, param) in [("x-session-id", "other", "session_id"), ("if-match", "soon", "If-Match")]
    {
        let reply = send_with(&server, &turn(&id, json!({})), &[(header, value)]).await;
        assert_eq!(reply.error(400)["param"], param);
    }
    for (query, param) in [("?after=x", "after"), ("?after=-1", "after")] {
        let reply = server.get(&format!("/v1/sessions/{id}/stream{query}")).await;
        assert_eq!(reply.error(400)["param"], param);
    }
    assert_eq!(server.turns(&id).len(), 0);
    server.stop().await;
}

#[tokio::test]
async fn a_turn_that_does_not_fit_changes_nothing_or_drops_the_oldest() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings::default());
    let rule = json!({"role": "system", "content": "Be brief."});
    let said = |n: usize| user(&format!("number {n} {}", "word ".repeat(120)));
    let append = |messages: Value, patch: Value| {
        let mut body = turn(&id, json!({"messages": messages, "session_mode": "append", "max_tokens": 8}));
        body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        body
    };
    server.post(CHAT, &append(json!([rule, said(0)]), json!({}))).await.ok();
    let mut n = 1;
    let refused = loop {
        let reply = server.post(CHAT, &append(json!([said(n)]), json!({}))).await;
        if reply.status != 200 {
            break reply.error(400);
        }
        n += 1;
    };
    assert_eq!(refused["code"], "context_length_exceeded");
    let message = refused["message"].as_str().unwrap();
    let numbers: Vec<usize> =
        message.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    assert!(numbers.contains(&2048) && numbers.iter().any(|n| *n > 2048 - 8), "{message}");
    let before = server.turns(&id);
    assert_eq!(before.len(), n);
    let reply = server.post(CHAT, &append(json!([said(n)]), json!({"truncation": "auto"}))).await;
    let answer = reply.ok();
    let fork = answer["session"]["id"].as_str().unwrap();
    assert!(fork != id && reply.headers["x-session-id"] == fork);
    assert_eq!((&answer["session"]["turn"], &answer["kv"]["reason"]), (&json!(1), &json!("truncated")));
    assert_eq!(server.turns(&id), before);
    let prompt = server
        .tokenizer
        .decode(&ids(&answer["prompt_token_ids"]), mainstay_models::tokenizer::ShowSpecial::Yes);
    assert!(prompt.contains("Be brief.") && !prompt.contains("number 0"), "{prompt}");
    assert!(prompt.contains("number 2") && prompt.contains(&format!("number {n}")), "too much was left out");
    let (tenant, at) = server.id(fork);
    let parent = server.store.as_deref().unwrap().get(tenant, at).unwrap().parent;
    assert_eq!(parent, Some((server.id(&id).1, 0)));
    // What alone is too long is refused in any case.
    let huge = json!([user(&"word ".repeat(4000))]);
    server.post(CHAT, &append(huge, json!({"truncation": "auto"}))).await.error(400);
    server.stop().await;
}

#[tokio::test]
async fn ephemeral_sessions_live_in_memory() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings { durability: Durability::Ephemeral, ..Settings::default() });
    for turns in 1..=2 {
        let long = user(&"one two three ".repeat(40));
        let body = turn(&id, json!({"messages": [long], "session_mode": "append", "durability": "full"}));
        let answer = server.post(CHAT, &body).await.ok();
        assert_eq!(
            (&answer["session"]["turn"], &answer["kv"]["durability"]),
            (&json!(turns), &json!("ephemeral"))
        );
    }
    server.stop().await;
    let server = start(with_store(&directory)).await;
    server.post(CHAT, &turn(&id, json!({}))).await.error(404);
    let again = chat(json!({"messages": [user(&"one two three ".repeat(40))], "max_tokens": 1}));
    let answer = server.post(CHAT, &again).await.ok();
    assert_eq!(answer["kv"]["tier"], Value::Null, "its pages were stored");
    server.stop().await;
}

#[tokio::test]
async fn turns_are_as_durable_as_asked_for() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings { durability: Durability::Turn, ..Settings::default() });
    let append = |patch: Value| {
        let mut body = turn(&id, json!({"messages": [user(&"word ".repeat(40))], "session_mode": "append"}));
        body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        body
    };
    for (patch, level) in [
        (json!({}), "turn"),
        (json!({"durability": "full"}), "full"),
        (json!({"durability": "async"}), "async"),
        (json!({"durability": "ephemeral"}), "async"),
    ] {
        assert_eq!(server.post(CHAT, &append(patch)).await.ok()["kv"]["durability"], level);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_full_disk_is_507_where_more_was_promised() {
    let disk = SimDisk::new(1);
    let (clock, entropy) = (Arc::new(SimClock::new(1_700_000_000_000)), Arc::new(SimEntropy::new(1)));
    let options = Options { reserve_bytes: 0, ..Options::default() };
    let (store, _) = Store::open(Arc::new(disk.clone()), clock, entropy, options).unwrap();
    let server = start(Setup { store: Some(Arc::new(store)), ..Setup::default() }).await;
    let levels = [Durability::Turn, Durability::Async];
    let [strict, loose] =
        levels.map(|durability| server.session(Settings { durability, ..Settings::default() }));
    let append = |id: &str, patch: Value| {
        let mut body = turn(id, json!({"session_mode": "append"}));
        body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        body
    };
    server.post(CHAT, &append(&strict, json!({}))).await.ok();
    server.post(CHAT, &append(&loose, json!({}))).await.ok();
    disk.set_capacity(0);
    assert_eq!(server.post(CHAT, &append(&strict, json!({}))).await.error(507)["code"], "not_durable");
    let streamed =
        server.stream(CHAT, &append(&strict, json!({"stream": true}))).await.events_until_error().await;
    assert_eq!(streamed.last().unwrap()["error"]["code"], "not_durable");
    let finished = |event: &Value| event["choices"][0]["finish_reason"].is_string();
    assert!(!streamed.iter().any(finished), "it was said to have ended: {streamed:?}");
    let answer = server.post(CHAT, &append(&loose, json!({}))).await.ok();
    assert_eq!((&answer["session"]["turn"], &answer["kv"]["durability"]), (&json!(2), &json!("ephemeral")));
    assert_eq!((server.turns(&strict).len(), server.turns(&loose).len()), (1, 2));
    disk.set_capacity(u64::MAX);
    server.stop().await;
}

#[tokio::test]
async fn pages_that_are_not_durable_leave_a_session_as_it_was_also_where_it_was_to_be_rewritten() {
    let (clock, entropy) = (Arc::new(SimClock::new(1_700_000_000_000)), Arc::new(SimEntropy::new(1)));
    // No page is ever written.
    let options = Options { reserve_bytes: 0, write_budget_bytes_per_day: Some(0), ..Options::default() };
    let (store, _) = Store::open(Arc::new(SimDisk::new(1)), clock, entropy, options).unwrap();
    let template = Some("{{ day }}{% for m in messages %}{{ m.content }}\n{% endfor %}".to_owned());
    let server = start(Setup { store: Some(Arc::new(store)), template, ..Setup::default() }).await;
    let id = server.session(Settings { durability: Durability::Full, ..Settings::default() });
    let said = |day: &str, text: &str| {
        turn(
            &id,
            json!({"messages": [user(text)], "session_mode": "append", "max_tokens": 4,
                         "chat_template_kwargs": {"day": day}}),
        )
    };
    // Less than a page.
    assert_eq!(server.post(CHAT, &said("Monday", "a")).await.ok()["kv"]["durability"], "full");
    let before = server.turns(&id);
    let reply = server.post(CHAT, &said("Tuesday", &"word ".repeat(50))).await;
    assert_eq!(reply.error(507)["code"], "not_durable");
    assert_eq!(server.turns(&id), before);
    let answer = server.post(CHAT, &said("Monday", "b")).await.ok();
    assert_eq!((&answer["session"]["turn"], &answer["kv"]["reason"]), (&json!(2), &Value::Null));
    server.stop().await;
}

#[tokio::test]
async fn a_stored_completion_that_cannot_begin_leaves_no_session() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let long = "word ".repeat(5000);
    for wrong in [
        json!({"messages": [user(&long)]}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "strange"}}}}),
    ] {
        let mut body = chat(json!({"store": true}));
        body.as_object_mut().unwrap().extend(wrong.as_object().unwrap().clone());
        server.post(CHAT, &body).await.error(400);
        assert_eq!(server.get("/v1/sessions").await.ok()["data"], json!([]));
    }
    let kept = server.post(CHAT, &chat(json!({"store": true, "max_tokens": 3}))).await.ok();
    let path = format!("{CHAT}/{}", kept["id"].as_str().unwrap());
    assert_eq!(
        server.get(&path).await.ok()["choices"][0]["message"]["content"],
        kept["choices"][0]["message"]["content"]
    );
    server.stop().await;
}
