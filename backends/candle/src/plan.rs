//! From graph and weights to programs: every op beside the tensors that it needs.

use candle_core::{DType, Device, Tensor};
use mainstay_backend_api::{KvLayout, Limits};
use mainstay_models::graph::{Block, Expert, Graph, Matrix, Op, Vector};
use mainstay_models::{LoadError, Weights};

use crate::experts::ExpertTensors;
use crate::load_error;

/// A graph with its weights on the device.
pub(crate) struct Plan {
    pub(crate) prologue: Program,
    /// One per layer: blocks are shared by graphs, weights are not.
    pub(crate) layers: Vec<Program>,
    /// What stands before the names of each layer's weights.
    pub(crate) prefixes: Vec<String>,
    pub(crate) epilogue: Program,
    /// Empty where the model does not pool.
    pub(crate) pooled: Program,
    pub(crate) layout: KvLayout,
    pub(crate) device: Device,
}

/// The ops of a block in order, as one layer runs them.
pub(crate) type Program = Vec<Instruction>;

/// An op with its tensors; `None` where it has none.
pub(crate) struct Instruction {
    pub(crate) op: Op,
    /// `[rows, cols]` of a matrix in its stored type, or the elements of a norm in f32.
    pub(crate) weight: Option<Tensor>,
    /// In f32; what else an op adds too: the sinks of attention, the bias of a choice of experts.
    pub(crate) bias: Option<Tensor>,
    /// Empty where it has none.
    pub(crate) experts: Vec<ExpertTensors>,
}

impl Plan {
    pub(crate) fn new(
        graph: &Graph,
        weights: &Weights,
        limits: &Limits,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let source = Source { weights, device };
        let layers = graph.layers.iter().map(|l| source.program(&graph.blocks[l.block], &l.prefix));
        Ok(Self {
            prologue: source.program(&graph.prologue, "")?,
            layers: layers.collect::<Result<_, _>>()?,
            prefixes: graph.layers.iter().map(|layer| layer.prefix.clone()).collect(),
            epilogue: source.program(&graph.epilogue, "")?,
            pooled: match &graph.pooled {
                Some(pooled) => source.program(&pooled.block, "")?,
                None => Program::new(),
            },
            layout: KvLayout::of(graph, limits.kv_dtype),
            device: device.clone(),
        })
    }
}

/// Where tensors come from and where they go.
struct Source<'a> {
    weights: &'a Weights,
    device: &'a Device,
}

impl Source<'_> {
    fn program(&self, block: &Block, prefix: &str) -> Result<Program, LoadError> {
        block.ops.iter().map(|op| self.instruction(op, prefix)).collect()
    }

    fn instruction(&self, op: &Op, prefix: &str) -> Result<Instruction, LoadError> {
        let mut experts = Vec::new();
        let (weight, bias) = match op {
            Op::Embed { weight, .. } => (Some(self.matrix(weight, prefix)?), None),
            Op::Linear { weight, bias, .. } => {
                let bias = bias.as_ref().map(|b| self.vector(b, prefix)).transpose()?;
                (Some(self.matrix(weight, prefix)?), bias)
            }
            Op::RmsNorm { weight, .. } => (Some(self.vector(weight, prefix)?), None),
            Op::LayerNorm { weight, bias, .. } => {
                (Some(self.vector(weight, prefix)?), Some(self.vector(bias, prefix)?))
            }
            Op::Attend(a) => (None, a.sinks.as_ref().map(|s| self.vector(s, prefix)).transpose()?),
            Op::AttendLatent(a) => (Some(self.matrix(&a.expand, prefix)?), None),
            Op::Experts(e) => {
                experts = e.experts.iter().map(|e| self.expert(e, prefix)).collect::<Result<_, _>>()?;
                (None, e.routing.bias.as_ref().map(|b| self.vector(b, prefix)).transpose()?)
            }
            Op::Input
            | Op::Add { .. }
            | Op::Scale { .. }
            | Op::Softcap { .. }
            | Op::Slice { .. }
            | Op::Activate { .. }
            | Op::GatedActivate { .. }
            | Op::Rope { .. }
            | Op::SelectRows { .. }
            | Op::Pool { .. }
            | Op::Normalize { .. } => (None, None),
        };
        Ok(Instruction { op: op.clone(), weight, bias, experts })
    }

    fn expert(&self, expert: &Expert, prefix: &str) -> Result<ExpertTensors, LoadError> {
        let vector = |v: &Option<Vector>| v.as_ref().map(|v| self.vector(v, prefix)).transpose();
        Ok(ExpertTensors {
            up: self.matrix(&expert.up, prefix)?,
            up_bias: vector(&expert.up_bias)?,
            down: self.matrix(&expert.down, prefix)?,
            down_bias: vector(&expert.down_bias)?,
        })
    }

    /// The parts stacked by rows, in their stored type, or in f32 where they differ.
    fn matrix(&self, matrix: &Matrix, prefix: &str) -> Result<Tensor, LoadError> {
        let parts = self.tensors(&matrix.parts, prefix)?;
        if parts.iter().all(|p| p.dtype() == parts[0].dtype()) {
            Tensor::cat(&parts, 0).map_err(load_error)
        } else {
            stacked_f32(&parts).map_err(load_error)
        }
    }

    fn vector(&self, vector: &Vector, prefix: &str) -> Result<Tensor, LoadError> {
        let numbers = vector.read(prefix, self.weights)?;
        Tensor::from_vec(numbers, vector.width(), self.device).map_err(load_error)
    }

    fn tensors(&self, parts: &[(String, usize)], prefix: &str) -> Result<Vec<Tensor>, LoadError> {
        let read = |(name, _): &(String, usize)| {
            let view = self.weights.tensor(&format!("{prefix}{name}"))?;
            let (dtype, bytes) = view.to_plain();
            let dtype = match dtype {
                mainstay_models::weights::DType::F16 => DType::F16,
                mainstay_models::weights::DType::BF16 => DType::BF16,
                _ => DType::F32,
            };
            Tensor::from_raw_buffer(&bytes, dtype, view.shape, self.device).map_err(load_error)
        };
        parts.iter().map(read).collect()
    }
}

fn stacked_f32(parts: &[Tensor]) -> candle_core::Result<Tensor> {
    let wide: Vec<Tensor> = parts.iter().map(|p| p.to_dtype(DType::F32)).collect::<Result<_, _>>()?;
    Tensor::cat(&wide, 0)
}
