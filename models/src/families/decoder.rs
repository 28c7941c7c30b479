//! What the decoder families share: sizes, checked; the attention and MLP of a layer; the ends of the graph.

use crate::LoadError;
use crate::config::Config;
use crate::families::mixture::Mixture;
use crate::families::rope;
use crate::graph::{
    Activation, Attend, AttendLatent, Block, Gate, Graph, Ids, KvRows, KvSpec, Layer, Mask, Matrix, Op,
    PoolKind, Pooled, PooledKind, Rope, RopeSwitch, Value, Vector,
};

pub(super) const LAYERS_MAX: usize = 4096;
pub(super) const HEADS_MAX: usize = 4096;
pub(super) const HEAD_DIM_MAX: usize = 8192;
pub(super) const HIDDEN_MAX: usize = 1 << 17;
pub(super) const INNER_MAX: usize = 1 << 20;
pub(super) const VOCAB_MAX: usize = 1 << 24;
pub(super) const CONTEXT_MAX: usize = 1 << 26;

const EMBEDDING: &str = "model.embed_tokens.weight";

/// Where a layer's linear products have biases.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Biases {
    /// q, k and v.
    pub(super) qkv: bool,
    /// The product after attention.
    pub(super) out: bool,
    /// gate, up and down.
    pub(super) mlp: bool,
}

/// Over what queries and keys are normalised before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum QkNorm {
    None,
    Head,
    /// All heads together.
    Row,
}

/// Whether a checkpoint holds q, k and v, and gate and up, as tensors of their own or stacked by rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stacking {
    Apart,
    Stacked,
}

/// The norms of a layer, by the names of their weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norms {
    before_attention: Option<&'static str>,
    after_attention: Option<&'static str>,
    before_mlp: Option<&'static str>,
    after_mlp: Option<&'static str>,
}

impl Norms {
    /// Of what attention and MLP read (Llama).
    pub(super) const BEFORE: Self = Self {
        before_attention: Some("input_layernorm.weight"),
        after_attention: None,
        before_mlp: Some("post_attention_layernorm.weight"),
        after_mlp: None,
    };
    /// Of what they add to the residual (OLMo 2).
    pub(super) const AFTER: Self = Self {
        before_attention: None,
        after_attention: Some("post_attention_layernorm.weight"),
        before_mlp: None,
        after_mlp: Some("post_feedforward_layernorm.weight"),
    };
    /// Of both (Gemma 2).
    pub(super) const AROUND: Self = Self {
        before_attention: Some("input_layernorm.weight"),
        after_attention: Some("post_attention_layernorm.weight"),
        before_mlp: Some("pre_feedforward_layernorm.weight"),
        after_mlp: Some("post_feedforward_layernorm.weight"),
    };
}

/// What a layer may have otherwise than its neighbours. Layers of equal kind share a block.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerKind {
    /// Positions that a row sees, itself included; `None` is all.
    pub(super) window: Option<usize>,
    /// `None` where queries and keys know no position.
    pub(super) rope: Option<Rope>,
    pub(super) mlp: Mlp,
}

/// What a layer has behind its attention.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Mlp {
    Dense,
    Experts(Mixture),
}

/// Sizes of an attention that keeps latent rows.
pub(super) struct Latent {
    /// Width of a latent row.
    pub(super) rank: usize,
    /// Width that queries are made of; `None` where they are made of the row itself.
    pub(super) query_rank: Option<usize>,
    /// Elements of a head's key that are made of the latent row, and those that all heads share.
    pub(super) plain_dim: usize,
    pub(super) key_dim: usize,
    /// Elements of a head's value.
    pub(super) value_dim: usize,
    /// Of the norms of what queries are made of and of latent rows.
    pub(super) eps: f32,
    /// Whether the products from and to the hidden rows have biases.
    pub(super) biased: bool,
}

/// A decoder: grouped-query attention and a gated MLP, each with its norms, added to the residual.
pub(super) struct Decoder {
    pub(super) layers: Vec<LayerKind>,
    pub(super) norms: Norms,
    pub(super) qk_norm: QkNorm,
    pub(super) stacking: Stacking,
    pub(super) biases: Biases,
    /// The name of attention's sinks.
    pub(super) sinks: Option<&'static str>,
    /// How attention is made instead of by q, k and v of each head.
    pub(super) latent: Option<Latent>,
    /// Added to the stored weights of all norms.
    pub(super) norm_offset: f32,
    /// Multiplies the rows of the embedding table.
    pub(super) embedding_scale: Option<f32>,
    /// Multiplies q . k.
    pub(super) score_scale: f32,
    pub(super) score_cap: Option<f32>,
    pub(super) logit_cap: Option<f32>,
    pub(super) activation: Activation,
    pub(super) head_dim: usize,
    pub(super) hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    context: usize,
    eps: f32,
    rope_switch: RopeSwitch,
    output: &'static str,
}

impl Decoder {
    /// Reads and checks the sizes of a decoder of Llama's kind: norms before, no biases, full attention everywhere.
    pub(super) fn read(config: &Config) -> Result<Self, LoadError> {
        let hidden = config.required("hidden_size", 1..=HIDDEN_MAX)?;
        let heads = config.required("num_attention_heads", 1..=HEADS_MAX)?;
        let kv_heads = config.count("num_key_value_heads", 1..=HEADS_MAX)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(config.wrong("num_key_value_heads", &format!("a divisor of {heads} attention heads")));
        }
        let head_dim = head_dim(config, hidden, heads)?;
        let layers = config.required("num_hidden_layers", 1..=LAYERS_MAX)?;
        let tied = config.flag("tie_word_embeddings", false)?;
        let rope = Some(rope::rope(config, head_dim)?);
        Ok(Self {
            layers: vec![LayerKind { window: None, rope, mlp: Mlp::Dense }; layers],
            norms: Norms::BEFORE,
            qk_norm: QkNorm::None,
            stacking: Stacking::Apart,
            biases: Biases::default(),
            sinks: None,
            latent: None,
            norm_offset: 0.0,
            embedding_scale: None,
            score_scale: (head_dim as f64).powf(-0.5) as f32,
            score_cap: None,
            logit_cap: None,
            activation: activation(config, "hidden_act", "silu")?,
            head_dim,
            hidden,
            inner: config.required("intermediate_size", 1..=INNER_MAX)?,
            heads,
            kv_heads,
            vocab: config.required("vocab_size", 1..=VOCAB_MAX)?,
            context: config.required("max_position_embeddings", 1..=CONTEXT_MAX)?,
            eps: config.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-6) as f32,
            rope_switch: rope::switch(config)?,
            output: if tied { EMBEDDING } else { "lm_head.weight" },
        })
    }

    /// Gives each layer its window.
    pub(super) fn set_windows(&mut self, windows: impl IntoIterator<Item = Option<usize>>) {
        self.layers.iter_mut().zip(windows).for_each(|(layer, window)| layer.window = window);
    }

    /// The graph.
    pub(super) fn graph(&self, family: &'static str) -> Graph {
        let mut kinds: Vec<&LayerKind> = Vec::new();
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, kind) in self.layers.iter().enumerate() {
            let block = kinds.iter().position(|k| *k == kind).unwrap_or_else(|| {
                kinds.push(kind);
                kinds.len() - 1
            });
            layers.push(Layer { block, prefix: format!("model.layers.{i}.") });
        }
        let rows = match &self.latent {
            Some(latent) => KvRows::Latent { latent: latent.rank, key: latent.key_dim },
            None => KvRows::Heads { heads: self.kv_heads, head_dim: self.head_dim },
        };
        let spec = |kind: &LayerKind| KvSpec { rows, window: kind.window };
        Graph {
            family,
            prologue: self.prologue(),
            blocks: kinds.into_iter().map(|kind| self.layer(kind)).collect(),
            layers,
            epilogue: self.epilogue(),
            pooled: Some(self.pooled()),
            kv: self.layers.iter().map(spec).collect(),
            hidden: self.hidden,
            vocab: self.vocab,
            context: self.context,
            rope_switch: self.rope_switch,
        }
    }

    fn prologue(&self) -> Block {
        let mut block = Block::default();
        let weight = Matrix::one(EMBEDDING, self.vocab, self.hidden);
        let input = block.push(Op::Embed { ids: Ids::Token, weight });
        if let Some(factor) = self.embedding_scale {
            block.push(Op::Scale { input, factor });
        }
        block
    }

    fn epilogue(&self) -> Block {
        let mut block = Block::default();
        let rows = block.push(Op::Input);
        let rows = block.push(Op::SelectRows { input: rows });
        let input = block.push(self.norm(rows, "model.norm.weight", self.hidden));
        let weight = Matrix::one(self.output, self.vocab, self.hidden);
        let input = block.push(Op::Linear { input, weight, bias: None });
        if let Some(cap) = self.logit_cap {
            block.push(Op::Softcap { input, cap });
        }
        block
    }

    /// The embedding of a text: its last row, as it would go into the vocabulary product, with length 1.
    fn pooled(&self) -> Pooled {
        let mut block = Block::default();
        let rows = block.push(Op::Input);
        let rows = block.push(Op::Pool { input: rows, kind: PoolKind::Last });
        let rows = block.push(self.norm(rows, "model.norm.weight", self.hidden));
        block.push(Op::Normalize { input: rows });
        Pooled { kind: PooledKind::Embedding, block, width: self.hidden }
    }

    fn layer(&self, kind: &LayerKind) -> Block {
        let mut block = Block::default();
        let norms = &self.norms;
        let residual = block.push(Op::Input);
        let rows = self.layer_norm(&mut block, residual, norms.before_attention);
        let rows = match &self.latent {
            Some(latent) => self.latent_attention(&mut block, rows, (latent, kind.rope.as_ref())),
            None => self.attention(&mut block, rows, kind),
        };
        let rows = self.layer_norm(&mut block, rows, norms.after_attention);
        let residual = block.push(Op::Add { a: residual, b: rows });
        let rows = self.layer_norm(&mut block, residual, norms.before_mlp);
        let rows = match &kind.mlp {
            Mlp::Dense => self.mlp(&mut block, rows, "mlp", self.inner),
            Mlp::Experts(mixture) => self.experts(&mut block, rows, mixture),
        };
        let rows = self.layer_norm(&mut block, rows, norms.after_mlp);
        block.push(Op::Add { a: residual, b: rows });
        block
    }

    fn attention(&self, block: &mut Block, input: Value, kind: &LayerKind) -> Value {
        let (q_width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let parts = [("q", q_width), ("k", kv_width), ("v", kv_width)];
        let names = |suffix: &str| match self.stacking {
            Stacking::Apart => parts.map(|(n, rows)| (format!("self_attn.{n}_proj.{suffix}"), rows)).to_vec(),
            Stacking::Stacked => vec![(format!("self_attn.qkv_proj.{suffix}"), q_width + 2 * kv_width)],
        };
        let weight = Matrix { parts: names("weight"), cols: self.hidden };
        let bias = self.biases.qkv.then(|| Vector::named(names("bias")));
        let qkv = block.push(Op::Linear { input, weight, bias });
        let mut q = block.push(Op::Slice { input: qkv, start: 0, width: q_width });
        let mut k = block.push(Op::Slice { input: qkv, start: q_width, width: kv_width });
        let v = block.push(Op::Slice { input: qkv, start: q_width + kv_width, width: kv_width });
        let normed = match self.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some((self.head_dim, self.head_dim)),
            QkNorm::Row => Some((q_width, kv_width)),
        };
        if let Some((q_norm, k_norm)) = normed {
            q = block.push(self.norm(q, "self_attn.q_norm.weight", q_norm));
            k = block.push(self.norm(k, "self_attn.k_norm.weight", k_norm));
        }
        if let Some(rope) = &kind.rope {
            q = block.push(Op::Rope { input: q, rope: rope.clone() });
            k = block.push(Op::Rope { input: k, rope: rope.clone() });
        }
        let rows = block.push(Op::Attend(Attend {
            q,
            k,
            v,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.score_scale,
            mask: Mask::Causal { window: kind.window },
            softcap: self.score_cap,
            sinks: self.sinks.map(|sinks| Vector::one(sinks, self.heads)),
        }));
        let weight = Matrix::one("self_attn.o_proj.weight", self.hidden, q_width);
        let bias = self.biases.out.then(|| Vector::one("self_attn.o_proj.bias", self.hidden));
        block.push(Op::Linear { input: rows, weight, bias })
    }

    /// Attention to latent rows: queries from a narrow row of their own, keys and values from the latent one.
    fn latent_attention(
        &self,
        block: &mut Block,
        input: Value,
        (latent, rope): (&Latent, Option<&Rope>),
    ) -> Value {
        let &Latent { rank, plain_dim, key_dim, value_dim, .. } = latent;
        let (heads, head) = (self.heads, plain_dim + key_dim);
        let linear = |block: &mut Block, input, name: &str, (rows, cols), biased: bool| {
            let weight = Matrix::one(format!("self_attn.{name}.weight"), rows, cols);
            let bias = biased.then(|| Vector::one(format!("self_attn.{name}.bias"), rows));
            block.push(Op::Linear { input, weight, bias })
        };
        let norm = |input, name: &str, width| Op::RmsNorm {
            input,
            weight: Vector::one(format!("self_attn.{name}.weight"), width),
            eps: latent.eps,
        };
        let mut q = match latent.query_rank {
            None => linear(block, input, "q_proj", (heads * head, self.hidden), false),
            Some(width) => {
                let rows = linear(block, input, "q_a_proj", (width, self.hidden), latent.biased);
                let rows = block.push(norm(rows, "q_a_layernorm", width));
                linear(block, rows, "q_b_proj", (heads * head, width), false)
            }
        };
        let both = (rank + key_dim, self.hidden);
        let both = linear(block, input, "kv_a_proj_with_mqa", both, latent.biased);
        let rows = block.push(Op::Slice { input: both, start: 0, width: rank });
        let rows = block.push(norm(rows, "kv_a_layernorm", rank));
        let mut key = block.push(Op::Slice { input: both, start: rank, width: key_dim });
        if let Some(rope) = rope {
            let of_query = Rope { head_dim: head, first: plain_dim, ..rope.clone() };
            q = block.push(Op::Rope { input: q, rope: of_query });
            key = block.push(Op::Rope { input: key, rope: rope.clone() });
        }
        let expand = Matrix::one("self_attn.kv_b_proj.weight", heads * (plain_dim + value_dim), rank);
        let scale = self.score_scale;
        let attend =
            AttendLatent { q, latent: rows, key, expand, heads, plain_dim, key_dim, value_dim, scale };
        let rows = block.push(Op::AttendLatent(attend));
        linear(block, rows, "o_proj", (self.hidden, heads * value_dim), latent.biased)
    }

    fn experts(&self, block: &mut Block, input: Value, mixture: &Mixture) -> Value {
        let rows = mixture.push(block, input, self.hidden);
        let Some(inner) = mixture.shared else { return rows };
        let shared = self.mlp(block, input, "mlp.shared_experts", inner);
        block.push(Op::Add { a: rows, b: shared })
    }

    fn mlp(&self, block: &mut Block, input: Value, name: &str, inner: usize) -> Value {
        let names = |suffix: &str| match self.stacking {
            Stacking::Apart => ["gate", "up"].map(|n| (format!("{name}.{n}_proj.{suffix}"), inner)).to_vec(),
            Stacking::Stacked => vec![(format!("{name}.gate_up_proj.{suffix}"), 2 * inner)],
        };
        let weight = Matrix { parts: names("weight"), cols: self.hidden };
        let bias = self.biases.mlp.then(|| Vector::named(names("bias")));
        let rows = block.push(Op::Linear { input, weight, bias });
        let rows = block.push(Op::GatedActivate { input: rows, f: Gate::By(self.activation) });
        let weight = Matrix::one(format!("{name}.down_proj.weight"), self.hidden, inner);
        let bias = self.biases.mlp.then(|| Vector::one(format!("{name}.down_proj.bias"), self.hidden));
        block.push(Op::Linear { input: rows, weight, bias })
    }

    /// The rows as they are where the layer has no such norm.
    fn layer_norm(&self, block: &mut Block, rows: Value, weight: Option<&str>) -> Value {
        weight.map_or(rows, |weight| block.push(self.norm(rows, weight, self.hidden)))
    }

    fn norm(&self, input: Value, weight: &str, width: usize) -> Op {
        Op::RmsNorm { input, weight: Vector::one(weight, width).plus(self.norm_offset), eps: self.eps }
    }
}

/// `head_dim`, else the hidden size divided among the heads.
fn head_dim(config: &Config, hidden: usize, heads: usize) -> Result<usize, LoadError> {
    let head_dim = match config.count("head_dim", 1..=HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(config.wrong("hidden_size", &format!("a multiple of {heads} attention heads")));
        }
    };
    if head_dim % 2 != 0 {
        let expected = format!("even heads, not of {head_dim} elements (RoPE turns pairs)");
        return Err(config.wrong("head_dim", &expected));
    }
    Ok(head_dim)
}

/// `sliding_window`, positions visible to a row, itself included.
pub(super) fn window(config: &Config) -> Result<Option<usize>, LoadError> {
    config.count("sliding_window", 1..=CONTEXT_MAX)
}

/// The window of each layer: all of them, or those that `layer_types` names, or else those that `has_window` does.
pub(super) fn layer_windows(
    config: &Config,
    layers: usize,
    window: Option<usize>,
    has_window: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>, LoadError> {
    let Some(types) = config.get("layer_types") else {
        return Ok((0..layers).map(|i| window.filter(|_| has_window(i))).collect());
    };
    let types = types.as_array().filter(|t| t.len() == layers);
    let types = types.ok_or_else(|| config.wrong("layer_types", &format!("a list of {layers}")))?;
    let of_layer = |kind: &serde_json::Value| match (kind.as_str(), window) {
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
        (Some("sliding_attention"), None) => {
            Err(config.wrong("layer_types", "no sliding_attention without sliding_window in use"))
        }
        _ => Err(config.wrong("layer_types", "full_attention or sliding_attention for each layer")),
    };
    types.iter().map(of_layer).collect()
}

/// The windows of Qwen's layers: without `layer_types`, the first `max_window_layers` see everything.
pub(super) fn qwen_windows(config: &Config, layers: usize) -> Result<Vec<Option<usize>>, LoadError> {
    let window = if config.flag("use_sliding_window", false)? { window(config)? } else { None };
    let full = config.count("max_window_layers", 0..=LAYERS_MAX)?.unwrap_or(28);
    layer_windows(config, layers, window, |layer| layer >= full)
}

/// The element-wise function that a key names.
pub(super) fn activation(config: &Config, key: &str, default: &str) -> Result<Activation, LoadError> {
    Ok(match config.text(key)?.unwrap_or(default) {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::GeluErf,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "tanh" => Activation::Tanh,
        _ => return Err(config.wrong(key, "silu, gelu, gelu_pytorch_tanh, relu or tanh")),
    })
}
