//! How keys and values of 32 tokens and one head lie in memory: keys transposed `[head_dim][32]`, so that one
//! vector holds a dimension of 16 tokens, then values `[32][head_dim padded to 16]`.

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

/// Width of a stored value row.
pub(crate) fn value_width(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// Elements of a block.
pub fn block_len(head_dim: usize) -> usize {
    BLOCK_TOKENS * (head_dim + value_width(head_dim))
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

/// Keys, or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvPart {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

/// Rounds to nearest even as `half` does, without its branch per element.
#[inline(always)]
fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { nan } else { rounded } as u16)
}

/// Where elements of a token's row are: the first and the distance.
fn places(part: KvPart, token: usize, head_dim: usize) -> (usize, usize) {
    assert!(token < BLOCK_TOKENS, "token {token}");
    match part {
        KvPart::Keys => (token, BLOCK_TOKENS),
        KvPart::Values => (BLOCK_TOKENS * head_dim + token * value_width(head_dim), 1),
    }
}

impl KvBlock<'_> {
    /// Elements of the block.
    pub(crate) fn len(&self) -> usize {
        match self {
            KvBlock::F32(b) => b.len(),
            KvBlock::BF16(b) => b.len(),
        }
    }

    /// Copies keys or values out: `[32][head_dim]`, little-endian, as stored.
    ///
    /// # Panics
    /// If the block is shorter than its shape, or `out` has another length.
    pub fn read_part(&self, part: KvPart, head_dim: usize, out: &mut [u8]) {
        match self {
            KvBlock::F32(b) => read_part(b, (part, head_dim), out, |x| x.to_le_bytes()),
            KvBlock::BF16(b) => read_part(b, (part, head_dim), out, |x| x.to_le_bytes()),
        }
    }
}

impl KvBlockMut<'_> {
    /// Stores a token's row, rounded to the element type.
    ///
    /// # Panics
    /// If the block is shorter than its shape.
    pub fn store_row(&mut self, part: KvPart, token: usize, row: &[f32]) {
        let (first, step) = places(part, token, row.len());
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

    /// Stores keys or values from what [`KvBlock::read_part`] gave.
    ///
    /// # Panics
    /// If the block is shorter than its shape, or `bytes` have another length.
    pub fn write_part(&mut self, part: KvPart, head_dim: usize, bytes: &[u8]) {
        match self {
            KvBlockMut::F32(b) => write_part(b, (part, head_dim), bytes, f32::from_le_bytes),
            KvBlockMut::BF16(b) => write_part(b, (part, head_dim), bytes, bf16::from_le_bytes),
        }
    }
}

/// Where a part begins, and how many elements it has in a payload and in the block.
fn extent(part: KvPart, head_dim: usize) -> (usize, usize, usize) {
    let payload = BLOCK_TOKENS * head_dim;
    match part {
        KvPart::Keys => (0, payload, payload),
        KvPart::Values => (payload, payload, BLOCK_TOKENS * value_width(head_dim)),
    }
}

fn read_part<E: Copy, const BYTES: usize>(
    block: &[E],
    (part, head_dim): (KvPart, usize),
    out: &mut [u8],
    bytes: impl Fn(E) -> [u8; BYTES],
) {
    let (first, payload, stored) = extent(part, head_dim);
    assert_eq!(out.len(), payload * BYTES, "bytes of 32 rows of {head_dim}");
    let block = &block[first..first + stored];
    let rows = out.as_chunks_mut::<BYTES>().0.chunks_exact_mut(head_dim.max(1));
    match part {
        KvPart::Keys => {
            let lines = block.as_chunks::<BLOCK_TOKENS>().0;
            for (token, row) in rows.enumerate() {
                row.iter_mut().zip(lines).for_each(|(p, line)| *p = bytes(line[token]));
            }
        }
        KvPart::Values => {
            for (row, line) in rows.zip(block.chunks_exact(value_width(head_dim).max(1))) {
                row.iter_mut().zip(line).for_each(|(p, x)| *p = bytes(*x));
            }
        }
    }
}

fn write_part<E, const BYTES: usize>(
    block: &mut [E],
    (part, head_dim): (KvPart, usize),
    payload: &[u8],
    element: impl Fn([u8; BYTES]) -> E,
) {
    let (first, len, stored) = extent(part, head_dim);
    assert_eq!(payload.len(), len * BYTES, "bytes of 32 rows of {head_dim}");
    let block = &mut block[first..first + stored];
    let elements = payload.as_chunks::<BYTES>().0;
    match part {
        KvPart::Keys => {
            // Whole lines are written, one after the other: the payload of a block fits the first cache, and a write
            // to every line for every token would not.
            for (dim, line) in block.as_chunks_mut::<BLOCK_TOKENS>().0.iter_mut().enumerate() {
                let column = elements[dim..].iter().step_by(head_dim);
                line.iter_mut().zip(column).for_each(|(p, e)| *p = element(*e));
            }
        }
        KvPart::Values => {
            let lines = block.chunks_exact_mut(value_width(head_dim).max(1));
            for (row, line) in elements.chunks_exact(head_dim.max(1)).zip(lines) {
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
        for head_dim in [8, 16, 20] {
            let mut floats = vec![0.0; block_len(head_dim)];
            let mut halves = vec![bf16::ZERO; block_len(head_dim)];
            let row =
                |t: usize, n: usize| (0..head_dim).map(|d| (t * 100 + d + n) as f32).collect::<Vec<_>>();
            for t in 0..BLOCK_TOKENS {
                for mut block in [KvBlockMut::F32(&mut floats), KvBlockMut::BF16(&mut halves)] {
                    block.store_row(KvPart::Keys, t, &row(t, 0));
                    block.store_row(KvPart::Values, t, &row(t, 7));
                }
            }
            let mut copies = (vec![0.0; block_len(head_dim)], vec![bf16::ZERO; block_len(head_dim)]);
            for (part, n) in [(KvPart::Keys, 0), (KvPart::Values, 7)] {
                let rows: Vec<f32> = (0..BLOCK_TOKENS).flat_map(|t| row(t, n)).collect();
                let mut bytes = vec![0; 4 * rows.len()];
                KvBlock::F32(&floats).read_part(part, head_dim, &mut bytes);
                let wanted: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
                assert_eq!(bytes, wanted);
                KvBlockMut::F32(&mut copies.0).write_part(part, head_dim, &bytes);
                let mut bytes = vec![0; 2 * rows.len()];
                KvBlock::BF16(&halves).read_part(part, head_dim, &mut bytes);
                let wanted: Vec<u8> = rows.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
                assert_eq!(bytes, wanted);
                KvBlockMut::BF16(&mut copies.1).write_part(part, head_dim, &bytes);
            }
            assert_eq!(copies, (floats, halves));
        }
    }
}
