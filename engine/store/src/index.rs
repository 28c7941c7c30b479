//! Which pages a store has and where: in memory, rebuilt from the segments at every start.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
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
    /// When it was last asked for, in calls.
    used: u64,
}

/// Pages of all tenants.
#[derive(Default)]
pub(crate) struct Index {
    entries: HashMap<PageName, Entry>,
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

    /// Whether a page of this key stands here, computed by anyone.
    pub(crate) fn contains_key(&self, tenant: TenantId, key: PageKey) -> bool {
        self.classes
            .iter()
            .any(|&class| self.contains(&PageName { tenant, key, class, group: 0, kind: Kind::Attention }))
    }

    /// Bytes on disk of the pages of this key, whoever computed them.
    pub(crate) fn key_bytes(&self, tenant: TenantId, key: PageKey) -> u64 {
        let names = self.classes.iter().map(|&class| PageName {
            tenant,
            key,
            class,
            group: 0,
            kind: Kind::Attention,
        });
        names.filter_map(|name| self.entries.get(&name)).map(|entry| entry.slot.disk_bytes()).sum()
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

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
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
        let entry = Entry { segment: segment.clone(), used: self.calls, slot };
        self.calls += 1;
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
        self.entries.retain(|name, _| name.tenant != tenant);
        self.tails.retain(|(owner, _), _| *owner != tenant);
        self.segments.retain(|(owner, _), _| *owner != tenant);
        self.bytes.remove(&tenant);
    }

    /// Lets go of a tenant's pages, those without children first and of these the longest unused, until at most
    /// `bytes` are left. A page with a child that stays, stays: the child could not be reached without it.
    pub(crate) fn evict(&mut self, tenant: TenantId, bytes: u64, keep: &HashSet<PageKey>) -> usize {
        if self.bytes(tenant) <= bytes {
            return 0;
        }
        let mut children: HashMap<PageKey, u32> = HashMap::new();
        let own = || self.entries.values().filter(|entry| entry.slot.name.tenant == tenant);
        own().for_each(|entry| *children.entry(entry.slot.parent).or_default() += 1);
        let childless = |entry: &&Entry, children: &HashMap<PageKey, u32>| {
            children.get(&entry.slot.name.key).is_none_or(|&count| count == 0)
                && !keep.contains(&entry.slot.name.key)
        };
        let mut by_key: HashMap<PageKey, Vec<PageName>> = HashMap::new();
        own().for_each(|entry| by_key.entry(entry.slot.name.key).or_default().push(entry.slot.name));
        let leaves = own().filter(|entry| childless(entry, &children));
        let mut leaves: BTreeSet<_> = leaves.map(|entry| (entry.used, entry.slot.name)).collect();
        let mut count = 0;
        while self.bytes(tenant) > bytes
            && let Some((_, name)) = leaves.pop_first()
        {
            let Some(entry) = self.remove(&name) else { continue };
            count += 1;
            let parent = entry.slot.parent;
            let left = children.get_mut(&parent).expect("counted above");
            *left -= 1;
            if *left == 0 && !keep.contains(&parent) {
                let freed = by_key.get(&parent).into_iter().flatten();
                let freed = freed.filter_map(|name| self.entries.get(name));
                leaves.extend(freed.map(|entry| (entry.used, entry.slot.name)));
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENANT: TenantId = TenantId([0; 16]);

    fn insert(index: &mut Index, segment: &Arc<Segment>, key: u8, parent: u8) {
        let name = PageName {
            tenant: TENANT,
            key: PageKey([key; 32]),
            class: ClassId([0; 32]),
            group: 0,
            kind: Kind::Attention,
        };
        let parent = PageKey([parent; 32]);
        let (serial, offset) = (u64::from(key), 0);
        let slot = Slot { name, parent, serial, offset, payload_bytes: 1, token_count: 32, tail: vec![] };
        segment.add(slot.disk_bytes());
        index.insert(segment, slot, &[]);
    }

    fn held(index: &Index) -> Vec<u8> {
        let mut keys: Vec<_> = index.entries().map(|entry| entry.slot.name.key.0[0]).collect();
        keys.sort_unstable();
        keys
    }

    /// 1 - 2 - 3
    ///   \ 4 - 5, and 6 alone.
    #[test]
    fn a_page_goes_after_all_its_children() {
        let (mut index, segment) = (Index::default(), Arc::new(Segment::new(TENANT, 1)));
        for (key, parent) in [(1, 0), (2, 1), (3, 2), (4, 1), (5, 4), (6, 0)] {
            insert(&mut index, &segment, key, parent);
        }
        let none = HashSet::new();
        let expected: [&[u8]; 7] =
            [&[], &[6], &[1, 6], &[1, 4, 6], &[1, 4, 5, 6], &[1, 2, 4, 5, 6], &[1, 2, 3, 4, 5, 6]];
        for left in (0..=6).rev() {
            index.evict(TENANT, left * 8192, &none);
            // The longest unused leaf goes first: 3, then 2 that it leaves bare, then 5, 4, 1 and 6.
            assert_eq!(held(&index), expected[left as usize], "{left} pages are left");
        }
        assert_eq!(segment.live_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_kept_page_keeps_those_it_follows() {
        let (mut index, segment) = (Index::default(), Arc::new(Segment::new(TENANT, 1)));
        for (key, parent) in [(1, 0), (2, 1), (3, 2), (4, 3)] {
            insert(&mut index, &segment, key, parent);
        }
        index.evict(TENANT, 0, &HashSet::from([PageKey([2; 32])]));
        assert_eq!(held(&index), [1, 2]);
    }
}
