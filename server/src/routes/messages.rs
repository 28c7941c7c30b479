//! POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API.

use axum::Extension;
use axum::Json;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::{App, Shared};
use crate::anthropic::error::MessagesError;
use crate::anthropic::message;
use crate::anthropic::request::{self, Purpose};
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::generate::Run;
use crate::job::TimeLimits;
use crate::openai::chat::ChatRequest;
use crate::openai::fields::Fields;
use crate::openai::options::Delivery;
use crate::prompt;

pub(super) async fn post(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Response, MessagesError> {
    let time = app.time();
    let body = app.body(request).await?;
    let (model, request) = read(&app, &body, (Purpose::Answer, time)).await?;
    if request.options.choices != 1 {
        return Err(ApiError::field("n", "expected one answer, found more").into());
    }
    let delivery = request.delivery;
    let job = app.job(tenant, (model, request), time).await?;
    let run = Run::start(job)?;
    Ok(match delivery {
        Delivery::Stream { .. } => message::events(run).await?,
        Delivery::Whole => message::whole(run).await?,
    })
}

pub(super) async fn count_tokens(State(app): Shared, request: Request) -> Result<Json<Value>, MessagesError> {
    let body = app.body(request).await?;
    let (model, request) = read(&app, &body, (Purpose::CountTokens, app.time())).await?;
    let prompt = prompt::chat(&model, request.input).await?;
    Ok(Json(json!({"input_tokens": prompt.tokens.len()})))
}

async fn read(
    app: &App,
    body: &Map<String, Value>,
    (purpose, time): (Purpose, TimeLimits),
) -> Result<(std::sync::Arc<crate::registry::Model>, ChatRequest), ApiError> {
    let model = app.registry.get(Fields::of(body).required_string("model")?, &time).await?;
    let chat = request::chat(body, purpose)?;
    let request = ChatRequest::read(&Fields::of(&chat), &model).map_err(request::renamed)?;
    Ok((model, request))
}
