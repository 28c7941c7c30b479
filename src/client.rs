//! A small client of OpenAI's streaming API: what `chat`, `run` and `doctor` speak to a server, near or far.

use anyhow::{Context, Result, bail};
use clap::Args;
use reqwest::Method;
use serde_json::{Map, Value, json};

use crate::api::Api;

/// How answers are drawn; what is not given is left to the server.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// 0 always takes the most probable token.
    #[arg(long, env = "MAINSTAY_TEMPERATURE")]
    temperature: Option<f32>,
    /// Keep this many of the most probable tokens.
    #[arg(long, env = "MAINSTAY_TOP_K")]
    top_k: Option<u32>,
    /// Keep the most probable tokens that reach this probability together.
    #[arg(long, env = "MAINSTAY_TOP_P")]
    top_p: Option<f32>,
    /// Drop tokens less probable than this part of the most probable one.
    #[arg(long, env = "MAINSTAY_MIN_P")]
    min_p: Option<f32>,
    /// Makes the same request give the same answer.
    #[arg(long, env = "MAINSTAY_SEED")]
    seed: Option<i64>,
    /// Most tokens to generate.
    #[arg(long, env = "MAINSTAY_MAX_TOKENS", value_name = "TOKENS")]
    max_tokens: Option<u32>,
}

impl SamplingArgs {
    /// The fields of a request body.
    pub(crate) fn fields(&self) -> Map<String, Value> {
        let all = [
            ("temperature", self.temperature.map(Value::from)),
            ("top_k", self.top_k.map(Value::from)),
            ("top_p", self.top_p.map(Value::from)),
            ("min_p", self.min_p.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("max_tokens", self.max_tokens.map(Value::from)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}

/// A server to use instead of an engine in this process.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub(crate) struct RemoteArgs {
    /// Use the server at this address, such as http://127.0.0.1:8080, instead of loading a model here.
    #[arg(long, env = "MAINSTAY_URL")]
    pub(crate) url: Option<String>,
    /// The key to present to that server.
    #[arg(long, env = "MAINSTAY_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
}

/// One model of one server.
pub(crate) struct Client {
    pub(crate) api: Api,
    model: String,
}

/// Which route a text comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

impl Client {
    /// Finds the model: the named one, or the first that the server lists.
    ///
    /// # Errors
    /// [`Usage`] for an address that is none; what the server says otherwise.
    pub(crate) async fn connect(url: &str, key: Option<&str>, model: Option<&str>) -> Result<Self> {
        let api = Api::new(url, key)?;
        let model = match model {
            Some(model) => model.to_owned(),
            None => {
                let models = api.json(Method::GET, "/v1/models", None).await?;
                let first = models["data"][0]["id"].as_str();
                first.with_context(|| format!("{}: the server lists no model", api.base()))?.to_owned()
            }
        };
        Ok(Self { api, model })
    }

    /// Goes on with another model of the server.
    pub(crate) fn set_model(&mut self, model: &str) {
        model.clone_into(&mut self.model);
    }

    /// The model's name.
    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    /// Sends a request and hands over each piece of the answer's text as it arrives. Dropping the future cancels the
    /// request.
    ///
    /// # Errors
    /// What the server says.
    pub(crate) async fn stream(
        &self,
        route: Route,
        mut body: Map<String, Value>,
        mut take: impl FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let path = match route {
            Route::Chat => "/v1/chat/completions",
            Route::Completions => "/v1/completions",
        };
        body.insert("model".into(), json!(self.model));
        body.insert("stream".into(), json!(true));
        let request = self.api.request(Method::POST, path);
        let request =
            request.header("content-type", "application/json").body(Value::Object(body).to_string());
        let mut reply = self.api.send(request).await?;
        let mut events = EventReader::default();
        while let Some(bytes) = reply.chunk().await.context("the answer broke off")? {
            for data in events.push(&bytes) {
                if data == "[DONE]" {
                    return Ok(());
                }
                let event: Value = serde_json::from_str(&data).context("the server sent no JSON")?;
                if let Some(message) = event["error"]["message"].as_str() {
                    bail!("{message}");
                }
                let choice = &event["choices"][0];
                let text = match route {
                    Route::Chat => &choice["delta"]["content"],
                    Route::Completions => &choice["text"],
                };
                take(text.as_str().unwrap_or_default())?;
            }
        }
        bail!("the answer broke off")
    }
}

/// Puts the `data` fields of server-sent events together from pieces of any size.
#[derive(Default)]
pub(crate) struct EventReader {
    pending: Vec<u8>,
}

impl EventReader {
    /// The data of the events that are complete now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        self.pending.extend_from_slice(bytes);
        let mut found = Vec::new();
        while let Some(end) = self.pending.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(data) = line.trim_end().strip_prefix("data:") {
                found.push(data.trim_start().to_owned());
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_any_cut() {
        let stream = ": ping\r\n\r\ndata: {\"a\":\"é\"}\n\ndata:[DONE]\n\n".as_bytes();
        for size in 1..stream.len() {
            let mut reader = EventReader::default();
            let found: Vec<String> = stream.chunks(size).flat_map(|piece| reader.push(piece)).collect();
            assert_eq!(found, ["{\"a\":\"é\"}", "[DONE]"], "pieces of {size}");
        }
    }

    #[test]
    fn only_given_options_are_sent() {
        assert!(SamplingArgs::default().fields().is_empty());
        let args = SamplingArgs { temperature: Some(0.0), max_tokens: Some(5), ..SamplingArgs::default() };
        assert_eq!(Value::Object(args.fields()), json!({"temperature": 0.0, "max_tokens": 5}));
    }
}
