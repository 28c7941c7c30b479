//! Mixtures of experts: how they are planned, and how a step's rows go through them.
//!
//! Rows are sorted by expert, so that each touched expert is one product and the others are not read. What an expert
//! makes of a row does not depend on its other rows, and a row's results are added by ascending id, so neither batch nor
//! chunk changes a bit.

use mainstay_kernels_cpu::route::{Choice, Router, Scoring};
use mainstay_kernels_cpu::{After, Gate, LANES, Mat};
use mainstay_models::LoadError;
use mainstay_models::graph::{self, RoutingOrder, Score, Value};

use crate::arena::Slot;
use crate::place::stride;
use crate::plan::{Call, Fuse, RowOrder, WeightIndex, gate};
use crate::products::{Item, Rows};
use crate::run::Runner;

/// How a block's rows are routed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RouteShape {
    scoring: Scoring,
    choice: Choice,
    bias: Option<WeightIndex>,
    groups: Option<(usize, usize)>,
    count: usize,
    top_k: usize,
    renormalise: bool,
    scale: f32,
}

/// The experts of a block. Weights of the same kind have consecutive indices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Mixture {
    pub(crate) count: usize,
    pub(crate) top_k: usize,
    up: WeightIndex,
    up_bias: Option<WeightIndex>,
    down: WeightIndex,
    down_bias: Option<WeightIndex>,
    gate: Gate,
    inner: usize,
    width: usize,
}

impl Fuse<'_> {
    /// The last call of an op of experts.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] where gate and up do not fill whole panels.
    pub(crate) fn experts(&mut self, v: Value, e: &graph::Experts) -> Result<Call<Value>, LoadError> {
        let (inner, width) = (e.experts[0].inner(), e.experts[0].down.rows());
        if !inner.is_multiple_of(LANES) {
            let what =
                format!("experts with {inner} elements between their products (no multiple of {LANES})");
            return Err(LoadError::Unsupported { backend: "cpu", what });
        }
        let (routing, draft) = (&e.routing, &mut self.draft);
        let top_k = routing.top_k;
        let shape = RouteShape {
            scoring: match routing.score {
                Score::Softmax => Scoring::Softmax,
                Score::Sigmoid => Scoring::Sigmoid,
            },
            choice: match routing.order {
                RoutingOrder::ScoreFirst => Choice::Scored,
                RoutingOrder::ChooseFirst => Choice::Raw,
            },
            bias: routing.bias.as_ref().map(|b| draft.vector(b, RowOrder::Plain)),
            groups: routing.groups.map(|g| (g.count, g.kept)),
            count: e.experts.len(),
            top_k,
            renormalise: routing.renormalise,
            scale: routing.scale,
        };
        let (up, down) = (draft.matrices.len(), draft.matrices.len() + shape.count);
        e.experts.iter().for_each(|e| _ = draft.matrix(&e.up, RowOrder::Halves));
        e.experts.iter().for_each(|e| _ = draft.matrix(&e.down, RowOrder::Plain));
        let up_biases = e.experts.iter().filter_map(|e| e.up_bias.as_ref());
        let up_bias =
            up_biases.map(|b| draft.vector(b, RowOrder::Halves)).fold(None, |first, i| first.or(Some(i)));
        let down_biases = e.experts.iter().filter_map(|e| e.down_bias.as_ref());
        let down_bias =
            down_biases.map(|b| draft.vector(b, RowOrder::Plain)).fold(None, |first, i| first.or(Some(i)));
        draft.packed_width = draft.packed_width.max(top_k * e.experts[0].up.cols).max(top_k * inner);
        let (count, gate) = (shape.count, gate(e.f));
        let mixture = Mixture { count, top_k, up, up_bias, down, down_bias, gate, inner, width };
        let routes = draft.extra(2 * top_k);
        let joined = draft.extra(top_k * stride(inner));
        let results = draft.extra(top_k * stride(width));
        draft.calls.extend([
            Call::Route { shape, scores: e.scores, out: routes },
            Call::ExpertUp { mixture, routes, input: e.input, out: joined },
            Call::ExpertDown { mixture, input: joined, out: results },
        ]);
        Ok(Call::ExpertSum { mixture, routes, input: results, out: v })
    }
}

/// Which rows of a step go to which expert. Each thread makes it for itself from the same routes.
pub(crate) struct Grouping {
    /// Where each expert's rows begin, and the end.
    starts: Vec<usize>,
    /// Rows of the step, sorted by expert.
    pub(crate) rows: Vec<usize>,
    /// For every row and each of its experts, its place in `rows`.
    places: Vec<usize>,
}

impl Grouping {
    /// Room for the largest step.
    pub(crate) fn new(experts: usize, rows: usize) -> Self {
        let of = |len| Vec::with_capacity(len);
        Self { starts: of(experts + 1), rows: of(rows), places: of(rows) }
    }

    /// Sorts rows by the experts that stand first in their routes.
    fn fill(&mut self, routes: Mat<'_>, experts: usize, top_k: usize) {
        let ids =
            || (0..routes.rows()).flat_map(|row| routes.row(row)[..top_k].iter().map(|&id| id as usize));
        let len = routes.rows() * top_k;
        for (list, len) in [(&mut self.starts, experts + 1), (&mut self.rows, len), (&mut self.places, len)] {
            list.clear();
            list.resize(len, 0);
        }
        ids().for_each(|id| self.starts[id + 1] += 1);
        (0..experts).for_each(|id| self.starts[id + 1] += self.starts[id]);
        // `starts` is where the next row of an expert goes, and in the end where the next expert's begin.
        for (i, id) in ids().enumerate() {
            let place = self.starts[id];
            self.starts[id] += 1;
            self.rows[place] = i / top_k;
            self.places[i] = place;
        }
        self.starts.copy_within(..experts, 1);
        self.starts[0] = 0;
    }

    /// Every expert that has rows, and where they are.
    fn touched(&self) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        let ranges = self.starts.windows(2).map(|ends| ends[0]..ends[1]);
        ranges.enumerate().filter(|(_, range)| !range.is_empty())
    }
}

impl Runner<'_> {
    pub(crate) fn route(&mut self, shape: RouteShape, scores: Slot, out: Slot) {
        let RouteShape { scoring, choice, groups, count, top_k, renormalise, scale, .. } = shape;
        let bias = shape.bias.map(|bias| &self.weights.vectors[bias][..count]);
        let router = Router { scoring, choice, bias, groups, top_k, renormalise, scale };
        let (core, floats) = (self.core, &mut self.scratch.floats);
        self.worker.each(self.rows, |job| {
            let row = job.index();
            let mut out = core.arena.write(out, row..row + 1, &job);
            core.kernels.route(&router, core.arena.read(scores, row..row + 1).row(0), floats, out.row(0));
        });
    }

    pub(crate) fn expert_up(&mut self, mixture: Mixture, routes: Slot, input: Slot, out: Slot) {
        let routes = self.core.arena.read(routes, 0..self.rows);
        let Mixture { count, top_k, inner, .. } = mixture;
        self.scratch.grouping.fill(routes, count, top_k);
        let out = out.split(top_k, inner);
        self.scratch.items.clear();
        for (id, range) in self.scratch.grouping.touched() {
            let (weight, bias) = (mixture.up + id, mixture.up_bias.map(|first| first + id));
            // As a run, one row is the same for all experts that it goes to.
            let rows = match (range.start, range.len()) {
                (first, 1) => Rows::Run { first: self.scratch.grouping.rows[first], count: 1 },
                (first, count) => Rows::Picked { first, count },
            };
            self.scratch.items.push(Item::new((weight, bias), (input, rows), (out, range.start)));
        }
        self.products(After::Gate(mixture.gate));
    }

    /// The scratch still knows the rows' order from [`Runner::expert_up`], the call before.
    pub(crate) fn expert_down(&mut self, mixture: Mixture, input: Slot, out: Slot) {
        let (input, out) =
            (input.split(mixture.top_k, mixture.inner), out.split(mixture.top_k, mixture.width));
        self.scratch.items.clear();
        for (id, range) in self.scratch.grouping.touched() {
            let (weight, bias) = (mixture.down + id, mixture.down_bias.map(|first| first + id));
            let rows = Rows::Run { first: range.start, count: range.len() };
            self.scratch.items.push(Item::new((weight, bias), (input, rows), (out, range.start)));
        }
        self.products(After::Store);
    }

    /// The scratch still knows the rows' order, as in [`Runner::expert_down`].
    pub(crate) fn expert_sum(&self, mixture: Mixture, routes: Slot, input: Slot, out: Slot) {
        let (core, top_k) = (self.core, mixture.top_k);
        let results = core.arena.read(input.split(top_k, mixture.width), 0..self.rows * top_k);
        let places = &self.scratch.grouping.places;
        self.in_rows(|_, rows, job| {
            let mut out = core.arena.write(out, rows.clone(), job);
            for (r, row) in rows.enumerate() {
                let weights = &core.arena.read(routes, row..row + 1).row(0)[top_k..];
                let sum = out.row(r);
                sum.fill(0.0);
                for (place, weight) in places[row * top_k..][..top_k].iter().zip(weights) {
                    sum.iter_mut().zip(results.row(*place)).for_each(|(s, x)| *s += x * weight);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_found_again() {
        let routes = [0.0, 3.0, 0.5, 0.5, 1.0, 3.0, 0.5, 0.5, 0.0, 1.0, 0.5, 0.5];
        let mut grouping = Grouping::new(5, 6);
        for _ in 0..2 {
            grouping.fill(Mat::new(&routes, 3, 4, 4), 5, 2);
            let touched: Vec<_> = grouping.touched().collect();
            assert_eq!(touched, [(0, 0..2), (1, 2..4), (3, 4..6)]);
            assert_eq!(grouping.rows, [0, 2, 1, 2, 0, 1]);
            assert_eq!(grouping.places, [0, 4, 2, 5, 1, 3]);
        }
        grouping.fill(Mat::new(&routes[..4], 1, 4, 4), 4, 2);
        assert_eq!(grouping.touched().collect::<Vec<_>>(), [(0, 0..1), (3, 1..2)]);
    }
}
