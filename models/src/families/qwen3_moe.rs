//! Qwen 3 with experts: Qwen 3 whose layers, or some of them, have experts in place of the MLP (arXiv 2505.09388).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Biases, Decoder, LAYERS_MAX, Mlp, QkNorm};
use crate::families::mixture::Mixture;
use crate::graph::{Gate, Graph, Routing, RoutingOrder, Score};

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({"max_position_embeddings": 32_768, "decoder_sparse_step": 1}));
    let mut decoder = Decoder::read(config)?;
    let attention = config.flag("attention_bias", false)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: false };
    decoder.qk_norm = QkNorm::Head;
    let window = if config.flag("use_sliding_window", false)? { decoder::window(config)? } else { None };
    let layers = decoder.layers.len();
    decoder.set_windows(decoder::layer_windows(config, layers, window, |_| true)?);
    // Older configurations call it otherwise.
    let count = if config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let [count, inner, top_k] = Mixture::sizes(config, count, "moe_intermediate_size")?;
    let mixture = Mixture {
        count,
        inner,
        router: "mlp.gate",
        routing: Routing {
            score: Score::Softmax,
            order: RoutingOrder::ScoreFirst,
            bias: None,
            groups: None,
            top_k,
            renormalise: config.flag("norm_topk_prob", false)?,
            scale: 1.0,
        },
        gate: Gate::By(decoder.activation),
        biased: false,
        shared: None,
    };
    let sparse_step = config.required("decoder_sparse_step", 1..=LAYERS_MAX)?;
    let dense = dense_layers(config)?;
    for (i, layer) in decoder.layers.iter_mut().enumerate() {
        if (i + 1) % sparse_step == 0 && !dense.contains(&i) {
            layer.mlp = Mlp::Experts(mixture.clone());
        }
    }
    Ok(decoder.graph("qwen3_moe"))
}

/// `mlp_only_layers`, by index.
fn dense_layers(config: &Config) -> Result<Vec<usize>, LoadError> {
    let Some(layers) = config.get("mlp_only_layers") else { return Ok(Vec::new()) };
    let index = |layer: &serde_json::Value| layer.as_u64().and_then(|n| usize::try_from(n).ok());
    let layers = layers.as_array().and_then(|layers| layers.iter().map(index).collect());
    layers.ok_or_else(|| config.wrong("mlp_only_layers", "a list of layers' numbers"))
}
