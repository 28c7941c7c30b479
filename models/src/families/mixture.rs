//! What the families with experts share: the router, the experts by name, and how a configuration routes.

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::INNER_MAX;
use crate::graph::{Block, Expert, Experts, Gate, Matrix, Op, Routing, Value, Vector};

const EXPERTS_MAX: usize = 1 << 14;

/// The experts of a layer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Mixture {
    /// How many there are.
    pub(super) count: usize,
    /// Elements between their two products.
    pub(super) inner: usize,
    /// What the product that makes the scores is called.
    pub(super) router: &'static str,
    pub(super) routing: Routing,
    pub(super) gate: Gate,
    /// Whether router and experts have biases.
    pub(super) biased: bool,
    /// Elements between the two products of an MLP that every row goes through besides.
    pub(super) shared: Option<usize>,
}

impl Mixture {
    /// The sizes that `count` and `inner` name, and how many experts a row has.
    pub(super) fn sizes(config: &Config, count: &str, inner: &str) -> Result<[usize; 3], LoadError> {
        let experts = config.required(count, 1..=EXPERTS_MAX)?;
        let top_k = config.required("num_experts_per_tok", 1..=experts)?;
        Ok([experts, config.required(inner, 1..=INNER_MAX)?, top_k])
    }

    /// The sum of what a row's experts make of it.
    pub(super) fn push(&self, block: &mut Block, input: Value, hidden: usize) -> Value {
        let weight = Matrix::one(format!("{}.weight", self.router), self.count, hidden);
        let bias = self.biased.then(|| Vector::one(format!("{}.bias", self.router), self.count));
        let scores = block.push(Op::Linear { input, weight, bias });
        let experts = (0..self.count).map(|id| self.expert(id, hidden)).collect();
        let (routing, f) = (self.routing.clone(), self.gate);
        block.push(Op::Experts(Experts { input, scores, routing, experts, f }))
    }

    fn expert(&self, id: usize, hidden: usize) -> Expert {
        let name = |part: &str, suffix: &str| format!("mlp.experts.{id}.{part}_proj.{suffix}");
        let both = |suffix| ["gate", "up"].map(|part| (name(part, suffix), self.inner)).to_vec();
        Expert {
            up: Matrix { parts: both("weight"), cols: hidden },
            up_bias: self.biased.then(|| Vector::named(both("bias"))),
            down: Matrix::one(name("down", "weight"), hidden, self.inner),
            down_bias: self.biased.then(|| Vector::one(name("down", "bias"), hidden)),
        }
    }
}
