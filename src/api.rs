//! A server's HTTP API from the client's side: its address, the key, JSON, and what a refusal says.

use anyhow::{Context, Result};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;

use crate::exit::Usage;

/// One server.
#[derive(Clone)]
pub(crate) struct Api {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

/// What a server answered instead of doing what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{message} ({status})")]
pub(crate) struct Refused {
    status: StatusCode,
    pub(crate) code: String,
    message: String,
}

impl Api {
    /// # Errors
    /// [`Usage`] for an address that is none.
    pub(crate) fn new(url: &str, key: Option<&str>) -> Result<Self> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        if !base.starts_with("http://") && !base.starts_with("https://") {
            return Err(Usage(format!("--url {url}: expected http:// or https://")).into());
        }
        Ok(Self { http: reqwest::Client::new(), base, key: key.map(str::to_owned) })
    }

    /// Its address.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// A request to a path that begins with `/`.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// Sends a request with the key.
    ///
    /// # Errors
    /// [`Refused`] with what the server says, or that it cannot be reached.
    pub(crate) async fn send(&self, mut request: RequestBuilder) -> Result<Response> {
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let reply = request.send().await.with_context(|| format!("{} cannot be reached", self.base))?;
        let status = reply.status();
        if status.is_success() {
            return Ok(reply);
        }
        let text = reply.text().await.unwrap_or_default();
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        let error = |key: &str| body["error"][key].as_str().map(str::to_owned);
        let message = error("message").unwrap_or_else(|| self.base.clone());
        Err(Refused { status, code: error("code").unwrap_or_default(), message }.into())
    }

    /// Sends a request, with a JSON body if there is one, whose answer is JSON.
    ///
    /// # Errors
    /// As [`Api::send`].
    pub(crate) async fn json(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let reply = self.send(request).await?;
        reply.json().await.with_context(|| format!("{}{path}: the server sent no JSON", self.base))
    }
}

/// Text as one piece of a path.
pub(crate) fn piece(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_paths_are_escaped() {
        assert_eq!(piece("sess_01A"), "sess_01A");
        assert_eq!(piece("a b/ü?"), "a%20b%2F%C3%BC%3F");
    }
}
