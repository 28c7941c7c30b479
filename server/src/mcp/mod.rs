//! Servers of the Model Context Protocol that the operator lets responses reach: who they are, and what they offer.

mod address;
mod connection;
mod server;

pub(crate) use connection::{Connection, Credentials, Tool};
pub use server::{McpServer, McpServerError};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::error::ApiError;

/// How long a list of tools is taken for what the server offers.
const LIST_TTL: Duration = Duration::from_secs(60);
/// Most lists that are kept: each set of headers has one of its own.
const LISTS_MAX: usize = 256;

/// A server with the headers of a request. Lists differ by them.
type ListKey = (String, Credentials);

/// The tools of a server, and when they were listed.
type Listed = (Instant, Arc<[Tool]>);

/// The operator's servers. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct McpServers {
    servers: Arc<[Arc<McpServer>]>,
    lists: Arc<Mutex<HashMap<ListKey, Listed>>>,
}

impl McpServers {
    pub(crate) fn new(servers: &[McpServer]) -> Self {
        Self { servers: servers.iter().cloned().map(Arc::new).collect(), lists: Arc::default() }
    }

    /// The server that a request names, by its address or else by its name.
    ///
    /// # Errors
    /// 400, naming the servers that there are.
    pub(crate) fn find(
        &self,
        (label, url): (&str, Option<&str>),
        path: &str,
    ) -> Result<Arc<McpServer>, ApiError> {
        let found = self.servers.iter().find(|server| match url {
            Some(url) => server.url.as_str() == url || server.url.as_str().trim_end_matches('/') == url,
            None => server.name == label,
        });
        if let Some(found) = found {
            return Ok(Arc::clone(found));
        }
        let (field, what) = url.map_or(("server_label", label), |url| ("server_url", url));
        let known: Vec<&str> = self
            .servers
            .iter()
            .map(|server| if url.is_some() { server.url.as_str() } else { server.name.as_str() })
            .collect();
        let message = if known.is_empty() {
            format!("expected none, since this server is configured without MCP servers, found {what:?}")
        } else {
            format!("expected a configured MCP server ({}), found {what:?}", known.join(", "))
        };
        Err(ApiError::field(format!("{path}.{field}"), message))
    }

    /// What a server offers, as it said a while ago or says now.
    ///
    /// # Errors
    /// Why it does not say, in words.
    pub(crate) async fn list(&self, connection: &Connection) -> Result<Arc<[Tool]>, String> {
        let key = (connection.server.name.clone(), connection.credentials.clone());
        let is_fresh = |at: &Instant| at.elapsed() < LIST_TTL;
        let known = self.lists.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some((_, list)) = known.filter(|(at, _)| is_fresh(at)) {
            return Ok(list);
        }
        let list: Arc<[Tool]> = connection.list().await?.into();
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        lists.retain(|_, (at, _)| is_fresh(at));
        if lists.len() < LISTS_MAX {
            lists.insert(key, (Instant::now(), Arc::clone(&list)));
        }
        Ok(list)
    }
}
