//! The body of a request: read within limits, and one JSON object.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request, header};
use http_body_util::BodyExt;
use serde_json::{Map, Value};
use tokio::sync::mpsc::Sender;

use crate::error::ApiError;
use crate::openai::fields::found;

/// How much of a body that is too large is still read, so that the client gets to hear the answer.
pub(crate) const DISCARDED_BYTES_MAX: usize = 64 << 20;

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
    refuse_announced(&request, limits)?;
    let announced = content_length(request.headers());
    let mut body = request.into_body();
    let mut bytes = Vec::with_capacity(announced.unwrap_or(0).min(limits.bytes));
    let mut total = 0;
    loop {
        let Some(data) = next(&mut body, limits.pause).await? else { break };
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

/// Hands a body over as it arrives, piece by piece, then an empty piece. Where nobody takes it any longer, the rest
/// is discarded.
pub(crate) async fn pieces(
    request: Request<Body>,
    limits: BodyLimits,
    to: Sender<Bytes>,
) -> Result<(), ApiError> {
    refuse_announced(&request, limits)?;
    let (mut body, mut to) = (request.into_body(), Some(to));
    let (mut total, mut discarded) = (0, 0);
    while let Some(data) = next(&mut body, limits.pause).await? {
        let len = data.len();
        total += len;
        let is_taken = match &to {
            Some(_) if len == 0 => true,
            Some(to) if total <= limits.bytes => to.send(data).await.is_ok(),
            _ => false,
        };
        if !is_taken {
            to = None;
            discarded += len;
        }
        if discarded > DISCARDED_BYTES_MAX {
            break;
        }
    }
    if total > limits.bytes {
        return Err(ApiError::too_large(limits.bytes));
    }
    if let Some(to) = to {
        // Whoever took enough need not hear of the end.
        let _ = to.send(Bytes::new()).await;
    }
    Ok(())
}

/// The next piece of a body, `None` at its end.
async fn next(body: &mut Body, pause: Duration) -> Result<Option<Bytes>, ApiError> {
    loop {
        let frame = tokio::time::timeout(pause, body.frame()).await.map_err(|_| ApiError::slow_body())?;
        let Some(frame) = frame else { return Ok(None) };
        let frame =
            frame.map_err(|error| ApiError::bad_request(format!("the body could not be read: {error}")))?;
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
}

/// Refuses a body that is too large before it is sent, where the client asks for that.
pub(crate) fn refuse_announced(request: &Request<Body>, limits: BodyLimits) -> Result<(), ApiError> {
    let announced = content_length(request.headers());
    let asks = request.headers().contains_key(header::EXPECT);
    match announced {
        Some(len) if len > limits.bytes && asks => Err(ApiError::too_large(limits.bytes)),
        _ => Ok(()),
    }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
