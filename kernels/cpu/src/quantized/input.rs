//! Activations for quantized products: 8 bits each, with a size and sums for every 32 columns of a row.
//!
//! For the values x of a block, `greatest = max |x|`, `size = greatest / 127` and `q = round(x * (127 / greatest))`, to
//! the nearest and to even between two. A block whose values are all below 2^-100 is 0; one that holds a NaN or an
//! infinity has a NaN as its size.

use super::BLOCK;
use super::kind::WIDE_BIAS;
use crate::simd::{Bytes, LANES, Simd};

/// Bytes of one row of a block: the numbers, their size, and the sums of all of them and of each half; what sums of
/// products with wide bytes begin with, for all and each half.
pub(crate) const ROW_BYTES: usize = BLOCK + 4 * PLANES;

/// f32 of one row of a block.
const PLANES: usize = 7;

/// Floats that the rows of an input take.
pub(crate) fn len(rows: usize, cols: usize) -> usize {
    rows * cols / BLOCK * ROW_BYTES / 4
}

/// A block of a tile of `rows` rows: `[rows][32]` numbers, then planes `[rows]` of f32 or i32.
#[derive(Clone, Copy)]
pub(crate) struct Record {
    start: *const u8,
    rows: usize,
}

impl Record {
    /// The block at `start`.
    #[inline(always)]
    pub(crate) fn new(start: *const u8, rows: usize) -> Self {
        Self { start, rows }
    }

    /// The numbers of a row, from column `col` on.
    #[inline(always)]
    pub(crate) fn numbers(self, row: usize, col: usize) -> *const u8 {
        self.start.wrapping_add(row * BLOCK + col)
    }

    #[inline(always)]
    fn plane(self, plane: usize, row: usize) -> *const f32 {
        self.start.wrapping_add(self.rows * BLOCK).cast::<f32>().wrapping_add(plane * self.rows + row)
    }

    /// What a row's numbers are multiplied by.
    #[inline(always)]
    pub(crate) fn size(self, row: usize) -> *const f32 {
        self.plane(0, row)
    }

    /// The sum of a row's numbers: of all, or of half number `sub` where a block has two sub-blocks.
    #[inline(always)]
    pub(crate) fn sum(self, row: usize, sub: usize, subs: usize) -> *const f32 {
        self.plane(if subs == 1 { 1 } else { 2 + sub }, row)
    }

    /// What a sum of products with wide bytes begins with: -[`WIDE_BIAS`] times the sum of the row's numbers.
    #[inline(always)]
    pub(crate) fn start(self, row: usize, sub: usize, subs: usize) -> *const i32 {
        self.plane(if subs == 1 { 4 } else { 5 + sub }, row).cast()
    }

    /// The same rows' next block.
    #[inline(always)]
    pub(crate) fn next(self) -> Self {
        Self { start: self.start.wrapping_add(self.rows * ROW_BYTES), rows: self.rows }
    }
}

/// Adding it rounds to an integer, whose low bits are then those of the sum.
const ROUND: f32 = 12_582_912.0;

/// Below it a block counts as 0: 127 over it is still finite.
const LEAST: f32 = f32::from_bits((127 - 100) << 23);

/// Quantizes `values`, whole blocks, as row `row` of a tile of `rows` rows.
///
/// # Safety
/// `tile` is writable for all blocks of `rows` rows.
#[inline(always)]
pub(crate) unsafe fn quantize<C: Bytes>(c: C, values: &[f32], tile: *mut u8, row: usize, rows: usize) {
    let s = c.floats();
    let mut record = Record::new(tile, rows);
    for block in values.as_chunks::<BLOCK>().0 {
        let (halves, _) = block.as_chunks::<LANES>();
        let x = [s.load(&halves[0]), s.load(&halves[1])];
        let greatest = s.maximum(s.max(s.abs(x[0]), s.abs(x[1])));
        // 0, or NaN where a value is not finite.
        let flaw = s.sum(s.add(s.mul(x[0], s.splat(0.0)), s.mul(x[1], s.splat(0.0))));
        let (size, inverse) =
            if greatest < LEAST { (0.0, 0.0) } else { (greatest / 127.0, 127.0 / greatest) };
        // No closures here: they have not the instructions of the function that they are in.
        let (inverse, round) = (s.splat(inverse), s.splat(ROUND));
        let rounded = [s.add(s.mul(x[0], inverse), round), s.add(s.mul(x[1], inverse), round)];
        let sums = [s.sum(s.sub(rounded[0], round)), s.sum(s.sub(rounded[1], round))];
        // SAFETY: the row's places in this block's record, which the caller vouches for.
        unsafe {
            c.write_low_bytes(record.numbers(row, 0).cast_mut(), rounded[0]);
            c.write_low_bytes(record.numbers(row, LANES).cast_mut(), rounded[1]);
            let sums = [sums[0] + sums[1], sums[0], sums[1]];
            record.size(row).cast_mut().write(size + flaw);
            for (plane, sum) in sums.into_iter().enumerate() {
                record.plane(1 + plane, row).cast_mut().write(sum);
                let start = -i32::from(WIDE_BIAS) * sum as i32;
                record.plane(4 + plane, row).cast::<i32>().cast_mut().write(start);
            }
        }
        record = record.next();
    }
}
