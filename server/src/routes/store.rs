//! /v1/store: what the operator does with the data directory of a running server.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::routing::post;
use axum::{Json, Router};
use mainstay_engine::store::{Damage, RealDisk, Store, StoreError, VerifyReport};
use serde_json::{Value, json};

use super::{Admin, App, Shared};
use crate::error::ApiError;
use crate::openai::fields::Fields;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/store/gc", post(gc))
        .route("/v1/store/verify", post(verify))
        .route("/v1/store/snapshot", post(snapshot))
}

/// Removes expired sessions, pages over quota and space that is no longer used.
async fn gc(_: Admin, State(app): Shared) -> Result<Json<Value>, ApiError> {
    app.sessions()?.call(clean).await.map(Json)
}

/// Cleans the store, and says what became of it as the API does.
///
/// # Errors
/// Those of [`Store::maintain`].
pub fn clean(store: &Store) -> Result<Value, StoreError> {
    let trusts_clock = store.trusts_clock();
    let done = store.maintain()?;
    Ok(json!({
        "object": "store.gc",
        "expired_sessions": done.expired_sessions,
        "evicted_pages": done.evicted_pages,
        "compacted_segments": done.compacted_segments,
        "trusts_clock": trusts_clock,
    }))
}

/// Reads everything and compares it with its checksums.
async fn verify(_: Admin, State(app): Shared) -> Result<Json<Value>, ApiError> {
    let found = app.sessions()?.call(Store::verify).await?;
    Ok(Json(verification(&found)))
}

/// What a whole check found, as the API shows it.
pub fn verification(found: &VerifyReport) -> Value {
    let damage = found.damage.iter().map(damage_object);
    json!({
        "object": "store.verification",
        "sessions": found.sessions,
        "entries": found.entries,
        "pages": found.pages,
        "page_bytes": found.page_bytes,
        "damage": damage.collect::<Vec<_>>(),
    })
}

/// One place that is not as it was written.
pub fn damage_object(damage: &Damage) -> Value {
    json!({
        "path": damage.path,
        "offset": damage.offset,
        "bytes": damage.bytes,
        "what": damage.what,
        "session": damage.session.map(|id| format!("sess_{id}")),
    })
}

/// Copies the store, as it is at one moment, to an empty directory of the server's machine.
async fn snapshot(_: Admin, State(app): Shared, request: Request) -> Result<Json<Value>, ApiError> {
    let body = app.body(request).await?;
    let dir = Fields::of(&body).required_string("dir")?;
    let to = PathBuf::from(dir);
    if !to.is_absolute() {
        let what = format!("expected an absolute path, found {dir:?}");
        return Err(ApiError::field("dir", what));
    }
    // A directory that cannot be written to is the caller's mistake, not the store's.
    let copy = move |store: &Store| {
        Ok(RealDisk::new(to).map_err(StoreError::from).and_then(|to| store.snapshot(&to)))
    };
    let copied = app.sessions()?.call(copy).await?;
    copied.map_err(|error| match error {
        StoreError::Io(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {
            ApiError::field("dir", format!("expected an empty directory, found files in {dir}"))
        }
        StoreError::Io(error) => ApiError::field("dir", format!("{dir}: {error}")),
        other => other.into(),
    })?;
    Ok(Json(json!({ "object": "store.snapshot", "dir": dir })))
}
