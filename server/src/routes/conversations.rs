//! /v1/conversations: conversations and their items.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::Uri;
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde_json::{Map, Value};

use super::query::Params;
use super::responses::{optional_body, page};
use super::{App, Shared};
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::session;
use crate::responses::conversation::{Conversation, ITEMS_MAX};
use crate::responses::items;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/conversations", axum::routing::post(create))
        .route("/v1/conversations/{id}", get(retrieve).post(change).delete(remove))
        .route("/v1/conversations/{id}/items", get(list).post(add))
        .route("/v1/conversations/{id}/items/{item}", get(item).delete(remove_item))
}

impl App {
    async fn conversation(&self, tenant: Tenant, id: String) -> Result<Conversation, ApiError> {
        Conversation::of(self.sessions()?, tenant.0, id).await
    }
}

fn read_items(body: &Map<String, Value>) -> Result<Vec<Value>, ApiError> {
    let fields = Fields::of(body);
    // Text is no list of items here.
    let count = fields.array("items")?.map_or(0, <[Value]>::len);
    if count > ITEMS_MAX {
        return Err(ApiError::field("items", format!("expected at most {ITEMS_MAX} items, found {count}")));
    }
    items::read(&fields, "items")
}

async fn create(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let sessions = app.sessions()?;
    let body = optional_body(&app, request).await?;
    let metadata = session::metadata(&Fields::of(&body))?.unwrap_or_default();
    let (items, place) = (read_items(&body)?, (tenant.0, app.options.durability));
    let made = Conversation::create(sessions, place, &app.registry, (metadata, items)).await?;
    Ok(Json(made.object()))
}

async fn retrieve(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(app.conversation(tenant, id).await?.object()))
}

async fn change(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let found = app.conversation(tenant, id).await?;
    let body = optional_body(&app, request).await?;
    match session::metadata(&Fields::of(&body))? {
        Some(metadata) => Ok(Json(found.set_metadata(metadata).await?.object())),
        None => Ok(Json(found.object())),
    }
}

async fn remove(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(app.conversation(tenant, id).await?.delete().await?))
}

async fn list(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let found = app.conversation(tenant, id).await?;
    page(&Params::of(&uri)?, found.items()).map(Json)
}

async fn add(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let found = app.conversation(tenant, id).await?;
    let items = read_items(&app.body(request).await?)?;
    if items.is_empty() {
        return Err(ApiError::field("items", "expected an array of items, found none"));
    }
    found.add(items.clone()).await?;
    let ends = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let (first, last) = (ends(items.first()), ends(items.last()));
    Ok(Json(serde_json::json!({
        "object": "list", "data": items, "first_id": first, "last_id": last, "has_more": false,
    })))
}

async fn item(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path((id, item)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    app.conversation(tenant, id).await?.item(&item).map(Json)
}

async fn remove_item(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path((id, item)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(app.conversation(tenant, id).await?.remove_item(item).await?.object()))
}
