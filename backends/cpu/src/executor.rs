//! The executor: what one loaded model holds, and its side of the seam.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use mainstay_backend_api::kv::{CopyDone, KvLayout, PageRead, PageRef, StoredPage, Ticket};
use mainstay_backend_api::sample::{Drawn, SampleScratch};
use mainstay_backend_api::{
    AdapterId, Executor, Invariance, Limits, NumericClass, Step, StepError, StepOutput,
};
use mainstay_kernels_cpu::attend::Attention;
use mainstay_kernels_cpu::latent::LatentAttention;
use mainstay_kernels_cpu::route::route_scratch_len;
use mainstay_kernels_cpu::scratch_len;
use mainstay_models::graph::Graph;
use mainstay_models::{AdapterWeights, LoadError, Weights};

use crate::CpuBackend;
use crate::adapter::{self, Adapter, Adapters};
use crate::arena::Arena;
use crate::experts::Grouping;
use crate::latent::LATENT_ROWS;
use crate::load::{self, ModelWeights};
use crate::pages::Pages;
use crate::plan::Plan;
use crate::pool::Pool;
use crate::products::{Item, PART_ROWS_MAX};
use crate::run::{Core, TASK_TOKENS, Work};
use crate::whole::StepKv;

/// The arithmetic that all instruction sets share: chains of fused multiply-adds over sixteen-row panels. It changes
/// when any kernel's sequence of roundings does.
const NUMERIC_PATH: &str = "cpu/fma16";

/// A loaded model.
pub(crate) struct CpuExecutor {
    core: Core,
    pool: Pool,
    layout: KvLayout,
    /// Block and prefix of every layer.
    places: Vec<(usize, String)>,
    limits: Limits,
    /// Steps computed and not yet fetched, oldest first.
    finished: VecDeque<Result<StepOutput, StepError>>,
    /// Vectors to reuse.
    spare: Vec<StepOutput>,
    copies: Vec<CopyDone>,
}

/// What one thread needs for itself.
pub(crate) struct Scratch {
    pub(crate) floats: Vec<f32>,
    pub(crate) attention: Attention,
    pub(crate) latent: LatentAttention,
    /// The products of the current phase.
    pub(crate) items: Vec<Item>,
    pub(crate) grouping: Grouping,
    pub(crate) sampling: SampleScratch,
}

/// What became of one output row.
pub(crate) struct RowResult {
    pub(crate) drawn: Option<Result<Drawn, StepError>>,
    pub(crate) top: Vec<(u32, f32)>,
}

impl CpuExecutor {
    pub(crate) fn new(
        backend: &CpuBackend,
        (graph, weights): (&Graph, &Weights),
        limits: &Limits,
    ) -> Result<Self, LoadError> {
        let (kernels, threads) = (backend.kernels, backend.threads);
        let plan = Plan::new(graph, limits, backend.fusing)?;
        let layout = KvLayout::of(graph, limits.kv_dtype);
        let pages = Pages::new(&layout, limits)?;
        let arena = Arena::new(plan.arena_len).ok_or_else(|| LoadError::Resources {
            what: format!(
                "no memory for {} floats of activations of {} tokens a step and {} output rows",
                plan.arena_len, limits.tokens_per_step, limits.output_rows
            ),
        })?;
        let ModelWeights { prologue, layers, epilogue, pooled } = load::load(graph, &plan, weights, threads)?;
        let floats = scratch_len(PART_ROWS_MAX, kernels.tile_rows()).max(plan.head_dim);
        let floats = floats.max(plan.latent.1).max(route_scratch_len(plan.experts));
        let scratch = |_| {
            Mutex::new(Scratch {
                floats: vec![0.0; floats],
                attention: Attention::new(TASK_TOKENS * plan.group, plan.head_dim),
                latent: LatentAttention::new(LATENT_ROWS, plan.latent.0, plan.latent.1),
                items: Vec::with_capacity(plan.products),
                grouping: Grouping::new(plan.experts, limits.tokens_per_step * plan.top_k),
                sampling: SampleScratch::new(graph.vocab),
            })
        };
        let step_kv = (plan.whole_heads > 0)
            .then(|| StepKv::new(limits, plan.whole_heads, plan.head_dim))
            .transpose()?;
        let layers = graph.layers.iter().map(|l| l.block).zip(layers).collect();
        let core = Core {
            kernels,
            threads,
            scratch: (0..threads).map(scratch).collect(),
            rows: (0..limits.output_rows)
                .map(|_| Mutex::new(RowResult { drawn: None, top: Vec::new() }))
                .collect(),
            plan,
            prologue,
            layers,
            epilogue,
            pooled,
            step_kv,
            arena,
            pages,
            work: Work::new(limits),
            adapters: Adapters::new(),
        };
        let pool = Pool::new(threads).map_err(|e| LoadError::Resources {
            what: format!("{threads} threads could not be started: {e}"),
        })?;
        Ok(Self {
            core,
            pool,
            layout,
            places: adapter::layers(graph),
            limits: limits.clone(),
            finished: VecDeque::with_capacity(4),
            spare: Vec::with_capacity(4),
            copies: Vec::new(),
        })
    }

    fn check(&self, step: &Step) {
        let l = &self.limits;
        let (tokens, chunks, rows) = (step.tokens.len(), step.chunks.len(), step.outputs.len());
        assert!(tokens <= l.tokens_per_step, "{tokens} tokens in a step, limit {}", l.tokens_per_step);
        assert!(chunks <= l.chunks, "{chunks} chunks in a step, limit {}", l.chunks);
        assert!(rows <= l.output_rows, "{rows} output rows in a step, limit {}", l.output_rows);
        assert!(step.pooled.iter().all(|&i| i < chunks), "pooled chunks {:?} of {chunks}", step.pooled);
        for chunk in &step.chunks {
            let is_here = chunk.adapter.is_none_or(|id| self.core.adapters.contains_key(&id));
            assert!(is_here, "a chunk names {:?}, which is not here", chunk.adapter);
            let end = chunk.position + chunk.tokens.len();
            assert!(end <= l.context, "a chunk ends at {end}, the context is {}", l.context);
            assert!(chunk.tokens.end <= tokens, "chunk tokens {:?} of {tokens}", chunk.tokens);
        }
    }

    /// Gathers the rows' results.
    fn collect(&mut self, step: &Step) -> Result<StepOutput, StepError> {
        let mut out = self.spare.pop().unwrap_or_default();
        out.reset(step.outputs.len());
        for (i, row) in self.core.rows[..step.outputs.len()].iter_mut().enumerate() {
            let row = row.get_mut().unwrap_or_else(PoisonError::into_inner);
            match row.drawn.take() {
                Some(Ok(drawn)) => {
                    out.tokens[i] = drawn.token;
                    out.logprobs[i] = drawn.logprob;
                    std::mem::swap(&mut out.top_logprobs[i], &mut row.top);
                }
                Some(Err(error)) => return Err(error),
                None => unreachable!("row {i} was not computed"),
            }
        }
        self.core.read_pooled(step.pooled.len(), &mut out.pooled);
        if step.return_logits {
            self.core.read_logits(step.outputs.len(), &mut out.logits);
        }
        Ok(out)
    }
}

impl Executor for CpuExecutor {
    fn kv_layout(&self) -> &KvLayout {
        &self.layout
    }

    fn numeric_class(&self) -> NumericClass {
        NumericClass {
            path: NUMERIC_PATH.into(),
            sources: env!("MAINSTAY_SOURCES"),
            invariance: Invariance::Full,
        }
    }

    fn submit(&mut self, step: &Step) -> Result<(), StepError> {
        self.check(step);
        for &(from, to) in &step.copies {
            self.core.pages.copy(from, to);
        }
        self.core.pages.prepare(step);
        self.core.prepare(step);
        if let Some(kv) = &mut self.core.step_kv {
            kv.prepare(step);
        }
        let core = &self.core;
        self.pool.run(&|worker| core.step(worker, step));
        let result = self.collect(step);
        self.finished.push_back(result);
        Ok(())
    }

    fn finish(&mut self, out: &mut StepOutput) -> Result<(), StepError> {
        let done = self.finished.pop_front();
        let mut result = done.unwrap_or_else(|| panic!("finish without a submitted step"))?;
        std::mem::swap(out, &mut result);
        self.spare.push(result);
        Ok(())
    }

    fn start_read(&mut self, pages: &[PageRead], ticket: Ticket) {
        let bytes = pages.iter().map(|read| self.core.pages.read(read.page)).collect();
        self.copies.push(CopyDone::read(&self.layout, pages, bytes, ticket));
    }

    fn start_write(&mut self, pages: Vec<(PageRef, StoredPage)>, ticket: Ticket) {
        let (stored, pool) = (&mut self.core.pages, &mut self.pool);
        let mut pages = pages.iter();
        let result = pages.try_for_each(|(page, bytes)| stored.write(pool, *page, (**bytes).as_ref()));
        self.copies.push(CopyDone::written(ticket, result));
    }

    fn poll(&mut self, done: &mut Vec<CopyDone>) {
        done.append(&mut self.copies);
    }

    fn set_adapter(&mut self, id: AdapterId, weights: Option<&AdapterWeights>) -> Result<(), LoadError> {
        if self.core.plan.low.rows == 0 {
            let what = "adapters of a model that was loaded without room for them".to_owned();
            return Err(LoadError::Unsupported { backend: "cpu", what });
        }
        match weights {
            Some(weights) => {
                let adapter = Adapter::new(&self.places, &self.core.plan, weights);
                self.core.adapters.insert(id, adapter)
            }
            None => self.core.adapters.remove(&id),
        };
        Ok(())
    }
}
