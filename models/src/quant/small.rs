//! Formats of 32 elements a block.

use super::{Block, Format, f16};

const LEN: usize = 32;
const ONE_SCALE: Format = Format {
    block_len: LEN,
    sub_len: LEN,
    block_bytes: 0,
    minima: false,
    codes: (0, 0),
    decode: |_, _| unreachable!("a format has a decoder"),
};

pub(super) const Q8_0: Format = Format { block_bytes: 34, codes: (-128, 127), decode: q8_0, ..ONE_SCALE };
pub(super) const Q4_0: Format = Format { block_bytes: 18, codes: (-8, 7), decode: q4_0, ..ONE_SCALE };
pub(super) const Q4_1: Format =
    Format { block_bytes: 20, codes: (0, 15), decode: q4_1, minima: true, ..ONE_SCALE };
pub(super) const Q5_0: Format = Format { block_bytes: 22, codes: (-16, 15), decode: q5_0, ..ONE_SCALE };
pub(super) const Q5_1: Format =
    Format { block_bytes: 24, codes: (0, 31), decode: q5_1, minima: true, ..ONE_SCALE };
pub(super) const IQ4_NL: Format = Format { block_bytes: 18, codes: (-127, 113), decode: iq4_nl, ..ONE_SCALE };
pub(super) const MXFP4: Format = Format { block_bytes: 17, codes: (-12, 12), decode: mxfp4, ..ONE_SCALE };

/// Groups of checkpoints whose codes, scales and zeros are tensors of their own: a block is 32 columns of one, its bytes
/// are counted as those of Q4_0 and Q8_0, and decoding is a matter of their layout.
pub(super) const INT4: Format = Format { block_bytes: 18, codes: (-16, 15), decode: apart, ..ONE_SCALE };
pub(super) const INT8: Format = Format { block_bytes: 34, codes: (-128, 127), decode: apart, ..ONE_SCALE };

fn apart(_: &[u8], _: &mut Block) {
    unreachable!("codes and scales are apart")
}

/// The levels of IQ4_NL.
const IQ4_NL_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the e2m1 floats, so that they are whole.
pub(crate) const MXFP4_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of 2^(e - 127): the levels are doubled.
pub(crate) fn mxfp4_scale(e: u8) -> f32 {
    const HALF_OF_LEAST: u32 = 0x0020_0000;
    match e {
        0 | 1 => f32::from_bits(HALF_OF_LEAST << e),
        _ => f32::from_bits((u32::from(e) - 1) << 23),
    }
}

fn q8_0(bytes: &[u8], block: &mut Block) {
    block.d = f16(bytes);
    block.codes.iter_mut().zip(&bytes[2..]).for_each(|(code, &b)| *code = b as i8);
}

/// The first 16 elements are the low halves of 16 bytes, the others the high ones.
fn nibbles(bytes: &[u8], codes: &mut [i8], map: impl Fn(usize, u8) -> i8) {
    for (i, &b) in bytes.iter().enumerate() {
        codes[i] = map(i, b & 15);
        codes[i + LEN / 2] = map(i + LEN / 2, b >> 4);
    }
}

fn q4_0(bytes: &[u8], block: &mut Block) {
    block.d = f16(bytes);
    nibbles(&bytes[2..], &mut block.codes, |_, n| n as i8 - 8);
}

/// The format adds its offset; the neutral form subtracts.
fn offset(bytes: &[u8], block: &mut Block) {
    block.d = f16(bytes);
    block.dmin = -f16(&bytes[2..]);
}

fn q4_1(bytes: &[u8], block: &mut Block) {
    offset(bytes, block);
    nibbles(&bytes[4..], &mut block.codes, |_, n| n as i8);
}

/// Element i has its fifth bit at bit i.
fn fifth(bytes: &[u8]) -> impl Fn(usize, u8) -> u8 {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    move |i, low| low | ((high >> i & 1) as u8) << 4
}

fn q5_0(bytes: &[u8], block: &mut Block) {
    block.d = f16(bytes);
    let whole = fifth(&bytes[2..]);
    nibbles(&bytes[6..], &mut block.codes, |i, n| whole(i, n) as i8 - 16);
}

fn q5_1(bytes: &[u8], block: &mut Block) {
    offset(bytes, block);
    let whole = fifth(&bytes[4..]);
    nibbles(&bytes[8..], &mut block.codes, |i, n| whole(i, n) as i8);
}

fn iq4_nl(bytes: &[u8], block: &mut Block) {
    block.d = f16(bytes);
    nibbles(&bytes[2..], &mut block.codes, |_, n| IQ4_NL_LEVELS[usize::from(n)]);
}

fn mxfp4(bytes: &[u8], block: &mut Block) {
    block.d = mxfp4_scale(bytes[0]);
    nibbles(&bytes[1..], &mut block.codes, |_, n| MXFP4_LEVELS[usize::from(n)]);
}
