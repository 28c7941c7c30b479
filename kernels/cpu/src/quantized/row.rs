//! Products of few rows: the codes of panels are unpacked in registers and multiplied at once, so that the memory's rate
//! is what bounds them. The operations of an output element and their order are those of [`super::tile`].

use super::input::Record;
use super::kind::Kind;
use super::unpack::{self, Floats, Over};
use super::{CHUNK, GROUP_BYTES, GROUPS};
use crate::simd::{Bytes, LANES, Simd};

/// Where such a product reads and what it adds to.
pub(crate) struct RowOperands {
    /// The first of panels that lie one behind the other.
    pub(crate) panels: *const u8,
    /// Bytes of a panel.
    pub(crate) panel_bytes: usize,
    /// Blocks of a panel.
    pub(crate) blocks: usize,
    /// A tile of quantized rows.
    pub(crate) input: *const u8,
    pub(crate) input_rows: usize,
    /// `[rows][panels][16]`, read, added to and written.
    pub(crate) sums: *mut f32,
    /// Floats from row to row of the sums.
    pub(crate) sums_row: usize,
}

/// A compiled product of few rows: operands, panels, rows.
pub(crate) type RowFn = unsafe fn(&RowOperands, usize, usize);

/// Rows up to which unpacking in registers is faster than unpacking for all rows at once.
pub(crate) const fn rows_max<C: Bytes>() -> usize {
    if has_room::<C>() { C::Floats::TILE } else { 1 }
}

/// Whether the registers hold sums of several rows beside what unpacking needs.
const fn has_room<C: Bytes>() -> bool {
    C::SUMS >= 12
}

/// Adds the products of all columns of panels of kind number `KIND`.
///
/// # Safety
/// The panels and the rows are readable, and the sums are exclusively ours, as far as panels, rows and blocks reach.
#[inline(always)]
pub(crate) unsafe fn run<C: Bytes, const KIND: usize>(c: C, o: &RowOperands, panels: usize, rows: usize) {
    let mut p = 0;
    while p < panels {
        let left = panels - p;
        // SAFETY: p + the panels in flight <= panels.
        unsafe {
            if left >= 4 && rows == 1 && has_room::<C>() {
                in_flight::<C, KIND, 4, 1>(c, o, (p, 0));
                p += 4;
            } else if left >= 2 {
                all_rows::<C, KIND>(c, o, p, rows);
                p += 2;
            } else {
                for row in 0..rows {
                    in_flight::<C, KIND, 1, 1>(c, o, (p, row));
                }
                p += 1;
            }
        }
    }
}

/// Two panels: the first rows bring them near, the others find them there.
///
/// # Safety
/// As [`run`], for two panels from `first`.
#[inline(always)]
unsafe fn all_rows<C: Bytes, const KIND: usize>(c: C, o: &RowOperands, first: usize, rows: usize) {
    let mut row = 0;
    while row < rows {
        let left = rows - row;
        // SAFETY: row + the rows in flight <= rows.
        unsafe {
            if left >= 4 && has_room::<C>() {
                in_flight::<C, KIND, 2, 4>(c, o, (first, row));
                row += 4;
            } else if left == 3 && has_room::<C>() {
                in_flight::<C, KIND, 2, 3>(c, o, (first, row));
                row += 3;
            } else if left == 2 && has_room::<C>() {
                in_flight::<C, KIND, 2, 2>(c, o, (first, row));
                row += 2;
            } else {
                in_flight::<C, KIND, 2, 1>(c, o, (first, row));
                row += 1;
            }
        }
    }
}

/// `P` panels from `first`, each one a stream from memory, times `T` rows from `row`.
///
/// # Safety
/// As [`run`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices over small const bounds unroll; iterators do not")]
unsafe fn in_flight<C: Bytes, const KIND: usize, const P: usize, const T: usize>(
    c: C,
    o: &RowOperands,
    (first, row): (usize, usize),
) {
    let layout = const { Kind::ALL[KIND].layout() };
    // Lines of the next chunk that are asked for with each block of this one.
    let lines = const { Kind::ALL[KIND].layout().lines() };
    let s = c.floats();
    // SAFETY: all reads stay inside what the caller vouches for; any address may be asked for.
    unsafe {
        let sums = o.sums.add(row * o.sums_row + first * LANES);
        let mut acc = [[s.splat(0.0); P]; T];
        for t in 0..T {
            for p in 0..P {
                acc[t][p] = s.read(sums.add(t * o.sums_row + p * LANES));
            }
        }
        let start = o.panels.add(first * o.panel_bytes);
        let mut chunk = start;
        let mut input = Record::new(o.input, o.input_rows);
        let mut left = o.blocks;
        while left > 0 {
            let blocks = left.min(CHUNK);
            let parts = layout.chunk(blocks);
            left -= blocks;
            let next = chunk.wrapping_add(parts.end);
            // At the end of these panels, the ones behind them are next.
            let mut ask = if left > 0 { next } else { start.wrapping_add(P * o.panel_bytes) };
            let mut over = [unpack::over(c, &layout, chunk); P];
            for p in 1..P {
                over[p] = unpack::over(c, &layout, chunk.wrapping_add(p * o.panel_bytes));
            }
            let mut record = chunk.wrapping_add(parts.records);
            let mut codes = chunk.wrapping_add(parts.codes);
            for _ in 0..blocks {
                for p in 0..P {
                    for line in 0..lines {
                        s.prefetch(ask.wrapping_add(p * o.panel_bytes + line * GROUP_BYTES));
                    }
                }
                ask = ask.wrapping_add(lines * GROUP_BYTES);
                let mut part = [[s.splat(0.0); P]; T];
                let place = (record, codes, o.panel_bytes);
                add_sub::<C, KIND, P, T, 0>(c, &over, place, (input, row), &mut part);
                if layout.subs() == 2 {
                    add_sub::<C, KIND, P, T, 1>(c, &over, place, (input, row), &mut part);
                }
                for t in 0..T {
                    let size = s.splat(*input.size(row + t));
                    for p in 0..P {
                        acc[t][p] = s.fma(part[t][p], size, acc[t][p]);
                    }
                }
                record = record.wrapping_add(layout.record_bytes());
                codes = codes.wrapping_add(layout.code_bytes());
                input = input.next();
            }
            chunk = next;
        }
        for t in 0..T {
            for p in 0..P {
                s.write(sums.add(t * o.sums_row + p * LANES), acc[t][p]);
            }
        }
    }
}

/// Adds what sub-block `SUB` of a block contributes, less its activations' size.
///
/// # Safety
/// As [`run`], for the block whose scales and codes are given, with the bytes from panel to panel.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices over small const bounds unroll; iterators do not")]
unsafe fn add_sub<C: Bytes, const KIND: usize, const P: usize, const T: usize, const SUB: usize>(
    c: C,
    over: &[Over<C>; P],
    (record, codes, panel): (*const u8, *const u8, usize),
    (input, row): (Record, usize),
    part: &mut [[Floats<C>; P]; T],
) {
    let layout = const { Kind::ALL[KIND].layout() };
    // Widening codes would cost more than it saves for few rows.
    let mode = const { Kind::ALL[KIND].layout().mode(false) };
    let s = c.floats();
    let mut dots = [[c.no_sum(); P]; T];
    // SAFETY: inside the block, which the caller vouches for.
    unsafe {
        if mode.wide && !C::SIGNED {
            for t in 0..T {
                dots[t] = [c.sum_from(input.start(row + t, SUB, mode.subs)); P];
            }
        }
        macro_rules! groups {
            ($($group:literal)*) => {$(
                if $group * mode.subs / GROUPS == SUB {
                    let mut bytes = [unpack::group::<C, KIND, $group>(c, codes, false); P];
                    for p in 1..P {
                        bytes[p] = unpack::group::<C, KIND, $group>(c, codes.wrapping_add(p * panel), false);
                    }
                    for t in 0..T {
                        let four = c.read_four(input.numbers(row + t, $group * 4));
                        for p in 0..P {
                            dots[t][p] = if mode.wide {
                                c.dot::<true>(dots[t][p], bytes[p], four)
                            } else {
                                c.dot::<false>(dots[t][p], bytes[p], four)
                            };
                        }
                    }
                }
            )*};
        }
        groups!(0 1 2 3 4 5 6 7);
        for p in 0..P {
            let record = record.wrapping_add(p * panel);
            let (scale, shift) = unpack::scale_and_shift(c, &layout, over[p], record, SUB);
            for t in 0..T {
                let total = s.splat(*input.sum(row + t, SUB, mode.subs));
                let mut dot = c.to_f32(dots[t][p]);
                if !mode.minima && !mode.wide {
                    // Exact: all numbers are integers below 2^24.
                    dot = s.fma(shift, total, dot);
                }
                part[t][p] = if SUB == 0 { s.mul(dot, scale) } else { s.fma(dot, scale, part[t][p]) };
                if mode.minima {
                    part[t][p] = s.fma(shift, total, part[t][p]);
                }
            }
        }
    }
}
