//! The body of a request: read within limits, and one JSON object.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, header};
use http_body_util::BodyExt;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::openai::fields::found;

/// How much of a body that is too large is still read, so that the client gets to hear the answer.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// What a body may cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyLimits {
    pub(crate) bytes: usize,
    /// Longest wait for the next piece.
    pub(crate) pause: Duration,
}

/// The JSON object that is the body. The content type does not matter.
pub(crate) async fn object(
    request: Request<Body>,
    limits: BodyLimits,
) -> Result<Map<String, Value>, ApiError> {
    let bytes = bytes(request, limits).await?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let at = error.valid_up_to();
        ApiError::bad_request(format!("expected a body of JSON in UTF-8, found other bytes at {at}"))
    })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => {
            Err(ApiError::bad_request(format!("expected a JSON object as the body, found {}", found(&other))))
        }
        Err(error) => {
            Err(ApiError::bad_request(format!("expected a JSON object as the body, found: {error}")))
        }
    }
}

async fn bytes(request: Request<Body>, limits: BodyLimits) -> Result<Vec<u8>, ApiError> {
    let announced = content_length(request.headers());
    if announced.is_some_and(|len| len > limits.bytes) && request.headers().contains_key(header::EXPECT) {
        // The client asks before it sends.
        return Err(ApiError::too_large(limits.bytes));
    }
    let mut body = request.into_body();
    let mut bytes = Vec::with_capacity(announced.unwrap_or(0).min(limits.bytes));
    let mut total = 0;
    loop {
        let frame =
            tokio::time::timeout(limits.pause, body.frame()).await.map_err(|_| ApiError::slow_body())?;
        let Some(frame) = frame else { break };
        let frame =
            frame.map_err(|error| ApiError::bad_request(format!("the body could not be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        total += data.len();
        if total <= limits.bytes {
            bytes.extend_from_slice(&data);
        } else if total > limits.bytes.saturating_add(DISCARDED_BYTES_MAX) {
            break;
        } else {
            bytes = Vec::new();
        }
    }
    if total > limits.bytes { Err(ApiError::too_large(limits.bytes)) } else { Ok(bytes) }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
