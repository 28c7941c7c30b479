//! A connection to a server: made when it is first needed, and kept as long as the response that needs it.

use std::collections::HashMap;
use std::sync::Arc;

use reqwest::header::{AUTHORIZATION, HeaderMap};
use reqwest::redirect::Policy;
use rmcp::ServiceExt;
use rmcp::model::{
    CallToolRequestParams, CallToolResult, ClientCapabilities, ClientConfig, ContentBlock, Implementation,
};
use rmcp::service::{RoleClient, RunningService};
use rmcp::transport::StreamableHttpClientTransport;
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use serde_json::{Map, Value};
use tokio::sync::Mutex;

use super::address::{self, PublicOnly};
use super::server::{McpServer, McpServerError, header};

/// What a client sends to a server beside what the operator does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Credentials {
    headers: Vec<(String, String)>,
    authorization: Option<String>,
}

impl Credentials {
    pub(crate) fn new(authorization: Option<&str>) -> Self {
        Self { headers: Vec::new(), authorization: authorization.map(str::to_owned) }
    }

    /// # Errors
    /// What is no header, and those of the protocol itself.
    pub(crate) fn add(&mut self, name: &str, value: &str) -> Result<(), McpServerError> {
        header(name, value)?;
        self.headers.push((name.to_ascii_lowercase(), value.to_owned()));
        Ok(())
    }
}

/// A tool that a server offers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    pub(crate) input_schema: Map<String, Value>,
    pub(crate) annotations: Value,
}

/// A server, as one response reaches it.
pub(crate) struct Connection {
    pub(crate) server: Arc<McpServer>,
    pub(crate) credentials: Credentials,
    service: Mutex<Option<Arc<Service>>>,
}

type Service = RunningService<RoleClient, ClientConfig>;

impl Connection {
    pub(crate) fn new(server: Arc<McpServer>, credentials: Credentials) -> Self {
        Self { server, credentials, service: Mutex::default() }
    }

    /// What the server offers and the operator allows.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub(crate) async fn list(&self) -> Result<Vec<Tool>, String> {
        let list = async { self.service().await?.list_all_tools().await.map_err(|error| told(&error)) };
        let tools = self.in_time(list).await?;
        let is_allowed = |tool: &rmcp::model::Tool| {
            let allowed = self.server.allowed_tools.as_ref();
            allowed.is_none_or(|names| names.iter().any(|name| *name == *tool.name))
        };
        Ok(tools.into_iter().filter(is_allowed).map(Tool::of).collect())
    }

    /// Calls a tool; its result as text.
    ///
    /// # Errors
    /// What went wrong, or what the tool says went wrong.
    pub(crate) async fn call(&self, tool: &str, arguments: Map<String, Value>) -> Result<String, String> {
        let asked = CallToolRequestParams::new(tool.to_owned()).with_arguments(arguments);
        let call =
            async { self.service().await?.peer().call_tool(asked).await.map_err(|error| told(&error)) };
        let result = self.in_time(call).await?;
        let is_error = result.is_error == Some(true);
        let text = text_of(result);
        if is_error { Err(text) } else { Ok(text) }
    }

    /// Waits as long as the operator allows. A connection on which something went wrong is given up.
    async fn in_time<T>(&self, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        let limit = self.server.timeout;
        let done = tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
            Err(format!("the MCP server did not answer within {} s", limit.as_secs_f64()))
        });
        if done.is_err() {
            self.service.lock().await.take();
        }
        done
    }

    async fn service(&self) -> Result<Arc<Service>, String> {
        let mut service = self.service.lock().await;
        if let Some(service) = service.as_ref() {
            return Ok(Arc::clone(service));
        }
        let made = Arc::new(self.connect().await?);
        *service = Some(Arc::clone(&made));
        Ok(made)
    }

    async fn connect(&self) -> Result<Service, String> {
        let server = &self.server;
        // What is followed or sent through another machine could lead anywhere.
        let mut client = reqwest::Client::builder().redirect(Policy::none()).no_proxy();
        if !server.allows_private {
            if address::literal(&server.url).is_some_and(|address| !address::is_public(address)) {
                return Err("the MCP server is at a private address".to_owned());
            }
            client = client.dns_resolver(Arc::new(PublicOnly));
        }
        let client = client.build().map_err(|error| told(&error))?;
        let mut config = StreamableHttpClientTransportConfig::with_uri(server.url.as_str());
        let headers = self.headers().map_err(|error| error.to_string())?;
        config.auth_header = server.authorization.clone().or_else(|| {
            let is_set = headers.contains_key(AUTHORIZATION);
            self.credentials.authorization.clone().filter(|_| !is_set)
        });
        config.custom_headers = headers
            .iter()
            .filter(|(name, _)| config.auth_header.is_none() || **name != AUTHORIZATION)
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect::<HashMap<_, _>>();
        let transport = StreamableHttpClientTransport::with_client(client, config);
        let own = Implementation::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        let own = ClientConfig::new(ClientCapabilities::default(), own);
        own.serve(transport).await.map_err(|error| told(&error))
    }

    /// The operator's headers hold where the client sends others of the same name.
    fn headers(&self) -> Result<HeaderMap, McpServerError> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.credentials.headers {
            let (name, value) = header(name, value)?;
            headers.insert(name, value);
        }
        headers.extend(self.server.headers.clone());
        Ok(headers)
    }
}

impl Tool {
    fn of(tool: rmcp::model::Tool) -> Self {
        Self {
            name: tool.name.into_owned(),
            description: tool.description.map(|text| text.into_owned()),
            input_schema: Arc::unwrap_or_clone(tool.input_schema),
            annotations: tool.annotations.and_then(|own| serde_json::to_value(own).ok()).unwrap_or_default(),
        }
    }
}

/// The text of a result. What is no text is shown as the protocol writes it.
fn text_of(result: CallToolResult) -> String {
    let block = |block: &ContentBlock| match block {
        ContentBlock::Text(text) => text.text.clone(),
        other => serde_json::to_string(other).unwrap_or_default(),
    };
    match result.structured_content {
        Some(structured) if result.content.is_empty() => structured.to_string(),
        _ => result.content.iter().map(block).collect::<Vec<_>>().join("\n"),
    }
}

/// An error with what led to it: the first of the chain alone seldom tells.
fn told(error: &(dyn std::error::Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let text = error.to_string();
        if !message.contains(&text) {
            message += ": ";
            message += &text;
        }
        source = error.source();
    }
    message
}
