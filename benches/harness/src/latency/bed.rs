//! An executor whose pages are full of random keys and values, and the steps of a case on it.

use half::{bf16, f16};
use mainstay_backend_api::{
    Chunk, Executor, KvDType, OutputRow, PAGE_TOKENS, PageBytes, PageId, PageRef, Sampling, Step, StepError,
    StepOutput, Ticket, Want,
};
use mainstay_models::graph::Graph;

use super::{Case, Phase, Plan};
use crate::shape::Random;

/// An executor with pages of random keys and values, ready for any case.
pub(super) struct Bed<'a> {
    executor: Box<dyn Executor>,
    plan: &'a Plan,
    vocab: u32,
    random: Random,
    /// Pages of each sequence of the case that runs.
    own_pages: usize,
    out: StepOutput,
}

impl<'a> Bed<'a> {
    pub(super) fn new(executor: Box<dyn Executor>, graph: &Graph, plan: &'a Plan) -> Self {
        let vocab = u32::try_from(graph.vocab).unwrap_or(u32::MAX).max(1);
        Self { executor, plan, vocab, random: Random(7), own_pages: 0, out: StepOutput::default() }
    }

    /// Writes every page, so that no case reads memory that was never touched.
    pub(super) fn fill_pages(&mut self) -> Result<(), StepError> {
        let groups = self.executor.kv_layout().groups.clone();
        let limits = self.plan.limits(groups.len());
        let mut done = Vec::new();
        for (group, layout) in groups.iter().enumerate() {
            let bytes = self.random_page(layout.page_bytes());
            for page in 1..limits.pages[group] as u32 {
                let place = PageRef { group: group as u32, page: PageId(page) };
                self.executor.start_write(vec![(place, Box::new(bytes.clone()))], Ticket(u64::from(page)));
                self.executor.poll(&mut done);
            }
        }
        // the copies are ordered before the next step, which is what waits for them
        done.into_iter().try_for_each(|copy| copy.result)
    }

    fn random_page(&mut self, len: usize) -> PageBytes {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let value = self.random.weight();
            match self.plan.kv_dtype {
                // Codes may be any bytes; their scales are floats.
                KvDType::F32 | KvDType::Q8 => bytes.extend_from_slice(&value.to_le_bytes()),
                KvDType::F16 => bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
                KvDType::BF16 => bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
            }
        }
        bytes.into_boxed_slice()
    }

    /// Runs a case and says how many tokens it computed.
    pub(super) fn run(&mut self, case: Case) -> Result<usize, StepError> {
        self.own_pages = self.plan.pages_each(case);
        match case.phase {
            Phase::Prefill => {
                self.prefill(case.depth, self.plan.prompt)?;
                Ok(self.plan.prompt)
            }
            Phase::Decode => {
                for i in 0..self.plan.gen_steps {
                    self.step(case.batch, case.depth + i, 1)?;
                }
                Ok(case.batch * self.plan.gen_steps)
            }
        }
    }

    pub(super) fn prefill(&mut self, depth: usize, tokens: usize) -> Result<(), StepError> {
        let mut at = 0;
        while at < tokens {
            let len = self.plan.tokens_per_step.min(tokens - at);
            self.step(1, depth + at, len)?;
            at += len;
        }
        Ok(())
    }

    /// One step of `batch` chunks of `len` tokens at `position`, each on pages of its own, each with one output.
    fn step(&mut self, batch: usize, position: usize, len: usize) -> Result<(), StepError> {
        let own_pages = self.own_pages;
        let groups = self.executor.kv_layout().groups.len();
        let mut step = Step::default();
        for i in 0..batch {
            let (token, page) = (step.tokens.len(), step.page_table.len());
            step.tokens.extend((0..len).map(|_| self.random.next() as u32 % self.vocab));
            let count = (position + len).div_ceil(PAGE_TOKENS);
            for _ in 0..groups {
                step.page_table.extend((0..count).map(|p| PageId((1 + i * own_pages + p) as u32)));
            }
            let tokens = token..token + len;
            step.outputs.push(OutputRow {
                row: tokens.end - 1,
                position: position + len,
                want: Want::Sample(Sampling::greedy()),
                top_logprobs: None,
            });
            step.chunks.push(Chunk {
                tokens,
                position,
                pages: page..step.page_table.len(),
                rope_table: 0,
                second: None,
                adapter: None,
            });
        }
        self.executor.submit(&step)?;
        self.executor.finish(&mut self.out)
    }
}
