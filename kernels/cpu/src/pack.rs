//! Packed weights: how a matrix `[rows, cols]` lies in memory for the products.
//!
//! Panels of 16 rows, one after another; inside a panel, for each column the 16 rows' elements side by side:
//! `[rows / 16][cols][16]`. One vector load is then 16 output features at one input feature, and a panel is one
//! forward stream. Rows are padded with zeros to a multiple of 16.

use std::ops::Range;

use half::{bf16, f16};

use crate::memory::Aligned;
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
}

impl WeightType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            WeightType::F32 => 4,
            WeightType::F16 | WeightType::BF16 => 2,
        }
    }

    /// Bytes of a panel: 16 rows of `cols` columns.
    pub fn panel_bytes(self, cols: usize) -> usize {
        LANES * cols * self.size_bytes()
    }
}

/// A weight matrix in panels.
#[derive(Debug)]
pub struct PackedMatrix {
    dtype: WeightType,
    rows: usize,
    cols: usize,
    bytes: Aligned,
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
    dtype: WeightType,
    cols: usize,
    bytes: &'a mut [u8],
}

impl PackedMatrix {
    /// A matrix of zeros, or `None` where memory is short.
    pub fn zeroed(dtype: WeightType, rows: usize, cols: usize) -> Option<Self> {
        let panels = rows.div_ceil(LANES);
        let len = dtype.panel_bytes(1).checked_mul(cols)?.checked_mul(panels)?;
        Some(Self { dtype, rows, cols, bytes: Aligned::zeroed(len)? })
    }

    /// How elements are stored.
    pub fn dtype(&self) -> WeightType {
        self.dtype
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

    /// All panels, end to end.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.bytes()
    }

    /// Writers for runs of `count` panels (the last may be shorter), so that threads can pack side by side.
    pub fn panels_mut(&mut self, count: usize) -> impl Iterator<Item = PanelWriter<'_>> {
        let (dtype, cols) = (self.dtype, self.cols);
        let run = (dtype.panel_bytes(cols) * count).max(1);
        self.bytes.bytes_mut().chunks_mut(run).map(move |bytes| PanelWriter { dtype, cols, bytes })
    }

    /// Writes one row, widened to f32, into `out[..cols]`.
    ///
    /// # Panics
    /// If there is no such row or `out` is shorter than a row.
    pub fn gather(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let size = self.dtype.size_bytes();
        let panel = self.dtype.panel_bytes(self.cols);
        let from = row / LANES * panel + row % LANES * size;
        let elements = self.bytes.bytes()[from..].chunks(LANES * size);
        let out = &mut out[..self.cols];
        match self.dtype {
            WeightType::F32 => out.iter_mut().zip(elements).for_each(|(o, e)| *o = f32_of(e)),
            WeightType::F16 => out.iter_mut().zip(elements).for_each(|(o, e)| *o = f16_of(e).to_f32()),
            WeightType::BF16 => out.iter_mut().zip(elements).for_each(|(o, e)| *o = bf16_of(e).to_f32()),
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
        self.bytes.len() / self.dtype.panel_bytes(self.cols).max(1)
    }

    /// Copies columns `cols` of row `from_row` of `source` into row `row` of this run. Elements keep their type; f32
    /// is the one type that any other may be widened to. A panel is filled fastest a few columns at a time.
    ///
    /// # Panics
    /// If a row or a column is out of range, or the element types differ and the matrix is not f32.
    pub fn put(&mut self, row: usize, source: SourceRows<'_>, from_row: usize, cols: Range<usize>) {
        let from = source.dtype.size_bytes();
        let line = &source.bytes[(from_row * self.cols + cols.start) * from..][..cols.len() * from];
        let panel = self.dtype.panel_bytes(self.cols);
        let place =
            &mut self.bytes[row / LANES * panel..][..panel][cols.start * LANES * self.dtype.size_bytes()..];
        let lane = row % LANES;
        match (self.dtype, source.dtype) {
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
