//! Prefill and decode speed of one executor, step by step, with nothing above it.

use std::time::Instant;

use half::{bf16, f16};
use mainstay_backend_api::{
    Backend, Chunk, Executor, KvDType, Limits, OutputRow, PAGE_TOKENS, PageBytes, PageId, PageRef, Sampling,
    Step, StepError, StepOutput, Ticket, Want,
};
use mainstay_models::graph::{Graph, KvSpec, Op};
use mainstay_models::{LoadError, Weights};

use crate::noise;
use crate::shape::Random;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Tokens of the prompt whose prefill is measured.
    pub prompt: usize,
    /// Tokens that lie in the pages before.
    pub depths: Vec<usize>,
    /// Sequences that decode together.
    pub batches: Vec<usize>,
    /// Decode steps.
    pub gen_steps: usize,
    /// Runs of each case; they go round, so that a slow minute does not hit one case alone.
    pub repeats: usize,
    /// Most tokens in one step of a prefill.
    pub tokens_per_step: usize,
    /// Element type of keys and values.
    pub kv_dtype: KvDType,
}

/// The machine's limits as measured beside it; `None` where they are not known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Peaks {
    /// Bytes read from memory per second.
    pub read_bytes_per_s: Option<f64>,
    /// Multiplications and additions per second in f32.
    pub fma_flops_per_s: Option<f64>,
}

/// Which half of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A prompt, many rows a step.
    Prefill,
    /// One row of each sequence a step.
    Decode,
}

/// One row of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Prefill or decode.
    pub phase: Phase,
    /// Tokens before.
    pub depth: usize,
    /// Sequences.
    pub batch: usize,
}

/// What a case gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// The case.
    pub case: Case,
    /// Tokens per second of each run.
    pub tokens_per_s: Vec<f64>,
    /// Part of the processors' time that other programs took, of each run.
    pub foreign: Vec<Option<f64>>,
    /// Weights, keys and values that one token needs to be read, bytes.
    pub bytes_per_token: f64,
    /// Multiplications and additions for one token.
    pub flops_per_token: f64,
}

impl Measurement {
    /// The middle run; the mean of the two middle ones of an even number.
    pub fn median(&self) -> f64 {
        let mut sorted = self.tokens_per_s.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        (low + high) / 2.0
    }

    /// Part of the memory bandwidth that the median run reached.
    pub fn bandwidth_share(&self, peaks: &Peaks) -> Option<f64> {
        Some(self.median() * self.bytes_per_token / peaks.read_bytes_per_s?)
    }

    /// Part of the arithmetic peak that the median run reached.
    pub fn fma_share(&self, peaks: &Peaks) -> Option<f64> {
        Some(self.median() * self.flops_per_token / peaks.fma_flops_per_s?)
    }
}

impl Plan {
    fn cases(&self) -> Vec<Case> {
        let prefills = self.depths.iter().map(|&depth| Case { phase: Phase::Prefill, depth, batch: 1 });
        let decodes = self.depths.iter().flat_map(|&depth| {
            self.batches.iter().map(move |&batch| Case { phase: Phase::Decode, depth, batch })
        });
        prefills.chain(decodes).collect()
    }

    /// Tokens of the longest sequence.
    fn context(&self) -> usize {
        self.depths.iter().max().copied().unwrap_or(0) + self.prompt.max(self.gen_steps + 1)
    }

    fn limits(&self, groups: usize) -> Limits {
        let chunks = self.batches.iter().max().copied().unwrap_or(1).max(1);
        Limits {
            context: self.context(),
            tokens_per_step: self.tokens_per_step.max(chunks),
            chunks,
            output_rows: chunks,
            pages: vec![chunks * self.context().div_ceil(PAGE_TOKENS) + 1; groups],
            kv_dtype: self.kv_dtype,
        }
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum LatencyError {
    /// The plan asks for what the model does not have.
    #[error("{0}")]
    Plan(String),
    /// The backend did not take the model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Loads the model and measures every case of the plan; `tell` hears what is going on.
///
/// # Errors
/// [`LatencyError`].
pub fn latency(
    backend: &dyn Backend,
    (graph, weights): (&Graph, &Weights),
    plan: &Plan,
    mut tell: impl FnMut(&str),
) -> Result<Vec<Measurement>, LatencyError> {
    check(plan, graph)?;
    let groups = mainstay_backend_api::KvLayout::of(graph, plan.kv_dtype).groups.len();
    tell("loading");
    let mut bed = Bed::new(backend.load(graph, weights, &plan.limits(groups))?, graph, plan);
    tell("filling pages");
    bed.fill_pages()?;
    let cost = Cost::of(graph, weights, plan.kv_dtype);
    let cases = plan.cases();
    let mut found: Vec<Measurement> = cases.iter().map(|case| cost.measurement(*case, plan)).collect();
    // the first pass brings weights and pages into memory and is not counted
    bed.prefill(0, plan.prompt.min(plan.tokens_per_step))?;
    for repeat in 0..plan.repeats {
        for (case, result) in cases.iter().zip(&mut found) {
            tell(&format!(
                "run {} of {}: {:?}, depth {}, batch {}",
                repeat + 1,
                plan.repeats,
                case.phase,
                case.depth,
                case.batch
            ));
            let (before, start) = (noise::ticks(), Instant::now());
            let tokens = bed.run(*case)?;
            let seconds = start.elapsed().as_secs_f64();
            result.foreign.push(noise::foreign(before, noise::ticks()));
            result.tokens_per_s.push(tokens as f64 / seconds);
        }
    }
    Ok(found)
}

fn check(plan: &Plan, graph: &Graph) -> Result<(), LatencyError> {
    let positive = [plan.prompt, plan.gen_steps, plan.repeats, plan.tokens_per_step];
    if positive.contains(&0) || plan.batches.contains(&0) || plan.batches.is_empty() || plan.depths.is_empty()
    {
        let what = "prompt, gen, repeat, tokens per step, depths and batches: expected at least one each, found none";
        return Err(LatencyError::Plan(what.into()));
    }
    if plan.context() > graph.context {
        return Err(LatencyError::Plan(format!(
            "the deepest case has {} tokens; the model was made for {}",
            plan.context(),
            graph.context
        )));
    }
    Ok(())
}

/// An executor with pages of random keys and values, ready for any case.
struct Bed<'a> {
    executor: Box<dyn Executor>,
    plan: &'a Plan,
    vocab: u32,
    random: Random,
    out: StepOutput,
}

impl<'a> Bed<'a> {
    fn new(executor: Box<dyn Executor>, graph: &Graph, plan: &'a Plan) -> Self {
        let vocab = u32::try_from(graph.vocab).unwrap_or(u32::MAX).max(1);
        Self { executor, plan, vocab, random: Random(7), out: StepOutput::default() }
    }

    /// Writes every page, so that no case reads memory that was never touched.
    fn fill_pages(&mut self) -> Result<(), StepError> {
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
    fn run(&mut self, case: Case) -> Result<usize, StepError> {
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

    fn prefill(&mut self, depth: usize, tokens: usize) -> Result<(), StepError> {
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
        let own_pages = self.plan.context().div_ceil(PAGE_TOKENS);
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

/// What the model costs, from its graph.
struct Cost {
    /// Bytes of all matrices of products.
    weight_bytes: f64,
    /// Elements of the layers' matrices.
    layer_weights: f64,
    /// Elements of the vocabulary product, needed for output rows only.
    vocab_weights: f64,
    /// Bytes of keys and values of one token.
    kv_bytes: f64,
    /// Multiplications and additions of attention for one row and one token that it sees.
    attend_flops: f64,
}

impl Cost {
    fn of(graph: &Graph, weights: &Weights, kv_dtype: KvDType) -> Self {
        let mut cost = Self {
            weight_bytes: 0.0,
            layer_weights: 0.0,
            vocab_weights: 0.0,
            kv_bytes: 0.0,
            attend_flops: 0.0,
        };
        for layer in &graph.layers {
            for op in &graph.blocks[layer.block].ops {
                match op {
                    Op::Linear { weight, .. } => {
                        cost.layer_weights += (weight.rows() * weight.cols) as f64;
                        cost.weight_bytes += stored_bytes(weight, &layer.prefix, weights);
                    }
                    Op::Attend(a) => cost.attend_flops += (4 * a.heads * a.head_dim) as f64,
                    _ => {}
                }
            }
        }
        for op in &graph.epilogue.ops {
            if let Op::Linear { weight, .. } = op {
                cost.vocab_weights += (weight.rows() * weight.cols) as f64;
                cost.weight_bytes += stored_bytes(weight, "", weights);
            }
        }
        let elements: usize = graph.kv.iter().map(KvSpec::elements).sum();
        cost.kv_bytes = (elements * kv_dtype.size_bytes()) as f64;
        cost
    }

    /// An empty measurement of a case with what its tokens cost on average.
    fn measurement(&self, case: Case, plan: &Plan) -> Measurement {
        let (rows, steps, outputs) = match case.phase {
            Phase::Prefill => (plan.prompt, plan.prompt.div_ceil(plan.tokens_per_step), 1),
            Phase::Decode => (plan.gen_steps, plan.gen_steps, plan.gen_steps),
        };
        // a row sees everything before it and itself
        let seen = case.depth as f64 + (rows as f64 + 1.0) / 2.0;
        let (per_row, per_step) = (1.0 / rows as f64, steps as f64 / rows as f64);
        let weight_bytes = self.weight_bytes * per_step / case.batch as f64;
        let kv_rows = if case.phase == Phase::Decode { 1.0 } else { per_step };
        let vocab_flops = 2.0 * self.vocab_weights * outputs as f64 * per_row;
        Measurement {
            case,
            tokens_per_s: Vec::new(),
            foreign: Vec::new(),
            bytes_per_token: weight_bytes + self.kv_bytes * seen * kv_rows,
            flops_per_token: 2.0 * self.layer_weights + vocab_flops + self.attend_flops * seen,
        }
    }
}

fn stored_bytes(matrix: &mainstay_models::graph::Matrix, prefix: &str, weights: &Weights) -> f64 {
    let views = matrix.parts.iter().filter_map(|(name, _)| weights.tensor(&format!("{prefix}{name}")).ok());
    views.map(|view| view.stored_bytes() as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            prompt: 100,
            depths: vec![0, 50],
            batches: vec![1, 3],
            gen_steps: 10,
            repeats: 2,
            tokens_per_step: 40,
            kv_dtype: KvDType::BF16,
        }
    }

    #[test]
    fn cases_cover_the_plan() {
        let case = |phase, depth, batch| Case { phase, depth, batch };
        let expected = [
            case(Phase::Prefill, 0, 1),
            case(Phase::Prefill, 50, 1),
            case(Phase::Decode, 0, 1),
            case(Phase::Decode, 0, 3),
            case(Phase::Decode, 50, 1),
            case(Phase::Decode, 50, 3),
        ];
        assert_eq!(plan().cases(), expected);
        assert_eq!(plan().limits(2).pages, vec![3 * 5 + 1; 2]);
    }

    #[test]
    fn median_of_even_and_odd_runs() {
        let cost = Cost {
            weight_bytes: 0.0,
            layer_weights: 0.0,
            vocab_weights: 0.0,
            kv_bytes: 0.0,
            attend_flops: 0.0,
        };
        let mut found = cost.measurement(Case { phase: Phase::Decode, depth: 0, batch: 1 }, &plan());
        found.tokens_per_s = vec![9.0, 1.0, 5.0];
        assert_eq!(found.median(), 5.0);
        found.tokens_per_s.push(7.0);
        assert_eq!(found.median(), 6.0);
    }

    #[test]
    fn decode_reads_weights_once_a_step_and_pages_once_a_sequence() {
        let cost = Cost {
            weight_bytes: 600.0,
            layer_weights: 10.0,
            vocab_weights: 3.0,
            kv_bytes: 2.0,
            attend_flops: 4.0,
        };
        let decode = cost.measurement(Case { phase: Phase::Decode, depth: 50, batch: 3 }, &plan());
        assert_eq!(decode.bytes_per_token, 600.0 / 3.0 + 2.0 * 55.5);
        assert_eq!(decode.flops_per_token, 20.0 + 6.0 + 4.0 * 55.5);
        let prefill = cost.measurement(Case { phase: Phase::Prefill, depth: 0, batch: 1 }, &plan());
        // 3 steps for 100 tokens, one row of logits
        assert_eq!(prefill.flops_per_token, 20.0 + 0.06 + 4.0 * 50.5);
        assert!((prefill.bytes_per_token - (600.0 + 2.0 * 50.5) * 0.03).abs() < 1e-9);
    }

    #[test]
    fn shares_need_a_measured_peak() {
        let cost = Cost {
            weight_bytes: 10.0,
            layer_weights: 0.0,
            vocab_weights: 0.0,
            kv_bytes: 0.0,
            attend_flops: 0.0,
        };
        let mut found = cost.measurement(Case { phase: Phase::Decode, depth: 0, batch: 1 }, &plan());
        found.tokens_per_s = vec![4.0];
        let peaks = Peaks { read_bytes_per_s: Some(80.0), fma_flops_per_s: None };
        assert_eq!(found.bandwidth_share(&peaks), Some(0.5));
        assert_eq!(found.fma_share(&peaks), None);
    }
}
