//! POST /v1/responses: from the request to a response under way.

use std::sync::Arc;
use std::time::Duration;

use mainstay_engine::store::Durability;
use serde_json::{Value, json};

use super::answer::{Answering, Role};
use super::feed::{Feed, FeedWriter};
use super::mcp::{self, Offer};
use super::object::ResponseRecord;
use super::opening::{self, Planned, Stored};
use super::past::Past;
use super::request::{self, Before, ResponseRequest};
use super::rounds::{Place, Rounds};
use super::{ids, now_s};
use crate::error::ApiError;
use crate::generate::Run;
use crate::job::{Asker, Continuation, TimeLimits};
use crate::mcp::McpServers;
use crate::prompt::Prompt;
use crate::registry::{Model, Registry};
use crate::reply::Envelope;
use crate::sessions::Sessions;
use crate::sessions::begin::Beginning;
use crate::sessions::live::Live;
use crate::sessions::turn::Claimed;

/// What answers responses.
#[derive(Clone)]
pub(crate) struct Responder {
    pub(crate) registry: Registry,
    pub(crate) sessions: Option<Sessions>,
    /// Of new sessions, and of pages that are of none.
    pub(crate) durability: (Durability, Durability),
    pub(crate) max_tokens_default: Option<usize>,
    /// How often tokens of an answer are written to the journal.
    pub(crate) interval: Option<Duration>,
    /// What is not to be stored has a session in memory, for whoever goes on from it soon.
    pub(crate) keeps_unstored: bool,
    /// Servers whose tools the model may call.
    pub(crate) mcp: McpServers,
}

impl Responder {
    /// Begins a response.
    ///
    /// # Errors
    /// What the client has to know before anything was changed.
    pub(crate) async fn begin(
        &self,
        tenant: Arc<str>,
        asked: ResponseRequest,
        time: TimeLimits,
    ) -> Result<Answering, ApiError> {
        let model = self.registry.get(&asked.model, &time).await?;
        let stored = self.stored(&asked)?;
        let past = opening::before(self.sessions.as_ref(), &tenant, &asked).await?;
        let mut asked = asked;
        let offer = match Offer::of(&self.mcp, &mut asked, past.as_ref()).await? {
            Some(mut offer) => {
                offer.call_approved(&asked, past.as_ref()).await?;
                asked.opened.clone_from(&offer.opened);
                Some(offer)
            }
            None => {
                mcp::check_no_approvals(&asked, past.as_ref())?;
                None
            }
        };
        // Without a session, what stands before is told with every answer.
        let told = past.clone().filter(|_| offer.is_some() && stored == Stored::No).map(Box::new);
        let (asked, past, planned) = planned(&model, asked, past).await?;
        let begun = Begun { responder: self, tenant, model, asked, time };
        match (stored, &self.sessions) {
            (Stored::Yes(durability), Some(sessions)) => {
                begun.in_session((sessions, durability), past, planned, offer).await
            }
            _ => begun.plain(planned, told, offer).await,
        }
    }

    /// How many tokens the prompt of a request has.
    ///
    /// # Errors
    /// As [`Responder::begin`].
    pub(crate) async fn input_tokens(
        &self,
        tenant: Arc<str>,
        asked: ResponseRequest,
        time: TimeLimits,
    ) -> Result<usize, ApiError> {
        let model = self.registry.get(&asked.model, &time).await?;
        let past = opening::before(self.sessions.as_ref(), &tenant, &asked).await?;
        let mut asked = asked;
        Offer::of(&self.mcp, &mut asked, past.as_ref()).await?;
        let (_, _, planned) = planned(&model, asked, past).await?;
        Ok(planned.fit.tokens.len())
    }

    fn stored(&self, asked: &ResponseRequest) -> Result<Stored, ApiError> {
        let in_conversation = matches!(asked.before, Before::Conversation(_));
        match (asked.store, &self.sessions) {
            (Some(false), Some(_)) if !in_conversation && self.keeps_unstored => {
                Ok(Stored::Yes(Durability::Ephemeral))
            }
            (Some(false), _) if !in_conversation => Ok(Stored::No),
            (_, Some(_)) => Ok(Stored::Yes(self.durability.0)),
            (Some(true), None) => Err(ApiError::no_sessions()),
            (_, None) if asked.background || in_conversation => Err(ApiError::no_sessions()),
            (_, None) => Ok(Stored::No),
        }
    }
}

pub(super) async fn planned(
    model: &Arc<Model>,
    asked: ResponseRequest,
    past: Option<Past>,
) -> Result<(ResponseRequest, Option<Past>, Planned), ApiError> {
    let model = Arc::clone(model);
    let plan = move || {
        let planned = opening::plan(&asked, &model, past.as_ref())?;
        Ok((asked, past, planned))
    };
    let planned = tokio::task::spawn_blocking(plan).await;
    planned.unwrap_or_else(|_| Err(ApiError::internal("rendering the conversation failed")))
}

/// A response that was planned.
pub(super) struct Begun<'a> {
    pub(super) responder: &'a Responder,
    pub(super) tenant: Arc<str>,
    pub(super) model: Arc<Model>,
    pub(super) asked: ResponseRequest,
    pub(super) time: TimeLimits,
}

impl Begun<'_> {
    /// What the object repeats, completed by what only this server knows.
    fn record(
        &mut self,
        id: &str,
        planned: &Planned,
        (is_stored, offer): (bool, Option<&Offer>),
    ) -> ResponseRecord {
        let sampling = &planned.chat.options.sampling;
        self.asked.complete_echo(&self.model, (sampling.temperature, sampling.top_p));
        let mut echo = self.asked.echo.clone();
        echo.insert("store".to_owned(), json!(is_stored));
        let conversation = match &self.asked.before {
            Before::Conversation(id) => json!({"id": id}),
            Before::Nothing | Before::Response(_) => Value::Null,
        };
        echo.insert("conversation".to_owned(), conversation);
        let mut record = ResponseRecord::new(id, now_s(), echo, planned.input.clone());
        if planned.skipped > 0 {
            record.set("skipped", json!(planned.skipped));
        }
        record.set_replaced(&planned.replaced);
        if let Some(offer) = offer {
            record.set("mcp", offer.to_json());
            record.set("opened", json!(offer.opened.len()));
            record.set("output", Value::from(offer.opened.clone()));
        }
        record
    }

    fn asker(&self) -> Asker {
        Asker {
            model: Arc::clone(&self.model),
            tenant: Arc::clone(&self.tenant),
            max_tokens_default: self.responder.max_tokens_default,
            time: self.time,
        }
    }

    /// An answer that is kept nowhere.
    pub(super) async fn run(&self, planned: Planned) -> Result<Run, ApiError> {
        let prompt = (Prompt::of(planned.fit.tokens), planned.fit.text.as_str());
        let how = (Continuation::OwnText, self.responder.durability.1);
        let job = self.asker().job(planned.chat, prompt, how).await;
        Run::start(job.map_err(request::renamed)?)
    }

    /// What it takes to let the model answer more than once.
    fn rounds(&self, offer: Offer, place: Place) -> Rounds {
        let mut asked = self.asked.clone();
        // From now on they are part of the output.
        asked.opened.clear();
        Rounds {
            responder: self.responder.clone(),
            tenant: Arc::clone(&self.tenant),
            model: Arc::clone(&self.model),
            asked,
            time: self.time,
            calls: offer.calls,
            offer: Arc::new(offer),
            place,
            rounds: 0,
        }
    }

    /// A response that is kept nowhere.
    async fn plain(
        mut self,
        planned: Planned,
        past: Option<Box<Past>>,
        offer: Option<Offer>,
    ) -> Result<Answering, ApiError> {
        let id = ids::response(mainstay_engine::store::SessionId(0));
        let record = self.record(&id, &planned, (false, offer.as_ref()));
        let place = Place::Nowhere { past, input: planned.input.clone() };
        let rounds = offer.map(|offer| self.rounds(offer, place));
        let answering = Answering::new(self.run(planned).await?, record, Role::Alone);
        Ok(answering.with_rounds(rounds, FeedWriter::new()))
    }

    /// A response that is a turn of a session.
    async fn in_session(
        mut self,
        (sessions, durability): (&Sessions, Durability),
        past: Option<Past>,
        planned: Planned,
        offer: Option<Offer>,
    ) -> Result<Answering, ApiError> {
        // Before anything is changed, so that what is wrong is told in time.
        let output = planned.chat.output(&self.model, &planned.fit.text);
        planned.chat.held(&self.model, &output).await.map_err(request::renamed)?;
        let place = (&self.tenant, durability);
        let (claimed, turns) = opening::claim(sessions, place, &self.model, past).await?;
        let id = ids::response(claimed.id);
        let is_stored =
            self.asked.store != Some(false) || matches!(self.asked.before, Before::Conversation(_));
        let record = self.record(&id, &planned, (is_stored, offer.as_ref()));
        let (sessions, claim) = (sessions.clone(), claimed.claim.clone());
        let place = Place::Session { sessions, claim, tenant: claimed.tenant, id: claimed.id };
        let rounds = offer.map(|offer| self.rounds(offer, place));
        let feed = FeedWriter::new();
        let heard = rounds.is_some().then(|| feed.0.clone());
        let (run, live) = self.turn((claimed, turns), &record, planned, heard).await?;
        Ok(Answering::new(run, record, Role::Maker(live)).with_rounds(rounds, feed))
    }

    /// An answer that is a turn of a session.
    pub(super) async fn turn(
        &self,
        (claimed, turns): (Claimed, u32),
        record: &ResponseRecord,
        planned: Planned,
        feed: Option<Feed>,
    ) -> Result<(Run, Arc<Live>), ApiError> {
        let id = record.id().unwrap_or_default().to_owned();
        let Planned { chat, fit, messages, changed, .. } = planned;
        let beginning = Beginning {
            asker: self.asker(),
            request: chat,
            claimed,
            turns,
            fit,
            messages,
            changed,
            envelope: Envelope::of(id, now_s(), &self.model),
            include_usage: true,
            response: record.to_json(),
            feed,
            interval: self.responder.interval,
        };
        beginning.begin().await.map_err(request::renamed)
    }
}
