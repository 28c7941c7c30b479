//! The meaning of every op, spelled out for one whole sequence in f64: what the reference backend is held to.

use mainstay_models::Weights;
use mainstay_models::graph::{
    Activation, Attend, AttendLatent, Block, ExpertGroups, Experts, Gate, Graph, Ids, Mask, Matrix, Op,
    PoolKind, Rope, RopeLayout, Routing, RoutingOrder, Score, Vector,
};

type Row = Vec<f64>;

/// The logits of every row.
pub(crate) fn logits(graph: &Graph, weights: &Weights, tokens: &[u32]) -> Vec<Vec<f32>> {
    let rope_table = graph.rope_switch.table(tokens.len());
    let sequence = Sequence { weights, tokens, rope_table, second: None };
    let rows = sequence.block(&graph.epilogue, "", sequence.hidden(graph));
    rows.iter().map(|r| r.iter().map(|&v| v as f32).collect()).collect()
}

/// The one row that a sequence becomes; its second text begins at `second`.
pub(crate) fn pooled(graph: &Graph, weights: &Weights, tokens: &[u32], second: Option<usize>) -> Vec<f32> {
    let sequence = Sequence { weights, tokens, rope_table: 0, second };
    let block = &graph.pooled.as_ref().expect("the graph pools").block;
    let rows = sequence.block(block, "", sequence.hidden(graph));
    rows[0].iter().map(|&v| v as f32).collect()
}

struct Sequence<'a> {
    weights: &'a Weights,
    tokens: &'a [u32],
    rope_table: usize,
    second: Option<usize>,
}

impl Sequence<'_> {
    /// The rows behind the last layer.
    fn hidden(&self, graph: &Graph) -> Vec<Row> {
        let mut rows = self.block(&graph.prologue, "", vec![Row::new(); self.tokens.len()]);
        for layer in &graph.layers {
            rows = self.block(&graph.blocks[layer.block], &layer.prefix, rows);
        }
        rows
    }

    fn block(&self, block: &Block, prefix: &str, input: Vec<Row>) -> Vec<Row> {
        let mut values: Vec<Vec<Row>> = Vec::new();
        for op in &block.ops {
            let value = self.op(op, prefix, &values, &input);
            values.push(value);
        }
        values.pop().expect("a block has an op")
    }

    fn op(&self, op: &Op, prefix: &str, values: &[Vec<Row>], entering: &[Row]) -> Vec<Row> {
        let each = |v: usize, f: &dyn Fn(&[f64]) -> Row| values[v].iter().map(|r| f(r)).collect();
        match op {
            Op::Input => entering.to_vec(),
            Op::Embed { ids, weight } => {
                let table = self.matrix(weight, prefix);
                let id = |(position, &token): (usize, &u32)| match ids {
                    Ids::Token => token as usize,
                    Ids::Position => position,
                    Ids::Segment => usize::from(self.second.is_some_and(|second| position >= second)),
                };
                self.tokens.iter().enumerate().map(|at| table[id(at)].clone()).collect()
            }
            Op::Linear { input, weight, bias } => {
                let matrix = self.matrix(weight, prefix);
                let bias = bias.as_ref().map_or(vec![0.0; matrix.len()], |b| self.vector(b, prefix));
                each(*input, &|row| matrix.iter().zip(&bias).map(|(w, b)| dot(w, row) + b).collect())
            }
            Op::RmsNorm { input, weight, eps } => {
                let weight = self.vector(weight, prefix);
                let norm = |group: &[f64]| -> Row {
                    let root = (dot(group, group) / group.len() as f64 + f64::from(*eps)).sqrt();
                    group.iter().zip(&weight).map(|(x, w)| x / root * w).collect()
                };
                each(*input, &|row| row.chunks(weight.len()).flat_map(norm).collect())
            }
            Op::LayerNorm { input, weight, bias, eps } => {
                let (weight, bias) = (self.vector(weight, prefix), self.vector(bias, prefix));
                let norm = |row: &[f64]| -> Row {
                    let mean = row.iter().sum::<f64>() / row.len() as f64;
                    let apart: Row = row.iter().map(|x| x - mean).collect();
                    let root = (dot(&apart, &apart) / row.len() as f64 + f64::from(*eps)).sqrt();
                    apart.iter().zip(&weight).zip(&bias).map(|((x, w), b)| x / root * w + b).collect()
                };
                each(*input, &norm)
            }
            Op::Normalize { input } => {
                each(*input, &|row| row.iter().map(|x| x / dot(row, row).sqrt().max(1e-12)).collect())
            }
            Op::Pool { input, kind } => {
                let rows = &values[*input];
                let mean = |i: usize| rows.iter().map(|row| row[i]).sum::<f64>() / rows.len() as f64;
                vec![match kind {
                    PoolKind::Mean => (0..rows[0].len()).map(mean).collect(),
                    PoolKind::First => rows[0].clone(),
                    PoolKind::Last => rows[rows.len() - 1].clone(),
                }]
            }
            Op::Add { a, b } => {
                let add = |(a, b): (&Row, &Row)| a.iter().zip(b).map(|(a, b)| a + b).collect();
                values[*a].iter().zip(&values[*b]).map(add).collect()
            }
            Op::Scale { input, factor } => {
                each(*input, &|row| row.iter().map(|x| x * f64::from(*factor)).collect())
            }
            Op::Softcap { input, cap } => {
                each(*input, &|row| row.iter().map(|&x| softcap(x, *cap)).collect())
            }
            Op::Slice { input, start, width } => each(*input, &|row| row[*start..start + width].to_vec()),
            Op::Activate { input, f } => each(*input, &|row| row.iter().map(|&x| activate(x, *f)).collect()),
            Op::GatedActivate { input, f } => each(*input, &|row| {
                let (gate, up) = row.split_at(row.len() / 2);
                gate.iter().zip(up).map(|(&g, &u)| gated(g, u, *f)).collect()
            }),
            Op::Rope { input, rope } => {
                let rows = values[*input].iter().enumerate();
                rows.map(|(position, row)| self.rotate(row, rope, position)).collect()
            }
            Op::Attend(a) => {
                let sinks = a.sinks.as_ref().map(|sinks| self.vector(sinks, prefix));
                attend(a, sinks.as_deref(), values)
            }
            Op::AttendLatent(a) => attend_latent(a, &self.matrix(&a.expand, prefix), values),
            Op::Experts(e) => self.experts(e, prefix, values),
            Op::SelectRows { input } => values[*input].clone(),
        }
    }

    fn experts(&self, e: &Experts, prefix: &str, values: &[Vec<Row>]) -> Vec<Row> {
        let bias = e.routing.bias.as_ref().map_or(vec![0.0; e.experts.len()], |b| self.vector(b, prefix));
        let linear = |x: &[f64], weight: &Matrix, bias: &Option<Vector>| -> Row {
            let matrix = self.matrix(weight, prefix);
            let bias = bias.as_ref().map_or(vec![0.0; matrix.len()], |b| self.vector(b, prefix));
            matrix.iter().zip(&bias).map(|(w, b)| dot(w, x) + b).collect()
        };
        let one = |(x, scores): (&Row, &Row)| {
            let mut sum = vec![0.0; e.experts[0].down.rows()];
            for (id, weight) in route(&e.routing, scores, &bias) {
                let expert = &e.experts[id];
                let both = linear(x, &expert.up, &expert.up_bias);
                let (gate, up) = both.split_at(expert.inner());
                let inner: Row = gate.iter().zip(up).map(|(&g, &u)| gated(g, u, e.f)).collect();
                let result = linear(&inner, &expert.down, &expert.down_bias);
                sum.iter_mut().zip(result).for_each(|(s, r)| *s += weight * r);
            }
            sum
        };
        values[e.input].iter().zip(&values[e.scores]).map(one).collect()
    }

    fn rotate(&self, row: &[f64], rope: &Rope, position: usize) -> Row {
        let (mut out, half) = (row.to_vec(), rope.dim / 2);
        for head in out.chunks_mut(rope.head_dim) {
            for i in 0..half {
                let (a, b) = match rope.layout {
                    RopeLayout::Half => (i, i + half),
                    RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                };
                let (a, b) = (rope.first + a, rope.first + b);
                let angle = position as f64 * f64::from(rope.tables[self.rope_table][i]);
                let (sin, cos) = (angle.sin() * f64::from(rope.scale), angle.cos() * f64::from(rope.scale));
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
        out
    }

    fn matrix(&self, matrix: &Matrix, prefix: &str) -> Vec<Row> {
        let all: Row =
            matrix.parts.iter().flat_map(|(name, _)| self.tensor(&format!("{prefix}{name}"))).collect();
        all.chunks(matrix.cols).map(<[f64]>::to_vec).collect()
    }

    fn vector(&self, vector: &Vector, prefix: &str) -> Row {
        let numbers = vector.read(prefix, self.weights).unwrap_or_else(|e| panic!("{e}"));
        numbers.into_iter().map(f64::from).collect()
    }

    fn tensor(&self, name: &str) -> Row {
        let tensor = self.weights.tensor(name).unwrap_or_else(|e| panic!("{e}"));
        let mut values = vec![0.0; tensor.shape.iter().product()];
        tensor.read_f32(&mut values);
        values.into_iter().map(f64::from).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softcap(x: f64, cap: f32) -> f64 {
    f64::from(cap) * (x / f64::from(cap)).tanh()
}

fn activate(x: f64, f: Activation) -> f64 {
    match f {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::GeluErf => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
    }
}

/// 2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x, by Simpson's rule; 1 beyond 6 in f64.
fn erf(x: f64) -> f64 {
    const STEPS: usize = 400;
    let (end, f) = (x.clamp(-6.0, 6.0), |t: f64| (-t * t).exp());
    let h = end / STEPS as f64;
    let inner: f64 = (1..STEPS).map(|i| f(i as f64 * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    2.0 / std::f64::consts::PI.sqrt() * h / 3.0 * (f(0.0) + inner + f(end))
}

fn gated(gate: f64, up: f64, f: Gate) -> f64 {
    match f {
        Gate::By(f) => activate(gate, f) * up,
        Gate::Clamped { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate / (1.0 + (-alpha * gate).exp()) * (up + 1.0)
        }
    }
}

/// The experts of a row, by ascending id, and their weights.
fn route(routing: &Routing, scores: &[f64], bias: &[f64]) -> Vec<(usize, f64)> {
    let scored = |values: &[f64]| -> Row {
        match routing.score {
            Score::Sigmoid => values.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect(),
            Score::Softmax => {
                let sum: f64 = values.iter().map(|v| v.exp()).sum();
                values.iter().map(|v| v.exp() / sum).collect()
            }
        }
    };
    let values = if routing.order == RoutingOrder::ScoreFirst { scored(scores) } else { scores.to_vec() };
    let merits: Row = values.iter().zip(bias).map(|(v, b)| v + b).collect();
    // How many others are better says whether one is chosen; there are no equals in seeded numbers.
    let better = |of: f64, all: &[f64]| all.iter().filter(|&&other| other > of).count();
    let groups = routing.groups.unwrap_or(ExpertGroups { count: 1, kept: 1 });
    let size = scores.len() / groups.count;
    let of_group = |group: usize| {
        let own = &merits[group * size..][..size];
        own.iter().filter(|&&merit| better(merit, own) < 2).sum::<f64>()
    };
    let sums: Row = (0..groups.count).map(of_group).collect();
    let kept = |id: usize| better(sums[id / size], &sums) < groups.kept;
    let eligible: Row = (0..scores.len()).filter(|&id| kept(id)).map(|id| merits[id]).collect();
    let chosen: Vec<usize> =
        (0..scores.len()).filter(|&id| kept(id) && better(merits[id], &eligible) < routing.top_k).collect();
    let mut weights: Row = chosen.iter().map(|&id| values[id]).collect();
    if routing.order == RoutingOrder::ChooseFirst {
        weights = scored(&weights);
    }
    let sum: f64 = if routing.renormalise { weights.iter().sum() } else { 1.0 };
    chosen.into_iter().zip(weights.into_iter().map(|w| w / sum * f64::from(routing.scale))).collect()
}

/// Makes keys and values of every head, and attends to them.
fn attend_latent(a: &AttendLatent, expand: &[Row], values: &[Vec<Row>]) -> Vec<Row> {
    let (latents, keys, rows) = (&values[a.latent], &values[a.key], a.plain_dim + a.value_dim);
    let width = a.plain_dim + a.key_dim;
    let one = |row: usize, head: usize| -> Row {
        let query = &values[a.q][row][head * width..][..width];
        let made =
            |p: usize| -> Row { expand[head * rows..][..rows].iter().map(|w| dot(w, &latents[p])).collect() };
        let seen: Vec<Row> = (0..=row).map(made).collect();
        let score = |p: usize| {
            let plain = dot(&query[..a.plain_dim], &seen[p][..a.plain_dim]);
            (plain + dot(&query[a.plain_dim..], &keys[p])) * f64::from(a.scale)
        };
        let scores: Row = (0..=row).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let weigh = |i: usize| {
            seen.iter().zip(&scores).map(|(v, s)| v[a.plain_dim + i] * (s - max).exp() / total).sum()
        };
        (0..a.value_dim).map(weigh).collect()
    };
    (0..latents.len()).map(|row| (0..a.heads).flat_map(|h| one(row, h)).collect()).collect()
}

fn attend(a: &Attend, sinks: Option<&[f64]>, values: &[Vec<Row>]) -> Vec<Row> {
    let (q, k, v) = (&values[a.q], &values[a.k], &values[a.v]);
    let head = |row: &[f64], h: usize| row[h * a.head_dim..(h + 1) * a.head_dim].to_vec();
    let one = |row: usize, h: usize| -> Row {
        let (query, kv) = (head(&q[row], h), h / (a.heads / a.kv_heads));
        let seen = match a.mask {
            Mask::Causal { window } => window.map_or(0, |w| (row + 1).saturating_sub(w))..row + 1,
            Mask::Full => 0..q.len(),
        };
        let score = |p: usize| {
            let score = dot(&query, &head(&k[p], kv)) * f64::from(a.scale);
            a.softcap.map_or(score, |cap| softcap(score, cap))
        };
        let scores: Row = seen.clone().map(score).collect();
        let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[h]);
        let max = scores.iter().copied().fold(sink, f64::max);
        let weights: Row = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum::<f64>() + (sink - max).exp();
        let mut out = vec![0.0; a.head_dim];
        for (p, w) in seen.zip(&weights) {
            out.iter_mut().zip(head(&v[p], kv)).for_each(|(o, v)| *o += w / total * v);
        }
        out
    };
    (0..q.len()).map(|row| (0..a.heads).flat_map(|h| one(row, h)).collect()).collect()
}
