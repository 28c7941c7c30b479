//! GET /health: 200 only when a request would be served. A server that drains answers 503 before it comes here.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::Shared;
use crate::error::ApiError;

pub(super) async fn get(State(app): Shared) -> Result<Json<Value>, ApiError> {
    app.registry.health()?;
    Ok(Json(json!({"status": "ok"})))
}
