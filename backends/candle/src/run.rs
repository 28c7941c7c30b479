//! One step: programs over rows, attention over pages, tokens from logits.

use std::collections::VecDeque;

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops;
use mainstay_backend_api::sample::{SampleScratch, sample_rows};
use mainstay_backend_api::step::{Chunk, Step, StepOutput};
use mainstay_backend_api::{
    CopyDone, Executor, Invariance, KvLayout, Limits, NumericClass, PageRead, PageRef, StepError, StoredPage,
    Ticket,
};
use mainstay_models::graph::{Activation, Attend, Op, Rope, RopeLayout};

use crate::pages::{Pages, PartIndex, Slot};
use crate::plan::{Instruction, Plan, Program};
use crate::{CandleBackend, NAME, step_error};

/// Query rows that attend at once: bounds the scores of a long chunk.
const ATTEND_ROWS: usize = 256;

/// A model on a candle device.
pub(crate) struct CandleExecutor {
    plan: Plan,
    pages: Pages,
    limits: Limits,
    scratch: SampleScratch,
    /// Steps are computed inside `submit` and wait here, oldest first.
    finished: VecDeque<StepOutput>,
    copied: Vec<CopyDone>,
}

impl CandleExecutor {
    pub(crate) fn new(plan: Plan, pages: Pages, limits: Limits) -> Self {
        let (scratch, finished, copied) = Default::default();
        Self { plan, pages, limits, scratch, finished, copied }
    }

    /// The logits `[outputs, vocab]` of a step.
    fn run(&mut self, step: &Step) -> Result<Vec<f32>> {
        let empty = Tensor::zeros((step.tokens.len(), 0), DType::F32, &self.plan.device)?;
        let mut rows =
            evaluate(&self.plan.prologue, empty, &mut Scope { layer: 0, step, pages: &mut self.pages })?;
        for (layer, program) in self.plan.layers.iter().enumerate() {
            rows = evaluate(program, rows, &mut Scope { layer, step, pages: &mut self.pages })?;
        }
        if step.outputs.is_empty() {
            return Ok(Vec::new());
        }
        let mut scope = Scope { layer: 0, step, pages: &mut self.pages };
        evaluate(&self.plan.epilogue, rows, &mut scope)?.flatten_all()?.to_vec1()
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
        let logits = self.run(step).map_err(step_error)?;
        let mut out = StepOutput::default();
        sample_rows(&logits, step, &mut self.scratch, &mut out)?;
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
}

/// What an op may need besides its inputs.
struct Scope<'a> {
    layer: usize,
    step: &'a Step,
    pages: &'a mut Pages,
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
        Op::Embed { .. } => {
            let ids = Tensor::from_slice(&scope.step.tokens, scope.step.tokens.len(), input.device())?;
            weight().index_select(&ids, 0)?.to_dtype(DType::F32)
        }
        Op::Linear { input, .. } => {
            let product = values[*input].contiguous()?.matmul(&weight().to_dtype(DType::F32)?.t()?)?;
            match &instruction.bias {
                Some(bias) => product.broadcast_add(bias),
                None => Ok(product),
            }
        }
        Op::RmsNorm { input, weight: vector, eps } => {
            let x = &values[*input];
            let groups = x.contiguous()?.reshape(((), vector.width()))?;
            ops::rms_norm(&groups, weight(), *eps)?.reshape(x.shape())
        }
        Op::Add { a, b } => &values[*a] + &values[*b],
        Op::Scale { input, factor } => &values[*input] * f64::from(*factor),
        Op::Softcap { input, cap } => softcap(&values[*input], *cap),
        Op::Slice { input, start, width } => values[*input].narrow(1, *start, *width),
        Op::Activate { input, f } => activate(&values[*input], *f),
        Op::GatedActivate { input, f } => {
            let half = values[*input].dim(1)? / 2;
            let gate = activate(&values[*input].narrow(1, 0, half)?, *f)?;
            gate * values[*input].narrow(1, half, half)?
        }
        Op::Rope { input, rope } => rotate(&values[*input], rope, scope.step),
        Op::Attend(a) => attend(a, values, scope),
        Op::SelectRows { input } => {
            let rows: Vec<u32> = scope.step.outputs.iter().map(|o| o.row as u32).collect();
            let rows = Tensor::from_slice(&rows, rows.len(), values[*input].device())?;
            values[*input].contiguous()?.index_select(&rows, 0)
        }
    }
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
    }
}

/// Pair `(a, b)` of every head becomes `(a cos - b sin, b cos + a sin)`.
fn rotate(x: &Tensor, rope: &Rope, step: &Step) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let (heads, half) = (width / rope.head_dim, rope.dim / 2);
    let (cos, sin) = angles(rope, step, x)?;
    let x = x.reshape((rows, heads, rope.head_dim))?;
    let (turned, rest) = (x.narrow(2, 0, rope.dim)?, x.narrow(2, rope.dim, rope.head_dim - rope.dim)?);
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
    Tensor::cat(&[turned, rest], D::Minus1)?.reshape((rows, width))
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

fn attend(a: &Attend, values: &[Tensor], scope: &mut Scope) -> Result<Tensor> {
    let group = scope.pages.group_of(scope.layer);
    let (keys, rows) =
        (values[a.k].flatten_all()?.to_vec1::<f32>()?, values[a.v].flatten_all()?.to_vec1::<f32>()?);
    let width = a.kv_heads * a.head_dim;
    let mut outputs = Vec::with_capacity(scope.step.chunks.len());
    for chunk in &scope.step.chunks {
        let table = chunk.table(scope.step, group);
        let slot = |part| Slot { layer: scope.layer, part, table };
        let range = chunk.tokens.start * width..chunk.tokens.end * width;
        scope.pages.append(&slot(PartIndex::Keys), chunk.position, &keys[range.clone()]);
        scope.pages.append(&slot(PartIndex::Values), chunk.position, &rows[range]);
        // What was appended is read back too, so that it is rounded to the stored type.
        let end = chunk.position + chunk.tokens.len();
        let read = |part| {
            let shape = (a.kv_heads, end, a.head_dim);
            Tensor::from_vec(scope.pages.gather(&slot(part), end), shape, values[a.q].device())
        };
        outputs.push(attend_chunk(
            a,
            chunk,
            &values[a.q],
            &(read(PartIndex::Keys)?, read(PartIndex::Values)?),
        )?);
    }
    Tensor::cat(&outputs, 0)
}

/// The rows `[tokens, heads * head_dim]` of one sequence, from its keys and values `[kv_heads, end, head_dim]`.
fn attend_chunk(a: &Attend, chunk: &Chunk, q: &Tensor, (k, v): &(Tensor, Tensor)) -> Result<Tensor> {
    let (per_kv, end) = (a.heads / a.kv_heads, k.dim(1)?);
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
        let mask = mask(chunk.position + first - chunk.tokens.start, rows, end, a.window);
        let mask = Tensor::from_vec(mask, (rows, end), scores.device())?;
        let scores = scores.reshape((a.heads, rows, end))?.broadcast_add(&mask)?;
        let weights = ops::softmax_last_dim(&scores)?.reshape((a.kv_heads, per_kv * rows, end))?;
        let mixed = weights.matmul(v)?.reshape((a.heads, rows, a.head_dim))?;
        outputs.push(mixed.transpose(0, 1)?.contiguous()?.reshape((rows, a.heads * a.head_dim))?);
    }
    Tensor::cat(&outputs, 0)
}

/// 0 where a row sees a position and -inf elsewhere, `[rows, end]`; the first row stands at `position`.
fn mask(position: usize, rows: usize, end: usize, window: Option<usize>) -> Vec<f32> {
    let sees = |row: usize, column: usize| column <= row && window.is_none_or(|w| row < column + w);
    let rows = position..position + rows;
    rows.flat_map(|r| (0..end).map(move |c| if sees(r, c) { 0.0 } else { f32::NEG_INFINITY })).collect()
}
