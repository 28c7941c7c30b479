//! DeepSeek-V3: attention to latent rows, and behind the first layers experts in groups beside a shared one
//! (arXiv 2412.19437).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{Decoder, HEAD_DIM_MAX, INNER_MAX, LAYERS_MAX, Latent, Mlp};
use crate::families::mixture::Mixture;
use crate::families::rope;
use crate::graph::{ExpertGroups, Gate, Graph, RopeLayout, Routing, RoutingOrder, Score, Vector};

/// Experts that a row goes through besides its own.
const SHARED_MAX: usize = 1 << 10;

/// Scales beyond this are not a model's.
const SCALE_MAX: f64 = 1e6;

pub(super) fn v3(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({"max_position_embeddings": 4096, "rope_interleave": true}));
    let key_dim = config.required("qk_rope_head_dim", 2..=HEAD_DIM_MAX)?;
    // RoPE turns the shared part of a key; the norms inside the attention have an eps of their own.
    let mut decoder = Decoder::read(&config.with(json!({"head_dim": key_dim, "num_key_value_heads": null})))?;
    let latent = Latent {
        rank: config.required("kv_lora_rank", 1..=INNER_MAX)?,
        query_rank: config.count("q_lora_rank", 1..=INNER_MAX)?,
        plain_dim: config.required("qk_nope_head_dim", 1..=HEAD_DIM_MAX)?,
        key_dim,
        value_dim: config.required("v_head_dim", 1..=HEAD_DIM_MAX)?,
        eps: 1e-6,
        biased: config.flag("attention_bias", false)?,
    };
    let mscale = rope::yarn_mscale_all(config)?;
    decoder.score_scale = (((latent.plain_dim + key_dim) as f64).powf(-0.5) * mscale * mscale) as f32;
    let interleaved = config.flag("rope_interleave", true)?;
    for rope in decoder.layers.iter_mut().filter_map(|layer| layer.rope.as_mut()) {
        rope.layout = if interleaved { RopeLayout::Interleaved } else { RopeLayout::Half };
    }
    decoder.latent = Some(latent);
    let mixture = mixture(config, Gate::By(decoder.activation))?;
    let dense = config.required("first_k_dense_replace", 0..=LAYERS_MAX)?;
    decoder.layers.iter_mut().skip(dense).for_each(|layer| layer.mlp = Mlp::Experts(mixture.clone()));
    Ok(decoder.graph("deepseek_v3"))
}

fn mixture(config: &Config, gate: Gate) -> Result<Mixture, LoadError> {
    for (key, only) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
        if config.text(key)?.is_some_and(|found| found != only) {
            return Err(config.wrong(key, only));
        }
    }
    if config.count("moe_layer_freq", 0..=LAYERS_MAX)?.is_some_and(|freq| freq != 1) {
        return Err(config.wrong("moe_layer_freq", "1 (experts in every layer behind the dense ones)"));
    }
    let [count, inner, top_k] = Mixture::sizes(config, "n_routed_experts", "moe_intermediate_size")?;
    let groups = config.count("n_group", 1..=count)?.unwrap_or(8);
    if !count.is_multiple_of(groups) {
        return Err(config.wrong("n_group", &format!("a divisor of {count} experts")));
    }
    let kept = config.count("topk_group", 1..=groups)?.unwrap_or(4);
    let shared = config.count("n_shared_experts", 0..=SHARED_MAX)?.unwrap_or(1);
    let scale = config.number("routed_scaling_factor", 0.0..=SCALE_MAX)?.unwrap_or(2.5);
    Ok(Mixture {
        count,
        inner,
        router: "mlp.gate",
        routing: Routing {
            score: Score::Sigmoid,
            order: RoutingOrder::ScoreFirst,
            bias: Some(Vector::one("mlp.gate.e_score_correction_bias", count)),
            groups: Some(ExpertGroups { count: groups, kept }),
            top_k,
            renormalise: config.flag("norm_topk_prob", true)?,
            scale: scale as f32,
        },
        gate,
        biased: false,
        shared: (shared > 0).then_some(shared * inner),
    })
}
