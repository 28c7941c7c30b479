//! One choice of a request: its tokens, how many of them are computed, and the pages that hold them.
//!
//! Whether a sequence waits, prefills or decodes is derived from these and stored nowhere.

use std::ops::Range;
use std::sync::Arc;

use mainstay_backend_api::{PAGE_TOKENS, PageId, PageRef};
use mainstay_store::{Durability, PageHeader, PageKey};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::chain::{Chain, Header, Stored};
use crate::draft::Luck;
use crate::mask::Held;
use crate::planner::Planner;
use crate::pool::KvPool;
use crate::request::{Goal, KvReport, KvState};
use crate::{Event, Request, RequestId, Score};

/// A request as all its choices see it.
#[derive(Debug)]
pub(crate) struct Submission {
    /// What was asked; its prompt has moved into the sequence.
    pub(crate) request: Request,
    pub(crate) prompt_len: usize,
    pub(crate) goal: Goal,
    /// What names its pages.
    pub(crate) chain: Chain,
    pub(crate) events: UnboundedSender<Event>,
}

/// Pages that are on their way from the store to a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loading {
    /// Names this attempt.
    pub(crate) id: LoadId,
    /// The page that comes next.
    pub(crate) next: usize,
    /// One past the last full page, and the tokens of a tail page there.
    full: usize,
    tail: usize,
}

/// Names one attempt to read a sequence's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LoadId(pub(crate) u64);

impl Loading {
    /// One past the last page.
    pub(crate) fn end(&self) -> usize {
        self.full + usize::from(self.tail > 0)
    }
}

/// A choice of a request. Ordered by arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SequenceId {
    pub(crate) request: RequestId,
    pub(crate) choice: u32,
}

/// Whose turn it is: first by priority, then by arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    priority: i32,
    pub(crate) id: SequenceId,
}

/// A choice under way. Until the prompt is computed, choice 0 stands for all choices of its request.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) submission: Arc<Submission>,
    pub(crate) tokens: Vec<u32>,
    /// Tokens that have keys and values in `pages`; less than all of them whenever it runs.
    pub(crate) computed: usize,
    /// Page tables `[group][position / PAGE_TOKENS]`.
    pub(crate) pages: Vec<Vec<PageId>>,
    /// By which of the model's rope tables its keys are turned: that of its length when it began, until it grows beyond.
    pub(crate) rope_table: usize,
    /// Keys of its full pages so far as they were needed; tokens are only appended, so they stay true of its table.
    keys: Vec<PageKey>,
    /// Log-probabilities of prompt tokens from the second on, if they were asked for.
    pub(crate) scores: Vec<Score>,
    /// Its share of the waiting room, until it starts for the first time.
    pub(crate) seat: Option<OwnedSemaphorePermit>,
    /// What the store has of its tokens, or was handed.
    pub(crate) stored: Stored,
    pub(crate) loading: Option<Loading>,
    /// What was reused, until its owner is told.
    pub(crate) report: Option<KvReport>,
    /// How it is held to the request's grammar.
    pub(crate) held: Held,
    /// Guesses of the tokens behind its last, for the step that is planned.
    pub(crate) draft: Vec<u32>,
    pub(crate) luck: Luck,
    /// Another class computed some of its pages, so that what is computed after them is not this class's either.
    is_mixed: bool,
}

impl Sequence {
    /// Choice 0 of a request.
    pub(crate) fn new(
        request: RequestId,
        submission: Arc<Submission>,
        tokens: Vec<u32>,
        seat: OwnedSemaphorePermit,
        (stored, keys): (Stored, Vec<PageKey>),
    ) -> Self {
        let held = Held::new(&submission.request, &tokens[submission.prompt_len..]);
        Self {
            id: SequenceId { request, choice: 0 },
            rope_table: submission.chain.rope_table(tokens.len()),
            submission,
            tokens,
            computed: 0,
            pages: Vec::new(),
            keys,
            scores: Vec::new(),
            seat: Some(seat),
            report: Some(KvReport {
                state: KvState::Cold,
                reason: stored.lack,
                cached_tokens: 0,
                restored_tokens: 0,
                restore_ms: 0.0,
            }),
            stored,
            loading: None,
            held,
            draft: Vec::new(),
            luck: Luck::default(),
            is_mixed: false,
        }
    }

    /// Another choice, which shares all pages, the last one too: whoever writes to it first copies it.
    pub(crate) fn fork(&self, choice: u32, pool: &mut KvPool) -> Self {
        for (group, pages) in self.pages.iter().enumerate() {
            pages.iter().for_each(|&page| pool.share(group, page));
        }
        Self {
            id: SequenceId { choice, ..self.id },
            submission: Arc::clone(&self.submission),
            tokens: self.tokens.clone(),
            computed: self.computed,
            pages: self.pages.clone(),
            rope_table: self.rope_table,
            keys: self.keys.clone(),
            scores: Vec::new(),
            seat: None,
            stored: self.stored.clone(),
            loading: None,
            report: None,
            held: Held::new(self.request(), &[]),
            draft: Vec::new(),
            luck: Luck::default(),
            is_mixed: self.is_mixed,
        }
    }

    pub(crate) fn request(&self) -> &Request {
        &self.submission.request
    }

    pub(crate) fn rank(&self) -> Rank {
        Rank { priority: self.request().priority, id: self.id }
    }

    /// Tokens drawn so far.
    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.submission.prompt_len
    }

    /// Tokens to compute before the next one can be drawn.
    pub(crate) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// How many tokens behind the next one it may come to draw.
    pub(crate) fn draft_room(&self, context: usize) -> usize {
        let more = self.request().stop.max_tokens.saturating_sub(self.generated() + 1);
        let is_drawing = self.generated() > 0 && self.remaining() == 1 && matches!(self.held, Held::Free);
        if is_drawing { more.min(context.saturating_sub(self.tokens.len() + 1)) } else { 0 }
    }

    /// Whether its next token can be drawn: that of a choice under a grammar cannot before its mask is there.
    pub(crate) fn may_draw(&self) -> bool {
        !matches!(self.held, Held::Unasked(_) | Held::Asked)
    }

    /// Whether it has something to compute in the next step.
    pub(crate) fn may_run(&self) -> bool {
        self.loading.is_none() && (self.may_draw() || self.remaining() > 1)
    }

    /// Tokens that the last row is asked for: one, or the first one of every choice.
    pub(crate) fn draws(&self) -> u32 {
        if matches!(self.held, Held::Ended) {
            return 0;
        }
        match (self.generated(), self.request().stop.max_tokens) {
            (0, 0) => 0,
            (0, _) => self.request().choices,
            _ => 1,
        }
    }

    /// Chunks that it may come to need in every step.
    pub(crate) fn slots(&self) -> usize {
        self.draws().max(1) as usize
    }

    /// Positions in the next `len` tokens whose successors in the prompt are to be scored.
    pub(crate) fn scored(&self, len: usize) -> Range<usize> {
        if self.request().prompt_logprobs.is_none() || self.generated() > 0 {
            return 0..0;
        }
        let start = self.computed.max(self.scores.len());
        start..(self.computed + len).min(self.submission.prompt_len - 1).max(start)
    }

    /// Output rows of a chunk of the next `len` tokens.
    pub(crate) fn rows(&self, len: usize) -> usize {
        let draws = if len == self.remaining() { self.draws() } else { 0 };
        self.scored(len).len() + draws as usize
    }

    /// What the full page at this index holds, or will hold.
    pub(crate) fn header(&mut self, page: usize) -> Header {
        let chain = &self.submission.chain;
        let tokens = |page: usize| {
            let (pages, _) = self.tokens.as_chunks::<PAGE_TOKENS>();
            pages[page]
        };
        while self.keys.len() <= page {
            let parent = self.keys.last().copied().unwrap_or(chain.root(self.rope_table));
            self.keys.push(chain.next(parent, &tokens(self.keys.len())).key);
        }
        let parent = if page == 0 { chain.root(self.rope_table) } else { self.keys[page - 1] };
        Header { key: self.keys[page], parent, tokens: tokens(page) }
    }

    /// Takes pages for all its tokens, as many as possible of them already computed, if that leaves `spare` free
    /// pages in every group. `false` changes nothing.
    pub(crate) fn start(&mut self, pool: &mut KvPool, spare: usize) -> bool {
        let groups = pool.group_count();
        let mut pages = self.find_computed(pool);
        let found = pages.first().map_or(0, Vec::len);
        let new = self.tokens.len().div_ceil(PAGE_TOKENS) - found;
        let fits = (0..groups).all(|group| {
            let freed = pages[group].iter().filter(|&&page| pool.refs(group, page) == 0).count();
            pool.free_len(group) >= freed + new + spare
        });
        if !fits {
            return false;
        }
        for (group, pages) in pages.iter_mut().enumerate() {
            pages.iter().for_each(|&page| pool.share(group, page));
            pages.extend((0..new).map(|_| pool.take(group).expect("free pages were counted")));
        }
        self.pages = pages;
        self.computed = found * PAGE_TOKENS;
        true
    }

    /// Decides whether to wait for stored pages behind those that were found; their headers, page by page, all groups
    /// of a page together. The pages that they go to are taken already.
    pub(crate) fn load(&mut self, id: LoadId, planner: &mut Planner) -> Option<Vec<PageHeader>> {
        let found = self.computed / PAGE_TOKENS;
        if self.request().prompt_logprobs.is_some() && self.generated() == 0 {
            return None;
        }
        // A token is left to compute, since a page holds no logits.
        let most = self.tokens.len() - 1;
        let full = self.stored.pages.min(most / PAGE_TOKENS);
        let fits = full == self.stored.pages && self.stored.tokens() <= most;
        let tail = if fits { self.stored.tail } else { 0 };
        let loading = Loading { id, next: found, full, tail };
        let pages = loading.end().checked_sub(found).filter(|&pages| pages > 0)?;
        if !planner.restores(pages, full * PAGE_TOKENS + tail - self.computed) {
            self.declined("planner");
            return None;
        }
        self.loading = Some(loading);
        let (class, groups) = (self.stored.class, self.pages.len());
        let mut headers = Vec::with_capacity(pages * groups);
        for i in found..loading.end() {
            let parent = self.parent(i);
            let tokens = if i < full { PAGE_TOKENS } else { tail };
            let tokens = &self.tokens[i * PAGE_TOKENS..][..tokens];
            let chain = &self.submission.chain;
            let page = |group| chain.page((class, group), self.rope_table, parent, tokens);
            headers.extend((0..groups).map(page));
        }
        Some(headers)
    }

    /// Stored pages were known and are computed again.
    pub(crate) fn declined(&mut self, reason: &'static str) {
        if let Some(report) = &mut self.report {
            report.reason = Some(reason);
            if report.cached_tokens == 0 {
                report.state = KvState::Recomputed;
            }
        }
    }

    /// Where the next `count` pages of a load belong, all groups of a page together.
    pub(crate) fn targets(&self, count: usize) -> Vec<PageRef> {
        let next = self.loading.map_or(0, |loading| loading.next);
        let page = |i: usize| {
            let groups = self.pages.iter().enumerate();
            groups.map(move |(group, pages)| PageRef { group: group as u32, page: pages[i] })
        };
        (next..next + count).flat_map(page).collect()
    }

    /// The next `count` pages of a load are on the device.
    pub(crate) fn arrived(&mut self, count: usize, pool: &mut KvPool) {
        let Some(mut loading) = self.loading else { return };
        self.is_mixed |= self.stored.class != self.submission.chain.class();
        for i in loading.next..loading.next + count {
            if i < loading.full {
                self.computed = (i + 1) * PAGE_TOKENS;
                self.publish(i, pool);
            } else {
                self.computed += loading.tail;
            }
        }
        loading.next += count;
        self.loading = Some(loading);
    }

    /// The load is over; what it brought stays.
    pub(crate) fn end_load(&mut self, reason: Option<&'static str>) {
        if self.loading.take().is_some()
            && let Some(reason) = reason
        {
            self.declined(reason);
            // The store has let go of what it could not prove; what is computed in its place is handed over again.
            self.stored.pages = self.stored.pages.min(self.computed / PAGE_TOKENS);
            self.stored.tail = 0;
        }
    }

    /// Notes what was reused, when all of it is there. `is_invariant` tells whether this backend gives equal bits
    /// however a prompt is cut.
    pub(crate) fn note_reuse(&mut self, restored_tokens: usize, restore_ms: f64, is_invariant: bool) {
        let (cached_tokens, is_mixed) = (self.computed, self.is_mixed);
        let Some(report) = &mut self.report else { return };
        (report.cached_tokens, report.restored_tokens, report.restore_ms) =
            (cached_tokens, restored_tokens, restore_ms);
        if cached_tokens > 0 {
            report.state = if is_mixed || !is_invariant { KvState::Equivalent } else { KvState::Exact };
        }
    }

    /// Whether its pages go to the store.
    fn is_kept(&self) -> bool {
        self.request().keep.durability != Durability::Ephemeral && !self.is_mixed
    }

    /// Full pages that are computed and that the store was not handed yet: it is from now on.
    pub(crate) fn take_unstored(&mut self) -> Range<usize> {
        let computed = self.computed / PAGE_TOKENS;
        if !self.is_kept() || self.stored.pages >= computed {
            return 0..0;
        }
        let first = std::mem::replace(&mut self.stored.pages, computed);
        self.stored.tail = 0;
        first..computed
    }

    /// Tokens in its last page, if they are to be stored as a tail: its index and their count.
    pub(crate) fn unstored_tail(&self) -> Option<(usize, usize)> {
        let (page, tokens) = (self.computed / PAGE_TOKENS, self.computed % PAGE_TOKENS);
        let known = self.stored.tokens() == self.computed;
        (self.is_kept() && tokens > 0 && !known).then_some((page, tokens))
    }

    /// The key before a page.
    pub(crate) fn parent(&mut self, page: usize) -> PageKey {
        let root = self.submission.chain.root(self.rope_table);
        page.checked_sub(1).map_or(root, |before| self.header(before).key)
    }

    /// The key of the first page that it has to compute or to load.
    pub(crate) fn first_missing(&mut self, pool: &KvPool) -> Option<PageKey> {
        let found = self.find_computed(pool).first().map_or(0, Vec::len);
        (found < self.stored.pages).then(|| self.header(found).key)
    }

    /// Whether this full page is one of those that it still waits for.
    pub(crate) fn is_loading_full(&mut self, key: PageKey) -> bool {
        self.loading.is_some_and(|loading| (loading.next..loading.full).any(|i| self.header(i).key == key))
    }

    /// The longest run of pages from the start that are known in every group, `[group][page]`. At least one token
    /// is left, since a page holds no logits; and no token whose successor is still to be scored is passed over.
    fn find_computed(&mut self, pool: &KvPool) -> Vec<Vec<PageId>> {
        let scoring = self.request().prompt_logprobs.is_some() && self.generated() == 0;
        let most = if scoring { self.scores.len() } else { usize::MAX };
        let most = most.min(self.tokens.len() - 1) / PAGE_TOKENS;
        let mut pages = vec![Vec::new(); pool.group_count()];
        if pages.is_empty() {
            return pages;
        }
        for i in 0..most {
            let header = self.header(i);
            let found: Option<Vec<PageId>> =
                (0..pages.len()).map(|group| pool.find(group, &header)).collect();
            let Some(found) = found else { break };
            pages.iter_mut().zip(found).for_each(|(pages, page)| pages.push(page));
        }
        pages
    }

    /// Makes sure that all its tokens, guesses too, have pages that it may write to. `false` if pages are short; nothing
    /// has changed then. A page shared with a fork is copied before it is written.
    pub(crate) fn grow(&mut self, pool: &mut KvPool, copies: &mut Vec<(PageRef, PageRef)>) -> bool {
        let len = self.tokens.len() + self.draft.len();
        let (first, end) = (self.computed / PAGE_TOKENS, len.div_ceil(PAGE_TOKENS));
        let shared = |group: usize, pages: &[PageId], pool: &KvPool| {
            pages.get(first).is_some_and(|&page| pool.refs(group, page) > 1)
        };
        let fits = self.pages.iter().enumerate().all(|(group, pages)| {
            let new = end.saturating_sub(pages.len()) + usize::from(shared(group, pages, pool));
            pool.free_len(group) >= new
        });
        if !fits {
            return false;
        }
        for (group, pages) in self.pages.iter_mut().enumerate() {
            let mut take = || pool.take(group).expect("free pages were counted");
            pages.resize_with(end.max(pages.len()), &mut take);
            let old = pages[first];
            if pool.refs(group, old) > 1 {
                pages[first] = pool.take(group).expect("free pages were counted");
                pool.release(group, old);
                let page = |page| PageRef { group: group as u32, page };
                copies.push((page(old), page(pages[first])));
            }
        }
        true
    }

    /// Counts tokens as computed and makes the pages that they fill findable.
    pub(crate) fn advance(&mut self, len: usize, pool: &mut KvPool) {
        let sealed = self.computed / PAGE_TOKENS;
        self.computed += len;
        assert!(self.computed <= self.tokens.len(), "{} computed of {}", self.computed, self.tokens.len());
        (sealed..self.computed / PAGE_TOKENS).for_each(|i| self.publish(i, pool));
    }

    /// Makes a sealed page findable.
    fn publish(&mut self, page: usize, pool: &mut KvPool) {
        if self.is_mixed || self.pages.is_empty() {
            return;
        }
        let header = self.header(page);
        for (group, pages) in self.pages.iter().enumerate() {
            pool.publish(group, pages[page], &header);
        }
    }

    /// Whether its tokens have become too many for the rope table that its keys are turned by.
    pub(crate) fn outgrows_table(&self) -> bool {
        self.submission.chain.rope_table(self.tokens.len()) != self.rope_table
    }

    /// Goes on under the rope table of its length: nothing that was computed is of use.
    pub(crate) fn change_table(&mut self, pool: &mut KvPool) {
        self.release(pool);
        self.rope_table = self.submission.chain.rope_table(self.tokens.len());
        self.keys.clear();
        self.stored = self.submission.chain.nothing();
    }

    /// Gives all pages back; everything has to be computed again.
    pub(crate) fn release(&mut self, pool: &mut KvPool) {
        for (group, pages) in self.pages.iter_mut().enumerate() {
            // The end of a prefix is of no use without its beginning, so it is freed, and reused, first.
            pages.drain(..).rev().for_each(|page| pool.release(group, page));
        }
        self.pages.clear();
        self.computed = 0;
        self.draft.clear();
        self.loading = None;
        self.is_mixed = false;
    }
}
