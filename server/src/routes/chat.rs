//! POST /v1/chat/completions.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use super::{App, Shared};
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::job::{Asker, Continuation, Job, TimeLimits};
use crate::openai::chat::{ChatRequest, ChatShape};
use crate::openai::fields::Fields;
use crate::openai::session;
use crate::openai::session_fields::SessionFields;
use crate::prompt::{self, Ending};
use crate::registry::Model;
use crate::reply;
use crate::sessions::chat::SessionChat;
use crate::sessions::stored;

pub(super) async fn post(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Response, ApiError> {
    let time = app.time();
    let headers = request.headers().clone();
    let body = app.body(request).await?;
    let fields = Fields::of(&body);
    let model = app.registry.get(fields.required_string("model")?, &time).await?;
    let request = ChatRequest::read(&fields, &model)?;
    let session = SessionFields::read(&fields, &headers)?;
    let is_stored = fields.bool("store")? == Some(true);
    let metadata = session::metadata(&fields)?.unwrap_or_default();
    let (session, made) = match session {
        Some(session) => (session, None),
        None if is_stored => {
            check_one(&request)?;
            let place = (&tenant.0, app.options.durability);
            let made = stored::create(app.sessions()?, place, &model, metadata).await?;
            (SessionFields::own(made.to_string()), Some(made))
        }
        None => {
            let delivery = request.delivery;
            let job = app.job(tenant, (model, request), time).await?;
            return reply::send(job, ChatShape::default(), delivery).await;
        }
    };
    let sessions = app.sessions()?;
    let (max_tokens_default, interval) = (app.options.max_tokens_default, app.options.journal_interval);
    let (tenant, id) = (tenant.0, made.map(stored::completion_id));
    let asker = Asker { model, tenant: tenant.clone(), max_tokens_default, time };
    let registry = app.registry.clone();
    let turn = SessionChat { registry, asker, session, request, id, interval };
    let answered = turn.answer(sessions).await;
    if let (Err(_), Some(made)) = (&answered, made) {
        // Nobody has heard of its session.
        stored::forget(sessions, &tenant, made).await?;
    }
    answered
}

/// Only one answer can be the turn that is stored.
fn check_one(request: &ChatRequest) -> Result<(), ApiError> {
    match request.options.choices {
        1 => Ok(()),
        more => Err(ApiError::field("n", format!("expected 1 beside `store`: true, found {more}"))),
    }
}

impl App {
    /// The job of a chat request that is of no session.
    pub(super) async fn job(
        &self,
        tenant: Tenant,
        (model, request): (Arc<Model>, ChatRequest),
        time: TimeLimits,
    ) -> Result<Job, ApiError> {
        let continuation = match request.input.ending {
            Ending::OpenMessage => Continuation::OfPrompt,
            Ending::Generation | Ending::Nothing => Continuation::OwnText,
        };
        let prompt = prompt::chat(&model, request.input.clone()).await?;
        prompt::check_length(&model, &prompt, request.max_tokens, "messages")?;
        let written = prompt.written().to_owned();
        let (max_tokens_default, durability) = (self.options.max_tokens_default, self.plain_durability());
        let asker = Asker { model, tenant: tenant.0, max_tokens_default, time };
        asker.job(request, (prompt, &written), (continuation, durability)).await
    }
}
