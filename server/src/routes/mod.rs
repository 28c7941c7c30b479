//! The routes, and what every request passes on its way to one: identity, admission, access log.

mod adapters;
mod batches;
mod chat;
mod completions;
mod conversations;
mod embeddings;
mod files;
mod health;
mod messages;
mod metrics;
mod models;
mod query;
mod rerank;
mod responses;
mod responses_ws;
mod sessions;
pub(crate) mod store;
mod stored_chat;
mod stream;
mod tokenize;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, MatchedPath, Path as InPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use mainstay_engine::store::Durability;
use serde_json::{Map, Value};
use tokio::time::Instant;

use crate::anthropic::error::MessagesError;
use crate::auth::{self, Role, Tenant};
use crate::batches::{Batches, Queue, Work, Worker};
use crate::body::{self, BodyLimits};
use crate::error::ApiError;
use crate::files::Files;
use crate::job::TimeLimits;
use crate::mcp::McpServers;
use crate::metrics::HttpMetrics;
use crate::registry::Registry;
use crate::responses::background;
use crate::serve::ServerOptions;
use crate::sessions::Sessions;
use crate::shutdown::{ShutdownSignal, ShutdownStage};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id taken from a client.
const REQUEST_ID_LEN_MAX: usize = 128;

/// What all routes share.
pub(crate) struct App {
    registry: Registry,
    options: ServerOptions,
    shutdown: ShutdownSignal,
    http: Arc<HttpMetrics>,
    sessions: Option<Sessions>,
    files: Option<Files>,
    batches: Option<Batches>,
    mcp: McpServers,
}

type Shared = State<Arc<App>>;

/// All routes. Goes on with what a restart has interrupted.
///
/// # Panics
/// Outside of a runtime.
pub(crate) fn app(
    registry: Registry,
    options: ServerOptions,
    shutdown: ShutdownSignal,
) -> (Router, Option<Work>) {
    let sessions = options.store.clone().map(Sessions::new);
    if let Some(sessions) = &sessions {
        let interval = options.journal_interval;
        sessions.will_go_on(None);
        tokio::spawn(background::go_on(sessions.clone(), registry.clone(), interval));
    }
    let (files, batches, queue) = match options.files.as_deref().and_then(open_files) {
        Some((files, batches, queue)) => (Some(files), Some(batches), Some(queue)),
        None => (None, None, None),
    };
    let http = Arc::default();
    let mcp = McpServers::new(&options.mcp_servers);
    let app = Arc::new(App { registry, options, shutdown, http, sessions, files, batches, mcp });
    let work = queue.and_then(|queue| Some(app.worker()?.start(queue)));
    (routes(app), work)
}

fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::post).get(stored_chat::list))
        .merge(stored_chat::routes())
        .route("/v1/completions", post(completions::post))
        .route("/v1/messages", post(messages::post))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .merge(responses::routes())
        .merge(conversations::routes())
        .merge(files::routes())
        .merge(batches::routes())
        .route("/v1/embeddings", post(embeddings::post))
        .route("/v1/rerank", post(rerank::post))
        .route("/rerank", post(rerank::post))
        .merge(adapters::routes())
        .merge(sessions::routes())
        .merge(store::routes())
        .route("/v1/sessions/{id}/stream", get(stream::get))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/openapi.json", get(|| async { axum::Json(crate::openapi::document()) }))
        .route("/health", get(health::get))
        .route("/metrics", get(metrics::get))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(app.clone(), admit))
        .layer(middleware::from_fn_with_state(app.clone(), observe))
        .with_state(app)
}

impl App {
    async fn body(&self, request: Request<Body>) -> Result<Map<String, Value>, ApiError> {
        let limits = BodyLimits { bytes: self.options.body_limit_bytes, pause: self.options.header_timeout };
        body::object(request, limits).await
    }

    /// The sessions of this server.
    fn sessions(&self) -> Result<&Sessions, ApiError> {
        self.sessions.as_ref().ok_or_else(ApiError::no_sessions)
    }

    /// What works on batches, if there are some.
    fn worker(&self) -> Option<Worker> {
        // Nobody waits for a line: it takes the time that it takes.
        let options = ServerOptions { request_timeout: None, queue_timeout: None, ..self.options.clone() };
        let lines = Arc::new(App {
            registry: self.registry.clone(),
            options,
            shutdown: self.shutdown.clone(),
            http: Arc::clone(&self.http),
            sessions: self.sessions.clone(),
            files: None,
            batches: None,
            mcp: self.mcp.clone(),
        });
        let (slots, shutdown) = (self.options.batch_requests, self.shutdown.clone());
        Some(Worker::new(batches::lines(lines), self.files.clone()?, slots, shutdown))
    }

    /// The files of this server.
    fn files(&self) -> Result<&Files, ApiError> {
        self.files.as_ref().ok_or_else(ApiError::no_files)
    }

    /// What becomes of the pages of a request that is of no session: none of its tokens are in the journal.
    fn plain_durability(&self) -> Durability {
        self.options.durability.min(Durability::Async)
    }

    /// The time limits of a request that arrives now.
    fn time(&self) -> TimeLimits {
        let (request, queue) = (self.options.request_timeout, self.options.queue_timeout);
        TimeLimits { arrived: Instant::now(), request, queue }
    }
}

/// A directory that cannot be used is no reason not to serve.
fn open_files(root: &Path) -> Option<(Files, Batches, Queue)> {
    let open = || {
        let files = Files::open(root.join("files"))?;
        let (batches, queue) = Batches::open(root.join("batches"), files.clone())?;
        Ok((files, batches, queue))
    };
    match open() {
        Ok(opened) => Some(opened),
        Err::<_, std::io::Error>(error) => {
            tracing::error!(%error, root = %root.display(), "this server keeps no files");
            None
        }
    }
}

/// What a path names by its `id`, and who asks for it.
struct Named {
    app: Arc<App>,
    tenant: Tenant,
    id: String,
}

impl FromRequestParts<Arc<App>> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let tenant = parts.extensions.get::<Tenant>().cloned();
        let tenant = tenant.ok_or_else(|| ApiError::internal("a request without a tenant"))?;
        let path = InPath::<HashMap<String, String>>::from_request_parts(parts, app).await;
        let id = path.ok().and_then(|InPath(mut path)| path.remove("id"));
        let id = id.ok_or_else(|| ApiError::bad_request("expected UTF-8 in the path, found other bytes"))?;
        Ok(Self { app: Arc::clone(app), tenant, id })
    }
}

/// Proof that the operator asks.
struct Admin;

impl FromRequestParts<Arc<App>> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<App>) -> Result<Self, ApiError> {
        match parts.extensions.get::<Role>() {
            Some(Role::Admin) => Ok(Self),
            _ => Err(ApiError::not_admin()),
        }
    }
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::no_route(method.as_str(), uri.path())
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method(method.as_str(), uri.path())
}

/// Lets a request in if its key is known and the server is not going down.
async fn admit(State(app): Shared, mut request: Request, next: Next) -> Result<Response, ApiError> {
    let path = request.uri().path();
    let options = &app.options;
    let is_shown = options.loopback || options.public_metrics;
    let open = path == "/health" || (matches!(path, "/metrics" | "/openapi.json") && is_shown);
    if !open {
        let caller = auth::authenticate(&options.api_keys, request.headers());
        if let Err(error) = &caller
            && path.starts_with("/v1/messages")
        {
            return Ok(MessagesError(error.clone()).into_response());
        }
        let (tenant, mut role) = caller?;
        if options.api_keys.is_empty() && options.loopback {
            // Whoever is on this machine could as well open the data directory.
            role = Role::Admin;
        }
        request.extensions_mut().insert::<Tenant>(tenant);
        request.extensions_mut().insert::<Role>(role);
    }
    if app.shutdown.stage() >= ShutdownStage::Drain && request.uri().path() != "/metrics" {
        return Err(ApiError::unavailable("the server is shutting down", "shutting_down"));
    }
    Ok(next.run(request).await)
}

/// Names the request, counts and logs its answer. What was asked and answered is never logged.
async fn observe(State(app): Shared, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request_id(&request);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let mut response = next.run(request).await.into_response();
    let status = response.status().as_u16();
    app.http.answered(&route, status);
    let ms = begun.elapsed().as_millis();
    tracing::debug!(request_id = id.to_str().unwrap_or_default(), %method, route, status, ms, "answered");
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The client's name of the request if it is a sane one, else a new one.
fn request_id(request: &Request) -> HeaderValue {
    let sane = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=REQUEST_ID_LEN_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    match request.headers().get(REQUEST_ID).filter(sane) {
        Some(id) => id.clone(),
        None => HeaderValue::try_from(crate::random::id("req_")).expect("hexadecimal digits make a header"),
    }
}
