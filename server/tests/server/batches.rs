//! /v1/batches over TCP: every line is answered once, whatever happens in between.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use axum::body::Body;
use mainstay_server::{ApiKey, ServerOptions};
use serde_json::{Value, json};

use crate::files::{form, send, upload};
use crate::testbed::{CHAT, COMPLETIONS, Directory, MODEL, Server, Setup, chat, completion, start};

fn setup(directory: &Directory, batch_requests: usize) -> Setup {
    let options = ServerOptions { batch_requests, ..ServerOptions::default() };
    Setup { directory: Some(directory.path()), options, ..Setup::default() }
}

fn line(name: &str, url: &str, body: &Value) -> String {
    json!({"custom_id": name, "method": "POST", "url": url, "body": body}).to_string() + "\n"
}

/// Lines that ask for a few tokens each.
fn lines(count: usize) -> String {
    let line = |at: usize| {
        let body = completion(json!({"max_tokens": 3, "prompt": format!("Number {at}")}));
        line(&format!("line-{at}"), COMPLETIONS, &body)
    };
    (0..count).map(line).collect()
}

async fn begin(server: &Server, endpoint: &str, text: &str) -> Value {
    let file = upload(server, None, text).await;
    let body = json!({"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h"});
    server.post("/v1/batches", &body).await.ok()
}

fn path(batch: &Value) -> String {
    format!("/v1/batches/{}", batch["id"].as_str().unwrap())
}

/// Waits until a batch is as it should be.
async fn until(server: &Server, batch: &Value, is_there: impl Fn(&Value) -> bool) -> Value {
    let wait = async {
        loop {
            let now = server.get(&path(batch)).await.ok();
            if is_there(&now) {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("the batch goes on")
}

async fn ended(server: &Server, batch: &Value) -> Value {
    let is_over = |now: &Value| {
        ["completed", "failed", "expired", "cancelled"].contains(&now["status"].as_str().unwrap())
    };
    until(server, batch, is_over).await
}

/// The lines of a file that a batch wrote, by name; a name twice fails.
async fn written(server: &Server, file: &Value) -> BTreeMap<String, Value> {
    let content = server.get(&format!("/v1/files/{}/content", file.as_str().unwrap())).await;
    assert_eq!(content.status, 200);
    let mut found = BTreeMap::new();
    for text in std::str::from_utf8(&content.body).unwrap().lines() {
        let line: Value = serde_json::from_str(text).unwrap();
        let keys: Vec<&String> = line.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["id", "custom_id", "response", "error"]);
        let name = line["custom_id"].as_str().unwrap().to_owned();
        assert_eq!(found.insert(name, line), None, "a line was answered twice");
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_answered_as_requests_are() {
    let directory = Directory::new();
    let server = start(setup(&directory, 4)).await;
    let own = completion(json!({"max_tokens": 4, "temperature": 0, "priority": -9}));
    let text = [
        line("good", COMPLETIONS, &own),
        line("wrong", COMPLETIONS, &completion(json!({"temperature": "hot"}))),
        line("other", COMPLETIONS, &completion(json!({"model": "none"}))),
        "\n".to_owned(),
        line("last", COMPLETIONS, &own),
    ];
    let file = upload(&server, None, &text.concat()).await;
    let body = json!({
        "input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h", "metadata": {"a": "b"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    });
    let made = server.post("/v1/batches", &body).await.ok();
    assert_eq!((&made["object"], &made["status"]), (&json!("batch"), &json!("validating")));
    // The batch has lines of its own.
    send(&server, None, ("DELETE", &format!("/v1/files/{}", file["id"].as_str().unwrap())), Body::empty())
        .await
        .ok();
    let batch = ended(&server, &made).await;
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["request_counts"], json!({"total": 4, "completed": 2, "failed": 2}));
    assert_eq!(batch["metadata"], json!({"a": "b"}));
    for at in ["in_progress_at", "finalizing_at", "completed_at"] {
        assert!(batch[at].as_u64() >= batch["created_at"].as_u64(), "{at}: {batch}");
    }
    let good = written(&server, &batch["output_file_id"]).await;
    let alone = server.post(COMPLETIONS, &own).await.ok();
    assert_eq!(good.keys().collect::<Vec<_>>(), ["good", "last"]);
    for line in good.values() {
        let response = &line["response"];
        assert_eq!((&response["status_code"], &line["error"]), (&json!(200), &Value::Null));
        assert!(response["request_id"].as_str().unwrap().starts_with("req_"));
        assert_eq!(response["body"]["choices"], alone["choices"]);
    }
    let bad = written(&server, &batch["error_file_id"]).await;
    assert_eq!(bad["wrong"]["response"]["status_code"], 400);
    assert_eq!(bad["wrong"]["response"]["body"]["error"]["param"], "temperature");
    assert_eq!(bad["other"]["response"]["status_code"], 404);
    let output = server.get(&format!("/v1/files/{}", batch["output_file_id"].as_str().unwrap())).await.ok();
    assert_eq!(output["purpose"], "batch_output");
    assert_eq!(output["expires_at"].as_u64(), output["created_at"].as_u64().map(|at| at + 3600));
    let cancelled = server.post(&format!("{}/cancel", path(&made)), &json!({})).await.error(409);
    assert_eq!(cancelled["code"], "batch_over");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_endpoint_has_batches() {
    let directory = Directory::new();
    let server = start(setup(&directory, 4)).await;
    let bodies = [
        (CHAT, chat(json!({"max_tokens": 2}))),
        ("/v1/embeddings", json!({"model": MODEL, "input": "some text"})),
        ("/v1/responses", json!({"model": MODEL, "input": "hi", "max_output_tokens": 2})),
    ];
    let mut batches = Vec::new();
    for (endpoint, body) in &bodies {
        batches.push(begin(&server, endpoint, &line("one", endpoint, body)).await);
    }
    for (batch, (endpoint, _)) in batches.iter().zip(&bodies) {
        let batch = ended(&server, batch).await;
        let counts = json!({"total": 1, "completed": 1, "failed": 0});
        assert_eq!(
            (&batch["status"], &batch["request_counts"]),
            (&json!("completed"), &counts),
            "{endpoint}"
        );
        assert!(batch.get("error_file_id").is_none());
    }
    let list = server.get("/v1/batches?limit=2").await.ok();
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|batch| &batch["id"]).collect();
    assert_eq!((ids, &list["has_more"]), (vec![&batches[2]["id"], &batches[1]["id"]], &json!(true)));
    let rest = server.get(&format!("/v1/batches?after={}", list["last_id"].as_str().unwrap())).await.ok();
    assert_eq!((&rest["data"][0]["id"], &rest["has_more"]), (&batches[0]["id"], &json!(false)));
}

/// The answers that a batch has on disk: the name of each line and the id of its answer.
fn journaled(directory: &Path, batch: &Value) -> BTreeMap<String, String> {
    let tenants = std::fs::read_dir(directory.join("batches")).unwrap();
    let answers = tenants.map(|tenant| tenant.unwrap().path().join(batch["id"].as_str().unwrap()));
    let text = answers.filter_map(|path| std::fs::read_to_string(path.join("answers")).ok()).next().unwrap();
    let answer = |line: &str| {
        let answer: Value = serde_json::from_str(line.splitn(3, ' ').nth(2)?).ok()?;
        Some((answer["custom_id"].as_str()?.to_owned(), answer["id"].as_str()?.to_owned()))
    };
    text.lines().filter_map(answer).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_goes_on_after_a_crash_and_answers_every_line_once() {
    let directory = Directory::new();
    let (open, gate) = channel();
    let server = start(Setup { gate: Some(gate), ..setup(&directory, 3) }).await;
    let batch = begin(&server, COMPLETIONS, &lines(40)).await;
    let mut crashed = Vec::new();
    for wanted in [1, 9, 20] {
        while server.get(&path(&batch)).await.ok()["request_counts"]["completed"].as_u64() < Some(wanted) {
            open.send(()).unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        crashed.push(directory.copied());
    }
    drop(open);
    drop(server);
    for (crashed, least) in crashed.into_iter().zip([1, 9, 20]) {
        let before = journaled(&crashed.path(), &batch);
        assert!((least..40).contains(&before.len()), "{} of 40", before.len());
        let server = start(setup(&crashed, 3)).await;
        let batch = ended(&server, &batch).await;
        assert_eq!(batch["request_counts"], json!({"total": 40, "completed": 40, "failed": 0}));
        let found = written(&server, &batch["output_file_id"]).await;
        assert_eq!(found.len(), 40);
        for (name, id) in before {
            assert_eq!(found[&name]["id"], *id, "{name} was answered before");
        }
        server.stop().await;
        let server = start(setup(&crashed, 3)).await;
        assert_eq!(server.get(&path(&batch)).await.ok(), batch);
        assert_eq!(written(&server, &batch["output_file_id"]).await, found);
        assert_eq!(server.get("/v1/files").await.ok()["data"].as_array().unwrap().len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_wait_where_the_queue_is_full() {
    let directory = Directory::new();
    let server = start(Setup { waiting: 1, chunks: 1, ..setup(&directory, 8) }).await;
    let batch = ended(&server, &begin(&server, COMPLETIONS, &lines(24)).await).await;
    assert_eq!(batch["request_counts"], json!({"total": 24, "completed": 24, "failed": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_batch_keeps_what_was_answered_and_names_the_rest() {
    let directory = Directory::new();
    let (open, gate) = channel();
    let server = start(Setup { gate: Some(gate), ..setup(&directory, 1) }).await;
    let batch = begin(&server, COMPLETIONS, &lines(5)).await;
    // Three steps a line.
    (0..4).for_each(|_| open.send(()).unwrap());
    until(&server, &batch, |now| now["request_counts"]["completed"] == 1).await;
    let asked = server.post(&format!("{}/cancel", path(&batch)), &json!({})).await.ok();
    assert!(["cancelling", "cancelled"].contains(&asked["status"].as_str().unwrap()), "{asked}");
    let cancelled = ended(&server, &batch).await;
    assert_eq!(cancelled["status"], "cancelled");
    assert!(cancelled["cancelling_at"].is_u64() && cancelled["cancelled_at"].is_u64());
    assert_eq!(
        written(&server, &cancelled["output_file_id"]).await.into_keys().collect::<Vec<_>>(),
        ["line-0"]
    );
    let rest = written(&server, &cancelled["error_file_id"]).await;
    assert_eq!(rest.keys().collect::<Vec<_>>(), ["line-1", "line-2", "line-3", "line-4"]);
    assert!(
        rest.values().all(|line| line["error"]["code"] == "batch_cancelled" && line["response"].is_null())
    );
    drop(open);
    server.idle().await;
    server.post(&format!("{}/cancel", path(&batch)), &json!({})).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_lines_fail_the_batch_and_are_named() {
    let directory = Directory::new();
    let server = start(setup(&directory, 2)).await;
    let stream = completion(json!({"stream": true}));
    let text = [
        line("a", COMPLETIONS, &completion(json!({}))),
        "{\n".to_owned(),
        line("a", COMPLETIONS, &completion(json!({}))),
        line("b", CHAT, &chat(json!({}))),
        line("c", COMPLETIONS, &stream),
    ];
    let batch = ended(&server, &begin(&server, COMPLETIONS, &text.concat()).await).await;
    assert_eq!(batch["status"], "failed");
    assert!(batch["failed_at"].is_u64() && batch.get("output_file_id").is_none());
    let errors = batch["errors"]["data"].as_array().unwrap();
    let found: Vec<(u64, &str)> = errors
        .iter()
        .map(|error| (error["line"].as_u64().unwrap(), error["code"].as_str().unwrap()))
        .collect();
    let expected =
        [(2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_url"), (5, "invalid_body")];
    assert_eq!(found, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_order_names_what_is_wrong() {
    let directory = Directory::new();
    let server = start(setup(&directory, 2)).await;
    let file = upload(&server, None, &lines(1)).await;
    let other = form(&[("purpose", None, "user_data"), ("file", Some("x"), "{}")]);
    let other = send(&server, None, ("POST", "/v1/files"), other.into()).await.ok();
    let cases = [
        ("input_file_id", json!("file-none")),
        ("input_file_id", json!(null)),
        ("input_file_id", other["id"].clone()),
        ("endpoint", json!("/v1/rerank")),
        ("endpoint", json!(7)),
        ("completion_window", json!("soon")),
        ("completion_window", json!(null)),
        ("metadata", json!([])),
    ];
    for (field, value) in cases {
        let mut body =
            json!({"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"});
        body[field] = value.clone();
        assert_eq!(server.post("/v1/batches", &body).await.error(400)["param"], field, "{value}");
    }
    assert_eq!(server.get("/v1/batches").await.ok()["data"], json!([]));
    let server = start(Setup::default()).await;
    assert_eq!(server.get("/v1/batches").await.error(404)["code"], "files_disabled");
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_nobody_elses() {
    let directory = Directory::new();
    let mut setup = setup(&directory, 2);
    setup.options.api_keys = ["a:one", "b:two"].map(|key| key.parse::<ApiKey>().unwrap()).to_vec();
    let server = start(setup).await;
    let file = upload(&server, Some("one"), &lines(2)).await;
    let order = json!({"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "1h"});
    let post = |key| send(&server, Some(key), ("POST", "/v1/batches"), order.to_string().into());
    assert_eq!(post("two").await.error(400)["param"], "input_file_id");
    let made = post("one").await.ok();
    let cancel = format!("{}/cancel", path(&made));
    for (method, path) in [("GET", path(&made)), ("POST", cancel.clone())] {
        let reply = send(&server, Some("two"), (method, &path), Body::empty()).await;
        assert_eq!(reply.error(404)["code"], "batch_not_found");
    }
    let list = send(&server, Some("two"), ("GET", "/v1/batches"), Body::empty()).await.ok();
    assert_eq!(list["data"], json!([]));
    let list = send(&server, Some("one"), ("GET", "/v1/batches"), Body::empty()).await.ok();
    assert_eq!(list["data"][0]["id"], made["id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_before_those_of_a_lower_tier_and_before_batches() {
    let directory = Directory::new();
    let (open, gate) = channel();
    let server = start(Setup { gate: Some(gate), chunks: 1, ..setup(&directory, 4) }).await;
    let batch = begin(&server, COMPLETIONS, &lines(4)).await;
    let engine = server.engine.clone();
    let queued = async |count| {
        while engine.stats().running + engine.stats().waiting < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    queued(4).await;
    let (ends, mut ended) = tokio::sync::mpsc::unbounded_channel();
    let server = Arc::new(server);
    for (at, (name, tier)) in
        [("flex", "flex"), ("none", "auto"), ("first", "priority")].into_iter().enumerate()
    {
        let (server, ends) = (server.clone(), ends.clone());
        tokio::spawn(async move {
            let body = completion(json!({"max_tokens": 2, "service_tier": tier}));
            server.post(COMPLETIONS, &body).await.ok();
            ends.send(name).unwrap();
        });
        queued(5 + at).await;
    }
    drop(ends);
    let mut order = Vec::new();
    while order.len() < 3 {
        open.send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        while let Ok(name) = ended.try_recv() {
            order.push(name);
        }
        if order.is_empty() {
            let batch = server.get(&path(&batch)).await.ok();
            assert!(batch["request_counts"]["completed"].as_u64() <= Some(1), "{batch}");
        }
    }
    assert_eq!(order, ["first", "none", "flex"]);
    let batch = server.get(&path(&batch)).await.ok();
    assert!(batch["request_counts"]["completed"].as_u64() <= Some(2), "{batch}");
}
