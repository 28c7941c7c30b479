//! Errors in the form that clients of the Messages API read.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::ApiError;

/// A refused or failed request.
pub(crate) struct MessagesError(pub(crate) ApiError);

impl From<ApiError> for MessagesError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

/// The body, also the payload of an error event inside a stream.
pub(crate) fn body(error: &ApiError) -> Value {
    let kind = match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message()}})
}

impl IntoResponse for MessagesError {
    fn into_response(self) -> Response {
        let body = body(&self.0);
        // Its status and headers are those of every other error.
        let mut response = self.0.into_response();
        let (status, mut headers) = (response.status(), std::mem::take(response.headers_mut()));
        headers.remove(axum::http::header::CONTENT_LENGTH);
        headers.remove(axum::http::header::CONTENT_TYPE);
        let mut response = (status, Json(body)).into_response();
        response.headers_mut().extend(headers);
        response
    }
}
