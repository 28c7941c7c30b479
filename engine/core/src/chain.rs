//! Names of a sequence's pages: whose, of which model, computed by whom; and what the store has of them.

use mainstay_backend_api::PAGE_TOKENS;
use mainstay_store::{ClassId, ContentId, Kind, PageHeader, PageKey, PageName, Root, Store, Tenant};

use crate::Adapter;
use crate::identity::Identity;
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
    root: PageKey,
    content: ContentId,
    class: ClassId,
}

/// How much of a sequence's tokens the store has, from the first on.
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

/// What a chain begins with.
pub(crate) fn root<'a>(identity: &Identity, adapter: Option<&Adapter>, salt: &'a [u8]) -> Root<'a> {
    Root { content: identity.content, adapter: adapter.map(Adapter::hash), rope_table: 0, salt }
}

impl Chain {
    pub(crate) fn new(
        tenant: Tenant,
        identity: &Identity,
        (adapter, salt): (Option<&Adapter>, &[u8]),
    ) -> Self {
        let root = root(identity, adapter, salt);
        let root = tenant.chain.root(&root);
        Self { tenant, root, content: identity.content, class: identity.class }
    }

    /// The parent of a sequence's first page.
    pub(crate) fn root(&self) -> PageKey {
        self.root
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
    pub(crate) fn page(&self, class: ClassId, group: usize, parent: PageKey, tokens: &[u32]) -> PageHeader {
        let key = self.tenant.chain.next(parent, tokens, &[]);
        let name = self.name(class, group, key);
        PageHeader { name, content: self.content, parent, tokens: tokens.to_vec() }
    }

    fn name(&self, class: ClassId, group: usize, key: PageKey) -> PageName {
        PageName { tenant: self.tenant.id, key, class, group: group as u16, kind: Kind::Attention }
    }

    /// What an engine without a store finds.
    pub(crate) fn nothing(&self) -> Stored {
        Stored { pages: 0, tail: 0, class: self.class, lack: None }
    }

    /// The keys of all full pages, and how much of them the store has in every group.
    pub(crate) fn look_up(
        &self,
        store: &Store,
        groups: usize,
        tokens: &[u32],
        reuse: Reuse,
    ) -> (Stored, Vec<PageKey>) {
        let full = &tokens[..tokens.len() / PAGE_TOKENS * PAGE_TOKENS];
        let keys: Vec<PageKey> = self.tenant.chain.keys(self.root, full).collect();
        let own = self.find(store, (self.class, groups), tokens, &keys);
        let others = || {
            let classes = store.classes().into_iter().filter(|class| *class != self.class);
            let found = classes.map(|class| self.find(store, (class, groups), tokens, &keys));
            found.max_by_key(Stored::tokens).filter(|found| found.tokens() > own.tokens())
        };
        let found = match (reuse, own.tokens()) {
            (Reuse::Equivalent, _) => others().unwrap_or(own),
            (Reuse::Exact, 0) => Stored { lack: others().map(|_| "numeric_class"), ..own },
            (Reuse::Exact, _) => own,
        };
        (found, keys)
    }

    fn find(
        &self,
        store: &Store,
        (class, groups): (ClassId, usize),
        tokens: &[u32],
        keys: &[PageKey],
    ) -> Stored {
        let name = |group, key| self.name(class, group, key);
        let run = |group| store.chain_len(&name(group, self.root), keys);
        let pages = (0..groups).map(run).min().unwrap_or(0);
        let parent = pages.checked_sub(1).map_or(self.root, |last| keys[last]);
        let rest = &tokens[pages * PAGE_TOKENS..];
        let rest = &rest[..rest.len().min(PAGE_TOKENS)];
        let tail = store.find_tail(&name(0, self.root), parent, rest);
        let tail = tail.filter(|(found, _)| (1..groups).all(|group| store.contains(&name(group, found.key))));
        Stored { pages, tail: tail.map_or(0, |(_, len)| len), class, lack: None }
    }
}
