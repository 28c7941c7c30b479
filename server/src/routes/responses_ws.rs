//! GET /v1/responses as a WebSocket: each message asks for a response, whose events come back as messages.
//!
//! One response is made at a time. One that is not stored can be gone on from as long as the connection lasts: its
//! session is in memory only, and goes with it.

use std::pin::pin;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::{App, Shared};
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::openai::fields::unexpected;
use crate::responses::answer::Answering;
use crate::responses::ids;
use crate::responses::request::{Before, ResponseRequest};
use crate::shutdown::{Hold, ShutdownStage};

const CREATE: &str = "response.create";

pub(super) async fn upgrade(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade =
        upgrade.map_err(|_| ApiError::method("GET", "/v1/responses (without a WebSocket upgrade)"))?;
    let upgrade = upgrade.max_message_size(app.options.body_limit_bytes);
    let hold = app.shutdown.hold();
    Ok(upgrade
        .on_upgrade(move |socket| Connection { app, tenant, socket, own: Vec::new(), _hold: hold }.serve()))
}

struct Connection {
    app: Arc<App>,
    tenant: Tenant,
    socket: WebSocket,
    /// Responses that go with the connection.
    own: Vec<String>,
    _hold: Hold,
}

impl Connection {
    async fn serve(mut self) {
        while let Some(message) = self.request().await {
            let text = match message {
                Message::Text(text) => text,
                Message::Close(_) => break,
                Message::Ping(_) | Message::Pong(_) => continue,
                Message::Binary(_) => {
                    let error = ApiError::bad_request("expected a text message of JSON, found a binary one");
                    if self.send(&error_event(&error)).await.is_err() {
                        break;
                    }
                    continue;
                }
            };
            let done = match self.begin(text.as_str()).await {
                Ok(answering) => self.answer(answering).await,
                Err(error) => self.send(&error_event(&error)).await,
            };
            if done.is_err() {
                break;
            }
        }
        let own = std::mem::take(&mut self.own);
        self.forget(own).await;
    }

    /// What the client sends next; nothing more once the server is going down.
    async fn request(&mut self) -> Option<Message> {
        tokio::select! {
            message = self.socket.recv() => message.and_then(Result::ok),
            () = self.app.shutdown.reached(ShutdownStage::Drain) => None,
        }
    }

    async fn begin(&mut self, text: &str) -> Result<Answering, ApiError> {
        let time = self.app.time();
        let body: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| ApiError::bad_request(format!("expected a JSON object: {error}")))?;
        if body.get("type").is_none_or(|kind| kind != CREATE) {
            let found = body.get("type").cloned().unwrap_or_default();
            return Err(unexpected("type", CREATE, &found));
        }
        let asked = ResponseRequest::read(&body)?;
        if asked.background {
            return Err(ApiError::unsupported("background", "expected false on a connection, found true"));
        }
        let is_own = asked.store == Some(false);
        let before = asked.before.clone();
        let mut responder = self.app.responder();
        responder.keeps_unstored = is_own;
        let begun = match responder.begin(self.tenant.0.clone(), asked, time).await {
            Ok(mut answering) => answering.begin().await.map(|()| answering),
            Err(error) => Err(error),
        };
        match (&begun, before) {
            (Ok(answering), _) if is_own => self.own.push(answering.id()),
            // What could not be gone on from is not kept for another try.
            (Err(_), Before::Response(id)) => {
                let failed = self.own.extract_if(.., |own| *own == id).collect();
                self.forget(failed).await;
            }
            _ => {}
        }
        begun
    }

    /// Sends the events of a response. An error means that nobody reads them.
    async fn answer(&mut self, mut answering: Answering) -> Result<(), axum::Error> {
        while let Some(event) = self.event(&mut answering).await? {
            self.send(&event).await?;
        }
        Ok(())
    }

    /// Waits for the next event, and meanwhile for messages.
    async fn event(&mut self, answering: &mut Answering) -> Result<Option<Value>, axum::Error> {
        // Not begun again when a message comes: what it does must not be left half done.
        let mut next = pin!(answering.next());
        loop {
            let heard = tokio::select! {
                event = &mut next => return Ok(event),
                message = self.socket.recv() => message.and_then(Result::ok),
            };
            match heard {
                None | Some(Message::Close(_)) => {
                    return Err(axum::Error::new("the connection was closed"));
                }
                Some(Message::Text(_) | Message::Binary(_)) => {
                    let error = ApiError::conflict(
                        "a response is being made on this connection; wait for its last event",
                        "response_in_progress",
                    );
                    self.send(&error_event(&error)).await?;
                }
                Some(Message::Ping(_) | Message::Pong(_)) => {}
            }
        }
    }

    async fn send(&mut self, event: &Value) -> Result<(), axum::Error> {
        self.socket.send(Message::Text(event.to_string().into())).await
    }

    /// Lets go of responses that the client wanted nobody to keep.
    async fn forget(&mut self, own: Vec<String>) {
        let Some(sessions) = &self.app.sessions else { return };
        let own: Vec<_> = own.iter().filter_map(|id| ids::session_of_response(id)).collect();
        let tenant = self.tenant.0.clone();
        let forget = move |store: &mainstay_engine::store::Store| {
            let tenant = store.tenant(&tenant)?.id;
            // Some of them share a session, which is gone after the first.
            own.iter().for_each(|id| drop(store.delete(tenant, *id)));
            Ok(())
        };
        if let Err(error) = sessions.call(forget).await {
            tracing::warn!(error = error.message(), "sessions of a connection were not removed");
        }
    }
}

fn error_event(error: &ApiError) -> Value {
    let mut event = error.body();
    event["type"] = json!("error");
    event["status"] = json!(error.status.as_u16());
    event
}
