//! Adapters beside the products of layers.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use mainstay_backend_api::{AdapterId, Step};
use mainstay_models::AdapterWeights;
use mainstay_models::graph::Matrix;

/// Adapters by the number that steps call them by.
pub(crate) type Adapters = HashMap<AdapterId, Adapter>;

/// One adapter.
pub(crate) struct Adapter {
    /// By the full name of the weight.
    parts: HashMap<String, Part>,
}

struct Part {
    /// `[rank, cols]`
    a: Tensor,
    /// `[rows, rank]`
    b: Tensor,
    scale: f64,
}

impl Adapter {
    pub(crate) fn new(weights: &AdapterWeights, device: &Device) -> Result<Self> {
        let mut parts = HashMap::new();
        for (name, part) in &weights.parts {
            let tensor =
                |values: &[f32], rows: usize| Tensor::from_slice(values, (rows, values.len() / rows), device);
            let (a, b) = (tensor(&part.a, part.rank)?, tensor(&part.b, part.b.len() / part.rank)?);
            parts.insert(name.clone(), Part { a, b, scale: f64::from(part.scale) });
        }
        Ok(Self { parts })
    }

    /// What is added to a product of these rows.
    fn of(&self, input: &Tensor, matrix: &Matrix, prefix: &str) -> Result<Tensor> {
        let one = |(name, rows): &(String, usize)| match self.parts.get(&format!("{prefix}{name}")) {
            Some(part) => (input.matmul(&part.a.t()?)? * part.scale)?.matmul(&part.b.t()?),
            None => Tensor::zeros((input.dim(0)?, *rows), DType::F32, input.device()),
        };
        Tensor::cat(&matrix.parts.iter().map(one).collect::<Result<Vec<_>>>()?, 1)
    }
}

/// The product, with what the adapters of the chunks add to their rows.
pub(crate) fn add(
    product: Tensor,
    (input, matrix): (&Tensor, &Matrix),
    (adapters, prefix): (&Adapters, &str),
    step: &Step,
) -> Result<Tensor> {
    if step.chunks.iter().all(|chunk| chunk.adapter.is_none()) {
        return Ok(product);
    }
    let mut chunks = Vec::with_capacity(step.chunks.len());
    for chunk in &step.chunks {
        let (start, len) = (chunk.tokens.start, chunk.tokens.len());
        let rows = product.narrow(0, start, len)?;
        chunks.push(match chunk.adapter {
            None => rows,
            Some(id) => {
                let adapter = adapters.get(&id).unwrap_or_else(|| panic!("{id:?} is not here"));
                (rows + adapter.of(&input.narrow(0, start, len)?.contiguous()?, matrix, prefix)?)?
            }
        });
    }
    Tensor::cat(&chunks, 0)
}
