//! A server of the operator's list.

use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// A server that responses may reach.
#[derive(Clone)]
pub struct McpServer {
    pub(crate) name: String,
    pub(crate) url: Url,
    /// Sent with every request to it.
    pub(crate) headers: HeaderMap,
    /// A bearer token.
    pub(crate) authorization: Option<String>,
    /// Longest time for listing its tools, and for one call.
    pub(crate) timeout: Duration,
    /// The tools that may be called; all without it.
    pub(crate) allowed_tools: Option<Vec<String>>,
    /// Calls need the client's approval where a request does not say.
    pub(crate) needs_approval: bool,
    /// It may be at an address of this machine or of a private network.
    pub(crate) allows_private: bool,
}

/// What is wrong with an entry of the operator's list.
#[derive(Clone, Debug, thiserror::Error)]
pub enum McpServerError {
    #[error("expected a name of letters, digits, `-` and `_`, found {0:?}")]
    Name(String),
    #[error("expected an http or https URL, found {0:?}")]
    Url(String),
    #[error("expected a header's name and value, found {0:?}")]
    Header(String),
}

impl McpServer {
    /// A server of which all tools may be called, each call with the client's approval.
    ///
    /// # Errors
    /// A name or an address that is none.
    pub fn new(name: &str, url: &str) -> Result<Self, McpServerError> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(McpServerError::Name(name.to_owned()));
        }
        let wrong = || McpServerError::Url(url.to_owned());
        let url = Url::parse(url).map_err(|_| wrong())?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(wrong());
        }
        Ok(Self {
            name: name.to_owned(),
            url,
            headers: HeaderMap::new(),
            authorization: None,
            timeout: TIMEOUT_DEFAULT,
            allowed_tools: None,
            needs_approval: true,
            allows_private: false,
        })
    }

    /// # Errors
    /// What is no header, and those of the protocol itself.
    pub fn header(mut self, name: &str, value: &str) -> Result<Self, McpServerError> {
        let (name, value) = header(name, value)?;
        self.headers.insert(name, value);
        Ok(self)
    }

    #[must_use]
    pub fn authorization(self, token: Option<String>) -> Self {
        Self { authorization: token, ..self }
    }

    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    #[must_use]
    pub fn allowed_tools(self, names: Option<Vec<String>>) -> Self {
        Self { allowed_tools: names, ..self }
    }

    #[must_use]
    pub fn needs_approval(self, needs_approval: bool) -> Self {
        Self { needs_approval, ..self }
    }

    #[must_use]
    pub fn allows_private(self, allows_private: bool) -> Self {
        Self { allows_private, ..self }
    }
}

/// Headers are secrets as often as not.
impl std::fmt::Debug for McpServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("McpServer").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A header that may be sent: none that the connection or the protocol needs for itself.
pub(super) fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), McpServerError> {
    const OWN: [&str; 10] = [
        "accept",
        "connection",
        "content-length",
        "content-type",
        "host",
        "last-event-id",
        "mcp-protocol-version",
        "mcp-session-id",
        "transfer-encoding",
        "upgrade",
    ];
    let wrong = || McpServerError::Header(name.to_owned());
    let read = HeaderName::try_from(name).map_err(|_| wrong())?;
    let mut value = HeaderValue::try_from(value).map_err(|_| wrong())?;
    if OWN.contains(&read.as_str()) {
        return Err(wrong());
    }
    value.set_sensitive(true);
    Ok((read, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_server_is_refused() {
        for (name, url) in [("", "http://a"), ("a b", "http://a"), ("a", "a"), ("a", "file:///etc/passwd")] {
            assert!(McpServer::new(name, url).is_err(), "{name} {url}");
        }
        let server = McpServer::new("docs-1_x", "https://mcp.example.com/mcp").unwrap();
        assert!(server.needs_approval && !server.allows_private);
        assert!(server.clone().header("X-Team", "a").is_ok());
        for (name, value) in [("Host", "a"), ("mcp-session-id", "a"), ("a b", "a"), ("x", "a\nb")] {
            assert!(server.clone().header(name, value).is_err(), "{name}");
        }
    }
}
