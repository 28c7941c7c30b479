//! Adapters beside the products of layers: laid out once, added to the rows of the chunks that name them.

use std::collections::HashMap;

use mainstay_backend_api::AdapterId;
use mainstay_kernels_cpu::{low_rank_in, low_rank_out};
use mainstay_models::graph::Graph;
use mainstay_models::{AdapterWeights, LowRank};

use crate::arena::Slot;
use crate::plan::{Plan, Program};
use crate::run::Runner;

/// Ranks of an adapter's first product, and columns of its second, that are one job.
const RANKS: usize = 16;
const COLUMNS: usize = 512;

/// Adapters by the number that steps call them by.
pub(crate) type Adapters = HashMap<AdapterId, Adapter>;

/// One adapter.
pub(crate) struct Adapter {
    /// By layer, then by the index of the matrix in the layer's program.
    layers: Vec<Vec<Vec<Piece>>>,
    /// The highest rank of its pieces.
    rank: usize,
}

/// What is added to some columns of one product.
pub(crate) struct Piece {
    /// First of the product's columns, and how many.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// `[rank, cols]`
    pub(crate) a: Vec<f32>,
    /// `[rank, rows]`
    pub(crate) b: Vec<f32>,
}

impl Adapter {
    pub(crate) fn new(graph: &[(usize, String)], plan: &Plan, weights: &AdapterWeights) -> Self {
        let of_layer = |(block, prefix): &(usize, String)| of_program(&plan.blocks[*block], prefix, weights);
        let layers: Vec<Vec<Vec<Piece>>> = graph.iter().map(of_layer).collect();
        let rank = layers.iter().flatten().flatten().map(|piece| piece.rank).max().unwrap_or(0);
        Self { layers, rank }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// What is added to a product, in the order of its columns.
    pub(crate) fn pieces(&self, layer: usize, matrix: usize) -> &[Piece] {
        &self.layers[layer][matrix]
    }
}

/// Block and prefix of every layer.
pub(crate) fn layers(graph: &Graph) -> Vec<(usize, String)> {
    graph.layers.iter().map(|layer| (layer.block, layer.prefix.clone())).collect()
}

fn of_program(program: &Program, prefix: &str, weights: &AdapterWeights) -> Vec<Vec<Piece>> {
    let of_matrix = |parts: &[(String, usize)]| {
        let mut first = 0;
        let mut pieces = Vec::new();
        for (name, rows) in parts {
            if let Some(part) = weights.parts.get(&format!("{prefix}{name}")) {
                pieces.push(piece(part, first, *rows));
            }
            first += rows;
        }
        pieces
    };
    program.matrices.iter().map(|used| of_matrix(&used.matrix.parts)).collect()
}

fn piece(part: &LowRank, first: usize, rows: usize) -> Piece {
    let LowRank { rank, scale, .. } = *part;
    let b = (0..rank * rows).map(|i| part.b[i % rows * rank + i / rows]).collect();
    Piece { first, rows, rank, scale, a: part.a.clone(), b }
}

impl Runner<'_> {
    /// Adds to the rows of a product what their adapters say.
    pub(crate) fn adapt(&self, weight: usize, input: Slot, out: Slot) {
        let core = self.core;
        let (adapted, rank) = (&core.work.adapted, core.work.rank);
        let pieces = |(_, id): &(usize, AdapterId)| core.adapters[id].pieces(self.layer, weight);
        let most = adapted.iter().map(|row| pieces(row).len()).max().unwrap_or(0);
        let columns = adapted.iter().flat_map(&pieces).map(|piece| piece.rows).max().unwrap_or(0);
        for nth in 0..most {
            let (blocks, low) = (rank.div_ceil(RANKS), core.plan.low);
            self.worker.each(adapted.len() * blocks, |job| {
                let (at, first) = (&adapted[job.index() / blocks], job.index() % blocks * RANKS);
                let Some(piece) = pieces(at).get(nth).filter(|piece| first < piece.rank) else { return };
                let ranks = first..(first + RANKS).min(piece.rank);
                let rows = at.0..at.0 + 1;
                let x = core.arena.read(input, rows.clone());
                let mut low = core.arena.write(low.columns(ranks.clone()), rows, &job);
                let a = piece.a.chunks_exact(x.cols()).skip(ranks.start);
                low.row(0)
                    .iter_mut()
                    .zip(a)
                    .for_each(|(low, a)| *low = low_rank_in(x.row(0), a, piece.scale));
            });
            let blocks = columns.div_ceil(COLUMNS);
            self.worker.each(adapted.len() * blocks, |job| {
                let (at, first) = (&adapted[job.index() / blocks], job.index() % blocks * COLUMNS);
                let Some(piece) = pieces(at).get(nth).filter(|piece| first < piece.rows) else { return };
                let end = (first + COLUMNS).min(piece.rows);
                let rows = at.0..at.0 + 1;
                let low = core.arena.read(low.columns(0..piece.rank), rows.clone());
                let own = out.columns(piece.first + first..piece.first + end);
                let mut own = core.arena.write(own, rows, &job);
                low_rank_out(low.row(0), &piece.b, (piece.rows, first), own.row(0));
            });
        }
    }
}
