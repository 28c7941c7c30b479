//! Names of a sequence's pages: whose, of which model, computed by whom; and what the store has of them.

use mainstay_backend_api::PAGE_TOKENS;
use mainstay_models::graph::RopeSwitch;
use mainstay_store::{ClassId, ContentId, Kind, PageHeader, PageKey, PageName, Root, Store, Tenant};

use crate::Adapter;
use crate::identity::Identity;
use crate::prefix;
use crate::request::Reuse;

/// The tokens of one full page.
pub(crate) type PageTokens = [u32; PAGE_TOKENS];

/// What a sealed page in the pool holds. All of it is compared on a hit, so that two pages of equal key by a
/// collision give a miss and never another's keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) key: PageKey,
    /// The key of the page before, or the root.
    pub(crate) parent: PageKey,
    pub(crate) tokens: PageTokens,
}

/// What names the pages of one sequence.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    tenant: Tenant,
    /// By rope table.
    roots: [PageKey; 2],
    contents: [ContentId; 2],
    rope_switch: RopeSwitch,
    class: ClassId,
}

/// How much of a sequence's tokens the store has, from the first on: every page of groups that see all, and of those
/// with a window the pages that the next token sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    /// Full pages.
    pub(crate) pages: usize,
    /// Tokens of a tail page after them.
    pub(crate) tail: usize,
    /// Who computed them.
    pub(crate) class: ClassId,
    /// Why there is nothing, where that is known.
    pub(crate) lack: Option<&'static str>,
}

impl Stored {
    pub(crate) fn tokens(&self) -> usize {
        self.pages * PAGE_TOKENS + self.tail
    }
}

impl Chain {
    /// Of a tenant's pages that are computed under this adapter, in the client's own partition `salt`.
    pub(crate) fn new(
        tenant: Tenant,
        identity: &Identity,
        (adapter, salt): (Option<&Adapter>, &[u8]),
    ) -> Self {
        let adapter = adapter.map(Adapter::hash);
        let root = |rope_table: usize| {
            let content = identity.contents[rope_table];
            tenant.chain.root(&Root { content, adapter, rope_table: rope_table as u32, salt })
        };
        let roots = [root(0), root(1)];
        let (contents, rope_switch, class) = (identity.contents, identity.rope_switch, identity.class);
        Self { tenant, roots, contents, rope_switch, class }
    }

    /// Which rope table a sequence of this many tokens turns by, all of them.
    pub(crate) fn rope_table(&self, len: usize) -> usize {
        self.rope_switch.table(len)
    }

    /// How many tokens more a sequence of this many may have and turn by the same rope table.
    pub(crate) fn table_room(&self, len: usize) -> usize {
        let switch = self.rope_switch.0.filter(|&most| len <= most);
        switch.map_or(usize::MAX, |most| most - len)
    }

    /// The parent of the first page of a sequence that turns by this rope table.
    pub(crate) fn root(&self, rope_table: usize) -> PageKey {
        self.roots[rope_table]
    }

    /// Who computes here.
    pub(crate) fn class(&self) -> ClassId {
        self.class
    }

    /// The header of the page that holds these tokens after the page named `parent`.
    pub(crate) fn next(&self, parent: PageKey, tokens: &PageTokens) -> Header {
        Header { key: self.tenant.chain.next(parent, tokens, &[]), parent, tokens: *tokens }
    }

    /// How the store names a page of a group: full, or a tail of fewer tokens.
    pub(crate) fn page(
        &self,
        (class, group): (ClassId, usize),
        rope_table: usize,
        parent: PageKey,
        tokens: &[u32],
    ) -> PageHeader {
        let key = self.tenant.chain.next(parent, tokens, &[]);
        let name = self.name(class, group, key);
        PageHeader { name, content: self.contents[rope_table], parent, tokens: tokens.to_vec() }
    }

    fn name(&self, class: ClassId, group: usize, key: PageKey) -> PageName {
        PageName { tenant: self.tenant.id, key, class, group: group as u16, kind: Kind::Attention }
    }

    /// What an engine without a store finds.
    pub(crate) fn nothing(&self) -> Stored {
        Stored { pages: 0, tail: 0, class: self.class, lack: None }
    }

    /// How much of these tokens the store has, where these are the windows of the groups, and the keys of all full pages.
    pub(crate) fn look_up(
        &self,
        store: &Store,
        windows: &[Option<usize>],
        tokens: &[u32],
        reuse: Reuse,
    ) -> (Stored, Vec<PageKey>) {
        let full = &tokens[..tokens.len() / PAGE_TOKENS * PAGE_TOKENS];
        let table = self.rope_table(tokens.len());
        let named = |table: usize| {
            let root = self.roots[table];
            let mut keys = vec![root];
            keys.extend(self.tenant.chain.keys(root, full));
            keys
        };
        let mut keys = named(table);
        let own = self.find(store, (self.class, windows), tokens, &keys);
        let others = || {
            let classes = store.classes().into_iter().filter(|class| *class != self.class);
            let found = classes.map(|class| self.find(store, (class, windows), tokens, &keys));
            found.max_by_key(Stored::tokens).filter(|found| found.tokens() > own.tokens())
        };
        // What it had when it was shorter.
        let shorter = || {
            let found = (table > 0).then(|| self.find(store, (self.class, windows), tokens, &named(0)));
            found.filter(|found| found.tokens() > 0)
        };
        let lack = || match (others(), shorter()) {
            (Some(_), _) => Some("numeric_class"),
            (None, Some(_)) => Some("rope_table"),
            (None, None) => None,
        };
        let found = match (reuse, own.tokens()) {
            (Reuse::Equivalent, _) => others().unwrap_or(own),
            (Reuse::Exact, 0) => Stored { lack: lack(), ..own },
            (Reuse::Exact, _) => own,
        };
        keys.remove(0);
        (found, keys)
    }

    /// `keys` are those of all full pages, the root before the first.
    fn find(
        &self,
        store: &Store,
        (class, windows): (ClassId, &[Option<usize>]),
        tokens: &[u32],
        keys: &[PageKey],
    ) -> Stored {
        let like = |group| self.name(class, group, keys[0]);
        let (windowed, full): (Vec<usize>, Vec<usize>) =
            (0..windows.len()).partition(|&group| windows[group].is_some());
        let run = |&group: &usize| store.chain_len(&like(group), &keys[1..]);
        let run = full.iter().map(run).min().unwrap_or(if windowed.is_empty() { 0 } else { keys.len() - 1 });
        let mut held = vec![Vec::new(); windows.len()];
        windowed.iter().for_each(|&group| held[group] = store.held(&like(group), &keys[1..=run]));
        let has = |group: usize, page: usize| held[group][page];
        // Without a group that sees all, the last page that is there tells how far to look.
        let last = |&group: &usize| held[group].iter().rposition(|&held| held).map_or(0, |last| last + 1);
        let most = if full.is_empty() { windowed.iter().map(last).min().unwrap_or(0) } else { run };
        let stored = |pages: usize| {
            let rest = &tokens[pages * PAGE_TOKENS..];
            let tail = self.tail(store, (class, windows.len()), keys[pages], rest);
            Stored { pages, tail, class, lack: None }
        };
        // A tail may be of use where the page before it is not: its next token sees less of what lies before.
        let found = stored(most);
        match prefix::missing(found.tokens(), windows, has) {
            None => found,
            Some(_) => stored(prefix::usable(most, windows, has)),
        }
    }

    /// Tokens of the longest tail that all groups have after a page, or the root.
    fn tail(&self, store: &Store, (class, groups): (ClassId, usize), parent: PageKey, rest: &[u32]) -> usize {
        let name = |group, key| self.name(class, group, key);
        let rest = &rest[..rest.len().min(PAGE_TOKENS)];
        let tail = store.find_tail(&name(0, parent), parent, rest);
        let tail = tail.filter(|(found, _)| (1..groups).all(|group| store.contains(&name(group, found.key))));
        tail.map_or(0, |(_, len)| len)
    }
}
