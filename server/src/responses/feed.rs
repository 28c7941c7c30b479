//! The events of a response of several turns, for those who read along.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

/// The events so far, and whether more may come. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Feed {
    events: Arc<Mutex<Vec<Value>>>,
    /// How many there are, `None` after the last.
    len: Arc<watch::Sender<Option<usize>>>,
}

/// Writes a feed. Dropped, it ends it.
pub(crate) struct FeedWriter(pub(crate) Feed);

impl FeedWriter {
    pub(crate) fn new() -> Self {
        Self(Feed { events: Arc::default(), len: Arc::new(watch::Sender::new(Some(0))) })
    }

    pub(crate) fn push(&self, event: &Value) {
        let mut events = self.0.events();
        events.push(event.clone());
        self.0.len.send_replace(Some(events.len()));
    }
}

impl Drop for FeedWriter {
    fn drop(&mut self) {
        self.0.len.send_replace(None);
    }
}

impl Feed {
    /// The `at`th event, once it is there; `None` where there will be none.
    pub(crate) async fn event(&self, at: usize) -> Option<Value> {
        let mut len = self.len.subscribe();
        // The sender lives as long as this.
        let _ = len.wait_for(|len| len.is_none_or(|len| len > at)).await;
        self.events().get(at).cloned()
    }

    fn events(&self) -> MutexGuard<'_, Vec<Value>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn readers_hear_everything_and_the_end() {
        let writer = FeedWriter::new();
        writer.push(&json!(0));
        let feed = writer.0.clone();
        let reader =
            tokio::spawn(async move { (feed.event(0).await, feed.event(1).await, feed.event(2).await) });
        writer.push(&json!(1));
        drop(writer);
        assert_eq!(reader.await.unwrap(), (Some(json!(0)), Some(json!(1)), None));
    }
}
