//! Keys and values of layers that keep none: those of one step, in blocks as pages have them.

use mainstay_backend_api::kv::PAGE_TOKENS;
use mainstay_backend_api::{Limits, Step};
use mainstay_kernels_cpu::kv::{BlockShape, KvType};
use mainstay_models::LoadError;

use crate::arena::Blocks;
use crate::pages::LayerPages;

/// The blocks of all sequences of a step, `[chunk][32 tokens][head]`; one layer after another uses them.
pub(crate) struct StepKv {
    blocks: Blocks,
    heads: usize,
    /// Where each chunk's blocks begin, counted in runs of 32 tokens.
    firsts: Vec<usize>,
}

impl StepKv {
    /// Room for the largest step of layers with at most this many heads of at most this width.
    ///
    /// # Errors
    /// [`LoadError::Resources`] where memory is short.
    pub(crate) fn new(limits: &Limits, heads: usize, head_dim: usize) -> Result<Self, LoadError> {
        let runs = limits.tokens_per_step / PAGE_TOKENS + limits.chunks;
        let blocks = Blocks::new(KvType::F32, BlockShape::Heads { head_dim }, runs * heads);
        let blocks = blocks.ok_or_else(|| LoadError::Resources {
            what: format!("no memory for keys and values of {} tokens a step", limits.tokens_per_step),
        })?;
        Ok(Self { blocks, heads, firsts: Vec::with_capacity(limits.chunks) })
    }

    /// Gives each chunk of a step its blocks.
    pub(crate) fn prepare(&mut self, step: &Step) {
        self.firsts.clear();
        let mut next = 0;
        for chunk in &step.chunks {
            assert_eq!(chunk.position, 0, "a sequence without a causal mask comes whole");
            self.firsts.push(next);
            next += chunk.tokens.len().div_ceil(PAGE_TOKENS);
        }
    }
}

/// Where a layer's keys and values are.
#[derive(Clone, Copy)]
pub(crate) enum Kv<'a> {
    Pages(LayerPages<'a>),
    Step(&'a StepKv),
}

impl<'a> Kv<'a> {
    pub(crate) fn blocks(self) -> &'a Blocks {
        match self {
            Kv::Pages(pages) => pages.blocks(),
            Kv::Step(kv) => &kv.blocks,
        }
    }

    /// The number of a head's block with the tokens from `32 * run` on of a chunk's sequence.
    pub(crate) fn block(self, step: &Step, (chunk, run): (usize, usize), head: usize) -> usize {
        match self {
            Kv::Pages(pages) => pages.block(step.chunks[chunk].table(step, pages.group)[run], head),
            Kv::Step(kv) => (kv.firsts[chunk] + run) * kv.heads + head,
        }
    }
}
