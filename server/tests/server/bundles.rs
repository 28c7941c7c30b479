//! Sessions that move: exported, imported, damaged on the way, broken off at either end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::{Method, Request};
use futures_util::stream;
use http_body_util::BodyExt;
use mainstay_engine::store::{Append, TenantId};
use mainstay_server::ServerOptions;
use serde_json::{Value, json};

use crate::session_routes::{SESSIONS, append, ask, created, kept};
use crate::testbed::{Directory, MODEL, Reply, Server};

const PATIENCE: Duration = Duration::from_secs(20);

async fn export(server: &Server, name: &str, query: &str) -> Vec<u8> {
    let reply = ask(server, Method::POST, &format!("{SESSIONS}/{name}/export{query}"), Value::Null).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.headers["content-type"], "application/vnd.mainstay.session");
    let file = reply.headers["content-disposition"].to_str().unwrap();
    assert!(file.starts_with("attachment; filename=\"sess_") && file.ends_with(".session\""), "{file}");
    reply.body.to_vec()
}

async fn import(server: &Server, query: &str, bundle: impl Into<Body>) -> Reply {
    let request = Request::post(format!("{SESSIONS}/import{query}")).header("host", "test");
    server.send(request.body(bundle.into()).unwrap()).await
}

/// A session of 200 tokens in two turns, its pages with the store.
async fn with_pages(server: &Server) -> Value {
    let body = json!({"name": "far", "metadata": {"k": "v"}, "ttl": 1000});
    let made = created(&ask(server, Method::POST, SESSIONS, body).await);
    append(server, &made, 1, 120);
    append(server, &made, 2, 80);
    ask(server, Method::POST, &format!("{SESSIONS}/far/prefetch"), Value::Null).await.ok();
    assert!(server.engine.settle(PATIENCE).await);
    server.get(&format!("{SESSIONS}/far")).await.ok()
}

async fn turns(server: &Server, name: &str) -> Value {
    let mut list = server.get(&format!("{SESSIONS}/{name}/turns?include=tokens")).await.ok();
    for turn in list["data"].as_array_mut().unwrap() {
        turn.as_object_mut().unwrap().remove("created_at");
    }
    list
}

async fn count(server: &Server) -> usize {
    server.get(&format!("{SESSIONS}?limit=100")).await.ok()["data"].as_array().unwrap().len()
}

#[tokio::test]
async fn a_session_moves_with_its_pages() {
    let (from, to) = (Directory::new(), Directory::new());
    let (here, there) =
        (kept(&from, ServerOptions::default()).await, kept(&to, ServerOptions::default()).await);
    let made = with_pages(&here).await;
    let (bundle, tokens) = (export(&here, "far", "").await, export(&here, "far", "?include=tokens").await);
    assert_eq!(export(&here, "far", "?include=kv").await, bundle, "pages go along");
    assert!(tokens.len() < bundle.len());
    let moved = created(&import(&there, "?name=near&include=kv", bundle.clone()).await);
    assert_ne!(moved["id"], made["id"]);
    for key in ["model", "metadata", "ttl", "durability", "turn_count", "token_count"] {
        assert_eq!(moved[key], made[key], "{key}");
    }
    assert_eq!((&moved["name"], &moved["kv"]["state"]), (&json!("near"), &json!("exact")));
    assert_eq!(moved["kv"]["stored_tokens"], made["kv"]["stored_tokens"]);
    assert!(moved["kv"]["pages"].as_u64().unwrap() >= 6, "{moved}");
    assert_eq!(moved["kv"]["pages_refused"], 0);
    assert_eq!(turns(&there, "near").await, turns(&here, "far").await);
    let warm = ask(&there, Method::POST, &format!("{SESSIONS}/near/prefetch"), Value::Null).await.ok();
    assert_eq!(warm["kv"]["state"], "exact");
    assert!(warm["kv"]["restored_tokens"].as_u64().unwrap() >= 192, "{warm}");

    let third = Directory::new();
    let cold = kept(&third, ServerOptions::default()).await;
    for (query, bundle, refused) in [("", bundle.clone(), true), ("?include=kv", tokens, false)] {
        let moved = created(&import(&cold, query, bundle).await);
        assert_eq!((&moved["name"], &moved["kv"]["state"]), (&Value::Null, &json!("cold")));
        assert_eq!((&moved["kv"]["pages"], &moved["token_count"]), (&json!(0), &json!(200)));
        assert_eq!(moved["kv"]["pages_refused"].as_u64().unwrap() > 0, refused);
    }
    created(&import(&cold, &format!("?include=kv&model={}", MODEL.replace('/', "%2F")), bundle).await);
}

#[tokio::test]
async fn what_is_not_whole_leaves_no_session() {
    let (from, to) = (Directory::new(), Directory::new());
    let (here, there) =
        (kept(&from, ServerOptions::default()).await, kept(&to, ServerOptions::default()).await);
    with_pages(&here).await;
    let bundle = export(&here, "far", "").await;
    let refuse = async |bundle: Vec<u8>, what: &str| {
        let error = import(&there, "?include=kv", bundle).await.error(400);
        // A flipped version is one of the future.
        assert!(
            ["invalid_bundle", "newer_format"].contains(&error["code"].as_str().unwrap()),
            "{what}: {error}"
        );
    };
    let step = bundle.len() / 40;
    for len in (0..bundle.len()).step_by(step).chain([1, 15, 16, bundle.len() - 1]) {
        refuse(bundle[..len].to_vec(), &format!("cut at {len}")).await;
    }
    for at in (0..bundle.len()).step_by(step).chain(0..24).chain([bundle.len() - 1]) {
        let mut flipped = bundle.clone();
        flipped[at] ^= 1 << (at % 8);
        refuse(flipped, &format!("flipped at {at}")).await;
    }
    refuse([bundle.clone(), vec![0]].concat(), "one byte more").await;
    refuse(b"{\"not\": \"a bundle\", \"but\": \"some JSON\"}".to_vec(), "JSON").await;
    assert_eq!(count(&there).await, 0);
    created(&import(&there, "?name=a", bundle.clone()).await);
    assert_eq!(import(&there, "?name=a", bundle.clone()).await.error(409)["code"], "name_taken");
    for (query, param) in [("?name=%0A", "name"), ("?include=all", "include")] {
        assert_eq!(import(&there, query, bundle.clone()).await.error(400)["param"], param);
    }
    assert_eq!(import(&there, "?model=other", bundle.clone()).await.error(404)["code"], "model_not_found");
    assert_eq!(count(&there).await, 1);
    let error = ask(&here, Method::POST, &format!("{SESSIONS}/far/export?include=some"), Value::Null).await;
    assert_eq!(error.error(400)["param"], "include");
}

#[tokio::test]
async fn a_bundle_beyond_the_limit_is_refused() {
    let directory = Directory::new();
    let options = ServerOptions { import_limit_bytes: 1000, ..ServerOptions::default() };
    let server = kept(&directory, options).await;
    with_pages(&server).await;
    let bundle = export(&server, "far", "?include=tokens").await;
    assert!(bundle.len() > 1000);
    assert_eq!(import(&server, "", bundle).await.error(413)["code"], "request_too_large");
    assert_eq!(count(&server).await, 1);
}

/// Waits until nobody but the server, its engine and this test holds the store.
async fn let_go(server: &Server, holders: usize) {
    let (store, begun) = (server.store.as_ref().unwrap(), Instant::now());
    while Arc::strong_count(store) > holders {
        assert!(begun.elapsed() < PATIENCE, "the store is still held");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_ends_its_export() {
    let directory = Directory::new();
    let server = kept(&directory, ServerOptions::default()).await;
    let made = created(&ask(&server, Method::POST, SESSIONS, json!({"name": "far"})).await);
    let store = server.store.as_ref().unwrap();
    let id = made["id"].as_str().unwrap()["sess_".len()..].parse().unwrap();
    // More than the buffers of a connection hold.
    for number in 0..4 {
        let meta = vec![number; 12 << 20];
        store.append_turn(TenantId::of("default"), id, Append { meta, ..Append::default() }).unwrap();
    }
    let holders = Arc::strong_count(store);
    let request = Request::post(format!("{SESSIONS}/far/export")).header("host", "test");
    let mut open = server.open(request.body(Body::empty()).unwrap()).await;
    open.response.body_mut().frame().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(Arc::strong_count(store) > holders, "the export has ended by itself");
    drop(open);
    let_go(&server, holders).await;
    assert!(export(&server, "far", "").await.len() > 48 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_ends_its_import() {
    let (from, to) = (Directory::new(), Directory::new());
    let (here, there) =
        (kept(&from, ServerOptions::default()).await, kept(&to, ServerOptions::default()).await);
    with_pages(&here).await;
    let bundle = Bytes::from(export(&here, "far", "").await);
    let holders = Arc::strong_count(there.store.as_ref().unwrap());
    let whole = bundle.len();
    for sent in [0, 100, whole / 2, whole] {
        // The body's end never comes, not even after a whole bundle.
        let pieces = stream::iter([bundle.slice(..sent)]);
        let pieces = futures_util::StreamExt::map(pieces, Ok::<_, std::io::Error>);
        let body = Body::from_stream(futures_util::StreamExt::chain(pieces, stream::pending()));
        let request = Request::post(format!("{SESSIONS}/import?include=kv")).header("host", "test");
        let sending = there.open(request.body(body).unwrap());
        assert!(tokio::time::timeout(Duration::from_millis(200), sending).await.is_err(), "it was answered");
        let_go(&there, holders).await;
    }
    assert_eq!(count(&there).await, 0);
}
