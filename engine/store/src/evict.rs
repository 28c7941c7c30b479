//! Work over all pages of the index in small steps, so that a look-up never waits for more than one of them.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::atomic::Ordering,
};

use crate::{
    index::Entry,
    key::{PageKey, TenantId},
    pages::{Pages, lock},
    record::PageName,
};

/// Pages looked at, or let go, under one hold of the lock.
const STEP: usize = 512;

/// Why pages are let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The tenant may have no more.
    Quota,
    /// The disk is full.
    DiskFull,
}

/// What eviction knows of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    name: PageName,
    parent: PageKey,
    used: u64,
    bytes: u64,
}

impl Pages {
    /// What `map` makes of the pages of a tenant, or of all. Pages that come or go meanwhile may be in it or not.
    pub(crate) fn gather<T>(&self, tenant: Option<TenantId>, map: impl Fn(&Entry) -> Option<T>) -> Vec<T> {
        let (mut gathered, mut after) = (Vec::new(), None);
        loop {
            // Of their own, for what is gathered may have to move as it grows.
            let (mut step, mut last) = (Vec::with_capacity(STEP), None);
            let index = lock(&self.index);
            for entry in index.after(tenant, after).take(STEP) {
                step.extend(map(entry));
                last = Some(entry.slot.name);
            }
            drop(index);
            if last.is_none() {
                return gathered;
            }
            gathered.extend(step);
            after = last;
            // A lock that is free is not yet another's: let those who wait for it run.
            std::thread::yield_now();
        }
    }

    /// Lets go of a tenant's pages until at most `bytes` are left, as far as may be: those without children first and of
    /// these the longest unused. A page with a child that stays, stays: the child could not be reached without it.
    pub(crate) fn evict(&self, tenant: TenantId, bytes: u64, reason: Reason) -> usize {
        let (now, has) = {
            let index = lock(&self.index);
            (index.calls(), index.bytes(tenant))
        };
        if has <= bytes {
            return 0;
        }
        let kept = self.keeper.get().map(|keeper| keeper(tenant)).unwrap_or_default();
        let mut seen = self.gather(Some(tenant), |entry| {
            let slot = &entry.slot;
            Some(Seen { name: slot.name, parent: slot.parent, used: entry.used, bytes: slot.disk_bytes() })
        });
        let mut evicted = 0;
        for keep in [&kept.preferred, &kept.pinned] {
            let over = lock(&self.index).bytes(tenant).saturating_sub(bytes);
            let chosen = choose(&seen, over, keep);
            evicted += self.let_go(&chosen, now, bytes);
            let gone: HashSet<_> = chosen.iter().map(|seen| seen.name).collect();
            seen.retain(|seen| !gone.contains(&seen.name));
        }
        let counter = match reason {
            Reason::Quota => &self.counts.evicted,
            Reason::DiskFull => &self.counts.evicted_disk_full,
        };
        counter.fetch_add(evicted as u64, Ordering::Relaxed);
        evicted
    }

    /// Removes the chosen pages in their order until the tenant has at most `bytes`; but none that was asked for or
    /// continued after `now`, and none that such a one follows.
    fn let_go(&self, chosen: &[Seen], now: u64, bytes: u64) -> usize {
        let (mut count, mut spared) = (0, HashSet::new());
        for chosen in chosen.chunks(STEP) {
            let mut index = lock(&self.index);
            for seen in chosen {
                if index.bytes(seen.name.tenant) <= bytes {
                    return count;
                }
                let is_spared = spared.contains(&seen.name.key) || index.used(&seen.name) > Some(now);
                if is_spared {
                    spared.insert(seen.parent);
                } else {
                    count += usize::from(index.remove(&seen.name).is_some());
                }
            }
            drop(index);
            std::thread::yield_now();
        }
        count
    }

    /// Forgets all pages of a tenant.
    pub(crate) fn remove_tenant(&self, tenant: TenantId) {
        let names = self.gather(Some(tenant), |entry| Some(entry.slot.name));
        for names in names.chunks(STEP) {
            let mut index = lock(&self.index);
            for name in names {
                index.remove(name);
            }
            drop(index);
            std::thread::yield_now();
        }
        lock(&self.index).remove_tenant(tenant);
    }
}

/// Pages of one tenant whose going frees at least `over` bytes, if there are as many; children before their parents.
fn choose(seen: &[Seen], over: u64, keep: &HashSet<PageKey>) -> Vec<Seen> {
    let (mut children, mut by_key) = (HashMap::<_, u32>::new(), HashMap::<_, Vec<usize>>::new());
    for (i, page) in seen.iter().enumerate() {
        *children.entry(page.parent).or_default() += 1;
        by_key.entry(page.name.key).or_default().push(i);
    }
    let is_leaf = |page: &Seen| !children.contains_key(&page.name.key) && !keep.contains(&page.name.key);
    let leaves = seen.iter().enumerate().filter(|(_, page)| is_leaf(page));
    let mut leaves: BTreeSet<_> = leaves.map(|(i, page)| (page.used, page.name, i)).collect();
    let (mut chosen, mut freed) = (Vec::new(), 0);
    while freed < over
        && let Some((_, _, i)) = leaves.pop_first()
    {
        let page = seen[i];
        freed += page.bytes;
        chosen.push(page);
        let left = children.get_mut(&page.parent).expect("counted above");
        *left -= 1;
        if *left == 0 && !keep.contains(&page.parent) {
            let bare = by_key.get(&page.parent).into_iter().flatten();
            leaves.extend(bare.map(|&i| (seen[i].used, seen[i].name, i)));
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    };

    use super::*;
    use crate::{
        index::{Index, tests::insert},
        key::ClassId,
        record::Kind,
        seal::tests::{TENANT, keys},
        segment::Segment,
        sim::{SimClock, SimDisk},
        writer::Writer,
    };

    fn pages(index: Index) -> Pages {
        let world = (Arc::new(SimDisk::new(1)) as _, Arc::new(SimClock::new(0)) as _);
        let keys = Arc::new(keys(1, None));
        Pages::new(world, (keys, 1), crate::Options::default(), index, Writer::new(1, 1))
    }

    fn name(key: u32) -> PageName {
        let (group, kind) = (0, Kind::Attention);
        PageName { tenant: TENANT, key: page_key(key), class: ClassId([0; 32]), group, kind }
    }

    fn page_key(key: u32) -> PageKey {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&key.to_be_bytes());
        PageKey(bytes)
    }

    fn held(pages: &Pages) -> Vec<u32> {
        let key = |entry: &Entry| entry.slot.name.key.0.first_chunk().copied().map(u32::from_be_bytes);
        pages.gather(Some(TENANT), key)
    }

    fn filled(pairs: impl IntoIterator<Item = (u32, u32)>) -> (Pages, Arc<Segment>) {
        let (mut index, segment) = (Index::default(), Arc::new(Segment::new(TENANT, 1)));
        pairs.into_iter().for_each(|(key, parent)| insert(&mut index, &segment, name(key), page_key(parent)));
        (pages(index), segment)
    }

    /// 1 - 2 - 3
    ///   \ 4 - 5, and 6 alone.
    #[test]
    fn a_page_goes_after_all_its_children() {
        let (pages, segment) = filled([(1, 0), (2, 1), (3, 2), (4, 1), (5, 4), (6, 0)]);
        let expected: [&[u32]; 7] =
            [&[], &[6], &[1, 6], &[1, 4, 6], &[1, 4, 5, 6], &[1, 2, 4, 5, 6], &[1, 2, 3, 4, 5, 6]];
        for left in (0..=6).rev() {
            pages.evict(TENANT, left * 8192, Reason::Quota);
            // The longest unused leaf goes first: 3, then 2 that it leaves bare, then 5, 4, 1 and 6.
            assert_eq!(held(&pages), expected[left as usize], "{left} pages are left");
        }
        assert_eq!(segment.live_bytes.load(Ordering::Relaxed), 0);
        assert_eq!(pages.counts.evicted.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn a_kept_page_keeps_those_it_follows() {
        let (pages, _) = filled([(1, 0), (2, 1), (3, 2), (4, 3)]);
        let seen = pages.gather(Some(TENANT), |entry| {
            let slot = &entry.slot;
            Some(Seen { name: slot.name, parent: slot.parent, used: entry.used, bytes: 8192 })
        });
        let chosen = choose(&seen, u64::MAX, &HashSet::from([page_key(2)]));
        assert_eq!(chosen.iter().map(|seen| seen.name).collect::<Vec<_>>(), [4, 3].map(name));
    }

    #[test]
    fn what_is_used_or_continued_while_it_is_decided_stays_with_what_it_follows() {
        for continues in [false, true] {
            let (pages, segment) = filled([(1, 0), (2, 1), (3, 2), (4, 0), (5, 4)]);
            let now = lock(&pages.index).calls();
            let seen = pages.gather(Some(TENANT), |entry| {
                let slot = &entry.slot;
                Some(Seen { name: slot.name, parent: slot.parent, used: entry.used, bytes: 8192 })
            });
            let chosen = choose(&seen, u64::MAX, &HashSet::new());
            assert_eq!(chosen.len(), 5);
            if continues {
                insert(&mut lock(&pages.index), &segment, name(6), page_key(2));
            } else {
                lock(&pages.index).get(&name(2));
            }
            pages.let_go(&chosen, now, 0);
            assert_eq!(held(&pages), if continues { vec![1, 2, 6] } else { vec![1, 2] });
        }
    }

    /// A hundred thousands of pages are looked at while others ask for theirs.
    #[test]
    fn look_ups_go_on_during_an_eviction() {
        const COUNT: u32 = 250_000;
        // Chains of a hundred pages.
        let (pages, _) = filled((1..=COUNT).map(|key| (key, if key % 100 == 1 { 0 } else { key - 1 })));
        let (ends, asked) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(Ordering::Relaxed) {
                    pages.contains(&name(1));
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            });
            while asked.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            let before = asked.load(Ordering::Relaxed);
            let evicted = pages.evict(TENANT, u64::from(COUNT / 2) * 8192, Reason::Quota);
            let during = asked.load(Ordering::Relaxed) - before;
            ends.store(true, Ordering::Relaxed);
            assert_eq!(evicted as u32, COUNT / 2);
            assert!(during >= 100, "{during} look-ups during an eviction");
        });
        let held: HashSet<_> = held(&pages).into_iter().collect();
        assert!(
            held.iter().all(|key| key % 100 == 1 || held.contains(&(key - 1))),
            "no child without its parent"
        );
    }
}
