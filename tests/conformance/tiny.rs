//! Small graphs: one for every variant of every op, and random models of many families at once.

use std::sync::Arc;

use mainstay_models::graph::{
    Activation, Attend, Block, Gate, Graph, Ids, KvRows, KvSpec, Layer, Mask, Matrix, Op, PoolKind, Pooled,
    PooledKind, Rope, RopeLayout, RopeSwitch, Value, Vector,
};

use crate::mixture::{self, Latent, Mixture};
use crate::random::Random;

/// Longest sequence of every graph here.
const CONTEXT: usize = 512;

const ACTIVATIONS: [Activation; 6] = [
    Activation::Silu,
    Activation::GeluTanh,
    Activation::GeluErf,
    Activation::Relu,
    Activation::Tanh,
    Activation::Sigmoid,
];
const LAYOUTS: [RopeLayout; 2] = [RopeLayout::Half, RopeLayout::Interleaved];

/// One layer between an embedding and rows that are logits as they are, so that every output of the op is seen.
pub(crate) fn one(hidden: usize, build: impl FnOnce(&mut Block, Value)) -> Graph {
    let mut block = Block::default();
    let input = block.push(Op::Input);
    build(&mut block, input);
    let kv = kept(&block).unwrap_or(KvSpec::heads(1, 8, None));
    Graph {
        family: "seeded",
        prologue: Block {
            ops: vec![Op::Embed { ids: Ids::Token, weight: Matrix::one("embed", hidden, hidden) }],
        },
        blocks: vec![block],
        layers: vec![Layer { block: 0, prefix: "layer.".into() }],
        epilogue: Block { ops: vec![Op::Input, Op::SelectRows { input: 0 }] },
        pooled: None,
        kv: vec![kv],
        hidden,
        vocab: hidden,
        context: CONTEXT,
        rope_switch: RopeSwitch(Some(40)),
    }
}

/// What a layer of a block keeps.
fn kept(block: &Block) -> Option<KvSpec> {
    block.ops.iter().find_map(|op| match op {
        Op::Attend(Attend { kv_heads, head_dim, mask: Mask::Causal { window }, .. }) => {
            Some(KvSpec::heads(*kv_heads, *head_dim, *window))
        }
        Op::AttendLatent(a) => {
            let rows = KvRows::Latent { latent: a.latent_dim(), key: a.key_dim };
            Some(KvSpec { rows, window: None })
        }
        _ => None,
    })
}

pub(crate) fn linear(block: &mut Block, input: Value, name: &str, rows: usize, cols: usize) -> Value {
    block.push(Op::Linear { input, weight: Matrix::one(name, rows, cols), bias: None })
}

pub(crate) fn table(random: &mut Random, len: usize) -> Arc<[f32]> {
    let fastest = 1.0 + random.signed() * 0.2;
    (0..len).map(|i| fastest * 100f32.powf(-(i as f32) / len as f32)).collect()
}

/// Every op and variant by itself, named.
pub(crate) fn single_ops(random: &mut Random) -> Vec<(String, Graph)> {
    let mut graphs = element_wise();
    graphs.extend(products(random));
    graphs.extend(rotations(random));
    graphs.extend(attentions(random));
    graphs.extend(mixture::single_ops(random));
    graphs
}

fn element_wise() -> Vec<(String, Graph)> {
    let mut graphs = Vec::new();
    // 40 and 96 are whole vectors on every machine, 37 is none.
    for hidden in [37, 40, 96] {
        let mut add = |name: String, graph| graphs.push((format!("{name}, width {hidden}"), graph));
        add(
            "Add".into(),
            one(hidden, |b, x| {
                let y = linear(b, x, "w", hidden, hidden);
                b.push(Op::Add { a: x, b: y });
            }),
        );
        add(
            "Scale".into(),
            one(hidden, |b, input| {
                b.push(Op::Scale { input, factor: 0.37 });
            }),
        );
        add(
            "Softcap".into(),
            one(hidden, |b, input| {
                b.push(Op::Softcap { input, cap: 1.5 });
            }),
        );
        add(
            "RmsNorm".into(),
            one(hidden, |b, input| {
                b.push(Op::RmsNorm { input, weight: Vector::one("n", hidden), eps: 1e-5 });
            }),
        );
        add(
            "LayerNorm".into(),
            one(hidden, |b, input| {
                let [weight, bias] = ["n", "n.bias"].map(|name| Vector::one(name, hidden));
                b.push(Op::LayerNorm { input, weight, bias, eps: 1e-5 });
            }),
        );
        add(
            "Normalize".into(),
            one(hidden, |b, input| {
                b.push(Op::Normalize { input });
            }),
        );
        for f in ACTIVATIONS {
            add(
                format!("Activate {f:?}"),
                one(hidden, |b, x| {
                    let input = b.push(Op::Scale { input: x, factor: 3.0 });
                    b.push(Op::Activate { input, f });
                }),
            );
            add(
                format!("GatedActivate {f:?}"),
                one(hidden, |b, x| {
                    let input = linear(b, x, "w", 2 * hidden, hidden);
                    b.push(Op::GatedActivate { input, f: Gate::By(f) });
                }),
            );
        }
    }
    graphs.push((
        "RmsNorm by head".into(),
        one(96, |b, input| {
            b.push(Op::RmsNorm { input, weight: Vector::one("n", 12), eps: 1e-6 });
        }),
    ));
    graphs
}

fn products(random: &mut Random) -> Vec<(String, Graph)> {
    let mut graphs = Vec::new();
    for (hidden, inner) in [(24, 1), (24, 33), (65, 64), (48, 257), (33, 130), (512, 96)] {
        let split = 1 + random.below(hidden - 1);
        graphs.push((
            format!("Linear {hidden} to {inner} and back"),
            one(hidden, |b, x| {
                let y = linear(b, x, "up", inner, hidden);
                let weight = Matrix::stacked(&[("a", split), ("b", hidden - split)], inner);
                let bias = Some(Vector::stacked(&[("a.bias", split), ("b.bias", hidden - split)]));
                b.push(Op::Linear { input: y, weight, bias });
            }),
        ));
        let start = random.below(2 * hidden);
        graphs.push((
            format!("Slice {start}.. of {}", 3 * hidden),
            one(hidden, |b, x| {
                let y = linear(b, x, "w", 3 * hidden, hidden);
                b.push(Op::Slice { input: y, start, width: hidden });
            }),
        ));
    }
    graphs
}

fn rotations(random: &mut Random) -> Vec<(String, Graph)> {
    let mut graphs = Vec::new();
    for (head_dim, dim) in [(8, 8), (24, 24), (24, 10), (64, 64), (64, 32), (48, 2)] {
        for layout in LAYOUTS {
            let tables = vec![table(random, dim / 2), table(random, dim / 2)];
            let first = random.below(head_dim - dim + 1);
            let rope = Rope { tables, head_dim, first, dim, layout, scale: random.pick(&[1.0, 1.3]) };
            let name = format!("Rope {layout:?}, {dim} of {head_dim}");
            graphs.push((
                name,
                one(3 * head_dim, |b, input| {
                    b.push(Op::Rope { input, rope });
                }),
            ));
        }
    }
    graphs
}

fn attentions(random: &mut Random) -> Vec<(String, Graph)> {
    let mut graphs = Vec::new();
    for (heads, kv_heads, head_dim) in
        [(1, 1, 8), (4, 4, 16), (4, 2, 24), (8, 1, 20), (6, 2, 64), (2, 1, 128)]
    {
        for window in [None, Some(1), Some(5), Some(40)] {
            let (softcap, sinks) = (random.coin().then_some(2.0), random.coin());
            let name = format!(
                "Attend {heads}/{kv_heads} x {head_dim}, window {window:?}, softcap {softcap:?}, sinks {sinks}"
            );
            graphs.push((
                name,
                one(64, |b, x| {
                    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
                    let qkv = linear(b, x, "qkv", wide + 2 * narrow, 64);
                    let q = b.push(Op::Slice { input: qkv, start: 0, width: wide });
                    let k = b.push(Op::Slice { input: qkv, start: wide, width: narrow });
                    let v = b.push(Op::Slice { input: qkv, start: wide + narrow, width: narrow });
                    let scale = (head_dim as f32).sqrt().recip();
                    let y = b.push(Op::Attend(Attend {
                        q,
                        k,
                        v,
                        heads,
                        kv_heads,
                        head_dim,
                        scale,
                        mask: Mask::Causal { window },
                        softcap,
                        sinks: sinks.then(|| Vector::one("sinks", heads)),
                    }));
                    linear(b, y, "o", 64, wide);
                }),
            ));
        }
    }
    graphs
}

/// How one kind of layer of a random model is made.
#[derive(Clone, Debug)]
struct Recipe {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: bool,
    rope: Option<Rope>,
    /// q/k norm: over this many elements, per head or per row.
    head_norm: Option<HeadNorm>,
    stacked: bool,
    bias: bool,
    gated: bool,
    activation: Activation,
    inner: usize,
    /// In place of the MLP.
    mixture: Option<Mixture>,
    /// In place of attention to heads.
    latent: Option<Latent>,
    norms: Norms,
    /// Added to the stored weights of norms.
    offset: f32,
}

/// Where a layer's norms stand, by what attention and MLP are to them.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Norms {
    Before,
    Around,
    Behind,
}

#[derive(Clone, Copy, Debug)]
enum HeadNorm {
    PerHead,
    PerRow,
}

impl Recipe {
    fn random(random: &mut Random) -> Self {
        let (kv_heads, per_kv) = (random.pick(&[1, 2, 3]), random.pick(&[1, 2, 4]));
        let head_dim = random.pick(&[8, 16, 20, 24, 32, 64]);
        let dim = random.pick(&[head_dim, head_dim / 2]);
        let rope = Rope {
            tables: vec![table(random, dim / 2), table(random, dim / 2)],
            head_dim,
            first: random.below(head_dim - dim + 1),
            dim,
            layout: random.pick(&LAYOUTS),
            scale: random.pick(&[1.0, 1.2]),
        };
        Self {
            heads: kv_heads * per_kv,
            kv_heads,
            head_dim,
            window: random.pick(&[None, None, Some(3), Some(33)]),
            softcap: random.pick(&[None, None, Some(5.0)]),
            sinks: random.below(4) == 0,
            rope: (random.below(5) > 0).then_some(rope),
            head_norm: random.pick(&[None, Some(HeadNorm::PerHead), Some(HeadNorm::PerRow)]),
            stacked: random.coin(),
            bias: random.coin(),
            gated: random.below(4) > 0,
            activation: random.pick(&ACTIVATIONS),
            inner: random.pick(&[24, 56, 96, 129]),
            mixture: (random.below(3) == 0).then(|| Mixture::random(random)),
            latent: (random.below(4) == 0).then(|| Latent::random(random)),
            norms: random.pick(&[Norms::Before, Norms::Before, Norms::Around, Norms::Behind]),
            offset: random.pick(&[0.0, 1.0]),
        }
    }

    fn block(&self, hidden: usize) -> Block {
        let mut b = Block::default();
        let residual = b.push(Op::Input);
        let rows = self.layer_norm(&mut b, residual, ("norm1", Norms::Behind), hidden);
        let rows = self.attention(&mut b, rows, hidden);
        let rows = self.layer_norm(&mut b, rows, ("norm1.post", Norms::Before), hidden);
        let residual = b.push(Op::Add { a: residual, b: rows });
        let rows = self.layer_norm(&mut b, residual, ("norm2", Norms::Behind), hidden);
        let rows = self.mlp(&mut b, rows, hidden);
        let rows = self.layer_norm(&mut b, rows, ("norm2.post", Norms::Before), hidden);
        b.push(Op::Add { a: residual, b: rows });
        b
    }

    /// The rows as they are where norms stand on the other side only.
    fn layer_norm(&self, b: &mut Block, rows: Value, (name, without): (&str, Norms), hidden: usize) -> Value {
        if self.norms == without { rows } else { self.norm(b, rows, name, hidden) }
    }

    fn norm(&self, b: &mut Block, input: Value, name: &str, width: usize) -> Value {
        b.push(Op::RmsNorm { input, weight: Vector::one(name, width).plus(self.offset), eps: 1e-5 })
    }

    fn attention(&self, b: &mut Block, input: Value, hidden: usize) -> Value {
        if let Some(latent) = &self.latent {
            return latent.push(b, input, hidden);
        }
        let (wide, narrow) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let parts = [("q", wide), ("k", narrow), ("v", narrow)];
        let biases = [("q.bias", wide), ("k.bias", narrow), ("v.bias", narrow)];
        let [q, k, v] = if self.stacked {
            let bias = self.bias.then(|| Vector::stacked(&biases));
            let qkv = b.push(Op::Linear { input, weight: Matrix::stacked(&parts, hidden), bias });
            [(0, wide), (wide, narrow), (wide + narrow, narrow)]
                .map(|(start, width)| b.push(Op::Slice { input: qkv, start, width }))
        } else {
            [0, 1, 2].map(|i| {
                let bias = self.bias.then(|| Vector::stacked(&biases[i..=i]));
                b.push(Op::Linear { input, weight: Matrix::stacked(&parts[i..=i], hidden), bias })
            })
        };
        let (q, k) = (self.turned(b, q, "q", wide), self.turned(b, k, "k", narrow));
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);
        let scale = (head_dim as f32).sqrt().recip();
        let (mask, softcap) = (Mask::Causal { window: self.window }, self.softcap);
        let sinks = self.sinks.then(|| Vector::one("sinks", heads));
        let rows =
            b.push(Op::Attend(Attend { q, k, v, heads, kv_heads, head_dim, scale, mask, softcap, sinks }));
        linear(b, rows, "o", hidden, wide)
    }

    /// Queries or keys, normalised and rotated.
    fn turned(&self, b: &mut Block, input: Value, name: &str, width: usize) -> Value {
        let input = match self.head_norm {
            None => input,
            Some(HeadNorm::PerHead) => self.norm(b, input, &format!("{name}.norm"), self.head_dim),
            Some(HeadNorm::PerRow) => self.norm(b, input, &format!("{name}.norm"), width),
        };
        match &self.rope {
            Some(rope) => b.push(Op::Rope { input, rope: rope.clone() }),
            None => input,
        }
    }

    fn mlp(&self, b: &mut Block, input: Value, hidden: usize) -> Value {
        if let Some(mixture) = &self.mixture {
            return mixture.push(b, input, hidden);
        }
        let f = self.activation;
        let rows = if self.gated {
            let weight = Matrix::stacked(&[("gate", self.inner), ("up", self.inner)], hidden);
            let both = b.push(Op::Linear { input, weight, bias: None });
            b.push(Op::GatedActivate { input: both, f: Gate::By(f) })
        } else {
            let up = linear(b, input, "up", self.inner, hidden);
            b.push(Op::Activate { input: up, f })
        };
        let bias = self.bias.then(|| Vector::one("down.bias", hidden));
        b.push(Op::Linear { input: rows, weight: Matrix::one("down", hidden, self.inner), bias })
    }
}

fn norm(b: &mut Block, input: Value, name: &str, width: usize) -> Value {
    b.push(Op::RmsNorm { input, weight: Vector::one(name, width), eps: 1e-5 })
}

/// A decoder of two kinds of layers, whose pages may belong to different groups.
pub(crate) fn model(random: &mut Random) -> Graph {
    let hidden = random.pick(&[32, 48, 72, 100]);
    let vocab = random.pick(&[64, 101, 200]);
    let recipes = [Recipe::random(random), Recipe::random(random)];
    let kinds: Vec<usize> = (0..1 + random.below(3)).map(|_| random.below(2)).collect();
    let mut prologue =
        Block { ops: vec![Op::Embed { ids: Ids::Token, weight: Matrix::one("embed", vocab, hidden) }] };
    if random.coin() {
        prologue.push(Op::Scale { input: 0, factor: (hidden as f32).sqrt() });
    }
    let mut epilogue = Block::default();
    let rows = epilogue.push(Op::Input);
    let rows = epilogue.push(Op::SelectRows { input: rows });
    let rows = norm(&mut epilogue, rows, "norm", hidden);
    let tied = random.coin();
    let rows = linear(&mut epilogue, rows, if tied { "embed" } else { "head" }, vocab, hidden);
    if random.coin() {
        epilogue.push(Op::Softcap { input: rows, cap: 4.0 });
    }
    let blocks: Vec<Block> = recipes.iter().map(|r| r.block(hidden)).collect();
    let kv = kinds.iter().map(|&kind| kept(&blocks[kind]).expect("a layer attends")).collect();
    Graph {
        family: "seeded",
        prologue,
        blocks,
        layers: kinds
            .iter()
            .enumerate()
            .map(|(i, &block)| Layer { block, prefix: format!("layers.{i}.") })
            .collect(),
        epilogue,
        pooled: None,
        kv,
        hidden,
        vocab,
        context: CONTEXT,
        rope_switch: RopeSwitch(random.pick(&[None, Some(40), Some(90)])),
    }
}

/// A model of [`model`] whose last rows are embeddings.
pub(crate) fn model_that_pools(random: &mut Random) -> Graph {
    let mut graph = model(random);
    let mut block = Block::default();
    let rows = block.push(Op::Input);
    let rows = block.push(Op::Pool { input: rows, kind: PoolKind::Last });
    let rows = norm(&mut block, rows, "norm", graph.hidden);
    block.push(Op::Normalize { input: rows });
    graph.pooled = Some(Pooled { kind: PooledKind::Embedding, block, width: graph.hidden });
    graph
}

/// Pools otherwise.
pub(crate) fn repool(graph: &mut Graph, kind: PoolKind) {
    for op in graph.pooled.iter_mut().flat_map(|pooled| &mut pooled.block.ops) {
        if let Op::Pool { kind: found, .. } = op {
            *found = kind;
        }
    }
}

fn layer_norm(b: &mut Block, input: Value, name: &str, width: usize) -> Value {
    let [weight, bias] = [name.to_owned(), format!("{name}.bias")].map(|name| Vector::one(name, width));
    b.push(Op::LayerNorm { input, weight, bias, eps: 1e-12 })
}

/// A layer that attends to all of its sequence, with its norms after the sums.
fn whole_layer(random: &mut Random, hidden: usize) -> Block {
    let recipe = Recipe { bias: true, latent: None, ..Recipe::random(random) };
    let mut b = Block::default();
    let input = b.push(Op::Input);
    let rows = recipe.attention(&mut b, input, hidden);
    for op in &mut b.ops {
        if let Op::Attend(attend) = op {
            attend.mask = Mask::Full;
        }
    }
    let rows = b.push(Op::Add { a: input, b: rows });
    let input = layer_norm(&mut b, rows, "norm1", hidden);
    let rows = recipe.mlp(&mut b, input, hidden);
    let rows = b.push(Op::Add { a: input, b: rows });
    layer_norm(&mut b, rows, "norm2", hidden);
    b
}

/// An encoder: an embedding, or a classifier over pairs.
pub(crate) fn encoder(random: &mut Random) -> Graph {
    let hidden = random.pick(&[32, 48, 72, 100]);
    let vocab = random.pick(&[64, 101]);
    let mut prologue = Block::default();
    let tables =
        [(Ids::Token, "words", vocab), (Ids::Segment, "segments", 2), (Ids::Position, "places", CONTEXT)];
    let [words, segments, places] = tables
        .map(|(ids, name, rows)| prologue.push(Op::Embed { ids, weight: Matrix::one(name, rows, hidden) }));
    let rows = prologue.push(Op::Add { a: words, b: segments });
    let rows = prologue.push(Op::Add { a: rows, b: places });
    layer_norm(&mut prologue, rows, "norm", hidden);
    let mut block = Block::default();
    let rows = block.push(Op::Input);
    let kind = random.pick(&[PoolKind::Mean, PoolKind::First, PoolKind::Last]);
    let rows = block.push(Op::Pool { input: rows, kind });
    let (kind, width) = if random.coin() {
        block.push(Op::Normalize { input: rows });
        (PooledKind::Embedding, hidden)
    } else {
        let weight = Matrix::one("pooler", hidden, hidden);
        let rows =
            block.push(Op::Linear { input: rows, weight, bias: Some(Vector::one("pooler.bias", hidden)) });
        let rows = block.push(Op::Activate { input: rows, f: Activation::Tanh });
        let rows = linear(&mut block, rows, "classifier", 1, hidden);
        block.push(Op::Activate { input: rows, f: Activation::Sigmoid });
        (PooledKind::Score, 1)
    };
    let blocks = vec![whole_layer(random, hidden), whole_layer(random, hidden)];
    let layer = |i| Layer { block: random.below(2), prefix: format!("layers.{i}.") };
    Graph {
        family: "seeded",
        prologue,
        blocks,
        layers: (0..2).map(layer).collect(),
        epilogue: Block::default(),
        pooled: Some(Pooled { kind, block, width }),
        kv: Vec::new(),
        hidden,
        vocab,
        context: CONTEXT,
        rope_switch: RopeSwitch::default(),
    }
}
