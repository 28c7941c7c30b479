//! Element types and block formats of weights.

use crate::quant::Format;

/// How the numbers of a tensor are stored. What is no plain float is made of blocks ([`DType::format`]), but for
/// [`DType::F8`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 4 bytes, IEEE 754.
    F32,
    /// 2 bytes, IEEE 754 half.
    F16,
    /// 2 bytes, bfloat16.
    BF16,
    /// 1 byte, e4m3 without infinities, times a scale for a block or all of the tensor.
    F8,
    /// 32 codes of 8 bits, one f16 scale.
    Q8_0,
    /// 32 codes of 4 bits from -8 on, one f16 scale.
    Q4_0,
    /// 32 codes of 4 bits, f16 scale and offset.
    Q4_1,
    /// 32 codes of 5 bits from -16 on, one f16 scale.
    Q5_0,
    /// 32 codes of 5 bits, f16 scale and offset.
    Q5_1,
    /// 256 codes of 2 bits in 16 sub-blocks, whose scales and minima have 4 bits.
    Q2K,
    /// 256 codes of 3 bits from -4 on in 16 sub-blocks, whose scales have 6 bits.
    Q3K,
    /// 256 codes of 4 bits in 8 sub-blocks, whose scales and minima have 6 bits.
    Q4K,
    /// 256 codes of 5 bits in 8 sub-blocks, whose scales and minima have 6 bits.
    Q5K,
    /// 256 codes of 6 bits from -32 on in 16 sub-blocks, whose scales have 8 bits.
    Q6K,
    /// 32 codes of 4 bits, each one of 16 uneven levels; one f16 scale.
    Iq4Nl,
    /// 32 codes of 4 bits, each an e2m1 float; one power of two as scale.
    Mxfp4,
    /// Codes of 4 bits less a zero, which a group of columns (a multiple of 32) shares with a scale.
    Int4,
    /// Codes of 8 bits, one scale for a group of columns (a multiple of 32).
    Int8,
}

impl DType {
    /// All types that are made of blocks.
    pub const BLOCKS: [DType; 12] = [
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q2K,
        DType::Q3K,
        DType::Q4K,
        DType::Q5K,
        DType::Q6K,
        DType::Iq4Nl,
        DType::Mxfp4,
    ];

    /// Bytes of one element of a plain float; `None` for blocks.
    pub fn element_bytes(self) -> Option<usize> {
        match self {
            DType::F32 => Some(4),
            DType::F16 | DType::BF16 => Some(2),
            DType::F8 => Some(1),
            _ => None,
        }
    }

    /// The blocks that rows of this type are made of; `None` for floats.
    pub fn format(self) -> Option<&'static Format> {
        Format::of(self)
    }

    /// Bytes of a row of this many elements; `None` where it is no whole number of blocks, or beyond counting.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match (self.element_bytes(), self.format()) {
            (Some(bytes), _) => cols.checked_mul(bytes),
            (None, Some(format)) if cols.is_multiple_of(format.block_len) => {
                (cols / format.block_len).checked_mul(format.block_bytes)
            }
            _ => None,
        }
    }

    /// The float that safetensors calls by this name.
    pub(super) fn parse(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => None,
        }
    }
}
