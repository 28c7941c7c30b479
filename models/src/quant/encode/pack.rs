//! Codes and scales into the bytes of a block: the inverse of the decoders.

use half::f16;

use super::{Affine, code, half, inverse};
use crate::quant::{BLOCK_LEN_MAX, MXFP4_LEVELS, SUBS_MAX, mxfp4_scale};

/// One scale and codes of 8 bits: there is nothing to search for that would show.
pub(super) fn q8_0(x: &[f32], out: &mut [u8]) {
    let largest = x.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    let d = half(largest / 127.0);
    let inverse = inverse(d.to_f32());
    out[..2].copy_from_slice(&d.to_le_bytes());
    for (to, &v) in out[2..].iter_mut().zip(x) {
        *to = code(v, inverse, -127, 127) as i8 as u8;
    }
}

fn nibbles(codes: &[u8], out: &mut [u8]) {
    let (low, high) = codes.split_at(16);
    for (i, to) in out.iter_mut().enumerate() {
        *to = low[i] & 15 | (high[i] & 15) << 4;
    }
}

fn fifths(codes: &[u8]) -> [u8; 4] {
    codes.iter().enumerate().fold(0u32, |bits, (i, &c)| bits | u32::from(c >> 4 & 1) << i).to_le_bytes()
}

pub(super) fn q4_0(d: f16, codes: &[u8], out: &mut [u8]) {
    out[..2].copy_from_slice(&d.to_le_bytes());
    nibbles(codes, &mut out[2..]);
}

pub(super) fn q5_0(d: f16, codes: &[u8], out: &mut [u8]) {
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..6].copy_from_slice(&fifths(codes));
    nibbles(codes, &mut out[6..]);
}

pub(super) fn q4_1(d: f16, m: f16, codes: &[u8], out: &mut [u8]) {
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&m.to_le_bytes());
    nibbles(codes, &mut out[4..]);
}

pub(super) fn q5_1(d: f16, m: f16, codes: &[u8], out: &mut [u8]) {
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&m.to_le_bytes());
    out[4..8].copy_from_slice(&fifths(codes));
    nibbles(codes, &mut out[8..]);
}

/// d, dmin, and eight scales and minima of 6 bits in 12 bytes.
fn head(b: &Affine, out: &mut [u8]) {
    out[..2].copy_from_slice(&b.d.to_le_bytes());
    out[2..4].copy_from_slice(&b.dmin.to_le_bytes());
    for i in 0..4 {
        out[4 + i] = b.scales[i] | b.scales[i + 4] >> 4 << 6;
        out[8 + i] = b.mins[i] | b.mins[i + 4] >> 4 << 6;
        out[12 + i] = b.scales[i + 4] & 15 | (b.mins[i + 4] & 15) << 4;
    }
}

/// 64 codes in 32 bytes, those of the first half low.
fn halves(codes: &[u8; BLOCK_LEN_MAX], out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(64).zip(out.chunks_exact_mut(32)) {
        let (low, high) = codes.split_at(32);
        out.iter_mut().enumerate().for_each(|(i, to)| *to = low[i] & 15 | (high[i] & 15) << 4);
    }
}

pub(super) fn q4_k(b: &Affine, out: &mut [u8]) {
    head(b, out);
    halves(&b.codes, &mut out[16..]);
}

pub(super) fn q5_k(b: &Affine, out: &mut [u8]) {
    head(b, out);
    let (high, low) = out[16..].split_at_mut(32);
    high.fill(0);
    for (i, c) in b.codes.iter().enumerate() {
        high[i % 32] |= (c >> 4 & 1) << (i / 32);
    }
    halves(&b.codes, low);
}

pub(super) fn q6_k(d: f16, scales: &[i8; SUBS_MAX], codes: &[u8; BLOCK_LEN_MAX], out: &mut [u8]) {
    out.fill(0);
    for (i, c) in codes.iter().enumerate() {
        out[i / 128 * 64 + i % 64] |= (c & 15) << (i / 64 % 2 * 4);
        out[128 + i / 128 * 32 + i % 32] |= (c >> 4) << (i / 32 % 4 * 2);
    }
    out[192..208].iter_mut().zip(scales).for_each(|(to, &s)| *to = s as u8);
    out[208..].copy_from_slice(&d.to_le_bytes());
}

/// The power of two under which the largest number is below 8, as the specification rounds (so that what was MXFP4 stays
/// as it is), and the nearest level.
pub(super) fn mxfp4(x: &[f32], out: &mut [u8]) {
    const BIAS: i32 = 127;
    /// Exponent of the largest level, 6.
    const LEVEL_EXPONENT: i32 = 2;
    let largest = x.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    // the exponent field of a normal number; 0 for zero and what is smaller
    let exponent = (largest.to_bits() >> 23) as i32 - BIAS;
    let e = (exponent - LEVEL_EXPONENT + BIAS).clamp(0, 254) as u8;
    let inverse = inverse(mxfp4_scale(e));
    let level = |v: f32| {
        let v = v * inverse;
        let distance = |level: i8| (v - f32::from(level)).abs();
        let nearest = (0..16u8).min_by(|&a, &b| {
            let of = |n: u8| distance(MXFP4_LEVELS[usize::from(n)]);
            of(a).total_cmp(&of(b))
        });
        nearest.unwrap_or_default()
    };
    out[0] = e;
    let mut codes = [0; 32];
    codes.iter_mut().zip(x).for_each(|(to, &v)| *to = level(v));
    nibbles(&codes, &mut out[1..]);
}
