//! Products of rows with packed weights. An output element is one f32 chain, `bias` or 0, then
//! `sum = fma(w[k], x[k], sum)` for k ascending, or what [`crate::quantized`] says, whatever the number of rows, so its
//! bits depend on nothing else.

use std::ops::Range;

use half::{bf16, f16};

use crate::math::{Function, Gate};
use crate::pack::{Form, PackedMatrix, WeightType};
use crate::quantized::product;
use crate::simd::LANES;
use crate::tile::Operands;
use crate::{Kernels, MatMut};

/// What is done with a finished sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum After {
    /// Stored.
    Store,
    /// Added to what the output holds: the residual.
    Accumulate,
    /// Mapped, then stored.
    Activate(Function),
    /// Panels alternate gate and up; what becomes of both is stored, half as wide.
    Gate(Gate),
}

/// A product `x W^T + bias` that several threads work on, each on its own part of the output.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// `[rows of W, cols]`
    pub weight: &'a PackedMatrix,
    /// One per row of W, padded to whole panels; 0 where absent.
    pub bias: Option<&'a [f32]>,
    /// Activations, `[rows, cols]`, in the weight's form: by [`crate::pack_tile`] or [`Kernels::quantize_tile`].
    pub input: &'a [f32],
    /// Rows of the activations.
    pub rows: usize,
    /// What is done with the sums.
    pub after: After,
}

/// The part of a product that one call computes.
#[derive(Clone, Debug)]
pub struct Part {
    /// Panels of the weight; whole pairs under [`After::Gate`].
    pub panels: Range<usize>,
    /// Rows of the activations, beginning at a whole tile.
    pub rows: Range<usize>,
}

/// Columns of weights that are widened at a time: they and a tile of activations stay in the first cache.
const BLOCK_COLS: usize = 256;

/// Panels in flight for few rows, each one a stream from memory.
const STREAMS: usize = 8;

/// Panels worked on together for many rows.
const PAIR: usize = 2;

/// How far ahead of the stream weights are asked for, bytes.
const AHEAD_BYTES: usize = 1024;

/// Rows that a part should have at most: their activations and sums stay in the second cache.
pub const PART_ROWS: usize = 192;

/// Floats of scratch that a part of up to `rows` rows needs, for tiles of at most `tile` rows.
pub fn scratch_len(rows: usize, tile: usize) -> usize {
    let sums = (rows.min(tile) * STREAMS).max(rows * PAIR);
    // A line more, so that there is room from the first whole line on.
    (sums + BLOCK_COLS * PAIR + 1) * LANES
}

impl Kernels {
    /// Computes one part of a product into `out`: all rows of `part` by the columns of its panels (half of them
    /// under [`After::Gate`]), padding included.
    ///
    /// # Panics
    /// If the part, the output and the scratch do not fit together.
    pub fn matmul(&self, product: &Product<'_>, part: &Part, out: &mut MatMut<'_>, scratch: &mut [f32]) {
        let (rows, cols) = (part.rows.len(), product.weight.cols());
        assert!(part.panels.end <= product.weight.panels(), "{part:?} of {}", product.weight.panels());
        assert!(
            part.rows.end <= product.rows && part.rows.start.is_multiple_of(self.tile_rows()),
            "{part:?}"
        );
        let form = product.weight.form();
        assert_eq!(product.input.len(), form.input_len(product.rows, cols), "packed activations");
        assert!(scratch.len() >= scratch_len(rows, self.tile_rows()), "scratch of {}", scratch.len());
        let gated = matches!(product.after, After::Gate(_));
        let width = part.panels.len() * LANES / if gated { 2 } else { 1 };
        assert!(out.rows() == rows && out.cols() >= width, "{} x {} for {part:?}", out.rows(), out.cols());
        let whole = part.panels.start.is_multiple_of(2) && part.panels.len().is_multiple_of(2);
        assert!(!gated || whole, "{part:?} cuts a pair");
        let few = product.rows <= self.tile_rows();
        let group = match (few, form) {
            (true, Form::Integers) if product.rows <= self.codes().rows_max => STREAMS,
            (true, Form::Floats) => STREAMS,
            (true, Form::Integers) => product::STREAMS,
            (false, _) => PAIR,
        };
        let mut panel = part.panels.start;
        let mut column = 0;
        while panel < part.panels.end {
            let panels = panel..(panel + group).min(part.panels.end);
            let (sums, rest) = scratch.split_at_mut(rows * panels.len() * LANES);
            start_sums(product.bias, &panels, sums);
            match form {
                Form::Integers => self.add_codes(product, &panels, &part.rows, sums, rest),
                Form::Floats if few => self.add_streamed(product, &panels, sums),
                Form::Floats => self.add_blocked(product, &panels, &part.rows, sums, rest),
            }
            let sums = &scratch[..rows * panels.len() * LANES];
            self.finish(product.after, panels.len(), sums, out, column);
            column += panels.len() * LANES / if gated { 2 } else { 1 };
            panel = panels.end;
        }
    }

    /// Few rows: weights go straight from memory into the registers, all columns in one run.
    fn add_streamed(&self, product: &Product<'_>, panels: &Range<usize>, sums: &mut [f32]) {
        let cols = product.weight.cols();
        let dtype = product.weight.dtype();
        let left = left(product.weight, panels.start, 0);
        macro_rules! go {
            ($run:expr, $element:ty) => {{
                let operands = Operands {
                    left: left.cast::<$element>(),
                    left_panel: cols * LANES,
                    left_step: LANES,
                    right: product.input.as_ptr(),
                    right_row: 1,
                    right_step: product.rows,
                    len: cols,
                    ask: left.wrapping_add(AHEAD_BYTES),
                    ask_panel: dtype.panel_bytes(cols),
                    ask_step: dtype.panel_bytes(1),
                    sums: sums.as_mut_ptr(),
                    sums_row: panels.len() * LANES,
                };
                // SAFETY: the panels are inside the matrix, the one tile of activations is rows * cols long, the
                // sums rows * panels * 16.
                unsafe { $run(&operands, panels.len(), product.rows) }
            }};
        }
        match dtype {
            WeightType::F32 => go!((self.table().tile_f32), f32),
            WeightType::F16 => go!((self.table().tile_f16), f16),
            WeightType::BF16 => go!((self.table().tile_bf16), bf16),
            WeightType::Codes(kind) => unreachable!("{kind:?} is not a float"),
        }
    }

    /// Many rows: a block of columns is widened once and used for all tiles.
    fn add_blocked(
        &self,
        product: &Product<'_>,
        panels: &Range<usize>,
        rows: &Range<usize>,
        sums: &mut [f32],
        wide: &mut [f32],
    ) {
        let cols = product.weight.cols();
        let count = panels.len();
        let panel_bytes = product.weight.dtype().panel_bytes(cols);
        assert!(wide.len() >= count * BLOCK_COLS * LANES);
        let mut first = 0;
        while first < cols {
            let len = BLOCK_COLS.min(cols - first);
            let (wide_left, left_panel) = if product.weight.dtype() == WeightType::F32 {
                (left(product.weight, panels.start, first).cast::<f32>(), cols * LANES)
            } else {
                for p in 0..count {
                    let block = &mut wide[p * BLOCK_COLS * LANES..][..len * LANES];
                    self.widen(product.weight, panels.start + p, first, block);
                }
                (wide.as_ptr(), BLOCK_COLS * LANES)
            };
            let following = if first + len < cols { (panels.start, first + len) } else { (panels.end, 0) };
            let next = if following.0 < product.weight.panels() {
                left(product.weight, following.0, following.1)
            } else {
                wide_left.cast()
            };
            let mut row = rows.start;
            while row < rows.end {
                let tile = self.tile_rows().min(rows.end - row);
                // The tile's last row may be followed by rows of the same tile that another part holds.
                let whole = self.tile_rows().min(product.rows - row);
                // While the first tile is computed, the weights of the next block come closer.
                let asks = row == rows.start;
                let operands = Operands {
                    left: wide_left,
                    left_panel,
                    left_step: LANES,
                    right: product.input[row * cols + first * whole..].as_ptr(),
                    right_row: 1,
                    right_step: whole,
                    len,
                    ask: if asks { next } else { wide_left.cast() },
                    ask_panel: if asks { panel_bytes } else { 0 },
                    ask_step: if asks { panel_bytes / cols } else { 0 },
                    sums: sums[(row - rows.start) * count * LANES..].as_mut_ptr(),
                    sums_row: count * LANES,
                };
                // SAFETY: the left operand is `len` columns of `count` panels, the right one a tile of `whole` rows
                // from column `first`, and the sums have count * 16 places for each row of the part.
                unsafe { (self.table().tile_f32)(&operands, count, tile) };
                row += tile;
            }
            first += len;
        }
    }

    /// Widens `out.len() / 16` columns of a panel from column `first`.
    fn widen(&self, weight: &PackedMatrix, panel: usize, first: usize, out: &mut [f32]) {
        let from = left(weight, panel, first);
        assert!(first + out.len() / LANES <= weight.cols());
        // SAFETY: the columns are inside the panel.
        unsafe {
            match weight.dtype() {
                WeightType::F32 => out.copy_from_slice(std::slice::from_raw_parts(from.cast(), out.len())),
                WeightType::F16 => (self.table().widen_f16)(from.cast(), out),
                WeightType::BF16 => (self.table().widen_bf16)(from.cast(), out),
                WeightType::Codes(kind) => unreachable!("{kind:?} is not a float"),
            }
        }
    }

    /// Takes `[rows][panels][16]` sums to the output, from its column `column`.
    fn finish(&self, after: After, panels: usize, sums: &[f32], out: &mut MatMut<'_>, column: usize) {
        let width = panels * LANES;
        for (r, sums) in sums.chunks_exact(width).enumerate() {
            match after {
                After::Store => out.row(r)[column..][..width].copy_from_slice(sums),
                After::Accumulate => {
                    out.row(r)[column..][..width].iter_mut().zip(sums).for_each(|(o, s)| *o += s);
                }
                After::Activate(f) => {
                    let out = &mut out.row(r)[column..][..width];
                    out.copy_from_slice(sums);
                    // SAFETY: whole vectors, on the machine that the table was chosen for.
                    unsafe { (self.table().activate)(f, out) };
                }
                After::Gate(f) => {
                    let out = &mut out.row(r)[column..][..width / 2];
                    // SAFETY: pairs of whole vectors, on the machine that the table was chosen for.
                    unsafe { (self.table().gate_pairs)(f, sums, out) };
                }
            }
        }
    }
}

/// Sums begin with the bias, or with 0.
fn start_sums(bias: Option<&[f32]>, panels: &Range<usize>, sums: &mut [f32]) {
    match bias {
        None => sums.fill(0.0),
        Some(bias) => {
            let bias = &bias[panels.start * LANES..panels.end * LANES];
            sums.chunks_exact_mut(bias.len()).for_each(|row| row.copy_from_slice(bias));
        }
    }
}

/// The address of a panel's column.
fn left(weight: &PackedMatrix, panel: usize, col: usize) -> *const u8 {
    weight.panel(panel).1[weight.dtype().panel_bytes(col)..].as_ptr()
}
