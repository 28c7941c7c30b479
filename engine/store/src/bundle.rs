//! A session as a stream of bytes, to be opened by another store: tokens, and pages if wanted.

use std::{
    io::{Read, Write},
    time::Duration,
};

use crate::{
    api::{SessionInfo, info},
    error::StoreError,
    event::{
        Durability, Event, META_BYTES_MAX, NodeEvent, SessionId, Settings, WholeEvent, Whose, head_hash,
        read_settings, write_settings,
    },
    key::{ClassId, ContentId, KeyChain, PAGE_TOKENS, PageKey, Root, TenantId},
    pages::{Handed, PageWrite, lock},
    record::{Kind, PAYLOAD_BYTES_MAX, PageHeader, PageName, digest},
    store::Store,
    tenant::Tenant,
    twin::{PREAMBLE_BYTES, preamble, refuse_newer, version_of},
    wire::{Malformed, Reader, Writer},
};

pub(crate) const MAGIC: [u8; 8] = *b"MSTBUND\n";
pub(crate) const SESSION: u8 = 1;
pub(crate) const TURN: u8 = 2;
const PAGE: u8 = 3;
pub(crate) const END: u8 = 4;
/// Longest part.
const PART_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + META_BYTES_MAX;
/// Tokens and metadata of a session that is read in, bytes.
const TURN_BYTES_MAX: usize = 1 << 30;
/// How long an import waits for room in the ring, a page.
const ROOM: Duration = Duration::from_secs(5);

/// Which pages an export takes along.
#[derive(Clone, Copy, Debug)]
pub struct ExportPages {
    /// What they were computed with.
    pub content: ContentId,
    /// By whom.
    pub class: ClassId,
    /// Groups of layers.
    pub groups: u16,
}

/// What an import does with a bundle's pages. Nothing proves who computed them: take them only from where one
/// trusts, for a made-up page says what its maker wants.
#[derive(Clone, Copy, Debug)]
pub enum BundlePages {
    /// Tokens alone; pages are computed again.
    Refuse,
    /// Pages of these contents, named anew after their roots.
    Accept {
        /// What this engine computes with, one for each of the model's rope tables, and where a session's chain begins
        /// here.
        chains: [(ContentId, PageKey); 2],
    },
    /// Pages of whatever content the bundle says: for a store without a model. A model goes on from them only if it is
    /// of that content.
    Any,
}

/// Where the chain of a plain session begins: no adapter, no salt.
fn plain_root(chain: &KeyChain, content: ContentId, rope_table: u32) -> PageKey {
    chain.root(&Root { content, adapter: None, rope_table, salt: b"" })
}

impl BundlePages {
    /// Pages of one content.
    pub fn accept(content: ContentId, root: PageKey) -> Self {
        Self::Accept { chains: [(content, root); 2] }
    }

    /// The root for pages of this content, if they are accepted.
    pub(crate) fn root_of(self, content: ContentId) -> Option<PageKey> {
        match self {
            Self::Refuse | Self::Any => None,
            Self::Accept { chains } => {
                chains.into_iter().find(|chain| chain.0 == content).map(|chain| chain.1)
            }
        }
    }
}

/// What an imported session is to be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImportAs {
    /// The id of a session that moves here from another server; `None` makes a new one.
    pub id: Option<SessionId>,
    /// Its name.
    pub name: Option<String>,
}

/// An imported session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// It.
    pub session: SessionInfo,
    /// Pages taken.
    pub pages: u32,
    /// Pages passed over: not wanted, of other content, or no room.
    pub pages_refused: u32,
}

/// What every bundle begins with.
pub(crate) fn start() -> Vec<u8> {
    preamble(MAGIC).to_vec()
}

/// Writes parts, each followed by the hash of all bytes so far.
pub(crate) struct Out<'a> {
    out: &'a mut dyn Write,
    hasher: blake3::Hasher,
    parts: u64,
}

impl<'a> Out<'a> {
    /// A stream that begins with the preamble of `magic`.
    pub(crate) fn new(out: &'a mut dyn Write, magic: [u8; 8]) -> Result<Self, StoreError> {
        let mut out = Self { out, hasher: blake3::Hasher::new(), parts: 0 };
        out.raw(&preamble(magic))?;
        Ok(out)
    }

    /// The last part.
    pub(crate) fn end(mut self) -> Result<(), StoreError> {
        let parts = self.parts;
        self.part(END, &parts.to_le_bytes(), &[])
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.hasher.update(bytes);
        Ok(self.out.write_all(bytes)?)
    }

    pub(crate) fn part(&mut self, kind: u8, head: &[u8], payload: &[u8]) -> Result<(), StoreError> {
        self.raw(&[kind])?;
        self.raw(&((head.len() + payload.len()) as u32).to_le_bytes())?;
        self.raw(head)?;
        self.raw(payload)?;
        self.parts += 1;
        let hash = self.hasher.finalize();
        self.raw(hash.as_bytes())
    }
}

/// Reads parts, each compared with the hash behind it.
pub(crate) struct In<'a> {
    input: &'a mut dyn Read,
    hasher: blake3::Hasher,
    parts: u64,
}

impl<'a> In<'a> {
    /// A stream that must begin with the preamble of `magic`; `what` names it in errors.
    pub(crate) fn new(input: &'a mut dyn Read, magic: [u8; 8], what: &str) -> Result<Self, StoreError> {
        let mut input = Self { input, hasher: blake3::Hasher::new(), parts: 0 };
        let first = input.hashed(PREAMBLE_BYTES)?;
        refuse_newer(what, &first, magic)?;
        if version_of(&first, magic).is_none() {
            return Err(StoreError::Bundle(format!("{what} does not begin as one")));
        }
        Ok(input)
    }

    /// The next part that is not the last; `None` at the last, whose count must be right.
    pub(crate) fn next(&mut self) -> Result<Option<(u8, Vec<u8>)>, StoreError> {
        let before = self.parts;
        match self.part()? {
            (END, count) if count == before.to_le_bytes() => Ok(None),
            (END, _) => Err(StoreError::Bundle(format!("it ends after {before} parts, not as it says"))),
            part => Ok(Some(part)),
        }
    }

    /// Exactly so many bytes; memory grows with what arrives, not with what is claimed.
    fn raw(&mut self, count: usize) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::new();
        self.input.take(count as u64).read_to_end(&mut bytes)?;
        if bytes.len() != count {
            return Err(StoreError::Bundle(format!("ends early: {} of {count} bytes", bytes.len())));
        }
        Ok(bytes)
    }

    fn hashed(&mut self, count: usize) -> Result<Vec<u8>, StoreError> {
        let bytes = self.raw(count)?;
        self.hasher.update(&bytes);
        Ok(bytes)
    }

    pub(crate) fn part(&mut self) -> Result<(u8, Vec<u8>), StoreError> {
        let head = self.hashed(5)?;
        let count = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if count > PART_BYTES_MAX {
            return Err(StoreError::Bundle(format!("a part of {count} bytes, at most {PART_BYTES_MAX}")));
        }
        let payload = self.hashed(count)?;
        let expected = self.hasher.finalize();
        if self.hashed(32)? != expected.as_bytes()[..] {
            return Err(StoreError::Bundle("the hash of a part is wrong".to_owned()));
        }
        self.parts += 1;
        Ok((head[0], payload))
    }
}

impl Store {
    /// Whose pages of a session are kept, and most of them, for an export where no model says whose are wanted. `None`
    /// where there are none.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn stored_pages(&self, tenant: TenantId, id: SessionId) -> Result<Option<ExportPages>, StoreError> {
        let Some(root) = self.get(tenant, id)?.settings.root else { return Ok(None) };
        let tokens = self.tokens(tenant, id)?;
        let keys: Vec<PageKey> = self.chain(tenant)?.keys(root, &tokens).collect();
        let first = |class| {
            let like = PageName { tenant, key: root, class, group: 0, kind: Kind::Attention };
            let count = self.chain_len(&like, &keys);
            let name = keys.first().filter(|_| count > 0).map(|&key| PageName { key, ..like });
            let tail = || self.find_tail(&like, root, &tokens[..tokens.len().min(PAGE_TOKENS)]);
            Some((count, name.or_else(|| tail().map(|(name, _)| name))?))
        };
        let most = self.classes().into_iter().filter_map(first).max_by_key(|(count, _)| *count);
        let Some((_, name)) = most else { return Ok(None) };
        let is_kept = |&group: &u16| self.contains(&PageName { group, ..name });
        let groups = (0..u16::MAX).take_while(is_kept).count() as u16;
        let header = self.inner.pages.header(&name).ok();
        Ok(header.map(|header| ExportPages { content: header.content, class: name.class, groups }))
    }

    fn chain(&self, tenant: TenantId) -> Result<KeyChain, StoreError> {
        lock(&self.inner.tenants).chain(tenant).ok_or(StoreError::NotFound)
    }

    /// Writes a session out. Pages that are not in the store are left out, and so are all of one that is not plain: they
    /// are of more than the content, which is all that a bundle tells of them.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what `out` reports.
    pub fn export(
        &self,
        tenant: TenantId,
        id: SessionId,
        pages: Option<ExportPages>,
        out: &mut dyn Write,
    ) -> Result<(), StoreError> {
        let info = self.get(tenant, id)?;
        let turns = self.turns(tenant, id)?;
        let (chain, root) = (self.chain(tenant)?, info.settings.root);
        let pages = pages.filter(|pages| {
            let plain = [0, 1].map(|table| Some(plain_root(&chain, pages.content, table)));
            plain.contains(&root)
        });
        let mut out = Out::new(out, MAGIC)?;
        let mut head = Writer::default();
        head.option(pages.map(|pages| pages.content), |out, content| {
            out.raw(&content.0);
        });
        write_settings(head.u64(info.created_ms), &info.settings);
        out.part(SESSION, &head.0, &[])?;
        for turn in &turns {
            let mut head = Writer::default();
            head.tokens(&turn.tokens).bytes(&turn.meta);
            out.part(TURN, &head.0, &[])?;
        }
        if let (Some(pages), Some(root)) = (pages, root) {
            let tokens: Vec<u32> = turns.iter().flat_map(|turn| turn.tokens.iter().copied()).collect();
            self.export_pages((tenant, chain), root, &tokens, (pages, &mut out))?;
        }
        out.end()
    }

    fn export_pages(
        &self,
        (tenant, chain): (TenantId, KeyChain),
        root: PageKey,
        tokens: &[u32],
        (pages, out): (ExportPages, &mut Out<'_>),
    ) -> Result<(), StoreError> {
        let mut parent = root;
        for (i, full) in tokens.chunks(PAGE_TOKENS).enumerate() {
            let key = chain.next(parent, full, &[]);
            for group in 0..pages.groups {
                for kind in [Kind::Attention, Kind::State] {
                    let like = PageName { tenant, key, class: pages.class, group, kind };
                    // The last tokens of a session may have no keys and values yet.
                    let found = if self.contains(&like) {
                        Some((like, full.len()))
                    } else {
                        self.find_tail(&like, parent, full)
                    };
                    let Some((name, len)) = found else { continue };
                    let (content, tokens) = (pages.content, full[..len].to_vec());
                    let Ok(page) = self.read(&PageHeader { name, content, parent, tokens }) else { continue };
                    let mut head = Writer::default();
                    head.u32(i as u32).u8(len as u8).raw(&name.class.0).u16(group).u8(kind as u8);
                    out.part(PAGE, &head.0, &page)?;
                }
            }
            parent = key;
        }
        Ok(())
    }

    /// Reads a session in, all of it or, where anything is wrong or a crash comes between, nothing. Every hash and count
    /// is compared, and no length is believed.
    ///
    /// # Errors
    /// [`StoreError::Bundle`], [`StoreError::Newer`], [`StoreError::IdTaken`], and those of [`Store::create`].
    pub fn import(
        &self,
        tenant: &Tenant,
        input: &mut dyn Read,
        called: ImportAs,
        pages: BundlePages,
    ) -> Result<Imported, StoreError> {
        if let Some(id) = called.id.filter(|&id| lock(&self.inner.state).table.contains(id)) {
            return Err(StoreError::IdTaken(id));
        }
        let mut input = In::new(input, MAGIC, "the bundle")?;
        let (SESSION, head) = input.part()? else {
            return Err(StoreError::Bundle("it does not begin with a session".to_owned()));
        };
        let (content, created_ms, mut settings) = parse_session(&head)?;
        let root_of = |content| match pages {
            BundlePages::Any => Some(plain_root(&tenant.chain, content, 0)),
            pages => pages.root_of(content),
        };
        let accepted = content.and_then(|content| Some((content, root_of(content)?)));
        let (turns, tokens, keys) = (Vec::new(), Vec::new(), Vec::new());
        let mut incoming = Incoming { tenant, accepted, turns, turn_bytes: 0, tokens, keys };
        let (mut taken, mut refused) = (0, 0);
        loop {
            match input.next()? {
                Some((TURN, part)) if taken + refused == 0 => incoming.turn(&part)?,
                Some((PAGE, part)) => match incoming.page(&part)? {
                    Some(page) => match self.write_patiently(page.header, page.payload, page.digest, ROOM) {
                        Handed::Dropped => refused += 1,
                        Handed::Queued | Handed::Known => taken += 1,
                    },
                    None => refused += 1,
                },
                None => break,
                Some((kind, _)) => return Err(StoreError::Bundle(format!("a part of kind {kind}"))),
            }
        }
        settings.root = match (accepted, pages) {
            (Some((_, root)), _) => Some(root),
            (None, BundlePages::Accept { chains }) => Some(chains[0].1),
            (None, BundlePages::Refuse | BundlePages::Any) => None,
        };
        settings.name = called.name;
        // A copy is pinned by whoever wants it; a session that moves stays as it is.
        settings.pinned &= called.id.is_some();
        let moved = called.id.map(|id| (id, created_ms));
        let session = self.import_turns(tenant.id, settings, moved, incoming.turns)?;
        Ok(Imported { session, pages: taken, pages_refused: refused })
    }

    fn import_turns(
        &self,
        tenant: TenantId,
        settings: Settings,
        moved: Option<(SessionId, u64)>,
        turns: Vec<(Vec<u32>, Vec<u8>)>,
    ) -> Result<SessionInfo, StoreError> {
        let (inner, level) = (&*self.inner, settings.durability);
        if level == Durability::Full {
            inner.sync_pages()?;
        }
        let mut state = lock(&inner.state);
        let session = state.room(inner, tenant, &settings, moved.map(|(id, _)| id))?;
        let now_ms = inner.now_ms(&mut state);
        // Turns get the numbers of their entries for ids, so nothing may be written between.
        let _ = inner.mend(&mut state)?;
        let (first, mut head, mut hash) = (state.journal.next_lsn, None, [0; 16]);
        let mut events = Vec::with_capacity(turns.len() + 1);
        for (i, (tokens, meta)) in turns.into_iter().enumerate() {
            hash = head_hash(hash, &tokens);
            let (id, parent) = (first + i as u64, head.replace(first + i as u64));
            let (number, at_ms) = (i as u32 + 1, now_ms);
            events.push(Event::Node(NodeEvent { id, parent, number, at_ms, tokens, meta, hash }));
        }
        events.push(Event::Whole(Box::new(WholeEvent {
            tenant,
            settings,
            parent: None,
            created_ms: moved.map_or(now_ms, |(_, created_ms)| created_ms.min(now_ms)),
            used_ms: now_ms,
            damaged: false,
            head,
            hash,
            in_flight: None,
        })));
        let logged = inner.record_all(&mut state, Whose { tenant, session }, events, level);
        state.table.end_replay();
        let made = logged.and_then(|logged| Ok((logged, info(session, state.session(tenant, session)?))));
        drop(state);
        let (logged, made) = made?;
        inner.acknowledge(logged, level)?;
        Ok(made)
    }
}

pub(crate) fn parse_session(part: &[u8]) -> Result<(Option<ContentId>, u64, Settings), Malformed> {
    let mut r = Reader::new(part, "bundle's session");
    let content = r.option(Reader::array)?.map(ContentId);
    let created_ms = r.u64()?;
    let settings = read_settings(&mut r)?;
    r.end()?;
    Ok((content, created_ms, settings))
}

/// A session on its way in.
struct Incoming<'a> {
    tenant: &'a Tenant,
    accepted: Option<(ContentId, PageKey)>,
    turns: Vec<(Vec<u32>, Vec<u8>)>,
    turn_bytes: usize,
    tokens: Vec<u32>,
    /// Keys of its pages by index, the root before the first; made with the first page.
    keys: Vec<PageKey>,
}

impl Incoming<'_> {
    fn turn(&mut self, part: &[u8]) -> Result<(), Malformed> {
        let mut r = Reader::new(part, "bundle's turn");
        let (tokens, meta) = (r.tokens()?, r.bytes()?.to_vec());
        r.end()?;
        self.turn_bytes += part.len();
        if self.turn_bytes > TURN_BYTES_MAX || meta.len() > META_BYTES_MAX {
            return Err(Malformed("bundle's turn"));
        }
        self.tokens.extend_from_slice(&tokens);
        self.turns.push((tokens, meta));
        Ok(())
    }

    /// A page of this session, named as this tenant names it; `None` where pages are not accepted.
    fn page(&mut self, part: &[u8]) -> Result<Option<PageWrite>, StoreError> {
        let mut r = Reader::new(part, "bundle's page");
        let (index, len) = (r.u32()? as usize, usize::from(r.u8()?));
        let (class, group) = (ClassId(r.array()?), r.u16()?);
        let kind = Kind::parse(r.u8()?)?;
        const HEAD_BYTES: usize = 4 + 1 + 32 + 2 + 1;
        let payload = &part[HEAD_BYTES..];
        let all = self.tokens.chunks(PAGE_TOKENS).nth(index).ok_or(r.malformed())?;
        if len == 0 || len > all.len() || payload.len() > PAYLOAD_BYTES_MAX {
            return Err(r.malformed().into());
        }
        let Some((content, root)) = self.accepted else { return Ok(None) };
        if self.keys.is_empty() {
            self.keys.push(root);
            self.keys.extend(self.tenant.chain.keys(root, &self.tokens));
        }
        let (parent, tokens) = (self.keys[index], all[..len].to_vec());
        let key = self.tenant.chain.next(parent, &tokens, &[]);
        let name = PageName { tenant: self.tenant.id, key, class, group, kind };
        let header = PageHeader { name, content, parent, tokens };
        // The bundle's hashes say that these bytes are those that were exported.
        Ok(Some(PageWrite { header, payload: payload.into(), digest: digest(payload) }))
    }
}
