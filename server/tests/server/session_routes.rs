//! Sessions over HTTP: made, shown, listed, changed, branched, fetched, removed, and never another tenant's.

use axum::body::Body;
use axum::http::{Method, Request};
use mainstay_engine::store::{Append, SessionId, TenantId};
use mainstay_server::ServerOptions;
use serde_json::{Value, json};

use crate::testbed::{Directory, MODEL, Reply, Server, Setup, start};

pub(crate) const SESSIONS: &str = "/v1/sessions";
/// An id that no session has.
const UNKNOWN: &str = "sess_01ARZ3NDEKTSV4RRFFQ69G5FAV";

pub(crate) async fn kept(directory: &Directory, options: ServerOptions) -> Server {
    start(Setup { directory: Some(directory.path()), options, ..Setup::default() }).await
}

/// A request with a method, a key if there is one, and a JSON body if there is one.
pub(crate) async fn ask(server: &Server, method: Method, path: &str, body: Value) -> Reply {
    server.send(asked(method, path, None, body)).await
}

fn asked(method: Method, path: &str, key: Option<&str>, body: Value) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path).header("host", "test");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
    request.body(body).unwrap()
}

#[track_caller]
pub(crate) fn created(reply: &Reply) -> Value {
    assert_eq!(reply.status, 201, "{reply:?}");
    reply.json()
}

fn path(session: &Value) -> String {
    format!("{SESSIONS}/{}", session["id"].as_str().unwrap())
}

fn id(session: &Value) -> SessionId {
    session["id"].as_str().unwrap().strip_prefix("sess_").unwrap().parse().unwrap()
}

fn tenant(name: &str) -> TenantId {
    TenantId::of(name)
}

/// Appends a turn of so many tokens, as a chat would.
pub(crate) fn append(server: &Server, session: &Value, number: u32, len: u32) -> Vec<u32> {
    let tokens: Vec<u32> = (0..len).map(|i| (number * 131 + i * 7) % 500).collect();
    let meta = json!({
        "id": format!("chatcmpl-{number}"),
        "messages": [{"role": "user", "content": format!("question {number}")}],
        "answer": {"role": "assistant", "content": format!("answer {number}")},
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3},
        "sent_len": 4,
    });
    let append = Append { tokens: tokens.clone(), meta: meta.to_string().into_bytes(), ..Append::default() };
    let store = server.store.as_ref().unwrap();
    store.append_turn(tenant("default"), id(session), append).unwrap();
    tokens
}

#[tokio::test]
async fn a_session_is_made_and_shown_whole() {
    let directory = Directory::new();
    let server = kept(&directory, ServerOptions::default()).await;
    let bare = created(&ask(&server, Method::POST, SESSIONS, Value::Null).await);
    let keys: Vec<&str> = bare.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = "id object name model created_at last_used_at expires_at turn_count token_count parent pinned \
        priority durability ttl metadata in_flight damaged kv";
    assert_eq!(keys, expected.split_whitespace().collect::<Vec<_>>());
    assert_eq!((bare["object"].as_str(), bare["model"].as_str()), (Some("session"), Some(MODEL)));
    assert_eq!(bare["durability"], "async");
    assert_eq!(bare["kv"], json!({"state": "cold", "stored_tokens": 0, "reason": null}));
    assert!(bare["id"].as_str().unwrap().starts_with("sess_") && bare["id"].as_str().unwrap().len() == 31);
    for key in ["name", "expires_at", "parent", "ttl"] {
        assert_eq!(bare[key], Value::Null, "{key}");
    }
    let wanted = json!({"model": MODEL, "name": "my notes/1", "ttl": 3600, "durability": "turn", "priority": 7,
        "pinned": false, "metadata": {"topic": "rivers"}, "unknown": 1});
    let made = created(&ask(&server, Method::POST, SESSIONS, wanted.clone()).await);
    for key in ["model", "name", "ttl", "durability", "priority", "pinned", "metadata"] {
        assert_eq!(made[key], wanted[key], "{key}");
    }
    let used = made["last_used_at"].as_u64().unwrap();
    assert!(used > 1_700_000_000 && made["created_at"].as_u64().unwrap() <= used);
    assert!((used + 3600..=used + 3601).contains(&made["expires_at"].as_u64().unwrap()), "{made}");
    let short = made["id"].as_str().unwrap().trim_start_matches("sess_");
    for place in [made["id"].as_str().unwrap(), short, "my%20notes%2F1"] {
        let reply = server.get(&format!("{SESSIONS}/{place}")).await;
        assert_eq!(reply.ok(), made, "{place}");
        assert_eq!(reply.headers["etag"], "\"0\"");
    }
}

#[tokio::test]
async fn what_cannot_be_meant_is_refused_by_name() {
    let directory = Directory::new();
    let server = kept(&directory, ServerOptions::default()).await;
    let cases = [
        (json!({"model": 7}), "model"),
        (json!({"name": "a\tb"}), "name"),
        (json!({"ttl": -1}), "ttl"),
        (json!({"durability": "strong"}), "durability"),
        (json!({"priority": 1.5}), "priority"),
        (json!({"pinned": "yes"}), "pinned"),
        (json!({"metadata": {"n": 1}}), "metadata.n"),
    ];
    for (body, param) in cases {
        let error = ask(&server, Method::POST, SESSIONS, body.clone()).await.error(400);
        assert_eq!(error["param"], param, "{body}");
        assert!(error["message"].as_str().unwrap().contains("expected"), "{error}");
    }
    let error = ask(&server, Method::POST, SESSIONS, json!({"model": "other"})).await.error(404);
    assert_eq!(error["code"], "model_not_found");
    let text = Request::post(SESSIONS).header("host", "test").body(Body::from("[1]")).unwrap();
    server.send(text).await.error(400);
    assert_eq!(server.get(SESSIONS).await.ok()["data"], json!([]), "nothing was made");
    for (query, param) in [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=yesterday", "after"),
    ] {
        assert_eq!(server.get(&format!("{SESSIONS}?{query}")).await.error(400)["param"], param, "{query}");
    }
}

#[tokio::test]
async fn a_session_is_changed_and_removed() {
    let directory = Directory::new();
    let server = kept(&directory, ServerOptions::default()).await;
    let body = json!({"name": "a", "ttl": 60, "metadata": {"k": "v"}});
    let made = created(&ask(&server, Method::POST, SESSIONS, body).await);
    let taken = ask(&server, Method::POST, SESSIONS, json!({"name": "a"})).await.error(409);
    assert_eq!((taken["code"].as_str(), taken["param"].as_str()), (Some("name_taken"), Some("name")));
    let other = created(&ask(&server, Method::POST, SESSIONS, json!({"name": "b"})).await);
    assert_eq!(
        ask(&server, Method::PATCH, &path(&other), json!({"name": "a"})).await.error(409)["code"],
        "name_taken"
    );
    let patch = json!({"name": "c", "ttl": null, "pinned": true, "priority": 9, "durability": "full",
        "metadata": {"x": "y"}});
    let changed = ask(&server, Method::PATCH, &path(&made), patch).await.ok();
    assert_eq!(changed["name"], "c");
    assert_eq!((&changed["ttl"], &changed["expires_at"]), (&Value::Null, &Value::Null));
    assert_eq!((&changed["pinned"], &changed["priority"]), (&json!(true), &json!(9)));
    assert_eq!((&changed["durability"], &changed["metadata"]), (&json!("full"), &json!({"x": "y"})));
    assert_eq!(
        ask(&server, Method::PATCH, &path(&made), json!({})).await.ok(),
        server.get(&path(&made)).await.ok()
    );
    for (body, param) in [
        (json!({"durability": "ephemeral"}), "durability"),
        (json!({"name": ""}), "name"),
        (json!({"ttl": 0}), "ttl"),
    ] {
        assert_eq!(ask(&server, Method::PATCH, &path(&made), body).await.error(400)["param"], param);
    }
    let unpinned = ask(&server, Method::POST, &format!("{}/unpin", path(&made)), Value::Null).await.ok();
    assert_eq!(unpinned["pinned"], false);
    let pinned = ask(&server, Method::POST, &format!("{SESSIONS}/c/pin"), Value::Null).await.ok();
    assert_eq!(pinned["pinned"], true);
    let gone = ask(&server, Method::DELETE, &format!("{SESSIONS}/c"), Value::Null).await.ok();
    assert_eq!(gone, json!({"id": made["id"], "object": "session.deleted", "deleted": true}));
    assert_eq!(server.get(&path(&made)).await.error(404)["code"], "session_not_found");
    created(&ask(&server, Method::POST, SESSIONS, json!({"name": "c"})).await);
}

#[tokio::test]
async fn lists_are_paged_both_ways() {
    let directory = Directory::new();
    let server = kept(&directory, ServerOptions::default()).await;
    let mut made = Vec::new();
    for i in 0..5 {
        let body = json!({"name": format!("n{i}")});
        made.push(created(&ask(&server, Method::POST, SESSIONS, body).await)["id"].clone());
        // Ids of one millisecond have no order.
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    for (order, ids) in [("asc", made.clone()), ("desc", made.iter().rev().cloned().collect())] {
        let (mut seen, mut after) = (Vec::new(), String::new());
        for expected in [2, 2, 1] {
            let query = format!("{SESSIONS}?limit=2&order={order}&after={after}");
            let page = server.get(&query).await.ok();
            let data = page["data"].as_array().unwrap();
            assert_eq!(data.len(), expected, "{order}");
            assert_eq!(
                (page["object"].as_str(), page["has_more"].as_bool()),
                (Some("list"), Some(expected == 2))
            );
            assert_eq!((&page["first_id"], &page["last_id"]), (&data[0]["id"], &data[expected - 1]["id"]));
            seen.extend(data.iter().map(|item| item["id"].clone()));
            after = page["last_id"].as_str().unwrap().to_owned();
        }
        assert_eq!(seen, ids, "{order}");
    }
    let all = server.get(SESSIONS).await.ok();
    assert_eq!((all["data"].as_array().unwrap().len(), &all["has_more"]), (5, &json!(false)));
    assert_eq!(all["data"][0], server.get(&format!("{SESSIONS}/n0")).await.ok());
    let none = server.get(&format!("{SESSIONS}?after={}", made[4].as_str().unwrap())).await.ok();
    let empty = json!({"object": "list", "first_id": null, "last_id": null, "has_more": false, "data": []});
    assert_eq!(none, empty);
}

#[tokio::test]
async fn a_foreign_session_is_an_unknown_one() {
    let directory = Directory::new();
    let keys = ["a:one", "b:two"].map(|key| key.parse().unwrap());
    let options = ServerOptions { api_keys: keys.to_vec(), ..ServerOptions::default() };
    let server = kept(&directory, options).await;
    let send = async |method, path: &str, key, body| server.send(asked(method, path, Some(key), body)).await;
    let mine = created(&send(Method::POST, SESSIONS, "one", json!({"name": "mine"})).await);
    created(&send(Method::POST, SESSIONS, "two", json!({"name": "yours"})).await);
    let routes = [
        (Method::GET, ""),
        (Method::PATCH, ""),
        (Method::DELETE, ""),
        (Method::POST, "/fork"),
        (Method::POST, "/rollback"),
        (Method::POST, "/pin"),
        (Method::POST, "/unpin"),
        (Method::GET, "/turns"),
        (Method::POST, "/prefetch"),
        (Method::POST, "/export"),
    ];
    let foreign = mine["id"].as_str().unwrap();
    for (method, route) in routes {
        let mut bodies = Vec::new();
        for place in [foreign, "mine", UNKNOWN, "nobody", "%FF"] {
            // What else is wrong with a request must not be told either.
            for body in [json!({"to_turn": 0}), json!({"to_turn": "x", "name": 7}), json!([])] {
                let path = format!("{SESSIONS}/{place}{route}");
                let reply = send(method.clone(), &path, "two", body).await;
                reply.error(404);
                bodies.push(reply.body);
            }
        }
        assert!(bodies.iter().all(|body| *body == bodies[0]), "{method} {route}: {bodies:?}");
    }
    let listed = send(Method::GET, SESSIONS, "two", Value::Null).await.ok();
    assert_eq!(listed["data"].as_array().unwrap().len(), 1);
    assert_eq!(listed["data"][0]["name"], "yours");
    created(&send(Method::POST, SESSIONS, "two", json!({"name": "mine"})).await);
    assert_eq!(send(Method::GET, &path(&mine), "one", Value::Null).await.ok(), mine);
}

#[tokio::test]
async fn a_session_branches_and_goes_back() {
    let directory = Directory::new();
    let server = kept(&directory, ServerOptions::default()).await;
    let made = created(&ask(&server, Method::POST, SESSIONS, json!({"name": "trunk", "pinned": true})).await);
    (1..=3).for_each(|number| drop(append(&server, &made, number, 40)));
    let fork = async |body| ask(&server, Method::POST, &format!("{SESSIONS}/trunk/fork"), body).await;
    let whole = created(&fork(Value::Null).await);
    assert_eq!(
        (&whole["token_count"], &whole["name"], &whole["pinned"]),
        (&json!(120), &Value::Null, &json!(false))
    );
    assert_eq!(whole["parent"], json!({"id": made["id"], "turn": 3}));
    let one = created(&fork(json!({"at_turn": 1, "name": "branch"})).await);
    assert_eq!(
        (&one["turn_count"], &one["token_count"], &one["name"]),
        (&json!(1), &json!(40), &json!("branch"))
    );
    assert_eq!(created(&fork(json!({"at_token": 50})).await)["token_count"], 50);
    for (body, param, numbers) in [
        (json!({"at_turn": 1, "at_token": 1}), "at_token", ["at_turn", "at_token"]),
        (json!({"at_turn": 9}), "at_turn", ["3", "9"]),
        (json!({"at_token": 121}), "at_token", ["120", "121"]),
        (json!({"at_turn": -1}), "at_turn", ["0", "-1"]),
        (json!({"name": "\n"}), "name", ["1", "256"]),
    ] {
        let error = fork(body).await.error(400);
        assert_eq!(error["param"], param);
        let message = error["message"].as_str().unwrap();
        assert!(numbers.iter().all(|number| message.contains(number)), "{message}");
    }
    assert_eq!(fork(json!({"name": "branch"})).await.error(409)["code"], "name_taken");
    let back = async |body| ask(&server, Method::POST, &format!("{SESSIONS}/trunk/rollback"), body).await;
    assert_eq!(back(json!({"to_turn": 2, "expected_turn": 2})).await.error(409)["code"], "turn_conflict");
    for (body, param) in [
        (json!({}), "to_turn"),
        (json!({"to_turn": 1, "to_token": 1}), "to_token"),
        (json!({"to_turn": 4}), "to_turn"),
        (json!({"to_token": 999}), "to_token"),
        (json!({"to_turn": 1, "expected_turn": "x"}), "expected_turn"),
    ] {
        assert_eq!(back(body).await.error(400)["param"], param);
    }
    let two = back(json!({"to_turn": 2, "expected_turn": 3})).await.ok();
    assert_eq!((&two["turn_count"], &two["token_count"]), (&json!(2), &json!(80)));
    let matched = async |tag: &str, body: Value| {
        let request = Request::post(format!("{SESSIONS}/trunk/rollback")).header("host", "test");
        server.send(request.header("if-match", tag).body(Body::from(body.to_string())).unwrap()).await
    };
    assert_eq!(matched("\"3\"", json!({"to_token": 41})).await.error(409)["code"], "turn_conflict");
    assert_eq!(matched("later", json!({"to_token": 41})).await.error(400)["param"], "If-Match");
    let both = matched("\"2\"", json!({"to_token": 41, "expected_turn": 1})).await;
    assert_eq!(both.error(400)["param"], "expected_turn");
    assert_eq!(matched("\"2\"", json!({"to_token": 41})).await.ok()["token_count"], 41);
    assert_eq!(matched("*", json!({"to_turn": 0})).await.ok()["turn_count"], 0);
    assert_eq!(server.get(&path(&whole)).await.ok()["token_count"], 120, "its forks stay");
}

#[tokio::test]
async fn turns_are_listed() {
    let directory = Directory::new();
    let server = kept(&directory, ServerOptions::default()).await;
    let made = created(&ask(&server, Method::POST, SESSIONS, json!({})).await);
    let tokens: Vec<_> = (1..=3).map(|number| append(&server, &made, number, 10)).collect();
    let turns = format!("{}/turns", path(&made));
    let all = server.get(&turns).await.ok();
    assert_eq!((&all["first_id"], &all["last_id"], &all["has_more"]), (&json!(1), &json!(3), &json!(false)));
    let mut second = all["data"][1].clone();
    assert!(second["created_at"].as_u64().unwrap() > 1_700_000_000);
    second.as_object_mut().unwrap().remove("created_at");
    let expected = json!({
        "object": "session.turn",
        "number": 2,
        "token_start": 10,
        "token_end": 20,
        "sent_tokens": 4,
        "messages": [{"role": "user", "content": "question 2"}],
        "answer": {"role": "assistant", "content": "answer 2"},
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3},
        "response_id": "chatcmpl-2",
    });
    assert_eq!(second, expected);
    let numbers = async |query: &str| -> Vec<u64> {
        let page = server.get(&format!("{turns}?{query}")).await.ok();
        page["data"].as_array().unwrap().iter().map(|turn| turn["number"].as_u64().unwrap()).collect()
    };
    assert_eq!(numbers("after=1").await, [2, 3]);
    assert_eq!(numbers("order=desc&after=3&limit=1").await, [2]);
    assert_eq!(numbers("limit=2").await, [1, 2]);
    let shown = server.get(&format!("{turns}?include=tokens&after=2")).await.ok();
    assert_eq!(shown["data"][0]["tokens"], json!(tokens[2]));
    for query in ["include=text", "after=x", "limit=0", "order=new"] {
        let param = query.split('=').next().unwrap();
        assert_eq!(server.get(&format!("{turns}?{query}")).await.error(400)["param"], param);
    }
    // Of a turn that was cut, only its tokens are known.
    ask(&server, Method::POST, &format!("{}/rollback", path(&made)), json!({"to_token": 15})).await.ok();
    let cut = server.get(&format!("{turns}?after=1")).await.ok()["data"][0].clone();
    assert_eq!(
        (&cut["messages"], &cut["answer"], &cut["response_id"]),
        (&json!([]), &Value::Null, &Value::Null)
    );
    assert_eq!(cut["token_end"], 15);
}

#[tokio::test]
async fn pages_are_brought_to_the_device() {
    let directory = Directory::new();
    let server = kept(&directory, ServerOptions::default()).await;
    let made = created(&ask(&server, Method::POST, SESSIONS, json!({})).await);
    let place = format!("{}/prefetch", path(&made));
    let nothing =
        json!({"state": "cold", "reason": null, "cached_tokens": 0, "restored_tokens": 0, "restore_ms": 0.0});
    let reply = ask(&server, Method::POST, &place, Value::Null).await.ok();
    let expected = json!({"object": "session.prefetch", "id": made["id"], "token_count": 0, "kv": nothing});
    assert_eq!(reply, expected);
    append(&server, &made, 1, 200);
    let computed = ask(&server, Method::POST, &place, Value::Null).await.ok();
    assert_eq!((&computed["token_count"], &computed["kv"]["state"]), (&json!(200), &json!("cold")));
    assert!(server.engine.settle(std::time::Duration::from_secs(10)).await);
    let kv = server.get(&path(&made)).await.ok()["kv"].clone();
    assert_eq!((&kv["state"], &kv["reason"]), (&json!("exact"), &Value::Null));
    assert!((192..=200).contains(&kv["stored_tokens"].as_u64().unwrap()), "{kv}");
    let warm = ask(&server, Method::POST, &place, Value::Null).await.ok();
    assert!(warm["kv"]["cached_tokens"].as_u64().unwrap() >= 192, "{warm}");
    assert_eq!(warm["kv"]["restored_tokens"], 0, "they were on the device");
    append(&server, &made, 2, 2000);
    let error = ask(&server, Method::POST, &place, Value::Null).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("2200") && message.contains("2048"), "{message}");
    ask(&server, Method::POST, &format!("{}/rollback", path(&made)), json!({"to_turn": 1})).await.ok();
    server.stop().await;
    let server = kept(&directory, ServerOptions::default()).await;
    let restored = ask(&server, Method::POST, &place, Value::Null).await.ok();
    assert_eq!(restored["kv"]["state"], "exact");
    assert!(restored["kv"]["restored_tokens"].as_u64().unwrap() >= 192, "{restored}");
}

#[tokio::test]
async fn the_store_is_measured() {
    let directory = Directory::new();
    let recovery = Some(std::time::Duration::from_millis(1500));
    let server = kept(&directory, ServerOptions { recovery, ..ServerOptions::default() }).await;
    let made = created(&ask(&server, Method::POST, SESSIONS, json!({})).await);
    created(&ask(&server, Method::POST, SESSIONS, json!({})).await);
    append(&server, &made, 1, 100);
    ask(&server, Method::POST, &format!("{}/prefetch", path(&made)), Value::Null).await.ok();
    assert!(server.engine.settle(std::time::Duration::from_secs(10)).await);
    let page = String::from_utf8(server.get("/metrics").await.body.to_vec()).unwrap();
    let value = |start: &str| -> f64 {
        let line =
            page.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}: {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(value("mainstay_sessions{state=\"idle\"}"), 2.0);
    assert_eq!(value("mainstay_sessions{state=\"running\"}"), 0.0);
    assert_eq!(value("mainstay_recovery_seconds{}"), 1.5);
    assert!(value("mainstay_kv_page_write_total{tier=\"disk\"}") >= 3.0);
    assert!(value("mainstay_kv_page_spill_total{model_name=\"org/echo\"}") >= 3.0);
    assert!(value("mainstay_journal_entries_total{}") >= 3.0);
    assert!(value("mainstay_kv_bytes{tier=\"disk\"}") > 0.0);
    for name in [
        "mainstay_kv_page_drop_total{at=\"store\"}",
        "mainstay_kv_page_verify_fail_total{tier=\"disk\"}",
        "mainstay_ring_occupancy_bytes{}",
        "mainstay_eviction_total{reason=\"quota\"}",
        "mainstay_kv_restore_total{model_name=\"org/echo\"}",
        "mainstay_restore_vs_compute_decision_total{model_name=\"org/echo\",decision=\"compute\"}",
    ] {
        assert_eq!(value(name), 0.0, "{name}");
    }
    let families: Vec<_> = page.lines().filter(|line| line.starts_with("# TYPE")).collect();
    let unique: std::collections::BTreeSet<_> = families.iter().collect();
    assert_eq!(unique.len(), families.len(), "a family stands twice");
}

#[tokio::test]
async fn a_server_without_a_store_says_so() {
    let server = start(Setup::default()).await;
    for (method, route) in
        [(Method::GET, ""), (Method::POST, ""), (Method::POST, "/import"), (Method::GET, "/x")]
    {
        let error = ask(&server, method, &format!("{SESSIONS}{route}"), json!({})).await.error(404);
        assert_eq!(error["code"], "sessions_disabled");
    }
    assert!(!String::from_utf8_lossy(&server.get("/metrics").await.body).contains("mainstay_sessions"));
    server.get(&format!("{SESSIONS}/import")).await.error(405);
}
