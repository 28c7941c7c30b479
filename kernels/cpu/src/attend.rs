//! Attention, one block of 32 tokens after another, with a running softmax (Milakov and Gimelshein, 2018).
//!
//! A row's result depends on its own query and on the blocks that hold a token visible to it, in ascending order,
//! each cut at the row's own first and last visible token. Rows computed together only share loads.

use std::ops::Range;

use crate::elementwise::softcap_vector;
use crate::kv::{BLOCK_TOKENS, BlockShape, KvBlock, value_width};
use crate::math::exp;
use crate::simd::{Element, LANES, Simd};
use crate::tile::{Operands, TileFn};
use crate::{Kernels, Mat, MatMut};

/// What is constant for one head's attention in a layer.
#[derive(Clone, Copy, Debug)]
pub struct AttendShape {
    /// Query heads that share the keys.
    pub group: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies q . k.
    pub scale: f32,
    /// What a row sees.
    pub sight: Sight,
    /// Scores pass through `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
}

/// Queries of consecutive tokens.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// `[tokens, group * width of a query]`
    pub rows: Mat<'a>,
    /// Position of the first token.
    pub position: usize,
    /// A score for each head of the group that takes its share of every softmax and adds nothing.
    pub sinks: Option<&'a [f32]>,
}

/// Which positions a row attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// The last so many up to its own; `usize::MAX` is unlimited.
    Window(usize),
    /// The first so many: all of a sequence of this length.
    Whole(usize),
}

impl Sight {
    /// Visible tokens of the block that begins at position `first`, for a row at `position`.
    fn in_block(self, position: usize, first: usize) -> (usize, usize) {
        let (oldest, end) = match self {
            Sight::Window(window) => ((position + 1).saturating_sub(window), position + 1),
            Sight::Whole(len) => (0, len),
        };
        let low = oldest.saturating_sub(first).min(BLOCK_TOKENS);
        (low, end.saturating_sub(first).min(BLOCK_TOKENS).max(low))
    }
}

/// The state of up to `rows` queries under way. A row is one query head of one token, ordered by token.
#[derive(Debug)]
pub struct Attention {
    /// Scaled queries in tiles, `[width][rows of the tile]` each.
    pub(crate) queries: Vec<f32>,
    /// `[rows][value width]`
    pub(crate) sums: Vec<f32>,
    /// Scores, then weights, of the current block: `[rows][32]`.
    pub(crate) weights: Vec<f32>,
    /// Largest score so far, by row.
    pub(crate) largest: Vec<f32>,
    /// Sums of weights so far by lane, `[rows][16]`.
    pub(crate) totals: Vec<f32>,
    /// Visible tokens of the current block, by row.
    pub(crate) visible: Vec<(usize, usize)>,
    pub(crate) shape: AttendShape,
    /// The current block in f32, where it is stored as codes.
    wide: Vec<f32>,
    tokens: usize,
    /// Position of the first token.
    position: usize,
}

/// Memory for no rows.
impl Default for Attention {
    fn default() -> Self {
        Self::sized(0, 0, 0)
    }
}

impl Attention {
    /// Memory for `rows` rows.
    pub fn new(rows: usize, head_dim: usize) -> Self {
        let wide = vec![0.0; BlockShape::Heads { head_dim }.len()];
        Self { wide, ..Self::sized(rows, head_dim, rows * head_dim) }
    }

    /// Memory for `rows` rows whose results are `head_dim` wide, and so many floats for queries.
    pub(crate) fn sized(rows: usize, head_dim: usize, queries: usize) -> Self {
        Self {
            queries: vec![0.0; queries],
            sums: vec![0.0; rows * value_width(head_dim)],
            weights: vec![0.0; rows * BLOCK_TOKENS],
            largest: vec![0.0; rows],
            totals: vec![0.0; rows * LANES],
            visible: vec![(0, 0); rows],
            shape: AttendShape {
                group: 1,
                head_dim,
                scale: 1.0,
                sight: Sight::Window(usize::MAX),
                softcap: None,
            },
            wide: Vec::new(),
            tokens: 0,
            position: 0,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.tokens * self.shape.group
    }

    /// Nothing seen yet but the sinks.
    pub(crate) fn reset(&mut self, shape: AttendShape, queries: &Queries<'_>) {
        self.shape = shape;
        self.tokens = queries.rows.rows();
        self.position = queries.position;
        let (rows, width) = (self.rows(), value_width(shape.head_dim));
        assert!(rows <= self.largest.len() && rows * width <= self.sums.len(), "{rows} rows of {width}");
        self.sums[..rows * width].fill(0.0);
        self.totals[..rows * LANES].fill(0.0);
        self.largest[..rows].fill(f32::NEG_INFINITY);
        if let Some(sinks) = queries.sinks {
            assert_eq!(sinks.len(), shape.group, "a sink for each head");
            for row in 0..rows {
                self.largest[row] = sinks[row % shape.group];
                self.totals[row * LANES] = 1.0;
            }
        }
    }

    /// Finds what each row sees of the block whose first token is at position `first`.
    pub(crate) fn look(&mut self, first: usize) {
        for row in 0..self.rows() {
            let position = self.position + row / self.shape.group;
            self.visible[row] = self.shape.sight.in_block(position, first);
        }
    }

    /// The current block's scores of some rows, on their way to weights.
    pub(crate) fn softmax_of(&mut self, rows: &Range<usize>) -> SoftmaxTile<'_> {
        let width = value_width(self.shape.head_dim);
        SoftmaxTile {
            weights: &mut self.weights[rows.start * BLOCK_TOKENS..rows.end * BLOCK_TOKENS],
            largest: &mut self.largest[rows.clone()],
            totals: &mut self.totals[rows.start * LANES..rows.end * LANES],
            visible: &self.visible[rows.clone()],
            softcap: self.shape.softcap,
            sums: &mut self.sums[rows.start * width..rows.end * width],
        }
    }

    /// Adds weighted values, `[32][value width]`, to the sums of the rows of one tile, while `next` comes closer.
    pub(crate) fn mix<E: Element>(&mut self, values: &[E], next: &[E], rows: &Range<usize>, tile: TileFn<E>) {
        let width = value_width(self.shape.head_dim);
        // A part of it beside each panel of values.
        let next_panel = size_of_val(next) / (width / LANES);
        let values = &values[..BLOCK_TOKENS * width];
        let visible = &self.visible[rows.clone()];
        let weights = &self.weights[rows.start * BLOCK_TOKENS..rows.end * BLOCK_TOKENS];
        let sums = &mut self.sums[rows.start * width..rows.end * width];
        let mut add = |own: Range<usize>, tokens: Range<usize>| {
            if tokens.is_empty() {
                return;
            }
            let sums = &mut sums[own.start * width..own.end * width];
            let operands = Operands {
                left: values[tokens.start * width..tokens.end * width].as_ptr(),
                left_panel: LANES,
                left_step: width,
                right: weights[own.start * BLOCK_TOKENS + tokens.start..].as_ptr(),
                right_row: BLOCK_TOKENS,
                right_step: 1,
                len: tokens.len(),
                ask: next.as_ptr().cast(),
                ask_panel: next_panel,
                ask_step: next_panel / BLOCK_TOKENS,
                sums: sums.as_mut_ptr(),
                sums_row: width,
            };
            // SAFETY: values are [tokens][width], weights [rows][32], sums [rows][width].
            unsafe { tile(&operands, width / LANES, own.len()) };
        };
        // Tokens that all rows see are added for all at once; what only some see, row by row, before and after.
        let low = visible.iter().map(|v| v.0).max().unwrap_or(0);
        let high = visible.iter().map(|v| v.1).min().unwrap_or(0);
        let shared = if low < high { low..high } else { BLOCK_TOKENS..BLOCK_TOKENS };
        for (r, v) in visible.iter().enumerate() {
            add(r..r + 1, v.0..v.1.min(shared.start));
        }
        add(0..rows.len(), shared.clone());
        for (r, v) in visible.iter().enumerate() {
            add(r..r + 1, v.0.max(shared.end)..v.1);
        }
    }
}

impl Kernels {
    /// Starts with queries of one head of keys.
    ///
    /// # Panics
    /// If the state was made for fewer rows or narrower heads.
    pub fn attend_start(&self, state: &mut Attention, shape: AttendShape, queries: Queries<'_>) {
        let (dim, tile) = (shape.head_dim, self.tile_rows());
        assert_eq!(queries.rows.cols(), shape.group * dim, "query width");
        state.reset(shape, &queries);
        let rows = state.rows();
        assert!(rows * dim <= state.queries.len(), "{rows} rows of {dim}");
        for row in 0..rows {
            let first = row / tile * tile;
            let width = tile.min(rows - first);
            let query = &queries.rows.row(row / shape.group)[row % shape.group * dim..][..dim];
            let places = state.queries[first * dim + row - first..].iter_mut().step_by(width);
            places.zip(query).for_each(|(p, q)| *p = q * shape.scale);
        }
    }

    /// Adds the block whose first token is at position `first`; blocks come in ascending order, and a block without
    /// a visible token may be left out. Meanwhile the keys of `next` come closer, the block that is added then.
    ///
    /// # Panics
    /// If the block is shorter than its shape.
    pub fn attend_block(
        &self,
        state: &mut Attention,
        block: KvBlock<'_>,
        first: usize,
        next: Option<KvBlock<'_>>,
    ) {
        let shape = BlockShape::Heads { head_dim: state.shape.head_dim };
        assert!(block.len() >= shape.len(), "a block of {}", block.len());
        state.look(first);
        let rows = state.rows();
        if matches!(block, KvBlock::Q8(..)) {
            if state.visible[..rows].iter().any(|v| v.0 < v.1) {
                let mut wide = std::mem::take(&mut state.wide);
                block.widen_q8(shape, &mut wide[..shape.len()]);
                self.attend_block(state, KvBlock::F32(&wide), first, None);
                state.wide = wide;
            }
            return;
        }
        let mut row = 0;
        while row < rows {
            let count = self.tile_rows().min(rows - row);
            if state.visible[row..row + count].iter().any(|v| v.0 < v.1) {
                let tile = row..row + count;
                // The first tile's share of the work is enough to ask for all of it.
                let next = next.filter(|_| row == 0);
                match (block, next) {
                    (KvBlock::F32(b), Some(KvBlock::F32(n))) => {
                        self.attend_tile(state, (b, n), tile, self.table().tile_f32);
                    }
                    (KvBlock::BF16(b), Some(KvBlock::BF16(n))) => {
                        self.attend_tile(state, (b, n), tile, self.table().tile_bf16);
                    }
                    (KvBlock::F16(b), Some(KvBlock::F16(n))) => {
                        self.attend_tile(state, (b, n), tile, self.table().tile_f16);
                    }
                    (KvBlock::F32(b), _) => self.attend_tile(state, (b, &[]), tile, self.table().tile_f32),
                    (KvBlock::BF16(b), _) => self.attend_tile(state, (b, &[]), tile, self.table().tile_bf16),
                    (KvBlock::F16(b), _) => self.attend_tile(state, (b, &[]), tile, self.table().tile_f16),
                    (KvBlock::Q8(..), _) => unreachable!("codes were made floats"),
                }
            }
            row += count;
        }
    }

    fn attend_tile<E: Element>(
        &self,
        state: &mut Attention,
        (block, next): (&[E], &[E]),
        rows: Range<usize>,
        tile: TileFn<E>,
    ) {
        let keys = BLOCK_TOKENS * state.shape.head_dim;
        self.weigh(state, block, &rows, tile);
        state.mix(&block[keys..], &next[..keys.min(next.len())], &rows, tile);
    }

    /// Scores of a block's keys, turned into weights, for the rows of one tile.
    fn weigh<E: Element>(&self, state: &mut Attention, block: &[E], rows: &Range<usize>, tile: TileFn<E>) {
        let (count, dim) = (rows.len(), state.shape.head_dim);
        let value_bytes = BLOCK_TOKENS * value_width(dim) * size_of::<E>();
        let weights = &mut state.weights[rows.start * BLOCK_TOKENS..rows.end * BLOCK_TOKENS];
        weights.fill(0.0);
        let operands = Operands {
            left: block.as_ptr(),
            left_panel: LANES,
            left_step: BLOCK_TOKENS,
            right: state.queries[rows.start * dim..rows.end * dim].as_ptr(),
            right_row: 1,
            right_step: count,
            len: dim,
            // Meanwhile the values come closer, half of them beside each panel of keys.
            ask: block[BLOCK_TOKENS * dim..].as_ptr().cast(),
            ask_panel: value_bytes / 2,
            ask_step: value_bytes / 2 / dim,
            sums: weights.as_mut_ptr(),
            sums_row: BLOCK_TOKENS,
        };
        // SAFETY: keys are [dim][32], the tile's queries [dim][count], weights [count][32].
        unsafe { tile(&operands, BLOCK_TOKENS / LANES, count) };
        // SAFETY: the table was chosen for this machine; the slices are as long as the rows say.
        unsafe { (self.table().softmax)(state.softmax_of(rows)) };
    }

    /// Writes the results, `[tokens, group * head_dim]`.
    ///
    /// # Panics
    /// If `out` has another shape.
    pub fn attend_finish(&self, state: &Attention, out: &mut MatMut<'_>) {
        let (group, dim) = (state.shape.group, state.shape.head_dim);
        assert!(out.rows() == state.tokens && out.cols() == group * dim, "{} x {}", out.rows(), out.cols());
        for row in 0..state.rows() {
            // SAFETY: the table was chosen for this machine.
            let total = unsafe { (self.table().sum)(&state.totals[row * LANES..][..LANES]) };
            let factor = 1.0 / total;
            let sums = &state.sums[row * value_width(dim)..][..dim];
            let out = &mut out.row(row / group)[row % group * dim..][..dim];
            out.iter_mut().zip(sums).for_each(|(o, s)| *o = s * factor);
        }
    }
}

/// One block's scores of a tile of rows, on their way to weights.
pub(crate) struct SoftmaxTile<'a> {
    /// Scores, replaced by weights, `[rows][32]`.
    pub(crate) weights: &'a mut [f32],
    pub(crate) largest: &'a mut [f32],
    /// `[rows][16]`
    pub(crate) totals: &'a mut [f32],
    /// Visible tokens by row.
    pub(crate) visible: &'a [(usize, usize)],
    pub(crate) softcap: Option<f32>,
    /// `[rows][value width]`, rescaled where the largest score grew.
    pub(crate) sums: &'a mut [f32],
}

/// 0 in the lanes of visible tokens, 1 elsewhere.
#[inline(always)]
fn mask<S: Simd>(s: S, first: usize, visible: (usize, usize)) -> S::V {
    let mut lanes = [0.0; LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        let token = first + i;
        *lane = if token >= visible.0 && token < visible.1 { 0.0 } else { 1.0 };
    }
    s.load(&lanes)
}

#[inline(always)]
pub(crate) fn softmax<S: Simd>(s: S, tile: SoftmaxTile<'_>) {
    let width = tile.sums.len() / tile.visible.len();
    let lowest = s.splat(f32::NEG_INFINITY);
    let one_half = s.splat(0.5);
    let rows = tile.weights.as_chunks_mut::<LANES>().0.as_chunks_mut::<2>().0;
    let totals = tile.totals.as_chunks_mut::<LANES>().0;
    let sums = tile.sums.chunks_exact_mut(width);
    for ((((scores, largest), total), visible), sums) in
        rows.iter_mut().zip(tile.largest).zip(totals).zip(tile.visible).zip(sums)
    {
        if visible.0 >= visible.1 {
            continue;
        }
        let mut a = s.load(&scores[0]);
        let mut b = s.load(&scores[1]);
        if let Some(cap) = tile.softcap {
            a = softcap_vector(s, cap, a);
            b = softcap_vector(s, cap, b);
        }
        if *visible != (0, BLOCK_TOKENS) {
            a = s.select_less(mask(s, 0, *visible), one_half, a, lowest);
            b = s.select_less(mask(s, LANES, *visible), one_half, b, lowest);
        }
        let block = s.maximum(s.max(a, b));
        let new = if block > *largest { block } else { *largest };
        let a = exp(s, s.sub(a, s.splat(new)));
        let b = exp(s, s.sub(b, s.splat(new)));
        s.store(&mut scores[0], a);
        s.store(&mut scores[1], b);
        let mut before = s.load(total);
        if new > *largest {
            let factor = exp(s, s.splat(*largest - new));
            before = s.mul(before, factor);
            for v in sums.as_chunks_mut::<LANES>().0 {
                let scaled = s.mul(s.load(v), factor);
                s.store(v, scaled);
            }
        }
        s.store(total, s.add(before, s.add(a, b)));
        *largest = new;
    }
}

/// The sum of sixteen lanes.
#[inline(always)]
pub(crate) fn sum<S: Simd>(s: S, lanes: &[f32]) -> f32 {
    lanes.as_chunks::<LANES>().0.first().map_or(0.0, |v| s.sum(s.load(v)))
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::Isa;
    use crate::kv::{KvBlockMut, KvType};
    use crate::math;
    use crate::simd::scalar::Scalar;

    fn noise(i: usize) -> f32 {
        let x = (i as u32 + 1).wrapping_mul(0x9E37_79B9);
        ((x ^ (x >> 15)).wrapping_mul(0x85EB_CA6B) >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn exp(x: f32) -> f32 {
        math::exp(Scalar, [x; LANES])[0]
    }

    /// Keys and values by token, as they are read back.
    struct Rows {
        keys: Vec<Vec<f32>>,
        values: Vec<Vec<f32>>,
    }

    /// One row in plain loops: the definition that the kernels are held to, bit for bit.
    fn attend_plainly(
        query: &[f32],
        rows: &Rows,
        (position, sink): (usize, Option<f32>),
        shape: &AttendShape,
    ) -> Vec<f32> {
        let dim = shape.head_dim;
        let query: Vec<f32> = query.iter().map(|q| q * shape.scale).collect();
        let seen = match shape.sight {
            Sight::Window(window) => (position + 1).saturating_sub(window)..position + 1,
            Sight::Whole(len) => 0..len,
        };
        let mut largest = sink.unwrap_or(f32::NEG_INFINITY);
        let mut totals = [0.0f32; LANES];
        totals[0] = if sink.is_some() { 1.0 } else { 0.0 };
        let mut sums = vec![0.0f32; dim];
        for first in (0..seen.end).step_by(BLOCK_TOKENS) {
            let mut scores = [f32::NEG_INFINITY; BLOCK_TOKENS];
            let seen = seen.start.max(first)..seen.end.min(first + BLOCK_TOKENS);
            for t in seen.clone() {
                let dot = (0..dim).fold(0.0f32, |sum, d| rows.keys[t][d].mul_add(query[d], sum));
                let cap = |c: f32| c * math::tanh(Scalar, [dot / c; LANES])[0];
                scores[t - first] = shape.softcap.map_or(dot, cap);
            }
            let new = scores.iter().fold(largest, |m, &s| if s > m { s } else { m });
            if seen.is_empty() {
                continue;
            }
            let weights = scores.map(|s| exp(s - new));
            let factor = if new > largest { exp(largest - new) } else { 1.0 };
            sums.iter_mut().for_each(|s| *s *= factor);
            for (i, total) in totals.iter_mut().enumerate() {
                *total = *total * factor + (weights[i] + weights[i + LANES]);
            }
            for t in seen {
                for (sum, v) in sums.iter_mut().zip(&rows.values[t]) {
                    *sum = v.mul_add(weights[t - first], *sum);
                }
            }
            largest = new;
        }
        let factor = 1.0 / Scalar.sum(totals);
        sums.iter().map(|s| s * factor).collect()
    }

    /// A block in the memory of every type.
    struct Memory {
        floats: Vec<f32>,
        bf16s: Vec<bf16>,
        f16s: Vec<f16>,
        codes: Vec<i8>,
        scales: Vec<f32>,
    }

    impl Memory {
        /// Unused slots hold NaN, or what becomes it.
        fn new(len: usize) -> Self {
            Self {
                floats: vec![f32::NAN; len],
                bf16s: vec![bf16::NAN; len],
                f16s: vec![f16::NAN; len],
                codes: vec![1; len],
                scales: vec![f32::NAN; 2 * BLOCK_TOKENS],
            }
        }

        fn block(&self, kv: KvType) -> KvBlock<'_> {
            match kv {
                KvType::F32 => KvBlock::F32(&self.floats),
                KvType::BF16 => KvBlock::BF16(&self.bf16s),
                KvType::F16 => KvBlock::F16(&self.f16s),
                KvType::Q8 => KvBlock::Q8(&self.codes, &self.scales),
            }
        }

        fn block_mut(&mut self, kv: KvType) -> KvBlockMut<'_> {
            match kv {
                KvType::F32 => KvBlockMut::F32(&mut self.floats),
                KvType::BF16 => KvBlockMut::BF16(&mut self.bf16s),
                KvType::F16 => KvBlockMut::F16(&mut self.f16s),
                KvType::Q8 => KvBlockMut::Q8(&mut self.codes, &mut self.scales),
            }
        }
    }

    /// A row as it is read back.
    fn stored(kv: KvType, row: &[f32]) -> Vec<f32> {
        let scale = row.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
        let one = |&x: &f32| match kv {
            KvType::F32 => x,
            KvType::BF16 => bf16::from_f32(x).to_f32(),
            KvType::F16 => f16::from_f32(x).to_f32(),
            KvType::Q8 => (x / scale).round_ties_even() * scale,
        };
        row.iter().map(one).collect()
    }

    /// Blocks of so many tokens, and the rows in them.
    fn cache(count: usize, dim: usize, kv: KvType) -> (Vec<Memory>, Rows) {
        let shape = BlockShape::Heads { head_dim: dim };
        let blocks = (0..count.div_ceil(BLOCK_TOKENS)).map(|_| Memory::new(shape.len()));
        let mut blocks: Vec<Memory> = blocks.collect();
        let mut rows = Rows { keys: Vec::new(), values: Vec::new() };
        for t in 0..count {
            let row = |n: usize| (0..dim).map(|d| noise(t * 1000 + d * 2 + n) * 2.0).collect::<Vec<_>>();
            let mut block = blocks[t / BLOCK_TOKENS].block_mut(kv);
            let [keys, values] = shape.parts();
            block.store_row(keys, t % BLOCK_TOKENS, &row(0));
            block.store_row(values, t % BLOCK_TOKENS, &row(1));
            rows.keys.push(stored(kv, &row(0)));
            rows.values.push(stored(kv, &row(1)));
        }
        (blocks, rows)
    }

    fn check((isa, kv): (Isa, KvType), shape: AttendShape, position: usize, tokens: usize) {
        let kernels = Kernels::new(isa).unwrap();
        let (dim, group) = (shape.head_dim, shape.group);
        let count = position + tokens;
        let (blocks, rows) = cache(count, dim, kv);
        let queries: Vec<f32> = (0..tokens * group * dim).map(|i| noise(i + 77) * 3.0).collect();
        let mut state = Attention::new(tokens * group, dim);
        let rows_of_queries = Mat::new(&queries, tokens, group * dim, group * dim);
        // Every other shape has sinks, low ones and ones that take most of the softmax.
        let sinks: Vec<f32> = (0..group).map(|head| noise(head + 3) * 6.0).collect();
        let sinks = tokens.is_multiple_of(2).then_some(&sinks[..]);
        kernels.attend_start(&mut state, shape, Queries { rows: rows_of_queries, position, sinks });
        for (i, block) in blocks.iter().enumerate() {
            let next = blocks.get(i + 1).map(|b| b.block(kv));
            kernels.attend_block(&mut state, block.block(kv), i * BLOCK_TOKENS, next);
        }
        let mut out = vec![0.0; queries.len()];
        kernels.attend_finish(&state, &mut MatMut::new(&mut out, tokens, group * dim, group * dim));
        for (i, query) in queries.chunks(dim).enumerate() {
            let sink = sinks.map(|sinks| sinks[i % group]);
            let wanted = attend_plainly(query, &rows, (position + i / group, sink), &shape);
            let found = &out[i * dim..][..dim];
            let equal = wanted.iter().zip(found).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(
                equal,
                "{isa:?}, {kv:?}, {shape:?}, {tokens} tokens at {position}, row {i}: {found:?}, not {wanted:?}"
            );
        }
    }

    #[test]
    fn equals_plain_loops_bit_for_bit() {
        for isa in Isa::supported() {
            for (group, head_dim) in [(1, 8), (2, 20), (3, 16), (7, 32)] {
                for (window, softcap) in [(usize::MAX, None), (5, None), (33, Some(3.0))] {
                    let sight = Sight::Window(window);
                    let shape = AttendShape { group, head_dim, scale: 0.3, sight, softcap };
                    for (position, tokens) in [(0, 1), (0, 16), (31, 1), (30, 5), (70, 9), (95, 1)] {
                        for kv in [KvType::F32, KvType::BF16, KvType::F16, KvType::Q8] {
                            check((isa, kv), shape, position, tokens);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn whole_sequences_equal_plain_loops_bit_for_bit() {
        for isa in Isa::supported() {
            for (group, head_dim) in [(1, 8), (1, 32), (2, 20)] {
                for len in [1, 16, 31, 32, 33, 70] {
                    // The rows of a job in the middle of a sequence, and the sequence itself.
                    for (position, tokens) in [(0, len.min(16)), (len / 2, len - len / 2)] {
                        let sight = Sight::Whole(position + tokens);
                        let shape = AttendShape { group, head_dim, scale: 0.3, sight, softcap: None };
                        check((isa, KvType::F32), shape, position, tokens);
                    }
                }
            }
        }
    }

    #[test]
    fn the_definition_is_attention() {
        let shape =
            AttendShape { group: 1, head_dim: 8, scale: 0.4, sight: Sight::Window(50), softcap: None };
        let (_, rows) = cache(80, 8, KvType::F32);
        let query: Vec<f32> = (0..8).map(|d| noise(d + 5)).collect();
        let sink = 0.7f32;
        let found = attend_plainly(&query, &rows, (79, Some(sink)), &shape);
        let dot = |t: usize| -> f64 {
            query.iter().zip(&rows.keys[t]).map(|(q, k)| f64::from(*q) * f64::from(*k) * 0.4).sum()
        };
        let weights: Vec<f64> = (30..80).map(|t| dot(t).exp()).collect();
        let total: f64 = weights.iter().sum::<f64>() + f64::from(sink).exp();
        for (d, found) in found.iter().enumerate() {
            let wanted: f64 =
                (30..80).map(|t| weights[t - 30] * f64::from(rows.values[t][d])).sum::<f64>() / total;
            assert!((f64::from(*found) - wanted).abs() < 1e-5, "{found}, expected {wanted}");
        }
    }
}
