//! The end of the process or of the power at any moment: what was acknowledged is there, and nothing else is invented.

use std::collections::BTreeMap;

use mainstay_store::{
    Append, At, Durability, InFlight, Options, Quota, SessionId, Settings, Store, StoreError, Tenant,
    sim::{Ending, Random, SimDisk},
};

use crate::rig::{Rig, hand, headers, read_pages, settings, tokens};

/// What clients were told, and what they may find besides.
#[derive(Default)]
struct Oracle {
    sessions: BTreeMap<SessionId, Known>,
}

/// Tokens of a session; `None` where it is gone.
type Content = Option<Vec<u32>>;

struct Known {
    acknowledged: Content,
    /// What it was before changes that a power loss may undo.
    earlier: Vec<Content>,
    /// What it is if the call that was cut off happened.
    cut_off: Option<Content>,
    durability: Durability,
}

impl Oracle {
    fn ready(&mut self, id: SessionId, durability: Durability, now: Content) {
        let new = Known { acknowledged: None, earlier: Vec::new(), cut_off: None, durability };
        let known = self.sessions.entry(id).or_insert(new);
        let before = std::mem::replace(&mut known.acknowledged, now);
        if durability == Durability::Async {
            known.earlier.push(before);
        }
    }

    fn maybe(&mut self, id: SessionId, then: Content) {
        self.sessions.get_mut(&id).unwrap().cut_off = Some(then);
    }

    /// Compares a store with what it must have, and goes on from what it has.
    fn check(&mut self, store: &Store, tenant: &Tenant, ending: Ending, what: &str) {
        for info in store.list(tenant.id, None, usize::MAX) {
            // Of unsynced entries a later one may be there without an earlier: then the session says so.
            let may_be = ending == Ending::PowerLoss && info.settings.durability == Durability::Async;
            assert!(may_be || !info.is_damaged, "{what}: {info:?}");
        }
        for (id, known) in &mut self.sessions {
            let found = store.tokens(tenant.id, *id).ok();
            let undone = ending == Ending::PowerLoss && known.earlier.contains(&found);
            assert!(
                found == known.acknowledged || known.cut_off.as_ref() == Some(&found) || undone,
                "{what}: session {id} at {:?} has {found:?}, was told {:?}",
                known.durability,
                known.acknowledged
            );
            *known = Known {
                acknowledged: found,
                earlier: Vec::new(),
                cut_off: None,
                durability: known.durability,
            };
        }
    }
}

/// One client that does what the numbers say until the machine goes off.
struct Client<'a> {
    disk: &'a SimDisk,
    store: &'a Store,
    tenant: Tenant,
    random: &'a mut Random,
    oracle: &'a mut Oracle,
    alive: Vec<SessionId>,
}

impl Client<'_> {
    fn step(&mut self) -> Result<(), StoreError> {
        let durability =
            [Durability::Async, Durability::Turn, Durability::Full][self.random.below(3) as usize];
        if self.alive.len() < 2 {
            let id = self.store.create(self.tenant.id, settings(&self.tenant, durability))?.id;
            if !self.disk.is_dead() {
                self.oracle.ready(id, durability, Some(Vec::new()));
                self.alive.push(id);
            }
            return Ok(());
        }
        let id = self.alive[self.random.below(self.alive.len() as u64) as usize];
        let durability = self.oracle.sessions[&id].durability;
        let now = self.oracle.sessions[&id].acknowledged.clone().unwrap_or_default();
        let (then, called) = match self.random.below(12) {
            0 if self.alive.len() < 6 => {
                let len = self.random.below(now.len() as u64 + 1) as usize;
                let fork = self.store.fork(self.tenant.id, id, At::Token(len as u32), None)?.id;
                if !self.disk.is_dead() {
                    self.oracle.ready(fork, durability, Some(now[..len].to_vec()));
                    self.alive.push(fork);
                }
                return Ok(());
            }
            1 => {
                let len = self.random.below(now.len() as u64 + 1) as usize;
                let called = self.store.rollback(self.tenant.id, id, At::Token(len as u32), None);
                (Some(now[..len].to_vec()), called.map(drop))
            }
            2 => {
                self.alive.retain(|&other| other != id);
                (None, self.store.delete(self.tenant.id, id))
            }
            3 => {
                let ttl_ms = Some(1 << 40);
                (Some(now), self.store.patch(self.tenant.id, id, |s| s.ttl_ms = ttl_ms).map(drop))
            }
            4 => {
                let in_flight = InFlight { meta: vec![1], tokens: vec![2] };
                let called = self.store.begin_answer(self.tenant.id, id, None, in_flight);
                let called = called.and_then(|()| self.store.extend_answer(self.tenant.id, id, &[3]));
                (Some(now), called)
            }
            5 => {
                self.store.maintain()?;
                return Ok(());
            }
            _ => {
                let count = 1 + self.random.below(60) as usize;
                let new = tokens(self.random.bits(), count);
                let turns = self.store.turns(self.tenant.id, id)?;
                let replaces = self.random.below(4) == 0;
                let kept = replaces.then(|| self.random.below(turns.len() as u64 + 1) as usize);
                let kept_len = match kept {
                    Some(0) => 0,
                    Some(kept) => turns[kept - 1].end() as usize,
                    None => now.len(),
                };
                let then = [&now[..kept_len], &new].concat();
                for header in headers(&self.tenant, &then) {
                    hand(self.store, header);
                }
                let kept_turns = kept.map(|kept| kept as u32);
                let append = Append { kept_turns, tokens: new, meta: vec![9; 5], ..Append::default() };
                (Some(then), self.store.append_turn(self.tenant.id, id, append).map(drop))
            }
        };
        match called {
            // No answer leaves a machine that is off.
            Ok(()) if !self.disk.is_dead() => self.oracle.ready(id, durability, then),
            _ => self.oracle.maybe(id, then),
        }
        self.store.step();
        match called {
            // Pinned pages may fill the quota: then the turn is refused, and the client does something else.
            Err(StoreError::Pages(_)) => Ok(()),
            called => called,
        }
    }
}

fn small() -> Options {
    Options {
        threads: false,
        reserve_bytes: 0,
        segment_bytes: 40 << 10,
        rebase_bytes: 1500,
        quota: Quota { page_bytes: 200 << 10, ..Quota::default() },
        ..crate::rig::options()
    }
}

/// Lives of one store, each ended at a random call; after each the oracle is asked.
fn lives(seed: u64, ending: Ending, count: usize) {
    let mut random = Random::new(seed);
    let rig = Rig { options: small(), ..Rig::new(seed) };
    if random.one_in(4) {
        rig.disk.cut_short();
    }
    let mut oracle = Oracle::default();
    for life in 0..count {
        rig.disk.die_at(1 + random.below(400));
        let opened = rig.try_open();
        if let Ok((store, _)) = opened {
            if let Ok(tenant) = store.tenant("t") {
                let alive: Vec<_> = store
                    .list(tenant.id, None, usize::MAX)
                    .into_iter()
                    .map(|info| info.id)
                    .filter(|id| oracle.sessions.contains_key(id))
                    .collect();
                let mut client = Client {
                    disk: &rig.disk,
                    store: &store,
                    tenant,
                    random: &mut random,
                    oracle: &mut oracle,
                    alive,
                };
                while client.step().is_ok() && !rig.disk.is_dead() {
                    rig.clock.advance(20);
                }
            }
            store.kill();
        }
        rig.disk.restart(ending);
        // The opening after a crash may itself be cut off.
        if random.one_in(3) {
            rig.disk.die_at(1 + random.below(100));
            if let Ok((store, _)) = rig.try_open() {
                store.kill();
            }
            rig.disk.restart(ending);
        }
        let what = format!("seed {seed}, life {life}, {ending:?}");
        let (store, report) = rig.try_open().unwrap_or_else(|e| panic!("{what}: {e}"));
        let tenant = store.tenant("t").unwrap();
        oracle.check(&store, &tenant, ending, &what);
        for known in oracle.sessions.values() {
            let Some(all) = &known.acknowledged else { continue };
            let held = read_pages(&store, &tenant, all);
            // The last token of a turn need not have been computed.
            let promised =
                if known.durability == Durability::Full { all.len().saturating_sub(1) / 32 } else { 0 };
            assert!(held >= promised, "{what}: {held} of {promised} pages are there");
        }
        if ending == Ending::Kill {
            assert!(!report.is_damaged(), "{what}: {report:?}");
        }
        store.kill();
        rig.disk.restart(Ending::Kill);
    }
}

/// More in an optimized build.
fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let count = if cfg!(debug_assertions) { count / 10 } else { count };
    (0..count).step_by(crate::STRIDE as usize)
}

#[test]
fn a_killed_process_loses_nothing_acknowledged() {
    seeds(2000).for_each(|seed| lives(seed, Ending::Kill, 4));
}

#[test]
fn power_loss_takes_only_what_was_not_synced() {
    seeds(10_000).for_each(|seed| lives(1 << 32 | seed, Ending::PowerLoss, 4));
}

/// The same work, killed at each of its calls in turn.
#[test]
fn every_call_may_be_the_last() {
    for ending in [Ending::Kill, Ending::PowerLoss] {
        let mut at = 1;
        loop {
            let rig = Rig { options: small(), ..Rig::new(at) };
            rig.disk.die_at(at);
            let mut told = (None, 0);
            let all = tokens(1, 90);
            let mut work = || -> Result<(), StoreError> {
                let (store, _) = rig.try_open()?;
                let result = (|| {
                    let tenant = store.tenant("t")?;
                    let named = Settings { name: Some("n".into()), ..settings(&tenant, Durability::Full) };
                    let id = store.create(tenant.id, named)?.id;
                    told.0 = Some(id);
                    for i in 0..3 {
                        let then = &all[..30 * (i + 1)];
                        for header in headers(&tenant, then) {
                            hand(&store, header);
                        }
                        let append =
                            Append { tokens: all[30 * i..30 * (i + 1)].to_vec(), ..Append::default() };
                        store.append_turn(tenant.id, id, append)?;
                        told.1 = then.len();
                    }
                    store.maintain().map(drop)
                })();
                match result {
                    Ok(()) => store.close(),
                    Err(e) => {
                        store.kill();
                        Err(e)
                    }
                }
            };
            let ended = work();
            rig.disk.restart(ending);
            let (store, _) = rig.open();
            let tenant = store.tenant("t").unwrap();
            if let Some(id) = told.0 {
                let found = store.tokens(tenant.id, id).unwrap();
                assert!(found.len() >= told.1 && all.starts_with(&found), "{ending:?} at call {at}");
                // At `full` the pages of what was acknowledged are there, too.
                let full = told.1.saturating_sub(1) / 32 * 32;
                assert_eq!(read_pages(&store, &tenant, &all[..full]), full / 32, "{ending:?} at call {at}");
            }
            if ended.is_ok() {
                assert!(at > 60, "the work takes more than {at} calls");
                break;
            }
            at += 1;
        }
    }
}
