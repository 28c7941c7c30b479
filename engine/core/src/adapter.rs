//! Adapters of an engine: loaded once, named by their content in every page key, let go when nobody has them any more.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mainstay_backend_api::AdapterId;
use mainstay_models::{AdapterWeights, LoadError};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use crate::handle::Handle;
use crate::run::Message;

/// An adapter that an engine has. While there is a clone of it, requests may name it; with the last one it goes.
#[derive(Clone)]
pub struct Adapter {
    shared: Arc<Shared>,
}

struct Shared {
    id: AdapterId,
    hash: [u8; 32],
    /// Of its engine.
    inbox: UnboundedSender<Message>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // An engine that has ended has let it go.
        let _ = self.inbox.send(Message::DropAdapter(self.id));
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl Adapter {
    /// Of all that decides its results.
    pub fn hash(&self) -> [u8; 32] {
        self.shared.hash
    }

    pub(crate) fn id(&self) -> AdapterId {
        self.shared.id
    }

    pub(crate) fn is_of(&self, inbox: &UnboundedSender<Message>) -> bool {
        self.shared.inbox.same_channel(inbox)
    }
}

impl Handle {
    /// Brings an adapter to the device.
    ///
    /// # Errors
    /// What the executor says; [`LoadError::Resources`] where the engine ends.
    pub async fn load_adapter(&self, weights: AdapterWeights) -> Result<Adapter, LoadError> {
        let id = AdapterId(self.shared.next_adapter.fetch_add(1, Ordering::Relaxed));
        let hash = weights.hash;
        let (reply, loaded) = oneshot::channel();
        let ended = || LoadError::Resources { what: "the engine of the model has ended".to_owned() };
        let inbox = self.shared.inbox.clone();
        inbox.send(Message::LoadAdapter(id, Box::new(weights), reply)).map_err(|_| ended())?;
        loaded.await.map_err(|_| ended())??;
        Ok(Adapter { shared: Arc::new(Shared { id, hash, inbox }) })
    }
}
