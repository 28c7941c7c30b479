//! What was reused of a request's keys and values, and how durable the rest is, as answers tell it.

use std::time::Duration;

use mainstay_engine::store::Durability;
use mainstay_engine::{Keep, KvReport, KvState};
use serde_json::{Value, json};

use crate::registry::Model;

/// How long the last event of an answer waits for its pages to be with the system.
const PAGE_PATIENCE: Duration = Duration::from_millis(100);

/// The reports of all prompts of a request: counts and times are added up, the state is the worst one, the reason
/// is that of the first prompt that has one.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Reused {
    state: Option<KvState>,
    reason: Option<String>,
    pub(crate) cached_tokens: usize,
    restored_tokens: usize,
    restore_ms: f64,
}

impl Reused {
    pub(crate) fn add(&mut self, report: &KvReport) {
        let worst = |state: KvState| if rank(report.state) > rank(state) { report.state } else { state };
        self.state = Some(self.state.map_or(report.state, worst));
        self.reason = self.reason.take().or(report.reason.map(str::to_owned));
        self.cached_tokens += report.cached_tokens;
        self.restored_tokens += report.restored_tokens;
        self.restore_ms += report.restore_ms;
    }

    /// Names what the engine cannot know: why the tokens of a session are not those of the turn before, or which part
    /// of the model has changed since. The latter matters only where pages were lost by it.
    pub(crate) fn explain(&mut self, history: Option<&str>, changed: Option<&str>) {
        let lost = matches!(self.state(), KvState::Cold | KvState::Recomputed);
        if let Some(reason) = history.or(changed.filter(|_| lost)) {
            self.reason = Some(reason.to_owned());
        }
    }

    fn state(&self) -> KvState {
        self.state.unwrap_or(KvState::Cold)
    }

    /// The object `kv`.
    pub(crate) fn to_json(&self, durability: Durability) -> Value {
        let tier = match (self.restored_tokens, self.cached_tokens) {
            (0, 0) => None,
            (0, _) => Some("device"),
            _ => Some("disk"),
        };
        json!({
            "state": self.state().name(),
            "reason": self.reason,
            "restored_tokens": self.restored_tokens,
            "tier": tier,
            "restore_ms": self.restore_ms,
            "durability": durability_name(durability),
        })
    }
}

fn rank(state: KvState) -> u8 {
    match state {
        KvState::Exact => 0,
        KvState::Equivalent => 1,
        KvState::Recomputed => 2,
        KvState::Cold => 3,
    }
}

/// A level as the API names it.
pub(crate) fn durability_name(level: Durability) -> &'static str {
    match level {
        Durability::Ephemeral => "ephemeral",
        Durability::Async => "async",
        Durability::Turn => "turn",
        Durability::Full => "full",
    }
}

/// Whether pages of such a request go to a store.
pub(crate) fn are_pages_kept(model: &Model, keep: &Keep) -> bool {
    keep.durability != Durability::Ephemeral && model.served.engine.store().is_some()
}

/// Waits until the pages of a request that has ended are with the system, so that a process killed after the answer
/// leaves them. A disk that is slower than this is counted and not waited for.
pub(crate) async fn settle(model: &Model, keep: &Keep) {
    settle_within(model, keep, PAGE_PATIENCE).await;
}

/// The same with another patience.
pub(crate) async fn settle_within(model: &Model, keep: &Keep, patience: Duration) {
    if !are_pages_kept(model, keep) {
        return;
    }
    // The engine answers between two steps, and a step may be long.
    let settled = tokio::time::timeout(patience, model.served.engine.settle(patience)).await;
    if settled != Ok(true) {
        model.metrics.page_late();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(state: KvState, cached_tokens: usize, restored_tokens: usize) -> KvReport {
        let reason = (state == KvState::Cold).then_some("absent");
        KvReport { state, reason, cached_tokens, restored_tokens, restore_ms: 1.5 }
    }

    #[test]
    fn prompts_are_added_up_and_the_worst_state_is_told() {
        let mut reused = Reused::default();
        assert_eq!(reused.to_json(Durability::Ephemeral)["state"], "cold");
        reused.add(&report(KvState::Exact, 64, 0));
        let kv = reused.to_json(Durability::Async);
        assert_eq!(
            (&kv["state"], &kv["tier"], &kv["reason"]),
            (&json!("exact"), &json!("device"), &Value::Null)
        );
        reused.add(&report(KvState::Cold, 0, 0));
        reused.add(&report(KvState::Equivalent, 32, 32));
        let expected = json!({"state": "cold", "reason": "absent", "restored_tokens": 32, "tier": "disk",
                              "restore_ms": 4.5, "durability": "turn"});
        assert_eq!(reused.to_json(Durability::Turn), expected);
        assert_eq!(reused.cached_tokens, 96);
    }

    #[test]
    fn a_changed_model_is_a_reason_only_where_pages_were_lost() {
        let mut warm = Reused::default();
        warm.add(&report(KvState::Exact, 64, 0));
        warm.explain(None, Some("weights"));
        assert_eq!(warm.reason, None);
        let mut cold = Reused::default();
        cold.add(&report(KvState::Cold, 0, 0));
        cold.explain(None, Some("weights"));
        assert_eq!(cold.reason.as_deref(), Some("weights"));
        cold.explain(Some("template_rewrote_history"), Some("weights"));
        assert_eq!(cold.reason.as_deref(), Some("template_rewrote_history"));
    }
}
