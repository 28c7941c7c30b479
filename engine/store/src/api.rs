//! What the engine and the server ask of a store: sessions, turns, forks, answers in flight, pages.

use std::{sync::Arc, time::Duration};

use crate::{
    error::{Miss, StoreError},
    event::{
        Durability, Event, InFlight, META_BYTES_MAX, NAME_BYTES_MAX, SessionId, Settings, Whose, head_hash,
    },
    key::{ClassId, PAGE_TOKENS, PageKey, TenantId},
    pages::{Handed, Kept, Page, PageWrite, lock},
    record::{PageHeader, PageName},
    session::{Session, Turn},
    store::{Inner, State, Store},
};

/// Pages looked up under one hold of the index.
const KEYS_STEP: usize = 512;

/// A session as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionInfo {
    /// Its id.
    pub id: SessionId,
    /// What its owner chose.
    pub settings: Settings,
    /// The session and turn it was forked from.
    pub parent: Option<(SessionId, u32)>,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Milliseconds since 1970.
    pub used_ms: u64,
    /// When it is removed, milliseconds since 1970.
    pub expires_ms: Option<u64>,
    /// Its turns.
    pub turn_count: u32,
    /// Its tokens.
    pub token_count: u32,
    /// It lost entries: it is whole up to its last turn, and may have been longer.
    pub is_damaged: bool,
    /// An answer was being made.
    pub in_flight: bool,
}

/// A point in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Its end.
    Head,
    /// After this turn; 0 is before the first.
    Turn(u32),
    /// After so many tokens.
    Token(u32),
}

/// A turn to append.
#[derive(Clone, Debug, Default)]
pub struct Append {
    /// How many turns the session has, as the caller believes; `None` takes what it finds.
    pub expected_turn: Option<u32>,
    /// How many of them stay: the turn takes the place of the others, in one entry. All, without it.
    pub kept_turns: Option<u32>,
    /// What the turn adds to the session's tokens.
    pub tokens: Vec<u32>,
    /// The server's own.
    pub meta: Vec<u8>,
    /// When to acknowledge, if not as the session says. `Ephemeral` counts as `Async` in a session that is on disk.
    pub durability: Option<Durability>,
}

/// An appended turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Its number.
    pub turn: u32,
    /// What it survives. Less than asked for only at `async`, where the journal failed.
    pub durability: Durability,
}

fn check_len(what: &'static str, found: usize, limit: usize) -> Result<(), StoreError> {
    if found > limit { Err(StoreError::TooLong { what, found, limit }) } else { Ok(()) }
}

fn check_settings(settings: &Settings) -> Result<(), StoreError> {
    check_len("name", settings.name.as_ref().map_or(0, String::len), NAME_BYTES_MAX)?;
    check_len("model", settings.model.len(), NAME_BYTES_MAX)?;
    check_len("metadata", settings.meta.len(), META_BYTES_MAX)
}

pub(crate) fn info(id: SessionId, session: &Session) -> SessionInfo {
    SessionInfo {
        id,
        settings: session.settings.clone(),
        parent: session.parent,
        created_ms: session.created_ms,
        used_ms: session.used_ms,
        expires_ms: session.expires_ms(),
        turn_count: session.turn_count(),
        token_count: session.len(),
        is_damaged: session.damaged,
        in_flight: session.in_flight.is_some(),
    }
}

/// Compare and set: the session's turn, if it is the one expected.
fn check_turn(session: &Session, expected: Option<u32>) -> Result<u32, StoreError> {
    let found = session.turn_count();
    match expected {
        Some(expected) if expected != found => Err(StoreError::Conflict { expected, found }),
        _ => Ok(found),
    }
}

/// The turn that a new one is to follow.
fn head_for(session: &Session, kept: Option<u32>) -> Result<Option<Arc<Turn>>, StoreError> {
    let (kept, have) = (kept.unwrap_or(session.turn_count()), session.turn_count());
    session.head_at(kept).ok_or(StoreError::Range { what: "turns", have, asked: kept })
}

fn len_at(session: &Session, at: At) -> Result<u32, StoreError> {
    match at {
        At::Head => Ok(session.len()),
        At::Token(len) if len <= session.len() => Ok(len),
        At::Token(asked) => Err(StoreError::Range { what: "tokens", have: session.len(), asked }),
        At::Turn(0) => Ok(0),
        At::Turn(asked) => session
            .turns()
            .find(|turn| turn.number == asked)
            .map(|turn| turn.end())
            .ok_or(StoreError::Range { what: "turns", have: session.turn_count(), asked }),
    }
}

impl State {
    pub(crate) fn session(&self, tenant: TenantId, id: SessionId) -> Result<&Session, StoreError> {
        self.table.get(tenant, id).ok_or(StoreError::NotFound)
    }

    /// The id of a new session, after all checks: the one asked for, or a new one.
    pub(crate) fn room(
        &mut self,
        inner: &Inner,
        tenant: TenantId,
        settings: &Settings,
        id: Option<SessionId>,
    ) -> Result<SessionId, StoreError> {
        check_settings(settings)?;
        if let Some(id) = id.filter(|&id| self.table.contains(id)) {
            return Err(StoreError::IdTaken(id));
        }
        if let Some(name) = &settings.name
            && self.table.named(tenant, name).is_some()
        {
            return Err(StoreError::NameTaken(name.clone()));
        }
        let limit = inner.pages.quota(tenant).sessions;
        if self.table.count(tenant) as u64 >= limit {
            return Err(StoreError::Quota { what: "sessions", limit });
        }
        if let Some(id) = id {
            return Ok(id);
        }
        let mut random = [0; 16];
        loop {
            inner.pages.keys.entropy().fill(&mut random);
            let low = u128::from_le_bytes(random) & ((1 << 80) - 1);
            let id = SessionId(u128::from(inner.now_ms(self)) << 80 | low);
            if !self.table.contains(id) {
                return Ok(id);
            }
        }
    }
}

impl Store {
    /// Makes a session.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::Quota`], [`StoreError::TooLong`], [`StoreError::Journal`].
    pub fn create(&self, tenant: TenantId, settings: Settings) -> Result<SessionInfo, StoreError> {
        let inner = &*self.inner;
        let mut state = lock(&inner.state);
        let id = state.room(inner, tenant, &settings, None)?;
        let (level, at_ms) = (settings.durability, inner.now_ms(&mut state));
        let logged = inner.record(
            &mut state,
            Whose { tenant, session: id },
            Event::Create { tenant, settings, at_ms },
            level,
        )?;
        let made = info(id, state.session(tenant, id)?);
        drop(state);
        inner.acknowledge(logged, level)?;
        Ok(made)
    }

    /// A session.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also where it is another tenant's.
    pub fn get(&self, tenant: TenantId, id: SessionId) -> Result<SessionInfo, StoreError> {
        Ok(info(id, lock(&self.inner.state).session(tenant, id)?))
    }

    /// The session of this id or name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn find(&self, tenant: TenantId, id_or_name: &str) -> Result<SessionId, StoreError> {
        let state = lock(&self.inner.state);
        let by_id = id_or_name.parse().ok().filter(|&id| state.table.get(tenant, id).is_some());
        by_id.or_else(|| state.table.named(tenant, id_or_name)).ok_or(StoreError::NotFound)
    }

    /// Sessions of a tenant after `after`, oldest first, at most `limit`.
    pub fn list(&self, tenant: TenantId, after: Option<SessionId>, limit: usize) -> Vec<SessionInfo> {
        let state = lock(&self.inner.state);
        let ids = state.table.ids(tenant, after).take(limit);
        ids.filter_map(|id| Some(info(id, state.table.get(tenant, id)?))).collect()
    }

    /// All tokens of a session.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn tokens(&self, tenant: TenantId, id: SessionId) -> Result<Vec<u32>, StoreError> {
        Ok(lock(&self.inner.state).session(tenant, id)?.tokens())
    }

    /// The turns of a session, oldest first.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn turns(&self, tenant: TenantId, id: SessionId) -> Result<Vec<Arc<Turn>>, StoreError> {
        let state = lock(&self.inner.state);
        let mut turns: Vec<_> = state.session(tenant, id)?.turns().cloned().collect();
        turns.reverse();
        Ok(turns)
    }

    /// All sessions with an answer that was being made.
    pub fn in_flight(&self) -> Vec<(TenantId, SessionId)> {
        let state = lock(&self.inner.state);
        let sessions = state.table.all().filter(|(_, session)| session.in_flight.is_some());
        sessions.map(|(id, session)| (session.tenant, id)).collect()
    }

    /// Appends a turn and returns when it is as durable as asked for.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] where the session is at another turn, [`StoreError::Range`] where fewer than
    /// `kept_turns` are there. At `turn` and `full`, [`StoreError::Journal`] and
    /// [`StoreError::Pages`]: the turn is not acknowledged; after the former it may be there or not, and
    /// [`Store::get`] tells.
    pub fn append_turn(
        &self,
        tenant: TenantId,
        id: SessionId,
        append: Append,
    ) -> Result<Appended, StoreError> {
        check_len("turn metadata", append.meta.len(), META_BYTES_MAX)?;
        let inner = &*self.inner;
        let own = lock(&inner.state).session(tenant, id)?.settings.durability;
        let level = match append.durability {
            _ if own == Durability::Ephemeral => own,
            asked => asked.unwrap_or(own).max(Durability::Async),
        };
        if level == Durability::Full {
            // Before the turn, so that a failure leaves the session as it was.
            inner.sync_pages()?;
            inner.check_pages(tenant, id, &append)?;
        }
        let mut state = lock(&inner.state);
        let session = state.session(tenant, id)?;
        check_turn(session, append.expected_turn)?;
        let head = head_for(session, append.kept_turns)?;
        let longest = (u32::MAX - head.as_ref().map_or(0, |turn| turn.end())) as usize;
        check_len("turn", append.tokens.len(), longest)?;
        let (number, before) = head.map_or((1, [0; 16]), |turn| (turn.number + 1, turn.hash));
        let at_ms = inner.now_ms(&mut state);
        let event = Event::Turn { number, before, at_ms, tokens: append.tokens, meta: append.meta };
        let logged = inner.record(&mut state, Whose { tenant, session: id }, event, level)?;
        drop(state);
        Ok(Appended { turn: number, durability: inner.acknowledge(logged, level)? })
    }

    /// Makes a session that begins with the tokens of another up to `at`: one journal entry, no page. It has the
    /// other's settings but for its name and pin.
    ///
    /// # Errors
    /// [`StoreError::Range`] and those of [`Store::create`].
    pub fn fork(
        &self,
        tenant: TenantId,
        of: SessionId,
        at: At,
        name: Option<String>,
    ) -> Result<SessionInfo, StoreError> {
        let inner = &*self.inner;
        let mut state = lock(&inner.state);
        let from = state.session(tenant, of)?;
        let settings = Settings { name, pinned: false, ..from.settings.clone() };
        let (len, level) = (len_at(from, at)?, settings.durability);
        let hash = hash_at(from, len);
        let id = state.room(inner, tenant, &settings, None)?;
        let at_ms = inner.now_ms(&mut state);
        let logged = inner.record(
            &mut state,
            Whose { tenant, session: id },
            Event::Fork { of, len, hash, settings, at_ms },
            level,
        )?;
        let made = info(id, state.session(tenant, id)?);
        drop(state);
        inner.acknowledge(logged, level)?;
        Ok(made)
    }

    /// Takes a session back to `at`. What came after stays with its forks.
    ///
    /// # Errors
    /// [`StoreError::Conflict`], [`StoreError::Range`], [`StoreError::Journal`].
    pub fn rollback(
        &self,
        tenant: TenantId,
        id: SessionId,
        at: At,
        expected_turn: Option<u32>,
    ) -> Result<SessionInfo, StoreError> {
        let inner = &*self.inner;
        let mut state = lock(&inner.state);
        let session = state.session(tenant, id)?;
        check_turn(session, expected_turn)?;
        let (len, level) = (len_at(session, at)?, session.settings.durability);
        let (hash, at_ms) = (hash_at(session, len), inner.now_ms(&mut state));
        let logged = inner.record(
            &mut state,
            Whose { tenant, session: id },
            Event::Rollback { len, hash, at_ms },
            level,
        )?;
        let now = info(id, state.session(tenant, id)?);
        drop(state);
        inner.acknowledge(logged, level)?;
        Ok(now)
    }

    /// Changes a session's settings. Whether it is on disk stays as it was made.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::TooLong`], [`StoreError::Journal`].
    pub fn patch(
        &self,
        tenant: TenantId,
        id: SessionId,
        change: impl FnOnce(&mut Settings),
    ) -> Result<SessionInfo, StoreError> {
        let inner = &*self.inner;
        let mut state = lock(&inner.state);
        let old = state.session(tenant, id)?.settings.clone();
        let mut settings = old.clone();
        change(&mut settings);
        check_settings(&settings)?;
        settings.durability = match old.durability {
            Durability::Ephemeral => Durability::Ephemeral,
            _ => settings.durability.max(Durability::Async),
        };
        if let Some(name) = settings.name.as_ref().filter(|_| settings.name != old.name)
            && state.table.named(tenant, name).is_some()
        {
            return Err(StoreError::NameTaken(name.clone()));
        }
        let (level, at_ms) = (settings.durability, inner.now_ms(&mut state));
        let logged =
            inner.record(&mut state, Whose { tenant, session: id }, Event::Set { settings, at_ms }, level)?;
        let now = info(id, state.session(tenant, id)?);
        drop(state);
        inner.acknowledge(logged, level)?;
        Ok(now)
    }

    /// Removes a session; its forks stay.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Journal`].
    pub fn delete(&self, tenant: TenantId, id: SessionId) -> Result<(), StoreError> {
        let inner = &*self.inner;
        let mut state = lock(&inner.state);
        let level = state.session(tenant, id)?.settings.durability;
        let logged = inner.record(&mut state, Whose { tenant, session: id }, Event::Delete, level)?;
        drop(state);
        inner.acknowledge(logged, level).map(|_| ())
    }

    /// Begins an answer: what is needed to go on with it after a crash. It takes the place of one that was not ended.
    ///
    /// # Errors
    /// [`StoreError::Conflict`], [`StoreError::Journal`].
    pub fn begin_answer(
        &self,
        tenant: TenantId,
        id: SessionId,
        expected_turn: Option<u32>,
        in_flight: InFlight,
    ) -> Result<(), StoreError> {
        check_len("answer metadata", in_flight.meta.len(), META_BYTES_MAX)?;
        self.record_async(tenant, id, |session| {
            check_turn(session, expected_turn)?;
            Ok(Event::Begin { in_flight })
        })
    }

    /// Adds tokens to the answer in flight. Durable like level `async`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] where none is in flight.
    pub fn extend_answer(&self, tenant: TenantId, id: SessionId, tokens: &[u32]) -> Result<(), StoreError> {
        self.record_async(tenant, id, |session| {
            let at = session.in_flight.as_ref().ok_or(StoreError::NotFound)?.tokens.len() as u32;
            Ok(Event::Extend { at, tokens: tokens.to_vec() })
        })
    }

    /// Forgets the answer in flight. A turn that is appended does so too.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Journal`].
    pub fn drop_answer(&self, tenant: TenantId, id: SessionId) -> Result<(), StoreError> {
        self.record_async(tenant, id, |_| Ok(Event::Drop))
    }

    /// The answer in flight.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn answer(&self, tenant: TenantId, id: SessionId) -> Result<Option<InFlight>, StoreError> {
        Ok(lock(&self.inner.state).session(tenant, id)?.in_flight.clone())
    }

    fn record_async(
        &self,
        tenant: TenantId,
        id: SessionId,
        event: impl FnOnce(&Session) -> Result<Event, StoreError>,
    ) -> Result<(), StoreError> {
        let mut state = lock(&self.inner.state);
        let session = state.session(tenant, id)?;
        let (event, level) = (event(session)?, session.settings.durability.min(Durability::Async));
        self.inner.record(&mut state, Whose { tenant, session: id }, event, level).map(|_| ())
    }

    /// Whether the store has this page.
    pub fn contains(&self, name: &PageName) -> bool {
        self.inner.pages.contains(name)
    }

    /// How many of `keys`, from the first on, have a page of `like`'s tenant, class, group and kind.
    pub fn chain_len(&self, like: &PageName, keys: &[PageKey]) -> usize {
        self.inner.pages.chain_len(like, keys)
    }

    /// Of each of `keys`, whether there is a page of `like`'s tenant, class, group and kind.
    pub fn held(&self, like: &PageName, keys: &[PageKey]) -> Vec<bool> {
        self.inner.pages.held(like, keys)
    }

    /// Who computed the pages of this store: for callers that take another class's pages as equivalent.
    pub fn classes(&self) -> Vec<ClassId> {
        self.inner.pages.classes()
    }

    /// The longest tail page of `like`'s tenant, class, group and kind that stands after `parent` and that `tokens`
    /// begin with; its name and tokens.
    pub fn find_tail(&self, like: &PageName, parent: PageKey, tokens: &[u32]) -> Option<(PageName, usize)> {
        lock(&self.inner.pages.index).tail(like, parent, tokens)
    }

    /// Reads the page that `wanted` describes: every field of it is compared, and the payload proven.
    ///
    /// # Errors
    /// A [`Miss`]: the page is to be computed. One that was damaged is let go.
    pub fn read(&self, wanted: &PageHeader) -> Result<Page, Miss> {
        self.inner.pages.read(wanted)
    }

    /// Reads pages on the store's own threads, in order, and hands the results to `done`, once. Where they are not there
    /// within `patience`, all of them are [`Miss::Late`], whatever the disk does. Pages after the first miss are not
    /// read: nothing could use them.
    pub fn start_read(
        &self,
        wanted: Vec<PageHeader>,
        patience: Duration,
        done: impl FnOnce(Vec<Result<Page, Miss>>) + Send + 'static,
    ) {
        match self.readers() {
            Some(readers) => readers.start_job(wanted, patience, Box::new(done)),
            None => done(crate::reader::read_in_order(&self.inner, &wanted, u64::MAX)),
        }
    }

    /// Hands over a page to be written behind. Never waits. `digest` is the BLAKE3 that the device made of the payload
    /// when it sealed the page; a payload that is another by the time it is written is discarded and counted.
    pub fn write(&self, header: PageHeader, payload: Box<[u8]>, digest: [u8; 32]) -> Handed {
        self.inner.pages.hand(PageWrite { header, payload, digest }, Duration::ZERO)
    }

    /// Like [`Store::write`], but waits up to `patience` for room: for level `full`.
    pub fn write_patiently(
        &self,
        header: PageHeader,
        payload: Box<[u8]>,
        digest: [u8; 32],
        patience: Duration,
    ) -> Handed {
        if !self.inner.pages.options.threads {
            self.inner.pages.wait_written(Duration::ZERO);
        }
        self.inner.pages.hand(PageWrite { header, payload, digest }, patience)
    }

    /// Waits until all pages handed over before this call are with the system, where a killed process leaves them.
    /// False after `patience`.
    pub fn wait_written(&self, patience: Duration) -> bool {
        self.inner.pages.wait_written(patience)
    }
}

/// The hash of a session's first `len` tokens, as its cut head will have it.
fn hash_at(session: &Session, len: u32) -> [u8; 16] {
    let turn = session.turns().find(|turn| turn.start < len);
    turn.map_or([0; 16], |turn| {
        if turn.end() <= len {
            return turn.hash;
        }
        let before = turn.parent.as_ref().map_or([0; 16], |parent| parent.hash);
        head_hash(before, &turn.tokens[..(len - turn.start) as usize])
    })
}

impl Inner {
    /// Makes an entry as durable as `level` asks; what it survives.
    pub(crate) fn acknowledge(
        &self,
        (logged, lsn): (Durability, u64),
        level: Durability,
    ) -> Result<Durability, StoreError> {
        if level < Durability::Turn {
            return Ok(logged);
        }
        self.commit(lsn)?;
        Ok(level)
    }

    /// Whether the full pages of a session and the tokens it is to get are in segments. The last token of a turn
    /// need not have been computed.
    fn check_pages(&self, tenant: TenantId, id: SessionId, append: &Append) -> Result<(), StoreError> {
        let (root, mut tokens) = {
            let state = lock(&self.state);
            let session = state.session(tenant, id)?;
            let Some(root) = session.settings.root else { return Ok(()) };
            (root, Session::tokens_to(head_for(session, append.kept_turns)?.as_ref()))
        };
        tokens.extend_from_slice(&append.tokens);
        tokens.truncate(tokens.len().saturating_sub(1) / PAGE_TOKENS * PAGE_TOKENS);
        let chain = lock(&self.tenants).chain(tenant).ok_or(StoreError::NotFound)?;
        let keys: Vec<_> = chain.keys(root, &tokens).collect();
        let is_there = |keys: &[PageKey]| {
            let index = lock(&self.pages.index);
            keys.iter().filter(|&&key| index.contains_key(tenant, key)).count()
        };
        let have: usize = keys.chunks(KEYS_STEP).map(is_there).sum();
        if have < keys.len() {
            return Err(StoreError::Pages(format!("{have} of {} pages are on disk", keys.len())));
        }
        Ok(())
    }

    /// What eviction treats apart: the pages of pinned sessions and those of level `full`, newest sessions first
    /// within the quota of pinned bytes; and those of sessions with a priority.
    pub(crate) fn kept(&self, tenant: TenantId) -> Kept {
        let mut kept = Kept::default();
        let Some(chain) = lock(&self.tenants).chain(tenant) else { return kept };
        let sessions: Vec<_> = {
            let state = lock(&self.state);
            let ids: Vec<_> = state.table.ids(tenant, None).collect();
            let sessions = ids.iter().rev().filter_map(|&id| state.table.get(tenant, id));
            let pins = |s: &Session| s.settings.pinned || s.settings.durability == Durability::Full;
            let apart = sessions.filter(|s| pins(s) || s.settings.priority > 0);
            // Turns are shared: a copy of the session has no copy of its tokens.
            apart.filter_map(|s| Some((s.settings.root?, s.clone(), pins(s)))).collect()
        };
        let mut left = self.pages.quota(tenant).pinned_bytes;
        for (root, session, pins) in sessions {
            let keys: Vec<_> = chain.keys(root, &session.tokens()).collect();
            for keys in keys.chunks(KEYS_STEP) {
                let index = lock(&self.pages.index);
                for &key in keys {
                    let bytes = index.key_bytes(tenant, key);
                    kept.preferred.insert(key);
                    if pins && bytes <= left && kept.pinned.insert(key) {
                        left -= bytes;
                    }
                }
            }
        }
        kept
    }
}
