//! One submission to an executor: flat, reused vectors, mixing long chunks (prefill) and short ones (decode).

use std::ops::Range;

use crate::Limits;
use crate::kv::{PAGE_TOKENS, PageId, PageRef};

/// Tokens of several sequences to compute together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Token ids of all chunks, end to end; `T` of them. Rows of the graph's values in the same order.
    pub tokens: Vec<u32>,
    /// One per sequence.
    pub chunks: Vec<Chunk>,
    /// Page tables of all chunks; see [`Chunk::pages`].
    pub page_table: Vec<PageId>,
    /// Pages to copy whole before anything is computed (source, destination): forks of a page not yet full.
    pub copies: Vec<(PageRef, PageRef)>,
    /// Rows whose output is wanted, ascending by `row`; `O` of them.
    pub outputs: Vec<OutputRow>,
    /// Chunks whose sequence ends with them and becomes one row, by index, ascending; `P` of them.
    pub pooled: Vec<usize>,
    /// Additive biases on logits, referred to by [`Sampling::bias`].
    pub biases: Vec<(u32, f32)>,
    /// Tokens that penalties count, referred to by [`Sampling::history`].
    pub history: Vec<u32>,
    /// Sets of tokens that may be drawn, referred to by [`Sampling::mask`]: bit `id % 32` of word `id / 32`.
    pub masks: Vec<u32>,
    /// Also return the raw logits of every output row (tests and parity only).
    pub return_logits: bool,
}

impl Step {
    /// Empties all vectors and keeps their memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.chunks.clear();
        self.page_table.clear();
        self.copies.clear();
        self.outputs.clear();
        self.pooled.clear();
        self.biases.clear();
        self.history.clear();
        self.masks.clear();
    }

    /// What every executor relies on: the step stays inside the limits and its parts fit each other. Allocates
    /// nothing.
    ///
    /// # Panics
    /// With both numbers, where it does not: such a step is a bug of the caller.
    pub fn assert_within(&self, limits: &Limits) {
        let at_most = |what: &str, n: usize, max: usize| assert!(n <= max, "{what}: {n}, limit {max}");
        at_most("tokens in a step", self.tokens.len(), limits.tokens_per_step);
        at_most("chunks in a step", self.chunks.len(), limits.chunks);
        at_most("output rows in a step", self.outputs.len(), limits.output_rows);
        let mut end = 0;
        for chunk in &self.chunks {
            let range = &chunk.tokens;
            assert!(range.start == end && range.end > end, "chunk {range:?} does not follow token {end}");
            end = range.end;
            at_most("tokens in a sequence", chunk.position + range.len(), limits.context);
            let (found, expected) = (chunk.pages.len(), chunk.page_count() * limits.pages.len());
            assert_eq!(found, expected, "pages of a chunk up to token {}", chunk.position + range.len());
            for (group, &pages) in limits.pages.iter().enumerate() {
                let outside = chunk.table(self, group).iter().find(|p| p.0 as usize >= pages);
                assert_eq!(outside, None, "a page of group {group}, which has {pages}");
            }
        }
        assert_eq!(end, self.tokens.len(), "tokens of all chunks");
        let rows = || self.outputs.iter().map(|o| o.row);
        assert!(rows().is_sorted() && rows().all(|r| r < end), "output rows do not ascend below {end}");
        let ascend = self.pooled.is_sorted_by(|a, b| a < b);
        let known = self.pooled.iter().all(|&chunk| chunk < self.chunks.len());
        assert!(ascend && known, "pooled chunks {:?} of {}", self.pooled, self.chunks.len());
    }
}

/// Names an adapter that an executor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u32);

/// A run of one sequence's tokens.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Chunk {
    /// Its tokens in [`Step::tokens`].
    pub tokens: Range<usize>,
    /// Position in the sequence of its first token; everything before is in its pages.
    pub position: usize,
    /// Its page tables in [`Step::page_table`]: for each group in order, `page_count()` pages of 32 tokens.
    pub pages: Range<usize>,
    /// Which of [`mainstay_models::graph::Rope::tables`] its sequence uses.
    pub rope_table: usize,
    /// Position in the sequence where the second text of a pair begins.
    pub second: Option<usize>,
    /// What its rows' products are changed by: one of [`crate::Executor::set_adapter`]'s.
    pub adapter: Option<AdapterId>,
}

impl Chunk {
    /// Which text of a pair the token at a position of the sequence belongs to: 0 or 1.
    pub fn segment(&self, position: usize) -> usize {
        usize::from(self.second.is_some_and(|second| position >= second))
    }

    /// Pages per group: enough for all tokens up to the end of the chunk.
    pub fn page_count(&self) -> usize {
        (self.position + self.tokens.len()).div_ceil(PAGE_TOKENS)
    }

    /// The chunk's page table of a group.
    pub fn table<'a>(&self, step: &'a Step, group: usize) -> &'a [PageId] {
        let n = self.page_count();
        &step.page_table[self.pages.clone()][group * n..(group + 1) * n]
    }
}

/// A row whose logits are turned into something.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputRow {
    /// Index into [`Step::tokens`].
    pub row: usize,
    /// Position in the sequence of the token that the row predicts.
    pub position: usize,
    /// What to make of the logits.
    pub want: Want,
    /// How many of the most probable tokens to report, `None` for no log-probabilities at all.
    pub top_logprobs: Option<usize>,
}

/// What to make of a row's logits.
#[derive(Clone, Debug, PartialEq)]
pub enum Want {
    /// Draw the next token.
    Sample(Sampling),
    /// Report the log-probability of this given token (prompt log-probabilities).
    Score(u32),
}

/// How to draw a token. Applied in this order: mask, bias, repetition, presence and frequency penalties, temperature,
/// top-k, top-p, min-p. The random number is a function of (seed, choice, position), so there is no generator state.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy: the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most probable tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this times the most probable one; 0 drops none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of all tokens in the history; 1 does nothing.
    pub repetition_penalty: f32,
    /// Subtracted from tokens that were generated.
    pub presence_penalty: f32,
    /// Subtracted for every time that a token was generated.
    pub frequency_penalty: f32,
    /// The request's seed.
    pub seed: u64,
    /// The choice's index in the request.
    pub choice: u32,
    /// Biases, in [`Step::biases`].
    pub bias: Range<usize>,
    /// The only tokens that may be drawn, in [`Step::masks`]; without it, all may. Those past its end may not. Some token
    /// must be left that no bias makes impossible.
    pub mask: Option<Range<usize>>,
    /// Prompt and generated tokens so far, in [`Step::history`]; empty if no penalty is set.
    pub history: Range<usize>,
    /// How many tokens of the history are prompt: presence and frequency penalties do not count them.
    pub prompt_len: usize,
}

impl Sampling {
    /// The most probable token, with no penalties.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            choice: 0,
            bias: 0..0,
            mask: None,
            history: 0..0,
            prompt_len: 0,
        }
    }
}

/// The result of a step: one entry per output row in the order of [`Step::outputs`], and the pooled rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// The drawn token, or the scored one.
    pub tokens: Vec<u32>,
    /// Natural-log probability of that token under the raw logits (before mask, bias, penalties and temperature); 0 for
    /// a drawn token where [`OutputRow::top_logprobs`] is `None`.
    pub logprobs: Vec<f32>,
    /// The most probable tokens under the raw logits, most probable first, lowest id among equals.
    pub top_logprobs: Vec<Vec<(u32, f32)>>,
    /// The rows of the pooled sequences, `[P, width]`, in the order of [`Step::pooled`]: embeddings, or scores.
    pub pooled: Vec<f32>,
    /// Raw logits `[O, vocab]` if [`Step::return_logits`], else empty.
    pub logits: Vec<f32>,
}

impl StepOutput {
    /// Makes room for this many output rows, keeps the memory, and empties the lists and the logits. A backend then
    /// fills tokens, log-probabilities and lists by index, on several threads if it likes.
    pub fn reset(&mut self, rows: usize) {
        self.tokens.clear();
        self.tokens.resize(rows, 0);
        self.logprobs.clear();
        self.logprobs.resize(rows, 0.0);
        self.top_logprobs.resize_with(rows, Vec::new);
        self.top_logprobs.iter_mut().for_each(Vec::clear);
        self.pooled.clear();
        self.logits.clear();
    }

    /// Empties all vectors and keeps their memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.logprobs.clear();
        self.top_logprobs.clear();
        self.pooled.clear();
        self.logits.clear();
    }
}
