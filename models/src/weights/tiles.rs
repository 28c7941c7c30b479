//! Floats of 8 bits (e4m3 without infinities), and integers in bytes, whose scales stand in a tensor of their own.

use super::DType;
use super::view::convert;

/// A matrix of them. A scale belongs to a tile of rows and columns: a block, a row, or everything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles<B> {
    pub(super) codes: B,
    pub(super) scales: B,
    /// A plain float.
    pub(super) scale_type: DType,
    /// Whether codes are integers of 8 bits instead.
    pub(super) codes_are: Codes,
    pub(super) tile: (usize, usize),
    pub(super) cols: usize,
}

/// What a byte is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Codes {
    /// e4m3
    Float,
    /// Two's complement.
    Integer,
}

impl<B> Tiles<B> {
    pub(super) fn map<C>(&self, f: impl Fn(&B) -> C) -> Tiles<C> {
        let Self { codes, scales, scale_type, codes_are, tile, cols } = self;
        Tiles {
            codes: f(codes),
            scales: f(scales),
            scale_type: *scale_type,
            codes_are: *codes_are,
            tile: *tile,
            cols: *cols,
        }
    }
}

impl Tiles<&[u8]> {
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let codes = &self.codes[row * self.cols..][..self.cols];
        let (rows, cols) = self.tile;
        let across = self.cols.div_ceil(cols);
        let size = self.scale_type.element_bytes().unwrap_or_default();
        for (tile, (codes, out)) in codes.chunks(cols).zip(out.chunks_mut(cols)).enumerate() {
            let mut scale = [0.0];
            let at = (row / rows * across + tile) * size;
            convert(self.scale_type, &self.scales[at..at + size], &mut scale);
            for (to, &code) in out.iter_mut().zip(codes) {
                *to = match self.codes_are {
                    Codes::Float => e4m3(code),
                    Codes::Integer => f32::from(code as i8),
                } * scale[0];
            }
        }
    }
}

/// Four bits of exponent (bias 7), three of fraction; all ones are no number, there is no infinity (arXiv 2209.05433).
fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2f32.powi(-9),
        _ => (8.0 + fraction) * 2f32.powi(exponent - 10),
    };
    if code >> 7 == 1 { -magnitude } else { magnitude }
}
