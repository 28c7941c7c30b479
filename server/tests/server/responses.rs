//! Responses and conversations: chains, forks, streams read again, background, restarts.

use std::sync::mpsc::channel;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::{Value, json};

use crate::sessions::with_store;
use crate::testbed::{Directory, MODEL, Open, Reply, Server, Setup, start};

const RESPONSES: &str = "/v1/responses";

fn body(input: &str, patch: Value) -> Value {
    let mut body = json!({"model": MODEL, "input": input, "max_output_tokens": 12, "temperature": 0});
    body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    body
}

async fn create(server: &Server, input: &str, patch: Value) -> Value {
    server.post(RESPONSES, &body(input, patch)).await.ok()
}

async fn delete(server: &Server, path: &str) -> Reply {
    let request = Request::builder().method(Method::DELETE).uri(path).header("host", "test");
    server.send(request.body(Body::empty()).unwrap()).await
}

/// The events of a response's stream; each names its type twice.
pub(crate) async fn events(mut stream: Open) -> Vec<Value> {
    let mut events = Vec::new();
    while let Some(block) = stream.block().await {
        let data = block.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
        if data == "[DONE]" {
            continue;
        }
        let event: Value = serde_json::from_str(data).unwrap();
        let kind = block.lines().find_map(|line| line.strip_prefix("event: ")).unwrap();
        assert_eq!(event["type"], kind);
        assert_eq!(event["sequence_number"], events.len(), "{event}");
        events.push(event);
    }
    events
}

pub(crate) async fn read(server: &Server, path: &str) -> Open {
    let request = Request::get(path).header("host", "test").body(Body::empty()).unwrap();
    let open = server.open(request).await;
    assert_eq!(open.response.status(), 200);
    open
}

fn text(response: &Value) -> String {
    let items = response["output"].as_array().unwrap().iter();
    items.filter_map(|item| item["content"][0]["text"].as_str()).collect()
}

pub(crate) async fn ended(server: &Server, id: &str) -> Value {
    loop {
        let response = server.get(&format!("{RESPONSES}/{id}")).await.ok();
        if response["status"] != "in_progress" {
            return response;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_chain_goes_on_from_restored_tokens_and_forks() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let long = "one two three ".repeat(40);
    let first = create(&server, &long, json!({"instructions": "be brief", "metadata": {"k": "v"}})).await;
    let id = first["id"].as_str().unwrap();
    assert_eq!((&first["instructions"], &first["metadata"]["k"]), (&json!("be brief"), &json!("v")));
    assert_eq!(server.get(&format!("{RESPONSES}/{id}")).await.ok()["output"], first["output"]);
    let same = json!({"previous_response_id": id, "instructions": "be brief"});
    let second = create(&server, "go on", same.clone()).await;
    assert_eq!(second["previous_response_id"], id);
    let cached = second["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= first["usage"]["input_tokens"].as_u64().unwrap(), "{second}");
    // The second of two is a fork, which the first does not know of.
    let other = create(&server, "another way", same).await;
    assert_ne!(other["session"]["id"], second["session"]["id"]);
    assert_eq!(second["session"]["id"], first["session"]["id"]);
    let other_cached = other["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(other_cached >= first["usage"]["input_tokens"].as_u64().unwrap() / 32 * 32, "{other}");
    // Instructions are those of each response alone.
    let without = create(&server, "go on", json!({"previous_response_id": second["id"]})).await;
    assert_eq!(without["instructions"], Value::Null);
    // What follows stands without what it follows.
    assert_eq!(delete(&server, &format!("{RESPONSES}/{id}")).await.ok()["deleted"], true);
    server.get(&format!("{RESPONSES}/{id}")).await.error(404);
    let gone = server.post(RESPONSES, &body("x", json!({"previous_response_id": id}))).await.error(404);
    assert_eq!(gone["code"], "previous_response_not_found");
    for kept in [&second, &other, &without] {
        let path = format!("{RESPONSES}/{}", kept["id"].as_str().unwrap());
        assert_eq!(server.get(&path).await.ok()["output"], kept["output"]);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_chain_has_the_tokens_that_were_drawn() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let first = create(&server, "a b c", json!({})).await;
    let chained = create(&server, "d", json!({"previous_response_id": first["id"]})).await;
    let tokens = |of: &Value, name: &str| of["usage"][name].as_u64().unwrap();
    let before = tokens(&first, "input_tokens") + tokens(&first, "output_tokens");
    assert!(tokens(&chained, "input_tokens") > before, "{chained}");
    let asked = body("d", json!({"previous_response_id": first["id"]}));
    let count = server.post("/v1/responses/input_tokens", &asked).await.ok();
    assert_eq!(count["input_tokens"], chained["usage"]["input_tokens"]);
    let listed =
        server.get(&format!("{RESPONSES}/{}/input_items", chained["id"].as_str().unwrap())).await.ok();
    assert_eq!(listed["data"][0]["content"][0]["text"], "d");
    server.stop().await;
}

#[tokio::test]
async fn a_stream_is_read_again_with_the_same_events() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let live = events(server.stream(RESPONSES, &body("tell me", json!({"stream": true}))).await).await;
    let last = live.last().unwrap();
    assert_eq!(last["type"], format!("response.{}", last["response"]["status"].as_str().unwrap()));
    let id = last["response"]["id"].as_str().unwrap();
    let again = events(read(&server, &format!("{RESPONSES}/{id}?stream=true")).await).await;
    assert_eq!(again.len(), live.len());
    let end = live.len() - 1;
    assert_eq!(again[2..end], live[2..end]);
    assert_eq!(again[end]["response"], last["response"]);
    let mut rest = read(&server, &format!("{RESPONSES}/{id}?stream=true&starting_after=3")).await;
    let block = rest.block().await.unwrap();
    assert!(block.contains("\"sequence_number\":4"), "{block}");
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_stored_is_not_found() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let response = create(&server, "hi", json!({"store": false})).await;
    assert_eq!(response["store"], false);
    server.get(&format!("{RESPONSES}/{}", response["id"].as_str().unwrap())).await.error(404);
    assert_eq!(server.get("/v1/sessions").await.ok()["data"], json!([]));
    server.stop().await;
    // Without a store nothing is kept, and only what must be is refused.
    let server = start(Setup::default()).await;
    assert_eq!(create(&server, "hi", json!({})).await["store"], false);
    let asked = body("hi", json!({"background": true}));
    assert_eq!(server.post(RESPONSES, &asked).await.error(404)["code"], "sessions_disabled");
}

/// A server that makes as many steps as it is told.
async fn gated(directory: &Directory, steps: usize) -> (Server, std::sync::mpsc::Sender<()>) {
    let (gate, blocked) = channel();
    (0..steps).for_each(|_| gate.send(()).unwrap());
    let mut setup = Setup { gate: Some(blocked), ..with_store(directory) };
    setup.options.journal_interval = Some(Duration::ZERO);
    (start(setup).await, gate)
}

#[tokio::test]
async fn a_response_in_the_background_survives_a_crash() {
    let ask = || body("count", json!({"background": true, "temperature": 1, "seed": 5}));
    let unbroken = {
        let directory = Directory::new();
        let server = start(with_store(&directory)).await;
        let begun = server.post(RESPONSES, &ask()).await.ok();
        assert_eq!((&begun["status"], &begun["background"]), (&json!("in_progress"), &json!(true)));
        let response = ended(&server, begun["id"].as_str().unwrap()).await;
        server.stop().await;
        text(&response)
    };
    let directory = Directory::new();
    let (server, _gate) = gated(&directory, 5).await;
    let begun = server.post(RESPONSES, &ask()).await.ok();
    let id = begun["id"].as_str().unwrap().to_owned();
    assert_eq!(server.get(&format!("{RESPONSES}/{id}")).await.ok()["status"], "in_progress");
    let crashed = directory.copied();
    drop(server);
    let server = start(with_store(&crashed)).await;
    let response = ended(&server, &id).await;
    assert_eq!(response["status"], "incomplete", "{response}");
    assert_eq!(text(&response), unbroken);
    server.stop().await;
}

#[tokio::test]
async fn a_response_in_the_background_is_cancelled() {
    let directory = Directory::new();
    let (server, gate) = gated(&directory, 4).await;
    let begun = server.post(RESPONSES, &body("count", json!({"background": true}))).await.ok();
    let path = format!("{RESPONSES}/{}", begun["id"].as_str().unwrap());
    let (place, nothing) = (format!("{path}/cancel"), json!({}));
    let cancel = server.post(&place, &nothing);
    let release = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        (0..50).for_each(|_| gate.send(()).unwrap_or_default());
    };
    let (cancelled, ()) = tokio::join!(cancel, release);
    assert_eq!(cancelled.ok()["status"], "cancelled");
    assert_eq!(server.post(&format!("{path}/cancel"), &json!({})).await.ok()["status"], "cancelled");
    server.idle().await;
    let plain = create(&server, "x", json!({"max_output_tokens": 1})).await;
    server
        .post(&format!("{RESPONSES}/{}/cancel", plain["id"].as_str().unwrap()), &json!({}))
        .await
        .error(400);
    server.stop().await;
}

#[tokio::test]
async fn a_conversation_is_what_is_said_in_it() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let asked = json!({"metadata": {"a": "1"}, "items": [
        {"type": "message", "role": "user", "content": "the first thing"},
    ]});
    let made = server.post("/v1/conversations", &asked).await.ok();
    let path = format!("/v1/conversations/{}", made["id"].as_str().unwrap());
    let first = create(&server, "hi", json!({"conversation": made["id"]})).await;
    assert_eq!(first["conversation"]["id"], made["id"]);
    let plain = create(&server, "hi", json!({})).await;
    let tokens = |response: &Value| response["usage"]["input_tokens"].as_u64().unwrap();
    assert!(tokens(&first) > tokens(&plain), "items without an answer are part of the prompt");
    let more = json!({"items": [{"role": "user", "content": "more"}]});
    let added = server.post(&format!("{path}/items"), &more).await.ok();
    let second = create(&server, "and", json!({"conversation": {"id": made["id"]}})).await;
    let cached = second["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= tokens(&first), "{second}");
    server.stop().await;

    let server = start(with_store(&directory)).await;
    let list = server.get(&format!("{path}/items?order=asc")).await.ok();
    let roles: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|item| item["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "user", "assistant", "user", "user", "assistant"]);
    let item = format!("{path}/items/{}", added["data"][0]["id"].as_str().unwrap());
    assert_eq!(server.get(&item).await.ok()["content"][0]["text"], "more");
    assert_eq!(delete(&server, &item).await.ok()["id"], made["id"]);
    server.get(&item).await.error(404);
    // Without the item the prompt is shorter than with it.
    let third = create(&server, "and", json!({"conversation": made["id"]})).await;
    let again = create(&server, "and", json!({"previous_response_id": third["id"], "store": false})).await;
    assert!(tokens(&again) > tokens(&third));
    assert_eq!(delete(&server, &path).await.ok()["deleted"], true);
    server.get(&path).await.error(404);
    server.stop().await;
}

#[tokio::test]
async fn a_chain_that_has_grown_too_long_is_cut_or_refused() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let long = "word ".repeat(90);
    let mut last = create(&server, &long, json!({})).await;
    let refused = loop {
        let asked = body(&long, json!({"previous_response_id": last["id"]}));
        let reply = server.post(RESPONSES, &asked).await;
        if reply.status != 200 {
            break reply.error(400);
        }
        last = reply.ok();
    };
    assert_eq!((&refused["code"], &refused["param"]), (&json!("context_length_exceeded"), &json!("input")));
    let cut = json!({"previous_response_id": last["id"], "truncation": "auto"});
    let next = create(&server, &long, cut).await;
    assert_eq!(next["truncation"], "auto");
    // The ones before it are still there, and it can be gone on from.
    assert_eq!(
        server.get(&format!("{RESPONSES}/{}", last["id"].as_str().unwrap())).await.ok()["output"],
        last["output"]
    );
    let mut after = next.clone();
    for _ in 0..5 {
        let cut = json!({"previous_response_id": after["id"], "truncation": "auto"});
        after = create(&server, &long, cut).await;
    }
    // What was left out is written once more with each turn that takes its place, not twice.
    let (tenant, session) = server.id(after["session"]["id"].as_str().unwrap());
    let turns = server.store.as_deref().unwrap().turns(tenant, session).unwrap();
    let written = String::from_utf8_lossy(&turns.last().unwrap().meta).into_owned();
    let id = format!("\"id\":{},\"created_at\"", last["id"]);
    assert_eq!(written.matches(&id).count(), 1, "{} bytes", written.len());
    server.stop().await;
}

#[tokio::test]
async fn calls_are_items_and_their_results_are_input() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    server.will_say("{\"name\": \"get_w\", \"arguments\": {\"city\": \"Paris\"}}");
    let tool = json!({"type": "function", "name": "get_w", "parameters": {"type": "object"}});
    let asked = json!({"tools": [tool], "max_output_tokens": 100, "stream": true});
    let live = events(server.stream(RESPONSES, &body("weather?", asked)).await).await;
    let kinds: Vec<&str> = live.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert!(kinds.contains(&"response.function_call_arguments.done"), "{kinds:?}");
    let response = &live.last().unwrap()["response"];
    assert_eq!(response["status"], "completed", "{response}");
    let call = &response["output"][0];
    assert_eq!((&call["type"], &call["name"]), (&json!("function_call"), &json!("get_w")));
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({"city": "Paris"}));
    let input = json!([{"type": "function_call_output", "call_id": call["call_id"], "output": "21"}]);
    let next = json!({"input": input, "previous_response_id": response["id"], "tools": [tool]});
    assert_eq!(create(&server, "", next).await["output"][0]["type"], "message");
    server.stop().await;
}
