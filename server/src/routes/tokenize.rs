//! POST /tokenize and /detokenize, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use mainstay_models::tokenizer::{AddSpecial, ShowSpecial};
use serde_json::{Value, json};

use super::{App, Shared};
use crate::detokenize::token_text;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::options::PromptInput;
use crate::openai::tools::Tools;
use crate::prompt::{self, ChatInput};
use crate::registry::Model;

/// The named model; these endpoints may leave the name out.
async fn model(app: &App, fields: &Fields<'_, '_>) -> Result<Arc<Model>, ApiError> {
    app.registry.named(fields.string("model")?, &app.time()).await
}

/// `{prompt | messages}` to `{count, max_model_len, tokens, token_strs}`.
pub(super) async fn tokenize(State(app): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let body = app.body(request).await?;
    let fields = Fields::of(&body);
    let model = model(&app, &fields).await?;
    let wants_texts = fields.bool("return_token_strs")?.unwrap_or(false);
    let prompt = if fields.get("messages").is_some() {
        prompt::chat(&model, ChatInput::read(&fields, &model, &Tools::read(&fields)?)?).await?
    } else {
        let expected = "a string, or `messages` in its place";
        let text = fields.string("prompt")?.ok_or_else(|| fields.missing("prompt", expected))?;
        let special = prompt::add_special(&fields, AddSpecial::Yes)?;
        let prompts = prompt::plain(&model, vec![PromptInput::Text(text.to_owned())], special).await?;
        prompts.into_iter().next().expect("one prompt for one text")
    };
    let tokenizer = &model.served.tokenizer;
    let texts: Option<Vec<String>> =
        wants_texts.then(|| prompt.tokens.iter().map(|id| token_text(tokenizer, *id)).collect());
    Ok(Json(json!({
        "count": prompt.tokens.len(),
        "max_model_len": model.served.context,
        "tokens": prompt.tokens,
        "token_strs": texts,
    })))
}

/// `{tokens}` to `{prompt}`.
pub(super) async fn detokenize(State(app): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let body = app.body(request).await?;
    let fields = Fields::of(&body);
    let model = model(&app, &fields).await?;
    let tokens = fields.token_ids("tokens", model.served.vocab)?;
    let tokens = tokens.ok_or_else(|| fields.missing("tokens", "an array of token ids"))?;
    Ok(Json(json!({"prompt": model.served.tokenizer.decode(&tokens, ShowSpecial::Yes)})))
}
