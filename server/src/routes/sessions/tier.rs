//! Sessions that move: written to the object store that several servers share, let go of, and opened elsewhere.

use axum::Json;
use axum::extract::{Path, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use mainstay_engine::store::ExportPages;
use mainstay_engine::store::object::{Acquire, Flushed, ObjectError, ObjectTier, Takeover};
use mainstay_engine::store::{SessionId, Store, TenantId};
use serde_json::{Value, json};

use super::bundle::pages_of;
use super::{Owner, Target};
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::sessions::{id_or_name, shown};

type Write =
    fn(&ObjectTier, &Store, TenantId, SessionId, Option<ExportPages>) -> Result<Flushed, ObjectError>;

/// Writes what the object store does not have of a session.
pub(super) async fn flush(target: Target) -> Result<Json<Value>, ApiError> {
    write(target, "session.flush", ObjectTier::flush).await
}

/// Writes a session out and removes it here, so that another server may open it.
pub(super) async fn release(target: Target) -> Result<Json<Value>, ApiError> {
    write(target, "session.release", ObjectTier::release).await
}

async fn write(target: Target, object: &str, write: Write) -> Result<Json<Value>, ApiError> {
    let tier = target.owner.tier()?;
    let _claim = target.owner.sessions.claim(target.id)?;
    let info = target.call(Store::get).await?;
    // Of a model that is not loaded, tokens move alone.
    let pages = pages_of(&target, &info).await.ok();
    let (tenant, id) = (target.owner.tenant.id, target.id);
    let flushed = target.owner.sessions.call(move |store| Ok(write(&tier, store, tenant, id, pages)));
    let flushed = flushed.await??;
    Ok(Json(json!({
        "object": object,
        "id": shown(id),
        "epoch": flushed.epoch,
        "pages": flushed.pages,
        "extents": flushed.extents,
        "extents_written": flushed.extents_written,
        "bytes_written": flushed.bytes_written,
    })))
}

/// Opens a session that another server has released, under the id it had; with `takeover` also one that is held, whose
/// holder then can write no more of it.
pub(super) async fn acquire(
    owner: Owner,
    Path(text): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let tier = owner.tier()?;
    let id: SessionId = id_or_name(&text).parse().map_err(|_| ApiError::no_session())?;
    let body = owner.body(request).await?;
    let fields = Fields::of(&body);
    let takeover = if fields.bool("takeover")?.unwrap_or(false) { Takeover::Yes } else { Takeover::No };
    let model = owner.app.registry.named(fields.string("model")?, &owner.app.time()).await?;
    let claim = owner.sessions.claim(id)?;
    let (name, tenant) = (owner.name.clone(), owner.tenant);
    let acquired = owner.sessions.call(move |store| {
        let pages = model.import_pages(&name)?;
        let acquired = tier.acquire(store, &tenant, id, Acquire { pages, takeover });
        store.wait_written(super::bundle::SETTLE);
        Ok(acquired)
    });
    let acquired = acquired.await??;
    drop(claim);
    let mut object = owner.show(vec![acquired.session]).await?.pop().unwrap_or(Value::Null);
    object["kv"]["pages"] = json!(acquired.pages);
    object["kv"]["pages_missed"] = json!(acquired.pages_missed);
    object["epoch"] = json!(acquired.epoch);
    Ok((StatusCode::CREATED, Json(object)).into_response())
}

impl From<ObjectError> for ApiError {
    fn from(error: ObjectError) -> Self {
        let message = error.to_string();
        match error {
            ObjectError::NotFound => Self::no_session(),
            ObjectError::Held { .. } => Self::conflict(message, "session_held"),
            ObjectError::Moved { .. } => Self::conflict(message, "session_moved"),
            ObjectError::Lost | ObjectError::Busy | ObjectError::Changed => {
                Self::conflict(message, "session_busy")
            }
            ObjectError::Exists => Self::conflict(message, "session_exists"),
            ObjectError::Remote(_) | ObjectError::Address(_) | ObjectError::NotExclusive => {
                Self::unavailable(message, "object_store")
            }
            ObjectError::Damaged { .. } => Self::internal(message),
            ObjectError::Store(error) => error.into(),
        }
    }
}
