//! One step: programs over rows, attention over pages, tokens from logits.

use std::collections::VecDeque;
use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops;
use mainstay_backend_api::sample::{SampleScratch, sample_rows};
use mainstay_backend_api::step::{Chunk, Step, StepOutput};
use mainstay_backend_api::{
    AdapterId, CopyDone, Executor, Invariance, KvLayout, Limits, NumericClass, PAGE_TOKENS, PageRead,
    PageRef, StepError, StoredPage, Ticket, oldest_page,
};
use mainstay_models::graph::{
    Activation, Attend, AttendLatent, Gate, Ids, Mask, Op, PoolKind, Rope, RopeLayout,
};
use mainstay_models::{AdapterWeights, LoadError};

use crate::adapter::{self, Adapter, Adapters};
use crate::experts::{self, linear};
use crate::pages::{Pages, PartIndex, Slot};
use crate::plan::{Instruction, Plan, Program};
use crate::{CandleBackend, NAME, load_error, step_error};

/// Query rows that attend at once: bounds the scores of a long chunk.
const ATTEND_ROWS: usize = 256;

/// A model on a candle device.
pub(crate) struct CandleExecutor {
    plan: Plan,
    pages: Pages,
    limits: Limits,
    adapters: Adapters,
    scratch: SampleScratch,
    /// Steps are computed inside `submit` and wait here, oldest first.
    finished: VecDeque<StepOutput>,
    copied: Vec<CopyDone>,
}

impl CandleExecutor {
    pub(crate) fn new(plan: Plan, pages: Pages, limits: Limits) -> Self {
        let (adapters, scratch, finished, copied) = Default::default();
        Self { plan, pages, limits, adapters, scratch, finished, copied }
    }

    /// The logits `[outputs, vocab]` of a step, and its pooled rows.
    fn run(&mut self, step: &Step) -> Result<(Vec<f32>, Vec<f32>)> {
        let empty = Tensor::zeros((step.tokens.len(), 0), DType::F32, &self.plan.device)?;
        let mut scope = Scope { layer: 0, step, pages: &mut self.pages, adapters: None };
        let mut rows = evaluate(&self.plan.prologue, empty, &mut scope)?;
        for (layer, program) in self.plan.layers.iter().enumerate() {
            (scope.layer, scope.adapters) =
                (layer, Some((&self.adapters, self.plan.prefixes[layer].as_str())));
            rows = evaluate(program, rows, &mut scope)?;
        }
        (scope.layer, scope.adapters) = (0, None);
        let mut finish = |program: &Program, wanted: usize| -> Result<Vec<f32>> {
            if wanted == 0 {
                return Ok(Vec::new());
            }
            evaluate(program, rows.clone(), &mut scope)?.flatten_all()?.to_vec1()
        };
        let logits = finish(&self.plan.epilogue, step.outputs.len())?;
        Ok((logits, finish(&self.plan.pooled, step.pooled.len())?))
    }
}

impl Executor for CandleExecutor {
    fn kv_layout(&self) -> &KvLayout {
        &self.plan.layout
    }

    fn numeric_class(&self) -> NumericClass {
        let path = format!("{NAME}/{}", CandleBackend::path(&self.plan.device));
        NumericClass { path, sources: env!("MAINSTAY_SOURCES"), invariance: Invariance::None }
    }

    fn submit(&mut self, step: &Step) -> std::result::Result<(), StepError> {
        step.assert_within(&self.limits);
        for &(from, to) in &step.copies {
            self.pages.copy_page(from, to);
        }
        let (logits, pooled) = self.run(step).map_err(step_error)?;
        let mut out = StepOutput::default();
        sample_rows(&logits, step, &mut self.scratch, &mut out)?;
        out.pooled = pooled;
        self.finished.push_back(out);
        Ok(())
    }

    fn finish(&mut self, out: &mut StepOutput) -> std::result::Result<(), StepError> {
        *out = self.finished.pop_front().expect("a step is submitted before it is finished");
        Ok(())
    }

    fn start_read(&mut self, pages: &[PageRead], ticket: Ticket) {
        let bytes = pages.iter().map(|read| self.pages.page(read.page).into()).collect();
        self.copied.push(CopyDone::read(&self.plan.layout, pages, bytes, ticket));
    }

    fn start_write(&mut self, pages: Vec<(PageRef, StoredPage)>, ticket: Ticket) {
        pages.iter().for_each(|(page, bytes)| self.pages.write_page(*page, (**bytes).as_ref()));
        self.copied.push(CopyDone::written(ticket, Ok(())));
    }

    fn poll(&mut self, done: &mut Vec<CopyDone>) {
        done.append(&mut self.copied);
    }

    fn set_adapter(
        &mut self,
        id: AdapterId,
        weights: Option<&AdapterWeights>,
    ) -> std::result::Result<(), LoadError> {
        match weights {
            Some(weights) => {
                let adapter = Adapter::new(weights, &self.plan.device).map_err(load_error)?;
                self.adapters.insert(id, adapter)
            }
            None => self.adapters.remove(&id),
        };
        Ok(())
    }
}

/// What an op may need besides its inputs.
struct Scope<'a> {
    layer: usize,
    step: &'a Step,
    pages: &'a mut Pages,
    /// Those that the chunks of the step may name, and the prefix of the layer; none outside of layers.
    adapters: Option<(&'a Adapters, &'a str)>,
}

fn evaluate(program: &Program, input: Tensor, scope: &mut Scope) -> Result<Tensor> {
    let mut values: Vec<Tensor> = Vec::with_capacity(program.len());
    for instruction in program {
        let value = apply(instruction, &values, &input, scope)?;
        values.push(value);
    }
    Ok(values.pop().unwrap_or(input))
}

fn apply(instruction: &Instruction, values: &[Tensor], input: &Tensor, scope: &mut Scope) -> Result<Tensor> {
    let weight = || instruction.weight.as_ref().expect("the plan loads the weight of every op that has one");
    match &instruction.op {
        Op::Input => Ok(input.clone()),
        Op::Embed { ids, .. } => {
            let ids = Tensor::from_vec(row_ids(*ids, scope.step), scope.step.tokens.len(), input.device())?;
            weight().index_select(&ids, 0)?.to_dtype(DType::F32)
        }
        Op::Linear { input, weight: matrix, .. } => {
            let product = linear(&values[*input], weight(), instruction.bias.as_ref())?;
            match scope.adapters {
                Some(adapters) => adapter::add(product, (&values[*input], matrix), adapters, scope.step),
                None => Ok(product),
            }
        }
        Op::RmsNorm { input, weight: vector, eps } => {
            let x = &values[*input];
            let groups = x.contiguous()?.reshape(((), vector.width()))?;
            ops::rms_norm(&groups, weight(), *eps)?.reshape(x.shape())
        }
        Op::LayerNorm { input, eps, .. } => {
            let bias = instruction.bias.as_ref().expect("the plan loads the bias of every layer norm");
            ops::layer_norm(&values[*input].contiguous()?, weight(), bias, *eps)
        }
        Op::Add { a, b } => &values[*a] + &values[*b],
        Op::Scale { input, factor } => &values[*input] * f64::from(*factor),
        Op::Softcap { input, cap } => softcap(&values[*input], *cap),
        Op::Slice { input, start, width } => values[*input].narrow(1, *start, *width),
        Op::Activate { input, f } => activate(&values[*input], *f),
        Op::GatedActivate { input, f } => gated(&values[*input], *f),
        Op::Experts(e) => {
            let rows = (&values[e.input], &values[e.scores]);
            experts::apply(e, &instruction.experts, instruction.bias.as_ref(), rows)
        }
        Op::Rope { input, rope } => rotate(&values[*input], rope, scope.step),
        Op::Attend(a) => attend((a, instruction.bias.as_ref()), values, scope),
        Op::AttendLatent(a) => attend_latent(a, weight(), values, scope),
        Op::SelectRows { input } => {
            let rows: Vec<u32> = scope.step.outputs.iter().map(|o| o.row as u32).collect();
            let rows = Tensor::from_slice(&rows, rows.len(), values[*input].device())?;
            values[*input].contiguous()?.index_select(&rows, 0)
        }
        Op::Pool { input, kind } => pool(&values[*input], *kind, scope.step),
        Op::Normalize { input } => {
            let x = &values[*input];
            let length = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
            x.broadcast_div(&length)
        }
    }
}

/// What selects each row of an embedding table.
fn row_ids(ids: Ids, step: &Step) -> Vec<u32> {
    if ids == Ids::Token {
        return step.tokens.clone();
    }
    let of_chunk = |chunk: &Chunk| {
        let chunk = chunk.clone();
        (chunk.position..chunk.position + chunk.tokens.len()).map(move |position| match ids {
            Ids::Segment => chunk.segment(position) as u32,
            Ids::Token | Ids::Position => position as u32,
        })
    };
    step.chunks.iter().flat_map(of_chunk).collect()
}

fn pool(rows: &Tensor, kind: PoolKind, step: &Step) -> Result<Tensor> {
    let one = |&chunk: &usize| {
        let range = &step.chunks[chunk].tokens;
        match kind {
            PoolKind::Mean => rows.narrow(0, range.start, range.len())?.mean_keepdim(0),
            PoolKind::First => rows.narrow(0, range.start, 1),
            PoolKind::Last => rows.narrow(0, range.end - 1, 1),
        }
    };
    Tensor::cat(&step.pooled.iter().map(one).collect::<Result<Vec<_>>>()?, 0)
}

fn softcap(x: &Tensor, cap: f32) -> Result<Tensor> {
    (x / f64::from(cap))?.tanh()? * f64::from(cap)
}

fn activate(x: &Tensor, f: Activation) -> Result<Tensor> {
    let x = x.contiguous()?;
    match f {
        Activation::Silu => x.silu(),
        Activation::GeluTanh => x.gelu(),
        Activation::GeluErf => x.gelu_erf(),
        Activation::Relu => x.relu(),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => ops::sigmoid(&x),
    }
}

/// What becomes of gate and up, side by side.
pub(crate) fn gated(both: &Tensor, f: Gate) -> Result<Tensor> {
    let half = both.dim(1)? / 2;
    let (gate, up) = (both.narrow(1, 0, half)?, both.narrow(1, half, half)?);
    match f {
        Gate::By(f) => activate(&gate, f)? * up,
        Gate::Clamped { alpha, limit } => {
            let (gate, up) = (gate.minimum(limit)?, up.clamp(-limit, limit)?);
            let open = ops::sigmoid(&(&gate * f64::from(alpha))?)?;
            (gate * open)? * (up + 1.0)?
        }
    }
}

/// Pair `(a, b)` of every head becomes `(a cos - b sin, b cos + a sin)`.
fn rotate(x: &Tensor, rope: &Rope, step: &Step) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let (heads, half) = (width / rope.head_dim, rope.dim / 2);
    let (cos, sin) = angles(rope, step, x)?;
    let x = x.reshape((rows, heads, rope.head_dim))?;
    let end = rope.first + rope.dim;
    let (before, after) = (x.narrow(2, 0, rope.first)?, x.narrow(2, end, rope.head_dim - end)?);
    let turned = x.narrow(2, rope.first, rope.dim)?;
    // Halves: [rows, heads, 2, half]. Interleaved: [rows, heads, half, 2], so the pair is the last dimension.
    let pair = match rope.layout {
        RopeLayout::Half => D::Minus2,
        RopeLayout::Interleaved => D::Minus1,
    };
    let split = match rope.layout {
        RopeLayout::Half => turned.reshape((rows, heads, 2, half))?,
        RopeLayout::Interleaved => turned.reshape((rows, heads, half, 2))?,
    };
    let (a, b) = (split.narrow(pair, 0, 1)?.squeeze(pair)?, split.narrow(pair, 1, 1)?.squeeze(pair)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let turned = match rope.layout {
        RopeLayout::Half => Tensor::cat(&[first, second], D::Minus1)?,
        RopeLayout::Interleaved => {
            Tensor::stack(&[first, second], D::Minus1)?.reshape((rows, heads, rope.dim))?
        }
    };
    Tensor::cat(&[before, turned, after], D::Minus1)?.reshape((rows, width))
}

/// Cosines and sines of every row, `[rows, 1, dim / 2]` each. The angle is rounded to f32 as transformers does.
fn angles(rope: &Rope, step: &Step, like: &Tensor) -> Result<(Tensor, Tensor)> {
    let mut angles = Vec::with_capacity(step.tokens.len() * rope.dim / 2);
    for chunk in &step.chunks {
        for position in chunk.position..chunk.position + chunk.tokens.len() {
            angles.extend(rope.tables[chunk.rope_table].iter().map(|f| f64::from(position as f32 * f)));
        }
    }
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|&a| (f(a) * f64::from(rope.scale)) as f32).collect();
        Tensor::from_vec(values, (step.tokens.len(), 1, rope.dim / 2), like.device())
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

/// Attention and its sinks.
type Sunk<'a> = (&'a Attend, Option<&'a Tensor>);

fn attend(a: Sunk<'_>, values: &[Tensor], scope: &mut Scope) -> Result<Tensor> {
    match a.0.mask {
        Mask::Causal { .. } => attend_causally(a, values, scope),
        Mask::Full => attend_fully(a, values, scope.step),
    }
}

/// Every row of a sequence sees all of it, and nothing is kept.
fn attend_fully((a, sinks): Sunk<'_>, values: &[Tensor], step: &Step) -> Result<Tensor> {
    let by_head = |v: usize, range: &Range<usize>| {
        let rows = values[v].narrow(0, range.start, range.len())?;
        rows.reshape((range.len(), a.kv_heads, a.head_dim))?.transpose(0, 1)?.contiguous()
    };
    let one = |chunk: &Chunk| {
        let kv = (by_head(a.k, &chunk.tokens)?, by_head(a.v, &chunk.tokens)?);
        attend_chunk((a, sinks), chunk, &values[a.q], &kv)
    };
    Tensor::cat(&step.chunks.iter().map(one).collect::<Result<Vec<_>>>()?, 0)
}

fn attend_causally((a, sinks): Sunk<'_>, values: &[Tensor], scope: &mut Scope) -> Result<Tensor> {
    let rows = [&values[a.k], &values[a.v]];
    let mut outputs = Vec::with_capacity(scope.step.chunks.len());
    let window = if let Mask::Causal { window } = a.mask { window } else { None };
    for (chunk, kept) in scope.step.chunks.iter().zip(keep(rows, window, scope)?) {
        outputs.push(attend_chunk((a, sinks), chunk, &values[a.q], &kept.into())?);
    }
    Tensor::cat(&outputs, 0)
}

/// Appends rows of this step to both parts of the layer's pages, and returns what each chunk's rows see of its sequence,
/// `[heads, seen, width]`, in whole pages. What was appended is read back too, so that it is rounded to the stored type.
/// Pages that no row sees are gone.
fn keep(rows: [&Tensor; 2], window: Option<usize>, scope: &mut Scope) -> Result<Vec<[Tensor; 2]>> {
    let (group, step) = (scope.pages.group_of(scope.layer), scope.step);
    let mut kept = Vec::with_capacity(step.chunks.len());
    let flat = [rows[0].flatten_all()?.to_vec1::<f32>()?, rows[1].flatten_all()?.to_vec1::<f32>()?];
    for chunk in &step.chunks {
        let table = chunk.table(step, group);
        let mut read = |part: PartIndex| {
            let (rows, flat) = (rows[part as usize], &flat[part as usize]);
            let (slot, width) = (Slot { layer: scope.layer, part, table }, rows.dim(1)?);
            let own = &flat[chunk.tokens.start * width..chunk.tokens.end * width];
            scope.pages.append(&slot, chunk.position, own);
            let seen = oldest_page(window, chunk.position) * PAGE_TOKENS..chunk.position + chunk.tokens.len();
            let heads = scope.pages.heads(&slot);
            let shape = (heads, seen.len(), width / heads);
            Tensor::from_vec(scope.pages.gather(&slot, seen), shape, rows.device())
        };
        kept.push([read(PartIndex::First)?, read(PartIndex::Second)?]);
    }
    Ok(kept)
}

/// Makes the keys and values of all heads from what is kept, and attends to them.
fn attend_latent(a: &AttendLatent, expand: &Tensor, values: &[Tensor], scope: &mut Scope) -> Result<Tensor> {
    let whole = Attend {
        q: a.q,
        k: a.latent,
        v: a.latent,
        heads: a.heads,
        kv_heads: a.heads,
        head_dim: a.plain_dim + a.key_dim,
        scale: a.scale,
        mask: Mask::Causal { window: None },
        softcap: None,
        sinks: None,
    };
    let mut outputs = Vec::with_capacity(scope.step.chunks.len());
    for (chunk, [latents, keys]) in
        scope.step.chunks.iter().zip(keep([&values[a.latent], &values[a.key]], None, scope)?)
    {
        let end = latents.dim(1)?;
        let made = linear(&latents.squeeze(0)?, expand, None)?;
        let made = made.reshape((end, a.heads, a.plain_dim + a.value_dim))?.transpose(0, 1)?;
        let keys = keys.broadcast_as((a.heads, end, a.key_dim))?;
        let keys = Tensor::cat(&[made.narrow(2, 0, a.plain_dim)?, keys], 2)?;
        let kv = (keys, made.narrow(2, a.plain_dim, a.value_dim)?.contiguous()?);
        outputs.push(attend_chunk((&whole, None), chunk, &values[a.q], &kv)?);
    }
    Tensor::cat(&outputs, 0)
}

/// The rows `[tokens, heads * value width]` of one sequence, from its keys and values `[kv_heads, seen, width]`, the
/// newest of which is the chunk's last token.
fn attend_chunk(
    (a, sinks): Sunk<'_>,
    chunk: &Chunk,
    q: &Tensor,
    (k, v): &(Tensor, Tensor),
) -> Result<Tensor> {
    let (per_kv, seen, width) = (a.heads / a.kv_heads, k.dim(1)?, v.dim(2)?);
    let k = k.t()?;
    let mut outputs = Vec::new();
    for first in chunk.tokens.clone().step_by(ATTEND_ROWS) {
        let rows = (chunk.tokens.end - first).min(ATTEND_ROWS);
        let q = q.narrow(0, first, rows)?.reshape((rows, a.heads, a.head_dim))?.transpose(0, 1)?;
        let q = q.contiguous()?.reshape((a.kv_heads, per_kv * rows, a.head_dim))?;
        let mut scores = (q.matmul(&k)? * f64::from(a.scale))?;
        if let Some(cap) = a.softcap {
            scores = softcap(&scores, cap)?;
        }
        let mut scores = scores.reshape((a.heads, rows, seen))?;
        if let Mask::Causal { window } = a.mask {
            let row = seen - (chunk.tokens.end - first);
            let mask = mask(row..row + rows, seen, window);
            scores = scores.broadcast_add(&Tensor::from_vec(mask, (rows, seen), scores.device())?)?;
        }
        let weights = match sinks {
            None => ops::softmax_last_dim(&scores)?,
            Some(sinks) => {
                let sinks = sinks.reshape((a.heads, 1, 1))?.broadcast_as((a.heads, rows, 1))?;
                let weights = ops::softmax_last_dim(&Tensor::cat(&[&scores, &sinks.contiguous()?], 2)?)?;
                weights.narrow(2, 0, seen)?.contiguous()?
            }
        };
        let weights = weights.reshape((a.kv_heads, per_kv * rows, seen))?;
        let mixed = weights.matmul(v)?.reshape((a.heads, rows, width))?;
        outputs.push(mixed.transpose(0, 1)?.contiguous()?.reshape((rows, a.heads * width))?);
    }
    Tensor::cat(&outputs, 0)
}

/// 0 where a row sees a column and -inf elsewhere, `[rows, columns]`; rows and columns are numbered alike.
fn mask(rows: Range<usize>, columns: usize, window: Option<usize>) -> Vec<f32> {
    let sees = |row: usize, column: usize| column <= row && window.is_none_or(|w| row < column + w);
    rows.flat_map(|r| (0..columns).map(move |c| if sees(r, c) { 0.0 } else { f32::NEG_INFINITY })).collect()
}
