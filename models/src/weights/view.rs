//! One tensor as a backend reads it: rows of floats or of blocks, wherever and in whatever order they are stored.

use std::borrow::Cow;

use super::DType;
use super::groups::Groups;
use super::tiles::Tiles;
use crate::quant::{BLOCK_LEN_MAX, Block, MXFP4_LEVELS, mxfp4_scale};

/// Where the rows of a tensor lie; `B` is a span of a file, or its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Storage<B> {
    /// Rows end to end, `dtype.row_bytes(cols)` each.
    Rows(B),
    /// Floats: what is a row here is a column of a stored matrix whose rows have `stride` elements.
    Columns { bytes: B, stride: usize },
    /// MXFP4 as two tensors: 16 bytes of codes for 32 elements, two neighbours in a byte; and a scale.
    Mxfp4 { codes: B, scales: B },
    /// Floats of 8 bits with scales for tiles of them.
    Tiles(Tiles<B>),
    /// Integers with a scale for a group of columns.
    Groups(Groups<B>),
}

impl<B> Storage<B> {
    pub(super) fn map<C>(&self, f: impl Fn(&B) -> C) -> Storage<C> {
        match self {
            Storage::Rows(bytes) => Storage::Rows(f(bytes)),
            Storage::Columns { bytes, stride } => Storage::Columns { bytes: f(bytes), stride: *stride },
            Storage::Mxfp4 { codes, scales } => Storage::Mxfp4 { codes: f(codes), scales: f(scales) },
            Storage::Tiles(tiles) => Storage::Tiles(tiles.map(f)),
            Storage::Groups(groups) => Storage::Groups(groups.map(f)),
        }
    }
}

/// Which stored row a row is.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowMap {
    pub(super) first: usize,
    pub(super) order: Order,
}

/// The order of stored rows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    /// Every `step`-th.
    Every { step: usize },
    /// Rows of a head that are rotated together are neighbours; here they are half a head apart.
    Pairs { head_rows: usize },
}

impl RowMap {
    pub(super) const PLAIN: Self = Self { first: 0, order: Order::Every { step: 1 } };

    fn stored(self, row: usize) -> usize {
        self.first
            + match self.order {
                Order::Every { step } => row * step,
                Order::Pairs { head_rows } => {
                    let (at, half) = (row % head_rows, head_rows / 2);
                    row - at + at % half * 2 + at / half
                }
            }
    }
}

/// One tensor. It may be a part of a stored one, another order of its rows, its transposition, or made of several.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// How its numbers are stored.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    pub(super) storage: Storage<&'a [u8]>,
    pub(super) rows: RowMap,
}

/// Rows and columns of a shape: the last dimension is a row, but a vector is read as rows of one element, so that
/// all that can be done to rows can be done to its elements.
pub(super) fn rows_cols(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [len] => (*len, 1),
        // saturating, since beside a dimension of 0 the others may be anything
        [outer @ .., cols] => (outer.iter().fold(1, |n: usize, &d| n.saturating_mul(d)), *cols),
    }
}

impl<'a> TensorView<'a> {
    /// Rows: all dimensions but the last. A vector has as many rows as elements.
    pub fn rows(&self) -> usize {
        rows_cols(self.shape).0
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        rows_cols(self.shape).1
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.rows() * self.cols()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that its rows take where they are stored, scales included.
    pub fn stored_bytes(&self) -> usize {
        let row_bytes = match self.storage {
            Storage::Mxfp4 { .. } => self.cols() / 32 * 17,
            // groups that have no blocks are read as f32, but lie as bytes or less
            Storage::Groups(groups) if self.dtype == DType::F32 => groups.bits * self.cols() / 8,
            Storage::Rows(_) | Storage::Columns { .. } | Storage::Tiles(_) | Storage::Groups(_) => {
                self.dtype.row_bytes(self.cols()).unwrap_or_default()
            }
        };
        self.rows() * row_bytes
    }

    /// A row as it lies in its file, little-endian, not necessarily aligned; `None` where it does not lie whole.
    pub fn row_bytes(&self, row: usize) -> Option<&'a [u8]> {
        let Storage::Rows(bytes) = self.storage else { return None };
        let len = self.dtype.row_bytes(self.cols())?;
        let at = self.rows.stored(row) * len;
        Some(&bytes[at..at + len])
    }

    /// All rows, if they lie end to end in their order.
    pub fn contiguous(&self) -> Option<&'a [u8]> {
        match (self.storage, self.rows) {
            (Storage::Rows(bytes), RowMap { first, order: Order::Every { step: 1 } }) => {
                let row = self.dtype.row_bytes(self.cols())?;
                Some(&bytes[first * row..(first + self.rows()) * row])
            }
            _ => None,
        }
    }

    /// Decodes block `index` of a row. Panics where the type has no blocks.
    pub fn read_block(&self, row: usize, index: usize, block: &mut Block) {
        let format = self.dtype.format().unwrap_or_else(|| panic!("{:?} has no blocks", self.dtype));
        match self.storage {
            Storage::Rows(_) => {
                let bytes = self.row_bytes(row).unwrap_or_default();
                format.decode(&bytes[index * format.block_bytes..][..format.block_bytes], block);
            }
            Storage::Mxfp4 { codes, scales } => {
                let at = self.rows.stored(row) * (self.cols() / 32) + index;
                block.d = mxfp4_scale(scales[at]);
                for (pair, byte) in block.codes.as_chunks_mut::<2>().0.iter_mut().zip(&codes[at * 16..][..16])
                {
                    *pair = [byte & 15, byte >> 4].map(|n| MXFP4_LEVELS[usize::from(n)]);
                }
            }
            Storage::Groups(groups) => groups.block(self.rows.stored(row), index, block),
            Storage::Columns { .. } | Storage::Tiles(_) => panic!("floats have no blocks"),
        }
    }

    /// Writes a row as f32.
    ///
    /// # Panics
    /// If `out` has another length than a row.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols(), "a row of {} elements is read into {}", self.cols(), out.len());
        if let Some(format) = self.dtype.format() {
            let mut block = Block::default();
            for (index, out) in out.chunks_mut(format.block_len.min(BLOCK_LEN_MAX)).enumerate() {
                self.read_block(row, index, &mut block);
                block.read(format, out);
            }
            return;
        }
        match self.storage {
            Storage::Columns { bytes, stride } => {
                let (at, size) = (self.rows.stored(row), self.dtype.element_bytes().unwrap_or_default());
                let columns = bytes.chunks_exact(stride * size).map(|stored| &stored[at * size..][..size]);
                for (to, element) in out.iter_mut().zip(columns) {
                    convert(self.dtype, element, std::slice::from_mut(to));
                }
            }
            Storage::Tiles(tiles) => tiles.row(self.rows.stored(row), out),
            Storage::Groups(groups) => groups.row(self.rows.stored(row), out),
            _ => convert(self.dtype, self.row_bytes(row).unwrap_or_default(), out),
        }
    }

    /// Writes all elements as f32 (exact for the plain floats; see [`Block`] for the others).
    ///
    /// # Panics
    /// If `out` has another length than the tensor.
    pub fn read_f32(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.len(), "a tensor of {} elements is read into {}", self.len(), out.len());
        match self.contiguous() {
            Some(bytes) if self.dtype.format().is_none() => convert(self.dtype, bytes, out),
            _ if self.cols() > 0 => {
                out.chunks_mut(self.cols()).enumerate().for_each(|(row, out)| self.read_row(row, out));
            }
            _ => {}
        }
    }

    /// All elements end to end, little-endian: F32, F16 and BF16 as they are, all else as F32.
    pub fn to_plain(&self) -> (DType, Cow<'a, [u8]>) {
        let plain = matches!(self.dtype, DType::F32 | DType::F16 | DType::BF16);
        if let Some(bytes) = self.contiguous().filter(|_| plain) {
            return (self.dtype, Cow::Borrowed(bytes));
        }
        if plain && !self.is_empty() && self.row_bytes(0).is_some() {
            let rows = (0..self.rows()).filter_map(|row| self.row_bytes(row));
            return (self.dtype, Cow::Owned(rows.flatten().copied().collect()));
        }
        let mut row = vec![0.0; self.cols()];
        let mut bytes = Vec::with_capacity(self.len() * 4);
        for at in 0..self.rows() {
            self.read_row(at, &mut row);
            bytes.extend(row.iter().flat_map(|x| x.to_le_bytes()));
        }
        (DType::F32, Cow::Owned(bytes))
    }
}

pub(super) fn convert(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => convert_each(bytes, out, f32::from_le_bytes),
        DType::F16 => convert_each(bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
        DType::BF16 => convert_each(bytes, out, |b| half::bf16::from_le_bytes(b).to_f32()),
        other => panic!("{other:?} is no plain float"),
    }
}

fn convert_each<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
    for (element, to) in bytes.as_chunks::<N>().0.iter().zip(out) {
        *to = f(*element);
    }
}
