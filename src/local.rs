//! An engine in this process behind the server's own routes, so that a local chat and a remote one are the same code.

use std::sync::Arc;

use anyhow::Result;
use mainstay_engine::Handle;
use mainstay_engine::store::Store;
use mainstay_server::{Registry, ServerOptions, ShutdownTrigger, shutdown_channel};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::client::{Client, RemoteArgs};
use crate::options::ModelArgs;
use crate::{serve, start, store};

/// A server on a free port of the loopback address, under a key that only this process knows.
pub(crate) struct Inside {
    pub(crate) url: String,
    pub(crate) key: String,
    trigger: ShutdownTrigger,
    task: JoinHandle<std::io::Result<()>>,
}

impl Inside {
    /// Serves what is in the registry to the tenant.
    ///
    /// # Errors
    /// Where there is no port, or no randomness for a key; or the tenant's name cannot stand before a key.
    pub(crate) async fn start(registry: Registry, tenant: &str, store: Option<Arc<Store>>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let key = random_key()?;
        let api_keys = vec![format!("{tenant}:{key}").parse()?];
        let options = ServerOptions { api_keys, store, ..ServerOptions::default() };
        let (trigger, signal) = shutdown_channel();
        let task = tokio::spawn(mainstay_server::serve(listener, registry, options, signal));
        Ok(Self { url, key, trigger, task })
    }

    /// Ends it and all its connections.
    pub(crate) async fn stop(self) -> Result<()> {
        self.trigger.advance();
        self.trigger.advance();
        Ok(self.task.await??)
    }
}

/// A client, and the engine behind it if it runs here.
pub(crate) struct Connection {
    pub(crate) client: Client,
    /// Backend and kernel path of a local engine.
    pub(crate) device: Option<String>,
    engine: Option<Handle>,
    inside: Option<Inside>,
    store: Option<Arc<Store>>,
}

/// Whose sessions a local engine's are.
const TENANT: &str = "default";

impl Connection {
    /// Connects to the server that was named, or loads the model here, with this store if there is one.
    ///
    /// # Errors
    /// What the server, the hub or the loader says.
    pub(crate) async fn open(
        remote: &RemoteArgs,
        model: &ModelArgs,
        store: Option<Arc<Store>>,
    ) -> Result<Self> {
        match &remote.url {
            Some(url) => {
                let client = Client::connect(url, remote.api_key.as_deref(), model.model.as_deref()).await?;
                Ok(Self { client, device: None, engine: None, inside: None, store: None })
            }
            None => Self::load(model, store).await,
        }
    }

    async fn load(args: &ModelArgs, store: Option<Arc<Store>>) -> Result<Self> {
        let source = args.source()?;
        let name = source.name();
        let started = start::alone(source, args.engine.clone(), store.clone()).await?;
        let (device, engine) = (started.device.clone(), started.handle.clone());
        let registry = Registry::default();
        registry.ready(serve::served(name.clone(), started)?);
        let inside = Inside::start(registry, TENANT, store.clone()).await?;
        let client = Client::connect(&inside.url, Some(&inside.key), Some(&name)).await?;
        Ok(Self { client, device: Some(device), engine: Some(engine), inside: Some(inside), store })
    }

    /// Ends the engine that runs here, and closes its store.
    ///
    /// # Errors
    /// What could not be made durable.
    pub(crate) async fn close(mut self) -> Result<()> {
        if let Some(inside) = self.inside.take() {
            inside.stop().await?;
        }
        if let Some(engine) = self.engine.take() {
            engine.shutdown();
            engine.closed().await;
        }
        match self.store.take() {
            Some(store) => store::close(store).await,
            None => Ok(()),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(engine) = &self.engine {
            engine.shutdown();
        }
    }
}

fn random_key() -> Result<String> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}
