//! POST /v1/chat/completions.

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use super::Shared;
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::job::{Continuation, Echo, Job};
use crate::openai::chat::{ChatRequest, ChatShape};
use crate::openai::constraint_fields::ConstraintField;
use crate::openai::fields::Fields;
use crate::openai::session_fields::SessionFields;
use crate::prompt::{self, Ending};
use crate::reply;
use crate::sessions::chat::SessionChat;

pub(super) async fn post(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Response, ApiError> {
    let time = app.time();
    let headers = request.headers().clone();
    let body = app.body(request).await?;
    let fields = Fields::of(&body);
    let model = app.registry.get(fields.required_string("model")?)?;
    let request = ChatRequest::read(&fields, &model)?;
    if let Some(session) = SessionFields::read(&fields, &headers)? {
        let sessions = app.sessions()?;
        let (max_tokens_default, interval) = (app.options.max_tokens_default, app.options.journal_interval);
        let tenant = tenant.0;
        let turn = SessionChat { model, tenant, session, request, max_tokens_default, interval, time };
        return turn.answer(sessions).await;
    }
    let constraint = ConstraintField::compile(request.constraint, &model).await?;
    let continuation = match request.input.ending {
        Ending::OpenMessage => Continuation::OfPrompt,
        Ending::Generation | Ending::Nothing => Continuation::OwnText,
    };
    let prompt = prompt::chat(&model, request.input).await?;
    prompt::check_length(&model, &prompt, request.max_tokens, "messages")?;
    let job = Job {
        model,
        tenant: tenant.0,
        prompts: vec![prompt],
        max_tokens: request.max_tokens,
        max_tokens_default: app.options.max_tokens_default,
        options: request.options,
        logprobs: request.logprobs,
        echo: Echo::No,
        continuation,
        time,
        keep: request.keep.keep(app.plain_durability()),
        constraint,
    };
    reply::send(job, ChatShape, request.delivery).await
}
