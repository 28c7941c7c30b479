//! /v1/batches: files of requests that are answered when there is room.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::Uri;
use axum::middleware;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde_json::{Value, json};

use super::query::Params;
use super::responses::{self, page};
use super::{App, Shared, chat, completions, embeddings, observe};
use crate::auth::Tenant;
use crate::batches::{Batch, Batches, Order};
use crate::error::ApiError;
use crate::files::waiting;
use crate::openai::fields::{Fields, unexpected};
use crate::openai::{file_form, session};

/// Paths that lines of a batch can ask.
const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];
/// Longest window, seconds: thirty days.
const WINDOW_S_MAX: u64 = 30 * 86_400;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/batches", post(create).get(list))
        .route("/v1/batches/{id}", get(retrieve))
        .route("/v1/batches/{id}/cancel", post(cancel))
}

/// What answers the lines of batches: the same handlers, behind the check of keys.
pub(super) fn lines(app: Arc<App>) -> Router {
    let [chat_path, completions_path, embeddings_path, responses_path] = ENDPOINTS;
    Router::new()
        .route(chat_path, post(chat::post))
        .route(completions_path, post(completions::post))
        .route(embeddings_path, post(embeddings::post))
        .route(responses_path, post(responses::create))
        .layer(middleware::from_fn_with_state(app.clone(), observe))
        .with_state(app)
}

impl App {
    fn batches(&self) -> Result<&Batches, ApiError> {
        self.batches.as_ref().ok_or_else(ApiError::no_files)
    }

    fn batch(&self, tenant: &Tenant, id: &str) -> Result<Arc<Batch>, ApiError> {
        let missing = || ApiError::not_found("batch", id, "batch_not_found");
        self.batches()?.get(&tenant.0, id).ok_or_else(missing)
    }
}

async fn create(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let batches = app.batches()?.clone();
    let body = app.body(request).await?;
    let order = order(&Fields::of(&body), tenant)?;
    let file = app.files()?.get(&order.tenant, &order.input_file_id).ok_or_else(|| {
        let what = format!("expected the id of a file, found {:?}, which is none", order.input_file_id);
        ApiError::field("input_file_id", what)
    })?;
    if file.purpose != "batch" {
        let what = format!("expected a file whose purpose is batch, found {}", file.purpose);
        return Err(ApiError::field("input_file_id", what));
    }
    let batch = waiting(move || batches.create(order)).await?;
    Ok(Json(batch.object()))
}

fn order(fields: &Fields<'_, '_>, tenant: Tenant) -> Result<Order, ApiError> {
    let endpoint = fields.required_string("endpoint")?;
    if !ENDPOINTS.contains(&endpoint) {
        return Err(unexpected("endpoint", &ENDPOINTS.join(", "), &json!(endpoint)));
    }
    let completion_window = fields.required_string("completion_window")?;
    let window_s = window_s(completion_window).ok_or_else(|| {
        let expected = "a time up to 30d, such as 24h, 90m or 7d";
        unexpected("completion_window", expected, &json!(completion_window))
    })?;
    let output_lifetime_s = match fields.object("output_expires_after")? {
        Some(after) => {
            let after = Fields::at(after, "output_expires_after");
            let seconds = after.get("seconds").map(Value::to_string);
            file_form::lifetime("output_expires_after", after.string("anchor")?, seconds.as_deref())?
        }
        None => None,
    };
    Ok(Order {
        tenant: tenant.0,
        endpoint: endpoint.to_owned(),
        input_file_id: fields.required_string("input_file_id")?.to_owned(),
        completion_window: completion_window.to_owned(),
        window_s,
        metadata: session::metadata(fields)?,
        output_lifetime_s,
    })
}

fn window_s(text: &str) -> Option<u64> {
    let unit = text.chars().next_back()?;
    let seconds = match unit {
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
    count.checked_mul(seconds).filter(|window| (1..=WINDOW_S_MAX).contains(window))
}

async fn list(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let batches = app.batches()?.list(&tenant.0);
    page(&Params::of(&uri)?, batches.iter().map(|batch| batch.object()).collect()).map(Json)
}

async fn retrieve(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(app.batch(&tenant, &id)?.object()))
}

async fn cancel(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let batch = app.batch(&tenant, &id)?;
    let asked = Arc::clone(&batch);
    if waiting(move || asked.cancel()).await? {
        return Ok(Json(batch.object()));
    }
    let status = batch.record().status.name();
    Err(ApiError::conflict(format!("the batch `{id}` is {status}: it cannot be cancelled"), "batch_over"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_counted_in_minutes_hours_or_days() {
        for (text, seconds) in [("24h", 86_400), ("90m", 5400), ("30d", WINDOW_S_MAX), ("1m", 60)] {
            assert_eq!(window_s(text), Some(seconds), "{text}");
        }
        for text in ["", "h", "24", "24H", "0h", "31d", "-1h", "1.5h", "24é", "99999999999999999999h"] {
            assert_eq!(window_s(text), None, "{text}");
        }
    }
}
