//! A tiny seeded model of the Llama kind, and a driver that feeds it in any way.

use std::path::Path;

use mainstay_backend_api::{
    Backend, Chunk, Executor, KvDType, Limits, OutputRow, PAGE_TOKENS, PageId, PageRead, PageRef, Sampling,
    Step, StepOutput, Ticket, Want,
};
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_kernels_cpu::Isa;
use mainstay_models::Weights;
use mainstay_models::graph::{
    Activation, Attend, AttendLatent, Block, Expert, Experts, Gate, Graph, Ids, KvRows, KvSpec, Layer, Mask,
    Matrix, Op, Rope, RopeLayout, RopeSwitch, Routing, RoutingOrder, Score, Vector,
};
use mainstay_models::quant::seeded_blocks;
use mainstay_models::weights::{DType, MemoryTensor};

pub(crate) const PAGE: usize = 32;

/// Sizes and variants of the tiny model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) inner: usize,
    pub(crate) vocab: usize,
    pub(crate) layers: usize,
    pub(crate) window: Option<usize>,
    pub(crate) softcap: Option<f32>,
    pub(crate) head_norm: bool,
    pub(crate) bias: bool,
    /// In place of the MLP, each with an MLP's sizes; a row has two of them.
    pub(crate) experts: usize,
    /// Width of the latent rows that keys and values are made of; 0 where they are kept themselves.
    pub(crate) latent: usize,
    /// What weights are stored as; the second type is that of `v`, `up` and `embed`, so that products meet both.
    pub(crate) dtypes: [DType; 2],
}

pub(crate) const SMALL: Shape = Shape {
    hidden: 48,
    heads: 4,
    kv_heads: 2,
    head_dim: 12,
    inner: 80,
    vocab: 101,
    layers: 2,
    window: None,
    softcap: None,
    head_norm: false,
    bias: false,
    experts: 0,
    latent: 0,
    dtypes: [DType::F32; 2],
};

/// Experts, and one latent row in place of all heads' keys and values.
pub(crate) const SPARSE: Shape =
    Shape { experts: 5, latent: 32, heads: 5, head_dim: 16, inner: 32, bias: true, ..SMALL };

/// Widths that every type's blocks divide.
pub(crate) const BLOCKS: Shape = Shape { hidden: 256, heads: 8, head_dim: 32, inner: 256, ..SMALL };

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// In -1..1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

pub(crate) fn graph(s: &Shape) -> Graph {
    let mut block = Block::default();
    let x = block.push(Op::Input);
    let norm = |input, name: &str, width| Op::RmsNorm { input, weight: Vector::one(name, width), eps: 1e-6 };
    let n = block.push(norm(x, "norm1", s.hidden));
    let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let weight = Matrix::stacked(&[("q", q), ("k", kv), ("v", kv)], s.hidden);
    let bias = s.bias.then(|| Vector::stacked(&[("qb", q), ("kb", kv), ("vb", kv)]));
    let qkv = block.push(Op::Linear { input: n, weight, bias });
    let rope = Rope {
        tables: vec![
            (0..s.head_dim / 2).map(|i| 10000f32.powf(-2.0 * i as f32 / s.head_dim as f32)).collect(),
        ],
        head_dim: s.head_dim,
        first: 0,
        dim: s.head_dim / 2 * 2,
        layout: RopeLayout::Half,
        scale: 1.0,
    };
    let mut head = |start, width, name: &str| {
        let mut v = block.push(Op::Slice { input: qkv, start, width });
        if s.head_norm {
            v = block.push(norm(v, name, s.head_dim));
        }
        block.push(Op::Rope { input: v, rope: rope.clone() })
    };
    let (qr, kr) = (head(0, q, "qn"), head(q, kv, "kn"));
    let v = block.push(Op::Slice { input: qkv, start: q + kv, width: kv });
    let attend = Attend {
        q: qr,
        k: kr,
        v,
        heads: s.heads,
        kv_heads: s.kv_heads,
        head_dim: s.head_dim,
        scale: (s.head_dim as f32).powf(-0.5),
        mask: Mask::Causal { window: s.window },
        softcap: s.softcap,
        sinks: None,
    };
    let a = if s.latent > 0 { latent(&mut block, (n, qr), s, &rope) } else { block.push(Op::Attend(attend)) };
    let o = block.push(Op::Linear { input: a, weight: Matrix::one("o", s.hidden, q), bias: None });
    let r = block.push(Op::Add { a: x, b: o });
    let n = block.push(norm(r, "norm2", s.hidden));
    let d = if s.experts > 0 { experts(&mut block, n, s) } else { mlp(&mut block, n, s) };
    block.push(Op::Add { a: r, b: d });
    let rows = match s.latent {
        0 => KvRows::Heads { heads: s.kv_heads, head_dim: s.head_dim },
        latent => KvRows::Latent { latent, key: KEY },
    };

    let mut epilogue = Block::default();
    let x = epilogue.push(Op::Input);
    let x = epilogue.push(Op::SelectRows { input: x });
    let x = epilogue.push(norm(x, "norm", s.hidden));
    epilogue.push(Op::Linear { input: x, weight: Matrix::one("embed", s.vocab, s.hidden), bias: None });
    Graph {
        family: "tiny",
        prologue: Block {
            ops: vec![Op::Embed { ids: Ids::Token, weight: Matrix::one("embed", s.vocab, s.hidden) }],
        },
        blocks: vec![block],
        layers: (0..s.layers).map(|i| Layer { block: 0, prefix: format!("{i}.") }).collect(),
        epilogue,
        pooled: None,
        kv: vec![KvSpec { rows, window: s.window }; s.layers],
        hidden: s.hidden,
        vocab: s.vocab,
        context: 4096,
        rope_switch: RopeSwitch::default(),
    }
}

fn mlp(block: &mut Block, input: usize, s: &Shape) -> usize {
    let weight = Matrix::stacked(&[("gate", s.inner), ("up", s.inner)], s.hidden);
    let bias = s.bias.then(|| Vector::stacked(&[("gateb", s.inner), ("upb", s.inner)]));
    let input = block.push(Op::Linear { input, weight, bias });
    let input = block.push(Op::GatedActivate { input, f: Gate::By(Activation::Silu) });
    block.push(Op::Linear { input, weight: Matrix::one("down", s.hidden, s.inner), bias: None })
}

fn experts(block: &mut Block, input: usize, s: &Shape) -> usize {
    let weight = Matrix::one("router", s.experts, s.hidden);
    let scores = block.push(Op::Linear { input, weight, bias: None });
    let expert = |id: usize| {
        let [gate, up, down] = ["gate", "up", "down"].map(|part| format!("{id}.{part}"));
        let parts = vec![(gate, s.inner), (up, s.inner)];
        let biases = parts.iter().map(|(name, rows)| (format!("{name}b"), *rows)).collect();
        Expert {
            up: Matrix { parts, cols: s.hidden },
            up_bias: s.bias.then(|| Vector::named(biases)),
            down: Matrix::one(down, s.hidden, s.inner),
            down_bias: None,
        }
    };
    let routing = Routing {
        score: Score::Softmax,
        order: RoutingOrder::ScoreFirst,
        bias: None,
        groups: None,
        top_k: 2,
        renormalise: true,
        scale: 1.0,
    };
    let f = Gate::Clamped { alpha: 1.702, limit: 1.0 };
    let experts = (0..s.experts).map(expert).collect();
    block.push(Op::Experts(Experts { input, scores, routing, experts, f }))
}

/// Width of the key part that all heads share.
const KEY: usize = 4;

/// Of the rotated queries, the last elements of a head meet the shared key.
fn latent(block: &mut Block, (input, q): (usize, usize), s: &Shape, rope: &Rope) -> usize {
    let weight = Matrix::one("kv", s.latent + KEY, s.hidden);
    let both = block.push(Op::Linear { input, weight, bias: None });
    let rows = block.push(Op::Slice { input: both, start: 0, width: s.latent });
    let key = block.push(Op::Slice { input: both, start: s.latent, width: KEY });
    let tables = rope.tables.iter().map(|table| table[..KEY / 2].into()).collect();
    let key =
        block.push(Op::Rope { input: key, rope: Rope { tables, head_dim: KEY, dim: KEY, ..rope.clone() } });
    let (heads, plain_dim, value_dim) = (s.heads, s.head_dim - KEY, s.head_dim);
    let expand = Matrix::one("expand", heads * (plain_dim + value_dim), s.latent);
    let scale = (s.head_dim as f32).powf(-0.5);
    let attend =
        AttendLatent { q, latent: rows, key, expand, heads, plain_dim, key_dim: KEY, value_dim, scale };
    block.push(Op::AttendLatent(attend))
}

/// Seeded weights.
pub(crate) fn weights(s: &Shape, seed: u64) -> Weights {
    let mut names: Vec<(String, Vec<usize>)> = vec![("embed".into(), vec![s.vocab, s.hidden])];
    names.push(("norm".into(), vec![s.hidden]));
    let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    for i in 0..s.layers {
        let vectors = [("norm1", s.hidden), ("norm2", s.hidden), ("qn", s.head_dim), ("kn", s.head_dim)];
        let biases = [("qb", q), ("kb", kv), ("vb", kv), ("gateb", s.inner), ("upb", s.inner)];
        names.extend(vectors.iter().chain(&biases).map(|(n, w)| (format!("{i}.{n}"), vec![*w])));
        let matrices = [("q", q, s.hidden), ("k", kv, s.hidden), ("v", kv, s.hidden), ("o", s.hidden, q)];
        let mlp = [("gate", s.inner, s.hidden), ("up", s.inner, s.hidden), ("down", s.hidden, s.inner)];
        names.extend(matrices.iter().chain(&mlp).map(|(n, r, c)| (format!("{i}.{n}"), vec![*r, *c])));
        for id in 0..s.experts {
            names.extend(mlp.iter().map(|(n, r, c)| (format!("{i}.{id}.{n}"), vec![*r, *c])));
            names.extend(["gateb", "upb"].map(|n| (format!("{i}.{id}.{n}"), vec![s.inner])));
        }
        if s.experts > 0 {
            names.push((format!("{i}.router"), vec![s.experts, s.hidden]));
        }
        if s.latent > 0 {
            names.push((format!("{i}.kv"), vec![s.latent + KEY, s.hidden]));
            names.push((format!("{i}.expand"), vec![s.heads * (2 * s.head_dim - KEY), s.latent]));
        }
    }
    let mut random = Random::new(seed);
    let tensors = names.into_iter().map(|(name, shape)| tensor(s, name, shape, &mut random));
    Weights::from_tensors(Path::new("tiny"), tensors).expect("well-formed tensors")
}

fn tensor(s: &Shape, name: String, shape: Vec<usize>, random: &mut Random) -> MemoryTensor {
    let mut bytes = Vec::new();
    if shape.len() == 1 {
        let offset = if name.contains("norm") || name.ends_with(['n']) { 1.0f32 } else { 0.0 };
        (0..shape[0]).for_each(|_| bytes.extend((offset + random.float() * 0.2).to_le_bytes()));
        return MemoryTensor { name, dtype: DType::F32, shape, bytes };
    }
    let second = ["v", "up", "embed"].contains(&name.rsplit('.').next().unwrap_or_default());
    let dtype = s.dtypes[usize::from(second)];
    let most = 2.0 / (shape[1] as f32).sqrt();
    for _ in 0..shape[0] * shape[1] {
        match dtype {
            DType::F32 => bytes.extend((random.float() * most).to_le_bytes()),
            DType::BF16 => bytes.extend(half::bf16::from_f32(random.float() * most).to_le_bytes()),
            _ => break,
        }
    }
    if dtype.format().is_some() {
        seeded_blocks((dtype, most), (shape[0], shape[1]), || random.next(), &mut bytes);
    }
    MemoryTensor { name, dtype, shape, bytes }
}

pub(crate) fn limits(kv_dtype: KvDType) -> Limits {
    Limits { context: 512, tokens_per_step: 128, chunks: 8, output_rows: 128, pages: vec![64], kv_dtype }
}

/// An executor of the tiny model.
pub(crate) fn load(s: &Shape, threads: usize, isa: Option<Isa>, kv: KvDType) -> Box<dyn Executor> {
    let backend = CpuBackend::new(CpuOptions { threads: Some(threads), isa }).expect("this machine");
    backend.load(&graph(s), &weights(s, 7), &limits(kv)).expect("a well-formed model")
}

/// A sequence to feed in pieces.
#[derive(Clone)]
pub(crate) struct Feed {
    pub(crate) tokens: Vec<u32>,
    pub(crate) pages: Vec<PageId>,
    pub(crate) done: usize,
}

impl Feed {
    pub(crate) fn new(tokens: &[u32], first_page: u32, descending: bool) -> Self {
        let count = tokens.len().div_ceil(PAGE) as u32;
        let page = |i: u32| PageId(if descending { first_page + count - 1 - i } else { first_page + i });
        Self { tokens: tokens.to_vec(), pages: (0..count).map(page).collect(), done: 0 }
    }

    /// Adds the next `count` tokens to a step, asking for the output of all of them.
    pub(crate) fn put(&mut self, step: &mut Step, count: usize) {
        let start = step.tokens.len();
        step.tokens.extend(&self.tokens[self.done..self.done + count]);
        let pages = step.page_table.len();
        step.page_table.extend(&self.pages[..(self.done + count).div_ceil(PAGE)]);
        step.chunks.push(Chunk {
            tokens: start..start + count,
            position: self.done,
            pages: pages..step.page_table.len(),
            rope_table: 0,
            second: None,
            adapter: None,
        });
        step.outputs.extend((0..count).map(|i| OutputRow {
            row: start + i,
            position: self.done + i + 1,
            want: Want::Sample(Sampling::greedy()),
            top_logprobs: None,
        }));
        self.done += count;
    }
}

pub(crate) fn run(executor: &mut dyn Executor, step: &Step) -> StepOutput {
    let mut out = StepOutput::default();
    executor.submit(step).expect("a step");
    executor.finish(&mut out).expect("a step");
    out
}

/// Feeds a sequence alone in pieces of these lengths; returns the logits of all its tokens.
pub(crate) fn feed_alone(executor: &mut dyn Executor, feed: &mut Feed, pieces: &[usize]) -> Vec<f32> {
    let mut logits = Vec::new();
    for &piece in pieces {
        let mut step = Step { return_logits: true, ..Step::default() };
        feed.put(&mut step, piece);
        logits.extend(run(executor, &step).logits);
    }
    logits
}

/// The payload of a sequence's pages, zeros in the slots of tokens that were not computed.
pub(crate) fn page_bytes(executor: &mut dyn Executor, feed: &Feed) -> Vec<u8> {
    let read = |&page: &PageId| PageRead { page: PageRef { group: 0, page }, tokens: PAGE_TOKENS };
    let pages: Vec<PageRead> = feed.pages.iter().map(read).collect();
    executor.start_read(&pages, Ticket(1));
    let mut done = Vec::new();
    executor.poll(&mut done);
    assert_eq!(done.len(), 1);
    let group = &executor.kv_layout().groups[0];
    let pages = done[0].bytes.iter().enumerate().map(|(i, page)| {
        assert_eq!(page.len(), group.page_bytes());
        let mut page = page.to_vec();
        group.clear_from(feed.done.saturating_sub(i * PAGE), &mut page);
        page
    });
    pages.flatten().collect()
}

pub(crate) fn tokens(count: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.below(SMALL.vocab) as u32).collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}
