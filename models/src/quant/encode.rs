//! Numbers into blocks: scales are searched for so that the weighted squared error is least. Deterministic: a row's
//! bytes depend on its numbers only.
//!
//! Of a block's codes and its scale each follows from the other: rounding gives the codes of a scale, least squares the
//! scale of codes. Candidates around the scale that just reaches the largest number are refined that way, and the best
//! is kept (the idea of the K formats, <https://github.com/ggml-org/llama.cpp/pull/1684>).

use half::{bf16, f16};

use super::{BLOCK_LEN_MAX, SUBS_MAX};
use crate::weights::DType;

mod pack;

/// Candidates on each side of the obvious scale, and the part of a code by which the largest moves between two.
const CANDIDATES: i32 = 9;
const CANDIDATE_STEP: f32 = 0.1;

/// The type as bytes: a row of finite numbers, `dtype.row_bytes(row.len())` long.
///
/// # Panics
/// If `out` has another length, or the type is none that is written ([`can_encode`]).
pub fn encode_row(dtype: DType, row: &[f32], out: &mut [u8]) {
    assert_eq!(dtype.row_bytes(row.len()), Some(out.len()), "bytes for {} numbers of {dtype:?}", row.len());
    let Some(format) = dtype.format() else {
        match dtype {
            DType::F32 => floats(row, out, f32::to_le_bytes),
            DType::F16 => floats(row, out, |x| f16::from_f32(x).to_le_bytes()),
            DType::BF16 => floats(row, out, |x| bf16::from_f32(x).to_le_bytes()),
            _ => panic!("{dtype:?} is not written"),
        }
        return;
    };
    for (x, out) in row.chunks_exact(format.block_len).zip(out.chunks_exact_mut(format.block_bytes)) {
        match dtype {
            DType::Q8_0 => pack::q8_0(x, out),
            DType::Q4_0 => signed_small(x, -8, 7, |d, codes| pack::q4_0(d, codes, out)),
            DType::Q5_0 => signed_small(x, -16, 15, |d, codes| pack::q5_0(d, codes, out)),
            DType::Q4_1 => affine_small(x, 15, |d, m, codes| pack::q4_1(d, m, codes, out)),
            DType::Q5_1 => affine_small(x, 31, |d, m, codes| pack::q5_1(d, m, codes, out)),
            DType::Q4K => affine_large(x, 15, |b| pack::q4_k(&b, out)),
            DType::Q5K => affine_large(x, 31, |b| pack::q5_k(&b, out)),
            DType::Q6K => signed_large(x, |d, scales, codes| pack::q6_k(d, scales, codes, out)),
            DType::Mxfp4 => pack::mxfp4(x, out),
            _ => panic!("{dtype:?} is not written"),
        }
    }
}

/// Whether [`encode_row`] writes a type.
pub fn can_encode(dtype: DType) -> bool {
    !matches!(dtype, DType::F8 | DType::Q2K | DType::Q3K | DType::Iq4Nl | DType::Int4 | DType::Int8)
}

fn floats<const N: usize>(row: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
    for (x, to) in row.iter().zip(out.as_chunks_mut::<N>().0) {
        *to = bytes(*x);
    }
}

/// The half float next to a scale, never infinite.
fn half(scale: f32) -> f16 {
    f16::from_f32(scale.clamp(-f16::MAX.to_f32(), f16::MAX.to_f32()))
}

fn code(x: f32, inverse: f32, least: i32, most: i32) -> i32 {
    ((x * inverse).round_ties_even() as i32).clamp(least, most)
}

/// What a number's error counts: large ones weigh more, and the more so the less there is of them.
fn signed_weight(x: f32) -> f32 {
    x * x
}

/// The scale d for which codes from `least` (negative) to `most` times d are nearest to x.
fn signed_scale(x: &[f32], least: i32, most: i32) -> f32 {
    let largest = x.iter().copied().fold(0.0f32, |a, b| if b.abs() > a.abs() { b } else { a });
    if largest == 0.0 {
        return 0.0;
    }
    let (mut best, mut best_gain) = (0.0, 0.0f64);
    for candidate in -CANDIDATES..=CANDIDATES {
        // the largest number gets the code of largest magnitude, or nearly
        let inverse = (least as f32 + CANDIDATE_STEP * candidate as f32) / largest;
        let (mut xq, mut qq) = (0.0f64, 0.0f64);
        for &v in x {
            let (w, q) = (f64::from(signed_weight(v)), f64::from(code(v, inverse, least, most)));
            xq += w * f64::from(v) * q;
            qq += w * q * q;
        }
        // the error of the best scale for these codes is less by this than that of zeros
        if qq > 0.0 && xq * xq > best_gain * qq {
            (best, best_gain) = ((xq / qq) as f32, xq * xq / qq);
        }
    }
    best
}

/// The scale and the minimum (at most 0) for which codes up to `most` times the scale plus the minimum are nearest to x.
fn affine_scale(x: &[f32], most: i32) -> (f32, f32) {
    let least = x.iter().copied().fold(0.0, f32::min);
    let largest = x.iter().copied().fold(f32::MIN, f32::max);
    if largest <= least {
        return (0.0, least);
    }
    let mean_square = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
    let weight = |v: f32| f64::from(mean_square.sqrt() + v.abs());
    let error = |d: f32, m: f32, inverse: f32| -> f64 {
        let of = |v: f32| f64::from(d * code(v - m, inverse, 0, most) as f32 + m - v);
        x.iter().map(|&v| weight(v) * of(v) * of(v)).sum()
    };
    let plain = (largest - least) / most as f32;
    let mut best = (plain, least);
    let mut best_error = error(plain, least, 1.0 / plain);
    for candidate in -CANDIDATES..=CANDIDATES {
        let inverse = (most as f32 + CANDIDATE_STEP * candidate as f32) / (largest - least);
        let (mut w1, mut wq, mut wqq, mut wx, mut wxq) = (0.0f64, 0.0, 0.0, 0.0, 0.0);
        for &v in x {
            let (w, q) = (weight(v), f64::from(code(v - least, inverse, 0, most)));
            w1 += w;
            wq += w * q;
            wqq += w * q * q;
            wx += w * f64::from(v);
            wxq += w * f64::from(v) * q;
        }
        let determinant = w1 * wqq - wq * wq;
        if determinant <= 0.0 {
            continue;
        }
        let mut d = (w1 * wxq - wq * wx) / determinant;
        let mut m = (wqq * wx - wq * wxq) / determinant;
        if m > 0.0 {
            (d, m) = (wxq / wqq, 0.0);
        }
        let (d, m) = (d as f32, m as f32);
        if d > 0.0 && error(d, m, 1.0 / d) < best_error {
            best_error = error(d, m, 1.0 / d);
            best = (d, m);
        }
    }
    best
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn signed_small(x: &[f32], least: i32, most: i32, pack: impl FnOnce(f16, &[u8])) {
    let d = half(signed_scale(x, least, most));
    let inverse = inverse(d.to_f32());
    let mut codes = [0; 32];
    for (to, &v) in codes.iter_mut().zip(x) {
        *to = (code(v, inverse, least, most) - least) as u8;
    }
    pack(d, &codes);
}

fn affine_small(x: &[f32], most: i32, pack: impl FnOnce(f16, f16, &[u8])) {
    let (d, m) = affine_scale(x, most);
    let (d, m) = (half(d), half(m));
    let inverse = inverse(d.to_f32());
    let mut codes = [0; 32];
    for (to, &v) in codes.iter_mut().zip(x) {
        *to = code(v - m.to_f32(), inverse, 0, most) as u8;
    }
    pack(d, m, &codes);
}

/// A block of 256 with scale and minimum for each 32.
struct Affine {
    d: f16,
    dmin: f16,
    scales: [u8; 8],
    mins: [u8; 8],
    codes: [u8; BLOCK_LEN_MAX],
}

fn affine_large(x: &[f32], most: i32, pack: impl FnOnce(Affine)) {
    const SUB: usize = 32;
    /// Scales and minima have 6 bits.
    const STEPS: f32 = 63.0;
    let mut found = [(0.0f32, 0.0f32); 8];
    for (to, x) in found.iter_mut().zip(x.chunks_exact(SUB)) {
        *to = affine_scale(x, most);
    }
    let d = half(found.iter().fold(0.0, |a: f32, f| a.max(f.0)) / STEPS);
    let dmin = half(found.iter().fold(0.0, |a: f32, f| a.max(-f.1)) / STEPS);
    let (by_d, by_dmin) = (inverse(d.to_f32()), inverse(dmin.to_f32()));
    let step = |v: f32, by: f32| (v * by).round_ties_even().clamp(0.0, STEPS) as u8;
    let scales = found.map(|f| step(f.0, by_d));
    let mins = found.map(|f| step(-f.1, by_dmin));
    let mut codes = [0; BLOCK_LEN_MAX];
    for (i, (to, &v)) in codes.iter_mut().zip(x).enumerate() {
        let scale = d.to_f32() * f32::from(scales[i / SUB]);
        let min = dmin.to_f32() * f32::from(mins[i / SUB]);
        *to = code(v + min, inverse(scale), 0, most) as u8;
    }
    pack(Affine { d, dmin, scales, mins, codes });
}

/// Q6_K: signed codes of 6 bits, a scale of 8 bits for each 16.
fn signed_large(x: &[f32], pack: impl FnOnce(f16, &[i8; SUBS_MAX], &[u8; BLOCK_LEN_MAX])) {
    const SUB: usize = 16;
    const LEAST: i32 = -32;
    const MOST: i32 = 31;
    let mut found = [0.0f32; SUBS_MAX];
    for (to, x) in found.iter_mut().zip(x.chunks_exact(SUB)) {
        *to = signed_scale(x, LEAST, MOST);
    }
    let largest = found.iter().copied().fold(0.0f32, |a, b| if b.abs() > a.abs() { b } else { a });
    let d = half(largest / f32::from(i8::MIN));
    let by_d = inverse(d.to_f32());
    let scales = found.map(|s| (s * by_d).round_ties_even().clamp(-128.0, 127.0) as i8);
    let mut codes = [0; BLOCK_LEN_MAX];
    for (i, (to, &v)) in codes.iter_mut().zip(x).enumerate() {
        let scale = d.to_f32() * f32::from(scales[i / SUB]);
        *to = (code(v, inverse(scale), LEAST, MOST) - LEAST) as u8;
    }
    pack(d, &scales, &codes);
}
