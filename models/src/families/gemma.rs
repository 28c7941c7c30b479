//! Gemma 2 and 3 (text): norms around attention and MLP, scaled embeddings, windows in turn with full attention
//! (arXiv 2408.00118, 2503.19786).

use serde_json::json;

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, Biases, Decoder, LAYERS_MAX, Norms, QkNorm};
use crate::families::rope;
use crate::graph::{Graph, Rope};

/// Softcaps and scales beyond this are not a model's.
const NUMBER_MAX: f64 = 1e6;

pub(super) fn gemma2(config: &Config) -> Result<Graph, LoadError> {
    let config = &config.or(json!({
        "max_position_embeddings": 8192,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": true,
    }));
    Ok(read(config, 2)?.graph("gemma2"))
}

pub(super) fn gemma3_text(config: &Config) -> Result<Graph, LoadError> {
    gemma3(config, "gemma3_text")
}

/// The text model of a checkpoint that also sees.
pub(super) fn gemma3_with_text(config: &Config) -> Result<Graph, LoadError> {
    let text = config.object("text_config")?.ok_or_else(|| config.wrong("text_config", "an object"))?;
    let dtype = config.get("dtype").or(config.get("torch_dtype")).cloned();
    gemma3(&text.or(json!({"dtype": dtype})), "gemma3")
}

fn gemma3(config: &Config, family: &'static str) -> Result<Graph, LoadError> {
    let config = &config.or(json!({
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": true,
    }));
    let (full, windowed) = rope_configs(config)?;
    let mut decoder = read(&full, config.required("sliding_window_pattern", 1..=LAYERS_MAX)?)?;
    decoder.qk_norm = QkNorm::Head;
    let windowed: Rope = rope::rope(&windowed, decoder.head_dim)?;
    for layer in decoder.layers.iter_mut().filter(|layer| layer.window.is_some()) {
        layer.rope = Some(windowed.clone());
    }
    Ok(decoder.graph(family))
}

/// What both have in common; without `layer_types`, every `pattern`th layer sees everything.
fn read(config: &Config, pattern: usize) -> Result<Decoder, LoadError> {
    if config.flag("use_bidirectional_attention", false)? {
        return Err(
            config.wrong("use_bidirectional_attention", "false (its rows attend to what is before them)")
        );
    }
    let mut decoder = Decoder::read(config)?;
    let attention = config.flag("attention_bias", false)?;
    decoder.biases = Biases { qkv: attention, out: attention, mlp: false };
    decoder.norms = Norms::AROUND;
    decoder.norm_offset = config.number("norm_offset", 0.0..=1.0)?.unwrap_or(1.0) as f32;
    decoder.activation = decoder::activation(config, "hidden_activation", "gelu_pytorch_tanh")?;
    decoder.embedding_scale = Some(embedding_scale(config, decoder.hidden)?);
    let positive = |key: &str| config.number(key, 1.0 / NUMBER_MAX..=NUMBER_MAX);
    if let Some(scalar) = positive("query_pre_attn_scalar")? {
        decoder.score_scale = scalar.powf(-0.5) as f32;
    }
    decoder.score_cap = positive("attn_logit_softcapping")?.map(|cap| cap as f32);
    decoder.logit_cap = positive("final_logit_softcapping")?.map(|cap| cap as f32);
    let (window, has_window) = (decoder::window(config)?, |layer| (layer + 1) % pattern != 0);
    let windows = decoder::layer_windows(config, decoder.layers.len(), window, has_window)?;
    decoder.set_windows(windows);
    Ok(decoder)
}

/// The root of the hidden size as the checkpoint's type holds it: transformers multiplies by that.
fn embedding_scale(config: &Config, hidden: usize) -> Result<f32, LoadError> {
    let scale = (hidden as f64).sqrt();
    let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    Ok(match config.text(key)? {
        Some("bfloat16") => half::bf16::from_f64(scale).to_f32(),
        Some("float16") => half::f16::from_f64(scale).to_f32(),
        _ => scale as f32,
    })
}

/// The configuration as layers of full attention read it, and as those with a window do: of a base of their own.
fn rope_configs(config: &Config) -> Result<(Config, Config), LoadError> {
    let Some(kinds) = config.object("rope_parameters")? else {
        let base = config.get("rope_local_base_freq");
        return Ok((config.clone(), config.with(json!({"rope_theta": base, "rope_scaling": null}))));
    };
    let of = |kind: &str| {
        let parameters = kinds.get(kind).ok_or_else(|| kinds.wrong(kind, "an object"))?;
        Ok(config.with(json!({"rope_parameters": parameters})))
    };
    Ok((of("full_attention")?, of("sliding_attention")?))
}
