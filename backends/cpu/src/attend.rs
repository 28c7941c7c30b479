//! Attention of heads: keys and values go into the pages, then each job is some tokens' attention to one head of them.

use std::ops::Range;

use mainstay_backend_api::kv::PAGE_TOKENS;
use mainstay_backend_api::{Step, oldest_page};
use mainstay_kernels_cpu::attend::{AttendShape, Attention, Queries, Sight};
use mainstay_kernels_cpu::kv::BlockShape;
use mainstay_kernels_cpu::{rms_norm_in_place, rope};
use mainstay_models::graph::Mask;

use crate::arena::Slot;
use crate::plan::{HeadPath, Heads, Program, pairing};
use crate::pool::Job;
use crate::run::{Piece, Runner};

impl Runner<'_> {
    /// Norm and rotation, on one head of one token, or on what is left of it behind its first `skipped` elements.
    pub(crate) fn turn(
        &self,
        program: &Program,
        path: &HeadPath<Slot>,
        row: usize,
        (head, skipped): (&mut [f32], usize),
    ) {
        if let Some((weight, eps)) = path.norm {
            let width = self.vector_width(program, weight);
            rms_norm_in_place(head, &self.weights.vectors[weight][..width], eps);
        }
        if let Some(index) = path.rope {
            let plan = &self.core.plan;
            let angles = self.core.arena.read(plan.angles[index], row..row + 1);
            let turn = &plan.ropes[index];
            rope(&mut head[turn.first - skipped..], angles.row(0), pairing(turn.layout));
        }
    }

    /// Keys and values into the pages, norm and rotation of queries into `queries`.
    pub(crate) fn append(
        &mut self,
        program: &Program,
        inputs: (HeadPath<Slot>, HeadPath<Slot>, Slot),
        queries: Slot,
        shape: Heads,
    ) {
        let mut floats = std::mem::take(&mut self.scratch.floats);
        let (runs, heads) = (&self.core.work.runs, shape.kv_heads);
        self.worker.each(runs.len() * heads, |job| {
            let (run, head) = (&runs[job.index() / heads], job.index() % heads);
            self.append_run(program, inputs, (queries, shape), (run, head, &job), &mut floats);
        });
        self.scratch.floats = floats;
    }

    /// Attention of the queries to what lies in the pages.
    pub(crate) fn attend(&mut self, queries: Slot, out: Slot, shape: Heads) {
        let mut attention = std::mem::take(&mut self.scratch.attention);
        let (tasks, heads) = (&self.core.work.tasks, shape.kv_heads);
        self.worker.each(tasks.len() * heads, |job| {
            // The last tokens of a prompt see most and come first, so that no thread is left with a long job.
            let (task, head) = (&tasks[tasks.len() - 1 - job.index() / heads], job.index() % heads);
            self.attend_task((queries, out, shape), (task, head, &job), &mut attention);
        });
        self.scratch.attention = attention;
    }

    /// Both, in a step whose tokens are one run and one task: what a head's attention reads is what its own job wrote, and
    /// pages that nobody writes.
    pub(crate) fn append_and_attend(
        &mut self,
        program: &Program,
        inputs: (HeadPath<Slot>, HeadPath<Slot>, Slot),
        (queries, out): (Slot, Slot),
        shape: Heads,
    ) {
        let mut floats = std::mem::take(&mut self.scratch.floats);
        let mut attention = std::mem::take(&mut self.scratch.attention);
        let (run, task) = (&self.core.work.runs[0], &self.core.work.tasks[0]);
        self.worker.each(shape.kv_heads, |job| {
            let head = job.index();
            self.append_run(program, inputs, (queries, shape), (run, head, &job), &mut floats);
            self.attend_task((queries, out, shape), (task, head, &job), &mut attention);
        });
        (self.scratch.floats, self.scratch.attention) = (floats, attention);
    }

    fn append_run(
        &self,
        program: &Program,
        (q, k, v): (HeadPath<Slot>, HeadPath<Slot>, Slot),
        (queries, shape): (Slot, Heads),
        (run, head, job): (&Piece, usize, &Job),
        floats: &mut [f32],
    ) {
        let core = self.core;
        let Heads { kv_heads, head_dim: dim, .. } = shape;
        let group = shape.heads / kv_heads;
        let kv = core.kv(self.layer, shape.mask);
        let row_of_head = &mut floats[..dim];
        let [keys, values] = BlockShape::Heads { head_dim: dim }.parts();
        let block = kv.block(self.step, (run.chunk, run.position / PAGE_TOKENS), head);
        let mut block = kv.blocks().write(block, job);
        let own = queries.columns(head * group * dim..(head + 1) * group * dim);
        let mut turned = core.arena.write(own, run.rows.clone(), job);
        for (i, row) in run.rows.clone().enumerate() {
            let token = run.position % PAGE_TOKENS + i;
            let read = |slot: Slot| core.arena.read(slot, row..row + 1).row(0);
            row_of_head.copy_from_slice(&read(k.input)[head * dim..][..dim]);
            self.turn(program, &k, row, (row_of_head, 0));
            block.store_row(keys, token, row_of_head);
            block.store_row(values, token, &read(v)[head * dim..][..dim]);
            let source = &read(q.input)[head * group * dim..][..group * dim];
            turned.row(i).copy_from_slice(source);
            let queries = turned.row(i).chunks_exact_mut(dim);
            queries.for_each(|query| self.turn(program, &q, row, (query, 0)));
        }
    }

    fn attend_task(
        &self,
        (queries, out, shape): (Slot, Slot, Heads),
        (task, head, job): (&Piece, usize, &Job),
        attention: &mut Attention,
    ) {
        let core = self.core;
        let Heads { kv_heads, head_dim: dim, .. } = shape;
        let group = shape.heads / kv_heads;
        let kv = core.kv(self.layer, shape.mask);
        let sinks = shape.sinks.map(|sinks| &self.weights.vectors[sinks][..shape.heads]);
        let (sight, seen) = sight(shape.mask, task, self.step);
        let one = AttendShape { group, head_dim: dim, scale: shape.scale, sight, softcap: shape.softcap };
        let columns = head * group * dim..(head + 1) * group * dim;
        let queries = Queries {
            rows: core.arena.read(queries.columns(columns.clone()), task.rows.clone()),
            position: task.position,
            sinks: sinks.map(|sinks| &sinks[head * group..][..group]),
        };
        core.kernels.attend_start(attention, one, queries);
        let block = |run| kv.blocks().read(kv.block(self.step, (task.chunk, run), head));
        for run in seen.clone() {
            let next = (run + 1 < seen.end).then(|| block(run + 1));
            core.kernels.attend_block(attention, block(run), run * PAGE_TOKENS, next);
        }
        let mut out = core.arena.write(out.columns(columns), task.rows.clone(), job);
        core.kernels.attend_finish(attention, &mut out);
    }
}

/// What the rows of a task see, and the runs of 32 tokens that hold it.
fn sight(mask: Mask, task: &Piece, step: &Step) -> (Sight, Range<usize>) {
    match mask {
        Mask::Causal { window } => {
            let oldest = oldest_page(window, task.position);
            let newest = (task.position + task.rows.len() - 1) / PAGE_TOKENS;
            (Sight::Window(window.unwrap_or(usize::MAX)), oldest..newest + 1)
        }
        Mask::Full => {
            let len = step.chunks[task.chunk].tokens.len();
            (Sight::Whole(len), 0..len.div_ceil(PAGE_TOKENS))
        }
    }
}
