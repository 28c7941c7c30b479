//! The configuration that a GGUF file's metadata amounts to, as Hugging Face's `config.json` would say it.

use serde_json::{Map, Value, json};

use super::metadata::{Metadata, Value as Stored};
use crate::LoadError;
use crate::weights::Weights;

/// Architectures that are read, and the `model_type` that they are.
pub(crate) const ARCHITECTURES: [(&str, &str); 12] = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3moe", "qwen3_moe"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3_text"),
    ("phi3", "phi3"),
    ("olmo2", "olmo2"),
    ("smollm3", "smollm3"),
    ("gpt-oss", "gpt_oss"),
    ("deepseek2", "deepseek_v3"),
    ("bert", "bert"),
];

/// llama.cpp's SmolLM3 leaves out the rotation of every fourth layer.
const NO_ROPE_INTERVAL: u64 = 4;
/// What llama.cpp's gpt-oss clamps at; files do not say.
const GPT_OSS_LIMIT: f64 = 7.0;
/// `expert_gating_func` of DeepSeek V3.
const GATING_SIGMOID: u64 = 2;

struct Reader<'a> {
    metadata: &'a Metadata,
    weights: &'a Weights,
    architecture: &'a str,
    map: Map<String, Value>,
}

/// What `config.json` would say.
pub(super) fn read(
    metadata: &Metadata,
    weights: &Weights,
    architecture: &str,
) -> Result<Map<String, Value>, LoadError> {
    let mut reader = Reader { metadata, weights, architecture, map: Map::new() };
    let known = ARCHITECTURES.iter().find(|(name, _)| *name == architecture);
    let Some((_, model_type)) = known else {
        let known = ARCHITECTURES.map(|(name, _)| name).join(", ");
        return Err(metadata.wrong("general.architecture", &format!("one of {known}")));
    };
    reader.put("model_type", *model_type);
    reader.sizes()?;
    if architecture == "bert" {
        reader.bert()?;
    } else {
        reader.decoder()?;
    }
    match architecture {
        "llama" => reader.llama()?,
        "qwen3moe" => reader.qwen3_moe()?,
        "gemma2" | "gemma3" => reader.gemma()?,
        "phi3" => reader.phi3()?,
        "smollm3" => reader.smollm3()?,
        "gpt-oss" => reader.gpt_oss()?,
        "deepseek2" => reader.deepseek()?,
        _ => {}
    }
    Ok(reader.map)
}

impl Reader<'_> {
    fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.map.insert(key.to_owned(), value.into());
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn count(&self, key: &str) -> Result<Option<u64>, LoadError> {
        self.metadata.count(&self.key(key))
    }

    fn required(&self, key: &str) -> Result<u64, LoadError> {
        self.metadata.required(&self.key(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.metadata.number(&self.key(key))
    }

    /// Copies numbers that are there.
    fn copy(&mut self, keys: &[(&str, &str)]) -> Result<(), LoadError> {
        for (from, to) in keys {
            if let Some(number) = self.number(from)? {
                // whole numbers stay whole
                let whole = (number.fract() == 0.0).then(|| json!(number as i64));
                self.put(to, whole.unwrap_or_else(|| json!(number)));
            }
        }
        Ok(())
    }

    fn rows(&self, tensor: &str) -> Option<usize> {
        self.weights.stored_shape(tensor)?.first().copied()
    }

    fn has(&self, tensor: &str) -> bool {
        self.weights.stored_shape(tensor).is_some()
    }

    fn sizes(&mut self) -> Result<(), LoadError> {
        for (from, to) in [
            ("embedding_length", "hidden_size"),
            ("block_count", "num_hidden_layers"),
            ("attention.head_count", "num_attention_heads"),
            ("context_length", "max_position_embeddings"),
        ] {
            let value = self.required(from)?;
            self.put(to, value);
        }
        self.copy(&[("feed_forward_length", "intermediate_size")])?;
        let vocab = self.rows("token_embd.weight");
        let vocab = vocab.ok_or_else(|| {
            let path = self.metadata.path().to_owned();
            LoadError::MissingTensor { path, name: "token_embd.weight".to_owned(), expected: Vec::new() }
        })?;
        self.put("vocab_size", vocab);
        // numbers that Hugging Face rounds to the checkpoint's type are not rounded by the writers of these files
        self.put("torch_dtype", "float32");
        Ok(())
    }

    fn decoder(&mut self) -> Result<(), LoadError> {
        self.copy(&[
            ("attention.head_count_kv", "num_key_value_heads"),
            ("attention.key_length", "head_dim"),
            ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
            ("rope.freq_base", "rope_theta"),
        ])?;
        if self.number("attention.layer_norm_rms_epsilon")?.is_none() {
            return Err(self.metadata.wrong(&self.key("attention.layer_norm_rms_epsilon"), "a number"));
        }
        let tied = !self.has("output.weight");
        self.put("tie_word_embeddings", tied);
        self.put("norm_offset", 0);
        if let Some(scaling) = self.rope_scaling()? {
            self.put("rope_scaling", scaling);
        }
        Ok(())
    }

    fn rope_scaling(&self) -> Result<Option<Value>, LoadError> {
        if self.has("rope_freqs.weight") {
            let factors = self.weights.read_stored("rope_freqs.weight")?;
            return Ok(Some(json!({"rope_type": "factors", "factors": factors})));
        }
        if self.has("rope_factors_long.weight") {
            let long = self.weights.read_stored("rope_factors_long.weight")?;
            let short = self.weights.read_stored("rope_factors_short.weight")?;
            let original = self.required("rope.scaling.original_context_length")?;
            return Ok(Some(json!({
                "rope_type": "longrope", "long_factor": long, "short_factor": short,
                "original_max_position_embeddings": original,
            })));
        }
        let key = self.key("rope.scaling.type");
        let factor = self.number("rope.scaling.factor")?.or(self.number("rope.scale_linear")?);
        match (self.metadata.text(&key)?, factor) {
            (None | Some("none"), None) | (Some("none"), _) => Ok(None),
            (None | Some("linear"), Some(factor)) => match factor {
                1.0 => Ok(None),
                _ => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            },
            (Some("yarn"), Some(factor)) => self.yarn(factor).map(Some),
            // its factors are tensors
            (Some("longrope"), _) => Ok(None),
            _ => Err(self.metadata.wrong(&key, "none, linear, yarn or longrope, with a factor")),
        }
    }

    fn yarn(&self, factor: f64) -> Result<Value, LoadError> {
        let original = self.required("rope.scaling.original_context_length")?;
        let mut scaling = json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "beta_fast": self.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            "beta_slow": self.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        });
        if self.architecture == "gpt-oss" {
            scaling["truncate"] = json!(false);
        }
        // the files say a tenth of Hugging Face's number
        if let Some(tenth) = self.number("rope.scaling.yarn_log_multiplier")? {
            let mscale = (tenth * 10.0 * 1e6).round() / 1e6;
            scaling["mscale"] = json!(mscale);
            scaling["mscale_all_dim"] = json!(mscale);
        }
        Ok(scaling)
    }

    fn llama(&mut self) -> Result<(), LoadError> {
        let (qkv, out) = (self.has("blk.0.attn_q.bias"), self.has("blk.0.attn_output.bias"));
        let mlp = self.has("blk.0.ffn_up.bias");
        if qkv && !out {
            self.put("model_type", "qwen2");
        }
        self.put("attention_bias", qkv);
        self.put("mlp_bias", mlp);
        // Mistral's: written by this project's quantize, ignored by llama.cpp
        if let Some(window) = self.count("attention.sliding_window")?.filter(|&w| w > 0) {
            self.put("model_type", "mistral");
            self.put("sliding_window", window);
        }
        Ok(())
    }

    fn qwen3_moe(&mut self) -> Result<(), LoadError> {
        for (from, to) in [
            ("expert_count", "num_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
        ] {
            let value = self.required(from)?;
            self.put(to, value);
        }
        self.put("norm_topk_prob", true);
        Ok(())
    }

    fn gemma(&mut self) -> Result<(), LoadError> {
        self.copy(&[
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
            ("attention.sliding_window", "sliding_window"),
        ])?;
        self.put("hidden_activation", "gelu_pytorch_tanh");
        let (hidden, heads) = (self.required("embedding_length")?, self.required("attention.head_count")?);
        let layers = self.required("block_count")?;
        // The scale of queries is not in the files; llama.cpp knows the 27B models by their layers.
        let of_27b = layers == if self.architecture == "gemma2" { 46 } else { 62 };
        let scalar = match self.required("attention.key_length")? {
            _ if of_27b && heads > 0 => hidden / heads,
            head_dim => head_dim,
        };
        self.put("query_pre_attn_scalar", scalar);
        self.layer_types(if self.architecture == "gemma2" { 2 } else { 6 })?;
        if self.architecture == "gemma3" {
            let local = self.number("rope.freq_base_swa")?.unwrap_or(10_000.0);
            self.put("rope_local_base_freq", local);
            if self.number("rope.freq_base")?.is_none() {
                self.put("rope_theta", 1e6);
            }
        }
        Ok(())
    }

    /// Which layers have a window: the file's list, or every layer but the `interval`-th, as it or llama.cpp says.
    fn layer_types(&mut self, interval: u64) -> Result<(), LoadError> {
        // A count beyond any model is the family's to refuse.
        let layers = self.required("block_count")?.min(1 << 12);
        let key = self.key("attention.sliding_window_pattern");
        let listed = match self.metadata.get(&key) {
            Some(Stored::Array(_)) => self.metadata.list(&key, "a list of true and false", |v| match v {
                Stored::Flag(flag) => Some(*flag),
                Stored::Whole(n) => Some(*n != 0),
                _ => None,
            })?,
            _ => None,
        };
        let interval = match listed {
            Some(_) => interval,
            None => self.metadata.count(&key)?.unwrap_or(interval).max(1),
        };
        let sliding = match listed {
            Some(listed) => listed,
            None => (0..layers).map(|i| (i + 1) % interval != 0).collect(),
        };
        let name = |has: &bool| if *has { "sliding_attention" } else { "full_attention" };
        let types: Vec<&str> = sliding.iter().map(name).collect();
        self.put("layer_types", json!(types));
        Ok(())
    }

    fn phi3(&mut self) -> Result<(), LoadError> {
        if let Some(window) = self.count("attention.sliding_window")?.filter(|&w| w > 0) {
            self.put("sliding_window", window);
        }
        if let Some(original) = self.count("rope.scaling.original_context_length")? {
            self.put("original_max_position_embeddings", original);
        }
        let heads = self.required("attention.head_count")?.max(1);
        let head_dim = self.required("embedding_length")? / heads;
        if let Some(dim) = self.count("rope.dimension_count")?.filter(|&dim| dim != head_dim && head_dim > 0)
        {
            self.put("partial_rotary_factor", dim as f64 / head_dim as f64);
        }
        Ok(())
    }

    fn smollm3(&mut self) -> Result<(), LoadError> {
        let layers = self.required("block_count")?.min(1 << 12);
        // 1 where a layer rotates
        let rotates: Vec<u64> = (0..layers).map(|i| u64::from((i + 1) % NO_ROPE_INTERVAL != 0)).collect();
        self.put("no_rope_layers", json!(rotates));
        self.put("no_rope_layer_interval", NO_ROPE_INTERVAL);
        Ok(())
    }

    fn gpt_oss(&mut self) -> Result<(), LoadError> {
        for (from, to) in [
            ("expert_count", "num_local_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "intermediate_size"),
            ("attention.sliding_window", "sliding_window"),
        ] {
            let value = self.required(from)?;
            self.put(to, value);
        }
        self.layer_types(2)?;
        self.put("attention_bias", true);
        self.put("swiglu_limit", GPT_OSS_LIMIT);
        Ok(())
    }

    fn deepseek(&mut self) -> Result<(), LoadError> {
        if self.required("expert_gating_func")? != GATING_SIGMOID {
            return Err(self
                .metadata
                .wrong(&self.key("expert_gating_func"), "2 (sigmoid, as in DeepSeek V3)"));
        }
        self.copy(&[
            ("attention.q_lora_rank", "q_lora_rank"),
            ("attention.kv_lora_rank", "kv_lora_rank"),
            ("attention.value_length_mla", "v_head_dim"),
            ("rope.dimension_count", "qk_rope_head_dim"),
            ("expert_count", "n_routed_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_shared_count", "n_shared_experts"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
            ("expert_group_count", "n_group"),
            ("expert_group_used_count", "topk_group"),
            ("expert_weights_scale", "routed_scaling_factor"),
            ("leading_dense_block_count", "first_k_dense_replace"),
        ])?;
        let rope = self.required("rope.dimension_count")?;
        let key_length = self.required("attention.key_length_mla")?;
        let Some(nope) = key_length.checked_sub(rope) else {
            return Err(self
                .metadata
                .wrong(&self.key("attention.key_length_mla"), &format!("at least {rope}")));
        };
        self.put("qk_nope_head_dim", nope);
        let heads = self.required("attention.head_count")?;
        self.put("num_key_value_heads", heads);
        self.put("head_dim", rope);
        let normalised = self.metadata.flag(&self.key("expert_weights_norm"))?.unwrap_or(false);
        self.put("norm_topk_prob", normalised);
        Ok(())
    }

    fn bert(&mut self) -> Result<(), LoadError> {
        self.copy(&[("attention.layer_norm_epsilon", "layer_norm_eps")])?;
        self.put("architectures", json!(["BertModel"]));
        self.put("hidden_act", "gelu");
        let segments = self.rows("token_types.weight").unwrap_or(1);
        self.put("type_vocab_size", segments);
        Ok(())
    }
}
