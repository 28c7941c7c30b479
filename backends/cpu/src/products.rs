//! Products of a phase: rows with packed weights, one matrix or many side by side.

use mainstay_kernels_cpu::{After, Form, LANES, PART_ROWS, PackedMatrix, Part, Product, pack_tile};

use crate::arena::Slot;
use crate::plan::WeightIndex;
use crate::run::Runner;

/// Rows that one job of a product has at most, the last tile included.
pub(crate) const PART_ROWS_MAX: usize = PART_ROWS;

/// Panels that one job of a product has at most.
const PANELS_MAX: usize = 8;

/// Which rows of a value go into a product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rows {
    /// Consecutive ones.
    Run { first: usize, count: usize },
    /// Those that the thread's [`crate::experts::Grouping`] lists from `first` on.
    Picked { first: usize, count: usize },
}

impl Rows {
    fn count(self) -> usize {
        match self {
            Rows::Run { count, .. } | Rows::Picked { count, .. } => count,
        }
    }

    fn row(self, index: usize, picked: &[usize]) -> usize {
        match self {
            Rows::Run { first, .. } => first + index,
            Rows::Picked { first, .. } => picked[first + index],
        }
    }
}

/// One product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    weight: WeightIndex,
    bias: Option<WeightIndex>,
    input: Slot,
    rows: Rows,
    out: Slot,
    /// Row of `out` that the first row becomes.
    out_row: usize,
    /// Where its packed rows begin; its first tile and its first job in their phases.
    packed: usize,
    first_tile: usize,
    first_job: usize,
}

impl Item {
    /// Rows of `input` become rows of `out` from the given one on.
    pub(crate) fn new(
        (weight, bias): (WeightIndex, Option<WeightIndex>),
        (input, rows): (Slot, Rows),
        (out, out_row): (Slot, usize),
    ) -> Self {
        Self { weight, bias, input, rows, out, out_row, packed: 0, first_tile: 0, first_job: 0 }
    }
}

/// The item that a job of a phase belongs to.
fn item_of(items: &[Item], job: usize, first: impl Fn(&Item) -> usize) -> &Item {
    // Items without jobs begin where the next one does, which is the last to begin there.
    &items[items.partition_point(|item| first(item) <= job) - 1]
}

/// Whether a product reads its rows where they lie: one row of floats.
fn lies_ready(weight: &PackedMatrix, rows: usize) -> bool {
    rows == 1 && weight.form() == Form::Floats
}

impl Runner<'_> {
    /// Computes all products that the scratch lists. Their outputs do not overlap, padding to whole panels included.
    pub(crate) fn products(&mut self, after: After) {
        let (core, weights, tile) = (self.core, self.weights, self.core.kernels.tile_rows());
        let matrix = |item: &Item| &*weights.matrices[item.weight];
        let (items, floats) = (&mut self.scratch.items, &mut self.scratch.floats);
        let panels: usize = items.iter().map(|item| matrix(item).panels()).sum();
        let run = (panels / (core.threads * 4)).clamp(2, PANELS_MAX) & !1;
        let part_rows = PART_ROWS / tile * tile;
        let (mut packed_len, mut tiles, mut jobs) = (0, 0, 0);
        for item in items.iter_mut() {
            (item.packed, item.first_tile, item.first_job) = (packed_len, tiles, jobs);
            let (weight, rows) = (matrix(item), item.rows.count());
            if !lies_ready(weight, rows) {
                packed_len += weight.form().input_len(rows, weight.cols());
                tiles += rows.div_ceil(tile);
            }
            jobs += weight.panels().div_ceil(run) * rows.div_ceil(part_rows);
        }
        let (items, picked) = (&self.scratch.items, &self.scratch.grouping.rows);
        self.worker.each(tiles, |job| {
            let item = item_of(items, job.index(), |item| item.first_tile);
            let (weight, count) = (matrix(item), item.rows.count());
            let first = (job.index() - item.first_tile) * tile;
            let rows = first..(first + tile).min(count);
            let place = |row| item.packed + weight.form().input_len(row, weight.cols());
            let packed = core.arena.write_flat(core.plan.packed, place(first)..place(rows.end), &job);
            let input = core.arena.read(item.input, 0..item.input.rows);
            let rows = rows.map(|index| input.row(item.rows.row(index, picked)));
            match weight.form() {
                Form::Floats => pack_tile(rows, packed),
                Form::Integers => core.kernels.quantize_tile(rows, packed),
            }
        });
        let packed = core.arena.read_flat(core.plan.packed, packed_len);
        self.worker.each(jobs, |job| {
            let item = item_of(items, job.index(), |item| item.first_job);
            let (weight, rows) = (matrix(item), item.rows.count());
            let input = if lies_ready(weight, rows) {
                let row = item.rows.row(0, picked);
                core.arena.read(item.input, row..row + 1).row(0)
            } else {
                &packed[item.packed..][..weight.form().input_len(rows, weight.cols())]
            };
            let bias = item.bias.map(|b| &*weights.vectors[b]);
            let product = Product { weight, bias, input, rows, after };
            let (index, groups) = (job.index() - item.first_job, weight.panels().div_ceil(run));
            let (first, row) = (index % groups * run, index / groups * part_rows);
            let panels = first..(first + run).min(weight.panels());
            let part = Part { panels, rows: row..(row + part_rows).min(rows) };
            let halved = if matches!(after, After::Gate(_)) { 2 } else { 1 };
            let columns = |panel: usize| panel * LANES / halved;
            let place = Slot {
                offset: item.out.offset + columns(first),
                width: columns(part.panels.end) - columns(first),
                ..item.out
            };
            let out_rows = item.out_row + part.rows.start..item.out_row + part.rows.end;
            core.kernels.matmul(&product, &part, &mut core.arena.write(place, out_rows, &job), floats);
        });
    }

    /// One product of all rows of the block.
    pub(crate) fn linear(&mut self, weight: (usize, Option<usize>), input: Slot, after: After, out: Slot) {
        self.scratch.items.clear();
        let rows = Rows::Run { first: 0, count: self.rows };
        self.scratch.items.push(Item::new(weight, (input, rows), (out, 0)));
        self.products(after);
    }
}
