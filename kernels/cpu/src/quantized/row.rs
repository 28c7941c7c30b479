//! Products of one row: the codes of panels are unpacked in registers and multiplied at once, so that the memory's
//! rate is what bounds them. The operations of an output element and their order are those of [`super::tile`].

use super::input::Record;
use super::kind::Kind;
use super::unpack::{self, Floats, Over};
use super::{CHUNK, GROUP_BYTES, GROUPS};
use crate::simd::{Bytes, LANES, Simd};

/// Where the product of a row reads and what it adds to.
pub(crate) struct RowOperands {
    /// The first of panels that lie one behind the other.
    pub(crate) panels: *const u8,
    /// Bytes of a panel.
    pub(crate) panel_bytes: usize,
    /// Blocks of a panel.
    pub(crate) blocks: usize,
    /// A tile of one quantized row.
    pub(crate) input: *const u8,
    /// `[panels][16]`, read, added to and written.
    pub(crate) sums: *mut f32,
}

/// A compiled product of a row: operands, panels.
pub(crate) type RowFn = unsafe fn(&RowOperands, usize);

/// Adds the products of all columns of panels of kind number `KIND`.
///
/// # Safety
/// The panels and the row are readable, and the sums are exclusively ours, as far as panels and blocks reach.
#[inline(always)]
pub(crate) unsafe fn run<C: Bytes, const KIND: usize>(c: C, o: &RowOperands, panels: usize) {
    let mut p = 0;
    while p < panels {
        let left = panels - p;
        // SAFETY: p + the panels in flight <= panels.
        unsafe {
            if left >= 4 && C::SUMS >= 12 {
                in_flight::<C, KIND, 4>(c, o, p);
                p += 4;
            } else if left >= 2 && C::SUMS < 12 {
                in_flight::<C, KIND, 2>(c, o, p);
                p += 2;
            } else {
                in_flight::<C, KIND, 1>(c, o, p);
                p += 1;
            }
        }
    }
}

/// `P` panels from `first`, each one a stream from memory.
///
/// # Safety
/// As [`run`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices over small const bounds unroll; iterators do not")]
unsafe fn in_flight<C: Bytes, const KIND: usize, const P: usize>(c: C, o: &RowOperands, first: usize) {
    let layout = const { Kind::ALL[KIND].layout() };
    // Lines of the next chunk that are asked for with each block of this one.
    let lines = const { Kind::ALL[KIND].layout().lines() };
    let s = c.floats();
    // SAFETY: all reads stay inside what the caller vouches for; any address may be asked for.
    unsafe {
        let sums = o.sums.add(first * LANES);
        let mut acc = [s.splat(0.0); P];
        for p in 0..P {
            acc[p] = s.read(sums.add(p * LANES));
        }
        let start = o.panels.add(first * o.panel_bytes);
        let mut chunk = start;
        let mut input = Record::new(o.input, 1);
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
                let part = block::<C, KIND, P>(c, &over, (record, codes, o.panel_bytes), input);
                let size = s.splat(*input.size(0));
                for p in 0..P {
                    acc[p] = s.fma(part[p], size, acc[p]);
                }
                record = record.wrapping_add(layout.record_bytes());
                codes = codes.wrapping_add(layout.code_bytes());
                input = input.next();
            }
            chunk = next;
        }
        for p in 0..P {
            s.write(sums.add(p * LANES), acc[p]);
        }
    }
}

/// What a block adds to the sums, less its activations' size.
///
/// # Safety
/// As [`run`], for the block whose scales and codes are given, with the bytes from panel to panel.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices over small const bounds unroll; iterators do not")]
unsafe fn block<C: Bytes, const KIND: usize, const P: usize>(
    c: C,
    over: &[Over<C>; P],
    (record, codes, panel): (*const u8, *const u8, usize),
    input: Record,
) -> [Floats<C>; P] {
    let layout = const { Kind::ALL[KIND].layout() };
    // Widening codes would cost more than it saves for one row.
    let mode = const { Kind::ALL[KIND].layout().mode(false) };
    let s = c.floats();
    let mut dots = [[c.no_sum(); P]; 2];
    let mut part = [s.splat(0.0); P];
    // SAFETY: inside the block, which the caller vouches for.
    unsafe {
        if mode.wide && !C::SIGNED {
            for sub in 0..mode.subs {
                dots[sub] = [c.sum_from(input.start(0, sub, mode.subs)); P];
            }
        }
        macro_rules! groups {
            ($($group:literal)*) => {$(
                let four = c.read_four(input.numbers(0, $group * 4));
                let sub = $group * mode.subs / GROUPS;
                for p in 0..P {
                    let codes = codes.wrapping_add(p * panel);
                    let bytes = unpack::group::<C, KIND, $group>(c, codes, false);
                    dots[sub][p] = if mode.wide {
                        c.dot::<true>(dots[sub][p], bytes, four)
                    } else {
                        c.dot::<false>(dots[sub][p], bytes, four)
                    };
                }
            )*};
        }
        groups!(0 1 2 3 4 5 6 7);
        for sub in 0..mode.subs {
            let total = s.splat(*input.sum(0, sub, mode.subs));
            for p in 0..P {
                let record = record.wrapping_add(p * panel);
                let (scale, shift) = unpack::scale_and_shift(c, &layout, over[p], record, sub);
                let mut dot = c.to_f32(dots[sub][p]);
                if !mode.minima && !mode.wide {
                    // Exact: all numbers are integers below 2^24.
                    dot = s.fma(shift, total, dot);
                }
                part[p] = if sub == 0 { s.mul(dot, scale) } else { s.fma(dot, scale, part[p]) };
                if mode.minima {
                    part[p] = s.fma(shift, total, part[p]);
                }
            }
        }
    }
    part
}
