//! A step: every thread walks the planned calls together, and each call's jobs go to whoever is free.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use mainstay_backend_api::kv::PAGE_TOKENS;
use mainstay_backend_api::sample::sample;
use mainstay_backend_api::{AdapterId, Limits, Step};
use mainstay_kernels_cpu::{
    After, Kernels, layer_norm, mean, normalize, rms_norm, rms_norm_add, rope, rope_angles,
};
use mainstay_models::graph::{Ids, Mask, PoolKind};

use crate::adapter::Adapters;
use crate::arena::{Arena, Slot};
use crate::executor::{RowResult, Scratch};
use crate::load::BlockWeights;
use crate::pages::Pages;
use crate::plan::{Call, Map, Plan, Program, pairing};
use crate::pool::{Job, Worker};
use crate::products::{Item, Packed, Rows, independent, lies_ready};
use crate::whole::{Kv, StepKv};

/// Consecutive tokens of a chunk whose attention is one job: they share loads of keys and values.
pub(crate) const TASK_TOKENS: usize = 16;

/// Rows that one job of a row-wise call has.
const ROWS: usize = 8;

/// Everything that the threads share during a step.
pub(crate) struct Core {
    pub(crate) kernels: Kernels,
    pub(crate) threads: usize,
    pub(crate) plan: Plan,
    pub(crate) prologue: BlockWeights,
    /// Block and weights of each layer.
    pub(crate) layers: Vec<(usize, BlockWeights)>,
    pub(crate) epilogue: BlockWeights,
    pub(crate) pooled: BlockWeights,
    /// Keys and values of layers that keep none, if there are such.
    pub(crate) step_kv: Option<StepKv>,
    pub(crate) arena: Arena,
    pub(crate) pages: Pages,
    pub(crate) work: Work,
    pub(crate) adapters: Adapters,
    pub(crate) scratch: Vec<Mutex<Scratch>>,
    pub(crate) rows: Vec<Mutex<RowResult>>,
}

/// A step's tokens, cut for the jobs.
pub(crate) struct Work {
    /// Position and chunk of each token.
    tokens: Vec<(usize, usize)>,
    /// Tokens of one chunk in one page.
    pub(crate) runs: Vec<Piece>,
    /// Tokens of one chunk whose attention is one job.
    pub(crate) tasks: Vec<Piece>,
    /// Rows that have an adapter, and which.
    pub(crate) adapted: Vec<(usize, AdapterId)>,
    /// The highest rank of these.
    pub(crate) rank: usize,
}

impl Work {
    /// Whether all tokens lie in one page and their attention is one job for a head.
    fn is_one_piece(&self) -> bool {
        self.runs.len() == 1 && self.tasks.len() == 1
    }
}

/// Consecutive tokens of one chunk.
pub(crate) struct Piece {
    pub(crate) chunk: usize,
    /// Rows of the step's values.
    pub(crate) rows: Range<usize>,
    /// Position of the first.
    pub(crate) position: usize,
}

impl Work {
    /// Room for the largest step.
    pub(crate) fn new(limits: &Limits) -> Self {
        let tokens = limits.tokens_per_step;
        Self {
            tokens: Vec::with_capacity(tokens),
            runs: Vec::with_capacity(tokens),
            tasks: Vec::with_capacity(tokens),
            adapted: Vec::with_capacity(tokens),
            rank: 0,
        }
    }

    /// Cuts a step.
    pub(crate) fn prepare(&mut self, step: &Step) {
        self.tokens.clear();
        self.runs.clear();
        self.tasks.clear();
        self.adapted.clear();
        for (chunk, c) in step.chunks.iter().enumerate() {
            assert_eq!(c.tokens.start, self.tokens.len(), "chunks lie end to end");
            let (first, len) = (c.tokens.start, c.tokens.len());
            self.tokens.extend((0..len).map(|i| (c.position + i, chunk)));
            self.adapted
                .extend(c.adapter.into_iter().flat_map(|id| (first..first + len).map(move |row| (row, id))));
            let mut start = 0;
            while start < len {
                let end = len.min(start + PAGE_TOKENS - (c.position + start) % PAGE_TOKENS);
                self.runs.push(Piece {
                    chunk,
                    rows: first + start..first + end,
                    position: c.position + start,
                });
                start = end;
            }
            for start in (0..len).step_by(TASK_TOKENS) {
                let end = len.min(start + TASK_TOKENS);
                self.tasks.push(Piece {
                    chunk,
                    rows: first + start..first + end,
                    position: c.position + start,
                });
            }
        }
        assert_eq!(self.tokens.len(), step.tokens.len(), "every token is in a chunk");
    }
}

/// One thread in one step.
pub(crate) struct Runner<'a> {
    pub(crate) core: &'a Core,
    pub(crate) worker: &'a Worker<'a>,
    pub(crate) step: &'a Step,
    pub(crate) scratch: &'a mut Scratch,
    /// Rows of the values of the current block.
    pub(crate) rows: usize,
    pub(crate) weights: &'a BlockWeights,
    pub(crate) layer: usize,
    /// What is packed, while products follow each other.
    pub(crate) in_packed: Option<Packed>,
    /// Whether the current block is a layer's.
    is_layer: bool,
}

impl Core {
    /// Cuts a step for the jobs.
    pub(crate) fn prepare(&mut self, step: &Step) {
        self.work.prepare(step);
        let ranks = self.work.adapted.iter().map(|(_, id)| self.adapters[id].rank());
        self.work.rank = ranks.max().unwrap_or(0);
    }

    /// This thread's share of a step.
    pub(crate) fn step(&self, worker: &Worker<'_>, step: &Step) {
        let mut scratch = self.scratch[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
        let rows = step.tokens.len();
        let scratch = &mut *scratch;
        let mut runner = Runner {
            core: self,
            worker,
            step,
            scratch,
            rows,
            weights: &self.prologue,
            layer: 0,
            in_packed: None,
            is_layer: false,
        };
        if rows == 0 {
            return;
        }
        runner.angles();
        runner.program(&self.plan.prologue);
        runner.is_layer = true;
        for (layer, (block, weights)) in self.layers.iter().enumerate() {
            runner.layer = layer;
            runner.weights = weights;
            runner.program(&self.plan.blocks[*block]);
        }
        runner.is_layer = false;
        if !step.pooled.is_empty() {
            runner.rows = step.pooled.len();
            runner.weights = &self.pooled;
            runner.program(&self.plan.pooled);
        }
        if !step.outputs.is_empty() {
            runner.rows = step.outputs.len();
            runner.weights = &self.epilogue;
            runner.program(&self.plan.epilogue);
            runner.sample();
        }
    }

    /// Where a layer's keys and values are.
    pub(crate) fn kv(&self, layer: usize, mask: Mask) -> Kv<'_> {
        match (mask, &self.step_kv) {
            (Mask::Full, Some(kv)) => Kv::Step(kv),
            _ => Kv::Pages(self.pages.layer(layer)),
        }
    }

    /// Appends the last step's pooled rows.
    pub(crate) fn read_pooled(&self, rows: usize, out: &mut Vec<f32>) {
        let pooled = self.arena.read(self.plan.pooled_rows, 0..rows);
        (0..rows).for_each(|row| out.extend_from_slice(pooled.row(row)));
    }

    /// Appends the logits of the last step's output rows.
    pub(crate) fn read_logits(&self, rows: usize, out: &mut Vec<f32>) {
        let logits = self.arena.read(self.plan.logits, 0..rows);
        (0..rows).for_each(|row| out.extend_from_slice(logits.row(row)));
    }
}

impl Runner<'_> {
    fn program(&mut self, program: &Program) {
        self.in_packed = None;
        let mut calls = &program.calls[..];
        while let Some(call) = calls.first() {
            if !matches!(call, Call::Linear { .. }) {
                self.in_packed = None;
            }
            calls = &calls[self.calls(program, calls)..];
        }
    }

    /// Runs the first of these calls, with those behind it that can share its phases, and says how many it ran.
    fn calls(&mut self, program: &Program, calls: &[Call<Slot>]) -> usize {
        let (call, rest) = (&calls[0], &calls[1..]);
        match call {
            Call::Linear { .. } => {
                let count = independent(calls);
                self.linears(program, &calls[..count], None);
                return count;
            }
            Call::Norm { out, .. } | Call::LayerNorm { out, .. } if self.take_packed(rest, *out) => {
                let count = independent(rest);
                self.linears(program, &rest[..count], Some(call));
                return 1 + count;
            }
            Call::Append { q, k, v, queries, out, shape } if self.core.work.is_one_piece() => {
                self.append_and_attend(program, (*q, *k, *v), (*queries, *out), *shape);
                return 2;
            }
            _ => {}
        }
        self.call(program, call);
        1
    }

    fn call(&mut self, program: &Program, call: &Call<Slot>) {
        match *call {
            Call::Embed { ids, weight, out } => self.embed(ids, weight, out),
            Call::Select { input, out } => self.select(input, out),
            Call::Pool { kind, input, out } => self.pool(kind, input, out),
            Call::Copy { input, out } => self.row_wise(input, out, |x, o| o.copy_from_slice(x)),
            Call::Linear { .. } => self.linears(program, std::slice::from_ref(call), None),
            Call::Norm { .. } | Call::LayerNorm { .. } => {
                self.in_rows(|run, rows, job| run.norm(program, call, rows, job));
            }
            Call::NormAdd { weight, eps, input, out } => {
                let width = self.vector_width(program, weight);
                let weight = &self.weights.vectors[weight][..width];
                self.row_wise(input, out, |x, o| rms_norm_add(x, weight, eps, o));
            }
            Call::Normalize { input, out } => self.row_wise(input, out, normalize),
            Call::Add { a, b, out } => self.add(a, b, out),
            Call::Map { f, out } => self.map(f, out),
            Call::Rope { rope, head_dim, out } => self.rope(rope, head_dim, out),
            Call::Gate { f, input, out } => self.in_rows(|run, rows, job| {
                let input = run.core.arena.read(input, rows.clone());
                run.core.kernels.gate(f, input, &mut run.core.arena.write(out, rows, job));
            }),
            Call::Append { q, k, v, queries, shape, .. } => self.append(program, (q, k, v), queries, shape),
            Call::Attend { queries, out, shape } => self.attend(queries, out, shape),
            Call::Route { shape, scores, out } => self.route(shape, scores, out),
            Call::ExpertUp { mixture, routes, input, out } => {
                self.expert_up(mixture, routes, input, out);
            }
            Call::ExpertDown { mixture, input, out } => self.expert_down(mixture, input, out),
            Call::ExpertSum { mixture, routes, input, out } => {
                self.expert_sum(mixture, routes, input, out);
            }
            Call::HeadProducts { weight, heads, input, input_step, out, out_step } => {
                self.head_products((weight, heads), (input, input_step), (out, out_step));
            }
            Call::AppendLatent { q, key, latent, queries, shape } => {
                self.append_latent(program, (q, key), (latent, queries), shape);
            }
            Call::AttendLatent { queries, out, shape } => self.attend_latent(queries, out, shape),
        }
    }

    /// Some rows of a norm that is not added to what is there.
    fn norm(&self, program: &Program, call: &Call<Slot>, rows: Range<usize>, job: &Job) {
        let vector = |index: usize| &self.weights.vectors[index][..self.vector_width(program, index)];
        let own = |input: Slot, out: Slot, f: &dyn Fn(&[f32], &mut [f32])| {
            let (input, mut out) =
                (self.core.arena.read(input, rows.clone()), self.core.arena.write(out, rows.clone(), job));
            (0..input.rows()).for_each(|r| f(input.row(r), out.row(r)));
        };
        match *call {
            Call::Norm { weight, eps, input, out } => {
                own(input, out, &|x, o| rms_norm(x, vector(weight), eps, o));
            }
            Call::LayerNorm { weight, bias, eps, input, out } => {
                own(input, out, &|x, o| layer_norm(x, (vector(weight), vector(bias)), eps, o));
            }
            _ => unreachable!("{call:?} is no norm"),
        }
    }

    /// Whether the products that these calls begin with take a value packed, all of them in the same form.
    fn take_packed(&self, calls: &[Call<Slot>], value: Slot) -> bool {
        let mut forms = calls[..independent(calls)].iter().map(|call| match *call {
            Call::Linear { weight, input, .. } if input == value => {
                Some(self.weights.matrices[weight].form())
            }
            _ => None,
        });
        let Some(Some(form)) = forms.next() else { return false };
        !lies_ready(form, self.rows) && forms.all(|other| other == Some(form))
    }

    /// Products that do not depend on each other, of rows that `norm` makes if it is given.
    fn linears(&mut self, program: &Program, calls: &[Call<Slot>], norm: Option<&Call<Slot>>) {
        let rows = Rows::Run { first: 0, count: self.rows };
        self.scratch.items.clear();
        let mut last = After::Store;
        for call in calls {
            let Call::Linear { weight, bias, input, after, out } = *call else {
                unreachable!("{call:?} is no product")
            };
            self.scratch.items.push(Item::new((weight, bias), (input, rows), (out, 0)));
            last = after;
        }
        self.products_of(last, |run, rows, job| {
            if let Some(norm) = norm {
                run.norm(program, norm, rows, job);
            }
        });
        if self.is_layer && !self.core.work.adapted.is_empty() {
            for call in calls {
                if let Call::Linear { weight, input, out, .. } = *call {
                    self.adapt(weight, input, out);
                }
            }
        }
    }

    pub(crate) fn vector_width(&self, program: &Program, index: usize) -> usize {
        program.vectors[index].vector.width()
    }

    /// One job for every few rows of the block.
    pub(crate) fn in_rows(&self, f: impl Fn(&Self, Range<usize>, &Job)) {
        let rows = self.rows;
        self.worker.each(rows.div_ceil(ROWS), |job| {
            let first = job.index() * ROWS;
            f(self, first..(first + ROWS).min(rows), &job);
        });
    }

    fn row_wise(&self, input: Slot, out: Slot, f: impl Fn(&[f32], &mut [f32])) {
        self.in_rows(|run, rows, job| {
            let input = run.core.arena.read(input, rows.clone());
            let mut out = run.core.arena.write(out, rows, job);
            (0..input.rows()).for_each(|r| f(input.row(r), out.row(r)));
        });
    }

    /// Sines and cosines of this step's positions.
    fn angles(&self) {
        let core = self.core;
        for (turn, &slot) in core.plan.ropes.iter().zip(&core.plan.angles) {
            self.in_rows(|run, rows, job| {
                let mut out = core.arena.write(slot, rows.clone(), job);
                for (r, row) in rows.enumerate() {
                    let (position, chunk) = core.work.tokens[row];
                    let table = &turn.tables[run.step.chunks[chunk].rope_table];
                    rope_angles(position, table, turn.scale, out.row(r));
                }
            });
        }
    }

    fn embed(&self, ids: Ids, weight: usize, out: Slot) {
        let table = &self.weights.matrices[weight];
        let id = |run: &Self, row: usize| {
            let (position, chunk) = run.core.work.tokens[row];
            match ids {
                Ids::Token => run.step.tokens[row] as usize,
                Ids::Position => position,
                Ids::Segment => run.step.chunks[chunk].segment(position),
            }
        };
        self.in_rows(|run, rows, job| {
            let mut out = run.core.arena.write(out, rows.clone(), job);
            rows.enumerate().for_each(|(r, row)| table.gather(id(run, row), out.row(r)));
        });
    }

    fn pool(&self, kind: PoolKind, input: Slot, out: Slot) {
        self.in_rows(|run, rows, job| {
            let mut out = run.core.arena.write(out, rows.clone(), job);
            for (r, pooled) in rows.enumerate() {
                let tokens = run.step.chunks[run.step.pooled[pooled]].tokens.clone();
                let own = run.core.arena.read(input, tokens.clone());
                match kind {
                    PoolKind::Mean => mean(own, out.row(r)),
                    PoolKind::First => out.row(r).copy_from_slice(own.row(0)),
                    PoolKind::Last => out.row(r).copy_from_slice(own.row(tokens.len() - 1)),
                }
            }
        });
    }

    fn select(&self, input: Slot, out: Slot) {
        let all = self.core.arena.read(input, 0..self.step.tokens.len());
        self.in_rows(|run, rows, job| {
            let mut out = run.core.arena.write(out, rows.clone(), job);
            rows.enumerate().for_each(|(r, row)| {
                out.row(r).copy_from_slice(all.row(run.step.outputs[row].row));
            });
        });
    }

    fn add(&self, a: Slot, b: Slot, out: Slot) {
        self.in_rows(|run, rows, job| {
            let (a, b) = (run.core.arena.read(a, rows.clone()), run.core.arena.read(b, rows.clone()));
            let mut out = run.core.arena.write(out, rows, job);
            for r in 0..a.rows() {
                let pairs = a.row(r).iter().zip(b.row(r));
                out.row(r).iter_mut().zip(pairs).for_each(|(o, (a, b))| *o = a + b);
            }
        });
    }

    fn map(&self, f: Map, out: Slot) {
        self.in_rows(|run, rows, job| {
            let mut out = run.core.arena.write(out, rows, job);
            for r in 0..out.rows() {
                match f {
                    Map::Scale(factor) => out.row(r).iter_mut().for_each(|x| *x *= factor),
                    Map::Softcap(cap) => run.core.kernels.softcap(cap, out.row(r)),
                    Map::Activate(f) => run.core.kernels.activate(f, out.row(r)),
                }
            }
        });
    }

    fn rope(&self, index: usize, head_dim: usize, out: Slot) {
        let plan = &self.core.plan;
        let (layout, first) = (pairing(plan.ropes[index].layout), plan.ropes[index].first);
        self.in_rows(|run, rows, job| {
            let angles = run.core.arena.read(plan.angles[index], rows.clone());
            let mut out = run.core.arena.write(out, rows, job);
            for r in 0..angles.rows() {
                let heads = out.row(r).chunks_exact_mut(head_dim);
                heads.for_each(|head| rope(&mut head[first..], angles.row(r), layout));
            }
        });
    }

    fn sample(&mut self) {
        let core = self.core;
        let sampling = &mut self.scratch.sampling;
        self.worker.each(self.rows, |job| {
            let row = job.index();
            let logits = core.arena.read(core.plan.logits, row..row + 1);
            let mut result = core.rows[row].lock().unwrap_or_else(PoisonError::into_inner);
            let RowResult { drawn, top } = &mut *result;
            *drawn = Some(sample(logits.row(0), &self.step.outputs[row], self.step, sampling, top));
        });
    }
}
