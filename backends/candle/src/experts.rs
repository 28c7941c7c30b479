//! Mixtures of experts: rows routed on the host, one expert after another.

use candle_core::{DType, Result, Tensor};
use mainstay_models::graph::{ExpertGroups, Experts, Routing, RoutingOrder, Score};

use crate::run::gated;

/// The tensors of one expert; biases are in f32.
pub(crate) struct ExpertTensors {
    pub(crate) up: Tensor,
    pub(crate) up_bias: Option<Tensor>,
    pub(crate) down: Tensor,
    pub(crate) down_bias: Option<Tensor>,
}

/// `[T, out]` from input `[T, width]` and scores `[T, experts]`; `bias` is added to what experts are chosen by.
pub(crate) fn apply(
    e: &Experts,
    experts: &[ExpertTensors],
    bias: Option<&Tensor>,
    (input, scores): (&Tensor, &Tensor),
) -> Result<Tensor> {
    let bias = match bias {
        Some(bias) => bias.to_vec1()?,
        None => vec![0.0; experts.len()],
    };
    let routes: Vec<Vec<(usize, f32)>> =
        scores.to_vec2::<f32>()?.iter().map(|scores| route(&e.routing, scores, &bias)).collect();
    let out = e.experts.first().map_or(0, |expert| expert.down.rows());
    let mut sum = Tensor::zeros((routes.len(), out), DType::F32, input.device())?;
    let input = input.contiguous()?;
    for (id, expert) in experts.iter().enumerate() {
        let weighed = |(row, route): (usize, &Vec<(usize, f32)>)| {
            route.iter().find(|(expert, _)| *expert == id).map(|(_, weight)| (row as u32, *weight))
        };
        let (rows, weights): (Vec<u32>, Vec<f32>) = routes.iter().enumerate().filter_map(weighed).unzip();
        if rows.is_empty() {
            continue;
        }
        let count = rows.len();
        let rows = Tensor::from_vec(rows, count, input.device())?;
        let weights = Tensor::from_vec(weights, (count, 1), input.device())?;
        let both = linear(&input.index_select(&rows, 0)?, &expert.up, expert.up_bias.as_ref())?;
        let result = linear(&gated(&both, e.f)?, &expert.down, expert.down_bias.as_ref())?;
        sum = sum.index_add(&rows, &result.broadcast_mul(&weights)?, 0)?;
    }
    Ok(sum)
}

/// `x W^T + bias`
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let product = x.contiguous()?.matmul(&weight.to_dtype(DType::F32)?.t()?)?;
    match bias {
        Some(bias) => product.broadcast_add(bias),
        None => Ok(product),
    }
}

/// The experts of a row and their weights.
fn route(routing: &Routing, scores: &[f32], bias: &[f32]) -> Vec<(usize, f32)> {
    let first = match routing.order {
        RoutingOrder::ScoreFirst => scored(routing.score, scores),
        RoutingOrder::ChooseFirst => scores.to_vec(),
    };
    let merits: Vec<f32> = first.iter().zip(bias).map(|(v, b)| v + b).collect();
    let eligible: Vec<usize> = match routing.groups {
        None => (0..scores.len()).collect(),
        Some(ExpertGroups { count, kept }) => {
            let size = scores.len() / count;
            let merit = |group: usize| {
                let mut own = merits[group * size..][..size].to_vec();
                own.sort_by(|a, b| b.total_cmp(a));
                own.iter().take(2).sum::<f32>()
            };
            let groups: Vec<f32> = (0..count).map(merit).collect();
            let best = best_of((0..count).collect(), &groups, kept);
            best.into_iter().flat_map(|group| group * size..(group + 1) * size).collect()
        }
    };
    let chosen = best_of(eligible, &merits, routing.top_k);
    let values: Vec<f32> = chosen.iter().map(|&id| first[id]).collect();
    let mut weights = match routing.order {
        RoutingOrder::ScoreFirst => values,
        RoutingOrder::ChooseFirst => scored(routing.score, &values),
    };
    if routing.renormalise {
        let sum = weights.iter().sum::<f32>() + 1e-20;
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    chosen.into_iter().zip(weights.into_iter().map(|w| w * routing.scale)).collect()
}

/// The `count` of largest merit, those of lower id first where merits are equal.
fn best_of(mut ids: Vec<usize>, merits: &[f32], count: usize) -> Vec<usize> {
    ids.sort_by(|&a, &b| merits[b].total_cmp(&merits[a]).then(a.cmp(&b)));
    ids.truncate(count);
    ids
}

fn scored(score: Score, values: &[f32]) -> Vec<f32> {
    match score {
        Score::Sigmoid => values.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect(),
        Score::Softmax => {
            let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let powers: Vec<f32> = values.iter().map(|v| (v - max).exp()).collect();
            let sum: f32 = powers.iter().sum();
            powers.iter().map(|p| p / sum).collect()
        }
    }
}
