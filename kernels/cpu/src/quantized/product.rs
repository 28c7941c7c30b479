//! Sums of quantized products: some columns of some panels are unpacked, and used for all rows while they are near.

use std::ops::Range;

use super::input::{self, ROW_BYTES};
use super::kind::Kind;
use super::row::RowOperands;
use super::tile::Operands;
use super::unpack::{Packed, Unpacked};
use super::{BLOCK, CHUNK, GROUP_BYTES, GROUPS};
use crate::matmul::Product;
use crate::simd::LANES;
use crate::{Kernels, PackedMatrix};

/// Floats of scratch for the codes of one panel's chunk.
const CODES_LEN: usize = CHUNK * GROUPS * GROUP_BYTES / 4;

/// Floats of scratch for its scales, and as many for its shifts.
const SCALES_LEN: usize = CHUNK * 2 * LANES;

/// Floats of scratch for one panel.
pub(crate) const PANEL_LEN: usize = CODES_LEN + 2 * SCALES_LEN;

/// Panels in flight for few rows, each one a stream from memory.
pub(crate) const STREAMS: usize = 4;

/// Panels of one kind, side by side.
struct Run {
    kind: Kind,
    panels: Range<usize>,
}

impl Kernels {
    /// Quantizes the rows of one tile, wherever they are, whole blocks each, to the tile's place in what
    /// [`crate::Form::input_len`] floats hold, for products with integer weights.
    ///
    /// # Panics
    /// If the rows are more than a tile has, or `packed` is not as long as they become.
    pub fn quantize_tile<'a>(&self, rows: impl ExactSizeIterator<Item = &'a [f32]>, packed: &mut [f32]) {
        let count = rows.len();
        assert!(count <= self.tile_rows(), "{count} rows in a tile of {}", self.tile_rows());
        for (r, row) in (0..count).zip(rows) {
            assert!(row.len().is_multiple_of(BLOCK), "a row of {} columns is not whole blocks", row.len());
            assert_eq!(packed.len(), input::len(count, row.len()), "a tile of {count} rows of {}", row.len());
            // SAFETY: the place was just checked; the table was chosen for this machine.
            unsafe { (self.codes().quantize)(row, packed.as_mut_ptr().cast(), r, count) };
        }
    }

    /// Adds products of all columns to `sums`, `[rows][panels][16]`.
    pub(crate) fn add_codes(
        &self,
        product: &Product<'_>,
        panels: &Range<usize>,
        rows: &Range<usize>,
        sums: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(sums.len(), rows.len() * panels.len() * LANES, "sums");
        if product.rows <= self.codes().rows_max {
            return self.add_few(product, panels, rows.len(), sums);
        }
        // From the first float on a cache line.
        let start = scratch.as_ptr().align_offset(GROUP_BYTES);
        let scratch = &mut scratch[start..];
        assert!(scratch.len() >= panels.len() * PANEL_LEN, "scratch of {}", scratch.len());
        let blocks = product.weight.cols() / BLOCK;
        let mut first = 0;
        while first < blocks {
            let chunk = first..(first + CHUNK).min(blocks);
            let mut start = panels.start;
            while start < panels.end {
                let run = run_of(product.weight, start..panels.end);
                let at = (start - panels.start) * LANES;
                start = run.panels.end;
                let place = (&mut sums[at..], panels.len() * LANES);
                self.add_chunk(product, &run, &chunk, rows, place, scratch);
            }
            first = chunk.end;
        }
    }

    /// Few rows, of one tile: weights go straight from memory into the registers.
    fn add_few(&self, product: &Product<'_>, panels: &Range<usize>, rows: usize, sums: &mut [f32]) {
        let (weight, cols) = (product.weight, product.weight.cols());
        assert!(rows <= product.rows, "{rows} of {} rows", product.rows);
        let sums_row = panels.len() * LANES;
        let mut start = panels.start;
        while start < panels.end {
            let run = run_of(weight, start..panels.end);
            let operands = RowOperands {
                panels: weight.panel(start).1.as_ptr(),
                panel_bytes: run.kind.layout().panel_bytes(cols),
                blocks: cols / BLOCK,
                input: product.input.as_ptr().cast(),
                input_rows: product.rows,
                sums: sums[(start - panels.start) * LANES..].as_mut_ptr(),
                sums_row,
            };
            // SAFETY: panels of one kind lie one behind the other, the rows have as many blocks and the sums have place
            // for all rows and panels, as asserted; the table was chosen for this machine.
            unsafe { (self.codes().rows[run.kind as usize])(&operands, run.panels.len(), rows) };
            start = run.panels.end;
        }
    }

    /// Adds the products of a chunk of the columns of panels of one kind.
    fn add_chunk(
        &self,
        product: &Product<'_>,
        run: &Run,
        chunk: &Range<usize>,
        rows: &Range<usize>,
        (sums, sums_row): (&mut [f32], usize),
        scratch: &mut [f32],
    ) {
        let weight = product.weight;
        let layout = run.kind.layout();
        let mut operands = self.unpacked(weight, run, chunk, scratch);
        // The lines that unpacking has not asked for.
        let unpacking = layout.lines_of_unpacking();
        let next = next_chunk(weight, run, run.panels.start, chunk);
        operands.ask = next.wrapping_add(CHUNK * unpacking * GROUP_BYTES);
        operands.ask_panel = layout.panel_bytes(weight.cols());
        operands.ask_block = (layout.lines() - unpacking) * GROUP_BYTES;
        operands.sums_row = sums_row;
        let tile_fn = self.codes().tiles[run.kind as usize];
        let mut row = rows.start;
        while row < rows.end {
            let tile = self.tile_rows().min(rows.end - row);
            // The tile's last row may be followed by rows of the same tile that another part holds.
            let whole = self.tile_rows().min(product.rows - row);
            let at = input::len(row, weight.cols()) + chunk.start * whole * ROW_BYTES / 4;
            operands.input = product.input[at..][..chunk.len() * whole * ROW_BYTES / 4].as_ptr().cast();
            operands.input_rows = whole;
            let sums = &mut sums[(row - rows.start) * sums_row..];
            assert!(sums.len() >= (tile - 1) * sums_row + run.panels.len() * LANES, "sums");
            operands.sums = sums.as_mut_ptr();
            // SAFETY: the run's chunk is unpacked, the tile of `whole` rows is inside the input and the sums hold
            // `tile` rows of the run's panels, as asserted; the table was chosen for this machine.
            unsafe { tile_fn(&operands, run.panels.len(), tile) };
            // While the first tile is computed, the weights of the next chunk come closer.
            operands.ask_block = 0;
            row += tile;
        }
    }

    /// Unpacks a chunk of each panel; the operands lack what depends on rows.
    fn unpacked(
        &self,
        weight: &PackedMatrix,
        run: &Run,
        chunk: &Range<usize>,
        scratch: &mut [f32],
    ) -> Operands {
        let layout = run.kind.layout();
        for (i, panel) in run.panels.clone().enumerate() {
            let from = Packed {
                ask: next_chunk(weight, run, panel, chunk),
                ..packed(weight, run.kind, panel, chunk.start)
            };
            let (codes, rest) = scratch[i * PANEL_LEN..][..PANEL_LEN].split_at_mut(CODES_LEN);
            let (scales, shifts) = rest.split_at_mut(SCALES_LEN);
            let to = Unpacked {
                codes: codes.as_mut_ptr().cast(),
                scales: scales.as_mut_ptr(),
                shifts: shifts.as_mut_ptr(),
            };
            // SAFETY: `packed` gives blocks inside the panel; a chunk has room in each part of the scratch; the table
            // was chosen for this machine.
            unsafe { (self.codes().unpack[run.kind as usize])(&from, &to) };
        }
        let scratch = scratch.as_ptr();
        let (codes, codes_panel) = if layout.bits == 8 {
            let codes = packed(weight, run.kind, run.panels.start, chunk.start).codes;
            (codes, layout.panel_bytes(weight.cols()))
        } else {
            (scratch.cast(), PANEL_LEN * 4)
        };
        let scales = scratch.wrapping_add(CODES_LEN);
        Operands {
            codes,
            codes_panel,
            scales,
            shifts: scales.wrapping_add(SCALES_LEN),
            scales_panel: PANEL_LEN,
            blocks: chunk.len(),
            input: std::ptr::null(),
            input_rows: 0,
            ask: codes,
            ask_panel: 0,
            ask_block: 0,
            sums: std::ptr::null_mut(),
            sums_row: 0,
        }
    }
}

/// The longest run of one kind that `panels` begin with.
fn run_of(weight: &PackedMatrix, panels: Range<usize>) -> Run {
    let kind = weight.kind(panels.start);
    let end = panels.clone().find(|p| weight.kind(*p) != kind).unwrap_or(panels.end);
    Run { kind, panels: panels.start..end }
}

/// What is read after a chunk of a panel: the chunk behind it, or the first one of the panel that follows those of the run;
/// perhaps beyond the matrix, and never read here.
fn next_chunk(weight: &PackedMatrix, run: &Run, panel: usize, chunk: &Range<usize>) -> *const u8 {
    let (layout, cols) = (run.kind.layout(), weight.cols());
    let (bytes, col) = (weight.panel(panel).1, chunk.end * BLOCK);
    let distance =
        if col < cols { layout.chunk_of(cols, col).0 } else { run.panels.len() * layout.panel_bytes(cols) };
    bytes.as_ptr().wrapping_add(distance)
}

/// The chunk of a panel that block number `first` begins.
fn packed(weight: &PackedMatrix, kind: Kind, panel: usize, first: usize) -> Packed {
    let (layout, cols) = (kind.layout(), weight.cols());
    let bytes = weight.panel(panel).1;
    assert!(first * BLOCK < cols && first.is_multiple_of(CHUNK), "block {first} of {cols} columns");
    assert_eq!(bytes.len(), layout.panel_bytes(cols), "bytes of a panel");
    let (start, chunk) = layout.chunk_of(cols, first * BLOCK);
    let bytes = &bytes[start..][..chunk.end];
    Packed {
        over: bytes.as_ptr(),
        records: bytes[chunk.records..].as_ptr(),
        codes: bytes[chunk.codes..].as_ptr(),
        blocks: CHUNK.min(cols / BLOCK - first),
        ask: bytes.as_ptr(),
    }
}
