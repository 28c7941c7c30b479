//! The model as data: a graph of blocks of ops over matrices of rows x width.
//!
//! Every value is a matrix `[rows, width]` of f32. There are no reshapes and no broadcasts: heads are a
//! *reading* of the width inside [`Op::Rope`], [`Op::RmsNorm`] and [`Op::Attend`]. Batch structure lives in the
//! step that an executor is given, never here. A family builds a `Graph` from its configuration; a backend turns
//! a `Graph` and its [`crate::Weights`] into an executor.

mod latent;
mod mixture;

use std::sync::Arc;

use crate::LoadError;
use crate::weights::Weights;

pub use latent::AttendLatent;
pub use mixture::{Expert, ExpertGroups, Experts, Routing, RoutingOrder, Score};

/// The index of an op in its block; each op yields exactly one value.
pub type Value = usize;

/// A whole model. Its program is `prologue`, then every layer's block in order, then `epilogue` for the rows that
/// become logits and `pooled` for the sequences that become one row.
#[derive(Clone, Debug)]
pub struct Graph {
    /// The `model_type` of the checkpoint, for messages and metrics.
    pub family: &'static str,
    /// Token ids to hidden rows: begins with [`Op::Embed`], yields `[tokens, hidden]`.
    pub prologue: Block,
    /// Each distinct layer program once; its first op is [`Op::Input`], its last value is `[tokens, hidden]`.
    pub blocks: Vec<Block>,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// Hidden rows to logits: begins with [`Op::Input`], holds one [`Op::SelectRows`], yields `[outputs, vocab]`.
    /// Without ops the model generates nothing.
    pub epilogue: Block,
    /// Hidden rows to one row for each pooled sequence; `None` where the model cannot.
    pub pooled: Option<Pooled>,
    /// What each layer keeps per token, by layer index; empty where every row attends to its whole sequence, since
    /// then nothing can be kept.
    pub kv: Vec<KvSpec>,
    /// Width of the rows between blocks.
    pub hidden: usize,
    /// Rows of the embedding table, and width of the logits.
    pub vocab: usize,
    /// Longest sequence, in tokens, that the model was made for.
    pub context: usize,
    /// Which table of its [`Rope`]s a sequence turns by.
    pub rope_switch: RopeSwitch,
}

/// How a sequence becomes one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Pooled {
    /// What the row is.
    pub kind: PooledKind,
    /// Begins with [`Op::Input`], holds one [`Op::Pool`], yields `[pooled sequences, width]`.
    pub block: Block,
    /// Width of the row.
    pub width: usize,
}

/// What the row of a pooled sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PooledKind {
    /// A vector whose direction is the meaning of the text.
    Embedding,
    /// How well the second text answers the first, one number.
    Score,
}

/// A straight line of ops. An op reads only values of lower index; the last op's value is the block's.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Block {
    /// The ops in order of evaluation.
    pub ops: Vec<Op>,
}

/// A block with its own weights.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Index into [`Graph::blocks`].
    pub block: usize,
    /// Put before every weight name of the block, such as `model.layers.3.`.
    pub prefix: String,
}

/// What one layer keeps for every token, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSpec {
    /// The rows.
    pub rows: KvRows,
    /// How many positions back a token sees, itself included; `None` is unlimited.
    pub window: Option<usize>,
}

/// The rows that a layer keeps for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvRows {
    /// `heads` rows of K and of V, each `head_dim` wide.
    Heads {
        /// Key/value heads.
        heads: usize,
        /// Width of one head.
        head_dim: usize,
    },
    /// What the keys and values of all heads are made of, and the part of the key that they share.
    Latent {
        /// Width of the first.
        latent: usize,
        /// Width of the second.
        key: usize,
    },
}

impl KvSpec {
    /// Keys and values of `heads` heads.
    pub fn heads(heads: usize, head_dim: usize, window: Option<usize>) -> Self {
        Self { rows: KvRows::Heads { heads, head_dim }, window }
    }

    /// Elements that a token takes.
    pub fn elements(&self) -> usize {
        match self.rows {
            KvRows::Heads { heads, head_dim } => 2 * heads * head_dim,
            KvRows::Latent { latent, key } => latent + key,
        }
    }
}

/// A weight matrix `[rows, cols]`, row-major: one output feature a row. Several checkpoint tensors may be stacked
/// by rows, so that QKV and gate/up are one product each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Checkpoint tensors in stacking order, with the rows that each must have. Names are relative to the layer.
    pub parts: Vec<(String, usize)>,
    /// Input features.
    pub cols: usize,
}

impl Matrix {
    /// A matrix that is one checkpoint tensor.
    pub fn one(name: impl Into<String>, rows: usize, cols: usize) -> Self {
        Self { parts: vec![(name.into(), rows)], cols }
    }

    /// Several checkpoint tensors of equal width, stacked by rows.
    pub fn stacked(parts: &[(&str, usize)], cols: usize) -> Self {
        Self { parts: parts.iter().map(|&(n, r)| (n.to_owned(), r)).collect(), cols }
    }

    /// Output features of all parts together.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|p| p.1).sum()
    }
}

/// A weight vector, possibly several checkpoint tensors end to end. Names are relative to the layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Vector {
    /// Checkpoint tensors in order, with the length that each must have.
    pub parts: Vec<(String, usize)>,
    /// Added to every stored number: 1 where a checkpoint holds the distance of a norm's weight from 1.
    pub offset: f32,
}

impl Vector {
    /// A vector that is one checkpoint tensor.
    pub fn one(name: impl Into<String>, len: usize) -> Self {
        Self::named(vec![(name.into(), len)])
    }

    /// Several checkpoint tensors end to end.
    pub fn stacked(parts: &[(&str, usize)]) -> Self {
        Self::named(parts.iter().map(|&(n, l)| (n.to_owned(), l)).collect())
    }

    /// As [`Vector::stacked`], of names that were made.
    pub fn named(parts: Vec<(String, usize)>) -> Self {
        Self { parts, offset: 0.0 }
    }

    /// The same, with this added to every stored number.
    pub fn plus(self, offset: f32) -> Self {
        Self { offset, ..self }
    }

    /// The numbers of the layer with this prefix.
    ///
    /// # Errors
    /// As [`Weights::expect`].
    pub fn read(&self, prefix: &str, weights: &Weights) -> Result<Vec<f32>, LoadError> {
        let mut numbers = vec![0.0; self.width()];
        let mut rest = &mut numbers[..];
        for (name, len) in &self.parts {
            let name = format!("{prefix}{name}");
            weights.expect(&name, &[*len])?;
            let (own, after) = rest.split_at_mut(*len);
            weights.tensor(&name)?.read_f32(own);
            rest = after;
        }
        numbers.iter_mut().for_each(|n| *n += self.offset);
        Ok(numbers)
    }

    /// Number of elements.
    pub fn width(&self) -> usize {
        self.parts.iter().map(|p| p.1).sum()
    }
}

/// Element-wise functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x)
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// GELU by the error function.
    GeluErf,
    /// max(x, 0)
    Relu,
    /// tanh(x)
    Tanh,
    /// 1 / (1 + exp(-x))
    Sigmoid,
}

/// What a gate makes of itself and of what it gates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// `f(gate) * up`
    By(Activation),
    /// `g * sigmoid(alpha * g) * (u + 1)`, where `g` is the gate, at most `limit`, and `u` is up, from `-limit` to
    /// `limit` (gpt-oss).
    Clamped {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// The bound.
        limit: f32,
    },
}

/// Which number of a token an embedding table is read at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// Its id.
    Token,
    /// Its position in the sequence.
    Position,
    /// 0 in the first text of a pair (or a lone text), 1 in the second.
    Segment,
}

/// Which positions of its sequence a row attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Those up to itself.
    Causal {
        /// How many of these, itself included; `None` is all.
        window: Option<usize>,
    },
    /// All. The sequence has to be computed whole, in one step.
    Full,
}

/// Which rows of a sequence its one row is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolKind {
    /// The average of all. The sequence has to be computed whole, in one step.
    Mean,
    /// The first. The sequence has to be computed whole, in one step.
    First,
    /// The last.
    Last,
}

/// Which pairs of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// (i, i + dim/2): Llama in the Hugging Face layout, Qwen, Gemma.
    Half,
    /// (2i, 2i + 1): GPT-J, DeepSeek.
    Interleaved,
}

/// Rotary position embedding: pair `i` of position `p` turns by the angle `p * inv_freq[i]`, and is multiplied by
/// `scale` (attention scaling of YaRN and LongRoPE; 1 otherwise).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Alternatives of `dim / 2` inverse frequencies in radians per token; a chunk picks one by index.
    pub tables: Vec<Arc<[f32]>>,
    /// Width of one head.
    pub head_dim: usize,
    /// First element of a head that is rotated.
    pub first: usize,
    /// How many elements from there on are rotated (even).
    pub dim: usize,
    /// Pairing.
    pub layout: RopeLayout,
    /// Multiplier of sine and cosine.
    pub scale: f32,
}

/// Longest sequence, in tokens, that turns by the first table of every [`Rope`] (LongRoPE, arXiv 2402.13753); longer ones
/// turn by the second. `None` where one table is for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RopeSwitch(pub Option<usize>);

impl RopeSwitch {
    /// Which table a sequence of this many tokens turns by, all of its tokens.
    pub fn table(self, len: usize) -> usize {
        usize::from(self.0.is_some_and(|most| len > most))
    }
}

/// Attention. Under a causal mask K and V of this step's rows are appended to the layer's pages first, then every row
/// attends to its own sequence up to itself. Under a full mask nothing is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Attend {
    /// Queries `[tokens, heads * head_dim]`.
    pub q: Value,
    /// Keys `[tokens, kv_heads * head_dim]`.
    pub k: Value,
    /// Values `[tokens, kv_heads * head_dim]`.
    pub v: Value,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Multiplies q . k.
    pub scale: f32,
    /// What a row sees.
    pub mask: Mask,
    /// Scores pass through `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// A score for each query head that takes its share of the softmax and adds nothing (gpt-oss).
    pub sinks: Option<Vector>,
}

/// One operation. Shapes: `T` rows are the tokens of the step, `O` rows are its output rows, `P` its pooled sequences.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// The rows entering the block, `[T, hidden]`.
    Input,
    /// Rows of an embedding table, `[T, cols]`.
    Embed {
        /// What selects the rows.
        ids: Ids,
        /// `[vocab, hidden]`
        weight: Matrix,
    },
    /// `x W^T + bias`, `[T, rows of W]`.
    Linear {
        /// `[T, cols of W]`
        input: Value,
        /// `[out, in]`
        weight: Matrix,
        /// `[out]`
        bias: Option<Vector>,
    },
    /// Root mean square norm over groups of `weight.width()` elements: the whole row, or each head (q/k norm).
    RmsNorm {
        /// The value to normalise; its width is a multiple of the weight's.
        input: Value,
        /// Multiplies the normalised group.
        weight: Vector,
        /// Added to the mean square.
        eps: f32,
    },
    /// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over the whole row.
    LayerNorm {
        /// The value to normalise, as wide as the weight.
        input: Value,
        /// Multiplies the normalised row.
        weight: Vector,
        /// Added in the end.
        bias: Vector,
        /// Added to the variance.
        eps: f32,
    },
    /// `a + b`, same shapes.
    Add {
        /// Left.
        a: Value,
        /// Right.
        b: Value,
    },
    /// `x * factor`.
    Scale {
        /// The value to scale.
        input: Value,
        /// The factor.
        factor: f32,
    },
    /// `cap * tanh(x / cap)`.
    Softcap {
        /// The value to cap.
        input: Value,
        /// The bound.
        cap: f32,
    },
    /// Columns `start .. start + width`: a view of a stacked product.
    Slice {
        /// The stacked value.
        input: Value,
        /// First column.
        start: usize,
        /// Columns.
        width: usize,
    },
    /// Element-wise function.
    Activate {
        /// The value to map.
        input: Value,
        /// The function.
        f: Activation,
    },
    /// The input is `[gate, up]` side by side, the result half as wide.
    GatedActivate {
        /// `[T, 2 * width]`
        input: Value,
        /// What is made of both.
        f: Gate,
    },
    /// Every row goes through some of many gated MLPs, `[T, rows of down]`.
    Experts(Experts),
    /// Rotary position embedding of every head in the row.
    Rope {
        /// `[T, heads * head_dim]`
        input: Value,
        /// The rotation.
        rope: Rope,
    },
    /// Attention, `[T, heads * head_dim]`.
    Attend(Attend),
    /// Attention whose keys and values are made of one narrow row, `[T, heads * value_dim]`.
    AttendLatent(AttendLatent),
    /// Keeps the step's output rows, `[O, width]`.
    SelectRows {
        /// `[T, width]`
        input: Value,
    },
    /// One row for each pooled sequence, `[P, width]`.
    Pool {
        /// `[T, width]`
        input: Value,
        /// Which rows it is made of.
        kind: PoolKind,
    },
    /// `x / max(|x|, 1e-12)`, the length of a row made 1.
    Normalize {
        /// The value to normalise.
        input: Value,
    },
}

impl Attend {
    /// The width of its rows, given those of q, k and v.
    fn width(&self, found: (usize, usize, usize)) -> Result<usize, String> {
        let (wide, narrow) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let want = (wide, narrow, narrow);
        if want != found {
            return Err(format!("expected widths {want:?} of q, k, v, found {found:?}"));
        }
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!("{} heads are no multiple of {} kv heads", self.heads, self.kv_heads));
        }
        if let Some(sinks) = self.sinks.as_ref().map(Vector::width).filter(|&n| n != self.heads) {
            return Err(format!("expected sinks of {} heads, found {sinks}", self.heads));
        }
        Ok(wide)
    }
}

impl Op {
    /// The op's name as it stands in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input => "Input",
            Op::Embed { .. } => "Embed",
            Op::Linear { .. } => "Linear",
            Op::RmsNorm { .. } => "RmsNorm",
            Op::LayerNorm { .. } => "LayerNorm",
            Op::Add { .. } => "Add",
            Op::Scale { .. } => "Scale",
            Op::Softcap { .. } => "Softcap",
            Op::Slice { .. } => "Slice",
            Op::Activate { .. } => "Activate",
            Op::GatedActivate { .. } => "GatedActivate",
            Op::Experts(_) => "Experts",
            Op::Rope { .. } => "Rope",
            Op::Attend(_) => "Attend",
            Op::AttendLatent(_) => "AttendLatent",
            Op::SelectRows { .. } => "SelectRows",
            Op::Pool { .. } => "Pool",
            Op::Normalize { .. } => "Normalize",
        }
    }

    /// The values that the op reads, in order.
    pub fn inputs(&self) -> Vec<Value> {
        match self {
            Op::Input | Op::Embed { .. } => vec![],
            Op::Linear { input, .. }
            | Op::RmsNorm { input, .. }
            | Op::LayerNorm { input, .. }
            | Op::Scale { input, .. }
            | Op::Softcap { input, .. }
            | Op::Slice { input, .. }
            | Op::Activate { input, .. }
            | Op::GatedActivate { input, .. }
            | Op::Rope { input, .. }
            | Op::SelectRows { input }
            | Op::Pool { input, .. }
            | Op::Normalize { input } => vec![*input],
            Op::Add { a, b } => vec![*a, *b],
            Op::Attend(a) => vec![a.q, a.k, a.v],
            Op::AttendLatent(a) => vec![a.q, a.latent, a.key],
            Op::Experts(e) => vec![e.input, e.scores],
        }
    }
}

impl Block {
    /// Appends an op and returns its value.
    pub fn push(&mut self, op: Op) -> Value {
        self.ops.push(op);
        self.ops.len() - 1
    }

    /// The width of every value, given the width of the rows that enter.
    ///
    /// # Errors
    /// `LoadError::Graph` where an op reads a later value or widths do not fit.
    pub fn widths(&self, input_width: usize) -> Result<Vec<usize>, LoadError> {
        let mut widths: Vec<usize> = Vec::with_capacity(self.ops.len());
        for (i, op) in self.ops.iter().enumerate() {
            let wrong = |what: String| LoadError::Graph { op: i, name: op.name(), what };
            if let Some(v) = op.inputs().into_iter().find(|&v| v >= i) {
                return Err(wrong(format!("reads value {v}, which is not computed before it")));
            }
            let fit = |ok: bool, what: &dyn Fn() -> String| if ok { Ok(()) } else { Err(wrong(what())) };
            let width = match op {
                Op::Input => input_width,
                Op::Embed { weight, .. } => weight.cols,
                Op::Linear { input, weight, bias } => {
                    let w = widths[*input];
                    fit(w == weight.cols, &|| format!("expected input width {}, found {w}", weight.cols))?;
                    if let Some(b) = bias {
                        fit(b.width() == weight.rows(), &|| {
                            format!("expected a bias of {}, found {}", weight.rows(), b.width())
                        })?;
                    }
                    weight.rows()
                }
                Op::RmsNorm { input, weight, .. } => {
                    let (w, n) = (widths[*input], weight.width());
                    fit(n > 0 && w % n == 0, &|| format!("width {w} is no multiple of the weight's {n}"))?;
                    w
                }
                Op::LayerNorm { input, weight, bias, .. } => {
                    let (w, n, b) = (widths[*input], weight.width(), bias.width());
                    fit(w == n && w == b, &|| format!("width {w}, but {n} weights and {b} biases"))?;
                    w
                }
                Op::Add { a, b } => {
                    let (l, r) = (widths[*a], widths[*b]);
                    fit(l == r, &|| format!("widths {l} and {r} differ"))?;
                    l
                }
                Op::Slice { input, start, width } => {
                    let w = widths[*input];
                    fit(start + width <= w, &|| {
                        format!("columns {start}..{} are outside width {w}", start + width)
                    })?;
                    *width
                }
                Op::GatedActivate { input, .. } => {
                    let w = widths[*input];
                    fit(w.is_multiple_of(2), &|| format!("width {w} is odd"))?;
                    w / 2
                }
                Op::Rope { input, rope } => {
                    let w = widths[*input];
                    fit(rope.head_dim > 0 && w.is_multiple_of(rope.head_dim), &|| {
                        format!("width {w} is no multiple of the head's {}", rope.head_dim)
                    })?;
                    let halves = rope.tables.iter().all(|t| t.len() * 2 == rope.dim);
                    fit(
                        rope.first + rope.dim <= rope.head_dim && halves && !rope.tables.is_empty(),
                        &|| format!("tables do not hold half of {} angles", rope.dim),
                    )?;
                    w
                }
                Op::Attend(a) => a.width((widths[a.q], widths[a.k], widths[a.v])).map_err(wrong)?,
                Op::AttendLatent(a) => {
                    a.width((widths[a.q], widths[a.latent], widths[a.key])).map_err(wrong)?
                }
                Op::Experts(e) => e.width(widths[e.input], widths[e.scores]).map_err(wrong)?,
                Op::Scale { input, .. }
                | Op::Softcap { input, .. }
                | Op::Activate { input, .. }
                | Op::SelectRows { input }
                | Op::Pool { input, .. }
                | Op::Normalize { input } => widths[*input],
            };
            widths.push(width);
        }
        Ok(widths)
    }

    /// The matrices and vectors that the block names.
    fn weights(&self) -> impl Iterator<Item = WeightUse<'_>> {
        self.ops.iter().flat_map(|op| {
            let (matrix, vectors) = match op {
                Op::Embed { weight, .. } => (Some(weight), [None, None]),
                Op::Linear { weight, bias, .. } => (Some(weight), [bias.as_ref(), None]),
                Op::RmsNorm { weight, .. } => (None, [Some(weight), None]),
                Op::LayerNorm { weight, bias, .. } => (None, [Some(weight), Some(bias)]),
                Op::Attend(a) => (None, [a.sinks.as_ref(), None]),
                Op::AttendLatent(a) => (Some(&a.expand), [None, None]),
                Op::Experts(e) => (None, [e.routing.bias.as_ref(), None]),
                _ => (None, [None, None]),
            };
            let experts = if let Op::Experts(e) = op { &e.experts[..] } else { &[] };
            let vectors = vectors.into_iter().flatten().map(WeightUse::Vector);
            matrix
                .map(WeightUse::Matrix)
                .into_iter()
                .chain(vectors)
                .chain(experts.iter().flat_map(Expert::weights))
        })
    }
}

enum WeightUse<'a> {
    Matrix(&'a Matrix),
    Vector(&'a Vector),
}

impl Graph {
    /// Proves that the program is well formed and that every weight it names is in `weights` with the shape that
    /// it needs, so that nothing of this kind can fail later.
    ///
    /// # Errors
    /// [`LoadError::Graph`], [`LoadError::MissingTensor`] or [`LoadError::Shape`], naming the culprit.
    pub fn check(&self, weights: &Weights) -> Result<(), LoadError> {
        let wrong = |what: String| LoadError::Graph { op: 0, name: "Graph", what };
        let ends = |block: &Block, name: &str, input: usize, want: usize| match block.widths(input)?.last() {
            Some(&w) if w == want => Ok(()),
            found => Err(wrong(format!("{name} should yield width {want}, found {found:?}"))),
        };
        ends(&self.prologue, "prologue", 0, self.hidden)?;
        if self.generates() {
            ends(&self.epilogue, "epilogue", self.hidden, self.vocab)?;
        }
        if let Some(pooled) = &self.pooled {
            ends(&pooled.block, "pooled block", self.hidden, pooled.width)?;
            self.check_pooled(pooled)?;
        } else if !self.generates() {
            return Err(wrong("it neither generates nor pools".to_owned()));
        }
        for (i, block) in self.blocks.iter().enumerate() {
            ends(block, &format!("block {i}"), self.hidden, self.hidden)?;
        }
        self.check_positions()?;
        self.check_rotations()?;
        let kept = if self.is_whole() { 0 } else { self.layers.len() };
        if self.kv.len() != kept {
            return Err(wrong(format!("expected {kept} KV descriptions, found {}", self.kv.len())));
        }
        if let Some(layer) = self.layers.iter().find(|layer| layer.block >= self.blocks.len()) {
            return Err(wrong(format!("layer {} names block {}", layer.prefix, layer.block)));
        }
        self.tensors().iter().try_for_each(|(name, shape)| weights.expect(name, shape))
    }

    /// Names and shapes of all tensors that the program names, each once, in its order.
    ///
    /// # Panics
    /// If a layer names a block that there is not, which [`Graph::check`] rules out.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let layers = self.layers.iter().map(|layer| (&self.blocks[layer.block], &*layer.prefix));
        let ends = std::iter::once(&self.epilogue).chain(self.pooled.as_ref().map(|pooled| &pooled.block));
        let begin = std::iter::once((&self.prologue, ""));
        let blocks = begin.chain(layers).chain(ends.map(|block| (block, "")));
        let mut seen = std::collections::HashSet::new();
        let mut found = Vec::new();
        for (used, prefix) in blocks.flat_map(|(block, prefix)| block.weights().map(move |w| (w, prefix))) {
            let (parts, cols) = match used {
                WeightUse::Matrix(matrix) => (&matrix.parts, Some(matrix.cols)),
                WeightUse::Vector(vector) => (&vector.parts, None),
            };
            let shape = |rows: usize| std::iter::once(rows).chain(cols).collect();
            let named = parts.iter().map(|(name, rows)| (format!("{prefix}{name}"), shape(*rows)));
            found.extend(named.filter(|tensor| seen.insert(tensor.clone())));
        }
        found
    }

    /// What no backend needs to look out for: pooling of rows that are not all there, masks of two kinds.
    fn check_pooled(&self, pooled: &Pooled) -> Result<(), LoadError> {
        let wrong = |what: String| LoadError::Graph { op: 0, name: "Pooled", what };
        let pools = |op: &Op| if let Op::Pool { kind, .. } = op { Some(*kind) } else { None };
        let kinds: Vec<PoolKind> = pooled.block.ops.iter().filter_map(pools).collect();
        match kinds[..] {
            [PoolKind::Last] => Ok(()),
            [_] if self.is_whole() => Ok(()),
            [kind] => {
                Err(wrong(format!("expected the last row, since sequences come in pieces, found {kind:?}")))
            }
            _ => Err(wrong(format!("expected one Pool, found {}", kinds.len()))),
        }
    }

    /// Every position of the context has a row in a table that is read at positions.
    fn check_positions(&self) -> Result<(), LoadError> {
        for (op, at) in self.prologue.ops.iter().zip(0..) {
            if let Op::Embed { ids: Ids::Position, weight } = op
                && weight.rows() < self.context
            {
                let what = format!("expected rows for {} positions, found {}", self.context, weight.rows());
                return Err(LoadError::Graph { op: at, name: op.name(), what });
            }
        }
        Ok(())
    }

    /// Every rotation has a table for each length of a sequence.
    fn check_rotations(&self) -> Result<(), LoadError> {
        let want = 1 + self.rope_switch.table(usize::MAX);
        for (at, op) in self.blocks.iter().flat_map(|b| b.ops.iter().enumerate()) {
            if let Op::Rope { rope, .. } = op
                && rope.tables.len() < want
            {
                let what = format!("expected {want} tables of angles, found {}", rope.tables.len());
                return Err(LoadError::Graph { op: at, name: op.name(), what });
            }
        }
        Ok(())
    }

    /// Whether it turns rows into logits.
    pub fn generates(&self) -> bool {
        !self.epilogue.ops.is_empty()
    }

    /// Whether a sequence has to be computed whole, in one step: some layer attends to all of it.
    pub fn is_whole(&self) -> bool {
        let is_full = |op: &Op| matches!(op, Op::Attend(a) if a.mask == Mask::Full);
        self.blocks.iter().flat_map(|b| &b.ops).any(is_full)
    }

    /// Bytes of all weights as they are stored, each tensor counted once.
    pub fn weight_bytes(&self, weights: &Weights) -> u64 {
        weights.names().filter_map(|n| weights.tensor(n).ok()).map(|t| t.stored_bytes() as u64).sum()
    }
}
