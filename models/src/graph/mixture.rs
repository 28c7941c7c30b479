//! Mixtures of experts: which of them a row goes to, how much each counts, and what they compute.

use super::{Gate, Matrix, Value, Vector, WeightUse};

/// How the scores of a row choose its experts and weigh them. What a choice is made by is called its merit; of equal
/// merits the lower id is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// The function that makes weights of scores.
    pub score: Score,
    /// Whether the function comes before the choice.
    pub order: RoutingOrder,
    /// Added to merits, one for each expert; weights do not see it.
    pub bias: Option<Vector>,
    /// Only experts of the best groups are chosen.
    pub groups: Option<ExpertGroups>,
    /// Experts of a row.
    pub top_k: usize,
    /// Weights are divided by their sum (plus 1e-20).
    pub renormalise: bool,
    /// Multiplies weights in the end.
    pub scale: f32,
}

/// What makes weights of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// exp(x) over the sum of all
    Softmax,
    /// 1 / (1 + exp(-x))
    Sigmoid,
}

/// Which scores the function sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingOrder {
    /// All: its results are the merits, and those of the chosen experts are the weights (Qwen, DeepSeek).
    ScoreFirst,
    /// Those of the chosen experts; the scores themselves are the merits (gpt-oss).
    ChooseFirst,
}

/// Experts of neighbouring ids, in groups of equal size. A group is as good as its two best merits together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups.
    pub count: usize,
    /// Groups that may be chosen from.
    pub kept: usize,
}

/// Routing and the experts' products. A row's result is the sum of `weight * expert(row)` over its experts by
/// ascending id.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// `[T, width]`
    pub input: Value,
    /// One number for each expert, `[T, experts]`.
    pub scores: Value,
    /// What they decide.
    pub routing: Routing,
    /// All experts, of equal shape.
    pub experts: Vec<Expert>,
    /// What is made of gate and up.
    pub f: Gate,
}

/// A gated MLP.
#[derive(Clone, Debug, PartialEq)]
pub struct Expert {
    /// Gate, then up, `[2 * inner, width]`.
    pub up: Matrix,
    /// `[2 * inner]`
    pub up_bias: Option<Vector>,
    /// `[out, inner]`
    pub down: Matrix,
    /// `[out]`
    pub down_bias: Option<Vector>,
}

impl Expert {
    pub(super) fn weights(&self) -> impl Iterator<Item = WeightUse<'_>> {
        let matrices = [&self.up, &self.down].map(WeightUse::Matrix);
        let vectors = [&self.up_bias, &self.down_bias].map(|v| v.as_ref().map(WeightUse::Vector));
        matrices.into_iter().chain(vectors.into_iter().flatten())
    }

    /// Elements between its two products.
    pub fn inner(&self) -> usize {
        self.down.cols
    }

    fn check(&self, width: usize, like: &Expert) -> Result<(), String> {
        let found = (self.up.cols, self.up.rows(), self.down.cols, self.down.rows());
        let expected = (width, 2 * like.inner(), like.inner(), like.down.rows());
        if found != expected {
            return Err(format!(
                "expected experts of {expected:?} (columns and rows of up, of down), found {found:?}"
            ));
        }
        let biases = [(&self.up_bias, &like.up_bias, found.1), (&self.down_bias, &like.down_bias, found.3)];
        for (bias, other, rows) in biases {
            let width = bias.as_ref().map(Vector::width);
            if width.is_some() != other.is_some() || width.is_some_and(|w| w != rows) {
                return Err(format!("expected biases of {rows} in all experts or in none, found {width:?}"));
            }
        }
        Ok(())
    }
}

impl Experts {
    /// The width of its rows, given those of its input and of the scores.
    pub(super) fn width(&self, input: usize, scores: usize) -> Result<usize, String> {
        let (count, routing) = (self.experts.len(), &self.routing);
        let Some(first) = self.experts.first().filter(|_| scores == count) else {
            return Err(format!("expected scores of {count} experts (at least 1), found {scores}"));
        };
        self.experts.iter().try_for_each(|expert| expert.check(input, first))?;
        let groups = routing.groups.unwrap_or(ExpertGroups { count: 1, kept: 1 });
        if groups.count == 0 || !count.is_multiple_of(groups.count) || groups.kept > groups.count {
            return Err(format!("{count} experts do not fit {groups:?}"));
        }
        let eligible = count / groups.count * groups.kept;
        if routing.top_k == 0 || routing.top_k > eligible {
            return Err(format!("expected to choose 1 to {eligible} experts, found {}", routing.top_k));
        }
        if let Some(bias) = routing.bias.as_ref().map(Vector::width).filter(|&n| n != count) {
            return Err(format!("expected a bias for each of {count} experts, found {bias}"));
        }
        Ok(first.down.rows())
    }
}
