//! /v1/files: files of a tenant, whole or not at all.

use std::io::{Error, Read};
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc::channel;

use super::query::Params;
use super::responses::page_of;
use super::{App, Shared};
use crate::auth::Tenant;
use crate::body::BodyLimits;
use crate::error::ApiError;
use crate::files::{FileRecord, Files, waiting};
use crate::openai::file_form;

/// Most files of a page, and how many there are where a request does not say.
const PAGE_MAX: u32 = 10_000;
/// Pieces between the disk and the connection, and the size of each.
const PIECES: usize = 4;
const PIECE_BYTES: usize = 256 << 10;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        // A limit of its own stands in its place.
        .route("/v1/files", post(create).layer(DefaultBodyLimit::disable()).get(list))
        .route("/v1/files/{id}", get(retrieve).delete(remove))
        .route("/v1/files/{id}/content", get(content))
}

fn missing(id: &str) -> ApiError {
    ApiError::not_found("file", id, "file_not_found")
}

fn found(files: &Files, tenant: &Tenant, id: &str) -> Result<FileRecord, ApiError> {
    files.get(&tenant.0, id).ok_or_else(|| missing(id))
}

async fn create(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let files = app.files()?.clone();
    let bytes = usize::try_from(app.options.file_limit_bytes).unwrap_or(usize::MAX);
    let limits = BodyLimits { bytes, pause: app.options.header_timeout };
    let (draft, about) = file_form::read(request, &files, (&tenant.0, limits)).await?;
    let record = waiting(move || {
        files.sweep(crate::files::now_s())?;
        files.keep(draft, about)
    });
    Ok(Json(record.await?.object()))
}

async fn list(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let files = app.files()?;
    let params = Params::of(&uri)?;
    let limit = params.count("limit", 1..=PAGE_MAX)?.unwrap_or(PAGE_MAX) as usize;
    let purpose = params.text("purpose");
    let wanted = |record: &FileRecord| purpose.is_none_or(|purpose| record.purpose == purpose);
    let records = files.list(&tenant.0).into_iter().filter(wanted);
    page_of(&params, records.map(|record| record.object()).collect(), limit).map(Json)
}

async fn retrieve(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(found(app.files()?, &tenant, &id)?.object()))
}

async fn remove(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (files, named) = (app.files()?.clone(), id.clone());
    match waiting(move || files.delete(&tenant.0, &named)).await? {
        true => Ok(Json(json!({"id": id, "object": "file", "deleted": true}))),
        false => Err(missing(&id)),
    }
}

async fn content(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let files = app.files()?;
    let record = found(files, &tenant, &id)?;
    let path = files.contents(&tenant.0, &record.id);
    let file = match waiting(move || Ok(std::fs::File::open(path))).await? {
        Ok(file) => file,
        // It was deleted just now.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing(&id)),
        Err(error) => return Err(ApiError::disk(&error)),
    };
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, record.bytes.to_string()),
    ];
    Ok((headers, streamed(file)).into_response())
}

/// A file as a body, a few pieces in memory at a time. Who takes nothing holds no thread: it waits for room.
fn streamed(file: std::fs::File) -> Body {
    let (sender, mut pieces) = channel::<Result<Bytes, Error>>(PIECES);
    tokio::spawn(async move {
        let mut file = Some(file);
        while let Some(mut open) = file.take()
            && let Ok(room) = sender.reserve().await
        {
            let read = tokio::task::spawn_blocking(move || {
                let mut piece = Vec::with_capacity(PIECE_BYTES);
                let read = open.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece);
                read.map(|_| (open, Bytes::from(piece)))
            });
            match read.await.unwrap_or_else(|error| Err(Error::other(error))) {
                Ok((_, piece)) if piece.is_empty() => return,
                Ok((open, piece)) => {
                    room.send(Ok(piece));
                    file = Some(open);
                }
                Err(error) => {
                    tracing::error!(%error, "a file could not be read");
                    room.send(Err(error));
                }
            }
        }
    });
    Body::from_stream(stream::poll_fn(move |context| pieces.poll_recv(context)))
}
