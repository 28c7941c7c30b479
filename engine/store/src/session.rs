//! The table of sessions: what the journal's entries make when applied in order.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::{
    event::{Event, HeadHash, InFlight, NodeEvent, SessionId, Settings, WholeEvent, Whose, head_hash},
    key::TenantId,
};

/// One exchange, or the part of one that a fork or a rollback kept. Shared by all sessions that contain it.
#[derive(Debug)]
pub struct Turn {
    pub(crate) id: u64,
    pub(crate) parent: Option<Arc<Turn>>,
    /// From 1 on.
    pub number: u32,
    /// Tokens of the session before this turn.
    pub start: u32,
    /// The turn's own.
    pub tokens: Vec<u32>,
    /// The server's own; empty where the turn was cut.
    pub meta: Vec<u8>,
    /// When it was appended, milliseconds since 1970.
    pub at_ms: u64,
    pub(crate) hash: HeadHash,
}

impl Turn {
    /// Tokens of the session up to and with this turn.
    pub fn end(&self) -> u32 {
        self.start + self.tokens.len() as u32
    }
}

impl Drop for Turn {
    /// Lets long histories go in a loop: the compiler's own way would recurse once a turn.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(mut turn) = next.and_then(Arc::into_inner) {
            next = turn.parent.take();
        }
    }
}

/// A session in the table.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) tenant: TenantId,
    pub(crate) settings: Settings,
    pub(crate) parent: Option<(SessionId, u32)>,
    pub(crate) created_ms: u64,
    pub(crate) used_ms: u64,
    pub(crate) head: Option<Arc<Turn>>,
    pub(crate) in_flight: Option<InFlight>,
    /// Entries of it were lost: it is whole up to its head, and may have been longer.
    pub(crate) damaged: bool,
}

impl Session {
    pub(crate) fn turn_count(&self) -> u32 {
        self.head.as_ref().map_or(0, |turn| turn.number)
    }

    pub(crate) fn len(&self) -> u32 {
        self.head.as_ref().map_or(0, |turn| turn.end())
    }

    pub(crate) fn hash(&self) -> HeadHash {
        self.head.as_ref().map_or([0; 16], |turn| turn.hash)
    }

    pub(crate) fn expires_ms(&self) -> Option<u64> {
        self.settings.ttl_ms.map(|ttl| self.used_ms.saturating_add(ttl))
    }

    /// Its turns, newest first.
    pub(crate) fn turns(&self) -> impl Iterator<Item = &Arc<Turn>> {
        std::iter::successors(self.head.as_ref(), |turn| turn.parent.as_ref())
    }

    /// The head of a session that has the first `count` turns of this one; `None` if there are fewer.
    pub(crate) fn head_at(&self, count: u32) -> Option<Option<Arc<Turn>>> {
        if count == 0 {
            return Some(None);
        }
        self.turns().find(|turn| turn.number == count).map(|turn| Some(turn.clone()))
    }

    /// Its tokens up to and with a turn.
    pub(crate) fn tokens_to(head: Option<&Arc<Turn>>) -> Vec<u32> {
        let mut tokens = vec![0; head.map_or(0, |turn| turn.end() as usize)];
        for turn in std::iter::successors(head, |turn| turn.parent.as_ref()) {
            tokens[turn.start as usize..turn.end() as usize].copy_from_slice(&turn.tokens);
        }
        tokens
    }

    pub(crate) fn tokens(&self) -> Vec<u32> {
        Self::tokens_to(self.head.as_ref())
    }

    /// The head of a session that has the first `len` tokens of this one; `None` if there are fewer.
    pub(crate) fn cut(&self, len: u32, id: u64) -> Option<Option<Arc<Turn>>> {
        if len > self.len() {
            return None;
        }
        let Some(turn) = self.turns().find(|turn| turn.start < len) else { return Some(None) };
        if turn.end() == len {
            return Some(Some(turn.clone()));
        }
        let tokens = turn.tokens[..(len - turn.start) as usize].to_vec();
        let hash = head_hash(turn.parent.as_ref().map_or([0; 16], |parent| parent.hash), &tokens);
        let parent = turn.parent.clone();
        let (number, start, at_ms) = (turn.number, turn.start, turn.at_ms);
        Some(Some(Arc::new(Turn { id, parent, number, start, tokens, meta: Vec::new(), at_ms, hash })))
    }
}

/// An entry does not fit the sessions before it: something between was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rejected(pub(crate) &'static str);

/// All sessions of a store.
#[derive(Debug, Default)]
pub(crate) struct Table {
    sessions: BTreeMap<SessionId, Session>,
    by_tenant: HashMap<TenantId, BTreeSet<SessionId>>,
    by_name: HashMap<(TenantId, String), SessionId>,
    /// Turns of a base by id, while it is read.
    nodes: HashMap<u64, Arc<Turn>>,
    /// The newest whole turn of each session of a base, while it is read.
    last_node: HashMap<SessionId, Arc<Turn>>,
}

impl Table {
    /// A tenant's session; another's is as if it were not there.
    pub(crate) fn get(&self, tenant: TenantId, id: SessionId) -> Option<&Session> {
        self.sessions.get(&id).filter(|session| session.tenant == tenant)
    }

    pub(crate) fn contains(&self, id: SessionId) -> bool {
        self.sessions.contains_key(&id)
    }

    pub(crate) fn named(&self, tenant: TenantId, name: &str) -> Option<SessionId> {
        self.by_name.get(&(tenant, name.to_owned())).copied()
    }

    /// Ids of a tenant after `after`, oldest first.
    pub(crate) fn ids(&self, tenant: TenantId, after: Option<SessionId>) -> impl Iterator<Item = SessionId> {
        let ids = self.by_tenant.get(&tenant).into_iter().flatten().copied();
        ids.skip_while(move |id| after.is_some_and(|after| *id <= after))
    }

    pub(crate) fn count(&self, tenant: TenantId) -> usize {
        self.by_tenant.get(&tenant).map_or(0, BTreeSet::len)
    }

    pub(crate) fn len(&self) -> usize {
        self.sessions.len()
    }

    pub(crate) fn counts(&self) -> Vec<(TenantId, usize)> {
        let counts = self.by_tenant.iter().map(|(tenant, ids)| (*tenant, ids.len()));
        counts.filter(|(_, count)| *count > 0).collect()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (SessionId, &Session)> {
        self.sessions.iter().map(|(id, session)| (*id, session))
    }

    pub(crate) fn mark_damaged(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.damaged = true;
        }
    }

    pub(crate) fn drop_answer(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.in_flight = None;
        }
    }

    /// Ends the reading of a journal or a bundle: turns that no session has are let go.
    pub(crate) fn end_replay(&mut self) {
        self.nodes.clear();
        self.last_node.clear();
    }

    /// Applies one entry. `lsn` becomes the id of a turn it makes. Every entry states the tokens it builds on, so that
    /// one whose ground was lost is rejected and changes nothing (but a whole session, which keeps what is left).
    pub(crate) fn apply(&mut self, lsn: u64, id: SessionId, event: Event) -> Result<(), Rejected> {
        match event {
            Event::Start { .. } | Event::BaseEnd { .. } => Ok(()),
            Event::Create { tenant, settings, at_ms } => {
                self.insert(id, Session::new(tenant, settings, at_ms))
            }
            Event::Fork { of, len, hash, settings, at_ms } => {
                let from = self.sessions.get(&of).ok_or(Rejected("fork of an unknown session"))?;
                let head = from.cut(len, lsn).ok_or(Rejected("fork past the end"))?;
                let mut session = Session::new(from.tenant, settings, at_ms);
                session.parent = Some((of, head.as_ref().map_or(0, |turn| turn.number)));
                session.head = head;
                if session.hash() != hash {
                    return Err(Rejected("fork of other tokens"));
                }
                self.insert(id, session)
            }
            Event::Node(node) => self.node(id, node),
            Event::Whole(whole) => self.whole(id, *whole),
            Event::Delete => {
                let session = self.sessions.remove(&id).ok_or(Rejected("unknown session"))?;
                self.by_tenant.entry(session.tenant).or_default().remove(&id);
                if let Some(name) = session.settings.name {
                    self.by_name.remove(&(session.tenant, name));
                }
                Ok(())
            }
            Event::Set { settings, at_ms } => self.set(id, settings, at_ms),
            Event::Turn { number, before, at_ms, tokens, meta } => {
                let session = self.session(id)?;
                let parent = number.checked_sub(1).and_then(|kept| session.head_at(kept));
                let parent = parent.filter(|head| head.as_ref().map_or([0; 16], |turn| turn.hash) == before);
                let parent = parent.ok_or(Rejected("turn after other tokens"))?;
                let start = parent.as_ref().map_or(0, |turn| turn.end());
                let hash = head_hash(before, &tokens);
                session.head =
                    Some(Arc::new(Turn { id: lsn, parent, number, start, tokens, meta, at_ms, hash }));
                session.used_ms = session.used_ms.max(at_ms);
                session.in_flight = None;
                Ok(())
            }
            Event::Rollback { len, hash, at_ms } => {
                let session = self.session(id)?;
                let head = session.cut(len, lsn).ok_or(Rejected("rollback past the end"))?;
                if head.as_ref().map_or([0; 16], |turn| turn.hash) != hash {
                    return Err(Rejected("rollback to other tokens"));
                }
                session.head = head;
                session.used_ms = session.used_ms.max(at_ms);
                session.in_flight = None;
                Ok(())
            }
            Event::Begin { in_flight } => {
                self.session(id)?.in_flight = Some(in_flight);
                Ok(())
            }
            Event::Extend { at, tokens } => {
                let session = self.session(id)?;
                match &mut session.in_flight {
                    Some(in_flight) if in_flight.tokens.len() == at as usize => {
                        in_flight.tokens.extend(tokens);
                        Ok(())
                    }
                    _ => Err(Rejected("tokens of an answer after others")),
                }
            }
            Event::Drop => {
                self.session(id)?.in_flight = None;
                Ok(())
            }
        }
    }

    fn session(&mut self, id: SessionId) -> Result<&mut Session, Rejected> {
        self.sessions.get_mut(&id).ok_or(Rejected("unknown session"))
    }

    fn insert(&mut self, id: SessionId, session: Session) -> Result<(), Rejected> {
        if self.sessions.contains_key(&id) {
            return Err(Rejected("session made twice"));
        }
        if let Some(name) = &session.settings.name {
            let name = (session.tenant, name.clone());
            if self.by_name.contains_key(&name) {
                return Err(Rejected("name taken"));
            }
            self.by_name.insert(name, id);
        }
        self.by_tenant.entry(session.tenant).or_default().insert(id);
        self.sessions.insert(id, session);
        Ok(())
    }

    fn set(&mut self, id: SessionId, settings: Settings, at_ms: u64) -> Result<(), Rejected> {
        let session = self.sessions.get_mut(&id).ok_or(Rejected("unknown session"))?;
        if settings.name != session.settings.name {
            let name = settings.name.clone().map(|name| (session.tenant, name));
            if name.as_ref().is_some_and(|name| self.by_name.contains_key(name)) {
                return Err(Rejected("name taken"));
            }
            if let Some(old) = &session.settings.name {
                self.by_name.remove(&(session.tenant, old.clone()));
            }
            self.by_name.extend(name.map(|name| (name, id)));
        }
        session.settings = settings;
        session.used_ms = session.used_ms.max(at_ms);
        Ok(())
    }

    fn node(&mut self, session: SessionId, node: NodeEvent) -> Result<(), Rejected> {
        let parent = match node.parent {
            Some(id) => Some(self.nodes.get(&id).ok_or(Rejected("turn after a lost one"))?.clone()),
            None => None,
        };
        let before = parent.as_ref().map_or([0; 16], |parent| parent.hash);
        if head_hash(before, &node.tokens) != node.hash {
            return Err(Rejected("turn after other tokens"));
        }
        let start = parent.as_ref().map_or(0, |parent| parent.end());
        let NodeEvent { id, number, tokens, meta, at_ms, hash, .. } = node;
        let turn = Arc::new(Turn { id, parent, number, start, tokens, meta, at_ms, hash });
        self.last_node.insert(session, turn.clone());
        self.nodes.insert(id, turn);
        Ok(())
    }

    fn whole(&mut self, id: SessionId, whole: WholeEvent) -> Result<(), Rejected> {
        let head = whole.head.and_then(|head| self.nodes.get(&head).cloned());
        let mut session = Session {
            tenant: whole.tenant,
            settings: whole.settings,
            parent: whole.parent,
            created_ms: whole.created_ms,
            used_ms: whole.used_ms,
            head,
            in_flight: whole.in_flight,
            damaged: whole.damaged,
        };
        let lost = session.hash() != whole.hash;
        if lost {
            session.head = self.last_node.get(&id).cloned();
            session.in_flight = None;
            session.damaged = true;
        }
        self.insert(id, session)?;
        if lost { Err(Rejected("session of lost turns")) } else { Ok(()) }
    }

    /// The entries that make the durable part of this table anew, parents before children.
    pub(crate) fn entries(&self) -> Vec<(Whose, Event)> {
        let (mut events, mut written) = (Vec::new(), BTreeSet::new());
        let durable = self.all().filter(|(_, session)| session.is_durable());
        for (id, session) in durable {
            let whose = Whose { tenant: session.tenant, session: id };
            let new: Vec<_> = session.turns().take_while(|turn| !written.contains(&turn.id)).collect();
            for turn in new.into_iter().rev() {
                written.insert(turn.id);
                let node = NodeEvent {
                    id: turn.id,
                    parent: turn.parent.as_ref().map(|parent| parent.id),
                    number: turn.number,
                    at_ms: turn.at_ms,
                    tokens: turn.tokens.clone(),
                    meta: turn.meta.clone(),
                    hash: turn.hash,
                };
                events.push((whose, Event::Node(node)));
            }
            events.push((whose, Event::Whole(Box::new(session.whole()))));
        }
        events
    }
}

impl Session {
    fn new(tenant: TenantId, settings: Settings, at_ms: u64) -> Self {
        Self {
            tenant,
            settings,
            parent: None,
            created_ms: at_ms,
            used_ms: at_ms,
            head: None,
            in_flight: None,
            damaged: false,
        }
    }

    pub(crate) fn is_durable(&self) -> bool {
        self.settings.durability != crate::event::Durability::Ephemeral
    }

    fn whole(&self) -> WholeEvent {
        WholeEvent {
            tenant: self.tenant,
            settings: self.settings.clone(),
            parent: self.parent,
            created_ms: self.created_ms,
            used_ms: self.used_ms,
            damaged: self.damaged,
            head: self.head.as_ref().map(|turn| turn.id),
            hash: self.hash(),
            in_flight: self.in_flight.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SessionId = SessionId(1);
    const FORK: SessionId = SessionId(2);

    /// The entries of a session that was cut inside its first turn, went on, and was forked; by the table's own hashes.
    fn entries() -> Vec<(SessionId, Event)> {
        let (tenant, settings) = (TenantId([0; 16]), Settings::default());
        let whole = head_hash([0; 16], &[1, 2, 3]);
        let cut = head_hash([0; 16], &[1]);
        let turn = |number, before, tokens: &[u32]| Event::Turn {
            number,
            before,
            at_ms: 0,
            tokens: tokens.to_vec(),
            meta: vec![],
        };
        vec![
            (ID, Event::Create { tenant, settings: settings.clone(), at_ms: 0 }),
            (ID, turn(1, [0; 16], &[1, 2, 3])),
            (ID, Event::Rollback { len: 1, hash: cut, at_ms: 0 }),
            (ID, turn(2, cut, &[9, 9])),
            (FORK, Event::Fork { of: ID, len: 3, hash: head_hash(cut, &[9, 9]), settings, at_ms: 0 }),
            (ID, Event::Rollback { len: 2, hash: head_hash(cut, &[9]), at_ms: 0 }),
            (ID, turn(3, head_hash(cut, &[9]), &[5])),
            (ID, turn(2, cut, &[7, 7])),
            (ID, turn(1, whole, &[4])),
        ]
    }

    fn tokens(table: &Table, id: SessionId) -> Option<Vec<u32>> {
        table.all().find(|(found, _)| *found == id).map(|(_, session)| session.tokens())
    }

    #[test]
    fn entries_in_order_make_the_session() {
        let mut table = Table::default();
        let entries = entries();
        let fits = entries.len() - 1;
        for (lsn, (id, event)) in entries.into_iter().enumerate() {
            assert_eq!(table.apply(lsn as u64, id, event).is_ok(), lsn < fits, "entry {lsn}");
        }
        assert_eq!(
            tokens(&table, ID),
            Some(vec![1, 7, 7]),
            "the second turn was replaced, and the third is gone"
        );
        assert_eq!(tokens(&table, FORK), Some(vec![1, 9, 9]));
    }

    #[test]
    fn entries_after_a_lost_one_are_rejected_and_change_nothing() {
        let mut table = Table::default();
        for (lsn, (id, event)) in entries().into_iter().enumerate() {
            // The first rollback is lost: numbers and lengths would still fit.
            if lsn != 2 {
                assert_eq!(table.apply(lsn as u64, id, event).is_ok(), lsn < 2, "entry {lsn}");
            }
        }
        assert_eq!(tokens(&table, ID), Some(vec![1, 2, 3]));
        assert_eq!(tokens(&table, FORK), None);
    }

    #[test]
    fn a_base_makes_the_table_again() {
        let mut table = Table::default();
        entries().into_iter().enumerate().for_each(|(lsn, (id, event))| {
            let _ = table.apply(lsn as u64, id, event);
        });
        let base = table.entries();
        let mut again = Table::default();
        for (whose, event) in base.clone() {
            again.apply(0, whose.session, event).unwrap();
        }
        again.end_replay();
        assert_eq!(again.entries(), base);
        // Without its first turn a session keeps nothing, and says so.
        let mut less = Table::default();
        let results: Vec<_> =
            base.into_iter().skip(1).map(|(whose, e)| less.apply(0, whose.session, e).is_ok()).collect();
        assert!(results.iter().any(|ok| !ok));
        assert!(less.all().all(|(_, session)| session.damaged && session.len() == 0));
    }
}
