//! What a token costs in bytes and in multiplications, from the model's graph.

use mainstay_backend_api::KvDType;
use mainstay_models::Weights;
use mainstay_models::graph::{Graph, KvSpec, Matrix, Op};

use super::{Case, Measurement, Phase, Plan};

/// What the model costs, from its graph.
#[derive(Default)]
pub(super) struct Cost {
    /// Bytes of all matrices of products that every step reads.
    weight_bytes: f64,
    /// Bytes of all experts.
    expert_bytes: f64,
    /// Part of the experts that one row goes to.
    expert_share: f64,
    /// Elements of the layers' matrices that a row is multiplied with.
    layer_weights: f64,
    /// Elements of the vocabulary product, needed for output rows only.
    vocab_weights: f64,
    /// What attention reads and computes, layer by layer.
    layers: Vec<LayerCost>,
}

/// Attention of one layer.
struct LayerCost {
    /// Bytes of keys and values of one token.
    kv_bytes: f64,
    /// Multiplications and additions for one row and one token that it sees.
    flops: f64,
    /// Most tokens that a row sees.
    window: f64,
}

impl Cost {
    pub(super) fn of(graph: &Graph, weights: &Weights, kv_dtype: KvDType) -> Self {
        let mut cost = Self::default();
        for (at, layer) in graph.layers.iter().enumerate() {
            let kv = graph.kv.get(at);
            let kv_bytes = kv.map_or(0, KvSpec::elements) * kv_dtype.size_bytes();
            let window = kv.and_then(|kv| kv.window).map_or(f64::INFINITY, |tokens| tokens as f64);
            let mut of_layer = LayerCost { kv_bytes: kv_bytes as f64, flops: 0.0, window };
            for op in &graph.blocks[layer.block].ops {
                match op {
                    Op::Linear { weight, .. } => {
                        cost.layer_weights += elements(weight);
                        cost.weight_bytes += stored_bytes(weight, &layer.prefix, weights);
                    }
                    Op::Experts(e) => {
                        cost.expert_share = e.routing.top_k as f64 / e.experts.len() as f64;
                        for matrix in e.experts.iter().flat_map(|expert| [&expert.up, &expert.down]) {
                            cost.layer_weights += elements(matrix) * cost.expert_share;
                            cost.expert_bytes += stored_bytes(matrix, &layer.prefix, weights);
                        }
                    }
                    Op::Attend(a) => of_layer.flops += (4 * a.heads * a.head_dim) as f64,
                    _ => {}
                }
            }
            cost.layers.push(of_layer);
        }
        for op in &graph.epilogue.ops {
            if let Op::Linear { weight, .. } = op {
                cost.vocab_weights += elements(weight);
                cost.weight_bytes += stored_bytes(weight, "", weights);
            }
        }
        cost
    }

    /// An empty measurement of a case with what its tokens cost on average. Rows are taken to choose their experts
    /// independently of each other.
    pub(super) fn measurement(&self, case: Case, plan: &Plan) -> Measurement {
        let (rows, steps, outputs) = match case.phase {
            Phase::Prefill => (plan.prompt, plan.prompt.div_ceil(plan.tokens_per_step), 1),
            Phase::Decode => (plan.gen_steps, plan.gen_steps, plan.gen_steps),
        };
        // a row sees everything before it and itself
        let seen = case.depth as f64 + (rows as f64 + 1.0) / 2.0;
        let (per_row, per_step) = (1.0 / rows as f64, steps as f64 / rows as f64);
        let untouched = (1.0 - self.expert_share).powf(case.batch as f64 / per_step);
        let step_bytes = self.weight_bytes + self.expert_bytes * (1.0 - untouched);
        let kv_rows = if case.phase == Phase::Decode { 1.0 } else { per_step };
        let attended = |cost: fn(&LayerCost) -> f64| {
            self.layers.iter().map(|layer| cost(layer) * seen.min(layer.window)).sum::<f64>()
        };
        let vocab_flops = 2.0 * self.vocab_weights * outputs as f64 * per_row;
        Measurement {
            case,
            tokens_per_s: Vec::new(),
            foreign: Vec::new(),
            joules_per_token: Vec::new(),
            bytes_per_token: step_bytes * per_step / case.batch as f64
                + attended(|layer| layer.kv_bytes) * kv_rows,
            flops_per_token: 2.0 * self.layer_weights + vocab_flops + attended(|layer| layer.flops),
        }
    }
}

fn elements(matrix: &Matrix) -> f64 {
    (matrix.rows() * matrix.cols) as f64
}

fn stored_bytes(matrix: &Matrix, prefix: &str, weights: &Weights) -> f64 {
    let views = matrix.parts.iter().filter_map(|(name, _)| weights.tensor(&format!("{prefix}{name}")).ok());
    views.map(|view| view.stored_bytes() as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            prompt: 100,
            cases: Case::grid(&[0, 50], &[1, 3]),
            gen_steps: 10,
            repeats: 2,
            tokens_per_step: 40,
            kv_dtype: KvDType::BF16,
        }
    }

    #[test]
    fn decode_reads_weights_once_a_step_and_pages_once_a_sequence() {
        let cost = Cost {
            weight_bytes: 600.0,
            layer_weights: 10.0,
            vocab_weights: 3.0,
            layers: vec![
                LayerCost { kv_bytes: 1.5, flops: 3.0, window: f64::INFINITY },
                LayerCost { kv_bytes: 0.5, flops: 1.0, window: 1000.0 },
            ],
            ..Cost::default()
        };
        let decode = cost.measurement(Case { phase: Phase::Decode, depth: 50, batch: 3 }, &plan());
        assert_eq!(decode.bytes_per_token, 600.0 / 3.0 + 2.0 * 55.5);
        assert_eq!(decode.flops_per_token, 20.0 + 6.0 + 4.0 * 55.5);
        let prefill = cost.measurement(Case { phase: Phase::Prefill, depth: 0, batch: 1 }, &plan());
        // 3 steps for 100 tokens, one row of logits
        assert_eq!(prefill.flops_per_token, 20.0 + 0.06 + 4.0 * 50.5);
        assert!((prefill.bytes_per_token - (600.0 + 2.0 * 50.5) * 0.03).abs() < 1e-9);
    }

    #[test]
    fn a_window_bounds_what_is_seen_and_a_row_touches_few_experts() {
        let cost = Cost {
            weight_bytes: 100.0,
            expert_bytes: 800.0,
            expert_share: 0.25,
            layers: vec![LayerCost { kv_bytes: 2.0, flops: 4.0, window: 10.0 }],
            ..Cost::default()
        };
        let of = |batch| cost.measurement(Case { phase: Phase::Decode, depth: 50, batch }, &plan());
        assert_eq!(of(1).bytes_per_token, 100.0 + 800.0 * 0.25 + 2.0 * 10.0);
        assert_eq!(of(1).flops_per_token, 4.0 * 10.0);
        // of two rows, the second meets three quarters of what the first left
        assert_eq!(of(2).bytes_per_token, (100.0 + 800.0 * 0.4375) / 2.0 + 2.0 * 10.0);
    }
}
