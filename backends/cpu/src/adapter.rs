//! Adapters beside the products of layers: laid out once, added to the rows of the chunks that name them.

use std::collections::HashMap;

use mainstay_backend_api::AdapterId;
use mainstay_models::graph::Graph;
use mainstay_models::{AdapterWeights, LowRank};

use crate::plan::{Plan, Program};

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
