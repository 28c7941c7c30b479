//! Anthropic's Messages API: whole answers, events, calls, errors.

use serde_json::{Value, json};

use crate::testbed::{MODEL, Open, Setup, start};

const MESSAGES: &str = "/v1/messages";

fn body(patch: Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 40, "temperature": 0,
        "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    body
}

async fn events(mut stream: Open) -> Vec<Value> {
    let mut events = Vec::new();
    while let Some(block) = stream.block().await {
        let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let event: Value = serde_json::from_str(field("data: ")).unwrap();
        assert_eq!(event["type"], field("event: "));
        events.push(event);
    }
    events
}

#[tokio::test]
async fn a_message_is_answered_whole_and_in_events() {
    let server = start(Setup::default()).await;
    server.will_say("Good day.");
    let whole = server.post(MESSAGES, &body(json!({"system": "be kind"}))).await.ok();
    assert_eq!((&whole["type"], &whole["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!(whole["content"], json!([{"type": "text", "text": "Good day."}]));
    assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!("end_turn"), &Value::Null));
    let counted = server.post("/v1/messages/count_tokens", &body(json!({"system": "be kind"}))).await.ok();
    let usage = &whole["usage"];
    let read = usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(counted["input_tokens"], read);

    server.will_say("Good day.");
    let stream = json!({"system": "be kind", "stream": true, "stop_sequences": ["day"]});
    let events = events(server.stream(MESSAGES, &body(stream)).await).await;
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..3], ["message_start", "ping", "content_block_start"]);
    assert_eq!(kinds[kinds.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(text, "Good ");
    let end = &events[events.len() - 2];
    assert_eq!(end["delta"], json!({"stop_reason": "stop_sequence", "stop_sequence": "day"}));
}

#[tokio::test]
async fn calls_are_blocks() {
    let server = start(Setup::default()).await;
    let tools = json!([{"name": "get_w", "input_schema": {"type": "object"}}]);
    for stream in [false, true] {
        server.will_say("{\"name\": \"get_w\", \"arguments\": {\"city\": \"Paris\"}}");
        let asked = body(json!({"tools": tools, "stream": stream, "max_tokens": 100}));
        let (call, reason) = if stream {
            let events = events(server.stream(MESSAGES, &asked).await).await;
            let start = events.iter().find(|event| event["type"] == "content_block_start").unwrap();
            let mut call = start["content_block"].clone();
            let arguments: String =
                events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
            call["input"] = serde_json::from_str(&arguments).unwrap();
            (call, events[events.len() - 2]["delta"]["stop_reason"].clone())
        } else {
            let whole = server.post(MESSAGES, &asked).await.ok();
            (whole["content"][0].clone(), whole["stop_reason"].clone())
        };
        assert_eq!((&call["type"], &call["name"]), (&json!("tool_use"), &json!("get_w")));
        assert_eq!((&call["input"], &reason), (&json!({"city": "Paris"}), &json!("tool_use")));
    }
}

#[tokio::test]
async fn errors_have_their_own_form() {
    let server = start(Setup::default()).await;
    for (patch, status, kind) in [
        (json!({"max_tokens": null}), 400, "invalid_request_error"),
        (json!({"model": "nope"}), 404, "not_found_error"),
        (json!({"messages": []}), 400, "invalid_request_error"),
    ] {
        let reply = server.post(MESSAGES, &body(patch)).await;
        assert_eq!(reply.status, status);
        let error = reply.json();
        assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!(kind)));
    }
}
