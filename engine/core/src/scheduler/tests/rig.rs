//! A scheduler, a pool and an echo executor driven by hand; the books are checked at every turn.

use std::collections::HashMap;

use mainstay_backend_api::echo::{EchoExecutor, expected};
use mainstay_backend_api::{Executor, KvDType, PAGE_TOKENS, PageId};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::super::*;
use crate::key::{Identity, KeyChain};
use crate::{Request, SamplingRequest, StopRule};

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

    pub(super) fn over(executor: EchoExecutor, limits: Limits) -> Self {
        Self {
            pool: KvPool::new(&limits.pages),
            scheduler: Scheduler::new(limits),
            step: Step::default(),
            identity: Identity::of(executor.kv_layout(), &executor.numeric_class()),
            executor,
            out: StepOutput::default(),
            seats: Arc::new(Semaphore::new(1 << 20)),
            submitted: 0,
            owners: HashMap::new(),
        }
    }

    pub(super) fn submit(&mut self, mut request: Request) -> Client {
        let id = RequestId(self.submitted);
        self.submitted += 1;
        let (sender, events) = unbounded_channel();
        let prompt = std::mem::take(&mut request.prompt);
        let seat = Arc::clone(&self.seats).try_acquire_many_owned(request.choices).unwrap();
        let submission = Submission {
            prompt_len: prompt.len(),
            chain: KeyChain::new(&request.tenant, &self.identity),
            request,
            events: sender,
        };
        self.scheduler.submit(Sequence::new(id, Arc::new(submission), prompt, seat));
        Client { id, events }
    }

    /// One turn of the loop. Returns whether the step went well.
    pub(super) fn turn(&mut self) -> bool {
        self.plan();
        if self.step.chunks.is_empty() {
            self.scheduler.send_events();
            return true;
        }
        let result = self.executor.submit(&self.step).and_then(|()| self.executor.finish(&mut self.out));
        match &result {
            Ok(()) => self.scheduler.commit(&mut self.pool, &self.out),
            Err(error) => self.scheduler.fail(&mut self.pool, error),
        }
        self.audit();
        self.scheduler.send_events();
        result.is_ok()
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
        }
        panic!("no end: {:?}", self.scheduler.stats(&self.pool));
    }

    pub(super) fn plan(&mut self) {
        let before: HashMap<_, _> = self.sequences().map(|s| (s.id, s.computed)).collect();
        let preemptions = self.scheduler.totals.preemptions;
        self.scheduler.plan(&mut self.pool, &mut self.step);
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
                pages.iter().for_each(|&page| *held.entry((group, page)).or_default() += 1);
            }
        }
        self.pool.audit(&held);
        assert!(self.scheduler.waiting.iter().all(|s| s.computed == 0 && s.pages.is_empty()));
        assert!(self.scheduler.waiting.iter().is_sorted_by_key(|s| s.id));
        assert!(self.scheduler.running.is_sorted_by_key(|s| s.id));
    }

    /// No sequence reads a page that another tenant wrote.
    fn own_pages(&mut self) {
        let mut owners = std::mem::take(&mut self.owners);
        for sequence in &self.scheduler.running {
            let tenant = &sequence.request().tenant;
            for (group, pages) in sequence.pages.iter().enumerate() {
                let (read, written) = pages.split_at(sequence.computed / PAGE_TOKENS);
                read.iter().for_each(|&page| assert_eq!(owners.get(&(group, page)), Some(tenant)));
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
    }
}

/// What a choice must give, whatever ran beside it.
pub(super) fn alone(request: &Request, choice: u32, context: usize) -> (Vec<u32>, FinishReason) {
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
    let reason = loop {
        let generated = tokens.len() - request.prompt.len();
        if generated == request.stop.max_tokens || tokens.len() == context {
            break FinishReason::Length;
        }
        let may_stop = generated >= request.stop.min_tokens;
        let banned = request.stop.tokens.iter().filter(|_| !may_stop).map(|&t| (t, f32::NEG_INFINITY));
        let biases: Vec<(u32, f32)> = s.logit_bias.iter().copied().chain(banned).collect();
        let token = expected(VOCAB, &tokens, &sampling, &biases);
        tokens.push(token);
        if request.stop.tokens.contains(&token) {
            break FinishReason::Stop(token);
        }
    };
    (tokens.split_off(request.prompt.len()), reason)
}
