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
use crate::prefix;
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

/// Stored pages that a sequence can go on after, together with those that are on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    /// Groups and indices of the pages that are not on the device, page by page.
    pages: Vec<(usize, usize)>,
    /// One past the last full page, and the tokens of a tail page there.
    full: usize,
    tail: usize,
    /// Tokens that it can go on after without.
    begin: usize,
}

/// Pages that are on their way from the store to a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loading {
    /// Names this attempt.
    pub(crate) id: LoadId,
    wanted: Wanted,
    /// How many of them have come.
    came: usize,
}

/// Names one attempt to read a sequence's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LoadId(pub(crate) u64);

impl Wanted {
    /// Tokens that it can go on after when all have come.
    fn tokens(&self) -> usize {
        self.full * PAGE_TOKENS + self.tail
    }
}

impl Loading {
    fn is_whole(&self) -> bool {
        self.came == self.wanted.pages.len()
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
    /// Page tables `[group][position / PAGE_TOKENS]`. Of a windowed group, pages that no later token sees are 0, and those
    /// of tokens behind the next step are not taken yet.
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
            pages.iter().filter(|page| page.0 != 0).for_each(|&page| pool.share(group, page));
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
        if !is_drawing {
            return 0;
        }
        let len = self.tokens.len();
        more.min(context.saturating_sub(len + 1)).min(self.submission.chain.table_room(len))
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
        if !self.is_scoring() {
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

    /// Takes pages for what it is to compute, as many as possible of them already computed, if that leaves `spare` free
    /// pages in every group; and decides whether to wait for stored ones. `false` changes nothing.
    pub(crate) fn start(
        &mut self,
        pool: &mut KvPool,
        (spare, tokens_per_step): (usize, usize),
        (id, planner): (LoadId, &mut Planner),
    ) -> bool {
        let (known, begin) = self.find_computed(pool);
        let stored = self.find_stored((&known, begin), pool);
        let wins = |wanted: &Wanted| {
            planner.restores(wanted.pages.iter().map(|&(group, _)| group), wanted.tokens() - begin)
        };
        let is_declined = stored.as_ref().is_some_and(|wanted| !wins(wanted));
        let wanted = stored.filter(|_| !is_declined);
        let (tokens, shared) =
            wanted.as_ref().map_or((begin, begin / PAGE_TOKENS), |wanted| (wanted.tokens(), wanted.full));
        let mut pages = Vec::with_capacity(known.len());
        for (group, known) in known.iter().enumerate() {
            let window = pool.windows()[group];
            let first = pool.oldest(group, tokens);
            let known = |i: usize| known.get(i).copied().filter(|_| (first..shared).contains(&i));
            let end = end(self.tokens.len(), tokens + tokens_per_step, window);
            let mut table: Vec<PageId> = (0..end).map(|i| known(i).unwrap_or_default()).collect();
            let held = || table.iter().filter(|page| page.0 != 0);
            let freed = held().filter(|&&page| pool.refs(group, page) == 0).count();
            if pool.free_len(group) < freed + end.saturating_sub(first) - held().count() + spare {
                return false;
            }
            if wanted.is_some() && window.is_some() {
                // Those of the first step are taken before it.
                table.truncate(tokens.div_ceil(PAGE_TOKENS));
            }
            pages.push(table);
        }
        for (group, table) in pages.iter_mut().enumerate() {
            let first = pool.oldest(group, tokens).min(table.len());
            table.iter().filter(|page| page.0 != 0).for_each(|&page| pool.share(group, page));
            for page in table[first..].iter_mut().filter(|page| page.0 == 0) {
                *page = pool.take(group).expect("free pages were counted");
            }
        }
        self.pages = pages;
        self.computed = if self.goes_on_after(begin, pool) { begin } else { 0 };
        self.loading = wanted.map(|wanted| Loading { id, wanted, came: 0 });
        if is_declined {
            planner.has_refused();
            self.declined("planner");
        }
        true
    }

    /// The stored pages that it could wait for, where they reach further than what is on the device.
    fn find_stored(&self, (known, begin): (&[Vec<PageId>], usize), pool: &KvPool) -> Option<Wanted> {
        if self.is_scoring() {
            return None;
        }
        // A token is left to compute, since a page holds no logits.
        let most = self.tokens.len() - 1;
        let full = self.stored.pages.min(most / PAGE_TOKENS);
        let fits = full == self.stored.pages && self.stored.tokens() <= most;
        let tail = if fits { self.stored.tail } else { 0 };
        let mut wanted = Wanted { pages: Vec::new(), full, tail, begin };
        let tokens = wanted.tokens();
        if tokens <= begin {
            return None;
        }
        for page in 0..tokens.div_ceil(PAGE_TOKENS) {
            for (group, known) in known.iter().enumerate() {
                let is_known = page < full && known.get(page).is_some_and(|page| page.0 != 0);
                if page >= pool.oldest(group, tokens) && !is_known {
                    wanted.pages.push((group, page));
                }
            }
        }
        Some(wanted)
    }

    /// What the pages are that it waits for, in the order in which they are to come.
    pub(crate) fn wanted_headers(&mut self) -> Option<Vec<PageHeader>> {
        let Loading { wanted, .. } = self.loading.clone()?;
        let class = self.stored.class;
        let header = |&(group, page): &(usize, usize)| {
            let parent = self.parent(page);
            let len = if page < wanted.full { PAGE_TOKENS } else { wanted.tail };
            let tokens = &self.tokens[page * PAGE_TOKENS..][..len];
            self.submission.chain.page((class, group), self.rope_table, parent, tokens)
        };
        Some(wanted.pages.iter().map(header).collect())
    }

    /// Whether it holds all that the token after these sees.
    fn goes_on_after(&self, tokens: usize, pool: &KvPool) -> bool {
        self.pages.iter().enumerate().all(|(group, pages)| {
            let needed = pages.get(pool.oldest(group, tokens)..tokens.div_ceil(PAGE_TOKENS));
            needed.is_some_and(|pages| pages.iter().all(|page| page.0 != 0))
        })
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

    /// Where the next `count` pages of a load belong.
    pub(crate) fn targets(&self, count: usize) -> Vec<PageRef> {
        let Some(Loading { wanted, came, .. }) = &self.loading else { return Vec::new() };
        let targets = wanted.pages[*came..][..count].iter();
        targets.map(|&(group, page)| PageRef { group: group as u32, page: self.pages[group][page] }).collect()
    }

    /// The next `count` pages of a load are on the device.
    pub(crate) fn arrived(&mut self, count: usize, pool: &mut KvPool) {
        let Some(mut loading) = self.loading.take() else { return };
        self.is_mixed |= self.stored.class != self.submission.chain.class();
        let (wanted, came) = (&loading.wanted, loading.came + count);
        for &(group, page) in wanted.pages[loading.came..came].iter().filter(|(_, page)| *page < wanted.full)
        {
            self.publish(group, page, pool);
        }
        loading.came = came;
        let wanted = &loading.wanted;
        let next = wanted.pages.get(came).map(|&(_, page)| page * PAGE_TOKENS);
        let tokens = next.map_or(wanted.tokens(), |next| next.min(wanted.full * PAGE_TOKENS));
        if tokens > self.computed && self.goes_on_after(tokens, pool) {
            self.computed = tokens;
        }
        self.loading = Some(loading);
    }

    /// The load is over, and spared the computing of so many tokens. `None` where the sequence has to start over, since
    /// pages came without others that they are of no use without; what came can be found.
    pub(crate) fn end_load(&mut self, reason: Option<&'static str>, pool: &KvPool) -> Option<usize> {
        let loading = self.loading.take()?;
        if let Some(reason) = reason {
            self.declined(reason);
            // The store has let go of what it could not prove; what is computed in its place is handed over again.
            self.stored.pages = self.stored.pages.min(self.computed / PAGE_TOKENS);
            self.stored.tail = 0;
        }
        // In a single group that keeps all, whatever came continues what was there.
        let goes_on = loading.is_whole() || matches!(pool.windows(), [None]);
        goes_on.then(|| self.computed - loading.wanted.begin)
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

    /// Group and key of the first full page that it would load.
    pub(crate) fn first_wanted(&mut self, pool: &KvPool) -> Option<(usize, PageKey)> {
        let (known, begin) = self.find_computed(pool);
        let wanted = self.find_stored((&known, begin), pool)?;
        let &(group, page) = wanted.pages.first().filter(|(_, page)| *page < wanted.full)?;
        Some((group, self.header(page).key))
    }

    /// Whether it waits for the pages of this load.
    pub(crate) fn is_waiting_for(&self, id: LoadId) -> bool {
        self.loading.as_ref().is_some_and(|loading| loading.id == id)
    }

    /// Whether this full page of a group is one of those that it still waits for.
    pub(crate) fn is_loading_full(&mut self, (group, key): (usize, PageKey)) -> bool {
        let Some(loading) = self.loading.take() else { return false };
        let mut waits = loading.wanted.pages[loading.came..].iter();
        let is_it = |&(of, page): &(usize, usize)| {
            of == group && page < loading.wanted.full && self.header(page).key == key
        };
        let is_among = waits.any(is_it);
        self.loading = Some(loading);
        is_among
    }

    /// Whether log-probabilities of its prompt are still to come.
    fn is_scoring(&self) -> bool {
        self.request().prompt_logprobs.is_some() && self.generated() == 0
    }

    /// The pages from the start that are known in every group that keeps all, and those at the same places in other
    /// groups, `[group][page]`; and how many tokens it can go on after with them. At least one token is left, since a
    /// page holds no logits; and no token whose successor is still to be scored is passed over.
    fn find_computed(&mut self, pool: &KvPool) -> (Vec<Vec<PageId>>, usize) {
        let most = if self.is_scoring() { self.scores.len() } else { usize::MAX };
        let most = most.min(self.tokens.len() - 1) / PAGE_TOKENS;
        let (windows, groups) = (pool.windows(), 0..pool.group_count());
        let mut known = vec![Vec::new(); groups.len()];
        let run = (0..most).take_while(|&page| {
            let header = self.header(page);
            let found: Vec<_> = groups.clone().map(|group| pool.find(group, &header)).collect();
            let is_run = groups.clone().all(|group| windows[group].is_some() || found[group].is_some());
            if is_run {
                known.iter_mut().zip(found).for_each(|(known, page)| known.push(page.unwrap_or_default()));
            }
            is_run && !groups.is_empty()
        });
        let run = run.count();
        // Pages that a window has passed over would never reach the store.
        let must = self.request().keep.durability == Durability::Full && windows.iter().any(Option::is_some);
        let most = if must { run.min(self.stored.pages) } else { run };
        let pages = prefix::usable(most, windows, |group, page| known[group][page].0 != 0);
        (known, pages * PAGE_TOKENS)
    }

    /// Makes sure that what it can compute next, guesses too, has pages that it may write to. `false` if pages are short;
    /// nothing has changed then. A page shared with a fork is copied before it is written.
    pub(crate) fn grow(
        &mut self,
        pool: &mut KvPool,
        tokens_per_step: usize,
        copies: &mut Vec<(PageRef, PageRef)>,
    ) -> bool {
        if self.loading.is_some() {
            return true;
        }
        let len = self.tokens.len() + self.draft.len();
        let (first, next) = (self.computed / PAGE_TOKENS, self.computed + tokens_per_step);
        let new = |group: usize, pages: &[PageId], pool: &KvPool| {
            end(len, next, pool.windows()[group]).saturating_sub(pages.len())
        };
        let is_short = |(group, pages): (usize, &Vec<PageId>)| {
            let is_shared = pages.get(first).is_some_and(|&page| pool.refs(group, page) > 1);
            pool.free_len(group) < new(group, pages, pool) + usize::from(is_shared)
        };
        if self.pages.iter().enumerate().any(is_short) {
            return false;
        }
        for (group, pages) in self.pages.iter_mut().enumerate() {
            for _ in 0..new(group, pages, pool) {
                pages.push(pool.take(group).expect("free pages were counted"));
            }
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
        for page in sealed..self.computed / PAGE_TOKENS {
            (0..self.pages.len()).for_each(|group| self.publish(group, page, pool));
        }
    }

    /// Makes a sealed page findable.
    fn publish(&mut self, group: usize, page: usize, pool: &mut KvPool) {
        if !self.is_mixed {
            let header = self.header(page);
            pool.publish(group, self.pages[group][page], &header);
        }
    }

    /// Gives back the pages that no later token sees. They can be found until they are reused.
    pub(crate) fn release_unseen(&mut self, pool: &mut KvPool) {
        for (group, pages) in self.pages.iter_mut().enumerate() {
            let seen = pool.oldest(group, self.computed).min(pages.len());
            for page in pages[..seen].iter_mut().rev().take_while(|page| page.0 != 0) {
                pool.release(group, std::mem::take(page));
            }
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
            let pages = pages.drain(..).rev().filter(|page| page.0 != 0);
            pages.for_each(|page| pool.release(group, page));
        }
        self.pages.clear();
        self.computed = 0;
        self.draft.clear();
        self.loading = None;
        self.is_mixed = false;
    }
}

/// One past the last page of a group that a sequence of `len` tokens needs to compute up to `next` of them: where there is
/// a window, pages are taken step by step, since as many are given back.
fn end(len: usize, next: usize, window: Option<usize>) -> usize {
    if window.is_some() { len.min(next).div_ceil(PAGE_TOKENS) } else { len.div_ceil(PAGE_TOKENS) }
}
