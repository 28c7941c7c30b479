//! Attention to latent rows (DeepSeek-V2, arXiv 2405.04434): one narrow row a token is key and value of all heads.
//!
//! A score is one chain over the latent elements, then over those of the shared key; a result is the weighted sum of
//! latent rows. Blocks hold rows by token, so lanes are queries here; else all is as in [`crate::attend`].

use crate::attend::{AttendShape, Attention, Queries, Sight};
use crate::kv::{BLOCK_TOKENS, BlockShape, KvBlock, value_width};
use crate::simd::LANES;
use crate::tile::Operands;
use crate::{Kernels, MatMut};

/// What is constant for some heads' attention in a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentShape {
    /// Heads that are computed together.
    pub group: usize,
    /// Width of a latent row.
    pub latent: usize,
    /// Width of the shared key.
    pub key: usize,
    /// Multiplies q . k.
    pub scale: f32,
}

impl LatentShape {
    fn width(&self) -> usize {
        self.latent + self.key
    }
}

/// The state of up to `rows` queries under way. A row is one head of one token, ordered by token.
#[derive(Debug)]
pub struct LatentAttention {
    /// Its queries lie in panels, `[width][16 rows]` each.
    running: Attention,
    /// Scores of the current block, `[32][rows padded to 16]`.
    scores: Vec<f32>,
    /// The current block in f32.
    wide: Vec<f32>,
    shape: LatentShape,
}

impl LatentAttention {
    /// Memory for `rows` rows.
    pub fn new(rows: usize, latent: usize, key: usize) -> Self {
        let padded = rows.next_multiple_of(LANES);
        Self {
            running: Attention::sized(rows, latent, padded * (latent + key)),
            scores: vec![0.0; padded * BLOCK_TOKENS],
            wide: vec![0.0; BlockShape::Latent { latent, key }.len()],
            shape: LatentShape { group: 1, latent, key, scale: 1.0 },
        }
    }
}

impl Kernels {
    /// Starts with queries `[tokens, group * (latent + key)]`.
    ///
    /// # Panics
    /// If the state was made for fewer rows or narrower ones.
    pub fn latent_start(&self, state: &mut LatentAttention, shape: LatentShape, queries: Queries<'_>) {
        let width = shape.width();
        assert_eq!(queries.rows.cols(), shape.group * width, "query width");
        state.shape = shape;
        let running = AttendShape {
            group: shape.group,
            head_dim: shape.latent,
            scale: shape.scale,
            sight: Sight::Window(usize::MAX),
            softcap: None,
        };
        state.running.reset(running, &queries);
        let rows = state.running.rows();
        let padded = rows.next_multiple_of(LANES);
        let places = &mut state.running.queries[..padded * width];
        places.fill(0.0);
        for row in 0..rows {
            let query = &queries.rows.row(row / shape.group)[row % shape.group * width..][..width];
            let first = row / LANES * LANES * width + row % LANES;
            let places = places[first..].iter_mut().step_by(LANES);
            places.zip(query).for_each(|(p, q)| *p = q * shape.scale);
        }
    }

    /// Adds the block whose first token is at position `first`; blocks come in ascending order.
    ///
    /// # Panics
    /// If the block is shorter than its shape.
    pub fn latent_block(&self, state: &mut LatentAttention, block: KvBlock<'_>, first: usize) {
        let LatentShape { latent, key, .. } = state.shape;
        let len = BlockShape::Latent { latent, key }.len();
        assert!(block.len() >= len && state.wide.len() >= len, "a block of {} for {len}", block.len());
        let LatentAttention { running, scores, wide, .. } = state;
        running.look(first);
        let rows = running.rows();
        if running.visible[..rows].iter().all(|v| v.0 >= v.1) {
            return;
        }
        let block = match block {
            KvBlock::F32(block) => &block[..len],
            KvBlock::BF16(block) => {
                // SAFETY: both are as long as the shape says, whole vectors, on the machine of the table.
                unsafe { (self.table().widen_bf16)(block.as_ptr(), &mut wide[..len]) };
                &wide[..len]
            }
            KvBlock::F16(block) => {
                wide.iter_mut().zip(&block[..len]).for_each(|(w, x)| *w = x.to_f32());
                &wide[..len]
            }
            KvBlock::Q8(..) => {
                block.widen_q8(BlockShape::Latent { latent, key }, &mut wide[..len]);
                &wide[..len]
            }
        };
        let (latents, keys) = block.split_at(BLOCK_TOKENS * value_width(latent));
        let padded = rows.next_multiple_of(LANES);
        let scores = &mut scores[..padded * BLOCK_TOKENS];
        scores.fill(0.0);
        let queries = &running.queries[..padded * (latent + key)];
        self.add_scores((queries, latent + key), (latents, latent), scores);
        self.add_scores((&queries[latent * LANES..], latent + key), (keys, key), scores);
        for (row, weights) in running.weights.chunks_exact_mut(BLOCK_TOKENS).take(rows).enumerate() {
            weights.iter_mut().zip(scores[row..].iter().step_by(padded)).for_each(|(w, s)| *w = *s);
        }
        // SAFETY: the table was chosen for this machine; the slices are as long as the rows say.
        unsafe { (self.table().softmax)(running.softmax_of(&(0..rows))) };
        for first in (0..rows).step_by(self.tile_rows()) {
            let tile = first..rows.min(first + self.tile_rows());
            running.mix(latents, &[], &tile, self.table().tile_f32);
        }
    }

    /// Adds the products of queries, in panels of `[width][16]`, with one part of a block's rows: the part's elements
    /// meet the first ones of each panel.
    fn add_scores(&self, queries: (&[f32], usize), part: (&[f32], usize), scores: &mut [f32]) {
        let ((queries, width), (rows, len)) = (queries, part);
        let (step, padded) = (value_width(len), scores.len() / BLOCK_TOKENS);
        if len == 0 {
            return;
        }
        assert!(rows.len() >= BLOCK_TOKENS * step, "{} elements of 32 rows of {len}", rows.len());
        assert!(queries.len() + (width - len) * LANES >= padded * width, "queries of {padded} rows");
        for token in (0..BLOCK_TOKENS).step_by(self.tile_rows()) {
            let count = self.tile_rows().min(BLOCK_TOKENS - token);
            let operands = Operands {
                left: queries.as_ptr(),
                left_panel: width * LANES,
                left_step: LANES,
                right: rows[token * step..].as_ptr(),
                right_row: step,
                right_step: 1,
                len,
                ask: queries.as_ptr().cast(),
                ask_panel: 0,
                ask_step: 0,
                sums: scores[token * padded..].as_mut_ptr(),
                sums_row: padded,
            };
            // SAFETY: each of the panels of queries has `len` columns from here on, the tile `count` rows, and the
            // scores `padded` places for each of them.
            unsafe { (self.table().tile_f32)(&operands, padded / LANES, count) };
        }
    }

    /// Writes the results, `[tokens, group * latent]`.
    ///
    /// # Panics
    /// If `out` has another shape.
    pub fn latent_finish(&self, state: &LatentAttention, out: &mut MatMut<'_>) {
        self.attend_finish(&state.running, out);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::kv::KvBlockMut;
    use crate::math;
    use crate::simd::{Simd, scalar::Scalar};
    use crate::{Isa, Mat};

    fn noise(i: usize) -> f32 {
        let x = (i as u32 + 1).wrapping_mul(0x9E37_79B9);
        ((x ^ (x >> 15)).wrapping_mul(0x85EB_CA6B) >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn exp(x: f32) -> f32 {
        math::exp(Scalar, [x; LANES])[0]
    }

    /// One row in plain loops over tokens `[latent, key]`: the definition that the kernels are held to, bit for bit.
    fn attend_plainly(query: &[f32], tokens: &[Vec<f32>], shape: &LatentShape) -> Vec<f32> {
        let mut largest = f32::NEG_INFINITY;
        let mut totals = [0.0f32; LANES];
        let mut sums = vec![0.0f32; shape.latent];
        for block in tokens.chunks(BLOCK_TOKENS) {
            let mut scores = [f32::NEG_INFINITY; BLOCK_TOKENS];
            for (score, token) in scores.iter_mut().zip(block) {
                *score = token.iter().zip(query).fold(0.0, |sum, (k, q)| k.mul_add(q * shape.scale, sum));
            }
            let new = scores.iter().fold(largest, |m, &s| if s > m { s } else { m });
            let weights = scores.map(|s| exp(s - new));
            let factor = if new > largest { exp(largest - new) } else { 1.0 };
            sums.iter_mut().for_each(|s| *s *= factor);
            for (i, total) in totals.iter_mut().enumerate() {
                *total = *total * factor + (weights[i] + weights[i + LANES]);
            }
            for (token, weight) in block.iter().zip(weights) {
                sums.iter_mut().zip(token).for_each(|(sum, v)| *sum = v.mul_add(weight, *sum));
            }
            largest = new;
        }
        let factor = 1.0 / Scalar.sum(totals);
        sums.iter().map(|s| s * factor).collect()
    }

    fn check(isa: Isa, shape: LatentShape, (position, tokens): (usize, usize), narrow: bool) {
        let kernels = Kernels::new(isa).unwrap();
        let (width, count) = (shape.width(), position + tokens);
        let block = BlockShape::Latent { latent: shape.latent, key: shape.key };
        let mut floats = vec![vec![f32::NAN; block.len()]; count.div_ceil(BLOCK_TOKENS)];
        let mut halves = vec![vec![bf16::NAN; block.len()]; floats.len()];
        let mut rows: Vec<Vec<f32>> = Vec::new();
        for t in 0..count {
            let row: Vec<f32> = (0..width).map(|d| noise(t * 1000 + d) * 2.0).collect();
            let at = t / BLOCK_TOKENS;
            for mut stored in [KvBlockMut::F32(&mut floats[at]), KvBlockMut::BF16(&mut halves[at])] {
                let [latents, keys] = block.parts();
                stored.store_row(latents, t % BLOCK_TOKENS, &row[..shape.latent]);
                stored.store_row(keys, t % BLOCK_TOKENS, &row[shape.latent..]);
            }
            rows.push(row.iter().map(|&x| if narrow { bf16::from_f32(x).to_f32() } else { x }).collect());
        }
        let queries: Vec<f32> = (0..tokens * shape.group * width).map(|i| noise(i + 77) * 3.0).collect();
        let mut state = LatentAttention::new(tokens * shape.group, shape.latent, shape.key);
        let stride = shape.group * width;
        let asked = Queries { rows: Mat::new(&queries, tokens, stride, stride), position, sinks: None };
        kernels.latent_start(&mut state, shape, asked);
        for (i, (floats, halves)) in floats.iter().zip(&halves).enumerate() {
            let block = if narrow { KvBlock::BF16(halves) } else { KvBlock::F32(floats) };
            kernels.latent_block(&mut state, block, i * BLOCK_TOKENS);
        }
        let wide = shape.group * shape.latent;
        let mut out = vec![0.0; tokens * wide];
        kernels.latent_finish(&state, &mut MatMut::new(&mut out, tokens, wide, wide));
        for (i, query) in queries.chunks(width).enumerate() {
            let wanted = attend_plainly(query, &rows[..=position + i / shape.group], &shape);
            let found = &out[i * shape.latent..][..shape.latent];
            let equal = wanted.iter().zip(found).all(|(a, b)| a.to_bits() == b.to_bits());
            let what = format!("{isa:?}, {shape:?}, {tokens} tokens at {position}, row {i}");
            assert!(equal, "{what}: {found:?}, not {wanted:?}");
        }
    }

    #[test]
    fn equals_plain_loops_bit_for_bit() {
        for isa in Isa::supported() {
            for (group, latent, key) in [(1, 16, 8), (4, 20, 6), (16, 32, 16), (17, 24, 0)] {
                let shape = LatentShape { group, latent, key, scale: 0.3 };
                for at in [(0, 1), (0, 16), (31, 1), (30, 5), (70, 4), (95, 1)] {
                    check(isa, shape, at, (at.0 + at.1) % 2 == 0);
                }
            }
        }
    }
}
