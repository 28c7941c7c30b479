//! A fake backend for tests: its logits are a hash of all tokens that it reads back from its pages.
//!
//! A wrong page table, a stale page, a lost copy or a wrong position changes the hash, so an engine that keeps its
//! books badly draws other tokens than [`expected`] tells. Steps outside the limits assert.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::Receiver;

use mainstay_models::graph::{Graph, RopeSwitch};
use mainstay_models::{AdapterWeights, LoadError, Weights};

use crate::kv::{
    CopyDone, Group, KvDType, KvLayout, PAGE_TOKENS, PageBytes, PageId, PageRead, PageRef, Part, StoredPage,
    Ticket, oldest_page,
};
use crate::sample::{SampleScratch, sample_rows};
use crate::step::{AdapterId, Chunk, OutputRow, Sampling, Step, StepOutput, Want};
use crate::{Backend, DeviceInfo, Executor, Invariance, Limits, NumericClass, StepError};

/// Loads an [`EchoExecutor`] for any graph; only the vocabulary of the graph matters.
#[derive(Debug, Default)]
pub struct EchoBackend;

impl Backend for EchoBackend {
    fn device(&self) -> DeviceInfo {
        DeviceInfo { backend: "echo", name: "a hash of the tokens".to_owned(), memory_bytes: None }
    }

    fn load(
        &self,
        graph: &Graph,
        _weights: &Weights,
        limits: &Limits,
    ) -> Result<Box<dyn Executor>, LoadError> {
        let mut executor = EchoExecutor::new(graph.vocab, limits.clone());
        executor.layout.rope_switch = graph.rope_switch;
        Ok(Box::new(executor))
    }
}

/// A token and its position, as they were written; both `u32::MAX` in a slot never written.
type Slot = (u32, u32);

/// The fake: one layer per group, whose K is the token's bits and whose V is its position's.
#[derive(Debug)]
pub struct EchoExecutor {
    vocab: usize,
    limits: Limits,
    layout: KvLayout,
    /// `[group][page * PAGE_TOKENS + slot]`
    slots: Vec<Vec<Slot>>,
    scratch: SampleScratch,
    submitted: Option<Result<StepOutput, StepError>>,
    copied: Vec<CopyDone>,
    /// What each adapter adds to the tokens that it writes.
    adapters: HashMap<AdapterId, u32>,
    steps: u64,
    fail_every: Option<u64>,
    gate: Option<Receiver<()>>,
}

impl EchoExecutor {
    /// An executor with as many groups as the limits have page counts. The KV type is always f32.
    pub fn new(vocab: usize, limits: Limits) -> Self {
        let part = |name| Part { name, rows: 1, width: 1, dtype: KvDType::F32 };
        let group = |layer| Group { layers: vec![layer], window: None, parts: vec![part("k"), part("v")] };
        Self {
            vocab,
            layout: KvLayout {
                groups: (0..limits.pages.len()).map(group).collect(),
                rope_switch: RopeSwitch::default(),
            },
            slots: limits.pages.iter().map(|n| vec![(u32::MAX, u32::MAX); n * PAGE_TOKENS]).collect(),
            limits,
            scratch: SampleScratch::new(vocab),
            submitted: None,
            copied: Vec::new(),
            adapters: HashMap::new(),
            steps: 0,
            fail_every: None,
            gate: None,
        }
    }

    /// Gives each group a window. Logits are then a hash of what the widest of them shows.
    pub fn windowed(mut self, windows: &[Option<usize>]) -> Self {
        assert_eq!(windows.len(), self.layout.groups.len(), "windows of each group");
        self.layout.groups.iter_mut().zip(windows).for_each(|(group, &window)| group.window = window);
        self
    }

    /// Every `n`th step fails, and leaves what a real failure may leave: pages half written.
    pub fn failing_every(mut self, n: u64) -> Self {
        self.fail_every = Some(n);
        self
    }

    /// Sequences of more than `len` tokens turn by a second table. A sequence whose pages are of two tables, or of the
    /// wrong one, draws other tokens than [`expected`] tells.
    pub fn switching_at(mut self, len: usize) -> Self {
        self.layout.rope_switch = RopeSwitch(Some(len));
        self
    }

    /// Every step waits for one message first; once the sender is gone, steps run freely.
    pub fn gated(mut self, gate: Receiver<()>) -> Self {
        self.gate = Some(gate);
        self
    }

    fn slot(&mut self, page: PageRef, slot: usize) -> &mut Slot {
        &mut self.slots[page.group as usize][page.page.0 as usize * PAGE_TOKENS + slot]
    }

    fn shift(&self, id: AdapterId) -> u32 {
        *self.adapters.get(&id).unwrap_or_else(|| panic!("{id:?} is not here: {:?}", self.adapters))
    }

    fn copy(&mut self, copies: &[(PageRef, PageRef)]) {
        for &(from, to) in copies {
            for i in 0..PAGE_TOKENS {
                *self.slot(to, i) = *self.slot(from, i);
            }
        }
    }

    fn write(&mut self, step: &Step, chunk: &Chunk) {
        let shift = chunk.adapter.map_or(0, |id| self.shift(id));
        for (i, &token) in step.tokens[chunk.tokens.clone()].iter().enumerate() {
            let (position, token) = (chunk.position + i, token.wrapping_add(shift));
            for group in 0..self.slots.len() {
                let page = chunk.table(step, group)[position / PAGE_TOKENS];
                let page = PageRef { group: group as u32, page };
                *self.slot(page, position % PAGE_TOKENS) = (token, turned(position as u32, chunk.rope_table));
            }
        }
    }

    /// A hash of all tokens of a sequence up to the chunk's end, as they are read back; of the chunk's own where there
    /// are no pages.
    fn pooled_state(&self, step: &Step, chunk: &Chunk) -> u64 {
        let own = &step.tokens[chunk.tokens.clone()];
        let read = |position: usize| {
            let page = chunk.table(step, 0)[position / PAGE_TOKENS];
            let (token, at) = self.slots[0][page.0 as usize * PAGE_TOKENS + position % PAGE_TOKENS];
            (token, turned(at, chunk.rope_table))
        };
        let end = chunk.position + own.len();
        assert!(
            self.layout.groups.iter().all(|group| group.window.is_none()),
            "a window hides what is pooled"
        );
        let state = if self.slots.is_empty() {
            (0..).zip(own).fold(SEED, |state, (position, &token)| absorb(state, token, position))
        } else {
            (0..end).map(read).fold(SEED, |state, (token, at)| absorb(state, token, at))
        };
        with_second(state, chunk.second)
    }

    /// Appends the logits of the chunk's output rows.
    fn read(&self, step: &Step, chunk: &Chunk, logits: &mut Vec<f32>) {
        let windows = self.layout.groups.iter().map(|group| group.window.unwrap_or(usize::MAX));
        let windows: Vec<usize> = windows.collect();
        let widest = windows.iter().copied().max().unwrap_or(usize::MAX);
        let slot = |group: usize, position: usize| {
            let page = chunk.table(step, group)[position / PAGE_TOKENS];
            let (token, at) = self.slots[group][page.0 as usize * PAGE_TOKENS + position % PAGE_TOKENS];
            (token, turned(at, chunk.rope_table))
        };
        for output in step.outputs.iter().filter(|output| chunk.tokens.contains(&output.row)) {
            let end = output.position;
            let mut state = SEED;
            for position in end.saturating_sub(widest)..end {
                let mut seeing = (0..windows.len()).filter(|&group| end - position <= windows[group]);
                let first = seeing.next().expect("the widest window shows it");
                // Groups agree unless one of them was kept badly, so the hash does not depend on their number.
                let (token, at) = slot(first, position);
                state = absorb(state, token, at);
                for (token, at) in seeing.map(|group| slot(group, position)).filter(|&s| s != (token, at)) {
                    state = absorb(state, token, at);
                }
            }
            push_logits(state, self.vocab, logits);
        }
    }

    fn compute(&mut self, step: &Step) -> Result<StepOutput, StepError> {
        self.steps += 1;
        self.copy(&step.copies);
        let fail = self.fail_every.is_some_and(|n| self.steps.is_multiple_of(n));
        for (i, chunk) in step.chunks.iter().enumerate() {
            if !fail || i % 2 == 0 {
                self.write(step, chunk);
            }
        }
        if fail {
            return Err(StepError::Device { device: "echo", what: format!("step {} fails", self.steps) });
        }
        let mut logits = Vec::with_capacity(step.outputs.len() * self.vocab);
        for chunk in step.chunks.iter().filter(|_| !step.outputs.is_empty()) {
            self.read(step, chunk, &mut logits);
        }
        let mut out = StepOutput::default();
        sample_rows(&logits, step, &mut self.scratch, &mut out)?;
        for &chunk in &step.pooled {
            out.pooled.extend(row(self.pooled_state(step, &step.chunks[chunk])));
        }
        Ok(out)
    }
}

impl Executor for EchoExecutor {
    fn kv_layout(&self) -> &KvLayout {
        &self.layout
    }

    fn numeric_class(&self) -> NumericClass {
        NumericClass { path: "echo".to_owned(), sources: "", invariance: Invariance::Full }
    }

    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        check(step, &self.limits, &self.layout, self.vocab);
        check_tables(step, self.layout.rope_switch);
        assert!(self.submitted.is_none(), "a step was submitted before the last one was finished");
        if let Some(gate) = &self.gate
            && gate.recv().is_err()
        {
            self.gate = None;
        }
        self.submitted = Some(self.compute(step));
        Ok(())
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), StepError> {
        *out = self.submitted.take().expect("finish follows submit")?;
        Ok(())
    }

    fn start_read(&mut self, pages: &[PageRead], ticket: Ticket) {
        let read = |&PageRead { page, .. }: &PageRead| {
            let tokens = (0..PAGE_TOKENS).map(|i| *self.slot(page, i)).collect::<Vec<Slot>>();
            let (k, v) = (tokens.iter().map(|s| s.0), tokens.iter().map(|s| s.1));
            k.chain(v).flat_map(u32::to_le_bytes).collect::<PageBytes>()
        };
        let bytes = pages.iter().map(read).collect();
        self.copied.push(CopyDone::read(&self.layout, pages, bytes, ticket));
    }

    fn start_write(&mut self, pages: Vec<(PageRef, StoredPage)>, ticket: Ticket) {
        for (page, bytes) in pages {
            let bytes = (*bytes).as_ref();
            let size = self.layout.groups[page.group as usize].page_bytes();
            assert!(bytes.len() == size, "a page holds {size} bytes, found {}", bytes.len());
            let (words, _) = bytes.as_chunks::<4>();
            for i in 0..PAGE_TOKENS {
                let (token, position) = (words[i], words[PAGE_TOKENS + i]);
                *self.slot(page, i) = (u32::from_le_bytes(token), u32::from_le_bytes(position));
            }
        }
        self.copied.push(CopyDone::written(ticket, Ok(())));
    }

    fn poll(&mut self, done: &mut Vec<CopyDone>) {
        done.append(&mut self.copied);
    }

    fn set_adapter(&mut self, id: AdapterId, weights: Option<&AdapterWeights>) -> Result<(), LoadError> {
        match weights {
            Some(weights) => self.adapters.insert(id, adapter_shift(&weights.hash)),
            None => self.adapters.remove(&id),
        };
        Ok(())
    }
}

/// What the fake adds to a token under the adapter of this hash, before it writes it: its pages hold other bytes, and
/// [`expected`] tells what follows when it is added to all tokens.
pub fn adapter_shift(hash: &[u8; 32]) -> u32 {
    let [a, b, c, d, ..] = *hash;
    u32::from_le_bytes([a, b, c, d]) | 1 << 31
}

/// The token that follows `tokens` when a sequence runs alone: what an engine over an [`EchoExecutor`] must draw.
/// Of `sampling`, `bias`, `mask` and `history` are ignored: `biases` are those in force, the history is `tokens`.
///
/// # Panics
/// If biases leave no token to draw.
pub fn expected(vocab: usize, tokens: &[u32], sampling: &Sampling, biases: &[(u32, f32)]) -> u32 {
    expected_of((vocab, None), tokens, (sampling, None), biases)
}

/// [`expected`] where only the tokens of a mask may be drawn, of an executor whose widest window this is.
///
/// # Panics
/// If mask and biases leave no token to draw.
pub fn expected_of(
    (vocab, window): (usize, Option<usize>),
    tokens: &[u32],
    (sampling, mask): (&Sampling, Option<&[u32]>),
    biases: &[(u32, f32)],
) -> u32 {
    let (bias, history) = (0..biases.len(), 0..tokens.len());
    let sampling = Sampling { bias, history, mask: mask.map(|mask| 0..mask.len()), ..sampling.clone() };
    let (biases, history) = (biases.to_vec(), tokens.to_vec());
    let step = Step { biases, history, masks: mask.unwrap_or_default().to_vec(), ..Step::default() };
    alone((vocab, window), tokens, Want::Sample(sampling), step).tokens[0]
}

/// The log-probability that `token` follows `tokens`, under the raw logits, of an executor whose widest window this is.
pub fn expected_logprob(of: (usize, Option<usize>), tokens: &[u32], token: u32) -> f32 {
    alone(of, tokens, Want::Score(token), Step::default()).logprobs[0]
}

fn alone((vocab, window): (usize, Option<usize>), tokens: &[u32], want: Want, mut step: Step) -> StepOutput {
    let seen = (0..).zip(tokens).skip(tokens.len() - tokens.len().min(window.unwrap_or(usize::MAX)));
    let state = seen.fold(SEED, |state, (position, &token)| absorb(state, token, position));
    let mut logits = Vec::with_capacity(vocab);
    push_logits(state, vocab, &mut logits);
    step.outputs = vec![OutputRow { row: 0, position: tokens.len(), want, top_logprobs: None }];
    let mut out = StepOutput::default();
    sample_rows(&logits, &step, &mut SampleScratch::new(vocab), &mut out).expect("biases leave a token");
    out
}

/// The first `count` tokens after `prompt`, with no biases; see [`expected`].
pub fn expected_run(vocab: usize, prompt: &[u32], count: usize, sampling: &Sampling) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(expected(vocab, &tokens, sampling, &[]));
    }
    tokens.split_off(prompt.len())
}

/// Width of the row that a sequence becomes.
pub const POOLED_WIDTH: usize = 8;

/// The row that a sequence becomes when it runs alone.
pub fn expected_row(tokens: &[u32], second: Option<usize>) -> Vec<f32> {
    let state = (0..).zip(tokens).fold(SEED, |state, (position, &token)| absorb(state, token, position));
    row(with_second(state, second))
}

fn with_second(state: u64, second: Option<usize>) -> u64 {
    second.map_or(state, |second| absorb(state, second as u32, u32::MAX))
}

/// A row of length 1.
fn row(state: u64) -> Vec<f32> {
    let mut row = Vec::with_capacity(POOLED_WIDTH);
    push_logits(state, POOLED_WIDTH, &mut row);
    let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
    row.iter_mut().for_each(|x| *x /= length);
    row
}

const SEED: u64 = 0x6d61_696e_7374_6179;

/// A position as it is kept by this rope table, and from what was kept back to the position: by another table than it was
/// kept by, it becomes none that there is.
fn turned(position: u32, rope_table: usize) -> u32 {
    position ^ (rope_table as u32) << 31
}

fn absorb(state: u64, token: u32, position: u32) -> u64 {
    mix(state ^ (u64::from(position) << 32 | u64::from(token)))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `vocab` numbers in [-4, 4).
fn push_logits(state: u64, vocab: usize, logits: &mut Vec<f32>) {
    let logit = |id: u64| (mix(state.wrapping_add(id)) >> 40) as f32 * (8.0 / (1 << 24) as f32) - 4.0;
    logits.extend((0..vocab as u64).map(logit));
}

/// Asserts that sequences turn by the table of their length. Of a prompt in chunks only the last shows how long it is.
fn check_tables(step: &Step, switch: RopeSwitch) {
    for chunk in &step.chunks {
        let (end, table) = (chunk.position + chunk.tokens.len(), chunk.rope_table);
        let known = switch.table(end)..=switch.table(usize::MAX);
        assert!(known.contains(&table), "rope table {table} of a sequence with {end} tokens, {switch:?}");
    }
}

/// Asserts that a step is one that any executor must accept.
fn check(step: &Step, limits: &Limits, layout: &KvLayout, vocab: usize) {
    let counts = (step.tokens.len(), step.chunks.len(), step.outputs.len());
    let most = (limits.tokens_per_step, limits.chunks, limits.output_rows);
    assert!(counts.0 <= most.0 && counts.1 <= most.1 && counts.2 <= most.2, "{counts:?} exceeds {most:?}");
    assert!(step.tokens.iter().all(|&t| (t as usize) < vocab), "a token is outside a vocabulary of {vocab}");
    let mut next = (0, 0);
    for chunk in &step.chunks {
        let end = chunk.position + chunk.tokens.len();
        assert!(
            !chunk.tokens.is_empty() && end <= limits.context,
            "{chunk:?} in a context of {}",
            limits.context
        );
        assert!((chunk.tokens.start, chunk.pages.start) == next, "{chunk:?} does not begin at {next:?}");
        assert_eq!(chunk.pages.len(), limits.pages.len() * chunk.page_count(), "{chunk:?}");
        next = (chunk.tokens.end, chunk.pages.end);
    }
    assert_eq!(next, (step.tokens.len(), step.page_table.len()), "chunks do not cover the step");
    assert!(step.pooled.iter().all(|&chunk| chunk < step.chunks.len()), "pooled chunks {:?}", step.pooled);
    check_outputs(step);
    check_pages(step, limits, layout);
}

fn check_outputs(step: &Step) {
    assert!(step.outputs.is_sorted_by_key(|o| o.row), "output rows are not ascending");
    for output in &step.outputs {
        let chunk =
            step.chunks.iter().find(|c| c.tokens.contains(&output.row)).expect("an output row is a row");
        assert_eq!(output.position, chunk.position + output.row - chunk.tokens.start + 1, "{output:?}");
        if let Want::Sample(s) = &output.want {
            assert!(s.bias.end <= step.biases.len() && s.history.end <= step.history.len(), "{s:?}");
            assert!(s.mask.as_ref().is_none_or(|mask| mask.end <= step.masks.len()), "{s:?}");
        }
    }
}

/// A page that one chunk writes is in no other chunk's table, pages that no row sees are given back, and copies can be
/// made in any order.
fn check_pages(step: &Step, limits: &Limits, layout: &KvLayout) {
    for (group, &count) in limits.pages.iter().enumerate() {
        let known = |p: &PageId| p.0 > 0 && (p.0 as usize) < count;
        let mut written = HashSet::new();
        let mut read = HashSet::new();
        for chunk in &step.chunks {
            let (before, from) = chunk.table(step, group).split_at(chunk.position / PAGE_TOKENS);
            let (unseen, before) =
                before.split_at(oldest_page(layout.groups[group].window, chunk.position).min(before.len()));
            assert!(unseen.iter().all(|p| p.0 == 0), "{chunk:?} keeps pages that it does not see");
            assert!(before.iter().chain(from).all(known), "{chunk:?} names page 0 or one past {count}");
            from.iter().for_each(|p| assert!(written.insert(*p), "two chunks write {p:?}"));
            read.extend(before);
        }
        assert!(read.is_disjoint(&written), "a chunk writes a page that another reads");
        let copies = step.copies.iter().filter(|(from, _)| from.group as usize == group);
        let (from, to): (HashSet<PageId>, Vec<PageId>) = copies.map(|(f, t)| (f.page, t.page)).unzip();
        let distinct: HashSet<PageId> = to.iter().copied().collect();
        assert!(
            distinct.len() == to.len() && distinct.is_disjoint(&from),
            "copies overlap: {:?}",
            step.copies
        );
        assert!(from.iter().chain(&to).all(known), "a copy names page 0 or one past {count}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: usize = 50;

    fn limits() -> Limits {
        Limits {
            context: 128,
            tokens_per_step: 64,
            chunks: 4,
            output_rows: 8,
            pages: vec![6, 6],
            kv_dtype: KvDType::F32,
        }
    }

    /// One chunk over `tokens[position..]` in `pages` of both groups that draws greedily at its last row.
    fn one_chunk(tokens: &[u32], position: usize, pages: &[u32]) -> Step {
        let table = pages.iter().map(|&p| PageId(p));
        let want = Want::Sample(Sampling::greedy());
        let rows = tokens.len() - position;
        Step {
            tokens: tokens[position..].to_vec(),
            chunks: vec![Chunk {
                tokens: 0..rows,
                position,
                pages: 0..2 * pages.len(),
                rope_table: 0,
                second: None,
                adapter: None,
            }],
            page_table: table.clone().chain(table).collect(),
            outputs: vec![OutputRow { row: rows - 1, position: tokens.len(), want, top_logprobs: None }],
            ..Step::default()
        }
    }

    fn run(executor: &mut EchoExecutor, step: &Step) -> Result<u32, StepError> {
        let mut out = StepOutput::default();
        executor.submit(step)?;
        executor.finish(&mut out)?;
        Ok(out.tokens[0])
    }

    #[test]
    fn a_chunked_prompt_draws_what_is_expected() {
        let tokens: Vec<u32> = (0..40).collect();
        let want = expected(VOCAB, &tokens, &Sampling::greedy(), &[]);
        let mut echo = EchoExecutor::new(VOCAB, limits());
        run(&mut echo, &one_chunk(&tokens[..17], 0, &[3])).unwrap();
        assert_eq!(run(&mut echo, &one_chunk(&tokens, 17, &[3, 1])).unwrap(), want);
        assert_ne!(run(&mut echo, &one_chunk(&tokens, 17, &[2, 1])).unwrap(), want, "a page never written");
    }

    #[test]
    fn pages_are_copied_and_travel_as_bytes() {
        let tokens: Vec<u32> = (0..40).rev().collect();
        let want = expected(VOCAB, &tokens, &Sampling::greedy(), &[]);
        let mut echo = EchoExecutor::new(VOCAB, limits());
        run(&mut echo, &one_chunk(&tokens[..39], 0, &[1, 2])).unwrap();
        let page = |group, page| PageRef { group, page: PageId(page) };
        let mut forked = one_chunk(&tokens, 39, &[1, 5]);
        forked.copies = vec![(page(0, 2), page(0, 5)), (page(1, 2), page(1, 5))];
        assert_eq!(run(&mut echo, &forked).unwrap(), want);

        let mut other = EchoExecutor::new(VOCAB, limits());
        let from = [page(0, 1), page(1, 1), page(0, 2), page(1, 2)];
        let read = from.map(|page| PageRead { page, tokens: PAGE_TOKENS });
        echo.start_read(&read, Ticket(7));
        let mut done = Vec::new();
        echo.poll(&mut done);
        assert_eq!((done.len(), done[0].ticket, done[0].bytes.len()), (1, Ticket(7), 4));
        let stored = done.remove(0).bytes.into_iter().map(|bytes| Box::new(bytes) as StoredPage);
        other.start_write(from.into_iter().zip(stored).collect(), Ticket(8));
        assert_eq!(run(&mut other, &one_chunk(&tokens, 39, &[1, 2])).unwrap(), want);
    }

    #[test]
    fn slots_that_do_not_count_are_zeros_under_the_digest() {
        let mut echo = EchoExecutor::new(VOCAB, limits());
        run(&mut echo, &one_chunk(&[7; 20], 0, &[1])).unwrap();
        let page = PageRef { group: 0, page: PageId(1) };
        let reads = [20, 12].map(|tokens| PageRead { page, tokens });
        echo.start_read(&reads, Ticket(1));
        let mut done = Vec::new();
        echo.poll(&mut done);
        let [all, some] = [0, 1].map(|i| (done[0].bytes[i].clone(), done[0].digests[i]));
        // K, then V, of 32 tokens with 4 bytes each.
        assert!(
            all.0[4 * 12..4 * 20].iter().any(|&b| b != 0) && all.0[4 * 20..4 * 32].iter().all(|&b| b == 0)
        );
        assert_eq!(some.0[..4 * 12], all.0[..4 * 12]);
        assert!(some.0[4 * 12..4 * 32].iter().all(|&b| b == 0));
        for (bytes, digest) in [all, some] {
            assert_eq!(digest, crate::kv::digest(&bytes));
        }
    }

    #[test]
    fn a_window_hides_what_is_older_and_shows_the_rest() {
        let tokens: Vec<u32> = (0..100).map(|i| i * 7 % 50).collect();
        let windows = [Some(40), Some(20)];
        let mut echo = EchoExecutor::new(VOCAB, limits()).windowed(&windows);
        for (at, pages) in [(0, &[1, 2][..]), (64, &[0, 2, 3, 4])] {
            let mut step = one_chunk(&tokens[..(at + 64).min(100)], at, pages);
            if at == 64 {
                // The token at 64 sees back to 25, and to 45.
                step.page_table = [1, 2, 3, 4, 0, 2, 3, 4].map(PageId).to_vec();
            }
            let want = expected_of(
                (VOCAB, Some(40)),
                &tokens[..(at + 64).min(100)],
                (&Sampling::greedy(), None),
                &[],
            );
            assert_eq!(run(&mut echo, &step).unwrap(), want, "from {at}");
        }
        assert_ne!(
            expected_logprob((VOCAB, Some(40)), &tokens, 3).to_bits(),
            expected_logprob((VOCAB, None), &tokens, 3).to_bits()
        );
    }

    #[test]
    #[should_panic(expected = "keeps pages that it does not see")]
    fn pages_that_no_row_sees_are_refused() {
        let mut echo = EchoExecutor::new(VOCAB, limits()).windowed(&[None, Some(20)]);
        run(&mut echo, &one_chunk(&[1; 65], 64, &[1, 2, 3])).unwrap();
    }

    #[test]
    fn failures_come_when_asked_for() {
        let mut echo = EchoExecutor::new(VOCAB, limits()).failing_every(2);
        let step = one_chunk(&[1, 2, 3], 0, &[1]);
        assert!(run(&mut echo, &step).is_ok());
        assert!(run(&mut echo, &step).is_err());
        assert!(run(&mut echo, &step).is_ok());
    }

    #[test]
    #[should_panic(expected = "page 0")]
    fn page_0_is_refused() {
        run(&mut EchoExecutor::new(VOCAB, limits()), &one_chunk(&[1], 0, &[0])).unwrap();
    }

    #[test]
    #[should_panic(expected = "two chunks write")]
    fn two_writers_of_a_page_are_refused() {
        let mut step = one_chunk(&[1], 0, &[1]);
        step.tokens.push(2);
        step.chunks.push(Chunk {
            tokens: 1..2,
            position: 0,
            pages: 2..4,
            rope_table: 0,
            second: None,
            adapter: None,
        });
        step.page_table.extend([PageId(1), PageId(1)]);
        run(&mut EchoExecutor::new(VOCAB, limits()), &step).unwrap();
    }
}
