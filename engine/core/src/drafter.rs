//! A smaller model of the same vocabulary that guesses what the larger one draws: its own executor and pages, driven
//! by the engine's thread between steps.

use std::collections::HashMap;

use mainstay_backend_api::{
    Chunk, Executor, Limits, OutputRow, PAGE_TOKENS, PageId, Sampling, Step, StepError, StepOutput, Want,
};

use crate::scheduler::slots_max;
use crate::sequence::SequenceId;

/// A sequence whose next tokens are to be guessed.
pub(crate) struct Wanted<'a> {
    pub(crate) id: SequenceId,
    pub(crate) tokens: &'a [u32],
    /// How many.
    pub(crate) len: usize,
    /// How the larger model draws them: with the same random numbers the two agree more often.
    pub(crate) sampling: Sampling,
}

/// What of a sequence the smaller model has computed.
#[derive(Default)]
struct Known {
    tokens: Vec<u32>,
    /// `[group][page]`
    pages: Vec<Vec<PageId>>,
    /// The call that asked for it last.
    used: u64,
}

/// The smaller model.
pub(crate) struct Drafter {
    executor: Box<dyn Executor>,
    limits: Limits,
    /// Pages that no sequence has, by group.
    free: Vec<Vec<PageId>>,
    known: HashMap<SequenceId, Known>,
    calls: u64,
    step: Step,
    out: StepOutput,
}

impl Drafter {
    pub(crate) fn new(executor: Box<dyn Executor>, limits: Limits) -> Self {
        // Page 0 is never given out.
        let free = limits.pages.iter().map(|&pages| (1..pages as u32).map(PageId).collect()).collect();
        let (step, out) = (Step::default(), StepOutput::default());
        Self { executor, limits, free, known: HashMap::new(), calls: 0, step, out }
    }

    /// Guesses for as many of these sequences as there is room for. One that it is far behind with, for which it would
    /// have to compute more than a step, it only comes closer to.
    ///
    /// # Errors
    /// What the device says; everything is forgotten then.
    pub(crate) fn guess(&mut self, wanted: &[Wanted<'_>]) -> Result<Vec<(SequenceId, Vec<u32>)>, StepError> {
        self.calls += 1;
        let mut rows = slots_max(&self.limits);
        let mut guesses: Vec<(&Wanted<'_>, Vec<u32>)> = Vec::with_capacity(wanted.len());
        for one in wanted {
            let len = one.tokens.len() + one.len;
            if rows > 0 && one.len > 0 && len <= self.limits.context && self.reserve(one, len) {
                guesses.push((one, Vec::with_capacity(one.len)));
                rows -= 1;
            }
        }
        while self.plan(&guesses) {
            let done = self.executor.submit(&self.step).and_then(|()| self.executor.finish(&mut self.out));
            if let Err(error) = done {
                self.forget_all();
                return Err(error);
            }
            let drawn = self.step.outputs.iter().map(|output| output.row).zip(&self.out.tokens);
            let drawn: HashMap<usize, u32> = drawn.map(|(row, &token)| (row, token)).collect();
            let mut chunks = self.step.chunks.iter();
            let mut is_behind = false;
            for (one, guessed) in guesses.iter_mut().filter(|(one, guessed)| guessed.len() < one.len) {
                let Some(chunk) = chunks.next() else { break };
                let known = self.known.get_mut(&one.id).expect("pages were reserved for it");
                known.tokens.extend_from_slice(&self.step.tokens[chunk.tokens.clone()]);
                guessed.extend(drawn.get(&(chunk.tokens.end - 1)));
                is_behind |= !drawn.contains_key(&(chunk.tokens.end - 1));
            }
            if is_behind {
                break;
            }
        }
        Ok(guesses.into_iter().map(|(one, guessed)| (one.id, guessed)).collect())
    }

    /// The next step of the sequences that lack guesses; `false` where none does.
    fn plan(&mut self, guesses: &[(&Wanted<'_>, Vec<u32>)]) -> bool {
        let step = &mut self.step;
        step.clear();
        let mut room = self.limits.tokens_per_step;
        let lacking = guesses.iter().filter(|(one, guessed)| guessed.len() < one.len);
        let mut others = lacking.clone().count();
        for (one, guessed) in lacking {
            others -= 1;
            let known = &self.known[&one.id];
            let (position, end) = (known.tokens.len(), one.tokens.len() + guessed.len());
            let tokens = one.tokens.iter().chain(guessed).copied();
            // Each of the others gets a token at least.
            let count = (end - position).min(room - others);
            let (start, table) = (step.tokens.len(), step.page_table.len());
            step.tokens.extend(tokens.skip(position).take(count));
            let mut chunk = Chunk { tokens: start..start + count, position, ..Chunk::default() };
            for pages in &known.pages {
                step.page_table.extend_from_slice(&pages[..chunk.page_count()]);
            }
            chunk.pages = table..step.page_table.len();
            step.chunks.push(chunk);
            room -= count;
            if position + count == end {
                let want = Want::Sample(one.sampling.clone());
                let row = start + count - 1;
                step.outputs.push(OutputRow { row, position: end, want, top_logprobs: None });
            }
        }
        !step.chunks.is_empty()
    }

    /// Goes back to what is still true of a sequence, and finds pages for so many of its tokens.
    fn reserve(&mut self, wanted: &Wanted<'_>, len: usize) -> bool {
        let known = self.known.entry(wanted.id).or_default();
        known.used = self.calls;
        known.pages.resize_with(self.free.len(), Vec::new);
        let same = known.tokens.iter().zip(wanted.tokens).take_while(|(a, b)| a == b).count();
        // The last one is computed again, since only its row is drawn from.
        known.tokens.truncate(same.min(wanted.tokens.len() - 1));
        let count = len.div_ceil(PAGE_TOKENS);
        loop {
            let known = self.known.get_mut(&wanted.id).expect("it was entered above");
            let is_short = |(pages, free): (&Vec<PageId>, &Vec<PageId>)| count > pages.len() + free.len();
            if !known.pages.iter().zip(&self.free).any(is_short) {
                for (pages, free) in known.pages.iter_mut().zip(&mut self.free) {
                    let new = count.saturating_sub(pages.len());
                    pages.extend(free.drain(free.len() - new..));
                }
                return true;
            }
            let oldest = self.known.iter().filter(|(_, known)| known.used < self.calls);
            let Some(id) = oldest.min_by_key(|(_, known)| known.used).map(|(&id, _)| id) else {
                return false;
            };
            self.forget(id);
        }
    }

    fn forget(&mut self, id: SequenceId) {
        let Some(known) = self.known.remove(&id) else { return };
        self.free.iter_mut().zip(known.pages).for_each(|(free, pages)| free.extend(pages));
    }

    fn forget_all(&mut self) {
        let ids: Vec<SequenceId> = self.known.keys().copied().collect();
        ids.into_iter().for_each(|id| self.forget(id));
    }
}

#[cfg(test)]
mod tests {
    use mainstay_backend_api::KvDType;
    use mainstay_backend_api::echo::{EchoExecutor, expected_of};

    use super::*;
    use crate::RequestId;

    const VOCAB: usize = 40;

    fn drafter(pages: usize, tokens_per_step: usize) -> Drafter {
        let limits = Limits {
            context: (pages - 1) * PAGE_TOKENS,
            tokens_per_step,
            chunks: 4,
            output_rows: 4,
            pages: vec![pages],
            kv_dtype: KvDType::F32,
        };
        Drafter::new(Box::new(EchoExecutor::new(VOCAB, limits.clone())), limits)
    }

    fn wanted(request: u64, tokens: &[u32], len: usize) -> Wanted<'_> {
        let sampling = Sampling { temperature: 1.0, seed: request, ..Sampling::greedy() };
        Wanted { id: SequenceId { request: RequestId(request), choice: 0 }, tokens, len, sampling }
    }

    fn prompt(len: usize, salt: u32) -> Vec<u32> {
        (0..len as u32).map(|i| (i * i + i / 7 + salt) % VOCAB as u32).collect()
    }

    /// What the model draws by itself.
    fn alone(one: &Wanted<'_>) -> Vec<u32> {
        let mut tokens = one.tokens.to_vec();
        for _ in 0..one.len {
            tokens.push(expected_of((VOCAB, None), &tokens, (&one.sampling, None), &[]));
        }
        tokens.split_off(one.tokens.len())
    }

    fn check(drafter: &mut Drafter, wanted: &[Wanted<'_>]) {
        let found = drafter.guess(wanted).unwrap();
        let expected: Vec<_> = wanted.iter().map(|one| (one.id, alone(one))).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn guesses_are_what_the_model_draws_whatever_was_rejected_before() {
        let mut drafter = drafter(30, 64);
        let (mut a, mut b) = (prompt(20, 1), prompt(31, 2));
        for turn in 0..20 {
            check(&mut drafter, &[wanted(1, &a, 4), wanted(2, &b, 1 + turn % 5)]);
            // Sometimes guesses were true, sometimes something else was drawn.
            let guessed = alone(&wanted(1, &a, 4));
            a.extend(&guessed[..turn % 5]);
            a.push(3);
            b.push(turn as u32 % VOCAB as u32);
        }
    }

    #[test]
    fn a_long_prompt_is_caught_up_with_step_by_step() {
        let mut drafter = drafter(30, 16);
        let tokens = prompt(60, 5);
        let calls =
            (0..).take_while(|_| drafter.guess(&[wanted(1, &tokens, 2)]).unwrap()[0].1.is_empty()).count();
        assert_eq!(calls, 3);
        check(&mut drafter, &[wanted(1, &tokens, 2)]);
    }

    #[test]
    fn pages_come_from_whoever_was_asked_for_longest_ago() {
        let mut drafter = drafter(6, 64);
        let prompts: Vec<Vec<u32>> = (0..4).map(|salt| prompt(40, salt)).collect();
        for round in 0..3 {
            for (id, tokens) in (0..).zip(&prompts) {
                check(&mut drafter, &[wanted(id + 10 * round, tokens, 3)]);
            }
        }
        assert!(drafter.known.len() <= 2, "five pages hold two sequences");
        let both = [wanted(100, &prompts[0], 3), wanted(101, &prompts[1], 3), wanted(102, &prompts[2], 3)];
        assert_eq!(drafter.guess(&both).unwrap().len(), 2, "no room for the third");
    }
}
