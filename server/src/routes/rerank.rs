//! POST /v1/rerank, and /rerank.

use axum::extract::{Request, State};
use axum::{Extension, Json};
use serde_json::Value;

use super::Shared;
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::rerank::RerankRequest;
use crate::pooling::{PoolJob, Texts};

pub(super) async fn post(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let time = app.time();
    let body = app.body(request).await?;
    let fields = Fields::of(&body);
    let model = app.registry.get(fields.required_string("model")?, &time).await?;
    let request = RerankRequest::read(&fields, &model)?;
    let texts = Texts::Pairs { first: request.query.clone(), second: request.documents.clone() };
    let RerankRequest { truncate, priority, .. } = request;
    let job = PoolJob { model: model.clone(), tenant: tenant.0, texts, truncate, priority, time };
    let rows = job.run().await?;
    Ok(Json(request.answer(&model, &rows)))
}
