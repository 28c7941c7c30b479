//! POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes: for the operator, from the operator's
//! directories.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::routing::post;

use super::{Admin, App, Shared};
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::registry::{ListedAdapter, Replace};

/// Longest name of an adapter, bytes.
const NAME_BYTES_MAX: usize = 256;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/v1/load_lora_adapter", post(load)).route("/v1/unload_lora_adapter", post(unload))
}

async fn load(_: Admin, State(app): Shared, request: Request) -> Result<String, ApiError> {
    let body = app.body(request).await?;
    let fields = Fields::of(&body);
    let id = fields.required_string("lora_name")?;
    let is_name = !id.is_empty() && id.len() <= NAME_BYTES_MAX && id.chars().all(|c| !c.is_control());
    if !is_name {
        let what = format!("expected a name of 1 to {NAME_BYTES_MAX} bytes, found another");
        return Err(ApiError::field("lora_name", what));
    }
    let path = allowed(&app.options.adapter_dirs, fields.required_string("lora_path")?).await?;
    let replace = if fields.bool("load_inplace")?.unwrap_or(false) { Replace::Yes } else { Replace::No };
    let base = app.registry.named(fields.string("base_model_name")?, &app.time()).await?;
    if base.adapter.is_some() {
        let what = format!("expected a model, found its adapter `{}`", base.id);
        return Err(ApiError::field("base_model_name", what));
    }
    app.registry.add_adapter(&base, ListedAdapter { id: id.to_owned(), path }, replace).await?;
    Ok(format!("Success: LoRA adapter '{id}' added successfully."))
}

async fn unload(_: Admin, State(app): Shared, request: Request) -> Result<String, ApiError> {
    let body = app.body(request).await?;
    let id = Fields::of(&body).required_string("lora_name")?.to_owned();
    app.registry.remove_adapter(&id)?;
    Ok(format!("Success: LoRA adapter '{id}' removed successfully."))
}

/// The directory, if it lies below one of the operator's, links followed.
async fn allowed(dirs: &[PathBuf], asked: &str) -> Result<PathBuf, ApiError> {
    let (dirs, asked) = (dirs.to_vec(), asked.to_owned());
    let find = move || {
        let refused = || {
            let message = "expected a directory below one of --lora-dir, found another";
            ApiError::field("lora_path", message)
        };
        let path = Path::new(&asked).canonicalize().map_err(|_| refused())?;
        let is_below = |dir: &PathBuf| dir.canonicalize().is_ok_and(|dir| path.starts_with(dir));
        if dirs.iter().any(is_below) { Ok(path) } else { Err(refused()) }
    };
    let found = tokio::task::spawn_blocking(find).await;
    found.unwrap_or_else(|_| Err(ApiError::internal("the directory could not be looked at")))
}
