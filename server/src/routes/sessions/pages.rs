//! What a client does for a session's keys and values: keep them from eviction, bring them to the device.

use std::time::Duration;

use axum::Json;
use axum::http::StatusCode;
use axum::response::Response;
use mainstay_engine::store::Store;
use mainstay_engine::{Keep, KvReport, KvState};
use serde_json::{Value, json};

use super::Target;
use crate::error::ApiError;
use crate::prefill::prefill;
use crate::sessions::shown;

pub(super) async fn pin(target: Target) -> Result<Response, ApiError> {
    let pin = |store: &Store, tenant, id| store.patch(tenant, id, |settings| settings.pinned = true);
    let info = target.call(pin).await?;
    target.owner.reply(StatusCode::OK, info).await
}

pub(super) async fn unpin(target: Target) -> Result<Response, ApiError> {
    let unpin = |store: &Store, tenant, id| store.patch(tenant, id, |settings| settings.pinned = false);
    let info = target.call(unpin).await?;
    target.owner.reply(StatusCode::OK, info).await
}

/// Computes or reads what the session's next turn begins with, so that it finds it on the device.
pub(super) async fn prefetch(target: Target) -> Result<Json<Value>, ApiError> {
    let read = |store: &Store, tenant, id| Ok((store.get(tenant, id)?, store.tokens(tenant, id)?));
    let (info, tokens) = target.call(read).await?;
    let app = &target.owner.app;
    let model = app.registry.get(&info.settings.model, &app.time()).await?;
    let (found, context) = (tokens.len(), model.served.context);
    let mut report = KvReport {
        state: KvState::Cold,
        reason: None,
        cached_tokens: 0,
        restored_tokens: 0,
        restore_ms: 0.0,
    };
    if found > context {
        let what = format!("the session has {found} tokens; the model's context holds {context}");
        return Err(ApiError::context_length(what, "session_id"));
    }
    if found > 0 {
        target.set_root(&info, &model).await?;
        let keep = Keep { durability: info.settings.durability, ..Keep::default() };
        let limit = app.options.request_timeout.unwrap_or(Duration::MAX);
        let computed = prefill(&model, &target.owner.name, tokens, keep);
        let ended = tokio::time::timeout(limit, computed).await;
        report = ended.map_err(|_| ApiError::timeout(limit.as_secs_f64()))??;
    }
    Ok(Json(json!({
        "object": "session.prefetch",
        "id": shown(target.id),
        "token_count": found,
        "kv": {
            "state": report.state.name(),
            "reason": report.reason,
            "cached_tokens": report.cached_tokens,
            "restored_tokens": report.restored_tokens,
            "restore_ms": report.restore_ms,
        },
    })))
}
