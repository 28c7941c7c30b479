//! How what is kept of 32 tokens lies in memory: a head's keys transposed `[head_dim][32]`, so that one vector holds a
//! dimension of 16 tokens, then its values `[32][head_dim padded to 16]`; latent rows and shared keys by token.

use half::{bf16, f16};

use crate::simd::LANES;
use crate::transpose::transpose;

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 32;

/// Element type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 4 bytes.
    F32,
    /// 2 bytes, rounded to nearest even when stored.
    BF16,
    /// 2 bytes, rounded to nearest even when stored; beyond 65504 infinite.
    F16,
    /// 1 byte: a code of -127 to 127, times the scale of its row.
    Q8,
}

impl KvType {
    /// Bytes of one element, without the scales of rows.
    pub fn size_bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::BF16 | KvType::F16 => 2,
            KvType::Q8 => 1,
        }
    }

    /// Floats of scales in a block: of each part a scale for each token.
    fn scales_len(self) -> usize {
        if self == KvType::Q8 { 2 * BLOCK_TOKENS } else { 0 }
    }

    /// Bytes of a block, a multiple of 64.
    pub fn block_bytes(self, shape: BlockShape) -> usize {
        shape.len() * self.size_bytes() + 4 * self.scales_len()
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
    /// 0 or 1.
    index: usize,
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
        let first = BlockPart { index: 0, first: 0, width: widths[0], order: orders[0] };
        [first, BlockPart { index: 1, first: first.len(), width: widths[1], order: orders[1] }]
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
    /// Half-precision elements.
    F16(&'a [f16]),
    /// Codes, and the scales of rows, `[2 parts][32]`.
    Q8(&'a [i8], &'a [f32]),
}

/// One block for writing.
#[derive(Debug)]
pub enum KvBlockMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// bfloat16 elements.
    BF16(&'a mut [bf16]),
    /// Half-precision elements.
    F16(&'a mut [f16]),
    /// Codes, and the scales of rows, `[2 parts][32]`.
    Q8(&'a mut [i8], &'a mut [f32]),
}

/// Rounds to nearest even as `half` does, without its branch per element.
#[inline(always)]
fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { nan } else { rounded } as u16)
}

/// The largest magnitude of a row becomes the code 127.
fn q8_scale(row: &[f32]) -> f32 {
    row.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0
}

/// The nearest code, ties to even; 0 in a row of zeros.
fn q8_code(x: f32, scale: f32) -> i8 {
    (x / scale).round_ties_even() as i8
}

impl KvBlock<'_> {
    /// Elements of the block.
    pub(crate) fn len(&self) -> usize {
        match self {
            KvBlock::F32(b) => b.len(),
            KvBlock::BF16(b) => b.len(),
            KvBlock::F16(b) => b.len(),
            KvBlock::Q8(b, _) => b.len(),
        }
    }

    /// The codes of both parts, each times its row's scale.
    ///
    /// # Panics
    /// If the block is of another type or shorter than its shape.
    pub(crate) fn widen_q8(&self, shape: BlockShape, out: &mut [f32]) {
        let KvBlock::Q8(codes, scales) = self else { unreachable!("{self:?} has no codes") };
        for part in shape.parts() {
            let range = part.first..part.first + part.len();
            let (codes, out) = (&codes[range.clone()], &mut out[range]);
            let scales = &scales.as_chunks::<BLOCK_TOKENS>().0[part.index];
            match part.order {
                Order::Transposed => {
                    let lines = codes.as_chunks::<BLOCK_TOKENS>().0.iter();
                    for (codes, out) in lines.zip(out.as_chunks_mut::<BLOCK_TOKENS>().0) {
                        for ((o, code), scale) in out.iter_mut().zip(codes).zip(scales) {
                            *o = f32::from(*code) * scale;
                        }
                    }
                }
                Order::Rows => {
                    let width = value_width(part.width).max(1);
                    let rows = codes.chunks_exact(width).zip(out.chunks_exact_mut(width));
                    for ((codes, out), scale) in rows.zip(scales) {
                        out.iter_mut().zip(codes).for_each(|(o, code)| *o = f32::from(*code) * scale);
                    }
                }
            }
        }
    }

    /// Copies the scales of a part's rows out, `[32]` floats, little-endian; nothing where rows have none.
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn read_scales(&self, part: BlockPart, out: &mut [u8]) {
        let scales = match self {
            KvBlock::Q8(_, scales) => &scales[part.index * BLOCK_TOKENS..][..BLOCK_TOKENS],
            _ => &[],
        };
        assert_eq!(out.len(), 4 * scales.len(), "bytes of scales");
        out.as_chunks_mut::<4>().0.iter_mut().zip(scales).for_each(|(p, x)| *p = x.to_le_bytes());
    }

    /// Copies a part out: `[32][width]`, little-endian, as stored.
    ///
    /// # Panics
    /// If the block is shorter than its shape, or `out` has another length.
    pub fn read_part(&self, part: BlockPart, out: &mut [u8]) {
        match self {
            KvBlock::F32(b) => read_part(b, part, out, |x| x.to_le_bytes()),
            KvBlock::BF16(b) => read_part(b, part, out, |x| x.to_le_bytes()),
            KvBlock::F16(b) => read_part(b, part, out, |x| x.to_le_bytes()),
            KvBlock::Q8(b, _) => read_part(b, part, out, |x| x.to_le_bytes()),
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
            KvBlockMut::F16(b) => {
                let places = b[first..].iter_mut().step_by(step);
                places.zip(row).for_each(|(p, x)| *p = f16::from_f32(*x));
            }
            KvBlockMut::Q8(b, scales) => {
                let scale = q8_scale(row);
                scales[part.index * BLOCK_TOKENS + token] = scale;
                let places = b[first..].iter_mut().step_by(step);
                places.zip(row).for_each(|(p, x)| *p = q8_code(*x, scale));
            }
        }
    }

    /// Stores the scales of a part's rows from what [`KvBlock::read_scales`] gave.
    ///
    /// # Panics
    /// If `bytes` have another length.
    pub fn write_scales(&mut self, part: BlockPart, bytes: &[u8]) {
        let scales = match self {
            KvBlockMut::Q8(_, scales) => &mut scales[part.index * BLOCK_TOKENS..][..BLOCK_TOKENS],
            _ => &mut [],
        };
        assert_eq!(bytes.len(), 4 * scales.len(), "bytes of scales");
        scales.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(p, b)| *p = f32::from_le_bytes(*b));
    }

    /// Stores a part from what [`KvBlock::read_part`] gave.
    ///
    /// # Panics
    /// If the block is shorter than its shape, or `bytes` have another length.
    pub fn write_part(&mut self, part: BlockPart, bytes: &[u8]) {
        // SAFETY: every pattern of bits is a number of these types.
        unsafe {
            match self {
                KvBlockMut::F32(b) => write_part::<4>(bytes_mut(b), part, bytes),
                KvBlockMut::BF16(b) => write_part::<2>(bytes_mut(b), part, bytes),
                KvBlockMut::F16(b) => write_part::<2>(bytes_mut(b), part, bytes),
                KvBlockMut::Q8(b, _) => write_part::<1>(bytes_mut(b), part, bytes),
            }
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

/// `block` and `payload` are elements of `BYTES` bytes, little-endian.
fn write_part<const BYTES: usize>(block: &mut [u8], part: BlockPart, payload: &[u8]) {
    let width = part.width;
    assert_eq!(payload.len(), BLOCK_TOKENS * width * BYTES, "bytes of 32 rows of {width}");
    let block = &mut block[part.first * BYTES..(part.first + part.len()) * BYTES];
    match part.order {
        Order::Transposed => transpose::<BYTES>(payload, width, block),
        Order::Rows if block.len() == payload.len() => block.copy_from_slice(payload),
        Order::Rows => {
            let lines = block.chunks_exact_mut(value_width(width).max(1) * BYTES);
            for (row, line) in payload.chunks_exact(width.max(1) * BYTES).zip(lines) {
                line[..row.len()].copy_from_slice(row);
            }
        }
    }
}

/// The bytes of elements, as a payload has them.
///
/// # Safety
/// Every pattern of bits is an `E`.
unsafe fn bytes_mut<E>(elements: &mut [E]) -> &mut [u8] {
    const { assert!(cfg!(target_endian = "little"), "payloads are little-endian, and so must the machine be") }
    // SAFETY: the same bytes, borrowed for as long; whatever is written to them is elements again.
    unsafe { std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast(), size_of_val(elements)) }
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

    /// Codes and scales go out and come back, and are within half a step of the row.
    fn check_q8(shape: BlockShape, row: &dyn Fn(BlockPart, usize) -> Vec<f32>) {
        let (mut codes, mut scales) = (vec![1; shape.len()], vec![f32::NAN; 2 * BLOCK_TOKENS]);
        let (mut codes2, mut scales2) = (vec![1; shape.len()], vec![0.0; 2 * BLOCK_TOKENS]);
        for part in shape.parts() {
            let mut block = KvBlockMut::Q8(&mut codes, &mut scales);
            (0..BLOCK_TOKENS).for_each(|t| block.store_row(part, t, &row(part, t)));
            let (mut rows, mut factors) = (vec![0; BLOCK_TOKENS * part.width()], vec![0; 4 * BLOCK_TOKENS]);
            KvBlock::Q8(&codes, &scales).read_part(part, &mut rows);
            KvBlock::Q8(&codes, &scales).read_scales(part, &mut factors);
            let mut copy = KvBlockMut::Q8(&mut codes2, &mut scales2);
            copy.write_part(part, &rows);
            copy.write_scales(part, &factors);
        }
        assert_eq!((&codes, &scales), (&codes2, &scales2));
        let mut wide = vec![0.0; shape.len()];
        KvBlock::Q8(&codes, &scales).widen_q8(shape, &mut wide);
        for part in shape.parts() {
            for t in 0..BLOCK_TOKENS {
                let ((first, step), wanted) = (part.places(t), row(part, t));
                let step_len = wanted.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
                for (found, wanted) in wide[first..].iter().step_by(step).zip(&wanted) {
                    assert!((found - wanted).abs() <= step_len * 0.50001, "{found} {wanted}");
                }
            }
        }
    }

    #[test]
    fn a_row_of_zeros_and_ties_are_coded() {
        assert_eq!((q8_scale(&[0.0, -0.0]), q8_code(0.0, 0.0)), (0.0, 0));
        let scale = q8_scale(&[-254.0, 3.0, 5.0]);
        assert_eq!([-254.0, 3.0, 5.0, 254.0].map(|x| q8_code(x, scale)), [-127, 2, 2, 127]);
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
            check_q8(shape, &row);
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
