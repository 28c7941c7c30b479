//! Which pages a store has and where: in memory, rebuilt from the segments at every start.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::{Arc, atomic::Ordering},
};

use crate::{
    key::{ClassId, PageKey, TenantId},
    record::{Kind, PageName},
    segment::{Segment, Slot},
};

/// A page of the index.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) segment: Arc<Segment>,
    pub(crate) slot: Slot,
    /// When it was last asked for or continued, in calls.
    pub(crate) used: u64,
}

/// Pages of all tenants.
#[derive(Default)]
pub(crate) struct Index {
    /// In the order of names, so that a walk can be left and taken up again.
    entries: BTreeMap<PageName, Entry>,
    /// Tails by the page before them.
    tails: HashMap<(TenantId, PageKey), Vec<PageName>>,
    pub(crate) segments: HashMap<(TenantId, u64), Arc<Segment>>,
    bytes: HashMap<TenantId, u64>,
    classes: BTreeSet<ClassId>,
    calls: u64,
}

impl Index {
    pub(crate) fn get(&mut self, name: &PageName) -> Option<Entry> {
        self.calls += 1;
        let entry = self.entries.get_mut(name)?;
        entry.used = self.calls;
        Some(entry.clone())
    }

    pub(crate) fn contains(&self, name: &PageName) -> bool {
        self.entries.contains_key(name)
    }

    /// The pages of this key: of all groups, whoever computed them.
    fn of_key(&self, tenant: TenantId, key: PageKey) -> impl Iterator<Item = &Entry> {
        let (class, group, kind) = (ClassId([0; 32]), 0, Kind::Attention);
        let entries = self.entries.range(PageName { tenant, key, class, group, kind }..);
        let of_key = entries.take_while(move |(name, _)| (name.tenant, name.key) == (tenant, key));
        of_key.map(|(_, entry)| entry)
    }

    /// Whether a page of this key stands here, of any group: which of them a session needs at this place depends on
    /// windows, of which a store knows nothing.
    pub(crate) fn contains_key(&self, tenant: TenantId, key: PageKey) -> bool {
        self.of_key(tenant, key).next().is_some()
    }

    /// Bytes on disk of the pages of this key.
    pub(crate) fn key_bytes(&self, tenant: TenantId, key: PageKey) -> u64 {
        self.of_key(tenant, key).map(|entry| entry.slot.disk_bytes()).sum()
    }

    /// Classes of the pages of this store.
    pub(crate) fn classes(&self) -> impl Iterator<Item = ClassId> {
        self.classes.iter().copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes on disk of a tenant's pages.
    pub(crate) fn bytes(&self, tenant: TenantId) -> u64 {
        self.bytes.get(&tenant).copied().unwrap_or(0)
    }

    pub(crate) fn all_bytes(&self) -> u64 {
        self.bytes.values().sum()
    }

    pub(crate) fn tenants(&self) -> Vec<TenantId> {
        self.bytes.keys().copied().collect()
    }

    /// Calls so far: the time of [`Entry::used`].
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    pub(crate) fn used(&self, name: &PageName) -> Option<u64> {
        self.entries.get(name).map(|entry| entry.used)
    }

    /// The pages of a tenant, or of all, behind this one in the order of names.
    pub(crate) fn after(
        &self,
        tenant: Option<TenantId>,
        after: Option<PageName>,
    ) -> impl Iterator<Item = &Entry> {
        let first = tenant.map(|tenant| PageName {
            tenant,
            key: PageKey([0; 32]),
            class: ClassId([0; 32]),
            group: 0,
            kind: Kind::Attention,
        });
        let from = match (after, first) {
            (Some(after), _) => Bound::Excluded(after),
            (None, Some(first)) => Bound::Included(first),
            (None, None) => Bound::Unbounded,
        };
        let entries = self.entries.range((from, Bound::Unbounded)).map(|(_, entry)| entry);
        entries.take_while(move |entry| tenant.is_none_or(|tenant| entry.slot.name.tenant == tenant))
    }

    /// The longest tail after `parent` that `tokens` begin with.
    pub(crate) fn tail(&self, like: &PageName, parent: PageKey, tokens: &[u32]) -> Option<(PageName, usize)> {
        let names = self.tails.get(&(like.tenant, parent))?;
        let fits = names.iter().filter_map(|name| {
            let same = name.class == like.class && name.group == like.group && name.kind == like.kind;
            let entry = self.entries.get(name).filter(|_| same)?;
            tokens.starts_with(&entry.slot.tail).then_some((*name, entry.slot.tail.len()))
        });
        fits.max_by_key(|(_, len)| *len)
    }

    /// Adds a page, in the place of one of the same name, and lets go of tails that it continues.
    pub(crate) fn insert(&mut self, segment: &Arc<Segment>, slot: Slot, tokens: &[u32]) {
        self.remove(&slot.name);
        let place = (slot.name.tenant, slot.parent);
        let continued: Vec<_> = self.tails.get(&place).into_iter().flatten().copied().collect();
        for name in continued {
            let same = name.class == slot.name.class
                && name.group == slot.name.group
                && name.kind == slot.name.kind
                && self.entries.get(&name).is_some_and(|tail| {
                    tail.slot.tail.len() < tokens.len() && tokens.starts_with(&tail.slot.tail)
                });
            if same {
                self.remove(&name);
            }
        }
        if !slot.tail.is_empty() {
            self.tails.entry(place).or_default().push(slot.name);
        }
        *self.bytes.entry(slot.name.tenant).or_default() += slot.disk_bytes();
        self.classes.insert(slot.name.class);
        self.calls += 1;
        if let Some(parent) = self.entries.get_mut(&PageName { key: slot.parent, ..slot.name }) {
            parent.used = self.calls;
        }
        let entry = Entry { segment: segment.clone(), used: self.calls, slot };
        self.entries.insert(entry.slot.name, entry);
    }

    pub(crate) fn remove(&mut self, name: &PageName) -> Option<Entry> {
        let entry = self.entries.remove(name)?;
        let bytes = entry.slot.disk_bytes();
        entry.segment.live_bytes.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(sum) = self.bytes.get_mut(&name.tenant) {
            *sum -= bytes;
        }
        if !entry.slot.tail.is_empty() {
            let place = (name.tenant, entry.slot.parent);
            if let Some(names) = self.tails.get_mut(&place) {
                names.retain(|other| other != name);
                if names.is_empty() {
                    self.tails.remove(&place);
                }
            }
        }
        Some(entry)
    }

    /// Removes a page only if it still stands where `entry` says.
    pub(crate) fn remove_at(&mut self, entry: &Entry) {
        let same = self.entries.get(&entry.slot.name).is_some_and(|found| {
            Arc::ptr_eq(&found.segment, &entry.segment) && found.slot.offset == entry.slot.offset
        });
        if same {
            self.remove(&entry.slot.name);
        }
    }

    pub(crate) fn remove_tenant(&mut self, tenant: TenantId) {
        let names: Vec<_> = self.after(Some(tenant), None).map(|entry| entry.slot.name).collect();
        for name in names {
            self.remove(&name);
        }
        self.tails.retain(|(owner, _), _| *owner != tenant);
        self.segments.retain(|(owner, _), _| *owner != tenant);
        self.bytes.remove(&tenant);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Enters a page of two blocks.
    pub(crate) fn insert(index: &mut Index, segment: &Arc<Segment>, name: PageName, parent: PageKey) {
        let (serial, offset) = (0, 0);
        let slot = Slot { name, parent, serial, offset, payload_bytes: 1, token_count: 32, tail: vec![] };
        segment.add(slot.disk_bytes());
        index.insert(segment, slot, &[]);
    }

    #[test]
    fn a_key_has_the_pages_of_all_groups_and_classes() {
        let tenant = TenantId([1; 16]);
        let (mut index, segment) = (Index::default(), Arc::new(Segment::new(tenant, 1)));
        let name = |key: u8, class: u8, group| PageName {
            tenant,
            key: PageKey([key; 32]),
            class: ClassId([class; 32]),
            group,
            kind: Kind::Attention,
        };
        for name in [name(1, 5, 0), name(1, 5, 1), name(1, 9, 1), name(2, 5, 1), name(4, 5, 0)] {
            insert(&mut index, &segment, name, PageKey([0; 32]));
        }
        // A page is a block of header and one of payload.
        for (key, pages) in [(1, 3), (2, 1), (3, 0), (4, 1)] {
            let key = PageKey([key; 32]);
            assert_eq!(index.key_bytes(tenant, key), pages * 8192);
            assert_eq!(index.contains_key(tenant, key), pages > 0);
        }
        assert!(!index.contains_key(TenantId([0; 16]), PageKey([1; 32])));
    }
}
