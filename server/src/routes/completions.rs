//! POST /v1/completions.

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use super::Shared;
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::job::{Continuation, Job};
use crate::openai::completions::{CompletionRequest, CompletionShape};
use crate::openai::constraint_fields::ConstraintField;
use crate::openai::fields::Fields;
use crate::output::Output;
use crate::prompt;
use crate::reply;

/// Tokens generated where neither the request nor the operator says otherwise: OpenAI's number for this endpoint.
const MAX_TOKENS_DEFAULT: usize = 16;

pub(super) async fn post(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Response, ApiError> {
    let time = app.time();
    let body = app.body(request).await?;
    let fields = Fields::of(&body);
    let model = app.registry.get(fields.required_string("model")?, &time).await?;
    let request = CompletionRequest::read(&fields, &model)?;
    let constraint = ConstraintField::compile(request.constraint, &model).await?;
    let prompts = prompt::plain(&model, request.prompts, request.special).await?;
    for prompt in &prompts {
        prompt::check_length(&model, prompt, request.max_tokens, "prompt")?;
    }
    let job = Job {
        model,
        tenant: tenant.0,
        prompts,
        max_tokens: request.max_tokens,
        max_tokens_default: Some(app.options.max_tokens_default.unwrap_or(MAX_TOKENS_DEFAULT)),
        options: request.options,
        output: Output::plain(),
        logprobs: request.logprobs,
        echo: request.echo,
        continuation: Continuation::OfPrompt,
        time,
        keep: request.keep.keep(app.plain_durability()),
        constraint,
    };
    reply::send(job, CompletionShape::default(), request.delivery).await
}
