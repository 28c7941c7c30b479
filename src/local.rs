//! An engine in this process behind the server's own routes, so that a local chat and a remote one are the same code.

use anyhow::Result;
use mainstay_engine::Handle;
use mainstay_server::{Registry, ServerOptions, shutdown_channel};
use tokio::net::TcpListener;

use crate::client::{Client, RemoteArgs};
use crate::options::ModelArgs;
use crate::serve;
use crate::source::Source;

/// A client, and the engine behind it if it runs here.
pub(crate) struct Connection {
    pub(crate) client: Client,
    /// Backend and kernel path of a local engine.
    pub(crate) device: Option<String>,
    engine: Option<Handle>,
}

impl Connection {
    /// Connects to the server that was named, or loads the model here.
    ///
    /// # Errors
    /// What the server, the hub or the loader says.
    pub(crate) async fn open(remote: &RemoteArgs, model: &ModelArgs) -> Result<Self> {
        match &remote.url {
            Some(url) => {
                let client = Client::connect(url, remote.api_key.as_deref(), model.model.as_deref()).await?;
                Ok(Self { client, device: None, engine: None })
            }
            None => Self::load(model).await,
        }
    }

    /// Loads the model and serves it on a free port of the loopback address under a key that only this process knows.
    async fn load(args: &ModelArgs) -> Result<Self> {
        let source = Source::parse(args.model.as_deref())?;
        let name = source.name();
        let started = serve::load(source, args.engine.clone(), None).await?;
        let (device, engine) = (started.device.clone(), started.handle.clone());
        let registry = Registry::default();
        registry.ready(serve::served(name.clone(), started)?);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let key = random_key()?;
        let options = ServerOptions { api_keys: vec![key.parse()?], ..ServerOptions::default() };
        let (trigger, signal) = shutdown_channel();
        tokio::spawn(async move {
            // the server lives as long as the process; it must not see its trigger go
            let _trigger = trigger;
            mainstay_server::serve(listener, registry, options, signal).await
        });
        let client = Client::connect(&format!("http://{address}"), Some(&key), Some(&name)).await?;
        Ok(Self { client, device: Some(device), engine: Some(engine) })
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
