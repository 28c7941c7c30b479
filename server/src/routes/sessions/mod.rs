//! /v1/sessions: making, showing, changing and removing sessions. The store keeps them; here they meet HTTP.

mod bundle;
mod history;
pub(super) mod metrics;
mod pages;

mod tier;

use std::collections::VecDeque;
use std::sync::Arc;

use axum::body::HttpBody;
use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use mainstay_engine::store::object::ObjectTier;
use mainstay_engine::store::{SessionId, SessionInfo, Settings, Store, StoreError, Tenant, TenantId};
use serde_json::{Map, Value, json};

use super::query::{Order, Params};
use super::{App, Shared};
use crate::auth;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::session::{StoredKv, Wanted, list_object, session_object};
use crate::registry::Model;
use crate::sessions::record::SessionRecord;
use crate::sessions::{Sessions, id_or_name, shown};

/// Sessions looked at under one hold of the store's lock.
const SCAN: usize = 1000;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/sessions", get(list).post(create))
        .route("/v1/sessions/import", post(bundle::import))
        .route("/v1/sessions/{id}", get(retrieve).patch(change).delete(remove))
        .route("/v1/sessions/{id}/fork", post(history::fork))
        .route("/v1/sessions/{id}/rollback", post(history::rollback))
        .route("/v1/sessions/{id}/turns", get(history::turns))
        .route("/v1/sessions/{id}/pin", post(pages::pin))
        .route("/v1/sessions/{id}/unpin", post(pages::unpin))
        .route("/v1/sessions/{id}/prefetch", post(pages::prefetch))
        .route("/v1/sessions/{id}/export", post(bundle::export))
        .route("/v1/sessions/{id}/flush", post(tier::flush))
        .route("/v1/sessions/{id}/release", post(tier::release))
        .route("/v1/sessions/{id}/acquire", post(tier::acquire))
}

/// Who asks, as the store knows it.
#[derive(Clone)]
struct Owner {
    app: Arc<App>,
    sessions: Sessions,
    /// The tenant's name.
    name: Arc<str>,
    tenant: Tenant,
}

impl FromRequestParts<Arc<App>> for Owner {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let tenant = parts.extensions.get::<auth::Tenant>().cloned();
        let name = tenant.ok_or_else(|| ApiError::internal("a request without a tenant"))?.0;
        let (app, sessions) = (app.clone(), app.sessions()?.clone());
        let asked = name.clone();
        let tenant = sessions.call(move |store| store.tenant(&asked)).await?;
        Ok(Self { app, sessions, name, tenant })
    }
}

/// The session that the path names by id or name. A route takes it before it reads anything else of the request, so
/// that another tenant's session and an unknown one are answered alike.
struct Target {
    owner: Owner,
    id: SessionId,
}

impl FromRequestParts<Arc<App>> for Target {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let owner = Owner::from_request_parts(parts, app).await?;
        let path = Path::<String>::from_request_parts(parts, app).await;
        let Path(text) = path.map_err(|_| ApiError::no_session())?;
        let tenant = owner.tenant.id;
        let id = owner.sessions.call(move |store| store.find(tenant, id_or_name(&text))).await?;
        Ok(Self { owner, id })
    }
}

impl Owner {
    /// Sessions as the API shows them. What the store has of their pages is looked up by hashing their tokens.
    async fn show(&self, infos: Vec<SessionInfo>) -> Result<Vec<Value>, ApiError> {
        let owner = self.clone();
        let shown = move |store: &Store| Ok(infos.iter().map(|info| owner.object(store, info)).collect());
        self.sessions.call(shown).await
    }

    fn object(&self, store: &Store, info: &SessionInfo) -> Value {
        let mut object = session_object(info, self.kv(store, info));
        // Not every running turn is in the journal.
        object["in_flight"] = json!(info.in_flight || self.sessions.is_busy(info.id));
        object
    }

    fn kv(&self, store: &Store, info: &SessionInfo) -> StoredKv {
        let Some(model) = self.app.registry.loaded(&info.settings.model) else {
            return StoredKv { tokens: 0, reason: Some("model_not_loaded") };
        };
        // One that was removed meanwhile has no tokens.
        let tokens = store.tokens(self.tenant.id, info.id).unwrap_or_default();
        let (stored, lack) = model.stored_len(&self.name, &tokens);
        let changed = || SessionRecord::read(&info.settings.meta).changed(&model.identity);
        let is_lacking = stored == 0 && !tokens.is_empty();
        StoredKv { tokens: stored, reason: is_lacking.then(|| changed().or(lack)).flatten() }
    }

    /// One session, with its turn count as the entity's tag.
    async fn reply(&self, status: StatusCode, info: SessionInfo) -> Result<Response, ApiError> {
        let tag = format!("\"{}\"", info.turn_count);
        let object = self.show(vec![info]).await?.pop();
        let mut response = (status, Json(object)).into_response();
        if let Ok(tag) = HeaderValue::try_from(tag) {
            response.headers_mut().insert(header::ETAG, tag);
        }
        Ok(response)
    }

    /// The object store that sessions move through.
    fn tier(&self) -> Result<Arc<ObjectTier>, ApiError> {
        self.app.options.tier.clone().ok_or_else(ApiError::no_tier)
    }

    /// The body of a request whose fields may all be left out.
    async fn body(&self, request: Request) -> Result<Map<String, Value>, ApiError> {
        if request.body().is_end_stream() { Ok(Map::new()) } else { self.app.body(request).await }
    }
}

impl Target {
    /// Runs a call on the session.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store, TenantId, SessionId) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (tenant, id) = (self.owner.tenant.id, self.id);
        self.owner.sessions.call(move |store| call(store, tenant, id)).await
    }

    /// Tells the store where the session's page keys begin, where it came from somewhere that could not know.
    async fn set_root(&self, info: &SessionInfo, model: &Arc<Model>) -> Result<(), ApiError> {
        if info.settings.root.is_some() {
            return Ok(());
        }
        let (model, name, len) = (Arc::clone(model), self.owner.name.clone(), info.token_count as usize);
        let set = move |store: &Store, tenant, id| {
            let root = model.root(&name, b"", len)?;
            store.patch(tenant, id, |settings| settings.root = root)
        };
        self.call(set).await.map(|_| ())
    }
}

async fn create(State(app): Shared, owner: Owner, request: Request) -> Result<Response, ApiError> {
    let body = owner.body(request).await?;
    let model = app.registry.named(Fields::of(&body).string("model")?, &app.time()).await?;
    let (durability, named) = (app.options.durability, model.id.clone());
    let mut settings = Settings { model: named, durability, ..Settings::default() };
    Wanted::read(&body)?.apply(&mut settings);
    let (name, tenant) = (owner.name.clone(), owner.tenant.id);
    let make = move |store: &Store| {
        settings.root = model.root(&name, b"", 0)?;
        store.create(tenant, settings)
    };
    let made = owner.sessions.call(make).await?;
    owner.reply(StatusCode::CREATED, made).await
}

async fn list(owner: Owner, uri: Uri) -> Result<Json<Value>, ApiError> {
    let params = Params::of(&uri)?;
    let (limit, order, after) = (params.limit()?, params.order()?, params.session("after")?);
    let tenant = owner.tenant.id;
    let find = move |store: &Store| {
        Ok(match order {
            Order::Ascending => store.list(tenant, after, limit + 1),
            Order::Descending => newest(store, tenant, after, limit + 1),
        })
    };
    let mut infos = owner.sessions.call(find).await?;
    let has_more = infos.len() > limit;
    infos.truncate(limit);
    Ok(Json(list_object(owner.show(infos).await?, has_more, "id")))
}

/// Sessions older than `before`, newest first.
fn newest(store: &Store, tenant: TenantId, before: Option<SessionId>, limit: usize) -> Vec<SessionInfo> {
    let (mut last, mut after) = (VecDeque::with_capacity(limit), None);
    loop {
        let part = store.list(tenant, after, SCAN);
        after = part.last().map(|info| info.id);
        let is_end = part.len() < SCAN || before.is_some_and(|before| after >= Some(before));
        for info in part.into_iter().filter(|info| before.is_none_or(|before| info.id < before)) {
            if last.len() == limit {
                last.pop_front();
            }
            last.push_back(info);
        }
        if is_end {
            return last.into_iter().rev().collect();
        }
    }
}

async fn retrieve(target: Target) -> Result<Response, ApiError> {
    let info = target.call(Store::get).await?;
    target.owner.reply(StatusCode::OK, info).await
}

async fn change(target: Target, request: Request) -> Result<Response, ApiError> {
    let body = target.owner.app.body(request).await?;
    let wanted = Wanted::read(&body)?;
    let info = target.call(Store::get).await?;
    wanted.check_change(info.settings.durability)?;
    let change = |store: &Store, tenant, id| store.patch(tenant, id, |settings| wanted.apply(settings));
    let info = target.call(change).await?;
    target.owner.reply(StatusCode::OK, info).await
}

async fn remove(target: Target) -> Result<Json<Value>, ApiError> {
    let _claim = target.owner.sessions.claim(target.id)?;
    target.call(Store::delete).await?;
    Ok(Json(json!({"id": shown(target.id), "object": "session.deleted", "deleted": true})))
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use mainstay_engine::store::{Options, sim};

    use super::*;
    use crate::mcp::McpServers;
    use crate::registry::Registry;
    use crate::serve::ServerOptions;
    use crate::shutdown::shutdown_channel;

    /// A target that need not be found by a path.
    fn target() -> Target {
        let entropy = Arc::new(sim::SimEntropy::new(1));
        let (disk, clock) = (Arc::new(sim::SimDisk::new(1)), Arc::new(sim::SimClock::new(1)));
        let options = Options { threads: false, ..Options::default() };
        let store = Arc::new(Store::open(disk, clock, entropy, options).unwrap().0);
        let tenant = store.tenant("default").unwrap();
        let id = store.create(tenant.id, Settings::default()).unwrap().id;
        let sessions = Sessions::new(store);
        let app = Arc::new(App {
            registry: Registry::default(),
            options: ServerOptions::default(),
            shutdown: shutdown_channel().1,
            http: Arc::default(),
            sessions: Some(sessions.clone()),
            files: None,
            batches: None,
            mcp: McpServers::default(),
        });
        Target { owner: Owner { app, sessions, name: "default".into(), tenant }, id }
    }

    #[tokio::test]
    async fn a_running_turn_keeps_its_session() {
        let (target, busy) = (target(), StatusCode::CONFLICT);
        let again = || Target { owner: target.owner.clone(), id: target.id };
        let back = || Request::new(Body::from("{\"to_turn\": 0}"));
        let shows = async || {
            let info = target.call(Store::get).await.unwrap();
            target.owner.show(vec![info]).await.unwrap()[0]["in_flight"] == true
        };
        let claim = target.owner.sessions.claim(target.id).unwrap();
        assert!(shows().await);
        assert_eq!(remove(again()).await.unwrap_err().status, busy);
        assert_eq!(history::rollback(again(), back()).await.unwrap_err().status, busy);
        drop(claim);
        assert!(!shows().await);
        assert!(history::rollback(again(), back()).await.is_ok());
        assert!(remove(again()).await.is_ok());
        assert_eq!(remove(again()).await.unwrap_err().status, StatusCode::NOT_FOUND);
    }
}
