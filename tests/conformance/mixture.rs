//! Seeded experts and attention to latent rows: by themselves, and as parts of random models.

use mainstay_models::graph::{
    Activation, AttendLatent, Block, Expert, ExpertGroups, Experts, Gate, Graph, Matrix, Op, Rope,
    RopeLayout, Routing, RoutingOrder, Score, Value, Vector,
};
use mainstay_models::quant::BLOCK_LEN_MAX;

use crate::random::{FLOATS, Random};
use crate::tiny::{linear, one, table};

/// Experts of one layer.
#[derive(Clone, Debug)]
pub(crate) struct Mixture {
    count: usize,
    inner: usize,
    biased: bool,
    routing: Routing,
    f: Gate,
}

impl Mixture {
    pub(crate) fn random(random: &mut Random) -> Self {
        let (groups, size) = (random.pick(&[1, 2, 4]), random.pick(&[1, 2, 3, 5]));
        let kept = 1 + random.below(groups);
        let (order, score) = random.pick(&[
            (RoutingOrder::ScoreFirst, Score::Softmax),
            (RoutingOrder::ScoreFirst, Score::Sigmoid),
            (RoutingOrder::ChooseFirst, Score::Softmax),
            (RoutingOrder::ChooseFirst, Score::Sigmoid),
        ]);
        Self {
            count: groups * size,
            inner: random.pick(&[16, 32, 48]),
            biased: random.coin(),
            routing: Routing {
                score,
                order,
                bias: random.coin().then(|| Vector::one("choice", groups * size)),
                groups: (groups > 1).then_some(ExpertGroups { count: groups, kept }),
                top_k: 1 + random.below(kept * size),
                renormalise: random.coin(),
                scale: random.pick(&[1.0, 2.5]),
            },
            f: random.pick(&[
                Gate::By(Activation::Silu),
                Gate::By(Activation::GeluTanh),
                Gate::Clamped { alpha: 1.702, limit: 0.8 },
            ]),
        }
    }

    /// One whose matrices can be of blocks.
    pub(crate) fn of_blocks(random: &mut Random, f: Gate) -> Self {
        Self { inner: BLOCK_LEN_MAX, f, ..Self::random(random) }
    }

    pub(crate) fn push(&self, b: &mut Block, input: Value, hidden: usize) -> Value {
        let scores = linear(b, input, &format!("router{FLOATS}"), self.count, hidden);
        let bias = |name: String, width| self.biased.then(|| Vector::one(name, width));
        let expert = |id: usize| Expert {
            up: Matrix {
                parts: ["gate", "up"].map(|part| (format!("{id}.{part}"), self.inner)).into(),
                cols: hidden,
            },
            up_bias: bias(format!("{id}.up.bias"), 2 * self.inner),
            down: Matrix::one(format!("{id}.down"), hidden, self.inner),
            down_bias: bias(format!("{id}.down.bias"), hidden),
        };
        let experts = (0..self.count).map(expert).collect();
        b.push(Op::Experts(Experts { input, scores, routing: self.routing.clone(), experts, f: self.f }))
    }
}

/// An attention that keeps latent rows.
#[derive(Clone, Debug)]
pub(crate) struct Latent {
    heads: usize,
    latent: usize,
    plain: usize,
    value: usize,
    /// Rotates the shared part of the keys.
    rope: Rope,
}

impl Latent {
    pub(crate) fn random(random: &mut Random) -> Self {
        let key = random.pick(&[4, 6, 16]);
        Self {
            heads: random.pick(&[1, 3, 4, 17]),
            latent: random.pick(&[16, 32, 48]),
            plain: random.pick(&[5, 8, 16, 24]),
            value: random.pick(&[16, 32]),
            rope: Rope {
                tables: vec![table(random, key / 2), table(random, key / 2)],
                head_dim: key,
                first: 0,
                dim: key,
                layout: random.pick(&[RopeLayout::Half, RopeLayout::Interleaved]),
                scale: random.pick(&[1.0, 1.2]),
            },
        }
    }

    /// One whose matrices can be of blocks.
    pub(crate) fn of_blocks(random: &mut Random) -> Self {
        let value = 32;
        Self { heads: BLOCK_LEN_MAX / value, latent: BLOCK_LEN_MAX, value, ..Self::random(random) }
    }

    pub(crate) fn push(&self, b: &mut Block, input: Value, hidden: usize) -> Value {
        let &Latent { heads, latent, plain: plain_dim, value: value_dim, .. } = self;
        let key_dim = self.rope.head_dim;
        let width = plain_dim + key_dim;
        let q = linear(b, input, "q", heads * width, hidden);
        let both = linear(b, input, "latent", latent + key_dim, hidden);
        let rows = b.push(Op::Slice { input: both, start: 0, width: latent });
        let rows = b.push(Op::RmsNorm { input: rows, weight: Vector::one("latent.norm", latent), eps: 1e-5 });
        let key = b.push(Op::Slice { input: both, start: latent, width: key_dim });
        let of_query = Rope { head_dim: width, first: plain_dim, ..self.rope.clone() };
        let q = b.push(Op::Rope { input: q, rope: of_query });
        let key = b.push(Op::Rope { input: key, rope: self.rope.clone() });
        let expand = Matrix::one("expand", heads * (plain_dim + value_dim), latent);
        let scale = (width as f32).sqrt().recip();
        let attend =
            AttendLatent { q, latent: rows, key, expand, heads, plain_dim, key_dim, value_dim, scale };
        let rows = b.push(Op::AttendLatent(attend));
        linear(b, rows, "o", hidden, heads * value_dim)
    }
}

/// Both, each by itself in many shapes.
pub(crate) fn single_ops(random: &mut Random) -> Vec<(String, Graph)> {
    let mut graphs = Vec::new();
    for _ in 0..24 {
        let hidden = random.pick(&[33, 64]);
        let mixture = Mixture::random(random);
        graphs.push((format!("{mixture:?}"), one(hidden, |b, x| _ = mixture.push(b, x, hidden))));
        let latent = Latent::random(random);
        graphs.push((format!("{latent:?}"), one(hidden, |b, x| _ = latent.push(b, x, hidden))));
    }
    graphs.push((
        "GatedActivate Clamped".into(),
        one(48, |b, x| {
            let input = linear(b, x, "w", 2 * 48, 48);
            b.push(Op::GatedActivate { input, f: Gate::Clamped { alpha: 1.3, limit: 0.7 } });
        }),
    ));
    graphs
}
