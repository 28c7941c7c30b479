//! gpt-oss: experts in every layer behind clamped gates, windows in turn with full attention, and sinks that take a
//! share of every softmax (arXiv 2508.10925).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Biases, Decoder, Mlp};
use crate::families::mixture::Mixture;
use crate::graph::{Gate, Graph, Routing, RoutingOrder, Score};

/// Bounds and steepnesses beyond this are not a model's.
const NUMBER_MAX: f64 = 1e6;

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({
        "max_position_embeddings": 131_072,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": false,
            "original_max_position_embeddings": 4096,
        },
    }));
    let mut decoder = Decoder::read(config)?;
    let attention = config.flag("attention_bias", true)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: false };
    decoder.sinks = Some("self_attn.sinks");
    // Without a list, every second layer sees everything.
    let (layers, window) = (decoder.layers.len(), decoder::window(config)?);
    decoder.set_windows(decoder::layer_windows(config, layers, window, |layer| layer % 2 == 0)?);
    let [count, inner, top_k] = Mixture::sizes(config, "num_local_experts", "intermediate_size")?;
    let positive = |key: &str| {
        let number = config.number(key, 1.0 / NUMBER_MAX..=NUMBER_MAX)?;
        number.map(|n| n as f32).ok_or_else(|| config.wrong(key, "a number"))
    };
    let mixture = Mixture {
        count,
        inner,
        router: "mlp.router",
        routing: Routing {
            score: Score::Softmax,
            order: RoutingOrder::ChooseFirst,
            bias: None,
            groups: None,
            top_k,
            renormalise: false,
            scale: 1.0,
        },
        gate: Gate::Clamped { alpha: positive("swiglu_alpha")?, limit: positive("swiglu_limit")? },
        biased: true,
        shared: None,
    };
    decoder.layers.iter_mut().for_each(|layer| layer.mlp = Mlp::Experts(mixture.clone()));
    Ok(decoder.graph("gpt_oss"))
}
