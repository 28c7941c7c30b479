//! Packed weights: how a matrix `[rows, cols]` lies in memory for the products.
//!
//! Panels of 16 rows, one after another; inside a panel of floats, for each column the 16 rows' elements side by side:
//! `[rows / 16][cols][16]`. One vector load is then 16 output features at one input feature, and a panel is one
//! forward stream. [`crate::quantized::kind`] has the panels of integers. Rows are padded with zeros to a multiple of 16.

use std::ops::Range;

use half::{bf16, f16};

use crate::memory::{Piece, Reserve};
use crate::quantized::kind::Kind;
use crate::quantized::panel::{self, Integers};
use crate::quantized::{BLOCK, input};
use crate::simd::LANES;

/// How elements of a packed matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 4 bytes.
    F32,
    /// 2 bytes, IEEE 754 half.
    F16,
    /// 2 bytes, bfloat16.
    BF16,
    /// Integers under scales.
    Codes(Kind),
}

/// What activations have to be for a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// f32, by [`pack_tile`].
    Floats,
    /// 8-bit integers, by [`crate::Kernels::quantize_tile`].
    Integers,
}

impl Form {
    /// Floats that packed activations take.
    pub fn input_len(self, rows: usize, cols: usize) -> usize {
        match self {
            Form::Floats => rows * cols,
            Form::Integers => input::len(rows, cols),
        }
    }
}

impl WeightType {
    /// Bytes of one element, or `None` where elements share bytes.
    fn size_bytes(self) -> Option<usize> {
        match self {
            WeightType::F32 => Some(4),
            WeightType::F16 | WeightType::BF16 => Some(2),
            WeightType::Codes(_) => None,
        }
    }

    /// Bytes of a panel: 16 rows of `cols` columns, whole blocks of integers.
    pub fn panel_bytes(self, cols: usize) -> usize {
        match self {
            WeightType::F32 => LANES * cols * 4,
            WeightType::F16 | WeightType::BF16 => LANES * cols * 2,
            WeightType::Codes(kind) => kind.layout().panel_bytes(cols),
        }
    }

    /// What activations have to be.
    pub fn form(self) -> Form {
        match self {
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => Form::Floats,
            WeightType::Codes(_) => Form::Integers,
        }
    }
}

/// A weight matrix in panels.
#[derive(Debug)]
pub struct PackedMatrix {
    /// Type and first byte of each panel, and the end.
    panels: Vec<(WeightType, usize)>,
    rows: usize,
    cols: usize,
    bytes: Piece,
}

/// Rows of a matrix as they lie in a checkpoint: row-major, little-endian, not necessarily aligned.
#[derive(Clone, Copy, Debug)]
pub struct SourceRows<'a> {
    /// How the elements are stored.
    pub dtype: WeightType,
    /// `rows * cols * dtype.size_bytes()` bytes.
    pub bytes: &'a [u8],
}

/// Puts rows into panels; see [`PackedMatrix::panels_mut`].
pub struct PanelWriter<'a> {
    types: &'a [(WeightType, usize)],
    cols: usize,
    bytes: &'a mut [u8],
}

impl PackedMatrix {
    /// A matrix of zeros, or `None` where memory is short.
    ///
    /// # Panics
    /// As [`PackedMatrix::mixed`].
    pub fn zeroed(dtype: WeightType, rows: usize, cols: usize) -> Option<Self> {
        Self::new(&vec![dtype; rows.div_ceil(LANES)], (rows, cols), Piece::zeroed)
    }

    /// A matrix of zeros whose panels have these types, in memory of `reserve`, or `None` where it is short.
    ///
    /// # Panics
    /// If there is not one type for each panel, if floats have not all one type, or if rows of integers are not whole
    /// blocks.
    pub fn mixed(types: &[WeightType], (rows, cols): (usize, usize), reserve: &mut Reserve) -> Option<Self> {
        Self::new(types, (rows, cols), |len| reserve.take(len))
    }

    fn new(
        types: &[WeightType],
        (rows, cols): (usize, usize),
        memory: impl FnOnce(usize) -> Option<Piece>,
    ) -> Option<Self> {
        assert_eq!(types.len(), rows.div_ceil(LANES), "types of the panels of {rows} rows");
        let mut panels = Vec::with_capacity(types.len() + 1);
        let mut end = 0_usize;
        for dtype in types {
            match dtype {
                WeightType::Codes(_) => assert!(cols.is_multiple_of(BLOCK), "{cols} columns of {dtype:?}"),
                _ => assert!(*dtype == types[0], "a panel of {dtype:?} in a matrix of {:?}", types[0]),
            }
            assert_eq!(dtype.form(), types[0].form(), "{dtype:?} and {:?}", types[0]);
            panels.push((*dtype, end));
            end = end.checked_add(dtype.panel_bytes(cols))?;
        }
        panels.push((types.last().copied().unwrap_or(WeightType::F32), end));
        Some(Self { panels, rows, cols, bytes: memory(end)? })
    }

    /// How the elements of the first panel are stored; of all, if they are floats.
    pub(crate) fn dtype(&self) -> WeightType {
        self.panels[0].0
    }

    /// What activations have to be for products with it.
    pub fn form(&self) -> Form {
        self.dtype().form()
    }

    /// How a panel of integers is stored.
    pub(crate) fn kind(&self, panel: usize) -> Kind {
        match self.panels[panel].0 {
            WeightType::Codes(kind) => kind,
            dtype => unreachable!("{dtype:?} in a product of integers"),
        }
    }

    /// A panel and its type.
    pub(crate) fn panel(&self, panel: usize) -> (WeightType, &[u8]) {
        let (dtype, start) = self.panels[panel];
        (dtype, &self.bytes.bytes()[start..self.panels[panel + 1].1])
    }

    /// Output features, without padding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Panels of 16 rows.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Bytes in memory.
    pub fn size_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Writers for runs of `count` panels (the last may be shorter), so that threads can pack side by side.
    pub fn panels_mut(&mut self, count: usize) -> impl Iterator<Item = PanelWriter<'_>> {
        let (types, ends) = (&self.panels[..self.panels.len() - 1], &self.panels);
        let (cols, mut rest) = (self.cols, self.bytes.bytes_mut());
        let mut first = 0_usize;
        std::iter::from_fn(move || {
            let end = first.saturating_add(count.max(1)).min(types.len());
            let run = &types[first..end];
            let len = ends[end].1 - run.first()?.1;
            let (bytes, others) = std::mem::take(&mut rest).split_at_mut(len);
            (first, rest) = (end, others);
            Some(PanelWriter { types: run, cols, bytes })
        })
    }

    /// Writes one row as f32 into `out[..cols]`.
    ///
    /// # Panics
    /// If there is no such row or `out` is shorter than a row.
    pub fn gather(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let (dtype, bytes) = self.panel(row / LANES);
        let lane = row % LANES;
        let elements = |size| bytes[lane * size..].chunks(LANES * size);
        let out = &mut out[..self.cols];
        match dtype {
            WeightType::F32 => out.iter_mut().zip(elements(4)).for_each(|(o, e)| *o = f32_of(e)),
            WeightType::F16 => out.iter_mut().zip(elements(2)).for_each(|(o, e)| *o = f16_of(e).to_f32()),
            WeightType::BF16 => out.iter_mut().zip(elements(2)).for_each(|(o, e)| *o = bf16_of(e).to_f32()),
            WeightType::Codes(kind) => panel::read_lane(kind, self.cols, bytes, lane, out),
        }
    }
}

fn f32_of(e: &[u8]) -> f32 {
    f32::from_le_bytes([e[0], e[1], e[2], e[3]])
}

fn f16_of(e: &[u8]) -> f16 {
    f16::from_le_bytes([e[0], e[1]])
}

fn bf16_of(e: &[u8]) -> bf16 {
    bf16::from_le_bytes([e[0], e[1]])
}

/// Writes the elements of a line into one lane of a panel.
fn spread<const FROM: usize, const TO: usize>(
    line: &[u8],
    panel: &mut [u8],
    lane: usize,
    convert: impl Fn([u8; FROM]) -> [u8; TO],
) {
    let places = panel.as_chunks_mut::<TO>().0[lane..].iter_mut().step_by(LANES);
    places.zip(line.as_chunks::<FROM>().0).for_each(|(p, e)| *p = convert(*e));
}

impl PanelWriter<'_> {
    /// Panels in this run.
    pub fn panels(&self) -> usize {
        self.types.len()
    }

    /// How the elements of a panel are stored.
    pub fn dtype(&self, panel: usize) -> WeightType {
        self.types[panel].0
    }

    fn panel(&mut self, panel: usize) -> &mut [u8] {
        let (dtype, start) = self.types[panel];
        &mut self.bytes[start - self.types[0].1..][..dtype.panel_bytes(self.cols)]
    }

    /// Copies columns `cols` of row `from_row` of `source` into row `row` of this run. Elements keep their type; f32
    /// is the one type that any other may be widened to. A panel is filled fastest a few columns at a time.
    ///
    /// # Panics
    /// If a row or a column is out of range, or the element types differ and the matrix is not f32.
    pub fn put(&mut self, row: usize, source: SourceRows<'_>, from_row: usize, cols: Range<usize>) {
        let to = self.dtype(row / LANES);
        let (Some(size), Some(from)) = (to.size_bytes(), source.dtype.size_bytes()) else {
            panic!("a {:?} row cannot be copied to {to:?}", source.dtype)
        };
        let line = &source.bytes[(from_row * self.cols + cols.start) * from..][..cols.len() * from];
        let place = &mut self.panel(row / LANES)[cols.start * LANES * size..];
        let lane = row % LANES;
        match (to, source.dtype) {
            (WeightType::F32, WeightType::F32) => spread::<4, 4>(line, place, lane, |e| e),
            (WeightType::F32, WeightType::F16) => {
                spread::<2, 4>(line, place, lane, |e| f16::from_le_bytes(e).to_f32().to_le_bytes());
            }
            (WeightType::F32, WeightType::BF16) => {
                spread::<2, 4>(line, place, lane, |e| bf16::from_le_bytes(e).to_f32().to_le_bytes());
            }
            (to, from) => {
                assert_eq!(to, from, "a {from:?} row cannot be stored as {to:?}");
                spread::<2, 2>(line, place, lane, |e| e);
            }
        }
    }

    /// Writes [`Kind::block_len`] columns from column `col` of a panel of integers, or as many as are left; `rows` are
    /// its first rows, all others zeros.
    ///
    /// # Panics
    /// If the panel is not of integers, or a scale or an integer is none that its kind can hold.
    pub fn put_integers(&mut self, panel: usize, col: usize, rows: &[Integers]) {
        let WeightType::Codes(kind) = self.dtype(panel) else {
            panic!("integers cannot be stored as {:?}", self.dtype(panel))
        };
        panel::write(kind, self.cols, self.panel(panel), col, rows);
    }
}

/// Packs activation rows for products of several rows: tiles of `tile` rows, inside a tile `[cols][rows of the
/// tile]`, so that the inner loop reads them forward. One row is packed as it is.
///
/// Writes the rows of one tile, wherever they are, to the tile's place among the packed ones.
///
/// # Panics
/// If `packed` is not as long as all rows together.
pub fn pack_tile<'a>(rows: impl ExactSizeIterator<Item = &'a [f32]>, packed: &mut [f32]) {
    let (count, len) = (rows.len(), packed.len());
    for (r, row) in rows.enumerate() {
        assert_eq!(row.len() * count, len, "a tile of {count} rows of {}", row.len());
        for (place, &x) in packed[r..].iter_mut().step_by(count).zip(row) {
            *place = x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mat;

    #[test]
    fn gather_undoes_put() {
        let (rows, cols) = (37, 5);
        let values: Vec<f32> = (0..rows * cols).map(|i| i as f32 - 60.0).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        let kinds = [
            (WeightType::F32, WeightType::F32, &f32s),
            (WeightType::F32, WeightType::F16, &f16s),
            (WeightType::F32, WeightType::BF16, &bf16s),
            (WeightType::F16, WeightType::F16, &f16s),
            (WeightType::BF16, WeightType::BF16, &bf16s),
        ];
        for (to, from, bytes) in kinds {
            let mut packed = PackedMatrix::zeroed(to, rows, cols).expect("small");
            let mut first = 0;
            for mut writer in packed.panels_mut(2) {
                for row in first * LANES..((first + writer.panels()) * LANES).min(rows) {
                    writer.put(row - first * LANES, SourceRows { dtype: from, bytes }, row, 0..2);
                    writer.put(row - first * LANES, SourceRows { dtype: from, bytes }, row, 2..cols);
                }
                first += writer.panels();
            }
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                packed.gather(r, &mut row);
                assert_eq!(row, values[r * cols..][..cols], "{from:?} as {to:?}, row {r}");
            }
        }
    }

    #[test]
    fn tiles_are_transposed() {
        let data: Vec<f32> = (0..14).map(|i| i as f32).collect();
        let input = Mat::new(&data, 7, 2, 2);
        let mut packed = vec![0.0; 14];
        for (i, place) in packed.chunks_mut(8).enumerate() {
            pack_tile((4 * i..7.min(4 * i + 4)).map(|r| input.row(r)), place);
        }
        assert_eq!(packed, [0., 2., 4., 6., 1., 3., 5., 7., 8., 10., 12., 9., 11., 13.]);
    }
}
