//! /v1/responses: making responses, and what can be done with those that were made.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde_json::{Map, Value, json};

use super::query::{Order, Params};
use super::{App, Named, Shared};
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::openai::fields::unexpected;
use crate::responses::compact::{self, SUMMARY_TOKENS};
use crate::responses::create::Responder;
use crate::responses::read::Found;
use crate::responses::request::{Delivery, ResponseRequest};
use crate::responses::{items, now_s};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/responses", post(create).get(super::responses_ws::upgrade))
        .route("/v1/responses/input_tokens", post(input_tokens))
        .route("/v1/responses/compact", post(compact))
        .route("/v1/responses/{id}", get(retrieve).delete(remove))
        .route("/v1/responses/{id}/cancel", post(cancel))
        .route("/v1/responses/{id}/input_items", get(input_items))
}

impl App {
    /// What answers responses.
    pub(super) fn responder(&self) -> Responder {
        Responder {
            registry: self.registry.clone(),
            sessions: self.sessions.clone(),
            durability: (self.options.durability, self.plain_durability()),
            max_tokens_default: self.options.max_tokens_default,
            interval: self.options.journal_interval,
            keeps_unstored: false,
            mcp: self.mcp.clone(),
        }
    }
}

impl Named {
    async fn response(&self) -> Result<Found, ApiError> {
        let missing = || ApiError::not_found("response", &self.id, "response_not_found");
        let sessions = self.app.sessions.as_ref().ok_or_else(missing)?;
        Found::of(sessions, self.tenant.0.clone(), self.id.clone()).await
    }
}

pub(super) async fn create(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Response, ApiError> {
    let time = app.time();
    let body = app.body(request).await?;
    let asked = ResponseRequest::read(&body)?;
    let (delivery, background) = (asked.delivery, asked.background);
    let mut answering = app.responder().begin(tenant.0.clone(), asked, time).await?;
    if background {
        let (id, object) = (answering.id(), answering.object());
        tokio::spawn(answering.alone());
        return match delivery {
            Delivery::Whole => Ok(Json(object).into_response()),
            Delivery::Stream => stream(&Named { app, tenant, id }, None).await,
        };
    }
    match delivery {
        Delivery::Whole => Ok(Json(answering.whole().await?).into_response()),
        Delivery::Stream => {
            answering.begin().await?;
            Ok(answering.stream(None))
        }
    }
}

async fn stream(named: &Named, after: Option<u64>) -> Result<Response, ApiError> {
    let (found, app) = (named.response().await?, &named.app);
    let answering = found.answering(&app.registry, app.options.journal_interval, app.time()).await?;
    Ok(answering.stream(after))
}

async fn retrieve(named: Named, uri: Uri) -> Result<Response, ApiError> {
    let params = Params::of(&uri)?;
    let after = params.count("starting_after", 0..=u32::MAX)?.map(u64::from);
    match params.choice("stream", &["false", "true"])? {
        Some(1) => stream(&named, after).await,
        _ => Ok(Json(named.response().await?.object().await?).into_response()),
    }
}

async fn remove(named: Named) -> Result<Json<Value>, ApiError> {
    named.response().await?.delete().await?;
    Ok(Json(json!({"id": named.id, "object": "response", "deleted": true})))
}

async fn cancel(named: Named) -> Result<Json<Value>, ApiError> {
    Ok(Json(named.response().await?.cancel().await?))
}

async fn input_items(named: Named, uri: Uri) -> Result<Json<Value>, ApiError> {
    let items = named.response().await?.input_items().await?;
    page(&Params::of(&uri)?, items).map(Json)
}

async fn input_tokens(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let body = app.body(request).await?;
    let asked = ResponseRequest::read(&body)?;
    let tokens = app.responder().input_tokens(tenant.0, asked, app.time()).await?;
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": tokens})))
}

/// The conversation as it stands is answered by its summary, which takes its place from then on.
async fn compact(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let (time, created) = (app.time(), now_s());
    let mut body = app.body(request).await?;
    let mut input = items::read(&crate::openai::fields::Fields::of(&body), "input")?;
    let kept: Vec<Value> = input.iter().filter(|item| item["role"] == "user").cloned().collect();
    input.push(json!({"type": "message", "role": "user", "content": compact::TASK}));
    body.insert("input".to_owned(), Value::from(input));
    body.insert("store".to_owned(), json!(false));
    body.retain(|name, _| {
        !["stream", "background", "conversation", "tools", "tool_choice"].contains(&name.as_str())
    });
    body.entry("max_output_tokens").or_insert_with(|| json!(SUMMARY_TOKENS));
    let asked = ResponseRequest::read(&body)?;
    let response = app.responder().begin(tenant.0, asked, time).await?.whole().await?;
    let messages =
        response["output"].as_array().into_iter().flatten().filter(|item| item["type"] == "message");
    let summary: Vec<String> = messages.map(|item| items::text(&item["content"])).collect();
    let output = [kept, vec![compact::item(&summary.join("\n"))]].concat();
    Ok(Json(json!({
        "id": crate::random::id("resp_"),
        "object": "response.compaction",
        "created_at": created,
        "output": output,
        "usage": response["usage"],
    })))
}

/// One page of a list of items that is given oldest first.
pub(super) fn page(params: &Params, items: Vec<Value>) -> Result<Value, ApiError> {
    page_of(params, items, params.limit()?)
}

/// The same with at most so many items.
pub(super) fn page_of(params: &Params, mut items: Vec<Value>, limit: usize) -> Result<Value, ApiError> {
    if params.choice("order", &["asc", "desc"])?.is_none() || params.order()? == Order::Descending {
        items.reverse();
    }
    if let Some(after) = params.text("after") {
        let place = items.iter().position(|item| item["id"] == after);
        let place =
            place.ok_or_else(|| unexpected("after", "the id of an item of this list", &json!(after)))?;
        items.drain(..=place);
    }
    let has_more = items.len() > limit;
    items.truncate(limit);
    let id = |item: Option<&Value>| item.map_or_else(|| json!(""), |item| item["id"].clone());
    let (first, last) = (id(items.first()), id(items.last()));
    Ok(json!({"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more}))
}

/// The body of a request whose fields may all be left out.
pub(super) async fn optional_body(app: &App, request: Request) -> Result<Map<String, Value>, ApiError> {
    use axum::body::HttpBody;
    if request.body().is_end_stream() { Ok(Map::new()) } else { app.body(request).await }
}
