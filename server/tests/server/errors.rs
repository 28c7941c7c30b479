//! Requests that are refused, and how.

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use crate::testbed::{CHAT, COMPLETIONS, CONTEXT, MODEL, Setup, chat, completion, request, start};

/// Each patch is refused with 400, and the error names the field.
async fn refused(path: &str, body: fn(Value) -> Value, cases: &[(Value, &str)]) {
    let server = start(Setup::default()).await;
    for (patch, param) in cases {
        for stream in [false, true] {
            let mut body = body(patch.clone());
            if body.get("stream").is_none() {
                body["stream"] = json!(stream);
            }
            let error = server.post(path, &body).await.error(400);
            assert_eq!(error["param"], *param, "{patch}: {error}");
            assert_eq!(error["type"], "invalid_request_error");
        }
    }
    assert_eq!(server.engine.stats().steps, 0, "a wrong request reached the engine");
}

#[tokio::test]
async fn fields_that_both_endpoints_share() {
    let keys: serde_json::Map<String, Value> = (0..17).map(|n| (n.to_string(), json!("v"))).collect();
    let cases = [
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": true}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.01}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1.5}), "top_k"),
        (json!({"min_p": 1.5}), "min_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"presence_penalty": 2.5}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"n": 0}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"n": "2"}), "n"),
        (json!({"seed": "x"}), "seed"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": "x"}), "max_tokens"),
        (json!({"max_tokens": 4, "min_tokens": 5}), "min_tokens"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": 3}), "stop"),
        (json!({"stop": ["a", 3]}), "stop"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop_token_ids": [99_999]}), "stop_token_ids"),
        (json!({"stop_token_ids": 3}), "stop_token_ids"),
        (json!({"logit_bias": {"99999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"logit_bias": [5]}), "logit_bias"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": 3}), "stream_options"),
        (json!({"stream_options": {"include_usage": 3}}), "stream_options.include_usage"),
        (json!({"ignore_eos": 1}), "ignore_eos"),
        (json!({"user": 3}), "user"),
        (json!({"metadata": {"a": 1}}), "metadata"),
        (json!({"metadata": keys}), "metadata"),
        (json!({"model": 3}), "model"),
        (json!({"model": null}), "model"),
        (json!({"response_format": {"type": "nope"}}), "response_format.type"),
        (json!({"response_format": {}}), "response_format.type"),
        (json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}), "guided_regex"),
        (json!({"guided_json": 3}), "guided_json"),
        (json!({"guided_json": "{"}), "guided_json"),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
        (json!({"guided_choice": []}), "guided_choice"),
        (json!({"guided_choice": ["a", ""]}), "guided_choice[1]"),
        (json!({"structured_outputs": {}}), "structured_outputs"),
        (json!({"structured_outputs": {"regex": 3}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"regex": "a", "json_object": true}}), "structured_outputs"),
        (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs.structural_tag"),
    ];
    refused(CHAT, chat, &cases).await;
    refused(COMPLETIONS, completion, &cases).await;
}

#[tokio::test]
async fn fields_of_chat() {
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let cases = [
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": [{"role": "alien", "content": "x"}]}), "messages[0].role"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"tools": {}}), "tools"),
        (json!({"tools": [3]}), "tools[0]"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": [tool], "tool_choice": "some"}), "tool_choice"),
        (json!({"tools": [tool], "tool_choice": {"type": "function"}}), "tool_choice.function"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"functions": [{"name": "f"}], "function_call": 3}), "function_call"),
        (json!({"function_call": {"name": "f"}}), "function_call.name"),
        (json!({"include_reasoning": 1}), "include_reasoning"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {}}}),
            "response_format.json_schema.name",
        ),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"web_search_options": {}}), "web_search_options"),
        (json!({"store": "yes"}), "store"),
        (json!({"chat_template_kwargs": []}), "chat_template_kwargs"),
        (json!({"continue_final_message": true}), "continue_final_message"),
        (json!({"continue_final_message": true, "add_generation_prompt": true}), "continue_final_message"),
    ];
    refused(CHAT, chat, &cases).await;
}

#[tokio::test]
async fn fields_of_completions() {
    let cases = [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": ["a", 3]}), "prompt"),
        (json!({"prompt": [1, 99_999]}), "prompt"),
        (json!({"prompt": [[1], [-1]]}), "prompt[1]"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": vec!["x"; 100], "n": 100}), "prompt"),
        (json!({"logprobs": 10_000}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"suffix": "end"}), "suffix"),
        (json!({"echo": "x"}), "echo"),
    ];
    refused(COMPLETIONS, completion, &cases).await;
}

#[tokio::test]
async fn hints_and_unknown_fields_are_accepted() {
    let server = start(Setup::default()).await;
    let hints = json!({"user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
        "parallel_tool_calls": true, "safety_identifier": "x", "prompt_cache_key": "k", "reasoning_effort": "low",
        "verbosity": "low", "prediction": {"type": "content", "content": "x"}, "totally_unknown": {"x": 1},
        "modalities": ["text"], "response_format": {"type": "text"}, "priority": 3, "max_tokens": 1, "tools": [],
        "tool_choice": "auto", "stream_options": {"include_usage": true}, "top_logprobs": 0, "stop": []});
    server.post(CHAT, &chat(hints)).await.ok();
    let hints = json!({"user": "u", "best_of": 1, "suffix": "", "unknown": 1, "max_tokens": 1});
    server.post(COMPLETIONS, &completion(hints)).await.ok();
}

#[tokio::test]
async fn bodies_that_are_no_object() {
    let server = start(Setup::default()).await;
    let deep = "[".repeat(100_000);
    for raw in [&b"{"[..], b"", b"[]", b"null", b"\xff\xfe{}", b"{\"model\": 1e999}", deep.as_bytes()] {
        let request = Request::post(CHAT).header("host", "test").body(Body::from(raw.to_vec())).unwrap();
        server.send(request).await.error(400);
    }
    // A wrong or missing content type does not matter.
    let body = chat(json!({"max_tokens": 1})).to_string();
    let request = Request::post(CHAT).header("content-type", "text/plain").body(Body::from(body)).unwrap();
    server.send(request).await.ok();
}

#[tokio::test]
async fn unknown_routes_methods_and_models() {
    let server = start(Setup::default()).await;
    assert_eq!(server.get("/v1/no_such_route").await.error(404)["type"], "invalid_request_error");
    server.get("/").await.error(404);
    let put = Request::put(CHAT).body(Body::from("{}")).unwrap();
    server.send(put).await.error(405);
    server.get(COMPLETIONS).await.error(405);
    // Completions are kept where there is a place to keep them.
    assert_eq!(server.get(CHAT).await.error(404)["code"], "sessions_disabled");
    let kept = chat(json!({"store": true}));
    assert_eq!(server.post(CHAT, &kept).await.error(404)["code"], "sessions_disabled");
    for (path, body) in
        [(CHAT, chat(json!({"model": "nope"}))), (COMPLETIONS, completion(json!({"model": "nope"})))]
    {
        let error = server.post(path, &body).await.error(404);
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    }
}

#[tokio::test]
async fn prompts_that_do_not_fit() {
    let server = start(Setup::default()).await;
    let long = "tree 7 ".repeat(CONTEXT * 2);
    let messages = json!([{"role": "user", "content": long}]);
    let error = server.post(CHAT, &chat(json!({"messages": messages, "stream": true}))).await.error(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("messages")));
    let message = error["message"].as_str().unwrap();
    let numbers: Vec<usize> =
        message.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    assert!(numbers.contains(&CONTEXT) && numbers.iter().any(|n| *n > CONTEXT), "{message}");
    let error = server.post(COMPLETIONS, &completion(json!({"max_tokens": CONTEXT}))).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let exact = json!({"prompt": vec![40; CONTEXT - 1], "max_tokens": 1});
    server.post(COMPLETIONS, &completion(exact)).await.ok();
}

#[tokio::test]
async fn what_only_the_engine_knows_is_told_in_the_words_of_the_api() {
    let server = start(Setup { chunks: 4, ..Setup::default() }).await;
    let error = server.post(CHAT, &chat(json!({"n": 5, "stream": true}))).await.error(400);
    assert_eq!((&error["param"], &error["message"]), (&json!("n"), &json!("n: expected 1 to 4, found 5")));
    let error = server.post(CHAT, &chat(json!({"repetition_penalty": 1e30}))).await.error(400);
    assert_eq!(error["param"], "repetition_penalty");
}

#[tokio::test]
async fn bodies_over_the_limit() {
    let mut setup = Setup::default();
    setup.options.body_limit_bytes = 10_000;
    let server = start(setup).await;
    let body = completion(json!({"prompt": "x ".repeat(2_000_000)}));
    assert_eq!(server.post(COMPLETIONS, &body).await.error(413)["type"], "invalid_request_error");
    server.post(COMPLETIONS, &completion(json!({"max_tokens": 1}))).await.ok();
}

#[tokio::test]
async fn a_model_without_a_template_takes_no_messages() {
    let server = start(Setup { template: None, ..Setup::default() }).await;
    let error = server.post(CHAT, &chat(json!({}))).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("no chat template"), "{error}");
    server.post(COMPLETIONS, &completion(json!({"max_tokens": 1}))).await.ok();
    let refusing = Some("{{ raise_exception('roles must alternate') }}".to_owned());
    let server = start(Setup { template: refusing, ..Setup::default() }).await;
    let error = server.post(CHAT, &chat(json!({}))).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("roles must alternate"), "{error}");
}

#[tokio::test]
async fn keys_guard_everything_but_health() {
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["sk-a".parse().unwrap(), "acme:sk-b".parse().unwrap()];
    setup.options.loopback = false;
    let server = start(setup).await;
    let body = chat(json!({"max_tokens": 1}));
    let with = |key: &str| {
        let mut request = request(CHAT, &body);
        request.headers_mut().insert("authorization", key.parse().unwrap());
        request
    };
    for path in ["/v1/models", "/metrics", "/no_such_route"] {
        server.get(path).await.error(401);
    }
    let reply = server.post(CHAT, &body).await;
    assert_eq!(
        (&reply.error(401)["code"], &reply.headers["www-authenticate"]),
        (&json!("invalid_api_key"), &"Bearer".parse().unwrap())
    );
    server.send(with("Bearer wrong")).await.error(401);
    server.send(with("Bearer sk-a")).await.ok();
    server.send(with("Bearer sk-b")).await.ok();
    assert_eq!(server.get("/health").await.status, 200);
    for (loopback, public) in [(true, false), (false, true)] {
        let mut setup = Setup::default();
        setup.options.api_keys = vec!["sk-a".parse().unwrap()];
        setup.options.loopback = loopback;
        setup.options.public_metrics = public;
        let server = start(setup).await;
        assert_eq!(server.get("/metrics").await.status, 200);
        server.get("/v1/models").await.error(401);
    }
}

#[tokio::test]
async fn tenants_share_no_pages() {
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["a:key-a".parse().unwrap(), "b:key-b".parse().unwrap()];
    let server = start(setup).await;
    let body = completion(json!({"prompt": "one two three ".repeat(40), "max_tokens": 1}));
    let mut cached = Vec::new();
    for key in ["key-a", "key-b", "key-a"] {
        let mut request = request(COMPLETIONS, &body);
        request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        let answer = server.send(request).await.ok();
        cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap());
    }
    assert!(cached[0] == 0 && cached[1] == 0 && cached[2] >= 32, "{cached:?}");
}

#[tokio::test]
async fn request_ids_are_echoed_if_they_are_sane() {
    let server = start(Setup::default()).await;
    let with = |id: &str| Request::get("/health").header("x-request-id", id).body(Body::empty()).unwrap();
    assert_eq!(server.send(with("abc-123")).await.headers["x-request-id"], "abc-123");
    let made = server.send(with(&"x".repeat(200))).await.headers["x-request-id"].clone();
    assert!(made.to_str().unwrap().starts_with("req_"), "{made:?}");
    assert!(server.get("/no_such_route").await.headers.contains_key("x-request-id"));
    assert_eq!(server.get(&format!("/v1/models/{MODEL}")).await.status, 200);
}
