//! POST /v1/embeddings.

use axum::extract::{Request, State};
use axum::{Extension, Json};
use serde_json::Value;

use super::Shared;
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::openai::embeddings::EmbeddingsRequest;
use crate::openai::fields::Fields;
use crate::pooling::{PoolJob, Texts};
use crate::prompt::off_thread;

pub(super) async fn post(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let time = app.time();
    let body = app.body(request).await?;
    let fields = Fields::of(&body);
    let model = app.registry.get(fields.required_string("model")?, &time).await?;
    let mut request = EmbeddingsRequest::read(&fields, &model)?;
    let texts = Texts::Lone(std::mem::take(&mut request.inputs));
    let EmbeddingsRequest { truncate, priority, .. } = request;
    let job = PoolJob { model: model.clone(), tenant: tenant.0, texts, truncate, priority, time };
    let rows = job.run().await?;
    let answer = off_thread(rows.bytes(), move || Ok(request.answer(&model, &rows))).await?;
    Ok(Json(answer))
}
