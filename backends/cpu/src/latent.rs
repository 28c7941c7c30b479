//! Attention to latent rows: how it is planned, and how a step's rows attend.
//!
//! Keys and values are never made. The part of a query that meets a made key is multiplied by the matrix that would make
//! it, and what comes out of the attention by the matrix that would make the value. So a step reads only what is kept, and
//! one token among many is computed as it would be alone.

use mainstay_backend_api::kv::PAGE_TOKENS;
use mainstay_kernels_cpu::attend::Queries;
use mainstay_kernels_cpu::kv::BlockShape;
use mainstay_kernels_cpu::latent::LatentShape;
use mainstay_kernels_cpu::{After, LANES};
use mainstay_models::LoadError;
use mainstay_models::graph::{AttendLatent, Mask, Value};

use crate::arena::Slot;
use crate::plan::{Call, Fuse, HeadPath, Program, RowOrder};
use crate::products::{Item, Rows};
use crate::run::{Runner, TASK_TOKENS};

/// Heads of one job: as many as a vector has lanes.
const JOB_HEADS: usize = LANES;

/// Tokens of one job: their queries and sums stay in the second cache.
const JOB_TOKENS: usize = 4;

/// Rows that attend together at most.
pub(crate) const LATENT_ROWS: usize = JOB_HEADS * JOB_TOKENS;

/// Sizes of one attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LatentHeads {
    pub(crate) heads: usize,
    /// Widths of what is kept.
    pub(crate) latent: usize,
    pub(crate) key: usize,
    /// Elements of a query before the part that meets the kept key.
    plain: usize,
    scale: f32,
}

impl LatentHeads {
    /// Columns of a head's query on its way to the latent rows.
    fn query(&self) -> usize {
        self.latent + self.key
    }
}

impl Fuse<'_> {
    /// The last call of an attention to latent rows.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] where the heads' products do not fill whole panels.
    pub(crate) fn attend_latent(&mut self, v: Value, a: &AttendLatent) -> Result<Call<Value>, LoadError> {
        let (latent, heads) = (a.latent_dim(), a.heads);
        let of_query = latent + a.key_dim;
        if !latent.is_multiple_of(LANES) || !a.value_dim.is_multiple_of(LANES) {
            let what =
                format!("latent rows of {latent} and values of {} (no multiples of {LANES})", a.value_dim);
            return Err(LoadError::Unsupported { backend: "cpu", what });
        }
        let shape = LatentHeads { heads, latent, key: a.key_dim, plain: a.plain_dim, scale: a.scale };
        let (q, key) = (self.head(a.q), self.head(a.key));
        let draft = &mut self.draft;
        let rows_of = |head: usize| head * (a.plain_dim + a.value_dim);
        let (fold, unfold) = (draft.matrices.len(), draft.matrices.len() + heads);
        for head in 0..heads {
            draft.matrix(&a.expand, RowOrder::Columns { first: rows_of(head), count: a.plain_dim });
        }
        for head in 0..heads {
            let order = RowOrder::Some { first: rows_of(head) + a.plain_dim, count: a.value_dim };
            draft.matrix(&a.expand, order);
        }
        draft.packed_width = draft.packed_width.max(heads * latent.max(a.plain_dim));
        let queries = draft.extra(heads * of_query);
        let mixed = draft.extra(heads * latent);
        draft.calls.extend([
            Call::HeadProducts {
                weight: fold,
                heads,
                input: q.input,
                input_step: a.plain_dim + a.key_dim,
                out: queries,
                out_step: of_query,
            },
            Call::AppendLatent { q, key, latent: a.latent, queries, shape },
            Call::AttendLatent { queries, out: mixed, shape },
        ]);
        let (input, out) = (mixed, v);
        Ok(Call::HeadProducts {
            weight: unfold,
            heads,
            input,
            input_step: latent,
            out,
            out_step: a.value_dim,
        })
    }
}

impl Runner<'_> {
    /// Each head's columns times its own matrix.
    pub(crate) fn head_products(
        &mut self,
        (weight, heads): (usize, usize),
        (input, input_step): (Slot, usize),
        (out, out_step): (Slot, usize),
    ) {
        self.scratch.items.clear();
        let all = Rows::Run { first: 0, count: self.rows };
        for head in 0..heads {
            let matrix = &self.weights.matrices[weight + head];
            let [input, out] = [(input, input_step, matrix.cols()), (out, out_step, matrix.rows())]
                .map(|(slot, step, width)| slot.columns(head * step..head * step + width));
            self.scratch.items.push(Item::new((weight + head, None), (input, all), (out, 0)));
        }
        self.products(After::Store);
    }

    pub(crate) fn append_latent(
        &mut self,
        program: &Program,
        (q, key): (HeadPath<Slot>, HeadPath<Slot>),
        (latent, queries): (Slot, Slot),
        shape: LatentHeads,
    ) {
        let core = self.core;
        let kv = core.kv(self.layer, Mask::Causal { window: None });
        let [latents, keys] = BlockShape::Latent { latent: shape.latent, key: shape.key }.parts();
        let (query, own) = (shape.plain + shape.key, shape.query());
        let mut floats = std::mem::take(&mut self.scratch.floats);
        let turned = &mut floats[..shape.key];
        self.worker.each(core.work.runs.len(), |job| {
            let run = &core.work.runs[job.index()];
            let block = kv.block(self.step, (run.chunk, run.position / PAGE_TOKENS), 0);
            let mut block = kv.blocks().write(block, &job);
            for (i, row) in run.rows.clone().enumerate() {
                let token = run.position % PAGE_TOKENS + i;
                let read = |slot: Slot| core.arena.read(slot, row..row + 1).row(0);
                block.store_row(latents, token, read(latent));
                turned.copy_from_slice(read(key.input));
                self.turn(program, &key, row, (turned, 0));
                block.store_row(keys, token, turned);
                for head in 0..shape.heads {
                    let columns = head * own + shape.latent..(head + 1) * own;
                    let mut place = core.arena.write(queries.columns(columns), row..row + 1, &job);
                    place.row(0).copy_from_slice(&read(q.input)[head * query + shape.plain..][..shape.key]);
                    self.turn(program, &q, row, (place.row(0), shape.plain));
                }
            }
        });
        self.scratch.floats = floats;
    }

    pub(crate) fn attend_latent(&mut self, queries: Slot, out: Slot, shape: LatentHeads) {
        let core = self.core;
        let kv = core.kv(self.layer, Mask::Causal { window: None });
        let (tasks, state) = (&core.work.tasks, &mut self.scratch.latent);
        let (groups, pieces) = (shape.heads.div_ceil(JOB_HEADS), TASK_TOKENS.div_ceil(JOB_TOKENS));
        self.worker.each(tasks.len() * groups * pieces, |job| {
            // The last tokens of a prompt see most and come first, so that no thread is left with a long job.
            let (index, group) = (tasks.len() * pieces - 1 - job.index() / groups, job.index() % groups);
            let (task, first) = (&tasks[index / pieces], index % pieces * JOB_TOKENS);
            let rows = task.rows.start + first..task.rows.end.min(task.rows.start + first + JOB_TOKENS);
            if rows.is_empty() {
                return;
            }
            let heads = group * JOB_HEADS..shape.heads.min((group + 1) * JOB_HEADS);
            let columns = |width: usize| heads.start * width..heads.end * width;
            let LatentHeads { latent, key, scale, .. } = shape;
            let one = LatentShape { group: heads.len(), latent, key, scale };
            let position = task.position + first;
            let read = core.arena.read(queries.columns(columns(shape.query())), rows.clone());
            core.kernels.latent_start(state, one, Queries { rows: read, position, sinks: None });
            for run in 0..(position + rows.len()).div_ceil(PAGE_TOKENS) {
                let block = kv.blocks().read(kv.block(self.step, (task.chunk, run), 0));
                core.kernels.latent_block(state, block, run * PAGE_TOKENS);
            }
            let mut out = core.arena.write(out.columns(columns(latent)), rows, &job);
            core.kernels.latent_finish(state, &mut out);
        });
    }
}
