//! The register tile of quantized products: panels of unpacked weights times rows of quantized activations.

use super::input::Record;
use super::kind::Kind;
use super::{GROUP_BYTES, GROUPS};
use crate::simd::{Bytes, LANES, Simd};

/// Where a tile reads and what it adds to.
pub(crate) struct Operands {
    /// `[blocks][8][64]`, unsigned bytes, of the first panel.
    pub(crate) codes: *const u8,
    /// Bytes from panel to panel.
    pub(crate) codes_panel: usize,
    /// `[blocks][sub-blocks][16]`
    pub(crate) scales: *const f32,
    /// Like the scales.
    pub(crate) shifts: *const f32,
    /// Floats from panel to panel of scales and of shifts.
    pub(crate) scales_panel: usize,
    /// The first block of a tile of `input_rows` rows.
    pub(crate) input: *const u8,
    pub(crate) input_rows: usize,
    pub(crate) blocks: usize,
    /// What is asked into the cache meanwhile: an address, and its distances in bytes from panel to panel and block to
    /// block.
    pub(crate) ask: *const u8,
    pub(crate) ask_panel: usize,
    pub(crate) ask_block: usize,
    /// `[rows][panels][16]`, read, added to and written.
    pub(crate) sums: *mut f32,
    /// Floats from row to row of the sums.
    pub(crate) sums_row: usize,
}

/// A compiled register tile: operands, panels, rows.
pub(crate) type CodeTileFn = unsafe fn(&Operands, usize, usize);

/// What distinguishes tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    /// Scales in a block, 1 or 2.
    pub(crate) subs: usize,
    /// Whether shifts are minima; else they belong to the integers.
    pub(crate) minima: bool,
    /// Whether bytes are wide: they exceed their integers by 128, and there are no shifts.
    pub(crate) wide: bool,
}

/// All modes that a kind has, in the order of the kernels' tables.
pub(crate) const MODES: [Mode; 6] = [
    Mode { subs: 1, minima: false, wide: true },
    Mode { subs: 2, minima: false, wide: true },
    Mode { subs: 1, minima: false, wide: false },
    Mode { subs: 1, minima: true, wide: false },
    Mode { subs: 2, minima: false, wide: false },
    Mode { subs: 2, minima: true, wide: false },
];

/// The tile of each kind, from those of each mode.
pub(crate) const fn of_kinds(
    modes: [CodeTileFn; MODES.len()],
    widens: bool,
) -> [CodeTileFn; Kind::ALL.len()] {
    let mut tiles = [modes[0]; Kind::ALL.len()];
    let mut kind = 0;
    while kind < tiles.len() {
        let wanted = Kind::ALL[kind].layout().mode(widens);
        let mut mode = 0;
        while !wanted.equals(MODES[mode]) {
            mode += 1;
        }
        tiles[kind] = modes[mode];
        kind += 1;
    }
    tiles
}

impl Mode {
    const fn equals(self, other: Self) -> bool {
        self.subs == other.subs && self.minima == other.minima && self.wide == other.wide
    }
}

/// All rows of a part of a tile, in mode number `MODE`.
///
/// # Safety
/// Codes, scales, shifts and input are readable, and the sums are exclusively ours, as far as panels, rows and blocks
/// reach.
#[inline(always)]
pub(crate) unsafe fn run<C: Bytes, const MODE: usize>(c: C, o: &Operands, panels: usize, rows: usize) {
    // Two panels share loads of activations. Where a block has two scales, three vectors of each sum are in flight.
    let most = if MODES[MODE].subs == 2 { C::SUMS / 3 } else { C::SUMS / 2 }.max(1);
    let mut row = 0;
    while row < rows {
        let count = most.min(rows - row);
        // SAFETY: each arm passes the caller's promise on for its own number of rows.
        unsafe {
            match count {
                1 => all_panels::<C, MODE, 1>(c, o, panels, row),
                2 if C::SUMS >= 4 => all_panels::<C, MODE, 2>(c, o, panels, row),
                3 if C::SUMS >= 6 => all_panels::<C, MODE, 3>(c, o, panels, row),
                4 if C::SUMS >= 8 => all_panels::<C, MODE, 4>(c, o, panels, row),
                5 if C::SUMS >= 10 => all_panels::<C, MODE, 5>(c, o, panels, row),
                _ if C::SUMS >= 12 => all_panels::<C, MODE, 6>(c, o, panels, row),
                _ => {}
            }
        }
        row += count;
    }
}

/// As many panels at a time as the registers hold.
///
/// # Safety
/// As [`run`], for `T` rows from `row`.
#[inline(always)]
unsafe fn all_panels<C: Bytes, const MODE: usize, const T: usize>(
    c: C,
    o: &Operands,
    panels: usize,
    row: usize,
) {
    let mut p = 0;
    while p < panels {
        let left = panels - p;
        // SAFETY: p + the tile's panels <= panels.
        unsafe {
            if left >= 4 && 4 * T <= C::SUMS {
                tile::<C, MODE, 4, T>(c, o, p, row);
                p += 4;
            } else if left >= 2 && 2 * T <= C::SUMS {
                tile::<C, MODE, 2, T>(c, o, p, row);
                p += 2;
            } else {
                tile::<C, MODE, 1, T>(c, o, p, row);
                p += 1;
            }
        }
    }
}

/// `P` panels from `first` times `T` rows from `row`.
///
/// # Safety
/// As [`run`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices over small const bounds unroll; iterators do not")]
unsafe fn tile<C: Bytes, const MODE: usize, const P: usize, const T: usize>(
    c: C,
    o: &Operands,
    first: usize,
    row: usize,
) {
    let mode = const { MODES[MODE] };
    let s = c.floats();
    // SAFETY: all pointers stay inside what the caller vouches for; the last steps go past it but are not read.
    unsafe {
        let sums = o.sums.add(row * o.sums_row + first * LANES);
        let mut acc = [[s.splat(0.0); P]; T];
        for t in 0..T {
            for p in 0..P {
                acc[t][p] = s.read(sums.add(t * o.sums_row + p * LANES));
            }
        }
        let mut codes = o.codes.add(first * o.codes_panel);
        let mut at = first * o.scales_panel;
        let mut input = Record::new(o.input, o.input_rows);
        let mut ask = o.ask.wrapping_add(first * o.ask_panel);
        for _ in 0..o.blocks {
            for p in 0..P {
                let mut line = 0;
                while line < o.ask_block {
                    s.prefetch(ask.wrapping_add(p * o.ask_panel + line));
                    line += GROUP_BYTES;
                }
            }
            ask = ask.wrapping_add(o.ask_block);
            let mut part = [[s.splat(0.0); P]; T];
            for sub in 0..mode.subs {
                let dots = dots::<C, MODE, P, T>(c, (codes, o.codes_panel), input, (row, sub));
                for t in 0..T {
                    let total = s.splat(*input.sum(row + t, sub, mode.subs));
                    for p in 0..P {
                        let own = at + p * o.scales_panel + sub * LANES;
                        let (scale, shift) = (s.read(o.scales.add(own)), s.read(o.shifts.add(own)));
                        let mut dot = c.to_f32(dots[t][p]);
                        if !mode.minima && !mode.wide {
                            // Exact: all numbers are integers below 2^24.
                            dot = s.fma(shift, total, dot);
                        }
                        part[t][p] = if sub == 0 { s.mul(dot, scale) } else { s.fma(dot, scale, part[t][p]) };
                        if mode.minima {
                            part[t][p] = s.fma(shift, total, part[t][p]);
                        }
                    }
                }
            }
            for t in 0..T {
                let size = s.splat(*input.size(row + t));
                for p in 0..P {
                    acc[t][p] = s.fma(part[t][p], size, acc[t][p]);
                }
            }
            codes = codes.wrapping_add(GROUPS * GROUP_BYTES);
            at += mode.subs * LANES;
            input = input.next();
        }
        for t in 0..T {
            for p in 0..P {
                s.write(sums.add(t * o.sums_row + p * LANES), acc[t][p]);
            }
        }
    }
}

/// The integer sums of one sub-block.
///
/// # Safety
/// As [`run`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices over small const bounds unroll; iterators do not")]
unsafe fn dots<C: Bytes, const MODE: usize, const P: usize, const T: usize>(
    c: C,
    (codes, panel): (*const u8, usize),
    input: Record,
    (row, sub): (usize, usize),
) -> [[C::I; P]; T] {
    let mode = const { MODES[MODE] };
    let mut dots = [[c.no_sum(); P]; T];
    if mode.wide && !C::SIGNED {
        for t in 0..T {
            // SAFETY: inside the block, which the caller vouches for.
            dots[t] = [unsafe { c.sum_from(input.start(row + t, sub, mode.subs)) }; P];
        }
    }
    let groups = GROUPS / mode.subs;
    for group in sub * groups..(sub + 1) * groups {
        // SAFETY: inside the block, which the caller vouches for.
        unsafe {
            let mut w = [c.read_bytes(codes.add(group * GROUP_BYTES)); P];
            for p in 1..P {
                w[p] = c.read_bytes(codes.add(p * panel + group * GROUP_BYTES));
            }
            for t in 0..T {
                let four = c.read_four(input.numbers(row + t, group * 4));
                for p in 0..P {
                    dots[t][p] = if mode.wide {
                        c.dot::<true>(dots[t][p], w[p], four)
                    } else {
                        c.dot::<false>(dots[t][p], w[p], four)
                    };
                }
            }
        }
    }
    dots
}
