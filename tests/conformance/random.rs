//! Seeded randomness: numbers, and weights for any graph.

use std::collections::BTreeMap;
use std::path::Path;

use mainstay_models::Weights;
use mainstay_models::graph::{Attend, Block, Graph, Matrix, Op, Vector};
use mainstay_models::quant::seeded_blocks;
use mainstay_models::weights::{DType, MemoryTensor};

/// A small generator (SplitMix64), so that every case is named by its seed.
pub(crate) struct Random(u64);

impl Random {
    /// From a seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A count below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// One of several.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Heads or tails.
    pub(crate) fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    /// A number in [-1, 1).
    pub(crate) fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Token ids.
    pub(crate) fn tokens(&mut self, vocab: usize, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.below(vocab) as u32).collect()
    }

    /// Another order (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Tensors by name: shape and values.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Weights that fit a graph: matrices that keep the size of their input about the same, norms around 1, small biases.
pub(crate) fn weights(graph: &Graph, dtype: DType, random: &mut Random) -> Weights {
    let mut tensors = Tensors::new();
    add(&graph.prologue, "", &mut tensors, random);
    for layer in &graph.layers {
        add(&graph.blocks[layer.block], &layer.prefix, &mut tensors, random);
    }
    add(&graph.epilogue, "", &mut tensors, random);
    if let Some(pooled) = &graph.pooled {
        add(&pooled.block, "", &mut tensors, random);
    }
    let stored =
        tensors.into_iter().map(|(name, (shape, values))| store(name, shape, &values, dtype, random));
    Weights::from_tensors(Path::new("seeded"), stored).unwrap_or_else(|e| panic!("{e}"))
}

/// What the name of a matrix ends in that is of floats where others are of blocks, as files have their routers.
pub(crate) const FLOATS: &str = ".floats";

/// A tensor of this type; of blocks only matrices are, and their numbers are others of the same size.
fn store(name: String, shape: Vec<usize>, values: &[f32], dtype: DType, random: &mut Random) -> MemoryTensor {
    let plain = shape.len() < 2 || name.ends_with(FLOATS);
    let dtype = if dtype.format().is_some() && plain { DType::F32 } else { dtype };
    let mut bytes = Vec::new();
    match dtype {
        DType::F32 => bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        DType::F16 => bytes.extend(values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes())),
        DType::BF16 => bytes.extend(values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())),
        _ => {
            let most = values.iter().fold(0f32, |most, v| most.max(v.abs()));
            seeded_blocks((dtype, most), (shape[0], shape[1]), || random.next(), &mut bytes);
        }
    }
    MemoryTensor { name, dtype, shape, bytes }
}

fn add(block: &Block, prefix: &str, tensors: &mut Tensors, random: &mut Random) {
    let mut matrix = |m: &Matrix, scale: f32| {
        for (name, rows) in &m.parts {
            let values = (0..rows * m.cols).map(|_| random.signed() * scale).collect();
            tensors.insert(format!("{prefix}{name}"), (vec![*rows, m.cols], values));
        }
    };
    for op in &block.ops {
        match op {
            Op::Embed { weight, .. } => matrix(weight, 1.7),
            // Uniform numbers in [-s, s) have the variance s^2 / 3.
            Op::Linear { weight, .. } => matrix(weight, (3.0 / weight.cols as f32).sqrt()),
            Op::AttendLatent(a) => matrix(&a.expand, (3.0 / a.expand.cols as f32).sqrt()),
            Op::Experts(e) => {
                for weight in e.experts.iter().flat_map(|e| [&e.up, &e.down]) {
                    matrix(weight, (3.0 / weight.cols as f32).sqrt());
                }
            }
            _ => {}
        }
    }
    let mut vector = |v: &Vector, centre: f32, spread: f32| {
        for (name, len) in &v.parts {
            let values = (0..*len).map(|_| centre - v.offset + random.signed() * spread).collect();
            tensors.insert(format!("{prefix}{name}"), (vec![*len], values));
        }
    };
    for op in &block.ops {
        match op {
            Op::Linear { bias: Some(bias), .. } => vector(bias, 0.0, 0.5),
            Op::RmsNorm { weight, .. } => vector(weight, 1.0, 0.5),
            Op::Attend(Attend { sinks: Some(sinks), .. }) => vector(sinks, 0.5, 2.0),
            Op::Experts(e) => {
                e.routing.bias.iter().for_each(|bias| vector(bias, 0.0, 0.3));
                let biases = e.experts.iter().flat_map(|e| [&e.up_bias, &e.down_bias]);
                biases.flatten().for_each(|bias| vector(bias, 0.0, 0.5));
            }
            Op::LayerNorm { weight, bias, .. } => {
                vector(weight, 1.0, 0.5);
                vector(bias, 0.0, 0.5);
            }
            _ => {}
        }
    }
}
