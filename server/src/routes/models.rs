//! GET /v1/models and /v1/models/{id}. An id may contain `/`, as it is or as %2F.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::Shared;
use crate::error::ApiError;
use crate::registry::Model;

pub(super) async fn list(State(app): Shared) -> Result<Json<Value>, ApiError> {
    let models: Vec<Value> = app.registry.list().iter().map(|model| describe(model)).collect();
    if models.is_empty() {
        // An empty list would tell a client that waits for a model that there will be none.
        app.registry.first()?;
    }
    Ok(Json(json!({"object": "list", "data": models})))
}

pub(super) async fn retrieve(State(app): Shared, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(describe(&*app.registry.get(&id)?)))
}

fn describe(model: &Model) -> Value {
    let served = &model.served;
    json!({
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "mainstay",
        "max_model_len": served.context,
        "tasks": model.tasks().collect::<Vec<_>>(),
    })
}
