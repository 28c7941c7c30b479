//! Names of tensors: what GGUF files call the weights that families ask for under Hugging Face's names.

use super::metadata::Metadata;
use crate::LoadError;
use crate::weights::{Cut, Rows, Weights};

/// What of a layer is called how in most architectures.
const COMMON: [(&str, &str); 25] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    // its `.bias` is the tensor itself
    ("exp_probs_b", "mlp.gate.e_score_correction"),
];

/// Where an architecture differs from [`COMMON`].
const OWN: [(&str, &str, &str); 4] = [
    ("gemma2", "ffn_norm", "pre_feedforward_layernorm"),
    ("gemma3", "ffn_norm", "pre_feedforward_layernorm"),
    ("phi3", "ffn_up", "mlp.gate_up_proj"),
    ("gpt-oss", "ffn_gate_inp", "mlp.router"),
];

/// Architectures that have a `post_attention_norm`.
const AROUND: [&str; 4] = ["gemma2", "gemma3", "olmo2", "gpt-oss"];
/// Of these, those without a norm before the MLP that is named `ffn_norm`.
const BEHIND: [&str; 2] = ["olmo2", "gpt-oss"];

const BERT: [(&str, &str); 8] = [
    ("attn_q", "attention.self.query"),
    ("attn_k", "attention.self.key"),
    ("attn_v", "attention.self.value"),
    ("attn_output", "attention.output.dense"),
    ("attn_output_norm", "attention.output.LayerNorm"),
    ("ffn_up", "intermediate.dense"),
    ("ffn_down", "output.dense"),
    ("layer_output_norm", "output.LayerNorm"),
];

const BERT_OUTER: [(&str, &str); 5] = [
    ("token_embd.weight", "embeddings.word_embeddings.weight"),
    ("token_types.weight", "embeddings.token_type_embeddings.weight"),
    ("position_embd.weight", "embeddings.position_embeddings.weight"),
    ("token_embd_norm.weight", "embeddings.LayerNorm.weight"),
    ("token_embd_norm.bias", "embeddings.LayerNorm.bias"),
];

const OUTER: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Experts that are stored stacked.
const STACKS: [(&str, &str); 3] =
    [("ffn_gate_exps", "gate_proj"), ("ffn_up_exps", "up_proj"), ("ffn_down_exps", "down_proj")];

/// The name of a tensor of one layer in this architecture, or outside of all layers; `None` where no family asks for it
/// as it is.
pub(crate) fn hugging_face(architecture: &str, name: &str) -> Option<String> {
    let bert = architecture == "bert";
    let outer = if bert { &BERT_OUTER[..] } else { &OUTER };
    if let Some((_, own)) = outer.iter().find(|(stored, _)| *stored == name) {
        return Some((*own).to_owned());
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    layer.parse::<usize>().ok()?;
    if part == "attn_sinks.weight" {
        return Some(format!("model.layers.{layer}.self_attn.sinks"));
    }
    let (part, suffix) = part.rsplit_once('.')?;
    if part == "exp_probs_b" {
        return Some(format!("model.layers.{layer}.mlp.gate.e_score_correction_{suffix}"));
    }
    // Where attention and MLP have a norm behind them, the name of the one before the MLP stands for another.
    let around = AROUND.contains(&architecture);
    if (part == "post_attention_norm" && !around) || (part == "ffn_norm" && BEHIND.contains(&architecture)) {
        return None;
    }
    let own = OWN.iter().find(|(of, stored, _)| (*of, *stored) == (architecture, part));
    let table = if bert { &BERT[..] } else { &COMMON };
    let common = || table.iter().find(|(stored, _)| *stored == part).map(|(_, name)| *name);
    let part = own.map(|(.., name)| *name).or_else(common)?;
    Some(match bert {
        true => format!("encoder.layer.{layer}.{part}.{suffix}"),
        false => format!("model.layers.{layer}.{part}.{suffix}"),
    })
}

/// Every name that a file of this architecture may have, but for stacks of experts, in the order that is written.
pub(super) fn candidates(architecture: &str, layers: usize) -> Vec<String> {
    let bert = architecture == "bert";
    let outer = if bert { &BERT_OUTER[..] } else { &OUTER };
    let mut parts: Vec<String> = Vec::new();
    for (part, _) in if bert { &BERT[..] } else { &COMMON } {
        parts.extend([format!("{part}.weight"), format!("{part}.bias")]);
    }
    parts.push("attn_sinks.weight".to_owned());
    let of_layers = (0..layers).flat_map(|i| parts.iter().map(move |part| format!("blk.{i}.{part}")));
    outer.iter().map(|(name, _)| (*name).to_owned()).chain(of_layers).collect()
}

/// The stacks of experts of all layers, each with the name of its experts.
pub(super) fn expert_stacks(layers: usize) -> impl Iterator<Item = (String, impl Fn(usize) -> String)> {
    let parts = STACKS.iter().flat_map(|stack| ["weight", "bias"].map(|suffix| (*stack, suffix)));
    let all =
        (0..layers).flat_map(move |layer| parts.clone().map(move |(stack, suffix)| (layer, stack, suffix)));
    all.map(|(layer, (stack, part), suffix)| {
        let expert = move |e| format!("model.layers.{layer}.mlp.experts.{e}.{part}.{suffix}");
        (format!("blk.{layer}.{stack}.{suffix}"), expert)
    })
}

/// Whether rows of queries and keys are stored in the order that rotates neighbours (DeepSeek's are too, but are so in
/// Hugging Face's files as well).
pub(crate) fn rotates_neighbours(architecture: &str) -> bool {
    matches!(architecture, "llama" | "smollm3")
}

/// Gives the tensors of a file the names that families ask for.
pub(super) fn define(
    weights: &mut Weights,
    metadata: &Metadata,
    architecture: &str,
) -> Result<(), LoadError> {
    let heads = metadata.count(&format!("{architecture}.attention.head_count"))?;
    let kv_heads = metadata.count(&format!("{architecture}.attention.head_count_kv"))?.or(heads);
    let stored: Vec<String> = weights.stored_names().map(str::to_owned).collect();
    for name in &stored {
        if let Some(own) = hugging_face(architecture, name) {
            let part = name.rsplit('.').nth(1).unwrap_or_default();
            let heads = match part {
                "attn_q" => heads,
                "attn_k" => kv_heads,
                _ => None,
            };
            let rows = match heads.filter(|_| rotates_neighbours(architecture)) {
                Some(heads) => pairs(weights, name, heads)?,
                None => Rows::All,
            };
            weights.define(own, name, &Cut { rows, ..Cut::default() })?;
        } else {
            experts(weights, name)?;
        }
    }
    latent(weights, metadata, architecture, &stored)
}

fn pairs(weights: &Weights, name: &str, heads: u64) -> Result<Rows, LoadError> {
    let rows = weights.stored_shape(name).and_then(|s| s.first()).copied().unwrap_or_default();
    let heads = usize::try_from(heads).ok().filter(|&n| n > 0 && rows % n == 0 && rows / n % 2 == 0);
    match heads {
        Some(heads) => Ok(Rows::Pairs { head_rows: rows / heads }),
        None => Err(weights.wrong(name, format!("expected rows of {heads:?} even heads, found {rows} rows"))),
    }
}

/// Each expert of a stack by its own name.
fn experts(weights: &mut Weights, name: &str) -> Result<(), LoadError> {
    let Some((layer, rest)) = name.strip_prefix("blk.").and_then(|n| n.split_once('.')) else {
        return Ok(());
    };
    let Some((stack, suffix)) = rest.rsplit_once('.') else { return Ok(()) };
    let shape = weights.stored_shape(name).unwrap_or_default().to_vec();
    let expert = |e: usize, part: &str| format!("model.layers.{layer}.mlp.experts.{e}.{part}.{suffix}");
    if let Some((_, part)) = STACKS.iter().find(|(stored, _)| *stored == stack) {
        for e in 0..shape.first().copied().unwrap_or_default() {
            let cut = Cut { index: Some(e), ..Cut::default() };
            weights.define(expert(e, part), name, &cut)?;
        }
    } else if let ("ffn_gate_up_exps", [count, rows, ..]) = (stack, &shape[..]) {
        for e in 0..*count {
            for (part, rows) in [("gate_proj", 0..rows / 2), ("up_proj", rows / 2..*rows)] {
                let cut = Cut { index: Some(e), rows: Rows::Range(rows), ..Cut::default() };
                weights.define(expert(e, part), name, &cut)?;
            }
        }
    }
    Ok(())
}

/// DeepSeek's `kv_b_proj`, stored as two stacks of heads, of which the keys' are transposed. It is put together here.
fn latent(
    weights: &mut Weights,
    metadata: &Metadata,
    architecture: &str,
    stored: &[String],
) -> Result<(), LoadError> {
    if architecture != "deepseek2" {
        return Ok(());
    }
    for name in stored {
        let Some(layer) = name.strip_prefix("blk.").and_then(|n| n.strip_suffix(".attn_k_b.weight")) else {
            continue;
        };
        let values = format!("blk.{layer}.attn_v_b.weight");
        let heads = metadata.required(&format!("{architecture}.attention.head_count"))? as usize;
        let shapes = (weights.stored_shape(name), weights.stored_shape(&values));
        let (nope, rank, value) = match shapes {
            (Some(&[h, rank, nope]), Some(&[g, value, r])) if h == heads && g == h && r == rank => {
                (nope, rank, value)
            }
            found => {
                let what =
                    format!("expected [{heads}, rank, keys] and [{heads}, values, rank], found {found:?}");
                return Err(weights.wrong(name, what));
            }
        };
        let (keys, values) = (weights.read_stored(name)?, weights.read_stored(&values)?);
        let mut joined = Vec::with_capacity(keys.len() + values.len());
        for head in 0..heads {
            let keys = &keys[head * rank * nope..][..rank * nope];
            joined.extend((0..nope).flat_map(|row| (0..rank).map(move |col| keys[col * nope + row])));
            joined.extend_from_slice(&values[head * value * rank..][..value * rank]);
        }
        let own = format!("model.layers.{layer}.self_attn.kv_b_proj.weight");
        weights.add_numbers(own, vec![heads * (nope + value), rank], &joined)?;
    }
    Ok(())
}
