//! Connections: accepting, header timeouts, draining.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use mainstay_engine::store::object::ObjectTier;
use mainstay_engine::store::{Durability, Store};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::auth::ApiKey;
use crate::mcp::McpServer;
use crate::registry::Registry;
use crate::routes;
use crate::shutdown::{ShutdownSignal, ShutdownStage};

/// What the operator decided.
#[derive(Clone)]
pub struct ServerOptions {
    /// Keys that open the API; without one of a user it is open to everyone who can connect.
    pub api_keys: Vec<ApiKey>,
    /// Directories that adapters may be loaded from while the server runs.
    pub adapter_dirs: Vec<PathBuf>,
    /// Largest request body.
    pub body_limit_bytes: usize,
    /// Longest wait for a request's headers, and for the next piece of its body.
    pub header_timeout: Duration,
    /// Longest time from a request's arrival to its last token.
    pub request_timeout: Option<Duration>,
    /// Longest wait for a request's first step.
    pub queue_timeout: Option<Duration>,
    /// Tokens to generate where the request does not say; the rest of the context without it.
    pub max_tokens_default: Option<usize>,
    /// Longest wait for running requests after [`ShutdownStage::Drain`].
    pub drain: Duration,
    /// Shows `/metrics` without a key.
    pub public_metrics: bool,
    /// Whether only this machine can connect; `/metrics` needs no key then.
    pub loopback: bool,
    /// Where sessions are; the store that the engines were started with. Without one there are none.
    pub store: Option<Arc<Store>>,
    /// The directory that files and batches are kept below; without it there are none. The store's lock must hold it.
    pub files: Option<PathBuf>,
    /// Largest file that is taken in.
    pub file_limit_bytes: u64,
    /// Requests of batches that are under way at a time.
    pub batch_requests: usize,
    /// How long opening the store took, for `/metrics`.
    pub recovery: Option<Duration>,
    /// The object store that sessions move through; without it they do not.
    pub tier: Option<Arc<ObjectTier>>,
    /// Largest session bundle that is taken in.
    pub import_limit_bytes: usize,
    /// When a turn is acknowledged, where neither its session nor its request says.
    pub durability: Durability,
    /// How often tokens of an answer under way are written to the journal, so that it can go on after a crash;
    /// without it only whole turns are.
    pub journal_interval: Option<Duration>,
    /// Servers whose tools responses may call.
    pub mcp_servers: Vec<McpServer>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            adapter_dirs: Vec::new(),
            body_limit_bytes: 32 << 20,
            header_timeout: Duration::from_secs(30),
            request_timeout: None,
            queue_timeout: None,
            max_tokens_default: None,
            drain: Duration::from_secs(30),
            public_metrics: false,
            loopback: true,
            store: None,
            files: None,
            file_limit_bytes: 512 << 20,
            batch_requests: 8,
            recovery: None,
            tier: None,
            import_limit_bytes: 8 << 30,
            durability: Durability::default(),
            journal_interval: Some(Duration::from_millis(100)),
            mcp_servers: Vec::new(),
        }
    }
}

type Connection = http1::Connection<TokioIo<TcpStream>, TowerToHyperService<Router>>;

/// Pause after a failed `accept`, so that running out of file descriptors does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until the shutdown signal has been followed to its end.
///
/// The listener may be served before any model is ready. On [`ShutdownStage::Drain`] new requests and `/health` are
/// answered 503, running requests may finish within `options.drain`; on [`ShutdownStage::Now`] all connections end.
///
/// # Errors
/// Never for a connection; reserved for a listener that is not usable at all.
pub async fn serve(
    listener: TcpListener,
    registry: Registry,
    options: ServerOptions,
    shutdown: ShutdownSignal,
) -> std::io::Result<()> {
    listener.local_addr()?;
    let (drain, header_timeout) = (options.drain, options.header_timeout);
    // What is worked on without a connection ends with this function.
    let (app, _work) = routes::app(registry, options, shutdown.clone());
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(header_timeout);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            stream = accept(&listener) => {
                let connection = builder.serve_connection(TokioIo::new(stream), service(&app));
                connections.spawn(run(connection, shutdown.clone(), ShutdownStage::Drain));
            }
            Some(_) = connections.join_next() => {}
            () = shutdown.reached(ShutdownStage::Drain) => break,
        }
    }
    // Still answered while draining, so that a load balancer hears 503 and not a refused connection.
    builder.keep_alive(false);
    let deadline = tokio::time::sleep(drain);
    tokio::pin!(deadline);
    let mut late = JoinSet::new();
    loop {
        tokio::select! {
            stream = accept(&listener) => {
                let connection = builder.serve_connection(TokioIo::new(stream), service(&app));
                late.spawn(run(connection, shutdown.clone(), ShutdownStage::Now));
            }
            Some(_) = late.join_next() => {}
            () = ended(&mut connections, &shutdown) => break,
            () = &mut deadline => {
                tracing::warn!("requests were still running when the time to drain was over");
                break;
            }
            () = shutdown.reached(ShutdownStage::Now) => break,
        }
    }
    Ok(())
}

/// Serves a connection; from the stage on it takes no further request.
async fn run(connection: Connection, shutdown: ShutdownSignal, stage: ShutdownStage) {
    let mut connection = pin!(connection.with_upgrades());
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.reached(stage) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Waits for the connections, and for what has become of those that were upgraded.
async fn ended(connections: &mut JoinSet<()>, shutdown: &ShutdownSignal) {
    while connections.join_next().await.is_some() {}
    shutdown.released().await;
}

fn service(app: &Router) -> TowerToHyperService<Router> {
    TowerToHyperService::new(app.clone())
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Tokens are small; without this they wait for the acknowledgement of the one before.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY");
                }
                return stream;
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
