//! Products of a phase: rows with packed weights, one matrix or many side by side.

use std::ops::Range;

use mainstay_kernels_cpu::{After, Form, LANES, PART_ROWS, Part, Product, pack_tile};

use crate::arena::Slot;
use crate::plan::{Call, WeightIndex};
use crate::pool::Job;
use crate::run::Runner;

/// Rows that one job of a product has at most, the last tile included.
pub(crate) const PART_ROWS_MAX: usize = PART_ROWS;

/// Panels that one job of a product has at most.
const PANELS_MAX: usize = 8;

/// Which rows of a value go into a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// Rows of a value as products take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packed {
    input: Slot,
    rows: Rows,
    form: Form,
}

/// How much there is to do.
struct Phase {
    /// Panels of a job.
    run: usize,
    /// Rows of a job.
    part_rows: usize,
    tiles: usize,
    jobs: usize,
    /// Floats that are packed.
    packed: usize,
}

/// The item that a job of a phase belongs to.
fn item_of(items: &[Item], job: usize, first: impl Fn(&Item) -> usize) -> &Item {
    // Items without jobs begin where the next one does, which is the last to begin there.
    &items[items.partition_point(|item| first(item) <= job) - 1]
}

/// One row of floats is read where it lies.
pub(crate) fn lies_ready(form: Form, rows: usize) -> bool {
    form == Form::Floats && rows == 1
}

/// How many of the products that these calls begin with can be computed side by side: what becomes of their sums is the
/// same, and none writes what another reads or writes.
pub(crate) fn independent(calls: &[Call<Slot>]) -> usize {
    let goes_with = |a: &Call<Slot>, b: &Call<Slot>| match (a, b) {
        (
            Call::Linear { input, after, out, .. },
            Call::Linear { input: other, after: same, out: place, .. },
        ) => after == same && !out.meets(*other) && !place.meets(*input) && !out.meets(*place),
        _ => false,
    };
    let is_first = |call: &Call<Slot>| matches!(call, Call::Linear { .. });
    let joins = |i: usize| is_first(&calls[i]) && calls[..i].iter().all(|call| goes_with(call, &calls[i]));
    (0..calls.len()).find(|i| !joins(*i)).unwrap_or(calls.len())
}

impl Runner<'_> {
    /// Computes all products that the scratch lists. Their outputs do not overlap, padding to whole panels included.
    pub(crate) fn products(&mut self, after: After) {
        self.products_of(after, |_, _, _| ());
    }

    /// The same, where `make` makes the rows of the first product's input before they are packed. It is called for each
    /// row once if all products take the same rows packed in the same form, and none is packed yet.
    pub(crate) fn products_of(&mut self, after: After, make: impl Fn(&Self, Range<usize>, &Job)) {
        let phase = self.lay_out();
        self.pack(&phase, make);
        self.multiply(&phase, after);
    }

    /// Gives items their places. Neighbours with the same rows share them, and the first ones may find them packed.
    fn lay_out(&mut self) -> Phase {
        let (weights, tile) = (self.weights, self.core.kernels.tile_rows());
        let items = &mut self.scratch.items;
        let panels: usize = items.iter().map(|item| weights.matrices[item.weight].panels()).sum();
        let run = (panels / (self.core.threads * 4)).clamp(2, PANELS_MAX) & !1;
        let part_rows = PART_ROWS / tile * tile;
        let mut phase = Phase { run, part_rows, tiles: 0, jobs: 0, packed: 0 };
        let mut last = self.in_packed.map(|packed| (packed, 0));
        for item in items.iter_mut() {
            let weight = &weights.matrices[item.weight];
            let (form, count) = (weight.form(), item.rows.count());
            (item.first_tile, item.first_job) = (phase.tiles, phase.jobs);
            phase.jobs += weight.panels().div_ceil(run) * count.div_ceil(part_rows);
            if lies_ready(form, count) {
                continue;
            }
            let own = Packed { input: item.input, rows: item.rows, form };
            item.packed = match last {
                Some((packed, place)) if packed == own => place,
                _ => {
                    phase.tiles += count.div_ceil(tile);
                    phase.packed
                }
            };
            last = Some((own, item.packed));
            phase.packed = phase.packed.max(item.packed + form.input_len(count, weight.cols()));
        }
        // What has the first place in the end is all that was packed. Of values that are overwritten nothing is known.
        let stays = |packed: &Packed| !items.iter().any(|item| item.out.meets(packed.input));
        self.in_packed = last.filter(|(_, place)| *place == 0).map(|(packed, _)| packed).filter(stays);
        phase
    }

    fn pack(&self, phase: &Phase, make: impl Fn(&Self, Range<usize>, &Job)) {
        if phase.tiles == 0 {
            return;
        }
        let (core, tile) = (self.core, self.core.kernels.tile_rows());
        let (items, picked) = (&self.scratch.items, &self.scratch.grouping.rows);
        self.worker.each(phase.tiles, |job| {
            let item = item_of(items, job.index(), |item| item.first_tile);
            let weight = &self.weights.matrices[item.weight];
            let (form, cols) = (weight.form(), weight.cols());
            let first = (job.index() - item.first_tile) * tile;
            let rows = first..(first + tile).min(item.rows.count());
            make(self, rows.clone(), &job);
            let [start, end] = [rows.start, rows.end].map(|row| item.packed + form.input_len(row, cols));
            let place = core.arena.write_flat(core.plan.packed, start..end, &job);
            let input = core.arena.read(item.input, 0..item.input.rows);
            let rows = rows.map(|index| input.row(item.rows.row(index, picked)));
            match form {
                Form::Floats => pack_tile(rows, place),
                Form::Integers => core.kernels.quantize_tile(rows, place),
            }
        });
    }

    fn multiply(&mut self, phase: &Phase, after: After) {
        let (core, weights) = (self.core, self.weights);
        let (items, picked) = (&self.scratch.items, &self.scratch.grouping.rows);
        let floats = &mut self.scratch.floats;
        let packed = core.arena.read_flat(core.plan.packed, phase.packed);
        self.worker.each(phase.jobs, |job| {
            let item = item_of(items, job.index(), |item| item.first_job);
            let (weight, rows) = (&*weights.matrices[item.weight], item.rows.count());
            let input = if lies_ready(weight.form(), rows) {
                let row = item.rows.row(0, picked);
                core.arena.read(item.input, row..row + 1).row(0)
            } else {
                &packed[item.packed..][..weight.form().input_len(rows, weight.cols())]
            };
            let bias = item.bias.map(|b| &*weights.vectors[b]);
            let product = Product { weight, bias, input, rows, after };
            let (index, groups) = (job.index() - item.first_job, weight.panels().div_ceil(phase.run));
            let (first, row) = (index % groups * phase.run, index / groups * phase.part_rows);
            let panels = first..(first + phase.run).min(weight.panels());
            let part = Part { panels, rows: row..(row + phase.part_rows).min(rows) };
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
