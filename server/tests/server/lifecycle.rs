//! Loading, failing, waiting, leaving and going down.

use std::sync::mpsc::channel;
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use mainstay_server::{Registry, ServerOptions};
use serde_json::{Value, json};

use crate::testbed::{CHAT, COMPLETIONS, MODEL, Server, Setup, chat, completion, joined, listen, start};

/// A request that never ends by itself within a test.
fn endless(stream: bool) -> Value {
    chat(json!({"logit_bias": {"36": 100}, "stream": stream}))
}

#[tokio::test]
async fn nothing_is_served_before_the_model_is_ready() {
    let ready = start(Setup::default()).await;
    let parts = (ready.engine.clone(), ready.tokenizer.clone());
    let registry = Registry::loading([MODEL.to_owned()]);
    let server = listen(registry.clone(), ServerOptions::default(), parts).await;
    for reply in [
        server.get("/health").await,
        server.get("/v1/models").await,
        server.post(CHAT, &chat(json!({}))).await,
        server.post(COMPLETIONS, &completion(json!({"stream": true}))).await,
    ] {
        assert_eq!(reply.error(503)["code"], "model_loading");
        assert!(reply.headers.contains_key("retry-after"));
    }
    assert_eq!(server.get("/metrics").await.status, 200);
    registry.failed(MODEL, "tensor `x` is missing");
    let error = server.get("/health").await.error(503);
    assert!(error["message"].as_str().unwrap().contains("tensor `x` is missing"), "{error}");
    assert_eq!(ready.get("/health").await.status, 200);
    ready.engine.shutdown();
    ready.get("/health").await.error(503);
    ready.post(CHAT, &chat(json!({}))).await.error(503);
}

#[tokio::test]
async fn a_device_failure_is_an_error_before_the_stream_and_an_event_inside_it() {
    let server = start(Setup { fail_every: Some(1), ..Setup::default() }).await;
    server.post(CHAT, &chat(json!({}))).await.error(500);
    server.post(CHAT, &chat(json!({"stream": true}))).await.error(500);
    let server = start(Setup { fail_every: Some(8), ..Setup::default() }).await;
    let mut stream = server.stream(CHAT, &endless(true)).await;
    let mut last = Value::Null;
    while let Some(event) = stream.event().await {
        last = event;
    }
    assert_eq!(last["error"]["type"], "server_error", "{last}");
    assert_eq!(stream.block().await, None, "something follows the error");
    server.idle().await;
}

#[tokio::test]
async fn a_full_queue_is_429_with_a_time_to_come_back() {
    let (gate, blocked) = channel();
    let server = start(Setup { waiting: 2, gate: Some(blocked), ..Setup::default() }).await;
    let body = chat(json!({"max_tokens": 1}));
    let mut replies: FuturesUnordered<_> = (0..8).map(|_| server.post(CHAT, &body)).collect();
    // Those that are let in wait for the gate, so the first answer is a refusal.
    let refused = replies.next().await.unwrap();
    assert_eq!(refused.error(429)["code"], "queue_full");
    assert!(refused.headers.contains_key("retry-after"));
    drop(gate);
    let mut served = 0;
    while let Some(reply) = replies.next().await {
        assert!(reply.status == 200 || reply.status == 429, "{reply:?}");
        served += usize::from(reply.status == 200);
    }
    assert!(served >= 2, "{served} served");
}

#[tokio::test]
async fn time_limits_end_a_request() {
    for (stream, queue, status) in
        [(false, false, 504), (true, false, 504), (false, true, 503), (true, true, 503)]
    {
        let (gate, blocked) = channel();
        let mut setup = Setup { gate: Some(blocked), chunks: 1, ..Setup::default() };
        let limit = Some(Duration::from_millis(30));
        if queue {
            setup.options.queue_timeout = limit;
        } else {
            setup.options.request_timeout = limit;
        }
        let server = start(setup).await;
        let body = chat(json!({"max_tokens": 3, "stream": stream}));
        // One holds the only chunk of a step, which waits for the gate, so the other is not started.
        let mut replies: FuturesUnordered<_> = (0..2).map(|_| server.post(CHAT, &body)).collect();
        replies.next().await.unwrap().error(status);
        if queue {
            // The time limit of the queue does not hold for the one that was started.
            drop(gate);
            assert_eq!(replies.next().await.unwrap().status, 200);
        } else {
            replies.next().await.unwrap().error(status);
            drop(gate);
        }
        drop(replies);
        server.idle().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_pages() {
    for stream in [true, false] {
        let (gate, blocked) = channel();
        let server = start(Setup { gate: Some(blocked), ..Setup::default() }).await;
        for _ in 0..6 {
            gate.send(()).unwrap();
        }
        if stream {
            let mut open = server.stream(CHAT, &endless(true)).await;
            open.event().await.unwrap();
            drop(open);
        } else {
            let task = {
                let address = server.address;
                tokio::spawn(async move { raw(address, &endless(false)).await })
            };
            while server.engine.stats().running == 0 {
                tokio::task::yield_now().await;
            }
            task.abort();
        }
        drop(gate);
        server.idle().await;
        let made = server.engine.stats().generated_tokens;
        let page = String::from_utf8(server.get("/metrics").await.body.to_vec()).unwrap();
        assert!(page.contains(&format!("vllm:num_requests_running{{model_name=\"{MODEL}\"}} 0\n")), "{page}");
        assert!(page.contains("finished_reason=\"abort\"} 1\n"), "{page}");
        assert!(made < 2000, "it ran to its end: {made}");
    }
}

/// Sends a request and waits for ever.
async fn raw(address: std::net::SocketAddr, body: &Value) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let body = body.to_string();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
}

#[tokio::test]
async fn many_streams_each_equal_their_lone_run() {
    let server = start(Setup::default()).await;
    let body = |n: usize| {
        let messages = json!([{"role": "user", "content": format!("story {n} ").repeat(n % 9 + 1)}]);
        chat(json!({"messages": messages, "temperature": 0, "max_tokens": 20 + n % 7, "stream": true,
                    "ignore_eos": true}))
    };
    let together = join_all((0..64).map(|n| {
        let server = &server;
        async move { server.stream(CHAT, &body(n)).await.events().await }
    }))
    .await;
    for (n, events) in together.iter().enumerate() {
        let lone = server.stream(CHAT, &body(n)).await.events().await;
        assert_eq!(joined(events, 0), joined(&lone, 0), "stream {n}");
        assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    }
    server.idle().await;
}

pub(crate) async fn drained(mut server: Server) {
    let task = std::mem::replace(&mut server.task, tokio::spawn(async { Ok(()) }));
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn draining_refuses_what_is_new_and_finishes_what_runs() {
    let (gate, blocked) = channel();
    let server = start(Setup { gate: Some(blocked), ..Setup::default() }).await;
    (0..3).for_each(|_| gate.send(()).unwrap());
    let body = chat(json!({"logit_bias": {"36": 100}, "stream": true, "max_tokens": 50}));
    let mut stream = server.stream(CHAT, &body).await;
    let first = stream.event().await.unwrap();
    server.trigger.advance();
    while server.get("/health").await.status == 200 {}
    // Long enough for a server without patience to be gone.
    for _ in 0..100 {
        assert_eq!(server.get("/health").await.error(503)["code"], "shutting_down");
    }
    let reply = server.post(CHAT, &chat(json!({}))).await;
    reply.error(503);
    assert!(reply.headers.contains_key("retry-after"));
    drop(gate);
    let mut events = vec![first];
    events.extend(stream.events().await);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    drained(server).await;
}

#[tokio::test]
async fn a_second_signal_and_the_end_of_patience_cut_what_runs() {
    for patience in [Some(Duration::ZERO), None] {
        let (gate, blocked) = channel();
        let mut setup = Setup { gate: Some(blocked), ..Setup::default() };
        setup.options.drain = patience.unwrap_or(Duration::from_secs(3600));
        let server = start(setup).await;
        (0..3).for_each(|_| gate.send(()).unwrap());
        let mut stream = server.stream(CHAT, &endless(true)).await;
        stream.event().await.unwrap();
        let engine = server.engine.clone();
        server.trigger.advance();
        if patience.is_none() {
            server.trigger.advance();
        }
        drained(server).await;
        drop(gate);
        while engine.stats().running > 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_long_wait_is_kept_alive_by_comments() {
    let (gate, blocked) = channel();
    let server = start(Setup { gate: Some(blocked), ..Setup::default() }).await;
    let mut stream = server.stream(CHAT, &chat(json!({"stream": true, "max_tokens": 2}))).await;
    assert!(stream.event().await.unwrap()["choices"][0]["delta"]["role"] == "assistant");
    for _ in 0..3 {
        assert_eq!(stream.block().await.as_deref(), Some(": keep-alive"));
    }
    drop(gate);
}

#[tokio::test]
async fn headers_that_do_not_come_end_the_connection() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut setup = Setup::default();
    setup.options.header_timeout = Duration::from_millis(20);
    let server = start(setup).await;
    for sent in [&b""[..], b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\n"] {
        let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        stream.write_all(sent).await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
    }
    // A body that stops in the middle is answered.
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\n{{");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut rest = vec![0; 12];
    stream.read_exact(&mut rest).await.unwrap();
    assert_eq!(rest, b"HTTP/1.1 408");
}

#[tokio::test]
async fn metrics_are_those_that_scrapers_know() {
    let server = start(Setup::default()).await;
    server.post(CHAT, &chat(json!({"max_tokens": 3, "logit_bias": {"36": 100}}))).await.ok();
    server.post(CHAT, &chat(json!({"temperature": 9}))).await.error(400);
    let reply = server.send(Request::get("/metrics").body(Body::empty()).unwrap()).await;
    assert_eq!(reply.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let page = String::from_utf8(reply.body.to_vec()).unwrap();
    let label = format!("{{model_name=\"{MODEL}\"}}");
    for line in [
        format!("vllm:num_requests_running{label} 0"),
        format!("vllm:num_requests_waiting{label} 0"),
        format!("vllm:kv_cache_usage_perc{label} 0"),
        format!("vllm:generation_tokens_total{label} 3"),
        format!("vllm:time_to_first_token_seconds_count{label} 1"),
        format!("vllm:inter_token_latency_seconds_count{label} 2"),
        format!("vllm:request_success_total{{model_name=\"{MODEL}\",finished_reason=\"length\"}} 1"),
        format!("mainstay_pages{{model_name=\"{MODEL}\",state=\"used\"}} 0"),
        "mainstay_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1".to_owned(),
        "mainstay_requests_total{route=\"/v1/chat/completions\",status=\"400\"} 1".to_owned(),
        format!("mainstay_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is missing in\n{page}");
    }
    assert!(page.contains("vllm:prompt_tokens_total"));
}
