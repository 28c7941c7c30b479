//! /v1/conversations: conversations and their items.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::Uri;
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde_json::{Map, Value};

use super::query::Params;
use super::responses::{optional_body, page};
use super::{App, Named, Shared};
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

impl Named {
    async fn conversation(&self) -> Result<Conversation, ApiError> {
        Conversation::of(self.app.sessions()?, self.tenant.0.clone(), self.id.clone()).await
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

async fn retrieve(named: Named) -> Result<Json<Value>, ApiError> {
    Ok(Json(named.conversation().await?.object()))
}

async fn change(named: Named, request: Request) -> Result<Json<Value>, ApiError> {
    let found = named.conversation().await?;
    let body = optional_body(&named.app, request).await?;
    match session::metadata(&Fields::of(&body))? {
        Some(metadata) => Ok(Json(found.set_metadata(metadata).await?.object())),
        None => Ok(Json(found.object())),
    }
}

async fn remove(named: Named) -> Result<Json<Value>, ApiError> {
    Ok(Json(named.conversation().await?.delete().await?))
}

async fn list(named: Named, uri: Uri) -> Result<Json<Value>, ApiError> {
    let found = named.conversation().await?;
    page(&Params::of(&uri)?, found.items()).map(Json)
}

async fn add(named: Named, request: Request) -> Result<Json<Value>, ApiError> {
    let found = named.conversation().await?;
    let items = read_items(&named.app.body(request).await?)?;
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

async fn item(named: Named, Path((_, item)): Path<(String, String)>) -> Result<Json<Value>, ApiError> {
    named.conversation().await?.item(&item).map(Json)
}

async fn remove_item(named: Named, Path((_, item)): Path<(String, String)>) -> Result<Json<Value>, ApiError> {
    Ok(Json(named.conversation().await?.remove_item(item).await?.object()))
}
