//! What is fused, and that values that live together lie apart.

use mainstay_backend_api::KvDType;
use mainstay_models::graph::{
    Attend, AttendLatent, Expert, Experts, KvRows, KvSpec, Layer, Pooled, PooledKind, RopeSwitch, Routing,
    RoutingOrder, Score,
};

use super::*;
use crate::plan::Access;

const HIDDEN: usize = 32;

fn limits() -> Limits {
    Limits {
        context: 64,
        tokens_per_step: 10,
        chunks: 2,
        output_rows: 4,
        pages: vec![4],
        kv_dtype: KvDType::F32,
    }
}

fn norm(input: Value, width: usize) -> Op {
    Op::RmsNorm { input, weight: Vector::one("n", width), eps: 1e-6 }
}

fn linear(input: Value, rows: usize, cols: usize) -> Op {
    Op::Linear { input, weight: Matrix::one("w", rows, cols), bias: None }
}

fn graph(block: Block) -> Graph {
    let embed = Op::Embed { ids: Ids::Token, weight: Matrix::one("e", 50, HIDDEN) };
    Graph {
        family: "test",
        prologue: Block { ops: vec![embed] },
        blocks: vec![block],
        layers: vec![Layer { block: 0, prefix: String::new() }],
        epilogue: Block { ops: vec![Op::Input, Op::SelectRows { input: 0 }, linear(1, 50, HIDDEN)] },
        pooled: None,
        kv: vec![KvSpec::heads(1, 16, None)],
        hidden: HIDDEN,
        vocab: 50,
        context: 64,
        rope_switch: RopeSwitch::default(),
    }
}

fn llama() -> Block {
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let n = b.push(norm(x, HIDDEN));
    let qkv = b.push(linear(n, 64, HIDDEN));
    let table = vec![vec![1.0; 8].into()];
    let rope = Rope { tables: table, head_dim: 16, first: 0, dim: 16, layout: RopeLayout::Half, scale: 1.0 };
    let q = b.push(Op::Slice { input: qkv, start: 0, width: 32 });
    let q = b.push(norm(q, 16));
    let q = b.push(Op::Rope { input: q, rope: rope.clone() });
    let k = b.push(Op::Slice { input: qkv, start: 32, width: 16 });
    let k = b.push(Op::Rope { input: k, rope });
    let v = b.push(Op::Slice { input: qkv, start: 48, width: 16 });
    let (heads, kv_heads, head_dim) = (2, 1, 16);
    let attend = Attend {
        q,
        k,
        v,
        heads,
        kv_heads,
        head_dim,
        scale: 0.25,
        mask: Mask::Causal { window: None },
        softcap: None,
        sinks: None,
    };
    let a = b.push(Op::Attend(attend));
    let o = b.push(linear(a, HIDDEN, 32));
    let r = b.push(Op::Add { a: x, b: o });
    let n = b.push(norm(r, HIDDEN));
    let g = b.push(linear(n, 96, HIDDEN));
    let g = b.push(Op::GatedActivate { input: g, f: Gate::By(Activation::Silu) });
    let d = b.push(linear(g, HIDDEN, 48));
    b.push(Op::Add { a: r, b: d });
    b
}

fn kinds(program: &Program) -> Vec<&'static str> {
    let kind = |call: &Call<Slot>| match call {
        Call::Embed { .. } => "embed",
        Call::Select { .. } => "select",
        Call::Pool { .. } => "pool",
        Call::LayerNorm { .. } => "layer norm",
        Call::Normalize { .. } => "normalize",
        Call::Copy { .. } => "copy",
        Call::Linear { after: After::Store, .. } => "linear",
        Call::Linear { after: After::Accumulate, .. } => "linear+add",
        Call::Linear { after: After::Activate(_), .. } => "linear+activate",
        Call::Linear { after: After::Gate(_), .. } => "linear+gate",
        Call::Norm { .. } => "norm",
        Call::NormAdd { .. } => "norm+add",
        Call::Add { .. } => "add",
        Call::Map { .. } => "map",
        Call::Rope { .. } => "rope",
        Call::Gate { .. } => "gate",
        Call::Append { .. } => "append",
        Call::Attend { .. } => "attend",
        Call::Route { .. } => "route",
        Call::ExpertUp { .. } => "expert up",
        Call::ExpertDown { .. } => "expert down",
        Call::ExpertSum { .. } => "expert sum",
        Call::HeadProducts { .. } => "head products",
        Call::AppendLatent { .. } => "append latent",
        Call::AttendLatent { .. } => "attend latent",
    };
    program.calls.iter().map(kind).collect()
}

/// Every call writes beside what it reads, and nothing is overwritten before its last reader: replayed with the
/// name of the last writer in each float.
fn check_places(program: &Program) {
    for call in &program.calls {
        let mut reads = Vec::new();
        let mut writes = Vec::new();
        call.map(|slot, access| match access {
            Access::Read => reads.push(slot),
            Access::Write => writes.push(slot),
        });
        for w in &writes {
            for r in &reads {
                let floats = |s: &Slot| s.offset..s.offset + (s.rows - 1) * s.stride + s.width;
                let (a, b) = (floats(w), floats(r));
                assert!(a.end <= b.start || b.end <= a.start, "{call:?} reads what it writes");
            }
        }
    }
}

#[test]
fn a_llama_layer_is_eight_calls() {
    let plan = Plan::new(&graph(llama()), &limits(), Fusing::All).unwrap();
    let wanted = ["norm", "linear", "append", "attend", "linear+add", "norm", "linear+gate", "linear+add"];
    assert_eq!(kinds(&plan.blocks[0]), wanted);
    assert_eq!(kinds(&plan.prologue), ["embed"]);
    assert_eq!(kinds(&plan.epilogue), ["select", "linear"]);
    let Call::Append { q, k, .. } = plan.blocks[0].calls[2] else { panic!("{:?}", plan.blocks[0].calls) };
    assert!(q.norm.is_some() && q.rope == Some(0) && k.norm.is_none() && k.rope == Some(0));
    assert_eq!(plan.ropes.len(), 1, "equal rotations share their angles");
    [&plan.prologue, &plan.blocks[0], &plan.epilogue].into_iter().for_each(check_places);
    assert_eq!(plan.blocks[0].matrices[2].order, RowOrder::Halves);
}

#[test]
fn a_residual_that_is_read_again_is_not_overwritten() {
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let n = b.push(norm(x, HIDDEN));
    let l = b.push(linear(n, HIDDEN, HIDDEN));
    let sum = b.push(Op::Add { a: x, b: l });
    b.push(Op::Add { a: sum, b: x });
    let plan = Plan::new(&graph(b), &limits(), Fusing::All).unwrap();
    assert_eq!(kinds(&plan.blocks[0]), ["norm", "linear", "add", "add", "copy"]);
    check_places(&plan.blocks[0]);

    // A product that moves behind the sum still reads the residual.
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let n = b.push(norm(x, HIDDEN));
    let first = b.push(linear(n, HIDDEN, HIDDEN));
    let second = b.push(linear(x, HIDDEN, HIDDEN));
    let sum = b.push(Op::Add { a: x, b: first });
    b.push(Op::Add { a: sum, b: second });
    let plan = Plan::new(&graph(b), &limits(), Fusing::All).unwrap();
    assert_eq!(kinds(&plan.blocks[0]), ["norm", "linear", "add", "linear+add", "copy"]);
    check_places(&plan.blocks[0]);
}

#[test]
fn halves_that_cut_a_panel_are_not_fused() {
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let g = b.push(linear(x, 40, HIDDEN));
    let g = b.push(Op::GatedActivate { input: g, f: Gate::By(Activation::GeluTanh) });
    let s = b.push(Op::Scale { input: g, factor: 2.0 });
    let d = b.push(linear(s, HIDDEN, 20));
    let d = b.push(Op::Activate { input: d, f: Activation::Relu });
    b.push(Op::Softcap { input: d, cap: 3.0 });
    let plan = Plan::new(&graph(b), &limits(), Fusing::All).unwrap();
    let wanted = ["linear", "gate", "map", "linear+activate", "map", "copy"];
    assert_eq!(kinds(&plan.blocks[0]), wanted);
    check_places(&plan.blocks[0]);
}

#[test]
fn places_are_reused() {
    let mut b = Block::default();
    let mut x = b.push(Op::Input);
    for _ in 0..20 {
        x = b.push(norm(x, HIDDEN));
    }
    let plan = Plan::new(&graph(b), &limits(), Fusing::All).unwrap();
    // Hidden rows, two norms in turn; products' packed rows; the epilogue is smaller.
    assert!(plan.arena_len <= 10 * HIDDEN * 3 + 10 * HIDDEN, "{}", plan.arena_len);
}

#[test]
fn ops_in_the_wrong_place_are_refused_at_load() {
    let mut wrong = graph(llama());
    wrong.epilogue.ops = llama().ops;
    let error = Plan::new(&wrong, &limits(), Fusing::All).unwrap_err();
    assert!(error.to_string().contains("attend in the epilogue"), "{error}");
    let mut wrong = graph(llama());
    wrong.blocks[0].ops.push(Op::SelectRows { input: 0 });
    assert!(matches!(
        Plan::new(&wrong, &limits(), Fusing::All),
        Err(LoadError::Unsupported { backend: "cpu", .. })
    ));
}

#[test]
fn norms_behind_products_are_added_to_the_residual() {
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let g = b.push(linear(x, 96, HIDDEN));
    let g = b.push(Op::GatedActivate { input: g, f: Gate::By(Activation::GeluTanh) });
    let d = b.push(linear(g, HIDDEN, 48));
    let n = b.push(norm(d, HIDDEN));
    let sum = b.push(Op::Add { a: x, b: n });
    let n = b.push(norm(sum, HIDDEN));
    let d = b.push(linear(n, HIDDEN, HIDDEN));
    let n = b.push(norm(d, HIDDEN));
    b.push(Op::Add { a: n, b: sum });
    let mut graph = graph(b);
    graph.prologue.push(Op::Scale { input: 0, factor: 8.0 });
    graph.epilogue.push(Op::Softcap { input: 2, cap: 30.0 });
    let plan = Plan::new(&graph, &limits(), Fusing::All).unwrap();
    let wanted = ["linear+gate", "linear", "norm+add", "norm", "linear", "norm+add"];
    assert_eq!(kinds(&plan.blocks[0]), wanted);
    assert_eq!(kinds(&plan.prologue), ["embed", "map"]);
    assert_eq!(kinds(&plan.epilogue), ["select", "linear", "map"]);
    [&plan.prologue, &plan.blocks[0], &plan.epilogue].into_iter().for_each(check_places);
    let Call::Embed { out, .. } = plan.prologue.calls[0] else { panic!("{:?}", plan.prologue.calls) };
    let Call::Map { out: scaled, .. } = plan.prologue.calls[1] else { panic!("{:?}", plan.prologue.calls) };
    let Call::Linear { input, .. } = plan.blocks[0].calls[0] else { panic!("{:?}", plan.blocks[0].calls) };
    assert!(out == scaled && scaled == input, "rows are scaled where the layers find them");

    // A norm of the residual itself cannot be added to it.
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let n = b.push(norm(x, HIDDEN));
    b.push(Op::Add { a: x, b: n });
    let plan = Plan::new(&self::graph(b), &limits(), Fusing::All).unwrap();
    assert_eq!(kinds(&plan.blocks[0]), ["norm", "add", "copy"]);
    // Nor does a value that is read again take it, or is mapped in its place.
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let l = b.push(linear(x, HIDDEN, HIDDEN));
    let s = b.push(Op::Scale { input: l, factor: 2.0 });
    let n = b.push(norm(s, HIDDEN));
    let sum = b.push(Op::Add { a: l, b: n });
    b.push(Op::Add { a: sum, b: l });
    let plan = Plan::new(&self::graph(b), &limits(), Fusing::All).unwrap();
    assert_eq!(kinds(&plan.blocks[0]), ["linear", "copy", "map", "norm", "add", "add", "copy"]);
    check_places(&plan.blocks[0]);
}

fn pooled(width: usize, build: impl FnOnce(&mut Block, Value)) -> Option<Pooled> {
    let mut block = Block::default();
    let rows = block.push(Op::Input);
    build(&mut block, rows);
    Some(Pooled { kind: PooledKind::Embedding, block, width })
}

#[test]
fn a_bert_layer_adds_into_its_products_and_normalizes_behind_them() {
    let layer_norm = |input| {
        let [weight, bias] = ["n", "b"].map(|name| Vector::one(name, HIDDEN));
        Op::LayerNorm { input, weight, bias, eps: 1e-12 }
    };
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let qkv = b.push(linear(x, 3 * HIDDEN, HIDDEN));
    let [q, k, v] = [0, 1, 2].map(|i| b.push(Op::Slice { input: qkv, start: i * HIDDEN, width: HIDDEN }));
    let (heads, kv_heads, head_dim) = (2, 2, 16);
    let mask = Mask::Full;
    let a = b.push(Op::Attend(Attend {
        q,
        k,
        v,
        heads,
        kv_heads,
        head_dim,
        scale: 0.25,
        mask,
        softcap: None,
        sinks: None,
    }));
    let o = b.push(linear(a, HIDDEN, HIDDEN));
    let sum = b.push(Op::Add { a: x, b: o });
    let n = b.push(layer_norm(sum));
    let up = b.push(linear(n, 48, HIDDEN));
    let up = b.push(Op::Activate { input: up, f: Activation::GeluErf });
    let down = b.push(linear(up, HIDDEN, 48));
    let sum = b.push(Op::Add { a: n, b: down });
    b.push(layer_norm(sum));
    let graph = Graph {
        kv: Vec::new(),
        epilogue: Block::default(),
        pooled: pooled(HIDDEN, |b, input| {
            let input = b.push(Op::Pool { input, kind: PoolKind::Mean });
            b.push(Op::Normalize { input });
        }),
        ..graph(b)
    };
    let plan = Plan::new(&graph, &Limits { pages: Vec::new(), ..limits() }, Fusing::All).unwrap();
    let wanted = [
        "linear",
        "append",
        "attend",
        "linear+add",
        "layer norm",
        "linear+activate",
        "linear+add",
        "layer norm",
        "copy",
    ];
    assert_eq!(kinds(&plan.blocks[0]), wanted);
    assert_eq!(kinds(&plan.pooled), ["pool", "normalize"]);
    assert!(plan.epilogue.calls.is_empty());
    assert_eq!((plan.whole_heads, plan.pooled_rows.rows, plan.pooled_rows.width), (2, 2, HIDDEN));
    [&plan.blocks[0], &plan.pooled].into_iter().for_each(check_places);
}

/// A layer of `count` experts with `inner` elements between their products, beside a shared MLP.
fn sparse(count: usize, inner: usize) -> Block {
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let n = b.push(norm(x, HIDDEN));
    let scores = b.push(linear(n, count, HIDDEN));
    let expert = Expert {
        up: Matrix::one("up", 2 * inner, HIDDEN),
        up_bias: Some(Vector::one("ub", 2 * inner)),
        down: Matrix::one("down", HIDDEN, inner),
        down_bias: None,
    };
    let routing = Routing {
        score: Score::Sigmoid,
        order: RoutingOrder::ScoreFirst,
        bias: None,
        groups: None,
        top_k: 3,
        renormalise: true,
        scale: 1.0,
    };
    let f = Gate::By(Activation::Silu);
    let e = b.push(Op::Experts(Experts { input: n, scores, routing, experts: vec![expert; count], f }));
    let g = b.push(linear(n, 64, HIDDEN));
    let g = b.push(Op::GatedActivate { input: g, f });
    let d = b.push(linear(g, HIDDEN, 32));
    let both = b.push(Op::Add { a: e, b: d });
    b.push(Op::Add { a: x, b: both });
    b
}

#[test]
fn experts_are_four_calls_and_a_shared_one_is_added_to_their_sum() {
    let plan = Plan::new(&graph(sparse(5, 48)), &limits(), Fusing::All).unwrap();
    let wanted = [
        "norm",
        "linear",
        "route",
        "expert up",
        "expert down",
        "expert sum",
        "linear+gate",
        "linear+add",
        "add",
        "copy",
    ];
    assert_eq!(kinds(&plan.blocks[0]), wanted);
    check_places(&plan.blocks[0]);
    assert_eq!((plan.experts, plan.top_k, plan.products), (5, 3, 5));
    let halves = plan.blocks[0].matrices.iter().filter(|m| m.order == RowOrder::Halves).count();
    assert_eq!(halves, 6, "of every expert and of the shared one");
    // Three experts of each of ten rows, as wide as what lies between their products.
    assert!(plan.packed.width >= 10 * 3 * 48, "{:?}", plan.packed);
    let error = Plan::new(&graph(sparse(5, 40)), &limits(), Fusing::All).unwrap_err().to_string();
    assert!(error.contains("experts with 40 elements between their products"), "{error}");
}

/// A layer of two heads that keeps latent rows.
fn latent(width: usize) -> Block {
    let (heads, plain_dim, key_dim, value_dim) = (2, 8, 4, 16);
    let mut b = Block::default();
    let x = b.push(Op::Input);
    let table = |head_dim, first| {
        let tables = vec![vec![1.0; key_dim / 2].into()];
        Rope { tables, head_dim, first, dim: key_dim, layout: RopeLayout::Interleaved, scale: 1.0 }
    };
    let q = b.push(linear(x, heads * (plain_dim + key_dim), HIDDEN));
    let q = b.push(Op::Rope { input: q, rope: table(plain_dim + key_dim, plain_dim) });
    let both = b.push(linear(x, width + key_dim, HIDDEN));
    let rows = b.push(Op::Slice { input: both, start: 0, width });
    let rows = b.push(norm(rows, width));
    let key = b.push(Op::Slice { input: both, start: width, width: key_dim });
    let key = b.push(Op::Rope { input: key, rope: table(key_dim, 0) });
    let expand = Matrix::one("expand", heads * (plain_dim + value_dim), width);
    let a = b.push(Op::AttendLatent(AttendLatent {
        q,
        latent: rows,
        key,
        expand,
        heads,
        plain_dim,
        key_dim,
        value_dim,
        scale: 0.3,
    }));
    let o = b.push(linear(a, HIDDEN, heads * value_dim));
    b.push(Op::Add { a: x, b: o });
    b
}

#[test]
fn attention_to_latent_rows_makes_no_keys_and_no_values() {
    let of = |width| {
        let rows = KvRows::Latent { latent: width, key: 4 };
        Graph { kv: vec![KvSpec { rows, window: None }], ..graph(latent(width)) }
    };
    let plan = Plan::new(&of(32), &limits(), Fusing::All).unwrap();
    let wanted = [
        "linear",
        "linear",
        "norm",
        "head products",
        "append latent",
        "attend latent",
        "head products",
        "linear+add",
    ];
    assert_eq!(kinds(&plan.blocks[0]), wanted);
    check_places(&plan.blocks[0]);
    assert_eq!((plan.latent, plan.products), ((32, 4), 2));
    let Call::AppendLatent { q, key, .. } = plan.blocks[0].calls[4] else {
        panic!("{:?}", plan.blocks[0].calls)
    };
    assert!(q.rope.is_some() && key.rope.is_some(), "rotations are part of the call");
    let orders: Vec<_> = plan.blocks[0].matrices.iter().map(|m| m.order).collect();
    let columns = |first| RowOrder::Columns { first, count: 8 };
    let some = |first| RowOrder::Some { first, count: 16 };
    assert_eq!(orders[2..6], [columns(0), columns(24), some(8), some(32)], "of head 0, of head 1");
    let error = Plan::new(&of(20), &limits(), Fusing::All).unwrap_err().to_string();
    assert!(error.contains("latent rows of 20"), "{error}");
}

#[test]
fn rows_are_pooled_before_anything_else_is_made_of_them() {
    let refused = |build: fn(&mut Block, Value)| {
        let graph = Graph { pooled: pooled(HIDDEN, build), ..graph(llama()) };
        Plan::new(&graph, &limits(), Fusing::All).unwrap_err().to_string()
    };
    let found = refused(|b, x| {
        let input = b.push(norm(x, HIDDEN));
        b.push(Op::Pool { input, kind: PoolKind::Last });
    });
    assert!(found.contains("does not support rmsnorm in the pooled of a graph"), "{found}");
    let found = refused(|b, x| {
        let last = b.push(Op::Pool { input: x, kind: PoolKind::Last });
        b.push(Op::Add { a: last, b: x });
    });
    assert!(found.contains("does not support add in the pooled of a graph"), "{found}");
}
