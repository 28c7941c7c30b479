//! Which pages are referenced, which are free, and which sealed prefix each still holds.
//!
//! A freed page keeps its contents and its header until it is given out again, least recently freed first, so the
//! prefix cache is no second structure. Pages are numbers here; their bytes lie in the executor.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use mainstay_backend_api::{PageId, oldest_page};

use mainstay_store::PageKey;

use crate::chain::Header;

/// The pages of all groups.
#[derive(Debug)]
pub(crate) struct KvPool {
    /// How many positions back a token sees in each group, itself included.
    windows: Vec<Option<usize>>,
    groups: Vec<Group>,
}

/// The pages of one group.
#[derive(Debug)]
struct Group {
    /// Page 0 is both ends of the ring of free pages, since it is never given out.
    pages: Vec<Page>,
    by_key: HashMap<PageKey, PageId>,
    free_len: usize,
    /// Free pages with a header.
    cached_len: usize,
}

#[derive(Clone, Debug, Default)]
struct Page {
    refs: u32,
    /// What it holds, once sealed.
    header: Option<Box<Header>>,
    /// Its neighbours in the ring, given out before and after it; meaningless while it has references.
    before: u32,
    after: u32,
}

impl KvPool {
    /// Pools of this many pages each, page 0 of each included, and the window of each.
    pub(crate) fn new(pages: &[usize], windows: &[Option<usize>]) -> Self {
        assert_eq!(pages.len(), windows.len(), "page counts and windows of the groups");
        Self { windows: windows.to_vec(), groups: pages.iter().map(|&n| Group::new(n)).collect() }
    }

    /// The windows of the groups.
    pub(crate) fn windows(&self) -> &[Option<usize>] {
        &self.windows
    }

    /// Index of the oldest page of a group that a sequence needs to go on after this many tokens.
    pub(crate) fn oldest(&self, group: usize, tokens: usize) -> usize {
        oldest_page(self.windows[group], tokens)
    }

    pub(crate) fn group_count(&self) -> usize {
        self.groups.len()
    }

    /// Pages of a group without references.
    pub(crate) fn free_len(&self, group: usize) -> usize {
        self.groups[group].free_len
    }

    pub(crate) fn refs(&self, group: usize, page: PageId) -> u32 {
        self.groups[group].pages[page.0 as usize].refs
    }

    /// Gives out the page that was freed longest ago, forgetting what it held; one reference is the caller's.
    pub(crate) fn take(&mut self, group: usize) -> Option<PageId> {
        self.groups[group].take()
    }

    /// Adds a reference, to a free page also.
    pub(crate) fn share(&mut self, group: usize, page: PageId) {
        self.groups[group].share(page);
    }

    /// Gives a reference back. The last one frees the page.
    pub(crate) fn release(&mut self, group: usize, page: PageId) {
        self.groups[group].release(page);
    }

    /// The page that holds exactly this.
    pub(crate) fn find(&self, group: usize, header: &Header) -> Option<PageId> {
        let group = &self.groups[group];
        let page = *group.by_key.get(&header.key)?;
        (group.pages[page.0 as usize].header.as_deref() == Some(header)).then_some(page)
    }

    /// Makes a sealed page findable. Where another page has the key already, that one stays.
    pub(crate) fn publish(&mut self, group: usize, page: PageId, header: &Header) {
        self.groups[group].publish(page, header);
    }

    /// Pages with references, in all groups.
    pub(crate) fn used_len(&self) -> usize {
        self.total_len() - self.groups.iter().map(|g| g.free_len).sum::<usize>()
    }

    /// Free pages that still hold a sealed prefix, in all groups.
    pub(crate) fn cached_len(&self) -> usize {
        self.groups.iter().map(|g| g.cached_len).sum()
    }

    /// Pages that can be given out, in all groups.
    pub(crate) fn total_len(&self) -> usize {
        self.groups.iter().map(|g| g.pages.len() - 1).sum()
    }
}

impl Group {
    fn new(pages: usize) -> Self {
        let mut group = Self {
            pages: vec![Page::default(); pages.max(1)],
            by_key: HashMap::new(),
            free_len: 0,
            cached_len: 0,
        };
        (1..group.pages.len() as u32).for_each(|page| group.link_before(0, page));
        group
    }

    fn page(&mut self, page: u32) -> &mut Page {
        &mut self.pages[page as usize]
    }

    /// Puts a page into the ring.
    fn link_before(&mut self, after: u32, page: u32) {
        let before = self.page(after).before;
        self.page(before).after = page;
        self.page(after).before = page;
        (self.page(page).before, self.page(page).after) = (before, after);
        self.free_len += 1;
        self.cached_len += usize::from(self.page(page).header.is_some());
    }

    fn unlink(&mut self, page: u32) {
        let (before, after) = (self.page(page).before, self.page(page).after);
        self.page(before).after = after;
        self.page(after).before = before;
        self.free_len -= 1;
        self.cached_len -= usize::from(self.page(page).header.is_some());
    }

    fn take(&mut self) -> Option<PageId> {
        let page = self.page(0).after;
        if page == 0 {
            return None;
        }
        self.unlink(page);
        if let Some(header) = self.page(page).header.take() {
            self.by_key.remove(&header.key);
        }
        self.page(page).refs = 1;
        Some(PageId(page))
    }

    fn share(&mut self, page: PageId) {
        assert!(page.0 != 0, "page 0 is never given out");
        if self.page(page.0).refs == 0 {
            self.unlink(page.0);
        }
        self.page(page.0).refs += 1;
    }

    fn release(&mut self, page: PageId) {
        assert!(self.page(page.0).refs > 0, "{page:?} has no reference to give back");
        self.page(page.0).refs -= 1;
        if self.page(page.0).refs == 0 {
            // A page that holds nothing findable is given out first.
            let after = if self.page(page.0).header.is_some() { 0 } else { self.page(0).after };
            self.link_before(after, page.0);
        }
    }

    fn publish(&mut self, page: PageId, header: &Header) {
        let found = self.page(page.0);
        assert!(found.refs > 0 && found.header.is_none(), "{page:?} is sealed by its owner, once");
        if let Entry::Vacant(entry) = self.by_key.entry(header.key) {
            entry.insert(page);
            self.page(page.0).header = Some(Box::new(*header));
        }
    }
}

#[cfg(test)]
impl KvPool {
    /// Asserts that the books agree with each other and with these references from outside.
    pub(crate) fn audit(&self, held: &HashMap<(usize, PageId), u32>) {
        for (g, group) in self.groups.iter().enumerate() {
            let mut free = std::collections::HashSet::new();
            let mut at = group.pages[0].after;
            while at != 0 {
                assert!(free.insert(at), "page {at} is twice in the ring");
                assert_eq!(group.pages[group.pages[at as usize].after as usize].before, at);
                at = group.pages[at as usize].after;
            }
            assert_eq!(free.len(), group.free_len);
            assert_eq!(group.pages[0].refs, 0);
            for (i, page) in group.pages.iter().enumerate().skip(1) {
                let id = PageId(i as u32);
                let refs = held.get(&(g, id)).copied().unwrap_or(0);
                assert_eq!(page.refs, refs, "references of {id:?} in group {g}");
                assert_eq!(free.contains(&id.0), refs == 0, "{id:?} is free or used, not both");
                if let Some(header) = &page.header {
                    assert_eq!(group.by_key.get(&header.key), Some(&id));
                }
            }
            assert_eq!(group.by_key.len(), group.pages.iter().filter(|p| p.header.is_some()).count());
            let cached = free.iter().filter(|&&p| group.pages[p as usize].header.is_some()).count();
            assert_eq!(cached, group.cached_len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(first: u32) -> Header {
        Header { key: PageKey([first as u8; 32]), parent: PageKey([255; 32]), tokens: [first; 32] }
    }

    #[test]
    fn all_pages_but_0_are_given_out() {
        let mut pool = KvPool::new(&[4], &[None]);
        let mut taken: Vec<u32> = std::iter::from_fn(|| pool.take(0)).map(|p| p.0).collect();
        taken.sort_unstable();
        assert_eq!(taken, [1, 2, 3]);
        assert_eq!((pool.used_len(), pool.total_len()), (3, 3));
    }

    #[test]
    fn groups_are_apart() {
        let mut pool = KvPool::new(&[2, 3], &[None, None]);
        assert!(pool.take(0).is_some() && pool.take(0).is_none());
        assert!(pool.take(1).is_some() && pool.take(1).is_some() && pool.take(1).is_none());
    }

    #[test]
    fn a_freed_page_is_found_until_it_is_reused_and_the_oldest_goes_first() {
        let mut pool = KvPool::new(&[4], &[None]);
        let pages: Vec<PageId> = std::iter::from_fn(|| pool.take(0)).collect();
        for (i, &page) in pages.iter().enumerate() {
            pool.publish(0, page, &header(i as u32));
        }
        for i in [1, 0, 2] {
            pool.release(0, pages[i]);
        }
        assert_eq!((pool.free_len(0), pool.cached_len()), (3, 3));
        // Use makes a page young again.
        let hit = pool.find(0, &header(1)).unwrap();
        pool.share(0, hit);
        assert_eq!(pool.cached_len(), 2);
        pool.release(0, hit);
        let order: Vec<PageId> = std::iter::from_fn(|| pool.take(0)).collect();
        assert_eq!(order, [pages[0], pages[2], pages[1]]);
        assert!((0..3).all(|i| pool.find(0, &header(i)).is_none()));
        assert_eq!(pool.cached_len(), 0);
    }

    #[test]
    fn pages_that_hold_nothing_go_before_cached_ones() {
        let mut pool = KvPool::new(&[3], &[None]);
        let (a, b) = (pool.take(0).unwrap(), pool.take(0).unwrap());
        pool.publish(0, a, &header(1));
        pool.release(0, a);
        pool.release(0, b);
        assert_eq!(pool.take(0), Some(b));
        assert_eq!(pool.find(0, &header(1)), Some(a));
    }

    #[test]
    fn a_shared_page_is_freed_by_its_last_owner() {
        let mut pool = KvPool::new(&[2], &[None]);
        let page = pool.take(0).unwrap();
        pool.share(0, page);
        pool.release(0, page);
        assert_eq!((pool.refs(0, page), pool.free_len(0)), (1, 0));
        pool.release(0, page);
        assert_eq!((pool.refs(0, page), pool.free_len(0)), (0, 1));
        pool.audit(&HashMap::new());
    }

    #[test]
    fn the_first_page_of_a_key_stays() {
        let mut pool = KvPool::new(&[3], &[None]);
        let (a, b) = (pool.take(0).unwrap(), pool.take(0).unwrap());
        pool.publish(0, a, &header(1));
        pool.publish(0, b, &header(1));
        assert_eq!(pool.find(0, &header(1)), Some(a));
        pool.release(0, a);
        pool.release(0, b);
        assert_eq!(pool.cached_len(), 1);
        pool.audit(&HashMap::new());
    }

    #[test]
    fn a_collision_is_a_miss() {
        let mut pool = KvPool::new(&[2], &[None]);
        let page = pool.take(0).unwrap();
        pool.publish(0, page, &header(1));
        let collides = Header { tokens: [9; 32], ..header(1) };
        assert_eq!(pool.find(0, &collides), None);
        assert_eq!(pool.find(0, &Header { parent: header(5).key, ..header(1) }), None);
        assert_eq!(pool.find(0, &header(1)), Some(page));
    }
}
