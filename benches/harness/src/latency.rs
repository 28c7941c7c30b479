//! Prefill and decode speed of one executor, step by step, with nothing above it.

mod bed;
mod case;
mod cost;

use std::time::Instant;

use mainstay_backend_api::{Backend, KvDType, KvLayout, Limits, PAGE_TOKENS, StepError};
use mainstay_models::graph::Graph;
use mainstay_models::{LoadError, Weights};

pub use case::{Case, Phase, UnknownCase};

use crate::energy::Energy;
use crate::noise;
use bed::Bed;
use cost::Cost;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Tokens of the prompt whose prefill is measured.
    pub prompt: usize,
    /// What is measured, in this order.
    pub cases: Vec<Case>,
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

/// What a case gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// The case.
    pub case: Case,
    /// Tokens per second of each run.
    pub tokens_per_s: Vec<f64>,
    /// Part of the processors' time that other programs took, of each run.
    pub foreign: Vec<Option<f64>>,
    /// Energy of the processors for each token, joules, of each run.
    pub joules_per_token: Vec<Option<f64>>,
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

    /// Joules for each token over all runs; `None` where the machine does not tell.
    pub fn joules(&self) -> Option<f64> {
        let told: Vec<f64> = self.joules_per_token.iter().flatten().copied().collect();
        (!told.is_empty()).then(|| told.iter().sum::<f64>() / told.len() as f64)
    }

    /// What a million tokens cost at the median speed, in the currency of the price of an hour.
    pub fn cost_per_million(&self, price_per_hour: f64) -> f64 {
        price_per_hour / 3600.0 * 1e6 / self.median()
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
    /// Tokens of each sequence at the end of a case.
    fn tokens(&self, case: Case) -> usize {
        case.depth + if case.phase == Phase::Prefill { self.prompt } else { self.gen_steps + 1 }
    }

    /// Pages of each sequence of a case.
    fn pages_each(&self, case: Case) -> usize {
        self.tokens(case).div_ceil(PAGE_TOKENS)
    }

    /// Tokens of the longest sequence, at least those that warm up.
    fn context(&self) -> usize {
        self.cases.iter().map(|&case| self.tokens(case)).max().unwrap_or(0).max(self.warm_tokens())
    }

    /// Tokens of the pass that is not counted.
    fn warm_tokens(&self) -> usize {
        self.prompt.min(self.tokens_per_step)
    }

    fn limits(&self, groups: usize) -> Limits {
        let chunks = self.cases.iter().map(|case| case.batch).max().unwrap_or(1);
        let pages = self.cases.iter().map(|&case| case.batch * self.pages_each(case)).max().unwrap_or(0);
        let pages = pages.max(self.warm_tokens().div_ceil(PAGE_TOKENS)) + 1;
        Limits {
            context: self.context(),
            tokens_per_step: self.tokens_per_step.max(chunks),
            chunks,
            output_rows: chunks,
            pages: vec![pages; groups],
            kv_dtype: self.kv_dtype,
        }
    }

    fn check(&self, graph: &Graph) -> Result<(), LatencyError> {
        let positive = [self.prompt, self.gen_steps, self.repeats, self.tokens_per_step, self.cases.len()];
        if positive.contains(&0) || self.cases.iter().any(|case| case.batch == 0) {
            let what = "prompt, gen, repeat, tokens per step, depths and batches: expected at least one each, found none";
            return Err(LatencyError::Plan(what.into()));
        }
        if self.context() > graph.context {
            return Err(LatencyError::Plan(format!(
                "the deepest case has {} tokens; the model was made for {}",
                self.context(),
                graph.context
            )));
        }
        Ok(())
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

/// A loaded model with full pages, on which the cases of a plan are measured in any order.
pub struct Bench<'a> {
    bed: Bed<'a>,
    cost: Cost,
    plan: &'a Plan,
}

impl<'a> Bench<'a> {
    /// Loads the model; `tell` hears what is going on.
    ///
    /// # Errors
    /// [`LatencyError`].
    pub fn new(
        backend: &dyn Backend,
        (graph, weights): (&Graph, &Weights),
        plan: &'a Plan,
        mut tell: impl FnMut(&str),
    ) -> Result<Self, LatencyError> {
        plan.check(graph)?;
        let groups = KvLayout::of(graph, plan.kv_dtype).groups.len();
        tell("loading");
        let mut bed = Bed::new(backend.load(graph, weights, &plan.limits(groups))?, graph, plan);
        tell("filling pages");
        bed.fill_pages()?;
        // the first pass brings weights and pages into memory and is not counted
        bed.prefill(0, plan.warm_tokens())?;
        Ok(Self { bed, cost: Cost::of(graph, weights, plan.kv_dtype), plan })
    }

    /// A measurement of a case that has not run yet.
    pub fn empty(&self, case: Case) -> Measurement {
        self.cost.measurement(case, self.plan)
    }

    /// Runs the case of a measurement once more.
    ///
    /// # Errors
    /// [`LatencyError`] where the plan has no such case, or a step fails.
    pub fn measure(&mut self, into: &mut Measurement) -> Result<(), LatencyError> {
        if !self.plan.cases.contains(&into.case) {
            return Err(LatencyError::Plan(format!("{}: expected a case of the plan", into.case)));
        }
        let (energy, before, start) = (Energy::now(), noise::ticks(), Instant::now());
        let tokens = self.bed.run(into.case)?;
        let seconds = start.elapsed().as_secs_f64();
        let joules = energy.and_then(|energy| energy.joules());
        into.joules_per_token.push(joules.map(|joules| joules / tokens as f64));
        into.foreign.push(noise::foreign(before, noise::ticks()));
        into.tokens_per_s.push(tokens as f64 / seconds);
        Ok(())
    }
}

/// Loads the model and measures every case of the plan; `tell` hears what is going on.
///
/// # Errors
/// [`LatencyError`].
pub fn latency(
    backend: &dyn Backend,
    model: (&Graph, &Weights),
    plan: &Plan,
    mut tell: impl FnMut(&str),
) -> Result<Vec<Measurement>, LatencyError> {
    let mut bench = Bench::new(backend, model, plan, &mut tell)?;
    let mut found: Vec<Measurement> = plan.cases.iter().map(|&case| bench.empty(case)).collect();
    for repeat in 1..=plan.repeats {
        for result in &mut found {
            tell(&format!("run {repeat} of {}: {}", plan.repeats, result.case));
            bench.measure(result)?;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(bytes_per_token: f64) -> Measurement {
        Measurement {
            case: Case { phase: Phase::Decode, depth: 0, batch: 1 },
            tokens_per_s: Vec::new(),
            foreign: Vec::new(),
            joules_per_token: Vec::new(),
            bytes_per_token,
            flops_per_token: 0.0,
        }
    }

    #[test]
    fn pages_are_those_of_the_largest_case_and_not_of_depth_times_batch() {
        let cases = ["prefill@0", "decode@300x1", "decode@0x8"].map(|name| name.parse().unwrap()).to_vec();
        let mut plan = Plan {
            prompt: 100,
            cases,
            gen_steps: 10,
            repeats: 2,
            tokens_per_step: 40,
            kv_dtype: KvDType::BF16,
        };
        // 311 tokens lie in 10 pages, 8 sequences of 11 tokens in 8
        assert_eq!((plan.context(), plan.limits(2).pages), (311, vec![11; 2]));
        plan.cases.push("decode@50x3".parse().unwrap());
        assert_eq!((plan.limits(1).pages, plan.limits(1).chunks), (vec![11], 8));
        plan.cases.push("decode@50x6".parse().unwrap());
        assert_eq!(plan.limits(1).pages, [13]);
    }

    #[test]
    fn median_of_even_and_odd_runs() {
        let mut found = measured(1.0);
        found.tokens_per_s = vec![9.0, 1.0, 5.0];
        assert_eq!(found.median(), 5.0);
        found.tokens_per_s.push(7.0);
        assert_eq!(found.median(), 6.0);
    }

    #[test]
    fn shares_need_a_measured_peak() {
        let mut found = measured(10.0);
        found.tokens_per_s = vec![4.0];
        let peaks = Peaks { read_bytes_per_s: Some(80.0), fma_flops_per_s: None };
        assert_eq!(found.bandwidth_share(&peaks), Some(0.5));
        assert_eq!(found.fma_share(&peaks), None);
        assert_eq!(found.joules(), None);
        found.joules_per_token = vec![None, Some(1.0), Some(2.0)];
        assert_eq!(found.joules(), Some(1.5));
        // 1000 s at 0.01 a second
        assert!((found.cost_per_million(36.0) - 2500.0).abs() < 1e-6);
    }
}
