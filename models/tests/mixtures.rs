//! Configurations of families with experts, and the graphs that they become.

use std::path::Path;

use mainstay_models::config::Config;
use mainstay_models::families;
use mainstay_models::graph::{
    AttendLatent, ExpertGroups, Experts, Gate, Graph, KvRows, Op, RopeLayout, RoutingOrder, Score,
};
use serde_json::{Value, json};

/// The graph of a fixture's configuration with keys replaced.
fn changed(family: &str, patch: &Value) -> Result<Graph, String> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(family).join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    let config = Config::from_bytes(Path::new("config.json"), config.to_string().as_bytes()).unwrap();
    families::graph(&config).map_err(|e| e.to_string())
}

fn plain(family: &str) -> Graph {
    changed(family, &json!({})).unwrap()
}

/// Of each layer, whether it has experts.
fn sparse(graph: &Graph) -> Vec<bool> {
    graph.layers.iter().map(|layer| experts(graph, layer.block).is_some()).collect()
}

fn experts(graph: &Graph, block: usize) -> Option<&Experts> {
    graph.blocks[block].ops.iter().find_map(|op| if let Op::Experts(e) = op { Some(e) } else { None })
}

fn tables(graph: &Graph) -> Vec<(usize, f32, RopeLayout, Vec<f32>)> {
    let of_op = |op: &Op| match op {
        Op::Rope { rope, .. } => Some((rope.first, rope.scale, rope.layout, rope.tables[0].to_vec())),
        _ => None,
    };
    graph.blocks[0].ops.iter().filter_map(of_op).collect()
}

fn assert_close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() <= 4e-7 * expected, "{found}, expected {expected}");
    }
}

#[test]
fn each_family_routes_its_own_way() {
    let graph = plain("qwen3_moe");
    let e = experts(&graph, 0).unwrap();
    let r = &e.routing;
    assert_eq!((e.experts.len(), e.experts[7].inner(), r.top_k), (8, 32, 2));
    assert_eq!((r.score, r.order, r.renormalise), (Score::Softmax, RoutingOrder::ScoreFirst, true));
    assert_eq!(e.experts[3].up.parts[1].0, "mlp.experts.3.up_proj.weight");
    assert!(e.experts[0].up_bias.is_none() && r.bias.is_none() && r.groups.is_none());

    let graph = plain("gpt_oss");
    let e = experts(&graph, 1).unwrap();
    assert_eq!((e.routing.order, e.routing.renormalise), (RoutingOrder::ChooseFirst, false));
    assert_eq!(e.f, Gate::Clamped { alpha: 1.702, limit: 7.0 });
    assert!(e.experts[5].up_bias.is_some() && e.experts[5].down_bias.is_some());

    let graph = plain("deepseek_v3");
    let e = experts(&graph, 1).unwrap();
    let r = &e.routing;
    assert_eq!((r.score, r.scale, r.top_k), (Score::Sigmoid, 2.5, 3));
    assert_eq!(r.groups, Some(ExpertGroups { count: 4, kept: 2 }));
    assert_eq!(r.bias.as_ref().unwrap().width(), 8);
    let shared = graph.blocks[1].ops.iter().any(|op| {
        matches!(op, Op::Linear { weight, .. } if weight.parts[0].0 == "mlp.shared_experts.down_proj.weight")
    });
    assert!(shared);
}

#[test]
fn some_layers_may_be_dense() {
    assert_eq!(sparse(&plain("qwen3_moe")), [true; 2]);
    let of = |patch: Value| sparse(&changed("qwen3_moe", &patch).unwrap());
    assert_eq!(of(json!({"decoder_sparse_step": 2})), [false, true]);
    assert_eq!(of(json!({"mlp_only_layers": [1]})), [true, false]);
    assert_eq!(sparse(&plain("deepseek_v3")), [false, true, true]);
    let all = changed("deepseek_v3", &json!({"first_k_dense_replace": 0})).unwrap();
    assert_eq!((sparse(&all), all.blocks.len()), (vec![true; 3], 1));
}

#[test]
fn a_deepseek_keeps_latent_rows() {
    let graph = plain("deepseek_v3");
    let attend =
        graph.blocks[0].ops.iter().find_map(|op| if let Op::AttendLatent(a) = op { Some(a) } else { None });
    let AttendLatent { heads, plain_dim, key_dim, value_dim, scale, .. } = *attend.unwrap();
    assert_eq!((heads, plain_dim, key_dim, value_dim), (4, 16, 8, 16));
    // 24^-0.5, and twice what the stretched context asks for.
    assert!((scale - 0.264_642_26).abs() < 1e-7, "{scale}");
    assert!(
        graph.kv.iter().all(|kv| kv.rows == KvRows::Latent { latent: 16, key: 8 } && kv.elements() == 24)
    );
    let whole = changed("deepseek_v3", &json!({"q_lora_rank": null})).unwrap();
    let from_rows =
        |op: &Op| matches!(op, Op::Linear { weight, .. } if weight.parts[0].0.ends_with("q_proj.weight"));
    assert!(whole.blocks[0].ops.iter().any(from_rows));
}

/// Against the same formulas in f64.
#[test]
fn yarn_keeps_fast_pairs_and_stretches_slow_ones() {
    let graph = plain("gpt_oss");
    let [(0, scale, RopeLayout::Half, table), _] = &tables(&graph)[..] else {
        panic!("{:?}", tables(&graph))
    };
    assert_close(&[*scale], &[1.346_573_590_3]);
    let expected = [
        1.0,
        0.025_564_76,
        0.001_587_914_8,
        3.579_445_9e-4,
        8.068_715_3e-5,
        1.818_833_7e-5,
        4.099_978_5e-6,
        9.242_089_5e-7,
    ];
    assert_close(table, &expected);
    // Equal factors of scores and angles cancel out; the shared part of a key stands behind the other one.
    let graph = plain("deepseek_v3");
    let [(16, 1.0, RopeLayout::Interleaved, table), (0, 1.0, RopeLayout::Interleaved, key)] =
        &tables(&graph)[..]
    else {
        panic!("{:?}", tables(&graph))
    };
    assert_eq!(table, key);
    assert_close(table, &[1.0, 0.025, 0.0025, 0.00025]);
    let factor = json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "attention_factor": 1.5}});
    assert_eq!(tables(&changed("deepseek_v3", &factor).unwrap())[0].1, 1.5);
}

#[test]
fn absurd_and_unsupported_mixtures_are_refused() {
    for (family, patch, expected) in [
        ("qwen3_moe", json!({"num_experts": 0}), "num_experts: expected a whole number from 1 to"),
        (
            "qwen3_moe",
            json!({"num_experts_per_tok": 9}),
            "num_experts_per_tok: expected a whole number from 1 to 8",
        ),
        (
            "qwen3_moe",
            json!({"mlp_only_layers": ["a"]}),
            "mlp_only_layers: expected a list of layers' numbers",
        ),
        ("qwen3_moe", json!({"moe_intermediate_size": null}), "moe_intermediate_size: expected"),
        ("gpt_oss", json!({"swiglu_limit": 0}), "swiglu_limit: expected a number from"),
        ("deepseek_v3", json!({"n_group": 3}), "n_group: expected a divisor of 8 experts, found 3"),
        ("deepseek_v3", json!({"topk_group": 5}), "topk_group: expected a whole number from 1 to 4"),
        (
            "deepseek_v3",
            json!({"scoring_func": "softmax"}),
            "scoring_func: expected sigmoid, found \"softmax\"",
        ),
        ("deepseek_v3", json!({"topk_method": "greedy"}), "topk_method: expected noaux_tc"),
        ("deepseek_v3", json!({"kv_lora_rank": 0}), "kv_lora_rank: expected"),
        ("deepseek_v3", json!({"qk_rope_head_dim": 7}), "head_dim: expected even heads"),
        ("deepseek_v3", json!({"moe_layer_freq": 2}), "moe_layer_freq: expected 1"),
    ] {
        let error = changed(family, &patch).expect_err(&patch.to_string());
        assert!(error.contains(expected), "{family} {patch}: {error}");
    }
    // Few experts in few groups: found when the graph is checked, before anything is loaded.
    let few = changed("deepseek_v3", &json!({"topk_group": 1, "num_experts_per_tok": 3})).unwrap();
    let error = few.blocks[1].widths(few.hidden).unwrap_err().to_string();
    assert!(error.contains("expected to choose 1 to 2 experts, found 3"), "{error}");
}
