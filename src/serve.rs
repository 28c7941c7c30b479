//! `mainstay serve`: listens at once, loads the models behind it, says on one line when it is ready, drains on signals.

use std::future::Future;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use mainstay_engine::Reuse;
use mainstay_models::Model;
use mainstay_server::{
    ApiKey, FormatChoice, McpServer, PooledShape, Registry, ServedModel, ServerOptions, ShutdownTrigger,
    shutdown_channel,
};
use tokio::net::TcpListener;

use crate::exit::Usage;
use crate::loader::{self, Loads};
use crate::mcp;
use crate::memory::{Memory, MemoryChoice};
use crate::options::switch;
use crate::roster::{RosterArgs, Wanted};
use crate::size;
use crate::start::{self, Started};
use crate::store::{self, StoreArgs};

/// Options of `mainstay serve`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) models: RosterArgs,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    #[command(flatten)]
    pub(crate) http: HttpArgs,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

/// What the models share.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub(crate) struct MemoryArgs {
    /// Memory for all models, weights and pages together, such as 16G; auto is what the machine or its container has
    /// free at the start, less a reserve.
    #[arg(long, env = "MAINSTAY_MEMORY", value_name = "BYTES", default_value = "auto", value_parser = MemoryChoice::parse)]
    memory: MemoryChoice,
    /// Unload models that nobody has used for so long, seconds; the next request for one waits until it is back.
    #[arg(long, env = "MAINSTAY_MODEL_IDLE_S", value_name = "SECONDS", value_parser = seconds)]
    model_idle_s: Option<Duration>,
}

/// Looks for idle models within the time that makes them so, and how far apart these looks are.
const IDLE_LOOKS: u32 = 4;
const IDLE_LOOK_MIN: Duration = Duration::from_millis(50);
const IDLE_LOOK_MAX: Duration = Duration::from_secs(10);

/// Address, keys and bounds of the HTTP side.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub(crate) struct HttpArgs {
    /// Address to listen on.
    #[arg(long, env = "MAINSTAY_HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, env = "MAINSTAY_PORT", default_value_t = 8080)]
    port: u16,
    /// A key that clients must present, as KEY or TENANT:KEY; may be repeated or separated by commas.
    #[arg(
        long,
        env = "MAINSTAY_API_KEYS",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    api_key: Vec<String>,
    /// A key like --api-key's that also opens what is the operator's: /v1/store, loading and unloading adapters. Without
    /// any key, whoever connects from this machine is the operator.
    #[arg(
        long,
        env = "MAINSTAY_ADMIN_KEYS",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    admin_key: Vec<String>,
    /// Allow other machines to connect although there is no key.
    #[arg(long, env = "MAINSTAY_INSECURE", value_parser = switch())]
    insecure: bool,
    /// Longest time for a whole request, seconds.
    #[arg(long, env = "MAINSTAY_REQUEST_TIMEOUT", value_name = "SECONDS", value_parser = seconds)]
    request_timeout: Option<Duration>,
    /// Longest wait for a request's first step, seconds.
    #[arg(long, env = "MAINSTAY_QUEUE_TIMEOUT", value_name = "SECONDS", value_parser = seconds)]
    queue_timeout: Option<Duration>,
    /// Most tokens to generate where a request does not say; the rest of the context without it.
    #[arg(long, env = "MAINSTAY_MAX_TOKENS_DEFAULT", value_name = "TOKENS")]
    max_tokens_default: Option<usize>,
    /// After SIGTERM, how long running requests may go on, seconds.
    #[arg(long, env = "MAINSTAY_DRAIN_S", value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    drain_s: Duration,
    /// Largest request body.
    #[arg(long, env = "MAINSTAY_BODY_LIMIT", value_name = "BYTES", default_value = "32M", value_parser = size::parse)]
    body_limit: u64,
    /// Largest file that clients may upload.
    #[arg(long, env = "MAINSTAY_FILE_LIMIT", value_name = "BYTES", default_value = "512M", value_parser = size::parse)]
    file_limit: u64,
    /// Requests of batches that are under way at a time.
    #[arg(long, env = "MAINSTAY_BATCH_REQUESTS", value_name = "N", default_value_t = 8)]
    batch_requests: usize,
    /// An MCP server whose tools responses may call, as NAME=URL; may be repeated or separated by commas. Tables
    /// [mcp.servers.NAME] of the options file say more.
    #[arg(long, env = "MAINSTAY_MCP_SERVERS", value_name = "NAME=URL", value_delimiter = ',')]
    mcp_server: Vec<String>,
    /// Show /metrics without a key to other machines too.
    #[arg(long, env = "MAINSTAY_PUBLIC_METRICS", value_parser = switch())]
    public_metrics: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("expected seconds such as 30 or 0.5, found `{text}`");
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

/// Runs until a signal has been followed to its end.
pub(crate) fn run(args: ServeArgs, file: Option<&Path>) -> Result<()> {
    let models = args.models.models(file)?;
    // refuses what needs no model before anything is fetched
    for model in &models {
        start::backend(&model.how.engine)?;
    }
    let mut keys = keys("--api-key", &args.http.api_key)?;
    keys.extend(self::keys("--admin-key", &args.http.admin_key)?.into_iter().map(ApiKey::admin));
    let mcp = mcp::servers(file, &args.http.mcp_server)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(models, args, (keys, mcp)));
    // a fetch or a load that is still going on must not hold the process
    runtime.shutdown_background();
    result
}

async fn serve(
    models: Vec<Wanted>,
    args: ServeArgs,
    (keys, mcp): (Vec<ApiKey>, Vec<McpServer>),
) -> Result<()> {
    let address = address(&args.http, !keys.iter().all(ApiKey::is_admin)).await?;
    let listener = TcpListener::bind(address).await.map_err(|e| bind_error(address, &e))?;
    let local = listener.local_addr()?;
    let (trigger, signal) = shutdown_channel();
    let signals = tokio::spawn(follow_signals(trigger)?);
    let opened = args.store.open()?;
    let recovery = opened.as_ref().map(|opened| opened.recovery);
    let store = opened.map(|opened| opened.store);
    let tier = match &store {
        Some(_) => args.store.open_tier().await?,
        None => None,
    };
    let memory = Memory::new(args.memory.memory);
    let loads = Arc::new(Loads::new(memory, store.clone(), args.store.kv_reuse.into()));
    let waiting = args.models.how.engine.max_waiting;
    let registry = Registry::of(loader::listed(&models), loads.clone(), waiting);
    let options = ServerOptions {
        store: store.clone(),
        files: store.as_ref().and_then(|_| args.store.dir.files()),
        tier,
        recovery,
        durability: args.store.durability.into(),
        journal_interval: args.store.journal_interval(),
        mcp_servers: mcp,
        adapter_dirs: args.models.lora_dir.clone(),
        ..server_options(&args.http, keys, address)
    };
    let server = mainstay_server::serve(listener, registry.clone(), options, signal);
    let mut server = std::pin::pin!(server);
    let names: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    let devices = tokio::select! {
        devices = loads.start(models, &registry) => devices?,
        ended = &mut server => return Ok(ended?),
    };
    let idle = args.memory.model_idle_s.map(|idle| tokio::spawn(leave_idle(registry.clone(), idle)));
    let mut out = std::io::stdout();
    // whoever started us may have closed stdout; that is no reason not to serve
    let _ = writeln!(out, "mainstay ready on http://{local} ({})", told(&names, &devices))
        .and_then(|()| out.flush());
    server.await?;
    signals.abort();
    if let Some(idle) = idle {
        idle.abort();
        let _ = idle.await;
    }
    registry.close().await;
    drop((loads, registry));
    match store {
        Some(store) => store::close(store).await,
        None => Ok(()),
    }
}

/// `model a, cpu avx512`; of several `models a, b, cpu avx512`.
fn told(names: &[String], devices: &[String]) -> String {
    let word = if names.len() == 1 { "model" } else { "models" };
    let devices = if devices.is_empty() { "none loaded".to_owned() } else { devices.join(", ") };
    format!("{word} {}, {devices}", names.join(", "))
}

/// Lets models go that nobody has used for so long.
async fn leave_idle(registry: Registry, idle: Duration) {
    let look = (idle / IDLE_LOOKS).clamp(IDLE_LOOK_MIN, IDLE_LOOK_MAX);
    loop {
        tokio::time::sleep(look).await;
        registry.leave_idle(idle).await;
    }
}

/// What the server needs of a started model.
pub(crate) fn served(id: String, started: Started) -> Result<ServedModel> {
    let pooled = pooled(&started.model);
    Ok(ServedModel {
        id,
        created: now_s()?,
        tokenizer: Arc::new(started.model.tokenizer),
        template: started.model.template,
        format: FormatChoice::default(),
        generation: started.model.generation,
        vocab: started.model.graph.vocab,
        context: started.limits.context,
        generates: started.model.graph.generates(),
        pooled,
        reuse: Reuse::default(),
        engine: started.handle,
    })
}

/// The row that the model makes of a text.
pub(crate) fn pooled(model: &Model) -> Option<PooledShape> {
    let pooled = model.graph.pooled.as_ref();
    pooled.map(|pooled| PooledShape { kind: pooled.kind, width: pooled.width })
}

pub(crate) fn now_s() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?.as_secs())
}

fn keys(option: &str, texts: &[String]) -> Result<Vec<ApiKey>> {
    let parse = |text: &String| text.parse().map_err(|e| anyhow!(Usage(format!("{option}: {e}"))));
    texts.iter().filter(|t| !t.is_empty()).map(parse).collect()
}

fn server_options(args: &HttpArgs, api_keys: Vec<ApiKey>, address: SocketAddr) -> ServerOptions {
    ServerOptions {
        api_keys,
        body_limit_bytes: usize::try_from(args.body_limit).unwrap_or(usize::MAX),
        file_limit_bytes: args.file_limit,
        batch_requests: args.batch_requests,
        request_timeout: args.request_timeout,
        queue_timeout: args.queue_timeout,
        max_tokens_default: args.max_tokens_default,
        drain: args.drain_s,
        public_metrics: args.public_metrics,
        loopback: address.ip().is_loopback(),
        ..ServerOptions::default()
    }
}

/// The address to bind; one that other machines reach needs a key or the operator's word.
async fn address(args: &HttpArgs, has_key: bool) -> Result<SocketAddr> {
    let host = args.host.trim_start_matches('[').trim_end_matches(']');
    let ip = match host.parse::<IpAddr>() {
        Ok(ip) => ip,
        Err(_) => {
            let mut found = tokio::net::lookup_host((host, args.port)).await.ok().into_iter().flatten();
            let first = found.next().ok_or_else(|| Usage(format!("--host {host}: no such address")))?;
            first.ip()
        }
    };
    if !ip.is_loopback() && !has_key && !args.insecure {
        let what = "other machines could use the server without a key: give --api-key, or say --insecure";
        return Err(Usage(format!("--host {host}: {what}")).into());
    }
    Ok(SocketAddr::new(ip, args.port))
}

fn bind_error(address: SocketAddr, error: &std::io::Error) -> anyhow::Error {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow!("{address} is in use by another program (choose another --port)")
        }
        _ => anyhow!("cannot listen on {address}: {error}"),
    }
}

/// A task that moves the server one stage down for each SIGTERM or SIGINT.
fn follow_signals(trigger: ShutdownTrigger) -> Result<impl Future<Output = ()> + Send> {
    #[cfg(unix)]
    let (mut terminate, mut interrupt) = {
        use tokio::signal::unix::{SignalKind, signal};
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    Ok(async move {
        loop {
            #[cfg(unix)]
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            #[cfg(not(unix))]
            if tokio::signal::ctrl_c().await.is_err() {
                return;
            }
            tracing::info!("shutting down");
            trigger.advance();
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        http: HttpArgs,
    }

    fn http(words: &[&str]) -> HttpArgs {
        Command::parse_from(std::iter::once(&"test").chain(words)).http
    }

    #[tokio::test]
    async fn only_loopback_is_open() {
        let bind = async |words: &[&str], key| address(&http(words), key).await.map_err(|e| e.to_string());
        assert!(bind(&[], false).await.is_ok());
        assert!(bind(&["--host", "localhost"], false).await.is_ok());
        assert!(bind(&["--host", "::1"], false).await.is_ok());
        for host in ["0.0.0.0", "::", "[::]", "10.0.0.1"] {
            let refused = bind(&["--host", host], false).await.unwrap_err();
            assert!(refused.contains("--api-key") && refused.contains("--insecure"), "{refused}");
            assert!(bind(&["--host", host], true).await.is_ok());
            assert!(bind(&["--host", host, "--insecure"], false).await.is_ok());
        }
    }

    #[test]
    fn seconds_are_read() {
        assert_eq!(seconds("30"), Ok(Duration::from_secs(30)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "-1", "x", "inf", "1e400"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
