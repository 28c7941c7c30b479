//! A server on a port of its own, and a client that sees every byte.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use mainstay_backend_api::echo::{EchoExecutor, POOLED_WIDTH};
use mainstay_backend_api::{
    AdapterId, CopyDone, Executor, KvDType, KvLayout, Limits, NumericClass, PageRead, PageRef, Step,
    StepError, StepOutput, StoredPage, Ticket,
};
use mainstay_engine::store::{self, SessionId, Settings, Store, TenantId};
use mainstay_engine::{DraftPolicy, EngineOptions, Handle, ModelIdentity, RestorePolicy, Reuse};
use mainstay_models::graph::PooledKind;
use mainstay_models::template::ChatTemplate;
use mainstay_models::tokenizer::{AddSpecial, Tokenizer};
use mainstay_models::{AdapterWeights, Generation, LoadError};
use mainstay_server::{
    FormatChoice, PooledShape, Registry, ServedModel, ServerOptions, ShutdownTrigger, serve, shutdown_channel,
};
use serde_json::{Map, Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

pub(crate) const MODEL: &str = "org/echo";
/// The end-of-text token of the tokenizer under test.
pub(crate) const EOS: u32 = 507;
pub(crate) const CONTEXT: usize = 2048;

/// Shows what it is given.
const TEMPLATE: &str = "{%- for m in messages -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content or '') }}
{%- for call in m.tool_calls or [] -%}{{ call.function.name ~ ' ' ~ call.function.arguments | tojson }}{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if tools -%}{{ 'tools' }}{%- endif -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}";

/// A server to be started.
pub(crate) struct Setup {
    pub(crate) options: ServerOptions,
    pub(crate) pages: usize,
    pub(crate) waiting: usize,
    pub(crate) chunks: usize,
    pub(crate) gate: Option<Receiver<()>>,
    pub(crate) fail_every: Option<u64>,
    pub(crate) template: Option<String>,
    pub(crate) format: FormatChoice,
    pub(crate) generation: Generation,
    /// Where sessions and pages are; without it there are none.
    pub(crate) directory: Option<PathBuf>,
    /// The same, already open.
    pub(crate) store: Option<Arc<Store>>,
    /// The weights, as far as a fake has some.
    pub(crate) weights: u8,
    /// Tokens that are drawn in place of the fake's own.
    pub(crate) script: Script,
    /// What a whole text becomes.
    pub(crate) pooled: Option<PooledShape>,
}

/// Tokens that are drawn next, whoever asks for some.
pub(crate) type Script = Arc<Mutex<VecDeque<u32>>>;

/// A fake that says what it is told to.
struct Scripted {
    echo: EchoExecutor,
    script: Script,
}

impl Executor for Scripted {
    fn kv_layout(&self) -> &KvLayout {
        self.echo.kv_layout()
    }

    fn numeric_class(&self) -> NumericClass {
        self.echo.numeric_class()
    }

    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        self.echo.submit(step)
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), StepError> {
        self.echo.finish(out)?;
        let mut script = self.script.lock().unwrap();
        for token in &mut out.tokens {
            *token = script.pop_front().unwrap_or(*token);
        }
        Ok(())
    }

    fn start_read(&mut self, pages: &[PageRead], ticket: Ticket) {
        self.echo.start_read(pages, ticket);
    }

    fn start_write(&mut self, pages: Vec<(PageRef, StoredPage)>, ticket: Ticket) {
        self.echo.start_write(pages, ticket);
    }

    fn poll(&mut self, done: &mut Vec<CopyDone>) {
        self.echo.poll(done);
    }

    fn set_adapter(&mut self, id: AdapterId, weights: Option<&AdapterWeights>) -> Result<(), LoadError> {
        self.echo.set_adapter(id, weights)
    }
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            options: ServerOptions::default(),
            pages: 1024,
            waiting: 256,
            chunks: 64,
            gate: None,
            fail_every: None,
            template: Some(TEMPLATE.to_owned()),
            format: FormatChoice::default(),
            generation: Generation { eos: vec![EOS], ..Generation::default() },
            directory: None,
            store: None,
            weights: 0,
            script: Script::default(),
            pooled: Some(PooledShape { kind: PooledKind::Embedding, width: POOLED_WIDTH }),
        }
    }
}

/// A server under test. Dropping it ends it.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) engine: Handle,
    pub(crate) trigger: ShutdownTrigger,
    pub(crate) task: JoinHandle<std::io::Result<()>>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) store: Option<Arc<Store>>,
    script: Script,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let kind = self.headers.get("content-type").map(|value| value.to_str().unwrap());
        assert_eq!(kind, Some("application/json"), "{self:?}");
        serde_json::from_slice(&self.body).unwrap()
    }

    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }

    /// The error object, which must be whole.
    #[track_caller]
    pub(crate) fn error(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        let error = self.json()["error"].clone();
        let keys: Vec<&str> = error.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(
            error["message"].as_str().is_some_and(|m| !m.is_empty()) && error["type"].is_string(),
            "{error}"
        );
        for key in ["param", "code"] {
            assert!(error[key].is_null() || error[key].is_string(), "{error}");
        }
        error
    }
}

/// The tokenizer of all models here.
pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/qwen2/tokenizer.json");
    Arc::new(Tokenizer::from_bytes(&path, &std::fs::read(&path).unwrap()).unwrap())
}

/// Starts a server whose model is ready.
pub(crate) async fn start(mut setup: Setup) -> Server {
    setup.store = setup.store.take().or_else(|| setup.directory.as_deref().map(open_store));
    let (store, script, directory) = (setup.store.clone(), setup.script.clone(), setup.directory.clone());
    let mut options = setup.options.clone();
    let model = load(MODEL, setup);
    let parts = (model.engine.clone(), model.tokenizer.clone());
    let registry = Registry::loading([MODEL.to_owned()]);
    registry.ready(model);
    options.store = store;
    options.files = directory;
    let mut server = listen(registry, options, parts).await;
    server.script = script;
    server
}

/// A model with an engine of its own.
pub(crate) fn load(id: &str, setup: Setup) -> ServedModel {
    let tokenizer = tokenizer();
    let limits = Limits {
        context: CONTEXT,
        tokens_per_step: 256,
        chunks: setup.chunks,
        output_rows: 256,
        // A model without pages keeps nothing: it computes a text whole.
        pages: if setup.pages > 0 { vec![setup.pages] } else { Vec::new() },
        kv_dtype: KvDType::F32,
    };
    let vocab = tokenizer.vocab_len();
    let mut executor = EchoExecutor::new(vocab, limits.clone());
    if let Some(gate) = setup.gate {
        executor = executor.gated(gate);
    }
    if let Some(n) = setup.fail_every {
        executor = executor.failing_every(n);
    }
    let mut options = EngineOptions::new(limits, setup.waiting, vocab);
    options.pooled_width = setup.pooled.map(|pooled| pooled.width);
    options.store = setup.store;
    options.restore = RestorePolicy::Always;
    // What it is told to say is for tokens that are drawn, not for such as are guessed ahead.
    options.draft = DraftPolicy::Off;
    let template_hash = blake3::hash(setup.template.as_deref().unwrap_or_default().as_bytes());
    options.model = ModelIdentity {
        weights: [setup.weights; 32],
        template: *template_hash.as_bytes(),
        ..ModelIdentity::default()
    };
    let executor = Scripted { echo: executor, script: setup.script };
    let engine = Handle::start(Box::new(executor), options).unwrap();
    ServedModel {
        id: id.to_owned(),
        created: 1_700_000_000,
        tokenizer,
        template: setup.template.map(|source| ChatTemplate::new(&source, Map::new()).unwrap()),
        format: setup.format,
        generation: setup.generation,
        vocab,
        context: engine.limits().context,
        generates: setup.pages > 0,
        pooled: setup.pooled,
        reuse: Reuse::Exact,
        engine,
    }
}

/// Serves a registry.
pub(crate) async fn listen(
    registry: Registry,
    options: ServerOptions,
    (engine, tokenizer): (Handle, Arc<Tokenizer>),
) -> Server {
    let store = options.store.clone();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (trigger, signal) = shutdown_channel();
    let task = tokio::spawn(serve(listener, registry, options, signal));
    Server { address, engine, trigger, task, tokenizer, store, script: Script::default() }
}

pub(crate) fn open_store(directory: &Path) -> Arc<Store> {
    let options = store::Options { reserve_bytes: 0, ..store::Options::default() };
    let (store, report) = Store::open_dir(directory, options).unwrap();
    assert!(report.damage.is_empty(), "{report:?}");
    Arc::new(store)
}

/// A directory of its own, gone with it.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let name = format!("mainstay-server-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.clone()
    }

    /// What a crash at this moment would leave.
    pub(crate) fn copied(&self) -> Self {
        let copy = Self::new();
        copy_files(&self.0, &copy.0);
        copy
    }
}

fn copy_files(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir_all(&to).unwrap();
            copy_files(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Server {
    /// Sends a request on a connection of its own; dropping the result closes it.
    pub(crate) async fn open(&self, request: Request<Body>) -> Open {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request).await.unwrap();
        Open { response, buffer: Vec::new(), connection, _sender: sender }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Reply {
        let mut open = self.open(request).await;
        let (status, headers) = (open.response.status(), open.response.headers().clone());
        let body = open.response.body_mut().collect().await.unwrap().to_bytes();
        Reply { status, headers, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).header("host", "test").body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(request(path, body)).await
    }

    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Open {
        let open = self.open(request(path, body)).await;
        assert_eq!(open.response.status(), 200);
        assert_eq!(open.response.headers()["content-type"], "text/event-stream");
        open
    }

    /// What the model says next, and then ends.
    pub(crate) fn will_say(&self, text: &str) {
        assert!(self.script.lock().unwrap().is_empty(), "what it was to say before is not all said");
        self.will_say_then(text);
    }

    /// What it says after what it is to say already.
    pub(crate) fn will_say_then(&self, text: &str) {
        let tokens = self.tokenizer.encode(text, AddSpecial::No).unwrap();
        self.script.lock().unwrap().extend(tokens.into_iter().chain([EOS]));
    }

    /// Whether it has said everything.
    pub(crate) fn has_said_all(&self) -> bool {
        self.script.lock().unwrap().is_empty()
    }

    /// Makes a session of the default tenant.
    pub(crate) fn session(&self, settings: Settings) -> String {
        let store = self.store.as_deref().unwrap();
        let tenant = store.tenant("default").unwrap().id;
        format!("sess_{}", store.create(tenant, settings).unwrap().id)
    }

    pub(crate) fn id(&self, session: &str) -> (TenantId, SessionId) {
        let tenant = self.store.as_deref().unwrap().tenant("default").unwrap().id;
        (tenant, session.strip_prefix("sess_").unwrap().parse().unwrap())
    }

    /// The tokens of a session, turn by turn.
    pub(crate) fn turns(&self, session: &str) -> Vec<Vec<u32>> {
        let (tenant, id) = self.id(session);
        let turns = self.store.as_deref().unwrap().turns(tenant, id).unwrap();
        turns.iter().map(|turn| turn.tokens.clone()).collect()
    }

    /// Ends the server and its engine, and closes the store.
    pub(crate) async fn stop(mut self) {
        self.task.abort();
        self.engine.shutdown();
        self.engine.closed().await;
        let mut store = self.store.take().unwrap();
        drop(self);
        loop {
            match Arc::try_unwrap(store) {
                Ok(store) => return store.close().unwrap(),
                Err(shared) => store = shared,
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    /// Waits until no sequence holds pages or waits.
    pub(crate) async fn idle(&self) {
        loop {
            let stats = self.engine.stats();
            if stats.running == 0 && stats.waiting == 0 && stats.pages_used == 0 {
                return;
            }
            tokio::task::yield_now().await;
            std::thread::yield_now();
        }
    }
}

pub(crate) fn request(path: &str, body: &Value) -> Request<Body> {
    let request = Request::post(path).header("host", "test").header("content-type", "application/json");
    request.body(Body::from(body.to_string())).unwrap()
}

/// A response whose body is read piece by piece.
pub(crate) struct Open {
    pub(crate) response: axum::http::Response<Incoming>,
    buffer: Vec<u8>,
    connection: JoinHandle<hyper::Result<()>>,
    _sender: hyper::client::conn::http1::SendRequest<Body>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Open {
    /// The next block of the stream without its blank line, `None` at the end. Every block is UTF-8.
    pub(crate) async fn block(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let block = self.buffer.drain(..end + 2).collect::<Vec<u8>>();
                return Some(String::from_utf8(block[..end].to_vec()).unwrap());
            }
            let Some(frame) = self.response.body_mut().frame().await else {
                assert_eq!(self.buffer, b"", "a block was cut");
                return None;
            };
            self.buffer.extend_from_slice(frame.unwrap().data_ref().unwrap());
        }
    }

    /// The JSON of the next event, `None` at `[DONE]`, after which nothing may come, or at the end without one.
    pub(crate) async fn event(&mut self) -> Option<Value> {
        Some(self.numbered().await?.1)
    }

    /// The same with the event's id.
    pub(crate) async fn numbered(&mut self) -> Option<(Option<usize>, Value)> {
        let block = self.block().await?;
        let (mut data, mut number) = (None, None);
        for line in block.lines() {
            match line.split_once(": ").unwrap_or_else(|| panic!("no field: {block:?}")) {
                ("data", text) => data = Some(text),
                ("id", text) => number = Some(text.parse().unwrap()),
                _ => panic!("another field: {block:?}"),
            }
        }
        let data = data.unwrap_or_else(|| panic!("no data: {block:?}"));
        if data == "[DONE]" {
            assert_eq!(self.block().await, None);
            return None;
        }
        Some((number, serde_json::from_str(data).unwrap()))
    }

    /// The events up to the end, or to an error, after which nothing may come.
    pub(crate) async fn events_until_error(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(block) = self.block().await {
            let data = block.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
            match data {
                "[DONE]" => assert_eq!(self.block().await, None),
                data => events.push(serde_json::from_str(data).unwrap()),
            }
        }
        events
    }

    pub(crate) async fn events(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.event().await {
            events.push(event);
        }
        events
    }
}

/// A chat request with some fields set.
pub(crate) fn chat(patch: Value) -> Value {
    patched(json!({"model": MODEL, "messages": [{"role": "user", "content": "Say something."}]}), patch)
}

/// A completion request with some fields set.
pub(crate) fn completion(patch: Value) -> Value {
    patched(json!({"model": MODEL, "prompt": "The quick brown fox"}), patch)
}

fn patched(mut body: Value, patch: Value) -> Value {
    let Value::Object(patch) = patch else { panic!("a patch is an object") };
    body.as_object_mut().unwrap().extend(patch);
    body
}

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// The joined text of a choice's deltas.
pub(crate) fn joined(events: &[Value], choice: usize) -> String {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    let own = choices.filter(|found| found["index"] == choice);
    own.filter_map(|found| found["delta"]["content"].as_str().or(found["text"].as_str())).collect()
}
