//! What the decoder families share: sizes, checked; the attention and MLP of a layer; the ends of the graph.

use crate::LoadError;
use crate::config::Config;
use crate::families::rope;
use crate::graph::{
    Activation, Attend, Block, Gate, Graph, Ids, KvSpec, Layer, Mask, Matrix, Op, PoolKind, Pooled,
    PooledKind, Rope, Value, Vector,
};

pub(super) const LAYERS_MAX: usize = 4096;
pub(super) const HEADS_MAX: usize = 4096;
const HEAD_DIM_MAX: usize = 8192;
pub(super) const HIDDEN_MAX: usize = 1 << 17;
pub(super) const INNER_MAX: usize = 1 << 20;
pub(super) const VOCAB_MAX: usize = 1 << 24;
pub(super) const CONTEXT_MAX: usize = 1 << 26;

const EMBEDDING: &str = "model.embed_tokens.weight";

/// What a family assumes where its configuration is silent.
pub(super) struct Defaults {
    /// Longest sequence, tokens.
    pub(super) context: usize,
    /// Width of a head; `None` is hidden / heads.
    pub(super) head_dim: Option<usize>,
}

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

/// Whether queries and keys are normalised per head before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum HeadNorm {
    None,
    RmsNorm,
}

/// A decoder of the Llama kind: pre-norm, grouped-query attention with RoPE, gated MLP.
pub(super) struct Decoder {
    pub(super) biases: Biases,
    pub(super) head_norm: HeadNorm,
    /// The window of every layer, `None` for full attention.
    pub(super) windows: Vec<Option<usize>>,
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    context: usize,
    eps: f32,
    activation: Activation,
    rope: Rope,
    output: &'static str,
}

impl Decoder {
    /// Reads and checks the sizes; no biases, no head norm, full attention.
    pub(super) fn read(config: &Config, defaults: &Defaults) -> Result<Self, LoadError> {
        let hidden = config.required("hidden_size", 1..=HIDDEN_MAX)?;
        let heads = config.required("num_attention_heads", 1..=HEADS_MAX)?;
        let kv_heads = config.count("num_key_value_heads", 1..=HEADS_MAX)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(config.wrong("num_key_value_heads", &format!("a divisor of {heads} attention heads")));
        }
        let head_dim = match config.count("head_dim", 1..=HEAD_DIM_MAX)?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(config.wrong("hidden_size", &format!("a multiple of {heads} attention heads")));
            }
        };
        if head_dim % 2 != 0 {
            let expected = format!("even heads, not of {head_dim} elements (RoPE turns pairs)");
            return Err(config.wrong("head_dim", &expected));
        }
        let layers = config.required("num_hidden_layers", 1..=LAYERS_MAX)?;
        let tied = config.flag("tie_word_embeddings", false)?;
        Ok(Self {
            biases: Biases::default(),
            head_norm: HeadNorm::None,
            windows: vec![None; layers],
            hidden,
            inner: config.required("intermediate_size", 1..=INNER_MAX)?,
            heads,
            kv_heads,
            head_dim,
            vocab: config.required("vocab_size", 1..=VOCAB_MAX)?,
            context: config.count("max_position_embeddings", 1..=CONTEXT_MAX)?.unwrap_or(defaults.context),
            eps: config.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-6) as f32,
            activation: activation(config, "silu")?,
            rope: rope::rope(config, head_dim)?,
            output: if tied { EMBEDDING } else { "lm_head.weight" },
        })
    }

    /// The graph. Layers of equal window share a block.
    pub(super) fn graph(&self, family: &'static str) -> Graph {
        let mut seen: Vec<Option<usize>> = Vec::new();
        let mut layers = Vec::with_capacity(self.windows.len());
        for (i, window) in self.windows.iter().enumerate() {
            let block = seen.iter().position(|w| w == window).unwrap_or_else(|| {
                seen.push(*window);
                seen.len() - 1
            });
            layers.push(Layer { block, prefix: format!("model.layers.{i}.") });
        }
        let (heads, head_dim) = (self.kv_heads, self.head_dim);
        Graph {
            family,
            prologue: self.prologue(),
            blocks: seen.into_iter().map(|window| self.layer(window)).collect(),
            layers,
            epilogue: self.epilogue(),
            pooled: Some(self.pooled()),
            kv: self.windows.iter().map(|&window| KvSpec::heads(heads, head_dim, window)).collect(),
            hidden: self.hidden,
            vocab: self.vocab,
            context: self.context,
        }
    }

    fn prologue(&self) -> Block {
        let weight = Matrix::one(EMBEDDING, self.vocab, self.hidden);
        Block { ops: vec![Op::Embed { ids: Ids::Token, weight }] }
    }

    fn epilogue(&self) -> Block {
        let mut block = Block::default();
        let rows = block.push(Op::Input);
        let rows = block.push(Op::SelectRows { input: rows });
        let rows = block.push(self.norm(rows, "model.norm.weight", self.hidden));
        let weight = Matrix::one(self.output, self.vocab, self.hidden);
        block.push(Op::Linear { input: rows, weight, bias: None });
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

    fn layer(&self, window: Option<usize>) -> Block {
        let mut block = Block::default();
        let residual = block.push(Op::Input);
        let rows = block.push(self.norm(residual, "input_layernorm.weight", self.hidden));
        let rows = self.attention(&mut block, rows, window);
        let residual = block.push(Op::Add { a: residual, b: rows });
        let rows = block.push(self.norm(residual, "post_attention_layernorm.weight", self.hidden));
        let rows = self.mlp(&mut block, rows);
        block.push(Op::Add { a: residual, b: rows });
        block
    }

    fn attention(&self, block: &mut Block, input: Value, window: Option<usize>) -> Value {
        let (q_width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let parts = [("q", q_width), ("k", kv_width), ("v", kv_width)];
        let names =
            |suffix: &str| parts.map(|(n, rows)| (format!("self_attn.{n}_proj.{suffix}"), rows)).to_vec();
        let weight = Matrix { parts: names("weight"), cols: self.hidden };
        let bias = self.biases.qkv.then(|| Vector { parts: names("bias") });
        let qkv = block.push(Op::Linear { input, weight, bias });
        let mut q = block.push(Op::Slice { input: qkv, start: 0, width: q_width });
        let mut k = block.push(Op::Slice { input: qkv, start: q_width, width: kv_width });
        let v = block.push(Op::Slice { input: qkv, start: q_width + kv_width, width: kv_width });
        if self.head_norm == HeadNorm::RmsNorm {
            q = block.push(self.norm(q, "self_attn.q_norm.weight", self.head_dim));
            k = block.push(self.norm(k, "self_attn.k_norm.weight", self.head_dim));
        }
        let q = block.push(Op::Rope { input: q, rope: self.rope.clone() });
        let k = block.push(Op::Rope { input: k, rope: self.rope.clone() });
        let rows = block.push(Op::Attend(Attend {
            q,
            k,
            v,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f64).powf(-0.5) as f32,
            mask: Mask::Causal { window },
            softcap: None,
            sinks: None,
        }));
        let weight = Matrix::one("self_attn.o_proj.weight", self.hidden, q_width);
        let bias = self.biases.out.then(|| Vector::one("self_attn.o_proj.bias", self.hidden));
        block.push(Op::Linear { input: rows, weight, bias })
    }

    fn mlp(&self, block: &mut Block, input: Value) -> Value {
        let names =
            |suffix: &str| ["gate", "up"].map(|n| (format!("mlp.{n}_proj.{suffix}"), self.inner)).to_vec();
        let weight = Matrix { parts: names("weight"), cols: self.hidden };
        let bias = self.biases.mlp.then(|| Vector { parts: names("bias") });
        let rows = block.push(Op::Linear { input, weight, bias });
        let rows = block.push(Op::GatedActivate { input: rows, f: Gate::By(self.activation) });
        let weight = Matrix::one("mlp.down_proj.weight", self.hidden, self.inner);
        let bias = self.biases.mlp.then(|| Vector::one("mlp.down_proj.bias", self.hidden));
        block.push(Op::Linear { input: rows, weight, bias })
    }

    fn norm(&self, input: Value, weight: &str, width: usize) -> Op {
        Op::RmsNorm { input, weight: Vector::one(weight, width), eps: self.eps }
    }
}

/// `sliding_window`, positions visible to a row, itself included.
pub(super) fn window(config: &Config) -> Result<Option<usize>, LoadError> {
    config.count("sliding_window", 1..=CONTEXT_MAX)
}

/// The windows of Qwen's layers: `layer_types`, else the first `max_window_layers` see everything.
pub(super) fn layer_windows(config: &Config, layers: usize) -> Result<Vec<Option<usize>>, LoadError> {
    let window = if config.flag("use_sliding_window", false)? { window(config)? } else { None };
    let Some(types) = config.get("layer_types") else {
        let full = config.count("max_window_layers", 0..=LAYERS_MAX)?.unwrap_or(28);
        return Ok((0..layers).map(|i| window.filter(|_| i >= full)).collect());
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

/// `hidden_act`.
pub(super) fn activation(config: &Config, default: &str) -> Result<Activation, LoadError> {
    Ok(match config.text("hidden_act")?.unwrap_or(default) {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::GeluErf,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "tanh" => Activation::Tanh,
        _ => return Err(config.wrong("hidden_act", "silu, gelu, gelu_pytorch_tanh, relu or tanh")),
    })
}
