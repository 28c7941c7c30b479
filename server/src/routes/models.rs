//! GET /v1/models and /v1/models/{id}. An id may contain `/`, as it is or as %2F.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::Shared;
use crate::error::ApiError;
use crate::registry::Shown;

pub(super) async fn list(State(app): Shared) -> Result<Json<Value>, ApiError> {
    let shown = app.registry.shown();
    if shown.iter().all(|model| model.about.is_none()) {
        // A list of models of which nothing is known would tell a client that waits for one that it is there.
        app.registry.health()?;
    }
    Ok(Json(json!({"object": "list", "data": shown.iter().map(describe).collect::<Vec<_>>()})))
}

pub(super) async fn retrieve(State(app): Shared, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let shown = app.registry.shown();
    let Some(model) = shown.iter().find(|model| model.id == id) else {
        return Err(ApiError::no_model(&id, shown.iter().map(|model| model.id.as_str())));
    };
    if model.about.is_none() {
        app.registry.health()?;
    }
    Ok(Json(describe(model)))
}

fn describe(model: &Shown) -> Value {
    let about = model.about.as_ref();
    let mut object = json!({
        "id": model.id,
        "object": "model",
        "created": about.map_or(0, |about| about.created),
        "owned_by": "mainstay",
        "max_model_len": about.map(|about| about.context),
        "tasks": about.map_or(&[][..], |about| &about.tasks),
        "state": model.state,
    });
    if let Some(parent) = &model.parent {
        object["parent"] = json!(parent);
    }
    if let Some(error) = &model.error {
        object["error"] = json!(**error);
    }
    object
}
