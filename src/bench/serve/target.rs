//! A server as the harness loads it: chat completions, streamed, with what they cost as the server counts it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use mainstay_bench::serve::{Call, Outcome, Role, Target, Words};
use reqwest::Method;
use serde_json::{Map, Value, json};

use crate::api::{Api, piece};
use crate::client::{Client, EventReader};

/// One model of one server.
pub(super) struct Server {
    api: Api,
    model: String,
    /// Ids of the sessions of conversations, where the server keeps them.
    sessions: Option<Mutex<HashMap<usize, String>>>,
}

impl Server {
    pub(super) fn new(client: &Client, keeps: bool) -> Self {
        let sessions = keeps.then(Mutex::default);
        Self { api: client.api.clone(), model: client.model().to_owned(), sessions }
    }

    /// Finds out how many tokens a word is, and warms up.
    ///
    /// # Errors
    /// What the server says.
    pub(super) async fn probe(&self) -> Result<Words> {
        let mut counts = Vec::new();
        for text in Words::probes() {
            let mut outcome = Outcome::default();
            self.ask(self.body(&[(Role::User, text)], 1), &mut outcome).await?;
            counts.push(outcome.input_tokens);
        }
        match Words::counted(counts[0], counts[1]) {
            Some(words) => Ok(words),
            None => bail!(
                "expected `usage` in the server's answers, found {counts:?} tokens for one and two texts"
            ),
        }
    }

    /// Removes the sessions that were made.
    pub(super) async fn clear(&self) {
        let Some(sessions) = &self.sessions else { return };
        let made: Vec<String> =
            sessions.lock().unwrap_or_else(PoisonError::into_inner).drain().map(|(_, id)| id).collect();
        for id in made {
            let request = self.api.request(Method::DELETE, &format!("/v1/sessions/{}", piece(&id)));
            // it is the server's own limit that removes those that stay
            let _ = self.api.send(request).await;
        }
    }

    fn body(&self, messages: &[(Role, String)], output_tokens: usize) -> Map<String, Value> {
        let messages: Vec<Value> =
            messages.iter().map(|(role, text)| json!({"role": role.name(), "content": text})).collect();
        let all = json!({
            "model": self.model,
            "messages": messages,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let Value::Object(fields) = all { fields } else { Map::new() }
    }

    async fn session(&self, conversation: usize) -> Result<Option<String>> {
        let Some(sessions) = &self.sessions else { return Ok(None) };
        let known = || sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = known().get(&conversation) {
            return Ok(Some(id.clone()));
        }
        let made = self.api.json(Method::POST, "/v1/sessions", Some(&json!({"model": self.model}))).await?;
        let id = made["id"].as_str().context("expected the id of a session, found none")?.to_owned();
        known().insert(conversation, id.clone());
        Ok(Some(id))
    }

    /// Sends a request and notes the pieces of its answer as they come.
    async fn ask(&self, body: Map<String, Value>, outcome: &mut Outcome) -> Result<()> {
        let request = self.api.request(Method::POST, "/v1/chat/completions");
        let request =
            request.header("content-type", "application/json").body(Value::Object(body).to_string());
        let begun = Instant::now();
        let mut last_s = 0.0;
        let mut reply = self.api.send(request).await?;
        let mut events = EventReader::default();
        while let Some(bytes) = reply.chunk().await.context("the answer broke off")? {
            let now_s = begun.elapsed().as_secs_f64();
            for data in events.push(&bytes) {
                outcome.total_s = now_s;
                if data == "[DONE]" {
                    return Ok(());
                }
                let event: Value = serde_json::from_str(&data).context("the server sent no JSON")?;
                if let Some(message) = event["error"]["message"].as_str() {
                    bail!("{message}");
                }
                count(&event["usage"], outcome);
                let delta = &event["choices"][0]["delta"];
                let text = |key: &str| delta[key].as_str().filter(|text| !text.is_empty());
                let Some(said) = text("content").or_else(|| text("reasoning_content")) else { continue };
                outcome.text.push_str(said);
                match outcome.first_s {
                    None => outcome.first_s = Some(now_s),
                    Some(_) => outcome.gaps_s.push(now_s - last_s),
                }
                last_s = now_s;
            }
        }
        bail!("the answer broke off")
    }
}

/// The server's own counts, which come with the last event.
fn count(usage: &Value, outcome: &mut Outcome) {
    let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    if let Some(tokens) = number(&usage["prompt_tokens"]) {
        outcome.input_tokens = tokens;
        outcome.output_tokens = number(&usage["completion_tokens"]).unwrap_or_default();
        outcome.cached_tokens = number(&usage["prompt_tokens_details"]["cached_tokens"]);
    }
}

impl Target for Server {
    fn keeps_conversations(&self) -> bool {
        self.sessions.is_some()
    }

    async fn send(self: Arc<Self>, call: Call) -> Outcome {
        let mut outcome = Outcome::default();
        let mut body = self.body(&call.messages, call.output_tokens);
        let sent = async {
            if let Some(id) = self.session(call.conversation).await? {
                body.insert("session_id".into(), json!(id));
                body.insert("session_mode".into(), json!("append"));
            }
            self.ask(body, &mut outcome).await
        };
        let result = sent.await;
        if outcome.output_tokens == 0 && outcome.first_s.is_some() {
            // a server without `usage` in streams: pieces are the best count
            outcome.output_tokens = 1 + outcome.gaps_s.len();
        }
        outcome.error = result.err().map(|error| format!("{error:#}"));
        outcome
    }
}
