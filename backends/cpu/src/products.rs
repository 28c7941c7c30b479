//! Products of a phase: rows with packed weights, one matrix or many side by side.

use mainstay_kernels_cpu::{After, Form, LANES, PART_ROWS, Part, Product, pack_tile};

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

/// Whether a product's rows are read where they lie.
fn is_bare(form: Form, rows: usize) -> bool {
    form == Form::Floats && rows == 1
}

impl Runner<'_> {
    /// Computes all products that the scratch lists. Their outputs do not overlap, padding to whole panels included.
    pub(crate) fn products(&mut self, after: After) {
        let tiles = self.lay_out();
        self.pack(tiles);
        self.multiply(after);
    }

    /// One product of all rows of the block.
    pub(crate) fn linear(&mut self, weight: (usize, Option<usize>), input: Slot, after: After, out: Slot) {
        let form = self.weights.matrices[weight.0].form();
        self.scratch.items.clear();
        let rows = Rows::Run { first: 0, count: self.rows };
        self.scratch.items.push(Item::new(weight, (input, rows), (out, 0)));
        let tiles = self.lay_out();
        if self.in_packed != Some((input, form)) {
            self.pack(tiles);
        }
        self.in_packed = Some((input, form));
        self.multiply(after);
    }

    /// Gives each product its place among the packed rows; returns the tiles of all.
    fn lay_out(&mut self) -> usize {
        let tile = self.core.kernels.tile_rows();
        let (mut packed, mut tiles) = (0, 0);
        for item in &mut self.scratch.items {
            (item.packed, item.first_tile) = (packed, tiles);
            let (weight, rows) = (&self.weights.matrices[item.weight], item.rows.count());
            if !is_bare(weight.form(), rows) {
                packed += weight.form().input_len(rows, weight.cols());
                tiles += rows.div_ceil(tile);
            }
        }
        tiles
    }

    /// Rows as the weights' products take them.
    fn pack(&mut self, tiles: usize) {
        let (core, weights, tile) = (self.core, self.weights, self.core.kernels.tile_rows());
        let (items, picked) = (&self.scratch.items, &self.scratch.grouping.rows);
        self.worker.each(tiles, |job| {
            let item = item_of(items, job.index(), |item| item.first_tile);
            let weight = &weights.matrices[item.weight];
            let (form, cols, count) = (weight.form(), weight.cols(), item.rows.count());
            let first = (job.index() - item.first_tile) * tile;
            let rows = first..(first + tile).min(count);
            let range = form.input_len(first, cols)..form.input_len(rows.end, cols);
            let range = item.packed + range.start..item.packed + range.end;
            let place = core.arena.write_flat(core.plan.packed, range, &job);
            let input = core.arena.read(item.input, 0..item.input.rows);
            let rows = rows.map(|index| input.row(item.rows.row(index, picked)));
            match form {
                Form::Floats => pack_tile(rows, place),
                Form::Integers => core.kernels.quantize_tile(rows, place),
            }
        });
    }

    fn multiply(&mut self, after: After) {
        let (core, weights, tile) = (self.core, self.weights, self.core.kernels.tile_rows());
        let panels: usize = self.scratch.items.iter().map(|i| weights.matrices[i.weight].panels()).sum();
        let run = (panels / (core.threads * 4)).clamp(2, PANELS_MAX) & !1;
        let part_rows = PART_ROWS / tile * tile;
        let mut jobs = 0;
        for item in &mut self.scratch.items {
            item.first_job = jobs;
            let panels = weights.matrices[item.weight].panels();
            jobs += panels.div_ceil(run) * item.rows.count().div_ceil(part_rows);
        }
        let (items, picked) = (&self.scratch.items, &self.scratch.grouping.rows);
        let floats = &mut self.scratch.floats;
        self.worker.each(jobs, |job| {
            let item = item_of(items, job.index(), |item| item.first_job);
            let (weight, rows) = (&*weights.matrices[item.weight], item.rows.count());
            let input = if is_bare(weight.form(), rows) {
                let row = item.rows.row(0, picked);
                core.arena.read(item.input, row..row + 1).row(0)
            } else {
                let len = weight.form().input_len(rows, weight.cols());
                &core.arena.read_flat(core.plan.packed, item.packed + len)[item.packed..]
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
}
