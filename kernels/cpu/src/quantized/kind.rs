//! The kinds of packed integer weights: one line of description each, from which packing and kernels follow.

use super::tile::Mode;
use super::{BLOCK, CHUNK, GROUP_BYTES, SUPER};
use crate::simd::LANES;

/// How integers of a packed matrix and their scales are stored. Codes are bits in memory, integers what they stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 8 bits, a half-precision scale for 32 columns.
    Eight,
    /// 8 bits, an f32 scale for 32 columns.
    EightF32,
    /// 4 bits, a half-precision scale for 32 columns.
    Four,
    /// 4 bits, a half-precision scale and minimum for 32 columns.
    FourMin,
    /// 4 bits less a zero point, which 32 columns share with an f32 scale.
    FourZero,
    /// 4 bits that choose among 16 uneven steps, a half-precision scale for 32 columns.
    FourUneven,
    /// 4-bit floating point (1 sign, 2 exponent, 1 mantissa; integers are twice the value), an f32 scale for 32 columns.
    FourFloat,
    /// 5 bits, a half-precision scale for 32 columns.
    Five,
    /// 5 bits, a half-precision scale and minimum for 32 columns.
    FiveMin,
    /// 2 bits, scale and minimum for 16 columns, themselves small integers.
    NestedTwoMin,
    /// 3 bits, a scale for 16 columns, itself a small integer.
    NestedThree,
    /// 4 bits, scale and minimum for 32 columns, themselves small integers.
    NestedFourMin,
    /// 5 bits, scale and minimum for 32 columns, themselves small integers.
    NestedFiveMin,
    /// 6 bits, a scale for 16 columns, itself a small integer.
    NestedSix,
}

/// How an integer follows from a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    /// The code itself; a minimum is subtracted after scaling.
    Minimum,
    /// The code less a constant.
    Less(u8),
    /// The code less a number that each row has for each block.
    Zero,
    /// The code's entry.
    Table(&'static Table),
}

/// What the 16 codes of a kind stand for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) integers: [i8; 16],
    /// The code of each integer, by its bits; [`NO_CODE`] for those that have none.
    pub(crate) codes: [u8; 256],
}

const NO_CODE: u8 = u8::MAX;

/// What wide bytes exceed their integers by.
pub(crate) const WIDE_BIAS: u8 = 128;

/// Where scales come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// Half precision, one for a block.
    F16,
    /// One for a block.
    F32,
    /// 8-bit integers times a half-precision number for 256 columns.
    Nested,
}

/// A kind in numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) bits: usize,
    pub(crate) values: Values,
    pub(crate) scales: Scales,
    /// Columns under one scale.
    pub(crate) sub_len: usize,
}

/// The steps of 4-bit codes that are dense around zero.
static UNEVEN: Table = Table::new([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]);

/// Twice the values of the 4-bit floating-point numbers.
static FLOAT: Table = Table::new([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]);

impl Table {
    const fn new(integers: [i8; 16]) -> Self {
        let mut codes = [NO_CODE; 256];
        let mut code = 16;
        while code > 0 {
            code -= 1;
            codes[integers[code] as u8 as usize] = code as u8;
        }
        Self { integers, codes }
    }

    const fn least(&self) -> i8 {
        let mut least = 0;
        let mut i = 0;
        while i < self.integers.len() {
            if self.integers[i] < least {
                least = self.integers[i];
            }
            i += 1;
        }
        least
    }
}

impl Kind {
    /// All of them, in the order of the kernels' tables.
    pub const ALL: [Kind; 14] = [
        Kind::Eight,
        Kind::EightF32,
        Kind::Four,
        Kind::FourMin,
        Kind::FourZero,
        Kind::FourUneven,
        Kind::FourFloat,
        Kind::Five,
        Kind::FiveMin,
        Kind::NestedTwoMin,
        Kind::NestedThree,
        Kind::NestedFourMin,
        Kind::NestedFiveMin,
        Kind::NestedSix,
    ];

    pub(crate) const fn layout(self) -> Layout {
        use Scales::{F16, F32, Nested};
        use Values::{Less, Minimum, Table, Zero};
        let (bits, values, scales, sub_len) = match self {
            Kind::Eight => (8, Less(WIDE_BIAS), F16, 32),
            Kind::EightF32 => (8, Less(WIDE_BIAS), F32, 32),
            Kind::Four => (4, Less(8), F16, 32),
            Kind::FourMin => (4, Minimum, F16, 32),
            Kind::FourZero => (4, Zero, F32, 32),
            Kind::FourUneven => (4, Table(&UNEVEN), F16, 32),
            Kind::FourFloat => (4, Table(&FLOAT), F32, 32),
            Kind::Five => (5, Less(16), F16, 32),
            Kind::FiveMin => (5, Minimum, F16, 32),
            Kind::NestedTwoMin => (2, Minimum, Nested, 16),
            Kind::NestedThree => (3, Less(4), Nested, 16),
            Kind::NestedFourMin => (4, Minimum, Nested, 32),
            Kind::NestedFiveMin => (5, Minimum, Nested, 32),
            Kind::NestedSix => (6, Less(32), Nested, 16),
        };
        Layout { bits, values, scales, sub_len }
    }

    /// Columns that one [`super::panel::Integers`] describes.
    pub fn block_len(self) -> usize {
        match self.layout().scales {
            Scales::Nested => SUPER,
            Scales::F16 | Scales::F32 => BLOCK,
        }
    }

    /// Columns under one scale.
    pub fn sub_len(self) -> usize {
        self.layout().sub_len
    }
}

/// Where the parts of a chunk begin, bytes from its first one.
///
/// A panel is a run of chunks of 256 columns, the last one perhaps of fewer: `[numbers over scales]`, only where scales
/// are nested, then `[blocks][scales, minima, zero points]`, then, on a cache line, `[blocks][codes]`. So a panel is read
/// forward, and so is a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    pub(crate) records: usize,
    pub(crate) codes: usize,
    /// Where the next chunk begins, on a cache line.
    pub(crate) end: usize,
}

impl Layout {
    pub(crate) const fn has_minima(&self) -> bool {
        matches!(self.values, Values::Minimum)
    }

    /// Scales of a row in a block.
    pub(crate) const fn subs(&self) -> usize {
        BLOCK / self.sub_len
    }

    /// Bytes of the numbers over scales, for 16 rows of 256 columns.
    pub(crate) const fn super_bytes(&self) -> usize {
        match self.scales {
            Scales::Nested => 2 * LANES * if self.has_minima() { 2 } else { 1 },
            Scales::F16 | Scales::F32 => 0,
        }
    }

    /// Bytes of the scales of 16 rows of a block; as many minima follow, if there are any.
    pub(crate) const fn scale_bytes(&self) -> usize {
        match self.scales {
            Scales::F16 => 2 * LANES,
            Scales::F32 => 4 * LANES,
            Scales::Nested => self.subs() * LANES,
        }
    }

    /// Bytes of scales, minima and zero points of 16 rows of a block.
    pub(crate) const fn record_bytes(&self) -> usize {
        match self.values {
            Values::Minimum => 2 * self.scale_bytes(),
            Values::Zero => self.scale_bytes() + LANES,
            Values::Less(_) | Values::Table(_) => self.scale_bytes(),
        }
    }

    /// Bytes of the codes of 16 rows of a block.
    pub(crate) const fn code_bytes(&self) -> usize {
        self.bits * GROUP_BYTES
    }

    /// A chunk of so many blocks, at most [`CHUNK`].
    pub(crate) const fn chunk(&self, blocks: usize) -> Chunk {
        let records = self.super_bytes();
        let codes = (records + blocks * self.record_bytes()).next_multiple_of(GROUP_BYTES);
        Chunk { records, codes, end: codes + blocks * self.code_bytes() }
    }

    /// Cache lines of the next chunk to ask for beside each block of a whole one.
    pub(crate) const fn lines(&self) -> usize {
        self.chunk(CHUNK).end.div_ceil(CHUNK * GROUP_BYTES)
    }

    /// How many of them while codes are unpacked; the others are asked for while they are multiplied.
    pub(crate) const fn lines_of_unpacking(&self) -> usize {
        if self.bits < 8 { self.lines() / 2 } else { 0 }
    }

    /// Bytes of a panel.
    pub(crate) const fn panel_bytes(&self, cols: usize) -> usize {
        let (whole, rest) = (cols / SUPER, cols % SUPER / BLOCK);
        let rest = if rest == 0 { 0 } else { self.chunk(rest).end };
        whole * self.chunk(CHUNK).end + rest
    }

    /// The first byte and the parts of the chunk that holds column `col` of a panel of `cols` columns.
    pub(crate) const fn chunk_of(&self, cols: usize, col: usize) -> (usize, Chunk) {
        let first = col / SUPER;
        let left = (cols - first * SUPER) / BLOCK;
        let blocks = if left < CHUNK { left } else { CHUNK };
        (first * self.chunk(CHUNK).end, self.chunk(blocks))
    }

    /// What is added to integers so that they are unsigned bytes.
    pub(crate) const fn bias(&self) -> u8 {
        match self.values {
            Values::Minimum | Values::Zero => 0,
            Values::Less(bias) => bias,
            // Integers that need more than 7 bits have the bias of wide bytes.
            Values::Table(table) if table.least() < -64 => WIDE_BIAS,
            Values::Table(table) => table.least().unsigned_abs(),
        }
    }

    /// Whether integers are unpacked to wide bytes: where they need 8 bits, or, if so asked for, all that may be.
    pub(crate) const fn is_wide(&self, widens: bool) -> bool {
        match self.values {
            Values::Minimum | Values::Zero => false,
            Values::Less(_) | Values::Table(_) => widens || self.bias() == WIDE_BIAS,
        }
    }

    /// The tile that takes its unpacked blocks.
    pub(crate) const fn mode(&self, widens: bool) -> Mode {
        Mode { subs: self.subs(), minima: self.has_minima(), wide: self.is_wide(widens) }
    }
}
