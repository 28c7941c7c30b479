//! One choice of a request: its tokens, how many of them are computed, and the pages that hold them.
//!
//! Whether a sequence waits, prefills or decodes is derived from these and stored nowhere.

use std::ops::Range;
use std::sync::Arc;

use mainstay_backend_api::{PAGE_TOKENS, PageId, PageRef};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::key::{Header, KeyChain, PageKey};
use crate::pool::KvPool;
use crate::{Event, Request, RequestId, Score};

/// A request as all its choices see it.
#[derive(Debug)]
pub(crate) struct Submission {
    /// What was asked; its prompt has moved into the sequence.
    pub(crate) request: Request,
    pub(crate) prompt_len: usize,
    /// The key chains of its tenant.
    pub(crate) chain: KeyChain,
    pub(crate) events: UnboundedSender<Event>,
}

/// A choice of a request. Ordered by arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SequenceId {
    pub(crate) request: RequestId,
    pub(crate) choice: u32,
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
    /// Keys of its full pages so far as they were needed; tokens are only appended, so they stay true.
    keys: Vec<PageKey>,
    /// Log-probabilities of prompt tokens from the second on, if they were asked for.
    pub(crate) scores: Vec<Score>,
    /// Its share of the waiting room, until it starts for the first time.
    pub(crate) seat: Option<OwnedSemaphorePermit>,
}

impl Sequence {
    /// Choice 0 of a request.
    pub(crate) fn new(
        request: RequestId,
        submission: Arc<Submission>,
        prompt: Vec<u32>,
        seat: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            id: SequenceId { request, choice: 0 },
            submission,
            tokens: prompt,
            computed: 0,
            pages: Vec::new(),
            keys: Vec::new(),
            scores: Vec::new(),
            seat: Some(seat),
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
            keys: self.keys.clone(),
            scores: Vec::new(),
            seat: None,
        }
    }

    pub(crate) fn request(&self) -> &Request {
        &self.submission.request
    }

    /// Tokens drawn so far.
    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.submission.prompt_len
    }

    /// Tokens to compute before the next one can be drawn.
    pub(crate) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens that the last row is asked for: one, or the first one of every choice.
    pub(crate) fn draws(&self) -> u32 {
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
    fn header(&mut self, page: usize) -> Header {
        let chain = &self.submission.chain;
        let tokens = |page: usize| {
            let (pages, _) = self.tokens.as_chunks::<PAGE_TOKENS>();
            pages[page]
        };
        while self.keys.len() <= page {
            let parent = self.keys.last().copied().unwrap_or(chain.root());
            self.keys.push(chain.next(parent, &tokens(self.keys.len())).key);
        }
        let parent = if page == 0 { chain.root() } else { self.keys[page - 1] };
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

    /// The longest run of pages from the start that are known in every group, `[group][page]`. At least one token
    /// is left, since a page holds no logits; and no token whose successor is still to be scored is passed over.
    fn find_computed(&mut self, pool: &KvPool) -> Vec<Vec<PageId>> {
        let scoring = self.request().prompt_logprobs.is_some() && self.generated() == 0;
        let most = if scoring { self.scores.len() } else { usize::MAX };
        let most = most.min(self.tokens.len() - 1) / PAGE_TOKENS;
        let mut pages = vec![Vec::new(); pool.group_count()];
        for i in 0..most {
            let header = self.header(i);
            let found: Option<Vec<PageId>> =
                (0..pages.len()).map(|group| pool.find(group, &header)).collect();
            let Some(found) = found else { break };
            pages.iter_mut().zip(found).for_each(|(pages, page)| pages.push(page));
        }
        pages
    }

    /// Makes sure that all its tokens have pages that it may write to. `false` if pages are short; nothing has
    /// changed then. A page shared with a fork is copied before it is written.
    pub(crate) fn grow(&mut self, pool: &mut KvPool, copies: &mut Vec<(PageRef, PageRef)>) -> bool {
        let (first, end) = (self.computed / PAGE_TOKENS, self.tokens.len().div_ceil(PAGE_TOKENS));
        let shared = |group: usize, pages: &[PageId], pool: &KvPool| {
            pages.get(first).is_some_and(|&page| pool.refs(group, page) > 1)
        };
        let fits = self.pages.iter().enumerate().all(|(group, pages)| {
            let new = end - pages.len() + usize::from(shared(group, pages, pool));
            pool.free_len(group) >= new
        });
        if !fits {
            return false;
        }
        for (group, pages) in self.pages.iter_mut().enumerate() {
            let mut take = || pool.take(group).expect("free pages were counted");
            pages.resize_with(end, &mut take);
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
        for i in sealed..self.computed / PAGE_TOKENS {
            let header = self.header(i);
            for (group, pages) in self.pages.iter().enumerate() {
                pool.publish(group, pages[i], &header);
            }
        }
    }

    /// Gives all pages back; everything has to be computed again.
    pub(crate) fn release(&mut self, pool: &mut KvPool) {
        for (group, pages) in self.pages.iter_mut().enumerate() {
            // The end of a prefix is of no use without its beginning, so it is freed, and reused, first.
            pages.drain(..).rev().for_each(|page| pool.release(group, page));
        }
        self.pages.clear();
        self.computed = 0;
    }
}
