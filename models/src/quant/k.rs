//! The K formats: 256 elements a block, in sub-blocks whose scales are quantized themselves.

use super::{Block, Format, f16};

const LEN: usize = 256;

pub(super) const Q2: Format =
    Format { block_len: LEN, sub_len: 16, block_bytes: 84, minima: true, codes: (0, 3), decode: q2 };
pub(super) const Q3: Format =
    Format { block_len: LEN, sub_len: 16, block_bytes: 110, minima: false, codes: (-4, 3), decode: q3 };
pub(super) const Q4: Format =
    Format { block_len: LEN, sub_len: 32, block_bytes: 144, minima: true, codes: (0, 15), decode: q4 };
pub(super) const Q5: Format =
    Format { block_len: LEN, sub_len: 32, block_bytes: 176, minima: true, codes: (0, 31), decode: q5 };
pub(super) const Q6: Format =
    Format { block_len: LEN, sub_len: 16, block_bytes: 210, minima: false, codes: (-32, 31), decode: q6 };

/// Two bits of element `i`, of bytes that hold 128 elements in each 32: those of equal `i % 32` share a byte.
fn pair(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3
}

/// scales (4 bits) and minima (4 bits) [16], codes [64], d, dmin
fn q2(bytes: &[u8], block: &mut Block) {
    let (scales, rest) = bytes.split_at(16);
    block.d = f16(&rest[64..]);
    block.dmin = f16(&rest[66..]);
    for (i, &b) in scales.iter().enumerate() {
        block.scales[i] = (b & 15) as i8;
        block.mins[i] = b >> 4;
    }
    for (i, code) in block.codes.iter_mut().enumerate() {
        *code = pair(rest, i) as i8;
    }
}

/// high bits [32], low bits [64], scales [12], d
fn q3(bytes: &[u8], block: &mut Block) {
    let (high, rest) = bytes.split_at(32);
    let (low, rest) = rest.split_at(64);
    block.d = f16(&rest[12..]);
    for (i, scale) in block.scales.iter_mut().enumerate() {
        let four = if i < 8 { rest[i] & 15 } else { rest[i - 8] >> 4 };
        let two = rest[8 + i % 4] >> (i / 4 * 2) & 3;
        *scale = (four | two << 4) as i8 - 32;
    }
    for (i, code) in block.codes.iter_mut().enumerate() {
        let third = high[i % 32] >> (i / 32) & 1;
        *code = (pair(low, i) | third << 2) as i8 - 4;
    }
}

/// Scale and minimum of eight sub-blocks in 12 bytes, 6 bits each.
fn sixes(bytes: &[u8], block: &mut Block) {
    for i in 0..4 {
        block.scales[i] = (bytes[i] & 63) as i8;
        block.mins[i] = bytes[i + 4] & 63;
        block.scales[i + 4] = (bytes[i + 8] & 15 | bytes[i] >> 6 << 4) as i8;
        block.mins[i + 4] = bytes[i + 8] >> 4 | bytes[i + 4] >> 6 << 4;
    }
}

/// Four bits of element `i`: 64 elements in 32 bytes, the low halves first.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15
}

/// d, dmin, scales [12], codes [128]
fn q4(bytes: &[u8], block: &mut Block) {
    block.d = f16(bytes);
    block.dmin = f16(&bytes[2..]);
    sixes(&bytes[4..16], block);
    for (i, code) in block.codes.iter_mut().enumerate() {
        *code = nibble(&bytes[16..], i) as i8;
    }
}

/// d, dmin, scales [12], fifth bits [32], low bits [128]
fn q5(bytes: &[u8], block: &mut Block) {
    block.d = f16(bytes);
    block.dmin = f16(&bytes[2..]);
    sixes(&bytes[4..16], block);
    let (high, low) = bytes[16..].split_at(32);
    for (i, code) in block.codes.iter_mut().enumerate() {
        let fifth = high[i % 32] >> (i / 32) & 1;
        *code = (nibble(low, i) | fifth << 4) as i8;
    }
}

/// low bits [128], high bits [64], scales [16], d
fn q6(bytes: &[u8], block: &mut Block) {
    let (low, rest) = bytes.split_at(128);
    let (high, rest) = rest.split_at(64);
    block.d = f16(&rest[16..]);
    block.scales.iter_mut().zip(rest).for_each(|(scale, &b)| *scale = b as i8);
    for (i, code) in block.codes.iter_mut().enumerate() {
        // 128 elements in 64 bytes: the low halves of all, then the high ones
        let four = low[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
        *code = (four | pair(high, i) << 4) as i8 - 32;
    }
}
