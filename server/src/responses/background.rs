//! Responses that are made although nobody reads them: also after a restart.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use mainstay_engine::store::{SessionId, Store, TenantId};
use tokio::time::Instant;

use super::answer::{Answering, Role};
use super::object::ResponseRecord;
use crate::error::ApiError;
use crate::job::TimeLimits;
use crate::registry::Registry;
use crate::sessions::Sessions;
use crate::sessions::resume::{Meta, Reader};

/// How often a model that is still being loaded is asked for.
const MODEL_PAUSE: Duration = Duration::from_millis(200);

/// Goes on with the responses that a restart has interrupted. [`Sessions::will_go_on`] was told that it will.
pub(crate) async fn go_on(sessions: Sessions, registry: Registry, interval: Option<Duration>) {
    let find = |store: &Store| {
        let answer = |&(tenant, id): &(TenantId, SessionId)| {
            let found = store.answer(tenant, id).ok().flatten()?;
            let (meta, _) = Meta::read(&found.meta)?;
            let record = ResponseRecord::read(&meta.plan.record.response)?;
            record.is_background().then_some((tenant, id, meta, record))
        };
        Ok(store.in_flight().iter().filter_map(answer).collect::<Vec<_>>())
    };
    let found = match sessions.call(find).await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(error = error.message(), "responses in the background were not looked for");
            return sessions.will_go_on(Some(HashSet::new()));
        }
    };
    sessions.will_go_on(Some(found.iter().map(|(_, id, ..)| *id).collect()));
    for (tenant, id, meta, record) in found {
        let reader = Reader {
            sessions: sessions.clone(),
            registry: registry.clone(),
            tenant: Arc::from(meta.tenant.as_str()),
            interval,
            time: TimeLimits { arrived: Instant::now(), request: None, queue: None },
            after: 0,
        };
        tokio::spawn(async move {
            wait_for(&reader.registry, &meta.plan.record.model).await;
            let taken_up = reader.taken_up(tenant, id).await;
            reader.sessions.has_gone_on(id);
            match taken_up {
                Ok((run, live)) => Answering::new(run, record, Role::Maker(live)).alone().await,
                // It is shown as failed; its tokens stay for a model that fits.
                Err(error) => {
                    tracing::warn!(session = %id, error = error.message(), "a response cannot go on")
                }
            }
        });
    }
}

/// Waits while a model is being loaded.
async fn wait_for(registry: &Registry, model: &str) {
    let time = TimeLimits { arrived: Instant::now(), request: None, queue: None };
    let is_loading = |error: &ApiError| error.is_loading();
    while registry.get(model, &time).await.as_ref().err().is_some_and(is_loading) {
        tokio::time::sleep(MODEL_PAUSE).await;
    }
}
