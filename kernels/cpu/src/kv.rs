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

    /// Appends a token's row of `head_dim` elements to `out`, little-endian, as stored.
    ///
    /// # Panics
    /// If the block is shorter than its shape.
    pub fn read_row(&self, part: KvPart, token: usize, head_dim: usize, out: &mut Vec<u8>) {
        let (first, step) = places(part, token, head_dim);
        match self {
            KvBlock::F32(b) => {
                b[first..].iter().step_by(step).take(head_dim).for_each(|x| out.extend(x.to_le_bytes()));
            }
            KvBlock::BF16(b) => {
                b[first..].iter().step_by(step).take(head_dim).for_each(|x| out.extend(x.to_le_bytes()));
            }
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

    /// Stores a token's row from what [`KvBlock::read_row`] gave.
    ///
    /// # Panics
    /// If the block is shorter than its shape.
    pub fn write_row(&mut self, part: KvPart, token: usize, head_dim: usize, row: &[u8]) {
        let (first, step) = places(part, token, head_dim);
        match self {
            KvBlockMut::F32(b) => {
                let row = row.as_chunks::<4>().0;
                b[first..].iter_mut().step_by(step).zip(row).for_each(|(p, e)| *p = f32::from_le_bytes(*e));
            }
            KvBlockMut::BF16(b) => {
                let row = row.as_chunks::<2>().0;
                b[first..].iter_mut().step_by(step).zip(row).for_each(|(p, e)| *p = bf16::from_le_bytes(*e));
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
            let mut copy = vec![0.0; block_len(head_dim)];
            for t in 0..BLOCK_TOKENS {
                for (part, n) in [(KvPart::Keys, 0), (KvPart::Values, 7)] {
                    let mut bytes = Vec::new();
                    KvBlock::F32(&floats).read_row(part, t, head_dim, &mut bytes);
                    let wanted: Vec<u8> = row(t, n).iter().flat_map(|x| x.to_le_bytes()).collect();
                    assert_eq!(bytes, wanted);
                    KvBlockMut::F32(&mut copy).write_row(part, t, head_dim, &bytes);
                    bytes.clear();
                    KvBlock::BF16(&halves).read_row(part, t, head_dim, &mut bytes);
                    let wanted: Vec<u8> =
                        row(t, n).iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
                    assert_eq!(bytes, wanted);
                }
            }
            assert_eq!(copy, floats);
        }
    }
}
