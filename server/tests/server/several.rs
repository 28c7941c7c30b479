//! Several models in one server: which come when they are asked for, which go, whose sessions are whose.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use futures_util::future::join_all;
use mainstay_engine::Handle;
use mainstay_engine::store::Store;
use mainstay_models::AdapterWeights;
use mainstay_server::{
    About, ApiKey, Listed, ListedAdapter, Loader, Loading, LoadingAdapter, NotLoaded, Registry, ServedModel,
    ServerOptions,
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::testbed::{CHAT, Directory, Server, Setup, chat, listen, load, open_store, start, tokenizer};

/// Loads fakes, one at a time as far as `permits` go; holds at most `room` of them.
struct Fakes {
    store: Option<Arc<Store>>,
    /// Where adapters may be loaded from.
    adapters: Option<PathBuf>,
    permits: Semaphore,
    room: usize,
    loaded: AtomicUsize,
    loads: AtomicUsize,
    fails: AtomicBool,
    /// What the next load of a model is given to wait for.
    gates: Mutex<BTreeMap<String, std::sync::mpsc::Receiver<()>>>,
}

impl Fakes {
    fn new(room: usize, store: Option<Arc<Store>>) -> Self {
        Self {
            store,
            adapters: None,
            permits: Semaphore::new(0),
            room,
            loaded: AtomicUsize::new(0),
            loads: AtomicUsize::new(0),
            fails: AtomicBool::new(false),
            gates: Mutex::default(),
        }
    }

    async fn bring(&self, id: String, registry: &Registry) -> Result<ServedModel, NotLoaded> {
        self.permits.acquire().await.unwrap().forget();
        self.loads.fetch_add(1, Ordering::SeqCst);
        if self.fails.load(Ordering::SeqCst) {
            return Err(NotLoaded::Failed("tensor `x` is missing".to_owned()));
        }
        while self.loaded.load(Ordering::SeqCst) >= self.room {
            if !registry.leave_oldest().await {
                return Err(NotLoaded::NoRoom("all are in use".to_owned()));
            }
        }
        self.loaded.fetch_add(1, Ordering::SeqCst);
        let gate = self.gates.lock().unwrap().remove(&id);
        let weights = id.as_bytes()[0];
        Ok(load(&id, Setup { gate, store: self.store.clone(), weights, ..Setup::default() }))
    }
}

impl Loader for Fakes {
    fn load(self: Arc<Self>, id: String, registry: Registry) -> Loading {
        Box::pin(async move { self.bring(id, &registry).await })
    }

    fn left(&self, _id: &str) {
        self.loaded.fetch_sub(1, Ordering::SeqCst);
    }

    /// An adapter whose content is the name of its directory.
    fn load_adapter(self: Arc<Self>, _model: String, engine: Handle, path: PathBuf) -> LoadingAdapter {
        Box::pin(async move {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with("bad") {
                return Err(format!("{name}: no adapter"));
            }
            let hash = *blake3::hash(name.as_bytes()).as_bytes();
            let weights = AdapterWeights { parts: BTreeMap::new(), hash };
            engine.load_adapter(weights).await.map_err(|e| e.to_string())
        })
    }
}

/// A server that has `a`, `b` and `c` when they are asked for.
async fn several(fakes: &Arc<Fakes>, waiting_max: usize) -> (Server, Registry) {
    let adapters = |id: &str| match id {
        "a" => {
            ["x", "y", "bad"].map(|name| ListedAdapter { id: name.to_owned(), path: name.into() }).to_vec()
        }
        _ => Vec::new(),
    };
    let listed =
        ["a", "b", "c"].map(|id| Listed { id: id.to_owned(), is_pinned: id == "c", adapters: adapters(id) });
    let registry = Registry::of(listed.to_vec(), fakes.clone(), waiting_max);
    for id in ["a", "b", "c"] {
        registry.available(id, About { created: 1, context: 100, tasks: vec!["generate"] });
    }
    let other = start(Setup::default()).await;
    let options = ServerOptions {
        store: fakes.store.clone(),
        api_keys: vec!["operator".parse::<ApiKey>().unwrap().admin()],
        adapter_dirs: fakes.adapters.iter().cloned().collect(),
        ..ServerOptions::default()
    };
    let server = listen(registry.clone(), options, (other.engine.clone(), tokenizer())).await;
    (server, registry)
}

fn ask(model: &str, more: Value) -> Value {
    let mut body = chat(json!({"max_tokens": 3, "temperature": 0}));
    body["model"] = json!(model);
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Of the models, without their adapters.
async fn states(server: &Server) -> Vec<String> {
    let listed = server.get("/v1/models").await.ok();
    let models = listed["data"].as_array().unwrap().clone();
    let models = models.iter().filter(|model| model["parent"].is_null());
    models.map(|model| format!("{} {}", model["id"], model["state"]).replace('"', "")).collect()
}

#[tokio::test]
async fn requests_for_a_model_share_its_load() {
    let fakes = Arc::new(Fakes::new(3, None));
    let (server, _) = several(&fakes, 16).await;
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(states(&server).await, ["a not_loaded", "b not_loaded", "c not_loaded"]);
    assert_eq!(server.get("/v1/models/a").await.ok()["max_model_len"], 100);
    let body = ask("a", json!({}));
    let replies = join_all((0..8).map(|_| server.post(CHAT, &body)));
    let open = async {
        while states(&server).await[0] != "a loading" {}
        fakes.permits.add_permits(1);
    };
    let (replies, ()) = tokio::join!(replies, open);
    replies.iter().for_each(|reply| drop(reply.ok()));
    assert_eq!(fakes.loads.load(Ordering::SeqCst), 1);
    assert_eq!(states(&server).await, ["a loaded", "b not_loaded", "c not_loaded"]);
    assert_ne!(server.get("/v1/models/a").await.ok()["max_model_len"], 100, "what it has, once it is there");
    let error = server.post(CHAT, &ask("d", json!({}))).await.error(404);
    assert_eq!(error["code"], "model_not_found");
    assert!(error["message"].as_str().unwrap().contains("`a`, `x`, `y`, `bad`, `b`, `c`"), "{error}");
    let metrics = server.get("/metrics").await;
    let text = String::from_utf8(metrics.body.to_vec()).unwrap();
    for line in
        ["mainstay_model_loaded{model_name=\"a\"} 1", "mainstay_model_loads_total{model_name=\"b\"} 0"]
    {
        assert!(text.contains(line), "{line}");
    }
}

#[tokio::test]
async fn waiting_for_a_load_keeps_to_the_limits_of_the_queue() {
    let fakes = Arc::new(Fakes::new(3, None));
    let (mut server, _) = several(&fakes, 2).await;
    let body = ask("a", json!({}));
    let mut opened = Vec::new();
    for _ in 0..3 {
        opened.push(server.post(CHAT, &body));
    }
    let third = opened.pop().unwrap();
    let (two, third) = tokio::join!(join_all(opened), async {
        while states(&server).await[0] != "a loading" {}
        // Both of the others may not have a seat yet; whoever comes third is refused.
        let refused = third.await;
        fakes.permits.add_permits(1);
        refused
    });
    let mut statuses: Vec<u16> = two.iter().chain([&third]).map(|reply| reply.status.as_u16()).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 429]);
    // Time limits hold while a load is waited for.
    let options =
        ServerOptions { queue_timeout: Some(Duration::from_millis(30)), ..ServerOptions::default() };
    let (other, registry) = several(&fakes, 2).await;
    server = listen(registry, options, (other.engine.clone(), tokenizer())).await;
    assert_eq!(server.post(CHAT, &ask("b", json!({}))).await.error(503)["code"], "queue_timeout");
}

#[tokio::test]
async fn a_failed_load_is_told_and_tried_again_later() {
    let fakes = Arc::new(Fakes::new(3, None));
    fakes.permits.add_permits(8);
    fakes.fails.store(true, Ordering::SeqCst);
    let (server, _) = several(&fakes, 16).await;
    for _ in 0..3 {
        let reply = server.post(CHAT, &ask("a", json!({"stream": true}))).await;
        let error = reply.error(503);
        assert_eq!(error["code"], "model_failed");
        assert!(error["message"].as_str().unwrap().contains("tensor `x` is missing"), "{error}");
        let seconds: u64 = reply.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=6).contains(&seconds), "{seconds}");
    }
    assert_eq!(fakes.loads.load(Ordering::SeqCst), 1, "not tried again at once");
    let shown = server.get("/v1/models/a").await.ok();
    assert_eq!((&shown["state"], &shown["error"]), (&json!("not_loaded"), &json!("tensor `x` is missing")));
    assert_eq!(server.get("/health").await.status, 200, "others are served");
    fakes.fails.store(false, Ordering::SeqCst);
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(6)).await;
    tokio::time::resume();
    server.post(CHAT, &ask("a", json!({}))).await.ok();
    assert_eq!(fakes.loads.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn the_least_recently_used_model_goes_and_none_that_is_in_use() {
    let fakes = Arc::new(Fakes::new(2, None));
    fakes.permits.add_permits(32);
    let (gate, blocked) = channel();
    fakes.gates.lock().unwrap().insert("a".to_owned(), blocked);
    let (server, registry) = several(&fakes, 16).await;
    let body = ask("a", json!({}));
    let running = server.post(CHAT, &body);
    let others = async {
        while states(&server).await[0] != "a loaded" {}
        server.post(CHAT, &ask("b", json!({}))).await.ok();
        // `a` is older, but in use.
        server.post(CHAT, &ask("c", json!({}))).await.ok();
        assert_eq!(states(&server).await, ["a loaded", "b not_loaded", "c loaded"]);
        let error = server.post(CHAT, &ask("b", json!({}))).await.error(503);
        assert_eq!(error["code"], "model_no_room");
        assert!(error["message"].as_str().unwrap().contains("all are in use"), "{error}");
        registry.leave_idle(Duration::ZERO).await;
        assert_eq!(states(&server).await, ["a loaded", "b not_loaded", "c loaded"], "in use, and pinned");
        drop(gate);
    };
    let (reply, ()) = tokio::join!(running, others);
    reply.ok();
    server.idle().await;
    registry.leave_idle(Duration::from_secs(3600)).await;
    assert_eq!(states(&server).await[0], "a loaded", "used not long ago");
    while states(&server).await[0] != "a not_loaded" {
        registry.leave_idle(Duration::ZERO).await;
    }
    registry.close().await;
    assert_eq!(fakes.loaded.load(Ordering::SeqCst), 0);
    assert_eq!(server.post(CHAT, &ask("a", json!({}))).await.error(503)["code"], "shutting_down");
}

#[tokio::test]
async fn a_session_is_of_one_model_and_finds_its_pages_after_it_came_back() {
    let directory = Directory::new();
    let fakes = Arc::new(Fakes::new(1, Some(open_store(&directory.path()))));
    fakes.permits.add_permits(32);
    let (server, _) = several(&fakes, 16).await;
    let made = server.post("/v1/sessions", &json!({"model": "a", "name": "s"})).await;
    assert_eq!((made.status.as_u16(), &made.json()["model"]), (201, &json!("a")));
    let long = "a long story of many words that fills more than a page of tokens ".repeat(4);
    let turn = |model: &str, text: &str| {
        let messages = json!([{"role": "user", "content": text}]);
        ask(model, json!({"session_id": "s", "session_mode": "append", "messages": messages}))
    };
    server.post(CHAT, &turn("a", &long)).await.ok();
    let error = server.post(CHAT, &turn("b", "and then?")).await.error(409);
    assert_eq!((&error["code"], &error["param"]), (&json!("session_model"), &json!("model")));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("`a`") && message.contains("`b`"), "{message}");
    // There is room for one model: `b` came for the refused request, and `a` has gone.
    assert_eq!(states(&server).await[..2], ["a not_loaded", "b loaded"]);
    let found = server.post(CHAT, &turn("a", "and then?")).await.ok();
    assert_eq!(found["kv"]["state"], "exact", "{found}");
    assert_eq!(found["kv"]["tier"], "disk", "{found}");
    assert!(found["kv"]["restored_tokens"].as_u64() > Some(64), "{found}");
    assert_eq!(server.get("/v1/sessions/s").await.ok()["turn_count"], 2);
}

/// What the operator asks.
async fn operate(server: &Server, path: &str, key: Option<&str>, body: Value) -> crate::testbed::Reply {
    let mut request = Request::post(path).header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    server.send(request.body(Body::from(body.to_string())).unwrap()).await
}

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";

#[tokio::test]
async fn adapters_are_models_of_their_own_that_come_with_theirs() {
    let fakes = Arc::new(Fakes::new(1, None));
    fakes.permits.add_permits(32);
    let (server, _) = several(&fakes, 16).await;
    let listed = server.get("/v1/models").await.ok();
    let x = &listed["data"][1];
    assert_eq!((&x["id"], &x["parent"], &x["state"]), (&json!("x"), &json!("a"), &json!("not_loaded")));
    // Asking for an adapter brings its model.
    let under_x = server.post(CHAT, &ask("x", json!({}))).await.ok();
    assert_eq!(under_x["model"], "x");
    assert_eq!(states(&server).await[0], "a loaded");
    let text = |answer: &Value| answer["choices"][0]["message"]["content"].clone();
    let under_y = server.post(CHAT, &ask("y", json!({}))).await.ok();
    let plain = server.post(CHAT, &ask("a", json!({}))).await.ok();
    assert!(
        text(&under_x) != text(&under_y) && text(&under_x) != text(&plain),
        "{under_x} {under_y} {plain}"
    );
    let error = server.post(CHAT, &ask("bad", json!({}))).await.error(503);
    assert!(error["message"].as_str().unwrap().contains("bad: no adapter"), "{error}");
    // It goes with its model, and comes again.
    server.post(CHAT, &ask("b", json!({}))).await.ok();
    assert_eq!(states(&server).await[..2], ["a not_loaded", "b loaded"]);
    let again = server.post(CHAT, &ask("x", json!({}))).await.ok();
    assert_eq!(text(&again), text(&under_x));
}

#[tokio::test]
async fn the_operator_alone_loads_adapters_from_directories_that_were_named() {
    let (inside, outside) = (Directory::new(), Directory::new());
    for name in ["one", "two", "bad"] {
        std::fs::create_dir(inside.path().join(name)).unwrap();
    }
    let fakes = Arc::new(Fakes { adapters: Some(inside.path()), ..Fakes::new(3, None) });
    fakes.permits.add_permits(32);
    let (server, _) = several(&fakes, 16).await;
    let one = json!({"lora_name": "new", "lora_path": inside.path().join("one")});
    for key in [None, Some("guess")] {
        assert_eq!(operate(&server, LOAD, key, one.clone()).await.error(403)["code"], "admin_only");
    }
    let operator = Some("operator");
    let elsewhere = json!({"lora_name": "new", "lora_path": outside.path()});
    for path in [outside.path(), inside.path().join("one/../../.."), inside.path().join("none")] {
        let body = json!({"lora_name": "new", "lora_path": path});
        assert_eq!(operate(&server, LOAD, operator, body).await.error(400)["param"], "lora_path", "{path:?}");
    }
    assert_eq!(operate(&server, LOAD, operator, elsewhere).await.error(400)["param"], "lora_path");
    let bad = json!({"lora_name": "new", "lora_path": inside.path().join("bad")});
    let error = operate(&server, LOAD, operator, bad).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("no adapter"), "{error}");
    assert_eq!(server.post(CHAT, &ask("new", json!({}))).await.error(404)["code"], "model_not_found");

    let reply = operate(&server, LOAD, operator, one.clone()).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.body, "Success: LoRA adapter 'new' added successfully.");
    let first = server.post(CHAT, &ask("new", json!({}))).await.ok();
    let error = operate(&server, LOAD, operator, one).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("already been loaded"), "{error}");
    let own = json!({"lora_name": "a", "lora_path": inside.path().join("one")});
    assert_eq!(operate(&server, LOAD, operator, own).await.error(400)["param"], "lora_name");
    let two = json!({"lora_name": "new", "lora_path": inside.path().join("two"), "load_inplace": true});
    assert_eq!(operate(&server, LOAD, operator, two).await.status, 200);
    let second = server.post(CHAT, &ask("new", json!({}))).await.ok();
    assert_ne!(first["choices"][0]["message"], second["choices"][0]["message"]);
    let name = json!({"lora_name": "new"});
    let reply = operate(&server, UNLOAD, operator, name.clone()).await;
    assert_eq!(reply.body, "Success: LoRA adapter 'new' removed successfully.");
    assert_eq!(operate(&server, UNLOAD, operator, name).await.error(404)["code"], "adapter_not_found");
    server.post(CHAT, &ask("new", json!({}))).await.error(404);
    let none = start(Setup::default()).await;
    let reply = operate(&none, LOAD, operator, json!({"lora_name": "n", "lora_path": "/"})).await;
    assert_eq!(reply.error(400)["param"], "lora_path", "on this machine everyone may, but from nowhere");
}

#[tokio::test]
async fn sessions_are_restored_under_the_same_content_only() {
    let (directory, adapters) = (Directory::new(), Directory::new());
    for name in ["one", "two"] {
        std::fs::create_dir(adapters.path().join(name)).unwrap();
    }
    let store = Some(open_store(&directory.path()));
    let fakes = Arc::new(Fakes { adapters: Some(adapters.path()), ..Fakes::new(1, store) });
    fakes.permits.add_permits(32);
    let (server, _) = several(&fakes, 16).await;
    let load = async |name: &str| {
        let path = adapters.path().join(name);
        let body = json!({"lora_name": "l", "lora_path": path, "load_inplace": true, "base_model_name": "a"});
        assert_eq!(operate(&server, LOAD, Some("operator"), body).await.status, 200);
    };
    load("one").await;
    server.post("/v1/sessions", &json!({"model": "l", "name": "s"})).await;
    let long = "a long story of many words that fills more than a page of tokens ".repeat(4);
    let turn = async |text: &str| {
        let messages = json!([{"role": "user", "content": text}]);
        server
            .post(CHAT, &ask("l", json!({"session_id": "s", "session_mode": "append", "messages": messages})))
            .await
            .ok()
    };
    turn(&long).await;
    // The model goes, and comes back with its adapter.
    server.post(CHAT, &ask("b", json!({}))).await.ok();
    let found = turn("and then?").await;
    assert_eq!((&found["kv"]["state"], &found["kv"]["tier"]), (&json!("exact"), &json!("disk")), "{found}");
    let before = server.get("/v1/sessions/s").await.ok()["token_count"].as_u64();
    load("two").await;
    let shown = server.get("/v1/sessions/s").await.ok();
    assert_eq!(
        (&shown["kv"]["reason"], shown["token_count"].as_u64()),
        (&json!("adapter"), before),
        "{shown}"
    );
    let cold = turn("and then?").await;
    assert_eq!((&cold["kv"]["state"], &cold["kv"]["reason"]), (&json!("cold"), &json!("adapter")), "{cold}");
    let again = turn("go on").await;
    assert_eq!(again["kv"]["state"], "exact", "{again}");
    assert_eq!(server.get("/v1/sessions/s").await.ok()["turn_count"], 4);
}
