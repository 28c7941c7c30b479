//! Block formats of quantized weights: what their bytes mean, in one neutral form.
//!
//! The formats are those of GGML (<https://github.com/ggml-org/ggml>, ggml-common.h) and of OCP's microscaling
//! specification (MXFP4). Each is defined once, by its decoder into [`Block`]; values, products and copies for a
//! device's own layout all follow from that.

mod encode;
mod k;
mod seeded;
mod small;

use crate::weights::DType;

pub use seeded::seeded_blocks;

/// Elements of the largest block.
pub const BLOCK_LEN_MAX: usize = 256;
/// Sub-blocks of the largest block.
pub const SUBS_MAX: usize = 16;

/// What the blocks of a format have in common.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Elements of a block: 32 or 256.
    pub block_len: usize,
    /// Elements that share a scale: 16 or 32.
    pub sub_len: usize,
    /// Bytes of a block as it is stored.
    pub block_bytes: usize,
    /// Whether something is subtracted.
    pub minima: bool,
    /// Smallest and largest code.
    pub codes: (i8, i8),
    decode: fn(&[u8], &mut Block),
}

/// One block, decoded: element `i` is `(d * scales[i / sub_len]) * codes[i] - dmin * mins[i / sub_len]`, each operation
/// rounded to f32, without the subtraction where the format has no minima. These are the bits of the format's
/// reference definition.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Scale of the block.
    pub d: f32,
    /// Scale of the minima.
    pub dmin: f32,
    /// Scales of the sub-blocks.
    pub scales: [i8; SUBS_MAX],
    /// Minima of the sub-blocks.
    pub mins: [u8; SUBS_MAX],
    /// The elements.
    pub codes: [i8; BLOCK_LEN_MAX],
}

impl Default for Block {
    fn default() -> Self {
        Self { d: 0.0, dmin: 0.0, scales: [1; SUBS_MAX], mins: [1; SUBS_MAX], codes: [0; BLOCK_LEN_MAX] }
    }
}

impl Block {
    /// The elements as numbers.
    ///
    /// # Panics
    /// If `out` is longer than a block of the format.
    pub fn read(&self, format: &Format, out: &mut [f32]) {
        for (sub, out) in out.chunks_mut(format.sub_len).enumerate() {
            let scale = self.d * f32::from(self.scales[sub]);
            let codes = &self.codes[sub * format.sub_len..][..out.len()];
            if format.minima {
                let min = self.dmin * f32::from(self.mins[sub]);
                out.iter_mut().zip(codes).for_each(|(to, &code)| *to = scale * f32::from(code) - min);
            } else {
                out.iter_mut().zip(codes).for_each(|(to, &code)| *to = scale * f32::from(code));
            }
        }
    }
}

impl Format {
    /// The format of a type; `None` for floats.
    pub(crate) fn of(dtype: DType) -> Option<&'static Self> {
        Some(match dtype {
            DType::F32 | DType::F16 | DType::BF16 | DType::F8 => return None,
            DType::Q8_0 => &small::Q8_0,
            DType::Q4_0 => &small::Q4_0,
            DType::Q4_1 => &small::Q4_1,
            DType::Q5_0 => &small::Q5_0,
            DType::Q5_1 => &small::Q5_1,
            DType::Q2K => &k::Q2,
            DType::Q3K => &k::Q3,
            DType::Q4K => &k::Q4,
            DType::Q5K => &k::Q5,
            DType::Q6K => &k::Q6,
            DType::Iq4Nl => &small::IQ4_NL,
            DType::Mxfp4 => &small::MXFP4,
            DType::Int4 => &small::INT4,
            DType::Int8 => &small::INT8,
        })
    }

    /// Decodes one block of `block_bytes` bytes. What the format lacks stays 0 (`dmin`) or 1 (scales, minima).
    ///
    /// # Panics
    /// If `bytes` has another length.
    pub fn decode(&self, bytes: &[u8], block: &mut Block) {
        let (expected, found) = (self.block_bytes, bytes.len());
        assert_eq!(expected, found, "a block of {expected} bytes is decoded from {found}");
        (self.decode)(bytes, block);
    }
}

/// A half float in the first two bytes.
fn f16(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

pub use encode::{can_encode, encode_row};
pub(crate) use small::{MXFP4_LEVELS, mxfp4_scale};
