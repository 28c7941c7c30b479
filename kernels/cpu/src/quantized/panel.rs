//! Panels of packed integers: writing them from the rows of a checkpoint, and reading one row back.
//!
//! The codes of a block are planes of 1, 2, 4 or 8 bits. A plane of b bits is b vectors of 64 bytes, 16 rows by 4
//! columns; the bits of group g, columns 4 g to 4 g + 3, lie in vector g % b from bit g / b * b on. So a group is one
//! shift and one mask away from its dot product.

use half::f16;

use super::kind::{Kind, Layout, Scales, Values};
use super::{BLOCK, GROUP_BYTES, GROUPS, SUPER};
use crate::simd::LANES;

/// Consecutive weights of one row: number i is `(scale * scales[s]) * integers[i] - (minimum * minima[s])` in f32, in
/// this order, where s is i over [`Kind::sub_len`]. [`Kind::block_len`] of the integers count.
#[derive(Clone, Copy, Debug)]
pub struct Integers {
    /// Over all scales.
    pub scale: f32,
    /// Over all minima.
    pub minimum: f32,
    /// One for each sub-block; 1 where scales are not nested.
    pub scales: [i8; 16],
    /// One for each sub-block; 1 where they are not nested, 0 where there are none.
    pub minima: [u8; 16],
    /// The weights before scaling.
    pub integers: [i8; SUPER],
}

impl Integers {
    /// Weights that are all 0.
    pub const ZERO: Self =
        Self { scale: 0.0, minimum: 0.0, scales: [0; 16], minima: [0; 16], integers: [0; SUPER] };
}

/// Width and first bit of the planes that hold codes of so many bits.
pub(crate) const fn planes(bits: usize) -> [(usize, usize); 2] {
    match bits {
        8 => [(8, 0), (0, 8)],
        6 => [(4, 0), (2, 4)],
        5 => [(4, 0), (1, 4)],
        4 => [(4, 0), (0, 4)],
        3 => [(2, 0), (1, 2)],
        _ => [(2, 0), (0, 2)],
    }
}

/// Writes columns `col..col + block_len` of up to 16 rows into a panel of `cols` columns.
///
/// # Panics
/// If a scale or an integer is none that the kind can hold.
pub(crate) fn write(kind: Kind, cols: usize, panel: &mut [u8], col: usize, rows: &[Integers]) {
    let layout = kind.layout();
    assert!(rows.len() <= LANES && col.is_multiple_of(kind.block_len()), "{} rows at {col}", rows.len());
    let (start, chunk) = layout.chunk_of(cols, col);
    let panel = &mut panel[start..][..chunk.end];
    if layout.scales == Scales::Nested {
        let over = &mut panel[..layout.super_bytes()];
        for (lane, row) in rows.iter().enumerate() {
            write_f16(over, lane, row.scale);
            if layout.has_minima() {
                write_f16(over, LANES + lane, row.minimum);
            }
        }
    }
    for at in (0..kind.block_len().min(cols - col)).step_by(BLOCK) {
        let block = (col + at) % SUPER / BLOCK;
        let mut zeros = [0; LANES];
        if layout.values == Values::Zero {
            zeros = zero_points(rows);
        }
        let record = &mut panel[chunk.records + block * layout.record_bytes()..][..layout.record_bytes()];
        write_record(&layout, record, at / layout.sub_len, rows);
        if layout.values == Values::Zero {
            record[layout.scale_bytes()..].copy_from_slice(&zeros);
        }
        let codes = codes(&layout, rows, at, &zeros);
        write_codes(&layout, &codes, &mut panel[chunk.codes + block * layout.code_bytes()..]);
    }
}

/// Scales and minima of a block whose first sub-block is number `first` of its row's.
fn write_record(layout: &Layout, record: &mut [u8], first: usize, rows: &[Integers]) {
    let (scales, rest) = record.split_at_mut(layout.scale_bytes());
    for (lane, row) in rows.iter().enumerate() {
        match layout.scales {
            Scales::F16 => {
                write_f16(scales, lane, row.scale * f32::from(row.scales[0]));
                if layout.has_minima() {
                    write_f16(rest, lane, row.minimum * f32::from(row.minima[0]));
                }
            }
            Scales::F32 => {
                let scale = row.scale * f32::from(row.scales[0]);
                scales[lane * 4..][..4].copy_from_slice(&scale.to_le_bytes());
            }
            Scales::Nested => {
                for sub in 0..layout.subs() {
                    scales[sub * LANES + lane] = row.scales[first + sub] as u8;
                    if layout.has_minima() {
                        rest[sub * LANES + lane] = row.minima[first + sub];
                    }
                }
            }
        }
    }
}

fn write_f16(to: &mut [u8], lane: usize, x: f32) {
    let half = f16::from_f32(x);
    assert!(half.to_f32() == x || x.is_nan(), "expected a half-precision number, found {x}");
    to[lane * 2..][..2].copy_from_slice(&half.to_le_bytes());
}

/// What makes the integers of each row's block unsigned.
fn zero_points(rows: &[Integers]) -> [u8; LANES] {
    let mut zeros = [0; LANES];
    for (zero, row) in zeros.iter_mut().zip(rows) {
        let least = row.integers[..BLOCK].iter().fold(0, |a, b| a.min(*b));
        *zero = least.unsigned_abs();
    }
    zeros
}

/// The codes of a block, group by group; rows that are not there have any, under scales of 0.
fn codes(layout: &Layout, rows: &[Integers], at: usize, zeros: &[u8; LANES]) -> [[u8; GROUP_BYTES]; GROUPS] {
    let mut codes = [[0; GROUP_BYTES]; GROUPS];
    let mut excess = 0;
    for (lane, row) in rows.iter().enumerate() {
        let own = match layout.values {
            Values::Minimum => own(row, at, i16::from),
            Values::Less(bias) => own(row, at, |n| i16::from(n) + i16::from(bias)),
            Values::Zero => own(row, at, |n| i16::from(n) + i16::from(zeros[lane])),
            Values::Table(table) => own(row, at, |n| i16::from(table.codes[usize::from(n as u8)])),
        };
        excess |= own.iter().fold(0, |excess, code| excess | code >> layout.bits);
        for (group, own) in codes.iter_mut().zip(own.as_chunks::<4>().0) {
            group[lane * 4..][..4].copy_from_slice(&own.map(|code| code as u8));
        }
    }
    assert!(excess == 0, "expected integers of {} bits, found one that has no code", layout.bits);
    codes
}

/// The codes of a row's block.
fn own(row: &Integers, at: usize, code: impl Fn(i8) -> i16) -> [i16; BLOCK] {
    let mut codes = [0; BLOCK];
    codes.iter_mut().zip(&row.integers[at..at + BLOCK]).for_each(|(to, &n)| *to = code(n));
    codes
}

fn write_codes(layout: &Layout, codes: &[[u8; GROUP_BYTES]; GROUPS], mut to: &mut [u8]) {
    for (width, first) in planes(layout.bits) {
        let (plane, rest) = to.split_at_mut(width * GROUP_BYTES);
        let vectors = plane.as_chunks_mut::<GROUP_BYTES>().0;
        vectors.fill([0; GROUP_BYTES]);
        let mask = ((1u16 << width) - 1) as u8;
        for (g, group) in codes.iter().enumerate().take(if width == 0 { 0 } else { GROUPS }) {
            for (place, code) in vectors[g % width].iter_mut().zip(group) {
                *place |= ((code >> first) & mask) << (g / width * width);
            }
        }
        to = rest;
    }
}

/// Writes one lane of a panel as f32: the numbers that the kernels multiply by, less their order of operations.
pub(crate) fn read_lane(kind: Kind, cols: usize, panel: &[u8], lane: usize, out: &mut [f32]) {
    let layout = kind.layout();
    for (i, value) in out.iter_mut().enumerate().take(cols) {
        let (start, chunk) = layout.chunk_of(cols, i);
        let over = &panel[start..][..chunk.end];
        let (block, sub) = (i % SUPER / BLOCK, i % BLOCK / layout.sub_len);
        let record = &over[chunk.records + block * layout.record_bytes()..][..layout.record_bytes()];
        let (scales, rest) = record.split_at(layout.scale_bytes());
        let scale = match layout.scales {
            Scales::F16 => read_f16(scales, lane),
            Scales::F32 => f32::from_le_bytes(*scales[lane * 4..].first_chunk().unwrap_or(&[0; 4])),
            Scales::Nested => read_f16(over, lane) * f32::from(scales[sub * LANES + lane] as i8),
        };
        let code = read_code(&layout, &over[chunk.codes + block * layout.code_bytes()..], lane, i % BLOCK);
        let integer = match layout.values {
            Values::Minimum => i16::from(code),
            Values::Less(bias) => i16::from(code) - i16::from(bias),
            Values::Zero => i16::from(code) - i16::from(rest[lane]),
            Values::Table(table) => i16::from(table.integers[usize::from(code)]),
        };
        *value = scale * f32::from(integer);
        if layout.has_minima() {
            *value -= match layout.scales {
                Scales::Nested => read_f16(over, LANES + lane) * f32::from(rest[sub * LANES + lane]),
                Scales::F16 | Scales::F32 => read_f16(rest, lane),
            };
        }
    }
}

fn read_f16(from: &[u8], lane: usize) -> f32 {
    f16::from_le_bytes([from[lane * 2], from[lane * 2 + 1]]).to_f32()
}

fn read_code(layout: &Layout, mut codes: &[u8], lane: usize, col: usize) -> u8 {
    let (g, mut code) = (col / 4, 0);
    for (width, first) in planes(layout.bits) {
        if width > 0 {
            let byte = codes[g % width * GROUP_BYTES + lane * 4 + col % 4];
            code |= ((byte >> (g / width * width)) & ((1u16 << width) - 1) as u8) << first;
        }
        codes = &codes[width * GROUP_BYTES..];
    }
    code
}
