//! What a client hears when a request is not served: OpenAI's error object and its status.

use std::io::ErrorKind;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mainstay_engine::RequestError;
use mainstay_engine::store::StoreError;
use serde_json::{Value, json};

/// A refused or failed request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after_s: Option<u64>,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into(), retry_after_s: None }
    }

    fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The same error, about this field if it is about a field that it does not name.
    pub(crate) fn about(self, param: &'static str) -> Self {
        if self.status == StatusCode::BAD_REQUEST && self.param.is_none() { self.param(param) } else { self }
    }

    /// The same error of this field, if it is one that the client can act on and names none.
    pub(crate) fn in_field(self, param: &str) -> Self {
        if self.status != StatusCode::BAD_REQUEST || self.param.is_some() {
            return self;
        }
        Self { message: format!("{param}: {}", self.message), ..self }.param(param)
    }

    fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The same error about a field that has another name where it is told; the first pair that fits counts.
    pub(crate) fn rename(mut self, names: &[(&str, &str)]) -> Self {
        let Some(param) = &self.param else { return self };
        let renamed =
            names.iter().find_map(|(from, to)| param.strip_prefix(from).map(|rest| format!("{to}{rest}")));
        if let Some(renamed) = renamed {
            self.message = match self.message.strip_prefix(param.as_str()) {
                Some(rest) => format!("{renamed}{rest}"),
                None => self.message,
            };
            self.param = Some(renamed);
        }
        self
    }

    /// Whether the model will be there later.
    pub(crate) fn is_loading(&self) -> bool {
        self.code == Some("model_loading")
    }

    /// What went wrong, in words.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// 404: there is no such thing, or it is another tenant's.
    pub(crate) fn not_found(what: &str, id: &str, code: &'static str) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, format!("there is no {what} `{id}`")).code(code)
    }

    /// 404: there is no such response to go on from.
    pub(crate) fn no_previous_response(id: &str) -> Self {
        let message = format!("there is no stored response `{id}` to go on from");
        Self::new(StatusCode::NOT_FOUND, INVALID, message)
            .param("previous_response_id")
            .code("previous_response_not_found")
    }

    /// 400: the body as a whole is wrong.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, message)
    }

    /// 400: a field is wrong. `message` says what was expected and what was found.
    pub(crate) fn field(param: impl Into<String>, message: impl AsRef<str>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", message.as_ref());
        Self::bad_request(message).param(param)
    }

    /// 400: a field that exists in the API and that this server does not know how to honour.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl AsRef<str>) -> Self {
        Self::field(param, message).code("unsupported_parameter")
    }

    /// 400: the prompt, or the prompt and the tokens asked for, do not fit.
    pub(crate) fn context_length(message: impl Into<String>, param: &'static str) -> Self {
        Self::bad_request(message).param(param).code("context_length_exceeded")
    }

    /// 401.
    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, INVALID, message).code("invalid_api_key")
    }

    /// 404: no route.
    pub(crate) fn no_route(method: &str, path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, format!("unknown route: {method} {path}"))
            .code("unknown_url")
    }

    /// 404: no such model; there are those of `names`.
    pub(crate) fn no_model<'a>(id: &str, names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: Vec<String> = names.into_iter().map(|name| format!("`{name}`")).collect();
        let message = match names.as_slice() {
            [] => format!("the model `{id}` does not exist"),
            names => format!("the model `{id}` does not exist; this server has {}", names.join(", ")),
        };
        Self::new(StatusCode::NOT_FOUND, INVALID, message).param("model").code("model_not_found")
    }

    /// 404: no such adapter.
    pub(crate) fn no_adapter(id: &str) -> Self {
        let message = format!("The lora adapter '{id}' cannot be found.");
        Self::new(StatusCode::NOT_FOUND, INVALID, message).param("lora_name").code("adapter_not_found")
    }

    /// 503: the server is starting.
    pub(crate) fn model_loading(id: &str) -> Self {
        Self::unavailable(format!("the model `{id}` is being loaded"), "model_loading")
    }

    /// 503: the model did not come; it is not asked for again before `retry_s`.
    pub(crate) fn model_failed(id: &str, reason: &str, retry_s: u64) -> Self {
        let message = format!("the model `{id}` could not be loaded: {reason}");
        Self::unavailable(message, "model_failed").retry_after(retry_s)
    }

    /// 409: the session is another model's.
    pub(crate) fn of_other_model(own: &str, asked: &str) -> Self {
        let message = format!(
            "the session belongs to the model `{own}`, and the request names `{asked}`; name `{own}`, or begin a session \
             of `{asked}`"
        );
        Self::conflict(message, "session_model").param("model")
    }

    /// 429: so many sequences or requests wait already.
    pub(crate) fn queue_full(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .code("queue_full")
            .retry_after(1)
    }

    /// 404: there is no such session, or it is another tenant's.
    pub(crate) fn no_session() -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "there is no such session")
            .param("session_id")
            .code("session_not_found")
    }

    /// 404: this server has no store.
    pub(crate) fn no_sessions() -> Self {
        let message = "this server keeps no sessions: it has no data directory";
        Self::new(StatusCode::NOT_FOUND, INVALID, message).code("sessions_disabled")
    }

    /// 404: this server has no place for files.
    pub(crate) fn no_files() -> Self {
        let message = "this server keeps no files and batches: it has no data directory, or an encrypted one";
        Self::new(StatusCode::NOT_FOUND, INVALID, message).code("files_disabled")
    }

    /// 507 or 500: the disk did not do its part.
    pub(crate) fn disk(error: &std::io::Error) -> Self {
        tracing::error!(%error, "files");
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let message = "there is no room left on the disk of this server";
                Self::new(StatusCode::INSUFFICIENT_STORAGE, SERVER, message).code("not_durable")
            }
            _ => Self::internal("the disk of this server failed"),
        }
    }

    /// 404: an export was to have pages, and there are none.
    pub(crate) fn no_pages() -> Self {
        let message = "no keys and values of this session are kept: export it with include=tokens";
        Self::new(StatusCode::NOT_FOUND, INVALID, message).code("pages_not_found")
    }

    /// 403: what was asked for is the operator's.
    pub(crate) fn not_admin() -> Self {
        let message = "this needs a key of the operator (--admin-key)";
        Self::new(StatusCode::FORBIDDEN, INVALID, message).code("admin_only")
    }

    /// 404: this server has no object store.
    pub(crate) fn no_tier() -> Self {
        let message =
            "this server has no object store to move sessions through (start it with --object-store)";
        Self::new(StatusCode::NOT_FOUND, INVALID, message).code("object_store_disabled")
    }

    /// 409: the session is not in the state that was expected.
    pub(crate) fn conflict(message: impl Into<String>, code: &'static str) -> Self {
        Self::new(StatusCode::CONFLICT, INVALID, message).code(code)
    }

    /// 409: a turn of the session is running.
    pub(crate) fn session_busy() -> Self {
        Self::new(StatusCode::CONFLICT, INVALID, "a turn of this session is running; wait for its end")
            .code("session_busy")
    }

    /// 409: the model is not the one that began the answer.
    pub(crate) fn model_changed(part: &str) -> Self {
        let message = format!(
            "the answer in flight was begun by another model: its {part} has changed, so it cannot go on as it was; send \
             the turn again"
        );
        Self::new(StatusCode::CONFLICT, INVALID, message).code("model_changed")
    }

    /// 404: the session has nothing to read.
    pub(crate) fn no_turns() -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "the session has no turns, and no answer is in flight")
            .code("no_turns")
    }

    /// An answer that others read along with has stopped; it can go on.
    pub(crate) fn interrupted() -> Self {
        let message = "the answer was interrupted; read its stream again to go on with it";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, message).code("answer_interrupted").retry_after(1)
    }

    /// 405.
    pub(crate) fn method(method: &str, path: &str) -> Self {
        let message = format!("the method {method} is not allowed on {path}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, message).code("method_not_allowed")
    }

    /// 408: the body did not arrive.
    pub(crate) fn slow_body() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, "the body of the request did not arrive in time")
            .code("request_timeout")
    }

    /// 413: a file of a form.
    pub(crate) fn file_too_large(limit_bytes: u64) -> Self {
        let message = format!("file: expected at most {limit_bytes} bytes, found more");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, message).param("file").code("request_too_large")
    }

    /// 413.
    pub(crate) fn too_large(limit_bytes: usize) -> Self {
        let message = format!("the body is larger than the limit of {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, message).code("request_too_large")
    }

    /// 503: come back later.
    pub(crate) fn unavailable(message: impl Into<String>, code: &'static str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, message).code(code).retry_after(1)
    }

    /// 504: the request ran into the server's time limit.
    pub(crate) fn timeout(seconds: f64) -> Self {
        let message = format!("the request did not finish within {seconds} s, the limit of this server");
        Self::new(StatusCode::GATEWAY_TIMEOUT, SERVER, message).code("request_timeout")
    }

    /// 500.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, message).code("internal_error")
    }

    /// The body, also the payload of an error event inside a stream.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        match error {
            RequestError::ContextLength { .. } => Self::context_length(message, "messages"),
            RequestError::Busy { .. } => Self::queue_full(message),
            RequestError::Invalid { field, what } => {
                // The engine's word and the API's.
                Self::field(if field == "choices" { "n" } else { field }, what)
            }
            RequestError::Grammar(_) => Self::bad_request(message).code("constraint_failed"),
            RequestError::Device(_) => Self::internal(message),
            RequestError::Shutdown => Self::unavailable(message, "shutting_down"),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        let refused = |status, code| Self::new(status, INVALID, message.clone()).code(code);
        match error {
            StoreError::NotFound => Self::no_session(),
            StoreError::Conflict { .. } => refused(StatusCode::CONFLICT, "turn_conflict"),
            StoreError::NameTaken(_) => refused(StatusCode::CONFLICT, "name_taken").param("name"),
            StoreError::Quota { .. } => refused(StatusCode::FORBIDDEN, "quota_exceeded"),
            StoreError::Range { .. } | StoreError::TooLong { .. } => Self::bad_request(message),
            StoreError::Bundle(_) => refused(StatusCode::BAD_REQUEST, "invalid_bundle"),
            StoreError::Newer { .. } => refused(StatusCode::BAD_REQUEST, "newer_format"),
            StoreError::Journal(_) | StoreError::Pages(_) => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, SERVER, message).code("not_durable")
            }
            StoreError::Fenced { .. } => Self::unavailable(message, "fenced"),
            _ => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
