//! How what is kept of 32 tokens lies in memory: a head's keys transposed `[head_dim][32]`, so that one vector holds a
//! dimension of 16 tokens, then its values `[32][head_dim padded to 16]`; latent rows and shared keys by token.

use half::bf16;

use crate::simd::LANES;

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 32;

/// Element type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 4 bytes.
    F32,
    /// 2 bytes, rounded to nearest even when stored.
    BF16,
}

impl KvType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::BF16 => 2,
        }
    }
}

/// Width of a row that is stored by token.
pub(crate) fn value_width(width: usize) -> usize {
    width.next_multiple_of(LANES)
}

/// What a block holds of each of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockShape {
    /// The key, then the value, of one head.
    Heads {
        /// Width of each.
        head_dim: usize,
    },
    /// The row that all heads' keys and values are made of, then the part of the key that they share.
    Latent {
        /// Width of the first.
        latent: usize,
        /// Width of the second.
        key: usize,
    },
}

/// One row of each token, and how these lie in the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPart {
    /// First element.
    first: usize,
    /// Elements of a row.
    width: usize,
    order: Order,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// `[width][32]`
    Transposed,
    /// `[32][width padded to 16]`
    Rows,
}

impl BlockShape {
    /// Elements of a block.
    pub fn len(self) -> usize {
        let [first, second] = self.parts();
        first.len() + second.len()
    }

    /// Whether a token has no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// What a token has, in the order of a payload.
    pub fn parts(self) -> [BlockPart; 2] {
        let (widths, orders) = match self {
            BlockShape::Heads { head_dim } => ([head_dim; 2], [Order::Transposed, Order::Rows]),
            BlockShape::Latent { latent, key } => ([latent, key], [Order::Rows; 2]),
        };
        let first = BlockPart { first: 0, width: widths[0], order: orders[0] };
        [first, BlockPart { first: first.len(), width: widths[1], order: orders[1] }]
    }
}

impl BlockPart {
    /// Elements in the block, padding included.
    fn len(self) -> usize {
        let row = match self.order {
            Order::Transposed => self.width,
            Order::Rows => value_width(self.width),
        };
        BLOCK_TOKENS * row
    }

    /// Elements of a row.
    pub fn width(self) -> usize {
        self.width
    }

    /// Where elements of a token's row are: the first and the distance.
    fn places(self, token: usize) -> (usize, usize) {
        assert!(token < BLOCK_TOKENS, "token {token}");
        match self.order {
            Order::Transposed => (self.first + token, BLOCK_TOKENS),
            Order::Rows => (self.first + token * value_width(self.width), 1),
        }
    }
}

/// One block for reading.
#[derive(Clone, Copy, Debug)]
pub enum KvBlock<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// bfloat16 elements.
    BF16(&'a [bf16]),
}

/// One block for writing.
#[derive(Debug)]
pub enum KvBlockMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// bfloat16 elements.
    BF16(&'a mut [bf16]),
}

/// Rounds to nearest even as `half` does, without its branch per element.
#[inline(always)]
fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { nan } else { rounded } as u16)
}

impl KvBlock<'_> {
    /// Elements of the block.
    pub(crate) fn len(&self) -> usize {
        match self {
            KvBlock::F32(b) => b.len(),
            KvBlock::BF16(b) => b.len(),
        }
    }

    /// Copies a part out: `[32][width]`, little-endian, as stored.
    ///
    /// # Panics
    /// If the block is shorter than its shape, or `out` has another length.
    pub fn read_part(&self, part: BlockPart, out: &mut [u8]) {
        match self {
            KvBlock::F32(b) => read_part(b, part, out, |x| x.to_le_bytes()),
            KvBlock::BF16(b) => read_part(b, part, out, |x| x.to_le_bytes()),
        }
    }
}

impl KvBlockMut<'_> {
    /// Stores a token's row, rounded to the element type.
    ///
    /// # Panics
    /// If the block is shorter than its shape, or the row has another width than the part.
    pub fn store_row(&mut self, part: BlockPart, token: usize, row: &[f32]) {
        assert_eq!(row.len(), part.width, "the width of a row");
        let (first, step) = part.places(token);
        match self {
            KvBlockMut::F32(b) => b[first..].iter_mut().step_by(step).zip(row).for_each(|(p, x)| *p = *x),
            KvBlockMut::BF16(b) if step == 1 => {
                b[first..].iter_mut().zip(row).for_each(|(p, x)| *p = round(*x))
            }
            KvBlockMut::BF16(b) => {
                b[first..].iter_mut().step_by(step).zip(row).for_each(|(p, x)| *p = round(*x));
            }
        }
    }

    /// Stores a part from what [`KvBlock::read_part`] gave.
    ///
    /// # Panics
    /// If the block is shorter than its shape, or `bytes` have another length.
    pub fn write_part(&mut self, part: BlockPart, bytes: &[u8]) {
        match self {
            KvBlockMut::F32(b) => write_part(b, part, bytes, f32::from_le_bytes),
            KvBlockMut::BF16(b) => write_part(b, part, bytes, bf16::from_le_bytes),
        }
    }
}

fn read_part<E: Copy, const BYTES: usize>(
    block: &[E],
    part: BlockPart,
    out: &mut [u8],
    bytes: impl Fn(E) -> [u8; BYTES],
) {
    assert_eq!(out.len(), BLOCK_TOKENS * part.width * BYTES, "bytes of 32 rows of {}", part.width);
    let block = &block[part.first..part.first + part.len()];
    let rows = out.as_chunks_mut::<BYTES>().0.chunks_exact_mut(part.width.max(1));
    match part.order {
        Order::Transposed => {
            let lines = block.as_chunks::<BLOCK_TOKENS>().0;
            for (token, row) in rows.enumerate() {
                row.iter_mut().zip(lines).for_each(|(p, line)| *p = bytes(line[token]));
            }
        }
        Order::Rows => {
            for (row, line) in rows.zip(block.chunks_exact(value_width(part.width).max(1))) {
                row.iter_mut().zip(line).for_each(|(p, x)| *p = bytes(*x));
            }
        }
    }
}

fn write_part<E, const BYTES: usize>(
    block: &mut [E],
    part: BlockPart,
    payload: &[u8],
    element: impl Fn([u8; BYTES]) -> E,
) {
    let width = part.width;
    assert_eq!(payload.len(), BLOCK_TOKENS * width * BYTES, "bytes of 32 rows of {width}");
    let block = &mut block[part.first..part.first + part.len()];
    let elements = payload.as_chunks::<BYTES>().0;
    match part.order {
        Order::Transposed => {
            // Whole lines are written, one after the other: the payload of a block fits the first cache, and a write
            // to every line for every token would not.
            for (dim, line) in block.as_chunks_mut::<BLOCK_TOKENS>().0.iter_mut().enumerate() {
                let column = elements[dim..].iter().step_by(width);
                line.iter_mut().zip(column).for_each(|(p, e)| *p = element(*e));
            }
        }
        Order::Rows => {
            let lines = block.chunks_exact_mut(value_width(width).max(1));
            for (row, line) in elements.chunks_exact(width.max(1)).zip(lines) {
                row.iter().zip(line).for_each(|(e, p)| *p = element(*e));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_half_does() {
        for i in 0..200_000u32 {
            let x = f32::from_bits(i.wrapping_mul(0x9E37_79B1));
            if !x.is_nan() {
                assert_eq!(round(x).to_bits(), bf16::from_f32(x).to_bits(), "{x}");
            }
        }
        assert!(round(f32::NAN).is_nan());
        assert_eq!(round(f32::INFINITY), bf16::INFINITY);
    }

    #[test]
    fn rows_come_back() {
        let latent = |latent, key| BlockShape::Latent { latent, key };
        let heads = [8, 16, 20].map(|head_dim| BlockShape::Heads { head_dim });
        for shape in heads.into_iter().chain([latent(16, 8), latent(20, 6)]) {
            let mut floats = vec![0.0; shape.len()];
            let mut halves = vec![bf16::ZERO; shape.len()];
            let row = |part: BlockPart, t: usize| {
                (0..part.width()).map(|d| (t * 100 + d + part.first % 7) as f32).collect::<Vec<_>>()
            };
            for t in 0..BLOCK_TOKENS {
                for mut block in [KvBlockMut::F32(&mut floats), KvBlockMut::BF16(&mut halves)] {
                    shape.parts().iter().for_each(|&part| block.store_row(part, t, &row(part, t)));
                }
            }
            let mut copies = (vec![0.0; shape.len()], vec![bf16::ZERO; shape.len()]);
            for part in shape.parts() {
                let rows: Vec<f32> = (0..BLOCK_TOKENS).flat_map(|t| row(part, t)).collect();
                let mut bytes = vec![0; 4 * rows.len()];
                KvBlock::F32(&floats).read_part(part, &mut bytes);
                let wanted: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
                assert_eq!(bytes, wanted);
                KvBlockMut::F32(&mut copies.0).write_part(part, &bytes);
                let mut bytes = vec![0; 2 * rows.len()];
                KvBlock::BF16(&halves).read_part(part, &mut bytes);
                let wanted: Vec<u8> = rows.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
                assert_eq!(bytes, wanted);
                KvBlockMut::BF16(&mut copies.1).write_part(part, &bytes);
            }
            assert_eq!(copies, (floats, halves));
        }
    }
}
