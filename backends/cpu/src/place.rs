//! Where values lie: slots of one arena, given out for as long as a value is read and then reused.

use std::ops::Range;

use mainstay_kernels_cpu::LANES;
use mainstay_models::graph::{Matrix, Value, Vector};

use crate::arena::Slot;
use crate::plan::{Access, Call, MatrixUse, RowOrder, VectorUse, WeightIndex};

/// A block's calls before its values have places. Values are the block's own and extra ones after them.
pub(crate) struct Draft {
    pub(crate) calls: Vec<Call<Value>>,
    pub(crate) matrices: Vec<MatrixUse>,
    pub(crate) vectors: Vec<VectorUse>,
    /// Floats for each row on its way into the products of one phase.
    pub(crate) packed_width: usize,
    widths: Vec<usize>,
    /// Of a value that is a view: the value it looks into, and its first column there.
    views: Vec<Option<(Value, usize)>>,
    /// The value that is there when the block begins.
    entry: Option<Value>,
    /// The block's last value.
    result: Value,
}

impl Draft {
    pub(crate) fn new(widths: &[usize]) -> Self {
        Self {
            calls: Vec::new(),
            matrices: Vec::new(),
            vectors: Vec::new(),
            packed_width: 0,
            widths: widths.to_vec(),
            views: vec![None; widths.len()],
            entry: None,
            result: widths.len().saturating_sub(1),
        }
    }

    /// `v` is what enters the block, or, in an epilogue, the step's output rows of it.
    pub(crate) fn enter(&mut self, v: Value, selected: bool) {
        match self.entry {
            Some(entry) if !selected => self.alias(v, entry),
            None if !selected => self.entry = Some(v),
            known => {
                let input = known.unwrap_or_else(|| self.extra(self.widths[v]));
                self.entry = Some(input);
                self.calls.push(Call::Select { input, out: v });
            }
        }
    }

    /// `v` is another name of `of`.
    pub(crate) fn alias(&mut self, v: Value, of: Value) {
        self.views[v] = Some((of, 0));
    }

    /// `v` is columns of `input`.
    pub(crate) fn slice(&mut self, v: Value, input: Value, start: usize) {
        self.views[v] = Some((input, start));
    }

    /// A value that the block does not name.
    pub(crate) fn extra(&mut self, width: usize) -> Value {
        self.widths.push(width);
        self.views.push(None);
        self.widths.len() - 1
    }

    /// The index of a matrix of the block.
    pub(crate) fn matrix(&mut self, matrix: &Matrix, order: RowOrder) -> WeightIndex {
        self.packed_width = self.packed_width.max(matrix.cols);
        self.matrices.push(MatrixUse { matrix: matrix.clone(), order });
        self.matrices.len() - 1
    }

    /// The index of a vector of the block.
    pub(crate) fn vector(&mut self, vector: &Vector, order: RowOrder) -> WeightIndex {
        self.vectors.push(VectorUse { vector: vector.clone(), order });
        self.vectors.len() - 1
    }

    /// The value that `v` is part of, and the first column there.
    fn root(&self, v: Value) -> (Value, usize) {
        match self.views[v] {
            None => (v, 0),
            Some((of, start)) => {
                let (root, first) = self.root(of);
                (root, first + start)
            }
        }
    }
}

/// Gives out the floats of the arena.
pub(crate) struct Places {
    /// Where the values of blocks begin; all blocks share what comes after.
    base: Option<usize>,
    len: usize,
}

/// Floats from row to row, so that rows begin on a cache line and products may write whole vectors.
pub(crate) fn stride(width: usize) -> usize {
    width.next_multiple_of(LANES).max(LANES)
}

impl Places {
    pub(crate) fn new() -> Self {
        Self { base: None, len: 0 }
    }

    /// Floats in use.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A slot that stays.
    pub(crate) fn fixed(&mut self, rows: usize, width: usize) -> Slot {
        let slot = Slot { offset: self.len, rows, stride: stride(width), width };
        self.len += rows * slot.stride;
        slot
    }

    /// Gives every value of a block a slot of `rows` rows. `entry` is where the block's input is, `exit` where its
    /// result has to be. Returns the calls and where the result is.
    pub(crate) fn assign(
        &mut self,
        draft: &mut Draft,
        rows: usize,
        entry: Option<Slot>,
        exit: Option<Slot>,
    ) -> (Vec<Call<Slot>>, Slot) {
        let base = *self.base.get_or_insert(self.len);
        let mut slots: Vec<Option<Slot>> = vec![None; draft.widths.len() + 1];
        if let (Some(value), Some(slot)) = (draft.entry, entry) {
            slots[value] = Some(slot);
        }
        let result = draft.root(draft.result);
        match exit {
            Some(slot) if entry.is_none() && result.1 == 0 && draft.widths[result.0] == slot.width => {
                slots[result.0] = Some(slot);
            }
            Some(slot) if draft.entry != Some(result.0) || result.1 != 0 => {
                let out = draft.extra(slot.width);
                slots[out] = Some(slot);
                draft.calls.push(Call::Copy { input: draft.result, out });
            }
            _ => {}
        }
        let last = last_uses(draft, result.0);
        let mut live: Vec<(Range<usize>, usize)> = Vec::new();
        let mut calls = Vec::with_capacity(draft.calls.len());
        for (i, call) in draft.calls.iter().enumerate() {
            calls.push(call.map(|v, _| {
                let (root, first) = draft.root(v);
                let slot = *slots[root].get_or_insert_with(|| {
                    let stride = stride(draft.widths[root]);
                    let offset = lowest_gap(&live, base, rows * stride);
                    live.push((offset..offset + rows * stride, last[root]));
                    self.len = self.len.max(offset + rows * stride);
                    Slot { offset, rows, stride, width: draft.widths[root] }
                });
                slot.columns(first..first + draft.widths[v])
            }));
            live.retain(|(_, last)| *last > i);
        }
        let place = slots[result.0].map(|s| s.columns(result.1..result.1 + draft.widths[draft.result]));
        let out = exit.or(place);
        (calls, out.unwrap_or(Slot { offset: base, rows: 0, stride: LANES, width: 0 }))
    }
}

/// The index of the last call that touches each root value; the result is needed after all of them.
fn last_uses(draft: &Draft, result: Value) -> Vec<usize> {
    let mut last = vec![0; draft.widths.len()];
    for (i, call) in draft.calls.iter().enumerate() {
        call.map(|v, _: Access| last[draft.root(v).0] = i);
    }
    last[result] = usize::MAX;
    last
}

/// The lowest offset from `base` with room for `len` floats beside what is live.
fn lowest_gap(live: &[(Range<usize>, usize)], base: usize, len: usize) -> usize {
    let mut offset = base;
    while let Some((taken, _)) = live.iter().find(|(r, _)| r.start < offset + len && offset < r.end) {
        offset = taken.end;
    }
    offset
}
