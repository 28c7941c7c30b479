//! Sessions on their way between servers: bundles streamed out and in, a few pieces in memory at a time.

use std::io::{BufWriter, Error, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use mainstay_engine::store::{BundlePages, ExportPages, ImportAs, Imported, SessionInfo, Store, StoreError};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::{Owner, Target};
use crate::body::{self, BodyLimits};
use crate::error::ApiError;
use crate::openai::session::name;
use crate::registry::Model;
use crate::routes::query::Params;
use crate::sessions::shown;

const MEDIA_TYPE: &str = "application/vnd.mainstay.session";
/// Pieces between the store's thread and the connection, and the size of each on the way out.
const PIECES: usize = 4;
const PIECE_BYTES: usize = 256 << 10;
/// A client that takes nothing for so long has left.
const STALL: Duration = Duration::from_secs(60);
/// How long pages of finished turns may take to reach the store.
pub(super) const SETTLE: Duration = Duration::from_secs(5);

/// Values of `include`.
const INCLUDE: [&str; 2] = ["tokens", "kv"];

pub(super) async fn export(target: Target, uri: Uri) -> Result<Response, ApiError> {
    let include = Params::of(&uri)?.choice("include", &INCLUDE)?;
    let info = target.call(Store::get).await?;
    let pages = match include {
        Some(0) => None,
        // Who asks for pages hears that there are none; who does not say gets what there is.
        Some(_) => Some(pages_of(&target, &info).await?),
        None => pages_of(&target, &info).await.ok(),
    };
    let (sender, mut pieces) = channel(PIECES);
    let out = Outgoing { pieces: sender.clone(), runtime: Handle::current() };
    let write = move |store: &Store, tenant, id| {
        let mut out = BufWriter::with_capacity(PIECE_BYTES, out);
        store.export(tenant, id, pages, &mut out)?;
        Ok(out.flush()?)
    };
    tokio::spawn(async move {
        if let Err(error) = target.call(write).await {
            tracing::debug!(?error, "an export ended early");
            // Whoever has left needs no error.
            let _ = sender.send(Err(error)).await;
        }
    });
    let first = pieces.recv().await.unwrap_or_else(|| Err(ApiError::internal("the export gave nothing")))?;
    let rest = stream::unfold((Some(first), pieces), |(first, mut pieces)| async move {
        let piece = match first {
            Some(first) => Ok(first),
            None => pieces.recv().await?.map_err(|_| Error::other("the export failed")),
        };
        Some((piece, (None, pieces)))
    });
    let file = format!("attachment; filename=\"{}.session\"", shown(info.id));
    let headers = [(header::CONTENT_TYPE, MEDIA_TYPE.to_owned()), (header::CONTENT_DISPOSITION, file)];
    Ok((headers, Body::from_stream(rest)).into_response())
}

/// Which pages go along, once those of finished turns are with the store.
pub(super) async fn pages_of(target: &Target, info: &SessionInfo) -> Result<ExportPages, ApiError> {
    let app = &target.owner.app;
    if !app.registry.has(&info.settings.model) {
        // Without its model, what the store has tells whose pages they are.
        return target.call(Store::stored_pages).await?.ok_or_else(ApiError::no_pages);
    }
    let model = app.registry.get(&info.settings.model, &app.time()).await?;
    target.set_root(info, &model).await?;
    let engine = &model.served.engine;
    if !engine.settle(SETTLE).await {
        tracing::warn!("an export goes without the pages that are still being written");
    }
    Ok(engine.export_pages(info.token_count as usize))
}

/// The store's end of an export. Waits for the connection, as long as it is one.
struct Outgoing {
    pieces: Sender<Result<Bytes, ApiError>>,
    runtime: Handle,
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let piece = &bytes[..bytes.len().min(PIECE_BYTES)];
        let send = self.pieces.send(Ok(Bytes::copy_from_slice(piece)));
        match self.runtime.block_on(async { tokio::time::timeout(STALL, send).await }) {
            Ok(Ok(())) => Ok(piece.len()),
            Ok(Err(_)) => Err(Error::new(ErrorKind::BrokenPipe, "the client has left")),
            Err(_) => Err(Error::new(ErrorKind::TimedOut, "the client takes nothing")),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What a client asks of an import.
struct Wanted {
    name: Option<String>,
    /// The model that goes on with the session; without one it keeps the bundle's.
    model: Option<Arc<Model>>,
    pages: Taken,
}

/// Which pages are taken.
enum Taken {
    None,
    /// What this model would have computed.
    Of(Arc<Model>),
    /// All: this server has no model to compare them with, and whoever opens the session with one will.
    Any,
}

impl Wanted {
    async fn read(owner: &Owner, uri: &Uri) -> Result<Self, ApiError> {
        let (params, registry, time) = (Params::of(uri)?, &owner.app.registry, owner.app.time());
        let named = params.text("name").map(|text| name("name", text)).transpose()?;
        let model = match params.text("model") {
            Some(id) => Some(registry.get(id, &time).await?),
            None => None,
        };
        // Nothing proves who computed a bundle's pages: they are taken only where that is asked for.
        let pages = match params.choice("include", &INCLUDE)? {
            Some(1) => match &model {
                Some(model) => Taken::Of(Arc::clone(model)),
                None if registry.first().is_none() => Taken::Any,
                None => Taken::Of(registry.named(None, &time).await?),
            },
            _ => Taken::None,
        };
        Ok(Self { name: named, model, pages })
    }
}

pub(super) async fn import(owner: Owner, request: Request) -> Result<Response, ApiError> {
    let wanted = Wanted::read(&owner, request.uri()).await?;
    if let Some(name) = wanted.name.clone() {
        // Before gigabytes are sent in vain; that it is still free is checked again at the end.
        let tenant = owner.tenant.id;
        let is_taken = owner.sessions.call(move |store| Ok(store.find(tenant, &name).is_ok())).await?;
        if is_taken {
            return Err(StoreError::NameTaken(wanted.name.unwrap_or_default()).into());
        }
    }
    let options = &owner.app.options;
    let limits = BodyLimits { bytes: options.import_limit_bytes, pause: options.header_timeout };
    let (sender, pieces) = channel(PIECES);
    let taker = owner.clone();
    let take = tokio::spawn(async move {
        let (sessions, input) = (taker.sessions.clone(), Incoming { pieces, piece: Bytes::new() });
        sessions.call(move |store| take(&taker, store, input, wanted)).await
    });
    // The client's own mistake is told before what came of it.
    body::pieces(request, limits, sender).await?;
    let imported = take.await.map_err(|_| ApiError::internal("the import failed"))??;
    let (pages, refused) = (imported.pages, imported.pages_refused);
    let mut object = owner.show(vec![imported.session]).await?.pop().unwrap_or(Value::Null);
    object["kv"]["pages"] = json!(pages);
    object["kv"]["pages_refused"] = json!(refused);
    Ok((StatusCode::CREATED, Json(object)).into_response())
}

/// Reads a bundle to its end; where anything is wrong, no session is left.
fn take(owner: &Owner, store: &Store, mut input: Incoming, wanted: Wanted) -> Result<Imported, StoreError> {
    let tenant = &owner.tenant;
    let pages = match &wanted.pages {
        Taken::Of(model) => model.import_pages(&owner.name)?,
        Taken::Any => BundlePages::Any,
        Taken::None => BundlePages::Refuse,
    };
    let mut imported = store.import(tenant, &mut input, ImportAs { id: None, name: wanted.name }, pages)?;
    let id = imported.session.id;
    let settle = || {
        if input.read(&mut [0])? > 0 {
            return Err(StoreError::Bundle("bytes follow its end".to_owned()));
        }
        let named = imported.session.settings.model.clone();
        let model = wanted.model.or_else(|| owner.app.registry.loaded(&named));
        let Some(model) = model else { return store.get(tenant.id, id) };
        let len = imported.session.token_count as usize;
        let root = model.root(&owner.name, b"", len)?;
        store.patch(tenant.id, id, |settings| {
            (settings.root, settings.model) = (root, model.id.clone());
        })
    };
    match settle() {
        Ok(session) => imported.session = session,
        Err(error) => {
            store.delete(tenant.id, id)?;
            return Err(error);
        }
    }
    // What was taken is in the ring; the answer tells what can be found.
    store.wait_written(SETTLE);
    Ok(imported)
}

/// The store's end of an import. An empty piece is the end; without it, the client has left.
struct Incoming {
    pieces: Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Incoming {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        if self.piece.is_empty() {
            let next = self.pieces.blocking_recv();
            self.piece =
                next.ok_or_else(|| Error::new(ErrorKind::ConnectionAborted, "the body broke off"))?;
            if self.piece.is_empty() {
                // Whoever reads on is told the same again.
                self.pieces.close();
            }
        }
        let len = to.len().min(self.piece.len());
        to[..len].copy_from_slice(&self.piece.split_to(len));
        Ok(len)
    }
}
