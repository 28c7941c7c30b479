//! GET /v1/chat/completions and what is below it: completions that were stored.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::Uri;
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde_json::{Value, json};

use super::query::Params;
use super::responses::page;
use super::{App, Named, Shared};
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::session;
use crate::sessions::stored::Stored;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/chat/completions/{id}", get(retrieve).post(change).delete(remove))
        .route("/v1/chat/completions/{id}/messages", get(messages))
}

/// The stored completions of a tenant, filtered by `model` and `metadata[key]=value`.
pub(super) async fn list(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let params = Params::of(&uri)?;
    let model = params.text("model").map(str::to_owned);
    let pairs: Vec<(String, String)> = params.indexed("metadata");
    let passes = move |info: &mainstay_engine::store::SessionInfo,
                       record: &crate::sessions::record::SessionRecord| {
        model.as_ref().is_none_or(|model| *model == info.settings.model)
            && pairs.iter().all(|(key, value)| record.metadata.get(key).is_some_and(|v| v == value.as_str()))
    };
    let found = Stored::all(app.sessions()?, &tenant.0, passes).await?;
    page(&params.ascending_by_default(), found.iter().map(Stored::object).collect()).map(Json)
}

impl Named {
    async fn stored(&self) -> Result<Stored, ApiError> {
        Stored::of(self.app.sessions()?, &self.tenant.0, self.id.clone()).await
    }
}

async fn retrieve(named: Named) -> Result<Json<Value>, ApiError> {
    Ok(Json(named.stored().await?.object()))
}

async fn messages(named: Named, uri: Uri) -> Result<Json<Value>, ApiError> {
    let found = named.stored().await?;
    let params = Params::of(&uri)?.ascending_by_default();
    let all = params.choice("roles", &["assistant", "all"])? == Some(1);
    page(&params, found.messages(all)).map(Json)
}

async fn change(named: Named, request: Request) -> Result<Json<Value>, ApiError> {
    let (sessions, found) = (named.app.sessions()?, named.stored().await?);
    let body = named.app.body(request).await?;
    let fields = Fields::of(&body);
    let metadata = session::metadata(&fields)?.ok_or_else(|| fields.missing("metadata", "an object"))?;
    Ok(Json(found.set_metadata(sessions, metadata).await?.object()))
}

async fn remove(named: Named) -> Result<Json<Value>, ApiError> {
    named.stored().await?.delete(named.app.sessions()?).await?;
    Ok(Json(json!({"id": named.id, "object": "chat.completion.deleted", "deleted": true})))
}
