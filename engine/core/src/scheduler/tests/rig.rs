//! A scheduler, a pool and an echo executor driven by hand; the books are checked at every turn.

use std::collections::HashMap;

use mainstay_backend_api::echo::{EchoExecutor, expected_of};
use mainstay_backend_api::{Executor, KvDType, PAGE_TOKENS, PageId, StoredPage, Ticket, pages_max};
use mainstay_store::sim::{SimClock, SimDisk, SimEntropy};
use mainstay_store::{KeyChain, Options, Quota, Store, Tenant, TenantId, TenantSecret};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::super::*;
use crate::chain::Chain;
use crate::identity::{Identity, ModelIdentity};
use crate::mask::forbid;
use crate::planner::RestorePolicy;
use crate::{Grammar, Keep, Masker, Request, SamplingRequest, StopRule};

pub(super) const VOCAB: usize = 40;

pub(super) struct Rig {
    pub(super) scheduler: Scheduler,
    pub(super) pool: KvPool,
    pub(super) step: Step,
    executor: EchoExecutor,
    out: StepOutput,
    identity: Identity,
    seats: Arc<Semaphore>,
    submitted: u64,
    /// Who wrote a page last.
    owners: HashMap<(usize, PageId), Arc<str>>,
    planner: Planner,
    pub(super) store: Option<Store>,
    /// Masks that the scheduler asked for.
    pub(super) asked: Vec<Ask>,
    /// Loads that the scheduler asked for, and how many pages of each were delivered.
    pub(super) pending: Vec<(Load, usize)>,
}

pub(super) struct Client {
    pub(super) id: RequestId,
    pub(super) events: UnboundedReceiver<Event>,
}

impl Client {
    pub(super) fn hear(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.try_recv().ok()).collect()
    }
}

impl Rig {
    pub(super) fn new(limits: Limits) -> Self {
        Self::over(EchoExecutor::new(VOCAB, limits.clone()), limits)
    }

    /// Where the groups have these windows.
    pub(super) fn windowed(limits: Limits, windows: &[Option<usize>]) -> Self {
        Self::over(EchoExecutor::new(VOCAB, limits.clone()).windowed(windows), limits)
    }

    pub(super) fn over(executor: EchoExecutor, limits: Limits) -> Self {
        Self {
            pool: KvPool::new(&limits.pages, &executor.kv_layout().windows()),
            scheduler: Scheduler::new(limits, TierUse::default()),
            step: Step::default(),
            identity: Identity::of(
                &ModelIdentity::default(),
                executor.kv_layout(),
                &executor.numeric_class(),
            ),
            executor,
            out: StepOutput::default(),
            seats: Arc::new(Semaphore::new(1 << 20)),
            submitted: 0,
            owners: HashMap::new(),
            planner: Planner::new(RestorePolicy::Always, Vec::new()),
            store: None,
            asked: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// With a store on a simulated disk that holds about this many pages a tenant.
    pub(super) fn storing(mut self, pages: u64) -> Self {
        let quota = Quota { page_bytes: pages * 8192, ..Quota::default() };
        let options = Options { threads: false, reserve_bytes: 0, quota, ..Options::default() };
        let (disk, clock) = (Arc::new(SimDisk::new(1)), Arc::new(SimClock::new(1_700_000_000_000)));
        let opened = Store::open(disk, clock, Arc::new(SimEntropy::new(1)), options);
        self.store = Some(opened.unwrap().0);
        self.scheduler.tier = TierUse { spills: true, is_invariant: true };
        self
    }

    fn tenant(&self, name: &str) -> Tenant {
        self.store.as_ref().map_or_else(
            || Tenant {
                id: TenantId::of(name),
                chain: KeyChain::new(TenantSecret(blake3::derive_key("test", name.as_bytes()))),
            },
            |store| store.tenant(name).unwrap(),
        )
    }

    pub(super) fn submit(&mut self, mut request: Request) -> Client {
        let id = RequestId(self.submitted);
        self.submitted += 1;
        let (sender, events) = unbounded_channel();
        let mut tokens = std::mem::take(&mut request.prompt);
        let prompt_len = tokens.len();
        tokens.append(&mut request.drawn);
        let seat = Arc::clone(&self.seats).try_acquire_many_owned(request.choices).unwrap();
        let chain = Chain::new(
            self.tenant(&request.tenant),
            &self.identity,
            (request.adapter.as_ref(), &request.keep.salt),
        );
        let stored = match &self.store {
            Some(store) => chain.look_up(store, self.pool.windows(), &tokens, request.keep.reuse),
            None => (chain.nothing(), Vec::new()),
        };
        let submission = Submission { prompt_len, chain, request, goal: Goal::Tokens, events: sender };
        self.scheduler.submit(Sequence::new(id, Arc::new(submission), tokens, seat, stored));
        Client { id, events }
    }

    /// One turn of the loop. Returns whether the step went well.
    pub(super) fn turn(&mut self) -> bool {
        self.plan();
        self.transfer();
        if self.step.chunks.is_empty() {
            self.scheduler.send_events();
            return true;
        }
        let result = self.executor.submit(&self.step).and_then(|()| self.executor.finish(&mut self.out));
        match &result {
            Ok(()) => self.scheduler.commit(&mut self.pool, &self.out),
            Err(error) => self.scheduler.fail(&mut self.pool, error),
        }
        self.transfer();
        self.audit();
        self.scheduler.send_events();
        result.is_ok()
    }

    /// Hands pages to the store, and notes what is to be loaded.
    pub(super) fn transfer(&mut self) {
        for spill in std::mem::take(&mut self.scheduler.spills) {
            self.executor.start_read(&spill.reads, Ticket(0));
            let mut done = Vec::new();
            self.executor.poll(&mut done);
            let store = self.store.as_ref().expect("pages are handed over only where there is a store");
            let copy = done.remove(0);
            for ((header, bytes), digest) in spill.headers.into_iter().zip(copy.bytes).zip(copy.digests) {
                store.write(header, bytes, digest);
            }
            store.step();
            spill.reads.iter().for_each(|r| self.pool.release(r.page.group as usize, r.page.page));
        }
        self.asked.append(&mut self.scheduler.asks);
        let loads = std::mem::take(&mut self.scheduler.loads);
        self.pending.extend(loads.into_iter().map(|load| (load, 0)));
    }

    /// Computes a mask and hands it in.
    pub(super) fn mask(&mut self, at: usize) {
        let mut ask = self.asked.swap_remove(at);
        let result = ask.masking.compute();
        self.scheduler.masked(Masked { ask, result }, &mut self.pool);
        self.transfer();
        self.scheduler.send_events();
    }

    /// Delivers up to `most` more pages of a load; `true` when it is over.
    pub(super) fn deliver(&mut self, at: usize, most: usize) -> bool {
        let (load, delivered) = &mut self.pending[at];
        let Some(sequence) = self.scheduler.loading(load.id) else {
            self.pending.swap_remove(at);
            return true;
        };
        let tenant = sequence.request().tenant.clone();
        let wanted = &load.headers[*delivered..][..most.min(load.headers.len() - *delivered)];
        let store = self.store.as_ref().expect("a load is of a store");
        let read = wanted.iter().map_while(|header| store.read(header).ok());
        let pages: Vec<StoredPage> = read.map(|page| Box::new(page) as StoredPage).collect();
        let (count, missed) = (pages.len(), pages.len() < wanted.len());
        let to = sequence.targets(count);
        for page in &to {
            self.owners.insert((page.group as usize, page.page), tenant.clone());
        }
        if count > 0 {
            self.executor.start_write(to.into_iter().zip(pages).collect(), Ticket(1));
            self.executor.poll(&mut Vec::new());
            sequence.arrived(count, &mut self.pool);
        }
        *delivered += count;
        let over = missed || *delivered == load.headers.len();
        if over {
            let id = load.id;
            self.pending.swap_remove(at);
            self.scheduler.end_load(id, 1.0, missed.then_some("absent"), &mut self.pool);
            self.transfer();
        }
        over
    }

    pub(super) fn turns(&mut self, count: usize) {
        (0..count).for_each(|_| assert!(self.turn()));
    }

    /// Turns until nothing is left.
    pub(super) fn drain(&mut self) {
        for _ in 0..100_000 {
            if self.scheduler.is_idle() {
                assert_eq!((self.pool.used_len(), self.seats.available_permits()), (0, 1 << 20));
                return;
            }
            self.turn();
            if self.step.chunks.is_empty() && !self.pending.is_empty() {
                while !self.deliver(0, 2) {}
            }
            if self.step.chunks.is_empty() && !self.asked.is_empty() {
                self.mask(0);
            }
        }
        panic!("no end: {:?}", self.scheduler.stats(&self.pool));
    }

    pub(super) fn plan(&mut self) {
        let before: HashMap<_, _> = self.sequences().map(|s| (s.id, s.computed)).collect();
        let preemptions = self.scheduler.totals.preemptions;
        self.scheduler.plan(&mut self.pool, &mut self.step, &mut self.planner);
        let fell = self.sequences().filter(|s| before.get(&s.id).is_some_and(|&b| s.computed < b)).count();
        let preempted = (self.scheduler.totals.preemptions - preemptions) as usize;
        assert!(fell <= preempted, "{fell} sequences lost tokens, {preempted} were preempted");
        assert!(!self.sequences().any(|s| s.submission.events.is_closed()), "a cancelled sequence is kept");
        self.audit();
        self.own_pages();
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.scheduler.running.iter().chain(&self.scheduler.waiting)
    }

    fn audit(&self) {
        let mut held = HashMap::new();
        for sequence in self.sequences() {
            let (computed, len) = (sequence.computed, sequence.tokens.len());
            assert!(computed < len, "{:?} runs with {computed} of {len} tokens computed", sequence.id);
            for (group, pages) in sequence.pages.iter().enumerate() {
                assert!(pages.len() * PAGE_TOKENS >= computed);
                let held_pages = pages.iter().filter(|page| page.0 != 0);
                held_pages.clone().for_each(|&page| *held.entry((group, page)).or_default() += 1);
                let limits = &self.scheduler.limits;
                let most = pages_max(self.pool.windows()[group], limits.context, limits.tokens_per_step);
                assert!(held_pages.count() <= most, "{:?} holds more pages than it may need", sequence.id);
            }
        }
        for read in self.scheduler.spills.iter().flat_map(|spill| &spill.reads) {
            *held.entry((read.page.group as usize, read.page.page)).or_default() += 1;
        }
        self.pool.audit(&held);
        assert!(self.scheduler.waiting.iter().all(|s| s.computed == 0 && s.pages.is_empty()));
        assert!(self.scheduler.waiting.iter().is_sorted_by_key(|s| s.rank()));
        assert!(self.scheduler.running.is_sorted_by_key(Sequence::rank));
    }

    /// No sequence reads a page that another tenant wrote.
    fn own_pages(&mut self) {
        let mut owners = std::mem::take(&mut self.owners);
        for sequence in &self.scheduler.running {
            let tenant = &sequence.request().tenant;
            for (group, pages) in sequence.pages.iter().enumerate() {
                let (read, written) = pages.split_at(sequence.computed / PAGE_TOKENS);
                // Those that it waits for were entered when they came, or by who computed them.
                let written = if sequence.loading.is_some() { &[] } else { written };
                let read = read.iter().filter(|page| page.0 != 0);
                read.for_each(|&page| assert_eq!(owners.get(&(group, page)), Some(tenant)));
                owners.extend(written.iter().map(|&page| ((group, page), Arc::clone(tenant))));
            }
        }
        self.owners = owners;
    }
}

pub(super) fn limits(pages: &[usize]) -> Limits {
    Limits {
        context: (pages[0] - 1) * PAGE_TOKENS,
        tokens_per_step: 64,
        chunks: 8,
        output_rows: 8,
        pages: pages.to_vec(),
        kv_dtype: KvDType::F32,
    }
}

pub(super) fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        tenant: "t".into(),
        prompt: prompt.to_vec(),
        choices: 1,
        sampling: SamplingRequest { temperature: 1.0, seed: 7, ..SamplingRequest::greedy() },
        stop: StopRule { max_tokens, ..StopRule::default() },
        logprobs: None,
        prompt_logprobs: None,
        drawn: Vec::new(),
        keep: Keep::default(),
        priority: 0,
        adapter: None,
        grammar: None,
    }
}

/// Allows tokens by a hash of those before, and so many of them.
#[derive(Debug)]
pub(super) struct Hashed {
    pub(super) len: usize,
}

struct HashedChoice {
    left: usize,
    hash: u32,
}

impl Grammar for Hashed {
    fn start(&self) -> Box<dyn Masker> {
        Box::new(HashedChoice { left: self.len, hash: 7 })
    }
}

impl Masker for HashedChoice {
    fn advance(&mut self, drawn: &[u32], mask: &mut Vec<u32>) -> Result<(), String> {
        for token in drawn {
            self.left = self.left.checked_sub(1).ok_or("it was told of a token after its end")?;
            self.hash = self.hash.wrapping_mul(31).wrapping_add(*token);
        }
        mask.clear();
        if self.left > 0 {
            mask.resize(VOCAB.div_ceil(32), 0);
            let allowed = (0..VOCAB as u32).filter(|token| token.wrapping_add(self.hash).is_multiple_of(5));
            allowed.for_each(|token| mask[token as usize / 32] |= 1 << (token % 32));
        }
        Ok(())
    }
}

/// What a choice must give, whatever ran beside it.
pub(super) fn alone(request: &Request, choice: u32, context: usize) -> (Vec<u32>, FinishReason) {
    alone_within(None, request, choice, context)
}

/// As [`alone`], where the widest window of all groups is this.
pub(super) fn alone_within(
    window: Option<usize>,
    request: &Request,
    choice: u32,
    context: usize,
) -> (Vec<u32>, FinishReason) {
    let s = &request.sampling;
    let sampling = Sampling {
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        min_p: s.min_p,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        seed: s.seed,
        choice,
        prompt_len: request.prompt.len(),
        ..Sampling::greedy()
    };
    let mut tokens = request.prompt.clone();
    let mut masker = request.grammar.as_ref().map(|grammar| grammar.start());
    let (mut mask, mut told) = (Vec::new(), tokens.len());
    let reason = loop {
        let generated = tokens.len() - request.prompt.len();
        if generated == request.stop.max_tokens || tokens.len() == context {
            break FinishReason::Length;
        }
        let may_stop = generated >= request.stop.min_tokens;
        let banned = request.stop.tokens.iter().filter(|_| !may_stop).map(|&t| (t, f32::NEG_INFINITY));
        let biases: Vec<(u32, f32)> = s.logit_bias.iter().copied().chain(banned).collect();
        if let Some(masker) = &mut masker {
            masker.advance(&tokens[told..], &mut mask).unwrap();
            told = tokens.len();
            forbid(&mut mask, if may_stop { &[] } else { &request.stop.tokens });
            if mask.iter().all(|word| *word == 0) {
                break FinishReason::Complete;
            }
        }
        let allowed = masker.as_ref().map(|_| &mask[..]);
        let token = expected_of((VOCAB, window), &tokens, (&sampling, allowed), &biases);
        tokens.push(token);
        if request.stop.tokens.contains(&token) {
            break FinishReason::Stop(token);
        }
    };
    (tokens.split_off(request.prompt.len()), reason)
}
