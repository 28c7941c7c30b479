//! The stream of a session's answer, read again: one that was interrupted goes on, one that runs is read along, one
//! that has ended is repeated.

use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use mainstay_engine::store::{
    Durability, InFlight, SessionId, SessionInfo, Store, TenantId, Turn as PastTurn,
};
use mainstay_engine::{Identity, Keep, Reuse};
use serde_json::{Value, json};

use super::history::History;
use super::live::Live;
use super::options::{self, Recorded};
use super::record::{SessionRecord, TurnRecord};
use super::turn::{Claimed, Plan, Turn};
use super::{Claim, Sessions, shown};
use crate::error::ApiError;
use crate::generate::{Closing, Run};
use crate::grammar;
use crate::job::{Continuation, Echo, Job, TimeLimits};
use crate::kv::durability_name;
use crate::openai::chat::ChatShape;
use crate::openai::session_fields::durability;
use crate::openai::usage::Usage;
use crate::prompt::Prompt;
use crate::registry::{Model, Registry};
use crate::reply::Envelope;
use crate::sse::{self, StreamOptions};

/// How long a reader waits for a turn that begins or ends just now.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// What stands beside the tokens of an answer in flight.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Meta {
    pub(crate) plan: Plan,
    pub(crate) keep: Keep,
    /// The name of the tenant whose it is.
    pub(crate) tenant: String,
}

impl Meta {
    pub(crate) fn to_bytes(&self, identity: &Identity) -> Vec<u8> {
        let mut made_of = SessionRecord::default();
        made_of.set_identity(identity);
        let Plan { record, turns, kept, durability, reason, changed } = &self.plan;
        let value = json!({
            "record": record.to_json(),
            "turns": turns,
            "kept": kept,
            "durability": durability.map(durability_name),
            "reason": reason,
            "changed": changed,
            "salt": String::from_utf8_lossy(&self.keep.salt),
            "keep": durability_name(self.keep.durability),
            "equivalent": self.keep.reuse == Reuse::Equivalent,
            "identity": made_of.identity,
            "tenant": self.tenant,
        });
        value.to_string().into_bytes()
    }

    /// And what the model was made of; `None` where it is not what this server writes.
    pub(crate) fn read(bytes: &[u8]) -> Option<(Self, SessionRecord)> {
        let value: Value = serde_json::from_slice(bytes).ok()?;
        let number = |key: &str| value[key].as_u64().and_then(|number| u32::try_from(number).ok());
        let text = |key: &str| value[key].as_str();
        let plan = Plan {
            record: TurnRecord::of_json(&value["record"]),
            turns: number("turns")?,
            kept: number("kept")?,
            durability: text("durability").and_then(durability),
            reason: text("reason").map(str::to_owned),
            changed: text("changed").map(str::to_owned),
        };
        let reuse = if value["equivalent"].as_bool()? { Reuse::Equivalent } else { Reuse::Exact };
        let durability = text("keep").and_then(durability).unwrap_or(Durability::Async);
        let keep = Keep { salt: text("salt")?.as_bytes().to_vec(), durability, reuse };
        let identity = value["identity"].as_object()?.clone();
        let tenant = text("tenant").unwrap_or_default().to_owned();
        Some((Self { plan, keep, tenant }, SessionRecord { identity, ..SessionRecord::default() }))
    }
}

/// Who wants to read which answer.
pub(crate) struct Reader {
    pub(crate) sessions: Sessions,
    pub(crate) registry: Registry,
    pub(crate) tenant: Arc<str>,
    /// How often tokens of an answer that goes on are written.
    pub(crate) interval: Option<Duration>,
    pub(crate) time: TimeLimits,
    /// Tokens of the answer that the reader has.
    pub(crate) after: usize,
}

/// A session that nobody else writes to.
struct Idle {
    claim: Claim,
    tenant: TenantId,
    id: SessionId,
    info: SessionInfo,
    turns: Vec<Arc<PastTurn>>,
}

impl Reader {
    /// Streams the answer of a session, named by id or name.
    ///
    /// # Errors
    /// 404 where there is no such session or it has no answer, 409 where it cannot go on.
    pub(crate) async fn stream(self, session: String) -> Result<Response, ApiError> {
        let (tenant, id) = self.sessions.find(&self.tenant, session).await?;
        let until = tokio::time::Instant::now() + BUSY_PATIENCE;
        loop {
            match self.sessions.claim(id) {
                Ok(claim) => return self.idle(claim, tenant, id).await,
                Err(busy) => {
                    if let Some(live) = self.sessions.live(id).filter(|live| !live.has_failed()) {
                        return self.follow(&live, id).await;
                    }
                    if tokio::time::Instant::now() > until {
                        return Err(busy);
                    }
                    tokio::time::sleep(BUSY_PAUSE).await;
                }
            }
        }
    }

    /// The run that reads along with a turn.
    pub(crate) fn following(&self, live: &Live) -> Run {
        Run::follow(Job { time: self.time, ..live.job.clone() }, live.follow())
    }

    async fn follow(&self, live: &Live, id: SessionId) -> Result<Response, ApiError> {
        let run = self.following(live);
        self.send(run, live.envelope.clone(), (live.include_usage, id)).await
    }

    async fn idle(self, claim: Claim, tenant: TenantId, id: SessionId) -> Result<Response, ApiError> {
        let read = move |store: &Store| {
            Ok((store.get(tenant, id)?, store.turns(tenant, id)?, store.answer(tenant, id)?))
        };
        let (info, turns, in_flight) = self.sessions.call(read).await?;
        let idle = Idle { claim, tenant, id, info, turns };
        match in_flight.and_then(|found| Meta::read(&found.meta).map(|meta| (found, meta))) {
            Some((found, (meta, made_of))) => self.go_on(idle, found, (meta, made_of)).await,
            None => self.past(idle).await,
        }
    }

    /// Goes on with an answer that was interrupted.
    async fn go_on(
        self,
        idle: Idle,
        found: InFlight,
        meta: (Meta, SessionRecord),
    ) -> Result<Response, ApiError> {
        let id = idle.id;
        let (run, live) = self.take_up(idle, found, meta).await?;
        self.send(run, live.envelope.clone(), (live.include_usage, id)).await
    }

    /// Goes on with the answer in flight of a session, for a reader of its own.
    ///
    /// # Errors
    /// 409 where somebody has the session, or the model has changed; 404 where nothing is in flight.
    pub(crate) async fn taken_up(
        &self,
        tenant: TenantId,
        id: SessionId,
    ) -> Result<(Run, Arc<Live>), ApiError> {
        let claim = self.sessions.claim(id)?;
        let read = move |store: &Store| {
            Ok((store.get(tenant, id)?, store.turns(tenant, id)?, store.answer(tenant, id)?))
        };
        let (info, turns, in_flight) = self.sessions.call(read).await?;
        let found = in_flight.ok_or_else(ApiError::no_turns)?;
        let meta = Meta::read(&found.meta).ok_or_else(ApiError::no_turns)?;
        self.take_up(Idle { claim, tenant, id, info, turns }, found, meta).await
    }

    async fn take_up(
        &self,
        idle: Idle,
        found: InFlight,
        (meta, made_of): (Meta, SessionRecord),
    ) -> Result<(Run, Arc<Live>), ApiError> {
        let Meta { plan, keep, .. } = meta;
        let model = self.registry.get(&plan.record.model, &self.time).await?;
        if let Some(part) = made_of.changed(&model.identity) {
            return Err(ApiError::model_changed(part));
        }
        let recorded = recorded(&plan.record)?;
        let sent_len = plan.record.sent_len.min(found.tokens.len());
        let (sent, drawn) = found.tokens.split_at(sent_len);
        let prompt = [History::of(idle.turns).tokens(plan.kept as usize), sent.to_vec()].concat();
        let envelope = Envelope::of(plan.record.id.clone(), plan.record.created, &model);
        let include_usage = recorded.include_usage;
        let constraint = match recorded.constraint.clone() {
            Some(constraint) => Some(grammar::compile(constraint, &model).await?),
            None => None,
        };
        let job = Job { constraint, ..self.job(model, prompt, recorded, keep) };
        let response = plan.record.response.clone();
        let live = Live::new(job.clone(), envelope, include_usage, drawn).of_response(response, None);
        let live = Arc::new(live);
        let claimed = Claimed {
            sessions: self.sessions.clone(),
            claim: idle.claim,
            tenant: idle.tenant,
            id: idle.id,
            settings: idle.info.settings,
            is_new: false,
        };
        let turn = Turn::new(claimed, plan, Arc::clone(&live), self.interval).resumed(drawn.len());
        Ok((Run::of_turn(job, turn, drawn.to_vec())?, live))
    }

    /// Repeats the last answer.
    async fn past(self, idle: Idle) -> Result<Response, ApiError> {
        let turn = idle.turns.last().ok_or_else(ApiError::no_turns)?;
        let record = TurnRecord::read(&turn.meta);
        let include_usage = recorded(&record)?.include_usage;
        let run = self.again(turn, &idle.info).await?;
        let envelope = Envelope::of(record.id, record.created, &run.job().model);
        drop(idle.claim);
        self.send(run, envelope, (include_usage, idle.id)).await
    }

    /// The run that reads the tokens of a turn that has ended.
    ///
    /// # Errors
    /// 404 where the turn was cut, or its model is not there.
    pub(crate) async fn again(&self, turn: &PastTurn, info: &SessionInfo) -> Result<Run, ApiError> {
        let record = TurnRecord::read(&turn.meta);
        let recorded = recorded(&record)?;
        let model = self.registry.get(&record.model, &self.time).await?;
        let sampled = turn.tokens.get(record.sent_len..).unwrap_or_default();
        let drawn = [sampled, &record.dropped].concat();
        let name = &info.settings.name;
        let closing = Closing {
            kv: record.kv.clone(),
            session: Some(json!({"id": shown(info.id), "name": name, "turn": turn.number})),
            usage: Usage::of_json(&record.usage),
        };
        let is_cut = record.finish_reason == "length";
        let job = self.job(model, Vec::new(), recorded, Keep::default());
        Ok(Run::of_past(job, (&drawn, is_cut), closing))
    }

    fn job(&self, model: Arc<Model>, prompt: Vec<u32>, recorded: Recorded, keep: Keep) -> Job {
        Job {
            model,
            tenant: self.tenant.clone(),
            prompts: vec![Prompt::of(prompt)],
            max_tokens: Some(recorded.max_tokens),
            max_tokens_default: None,
            options: recorded.options,
            output: recorded.output,
            logprobs: recorded.logprobs,
            echo: Echo::No,
            continuation: Continuation::OwnText,
            time: self.time,
            keep,
            constraint: None,
        }
    }

    async fn send(
        &self,
        run: Run,
        envelope: Envelope,
        (include_usage, id): (bool, SessionId),
    ) -> Result<Response, ApiError> {
        let options = StreamOptions { include_usage, numbers: Some(self.after) };
        let response = sse::stream(run, ChatShape::default(), envelope, options).await?;
        Ok(super::named(response, id))
    }
}

fn recorded(record: &TurnRecord) -> Result<Recorded, ApiError> {
    // A turn that was cut by a rollback or a fork, or written by another version, has none.
    options::read(&record.options).ok_or_else(ApiError::no_turns)
}
