//! Which tokens are computed next: continuous batching over the page pool, with no I/O, no clock and no threads.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use mainstay_backend_api::{
    Chunk, Limits, OutputRow, PAGE_TOKENS, PageRead, PageRef, Sampling, Step, StepError, StepOutput, Want,
};
use mainstay_store::{Durability, PageHeader};

use crate::draft::{self, DRAFT_LEN_MAX, Pace, Source};
use crate::drafter::Wanted;
use crate::mask::{Ask, Held, Masked, forbid};
use crate::planner::Planner;
use crate::pool::KvPool;
use crate::request::Goal;
use crate::sequence::{LoadId, Rank, Sequence, SequenceId, Submission};
use crate::{Adapter, Event, FinishReason, RequestError, RequestId, Score, Stats};

/// Turns sequences into steps and the results of steps into events. The order of their ranks decides everything.
#[derive(Debug)]
pub(crate) struct Scheduler {
    /// Sequences without pages, by rank: not yet started, preempted, about to be computed anew by another rope table, or
    /// to start over since stored pages did not come.
    waiting: VecDeque<Sequence>,
    /// Sequences with pages, by rank.
    running: Vec<Sequence>,
    limits: Limits,
    /// What the step in flight computes.
    planned: Vec<Planned>,
    /// What happened since [`Scheduler::send_events`].
    events: Vec<(Arc<Submission>, Event)>,
    pub(crate) totals: Stats,
    tier: TierUse,
    next_load: u64,
    /// Page copies to begin, taken by the loop.
    pub(crate) loads: Vec<Load>,
    pub(crate) spills: Vec<Spill>,
    /// Masks to have computed, taken by the loop.
    pub(crate) asks: Vec<Ask>,
    /// How long steps take, told by the loop; `None` where nothing is guessed.
    pub(crate) pace: Option<Pace>,
}

/// What the scheduler knows of the tier below the pool.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TierUse {
    /// There is a store to hand pages to.
    pub(crate) spills: bool,
    /// This backend gives equal bits however a prompt is cut.
    pub(crate) is_invariant: bool,
}

/// Pages that a sequence waits for.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) id: LoadId,
    /// In the order in which they are taken in.
    pub(crate) headers: Vec<PageHeader>,
}

/// A page to hand to the store. It holds a reference of each page until they are read.
#[derive(Debug)]
pub(crate) struct Spill {
    /// One page of each group that still has it.
    pub(crate) reads: Vec<PageRead>,
    pub(crate) headers: Vec<PageHeader>,
    /// It may not be left out for lack of room.
    pub(crate) must: bool,
}

/// A sequence's part of the step in flight.
#[derive(Debug)]
struct Planned {
    rank: Rank,
    tokens: usize,
    /// Its rows in the step's outputs: `scored` prompt tokens, then draws.
    outputs: Range<usize>,
    scored: usize,
    /// Its row among the step's pooled ones.
    pooled: Option<usize>,
}

/// What is left of a step's limits.
struct Room {
    tokens: usize,
    rows: usize,
}

/// Sequences that may run at once, so that all of them can draw in one step.
pub(crate) fn slots_max(limits: &Limits) -> usize {
    limits.chunks.min(limits.output_rows).min(limits.tokens_per_step)
}

impl Scheduler {
    pub(crate) fn new(limits: Limits, tier: TierUse) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            limits,
            planned: Vec::new(),
            events: Vec::new(),
            totals: Stats::default(),
            tier,
            next_load: 0,
            loads: Vec::new(),
            spills: Vec::new(),
            asks: Vec::new(),
            pace: None,
        }
    }

    /// Queues a sequence. Alone it must fit into the limits.
    pub(crate) fn submit(&mut self, mut sequence: Sequence) {
        if matches!(sequence.held, Held::Unasked(_)) {
            self.ask(&mut sequence);
        }
        self.queue(sequence);
    }

    fn queue(&mut self, sequence: Sequence) {
        let at = self.waiting.partition_point(|s| s.rank() < sequence.rank());
        self.waiting.insert(at, sequence);
    }

    /// Ends a choice that has drawn a token; any other is let alone.
    pub(crate) fn stop(&mut self, id: SequenceId, pool: &mut KvPool) {
        if let Some(at) = self.running.iter().position(|s| s.id == id)
            && self.running[at].generated() > 0
        {
            let sequence = self.running.remove(at);
            self.finish(sequence, FinishReason::Stopped, pool);
        } else if let Some(at) = self.waiting.iter().position(|s| s.id == id)
            && self.waiting[at].generated() > 0
            && let Some(sequence) = self.waiting.remove(at)
        {
            self.finish(sequence, FinishReason::Stopped, pool);
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    fn ask(&mut self, sequence: &mut Sequence) {
        let id = sequence.id;
        self.asks.extend(sequence.held.ask().map(|masking| Ask { id, masking }));
    }

    /// Takes in a mask. A choice that is gone does without.
    pub(crate) fn masked(&mut self, masked: Masked, pool: &mut KvPool) {
        let Masked { ask: Ask { id, mut masking }, result } = masked;
        let running = self.running.iter().position(|s| s.id == id);
        let waiting = || self.waiting.iter().position(|s| s.id == id);
        let waiting = if running.is_none() { waiting() } else { None };
        let sequence = match (running, waiting) {
            (Some(at), _) => &mut self.running[at],
            (_, Some(at)) => &mut self.waiting[at],
            _ => return,
        };
        if let Err(what) = result {
            let event = Event::Failed(RequestError::Grammar(what));
            self.events.push((Arc::clone(&sequence.submission), event));
            return self.remove(pool, |s| s.id.request == id.request);
        }
        let stop = &sequence.submission.request.stop;
        if sequence.generated() < stop.min_tokens {
            forbid(&mut masking.mask, &stop.tokens);
        }
        let is_over = masking.mask.iter().all(|&word| word == 0);
        sequence.held = if is_over { Held::Ended } else { Held::Ready(masking) };
        // One that has not begun does so, and ends when its prompt is computed, which may be of use by itself.
        if is_over && sequence.generated() > 0 && sequence.report.is_none() {
            let removed = match (running, waiting) {
                (Some(at), _) => Some(self.running.remove(at)),
                (_, Some(at)) => self.waiting.remove(at),
                _ => None,
            };
            if let Some(sequence) = removed {
                self.finish(sequence, FinishReason::Complete, pool);
            }
        }
    }

    /// Fills the next step; it is empty only if there is nothing to do, or nothing before pages or masks arrive.
    /// [`Scheduler::commit`] or [`Scheduler::fail`] follows.
    pub(crate) fn plan(&mut self, pool: &mut KvPool, step: &mut Step, planner: &mut Planner) {
        assert!(self.planned.is_empty(), "{} chunks are in flight", self.planned.len());
        step.clear();
        self.remove(pool, |s| s.submission.events.is_closed());
        self.guess();
        self.grow(pool, &mut step.copies);
        let mut room = Room { tokens: self.limits.tokens_per_step, rows: self.limits.output_rows };
        // Whoever is about to draw goes first, so that a long prompt holds nobody up.
        let ready = |s: &&Sequence| s.may_run();
        for sequence in self.running.iter().filter(ready).filter(|s| s.remaining() == 1) {
            let planned = plan_chunk(sequence, step, &mut room);
            self.planned.push(planned.expect("a slot was kept for every running sequence"));
        }
        for sequence in self.running.iter().filter(ready).filter(|s| s.remaining() > 1) {
            self.planned.extend(plan_chunk(sequence, step, &mut room));
        }
        self.admit(pool, step, (&mut room, planner));
        let (running, waiting) = (self.running.len(), self.waiting.len());
        assert!(
            !self.planned.is_empty() || self.is_idle() || self.is_waiting(),
            "{running} running and {waiting} waiting are stuck"
        );
    }

    /// Whether pages are on their way.
    pub(crate) fn is_loading(&self) -> bool {
        self.running.iter().any(|s| s.loading.is_some())
    }

    /// Whether pages or masks are on their way, without which some sequence cannot go on.
    pub(crate) fn is_waiting(&self) -> bool {
        self.is_loading() || self.is_masking()
    }

    /// Whether a mask is on its way without which some sequence cannot go on.
    pub(crate) fn is_masking(&self) -> bool {
        self.running.iter().any(|s| !s.may_draw())
    }

    /// Whether this is a step to guess in, and how many rows there are for it. One with prompts in it is not: it is full
    /// of rows.
    fn guess_room(&self) -> Option<(&Pace, usize)> {
        let is_drawing = self.waiting.is_empty() && self.running.iter().all(|s| s.remaining() == 1);
        let slots: usize = self.running.iter().map(Sequence::slots).sum();
        let rows = self.limits.output_rows.min(self.limits.tokens_per_step).saturating_sub(slots);
        self.pace.as_ref().filter(|_| is_drawing).map(|pace| (pace, rows))
    }

    /// What a smaller model is to guess.
    pub(crate) fn wants(&self) -> Vec<Wanted<'_>> {
        let Some((pace, mut rows)) = self.guess_room() else { return Vec::new() };
        let from = (self.running.len(), Source::Model);
        let mut wanted = Vec::new();
        for sequence in &self.running {
            let most = sequence.draft_room(self.limits.context).min(rows).min(DRAFT_LEN_MAX);
            let len = pace.worth(sequence.luck, most, from);
            rows -= len;
            let sampling = sampling(sequence, sequence.id.choice);
            wanted.push(Wanted { id: sequence.id, tokens: &sequence.tokens, len, sampling });
        }
        wanted.retain(|one| one.len > 0);
        wanted
    }

    /// Takes in what it guessed.
    pub(crate) fn offer(&mut self, guesses: Vec<(SequenceId, Vec<u32>)>) {
        for (id, draft) in guesses {
            if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
                sequence.draft = draft;
            }
        }
    }

    /// Guesses what the sequences draw next from their own tokens, where no model has.
    fn guess(&mut self) {
        let Some((pace, mut rows)) = self.guess_room() else {
            return self.running.iter_mut().for_each(|s| s.draft.clear());
        };
        let (pace, from) = (pace.clone(), (self.running.len(), Source::LookUp));
        for sequence in &mut self.running {
            let most = sequence.draft_room(self.limits.context).min(rows).min(DRAFT_LEN_MAX);
            sequence.draft.truncate(most);
            if sequence.draft.is_empty() {
                match pace.worth(sequence.luck, most, from) {
                    0 if most > 0 => sequence.luck.has_passed(),
                    // Not even looked for: that takes time with every sequence.
                    0 => {}
                    worth => draft::look_up(&sequence.tokens, worth, &mut sequence.draft),
                }
            }
            rows -= sequence.draft.len();
        }
    }

    /// Finds pages for the tokens that were drawn, at the cost of the sequences whose rank is last.
    fn grow(&mut self, pool: &mut KvPool, copies: &mut Vec<(PageRef, PageRef)>) {
        let mut at = 0;
        while at < self.running.len() {
            // One that sits the step out writes nothing, and a copy for it would be of no step.
            let sits_out = self.running[at].loading.is_none() && !self.running[at].may_run();
            if sits_out || self.running[at].grow(pool, self.limits.tokens_per_step, copies) {
                at += 1;
                continue;
            }
            if !self.running[at].draft.is_empty() {
                self.running[at].draft.clear();
                continue;
            }
            assert!(self.running.len() > 1, "a sequence alone does not fit: {:?}", self.running[0].id);
            let mut last = self.running.pop().expect("there are at least two");
            last.release(pool);
            self.totals.preemptions += 1;
            self.queue(last);
        }
    }

    /// The sequence that waits for these pages; `None` once it is gone or waits for others.
    pub(crate) fn loading(&mut self, id: LoadId) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|s| s.is_waiting_for(id))
    }

    /// All pages of a load are on the device, or no more will come, for this reason.
    pub(crate) fn end_load(
        &mut self,
        id: LoadId,
        restore_ms: f64,
        reason: Option<&'static str>,
        pool: &mut KvPool,
    ) {
        let Some(at) = self.running.iter().position(|s| s.is_waiting_for(id)) else {
            return;
        };
        self.totals.restores += 1;
        self.totals.restore_ms += restore_ms as u64;
        let is_invariant = self.tier.is_invariant;
        let sequence = &mut self.running[at];
        let Some(restored_tokens) = sequence.end_load(reason, pool) else {
            let mut sequence = self.running.remove(at);
            sequence.release(pool);
            self.queue(sequence);
            return;
        };
        self.totals.restored_tokens += restored_tokens as u64;
        sequence.note_reuse(restored_tokens, restore_ms, is_invariant);
        self.announce(at);
        self.spill(at, pool);
    }

    /// Tells a sequence's owner that it begins, once.
    fn announce(&mut self, at: usize) {
        let sequence = &mut self.running[at];
        let Some(kv) = sequence.report.take() else { return };
        self.totals.prompt_tokens += sequence.tokens.len() as u64;
        self.totals.cached_tokens += kv.cached_tokens as u64;
        self.totals.restores_declined += u64::from(kv.reason == Some("planner"));
        self.events.push((Arc::clone(&sequence.submission), Event::Started { kv }));
    }

    /// Hands over a running sequence's full pages that the store does not have.
    fn spill(&mut self, at: usize, pool: &mut KvPool) {
        spill_full(self.tier, &mut self.running[at], &mut self.spills, pool);
    }

    /// Starts sequences in the order of their ranks while there is room for their first chunk. One page is left for
    /// each running sequence, or the newcomer would soon be preempted. One whose prefix another sequence is loading
    /// waits for that, and lets those behind it pass.
    fn admit(&mut self, pool: &mut KvPool, step: &mut Step, (room, planner): (&mut Room, &mut Planner)) {
        let mut passed = 0;
        while room.tokens > 0
            && let Some(mut sequence) = self.waiting.remove(passed)
        {
            // A model that keeps nothing computes a sequence whole.
            if self.limits.pages.is_empty() && sequence.remaining() > room.tokens {
                self.waiting.insert(passed, sequence);
                break;
            }
            let slots: usize = self.running.iter().map(Sequence::slots).sum();
            if slots + sequence.slots() > slots_max(&self.limits) {
                self.waiting.insert(passed, sequence);
                break;
            }
            if self.is_on_its_way(&mut sequence, pool) {
                self.waiting.insert(passed, sequence);
                passed += 1;
                continue;
            }
            let id = LoadId(self.next_load);
            if !sequence.start(pool, (self.running.len(), self.limits.tokens_per_step), (id, planner)) {
                self.waiting.insert(passed, sequence);
                break;
            }
            sequence.seat = None;
            let load = sequence.wanted_headers();
            if load.is_none() {
                sequence.note_reuse(0, 0.0, self.tier.is_invariant);
                self.planned.extend(plan_chunk(&sequence, step, room));
            }
            let at = self.insert(sequence);
            if let Some(headers) = load {
                self.next_load += 1;
                self.loads.push(Load { id, headers });
            } else {
                self.announce(at);
                self.spill(at, pool);
            }
        }
    }

    /// Whether the first page that a sequence would load is being loaded for another.
    fn is_on_its_way(&mut self, sequence: &mut Sequence, pool: &KvPool) -> bool {
        if !self.is_loading() {
            return false;
        }
        let Some(missing) = sequence.first_wanted(pool) else { return false };
        let loading = self.running.iter_mut().filter(|s| s.loading.is_some());
        loading.into_iter().any(|s| s.is_loading_full(missing))
    }

    /// Puts a sequence among the running ones; its place.
    fn insert(&mut self, sequence: Sequence) -> usize {
        let at = self.running.partition_point(|s| s.rank() < sequence.rank());
        self.running.insert(at, sequence);
        at
    }

    /// Takes in the result of the step planned last.
    pub(crate) fn commit(&mut self, pool: &mut KvPool, out: &StepOutput) {
        self.totals.steps += 1;
        let planned = std::mem::take(&mut self.planned);
        let pooled = planned.iter().filter(|part| part.pooled.is_some()).count();
        for part in &planned {
            let at =
                self.running.binary_search_by_key(&part.rank, Sequence::rank).expect("what was planned runs");
            let sequence = &mut self.running[at];
            let draws = part.outputs.start + part.scored..part.outputs.end;
            let (done, first) = (sequence.remaining() == part.tokens, sequence.generated() == 0);
            sequence.advance(part.tokens, pool);
            self.spill(at, pool);
            let sequence = &mut self.running[at];
            sequence.release_unseen(pool);
            if let Some(row) = part.pooled {
                let width = out.pooled.len() / pooled;
                let event = Event::Pooled(out.pooled[row * width..][..width].to_vec());
                self.events.push((Arc::clone(&sequence.submission), event));
            }
            sequence.scores.extend((part.outputs.start..draws.start).map(|row| score(out, row)));
            if done && (first || draws.is_empty()) {
                self.finish_prompt(at, draws, out, pool);
            } else if done {
                self.draw(at, draws.start, out, pool);
            }
        }
        // Keeps the memory.
        self.planned = planned;
        self.planned.clear();
    }

    /// The prompt of a request is computed: its choices part, each with its own first token, or end without one.
    fn finish_prompt(&mut self, at: usize, draws: Range<usize>, out: &StepOutput, pool: &mut KvPool) {
        let mut sequence = self.running.remove(at);
        let scores = std::mem::take(&mut sequence.scores);
        if sequence.request().prompt_logprobs.is_some() {
            self.events.push((Arc::clone(&sequence.submission), Event::Prompt(scores)));
        }
        let choices = sequence.request().choices;
        let is_over = matches!(sequence.held, Held::Ended);
        let undrawn = if is_over { FinishReason::Complete } else { FinishReason::Length };
        let forks: Vec<Sequence> = (1..choices).map(|choice| sequence.fork(choice, pool)).collect();
        for (choice, mut sequence) in (0..).zip(std::iter::once(sequence).chain(forks)) {
            if draws.is_empty() {
                self.finish(sequence, undrawn, pool);
            } else {
                let ends = self.extend(&mut sequence, draws.start + choice, out);
                self.settle(sequence, ends, pool);
            }
        }
    }

    /// Appends what was drawn at an output row and, as long as the guesses are what was drawn, at those behind it.
    fn draw(&mut self, at: usize, row: usize, out: &StepOutput, pool: &mut KvPool) {
        let mut sequence = self.running.remove(at);
        let draft = std::mem::take(&mut sequence.draft);
        let mut kept = 0;
        let ends = loop {
            let ends = self.extend(&mut sequence, row + kept, out);
            if ends.is_some() || draft.get(kept) != Some(&out.tokens[row + kept]) {
                break ends;
            }
            kept += 1;
            sequence.advance(1, pool);
        };
        sequence.luck.has_drawn(draft.len(), kept);
        self.totals.drafted_tokens += draft.len() as u64;
        self.totals.draft_kept_tokens += kept as u64;
        // Keeps the memory.
        sequence.draft = draft;
        sequence.draft.clear();
        if kept > 0 {
            spill_full(self.tier, &mut sequence, &mut self.spills, pool);
            sequence.release_unseen(pool);
        }
        self.settle(sequence, ends, pool);
    }

    /// Appends the token drawn at an output row; why the sequence ends with it, if it does.
    fn extend(&mut self, sequence: &mut Sequence, row: usize, out: &StepOutput) -> Option<FinishReason> {
        let token = out.tokens[row];
        let drawn_before = sequence.generated();
        sequence.tokens.push(token);
        self.totals.generated_tokens += 1;
        let score = sequence.request().logprobs.map(|_| score(out, row));
        let event = Event::Token { choice: sequence.id.choice, token, score };
        self.events.push((Arc::clone(&sequence.submission), event));
        if let Held::Unasked(masking) | Held::Ready(masking) = &mut sequence.held {
            masking.drawn.push(token);
        }
        let stop = &sequence.request().stop;
        if drawn_before >= stop.min_tokens && stop.tokens.contains(&token) {
            Some(FinishReason::Stop(token))
        } else if sequence.generated() >= stop.max_tokens || sequence.tokens.len() >= self.limits.context {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Ends a sequence, or keeps it running.
    fn settle(&mut self, mut sequence: Sequence, ends: Option<FinishReason>, pool: &mut KvPool) {
        match ends {
            Some(reason) => self.finish(sequence, reason, pool),
            None => {
                self.ask(&mut sequence);
                if sequence.outgrows_table() {
                    sequence.change_table(pool);
                    self.queue(sequence);
                } else {
                    self.insert(sequence);
                }
            }
        }
    }

    fn finish(&mut self, mut sequence: Sequence, reason: FinishReason, pool: &mut KvPool) {
        if self.tier.spills
            && let Some(tail) = sequence.unstored_tail()
        {
            self.spills.extend(spill(&mut sequence, tail, pool));
        }
        sequence.release(pool);
        let event = Event::Finished { choice: sequence.id.choice, reason };
        self.events.push((sequence.submission, event));
    }

    /// The step planned last failed, and with it every request that had a part in it.
    pub(crate) fn fail(&mut self, pool: &mut KvPool, error: &StepError) {
        let mut failed: Vec<RequestId> = self.planned.drain(..).map(|p| p.rank.id.request).collect();
        failed.sort_unstable();
        failed.dedup();
        for &id in &failed {
            let mut sequences = self.running.iter().filter(|s| s.id.request == id);
            let sequence = sequences.next().expect("what was planned runs");
            let event = Event::Failed(RequestError::Device(error.to_string()));
            self.events.push((Arc::clone(&sequence.submission), event));
        }
        self.remove(pool, |s| failed.binary_search(&s.id.request).is_ok());
    }

    /// Drops sequences and their pages.
    fn remove(&mut self, pool: &mut KvPool, mut which: impl FnMut(&Sequence) -> bool) {
        let mut keep = |sequence: &mut Sequence| {
            let gone = which(sequence);
            if gone {
                sequence.release(pool);
            }
            !gone
        };
        self.running.retain_mut(&mut keep);
        self.waiting.retain_mut(&mut keep);
    }

    /// Tells the owners of the requests what happened, in order.
    pub(crate) fn send_events(&mut self) {
        for (submission, event) in self.events.drain(..) {
            // A receiver that is gone is noticed by the next plan.
            let _ = submission.events.send(event);
        }
    }

    pub(crate) fn stats(&self, pool: &KvPool) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.iter().map(Sequence::slots).sum(),
            pages_used: pool.used_len(),
            pages_cached: pool.cached_len(),
            pages_total: pool.total_len(),
            ..self.totals.clone()
        }
    }
}

/// Hands over the full pages of a sequence that the store does not have.
fn spill_full(tier: TierUse, sequence: &mut Sequence, spills: &mut Vec<Spill>, pool: &mut KvPool) {
    if !tier.spills {
        return;
    }
    for page in sequence.take_unstored() {
        spills.extend(spill(sequence, (page, PAGE_TOKENS), pool));
    }
}

/// A page of a sequence, of which this many tokens count, to hand to the store; `None` where no group has it any more.
fn spill(sequence: &mut Sequence, (page, tokens): (usize, usize), pool: &mut KvPool) -> Option<Spill> {
    let parent = sequence.parent(page);
    let mut spill = Spill {
        reads: Vec::with_capacity(sequence.pages.len()),
        headers: Vec::with_capacity(sequence.pages.len()),
        must: sequence.request().keep.durability == Durability::Full,
    };
    let chain = &sequence.submission.chain;
    let own = &sequence.tokens[page * PAGE_TOKENS..][..tokens];
    for (group, pages) in sequence.pages.iter().enumerate().filter(|(_, pages)| pages[page].0 != 0) {
        pool.share(group, pages[page]);
        spill.reads.push(PageRead { page: PageRef { group: group as u32, page: pages[page] }, tokens });
        spill.headers.push(chain.page((chain.class(), group), sequence.rope_table, parent, own));
    }
    Some(spill).filter(|spill| !spill.reads.is_empty())
}

/// Adds as many of a sequence's next tokens to the step as there is room for; all but the last one where that cannot
/// be drawn from yet.
fn plan_chunk(sequence: &Sequence, step: &mut Step, room: &mut Room) -> Option<Planned> {
    let most = (sequence.remaining() - usize::from(!sequence.may_draw())).min(room.tokens);
    let tokens = (1..=most).rev().find(|&len| sequence.rows(len) <= room.rows)?;
    let (start, position) = (step.tokens.len(), sequence.computed);
    step.tokens.extend_from_slice(&sequence.tokens[position..position + tokens]);
    step.tokens.extend_from_slice(&sequence.draft);
    let end = step.tokens.len();
    let goal = sequence.submission.goal;
    let second = if let Goal::Row { second } = goal { second } else { None };
    let adapter = sequence.request().adapter.as_ref().map(Adapter::id);
    let (all, rope_table) = (start..end, sequence.rope_table);
    let mut chunk = Chunk { tokens: all, position, pages: 0..0, rope_table, second, adapter };
    let table = step.page_table.len();
    for pages in &sequence.pages {
        step.page_table.extend_from_slice(&pages[..chunk.page_count()]);
    }
    chunk.pages = table..step.page_table.len();
    step.chunks.push(chunk);

    let outputs = step.outputs.len();
    let scored = sequence.scored(tokens);
    step.outputs.extend(scored.clone().map(|at| OutputRow {
        row: start + at - position,
        position: at + 1,
        want: Want::Score(sequence.tokens[at + 1]),
        top_logprobs: sequence.request().prompt_logprobs,
    }));
    let mut pooled = None;
    if tokens == sequence.remaining() {
        plan_draws(sequence, step);
        if goal != Goal::Tokens {
            pooled = Some(step.pooled.len());
            step.pooled.push(step.chunks.len() - 1);
        }
    }
    let outputs = outputs..step.outputs.len();
    room.tokens -= end - start;
    room.rows -= outputs.len();
    Some(Planned { rank: sequence.rank(), tokens, outputs, scored: scored.len(), pooled })
}

/// Asks the step's last rows for the sequence's next token and those behind its guesses, or for the first one of every
/// choice.
fn plan_draws(sequence: &Sequence, step: &mut Step) {
    let last = step.tokens.len() - 1 - sequence.draft.len();
    (0..=sequence.draft.len()).for_each(|guessed| plan_draw(sequence, guessed, last + guessed, step));
}

/// Asks a row for the token behind the sequence's own and so many guesses.
fn plan_draw(sequence: &Sequence, guessed: usize, row: usize, step: &mut Step) {
    let request = sequence.request();
    let wanted = &request.sampling;
    let bias = step.biases.len();
    step.biases.extend_from_slice(&wanted.logit_bias);
    if sequence.generated() + guessed < request.stop.min_tokens {
        step.biases.extend(request.stop.tokens.iter().map(|&token| (token, f32::NEG_INFINITY)));
    }
    let bias = bias..step.biases.len();
    let history = step.history.len();
    if wanted.has_penalties() {
        step.history.extend_from_slice(&sequence.tokens);
        step.history.extend_from_slice(&sequence.draft[..guessed]);
    }
    let history = history..step.history.len();
    let mask = step.masks.len();
    let mask = if let Held::Ready(masking) = &sequence.held {
        step.masks.extend_from_slice(&masking.mask);
        Some(mask..step.masks.len())
    } else {
        None
    };
    for choice in sequence.id.choice..sequence.id.choice + sequence.draws() {
        let want = Want::Sample(Sampling {
            bias: bias.clone(),
            mask: mask.clone(),
            history: history.clone(),
            ..sampling(sequence, choice)
        });
        let position = sequence.tokens.len() + guessed;
        step.outputs.push(OutputRow { row, position, want, top_logprobs: request.logprobs });
    }
}

/// How a choice of a sequence draws, before bias, mask and history.
fn sampling(sequence: &Sequence, choice: u32) -> Sampling {
    let wanted = &sequence.request().sampling;
    Sampling {
        temperature: wanted.temperature,
        top_k: wanted.top_k,
        top_p: wanted.top_p,
        min_p: wanted.min_p,
        repetition_penalty: wanted.repetition_penalty,
        presence_penalty: wanted.presence_penalty,
        frequency_penalty: wanted.frequency_penalty,
        seed: wanted.seed,
        choice,
        prompt_len: sequence.submission.prompt_len,
        ..Sampling::greedy()
    }
}

fn score(out: &StepOutput, row: usize) -> Score {
    Score { token: out.tokens[row], logprob: out.logprobs[row], top: out.top_logprobs[row].clone() }
}

#[cfg(test)]
mod tests;
