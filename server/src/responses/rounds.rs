//! A response of several turns: the model calls tools of MCP servers, is told what they gave, and answers again.

use std::sync::Arc;

use mainstay_engine::store::{Append, SessionId, Store, TenantId};
use serde_json::{Value, json};

use super::answer::Role;
use super::create::{Begun, Responder, planned};
use super::feed::Feed;
use super::items;
use super::mcp::Offer;
use super::object::ResponseRecord;
use super::past::Past;
use super::request::ResponseRequest;
use crate::error::ApiError;
use crate::generate::Run;
use crate::job::TimeLimits;
use crate::openai::session_fields::Truncation;
use crate::openai::usage::Usage;
use crate::registry::Model;
use crate::sessions::record::TurnRecord;
use crate::sessions::turn::Claimed;
use crate::sessions::{Claim, Sessions};

/// Most answers of one response that may call tools. The one after them has none.
const ROUNDS_MAX: usize = 16;
/// What a call ends with that is not made any longer.
pub(crate) const SPENT: &str = "the limit of tool calls of this response (max_tool_calls) is reached";

/// Where the turns of a response go.
pub(crate) enum Place {
    /// Into a session, which nobody else writes to between them.
    Session { sessions: Sessions, claim: Claim, tenant: TenantId, id: SessionId },
    /// Nowhere: each answer is told again what was said before.
    Nowhere { past: Option<Box<Past>>, input: Vec<Value> },
}

/// What it takes to let the model answer again.
pub(crate) struct Rounds {
    pub(crate) responder: Responder,
    pub(crate) tenant: Arc<str>,
    pub(crate) model: Arc<Model>,
    pub(crate) asked: ResponseRequest,
    pub(crate) time: TimeLimits,
    pub(crate) offer: Arc<Offer>,
    pub(crate) place: Place,
    /// Calls that were made, and answers that made some.
    pub(crate) calls: usize,
    pub(crate) rounds: usize,
}

/// An answer that begins, and who may end it.
pub(crate) struct Next {
    pub(crate) run: Run,
    pub(crate) role: Role,
}

impl Rounds {
    /// Whether one more call may be made; it counts as made then.
    pub(crate) fn may_call(&mut self) -> bool {
        let is_left = self.asked.max_tool_calls.is_none_or(|most| self.calls < most);
        self.calls += usize::from(is_left);
        is_left
    }

    /// Writes down how the response ended, where that was between two answers.
    ///
    /// # Errors
    /// What the store refuses.
    pub(crate) async fn note(&self, record: &ResponseRecord) -> Result<(), ApiError> {
        let Place::Session { sessions, tenant, id, .. } = &self.place else { return Ok(()) };
        let record = TurnRecord { response: record.to_json(), ..TurnRecord::default() };
        let append = Append { meta: record.to_bytes(), ..Append::default() };
        let (tenant, id) = (*tenant, *id);
        sessions.call(move |store| store.append_turn(tenant, id, append)).await.map(drop)
    }

    /// Begins the answer after some calls. `output` is that of the response, with their results; the calls are its
    /// items from `from` on.
    ///
    /// # Errors
    /// Where the conversation has become too long, or the session fails.
    pub(crate) async fn next(
        &mut self,
        (record, from): (&ResponseRecord, usize),
        spent: Usage,
        feed: &Feed,
    ) -> Result<Next, ApiError> {
        self.rounds += 1;
        let output = record.list("output").to_vec();
        let may_call =
            self.rounds < ROUNDS_MAX && self.asked.max_tool_calls.is_none_or(|most| self.calls < most);
        let mut asked = self.asked.clone();
        asked.choose_freely(may_call);
        asked.truncation = Truncation::Disabled;
        if let Some(most) = asked.max_output_tokens() {
            asked.limit_tokens(most.saturating_sub(spent.completion_tokens).max(1));
        }
        let results: Vec<Value> = output[from..].iter().filter_map(result_of).collect();
        let (past, claimed) = match &self.place {
            Place::Nowhere { past, input } => {
                let answered = output.iter().cloned().enumerate();
                let answered = answered.map(|(at, item)| if at < from { item } else { without_result(item) });
                asked.input = input.iter().cloned().chain(answered).chain(results).collect();
                (past.as_deref().cloned(), None)
            }
            Place::Session { sessions, claim, tenant, id } => {
                asked.input = results;
                let (tenant, id) = (*tenant, *id);
                let read = move |store: &Store| Past::read(store, tenant, store.get(tenant, id)?);
                let past = sessions.call(read).await?;
                let settings = past.info.settings.clone();
                let (sessions, claim) = (sessions.clone(), claim.clone());
                let claimed = Claimed { sessions, claim, tenant, id, settings, is_new: false };
                (Some(past), Some(claimed))
            }
        };
        let turns = past.as_ref().map_or(0, |past| past.info.turn_count);
        let (asked, _, mut plan) = planned(&self.model, asked, past).await?;
        plan.replaced.retain(|replaced| replaced.id() != record.id());
        let begun = Begun {
            responder: &self.responder,
            tenant: Arc::clone(&self.tenant),
            model: Arc::clone(&self.model),
            asked,
            // It does not wait for its turn once more.
            time: TimeLimits { queue: None, ..self.time },
        };
        let Some(claimed) = claimed else {
            let run = begun.run(plan).await?;
            return Ok(Next { run, role: Role::Alone });
        };
        let mut record = record.clone();
        record.set_replaced(&plan.replaced);
        let (run, live) = begun.turn((claimed, turns), &record, plan, Some(feed.clone())).await?;
        Ok(Next { run, role: Role::Maker(live) })
    }
}

/// The result of a call as the client would have sent it.
fn result_of(item: &Value) -> Option<Value> {
    if item["type"] != "mcp_call" {
        return None;
    }
    let error = || item["error"].as_str().map(items::called_in_vain);
    let text = item["output"].as_str().map(str::to_owned).or_else(error)?;
    Some(json!({"id": crate::random::id("fco_"), "type": "function_call_output", "status": "completed",
                "call_id": item["id"], "output": text}))
}

fn without_result(mut item: Value) -> Value {
    if item["type"] == "mcp_call" {
        (item["output"], item["error"]) = (Value::Null, Value::Null);
    }
    item
}
