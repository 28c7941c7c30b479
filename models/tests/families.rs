//! Configurations and the graphs that they become.

use std::path::Path;

use mainstay_models::config::Config;
use mainstay_models::families;
use mainstay_models::graph::{Activation, Attend, Block, Gate, Graph, KvRows, Layer, Mask, Op, Rope};
use serde_json::{Value, json};

const FAMILIES: [&str; 13] = include!("../../tests/fixtures/families.rs");

fn fixture(family: &str, name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(family).join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn graph(config: &Value) -> Result<Graph, String> {
    let config = Config::from_bytes(Path::new("config.json"), config.to_string().as_bytes()).unwrap();
    families::graph(&config).map_err(|e| e.to_string())
}

/// The fixture's configuration with keys replaced.
fn changed(family: &str, patch: &Value) -> Result<Graph, String> {
    let mut config = fixture(family, "config.json");
    config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    graph(&config)
}

fn windows(graph: &Graph) -> Vec<Option<usize>> {
    let of_layer = |layer: usize| {
        graph.blocks[graph.layers[layer].block].ops.iter().find_map(|op| match op {
            Op::Attend(Attend { mask: Mask::Causal { window }, .. }) => Some(*window),
            _ => None,
        })
    };
    let windows: Vec<_> = (0..graph.layers.len()).map(|i| of_layer(i).unwrap()).collect();
    assert!(graph.kv.iter().map(|kv| kv.window).eq(windows.iter().copied()));
    windows
}

fn rope(graph: &Graph) -> &Rope {
    rope_of(graph, 0).unwrap()
}

fn rope_of(graph: &Graph, block: usize) -> Option<&Rope> {
    graph.blocks[block].ops.iter().find_map(|op| match op {
        Op::Rope { rope, .. } => Some(rope),
        _ => None,
    })
}

fn biases(graph: &Graph) -> Vec<bool> {
    let of_op = |op: &Op| match op {
        Op::Linear { bias, .. } => Some(bias.is_some()),
        _ => None,
    };
    graph.blocks[0].ops.iter().filter_map(of_op).collect()
}

#[test]
fn both_layouts_of_a_configuration_give_one_graph() {
    for family in FAMILIES {
        let (hub, new) = (fixture(family, "config.json"), fixture(family, "config.v5.json"));
        assert_ne!(hub, new);
        assert_eq!(format!("{:?}", graph(&hub).unwrap()), format!("{:?}", graph(&new).unwrap()));
    }
}

#[test]
fn a_layer_is_sixteen_ops_with_stacked_products() {
    let graph = changed("llama", &json!({})).unwrap();
    let names: Vec<_> = graph.blocks[0].ops.iter().map(Op::name).collect();
    let expected = "Input RmsNorm Linear Slice Slice Slice Rope Rope Attend Linear Add RmsNorm Linear GatedActivate \
                    Linear Add";
    assert_eq!(names.join(" "), expected);
    assert_eq!(graph.blocks.len(), 1);
    assert_eq!(graph.layers[1].prefix, "model.layers.1.");
    let Op::Linear { weight, .. } = &graph.blocks[0].ops[2] else { panic!() };
    assert_eq!((weight.rows(), weight.cols, weight.parts.len()), (64 + 32 + 32, 64, 3));
    let names: Vec<_> = graph.epilogue.ops.iter().map(Op::name).collect();
    assert_eq!(names, ["Input", "SelectRows", "RmsNorm", "Linear"]);
    let pooled: Vec<_> = graph.pooled.unwrap().block.ops.iter().map(Op::name).collect();
    assert_eq!(pooled, ["Input", "Pool", "RmsNorm", "Normalize"]);
    let normed = changed("qwen3", &json!({})).unwrap();
    let names: Vec<_> = normed.blocks[0].ops.iter().map(Op::name).collect();
    assert_eq!(names[5..10], ["Slice", "RmsNorm", "RmsNorm", "Rope", "Rope"]);
    let Op::RmsNorm { weight, .. } = &normed.blocks[0].ops[6] else { panic!() };
    assert_eq!(weight.width(), 32);
}

#[test]
fn biases_stand_where_the_family_has_them() {
    assert_eq!(biases(&changed("llama", &json!({})).unwrap()), [false; 4]);
    let attention = changed("llama", &json!({"attention_bias": true})).unwrap();
    assert_eq!(biases(&attention), [true, true, false, false]);
    assert_eq!(biases(&changed("llama", &json!({"mlp_bias": true})).unwrap()), [false, false, true, true]);
    assert_eq!(biases(&changed("qwen2", &json!({})).unwrap()), [true, false, false, false]);
    assert_eq!(biases(&changed("qwen3", &json!({})).unwrap()), [false; 4]);
    assert_eq!(
        biases(&changed("qwen3", &json!({"attention_bias": true})).unwrap()),
        [true, true, false, false]
    );
}

#[test]
fn tied_embeddings_are_one_tensor() {
    let output = |tied: Value| {
        let graph = changed("llama", &json!({"tie_word_embeddings": tied})).unwrap();
        let Op::Linear { weight, .. } = graph.epilogue.ops.last().unwrap() else { panic!() };
        weight.parts[0].0.clone()
    };
    assert_eq!(output(json!(true)), "model.embed_tokens.weight");
    assert_eq!(output(json!(false)), "lm_head.weight");
    assert_eq!(output(json!(null)), "lm_head.weight");
}

#[test]
fn windows_follow_the_configuration() {
    let of = |family: &str, patch: Value| windows(&changed(family, &patch).unwrap());
    assert_eq!(of("mistral", json!({})), [Some(12); 2]);
    assert_eq!(of("mistral", json!({"sliding_window": null})), [None; 2]);
    let mut absent = fixture("mistral", "config.json");
    absent.as_object_mut().unwrap().remove("sliding_window");
    assert_eq!(windows(&graph(&absent).unwrap()), [Some(4096); 2]);
    assert_eq!(of("llama", json!({"sliding_window": 12})), [None; 2]);
    assert_eq!(of("qwen2", json!({"sliding_window": 8, "max_window_layers": 0})), [None; 2]);
    let upper = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1});
    assert_eq!(of("qwen2", upper.clone()), [None, Some(8)]);
    assert_eq!(of("qwen3", upper.clone()), [None, Some(8)]);
    let two = changed("qwen2", &upper).unwrap();
    assert_eq!(two.blocks.len(), 2);
    let types = json!({"use_sliding_window": true, "sliding_window": 8, "layer_types":
        ["sliding_attention", "full_attention"]});
    assert_eq!(of("qwen2", types), [Some(8), None]);
    let unused = changed("qwen2", &json!({"layer_types": ["sliding_attention", "full_attention"]}));
    assert!(unused.unwrap_err().contains("no sliding_attention without sliding_window in use"));
    let short = changed("qwen2", &json!({"layer_types": ["full_attention"]}));
    assert!(short.unwrap_err().contains("layer_types: expected a list of 2"));
}

fn names(block: &Block) -> String {
    block.ops.iter().map(Op::name).collect::<Vec<_>>().join(" ")
}

/// The weights of the norms of a block, in order, and what is added to them.
fn norms<'a>(block: &'a Block) -> Vec<(&'a str, usize, f32)> {
    let of_op = |op: &'a Op| match op {
        Op::RmsNorm { weight, .. } => Some((&*weight.parts[0].0, weight.width(), weight.offset)),
        _ => None,
    };
    block.ops.iter().filter_map(of_op).collect()
}

#[test]
fn norms_stand_where_the_family_has_them() {
    let gemma = changed("gemma3_text", &json!({})).unwrap();
    let expected = "Input RmsNorm Linear Slice Slice Slice RmsNorm RmsNorm Rope Rope Attend Linear RmsNorm Add \
                    RmsNorm Linear GatedActivate Linear RmsNorm Add";
    assert_eq!(names(&gemma.blocks[0]), expected);
    let expected = [
        ("input_layernorm.weight", 64, 1.0),
        ("self_attn.q_norm.weight", 16, 1.0),
        ("self_attn.k_norm.weight", 16, 1.0),
        ("post_attention_layernorm.weight", 64, 1.0),
        ("pre_feedforward_layernorm.weight", 64, 1.0),
        ("post_feedforward_layernorm.weight", 64, 1.0),
    ];
    assert_eq!(norms(&gemma.blocks[0]), expected);
    assert_eq!(norms(&gemma.epilogue), [("model.norm.weight", 64, 1.0)]);
    let plain = changed("gemma2", &json!({"norm_offset": 0.0})).unwrap();
    assert!(plain.blocks.iter().flat_map(norms).all(|(_, _, offset)| offset == 0.0));
    let olmo = changed("olmo2", &json!({"num_key_value_heads": 2})).unwrap();
    let expected = "Input Linear Slice Slice Slice RmsNorm RmsNorm Rope Rope Attend Linear RmsNorm Add Linear \
                    GatedActivate Linear RmsNorm Add";
    assert_eq!(names(&olmo.blocks[0]), expected);
    let expected = [
        ("self_attn.q_norm.weight", 64, 0.0),
        ("self_attn.k_norm.weight", 32, 0.0),
        ("post_attention_layernorm.weight", 64, 0.0),
        ("post_feedforward_layernorm.weight", 64, 0.0),
    ];
    assert_eq!(norms(&olmo.blocks[0]), expected);
}

#[test]
fn gemmas_numbers_follow_the_configuration() {
    let attention = |graph: &Graph| {
        let found = graph.blocks[0].ops.iter().find_map(|op| match op {
            Op::Attend(attend) => Some((attend.scale, attend.softcap)),
            _ => None,
        });
        found.unwrap()
    };
    let two = changed("gemma2", &json!({})).unwrap();
    assert_eq!(attention(&two), (24f64.powf(-0.5) as f32, Some(5.0)));
    assert!(matches!(two.epilogue.ops[4], Op::Softcap { cap: 12.0, .. }));
    let none = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null});
    let plain = changed("gemma2", &none).unwrap();
    assert_eq!((attention(&plain).1, plain.epilogue.ops.len()), (None, 4));
    let mut silent = fixture("gemma2", "config.json");
    let keys = silent.as_object_mut().unwrap();
    keys.retain(|key, _| !key.contains("softcapping") && key != "tie_word_embeddings");
    let silent = graph(&silent).unwrap();
    assert_eq!(attention(&silent).1, Some(50.0));
    assert!(
        matches!(&silent.epilogue.ops[3], Op::Linear { weight, .. } if weight.parts[0].0.contains("embed"))
    );
    let scale = |patch: Value| match changed("gemma2", &patch).unwrap().prologue.ops[1] {
        Op::Scale { factor, .. } => factor,
        ref other => panic!("{other:?}"),
    };
    // The root of 1152 is 33.941..., which bf16 holds as 34 and f16 as 33.9375.
    assert_eq!(scale(json!({"hidden_size": 1152, "torch_dtype": "bfloat16"})), 34.0);
    assert_eq!(scale(json!({"hidden_size": 1152, "dtype": "float16"})), 33.9375);
    assert_eq!(scale(json!({"hidden_size": 1152})), 1152f32.sqrt());
    let both_ways = changed("gemma3_text", &json!({"use_bidirectional_attention": true})).unwrap_err();
    assert!(both_ways.contains("use_bidirectional_attention: expected false"), "{both_ways}");
}

#[test]
fn gemma_3_turns_layers_with_a_window_by_a_base_of_their_own() {
    let graph =
        changed("gemma3_text", &json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}})).unwrap();
    assert_eq!(windows(&graph), [Some(8), Some(8), None, Some(8)]);
    assert_eq!(graph.blocks.len(), 2);
    let table = |block: usize| rope_of(&graph, block).unwrap().tables[0][1];
    let of = |base: f32| base.powf(-0.125);
    assert!((table(0) - of(1e4)).abs() < 1e-6 && (table(1) - of(1e6) / 8.0).abs() < 1e-6);
    // The text model inside one that sees, with what Hugging Face leaves out there.
    let text =
        json!({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "sliding_window": 8});
    let whole = json!({"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": text});
    let graph = self::graph(&whole).unwrap();
    assert_eq!((graph.family, graph.vocab, graph.context), ("gemma3", 262_208, 131_072));
    assert_eq!(graph.kv[0].rows, KvRows::Heads { heads: 4, head_dim: 256 });
    assert_eq!(windows(&graph)[4..], [Some(8), None, Some(8)]);
    let none = self::graph(&json!({"model_type": "gemma3"})).unwrap_err();
    assert!(none.contains("text_config: expected an object, found nothing"), "{none}");
}

#[test]
fn smollm_3_leaves_positions_out_of_some_layers() {
    let rotated = |patch: Value| {
        let graph = changed("smollm3", &patch).unwrap();
        let of_layer = |layer: &Layer| rope_of(&graph, layer.block).is_some();
        graph.layers.iter().map(of_layer).collect::<Vec<_>>()
    };
    assert_eq!(rotated(json!({})), [true, true, true, false]);
    assert_eq!(rotated(json!({"no_rope_layers": [0, 1, 0, 1]})), [false, true, false, true]);
    assert_eq!(
        rotated(json!({"no_rope_layers": null, "no_rope_layer_interval": 2})),
        [true, false, true, false]
    );
    let wrong = changed("smollm3", &json!({"no_rope_layers": [1, 1, 2, 0]})).unwrap_err();
    assert!(wrong.contains("no_rope_layers: expected 4 numbers, each 0 or 1"), "{wrong}");
    let window = json!({"use_sliding_window": true, "sliding_window": 8});
    assert_eq!(windows(&changed("smollm3", &window).unwrap()), [None, None, None, Some(8)]);
}

#[test]
fn phi_3_has_a_table_for_short_and_one_for_long_sequences() {
    let long = changed("phi3_longrope", &json!({})).unwrap();
    let rope = rope(&long);
    assert_eq!((rope.tables.len(), rope.dim, rope.head_dim), (2, 16, 16));
    assert!((rope.scale - (1.0 + 8f32.ln() / 64f32.ln()).sqrt()).abs() < 1e-6);
    let (short, stretched) = (rope.tables[0][7], rope.tables[1][7]);
    assert!((short * 1.35 / (stretched * 5.9) - 1.0).abs() < 1e-6);
    assert_eq!([0, 64, 65, 512].map(|len| long.rope_switch.table(len)), [0, 0, 1, 1]);
    assert_eq!(changed("phi3", &json!({})).unwrap().rope_switch.table(usize::MAX), 0);
    let factors = json!([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let scaling = json!({"type": "su", "short_factor": factors, "long_factor": factors});
    let part = json!({"partial_rotary_factor": 0.75, "rope_scaling": scaling});
    let part = changed("phi3_longrope", &part).unwrap();
    assert_eq!((self::rope(&part).dim, self::rope(&part).tables[0].len()), (12, 6));
    let names: Vec<&str> = long.blocks[0]
        .ops
        .iter()
        .filter_map(|op| match op {
            Op::Linear { weight, .. } => Some(&*weight.parts[0].0),
            _ => None,
        })
        .collect();
    let expected = [
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    ];
    assert_eq!(names, expected);
}

/// Against the same formulas in NumPy, float32 throughout.
#[test]
fn rope_frequencies_are_those_of_float32() {
    let close = |found: &Rope, expected: &[f32]| {
        assert_eq!((found.tables.len(), found.dim, found.scale), (1, 2 * expected.len(), 1.0));
        for (a, b) in found.tables[0].iter().zip(expected) {
            assert!((a - b).abs() <= 2e-7 * b, "{a} {b}");
        }
    };
    let default =
        [1.0, 0.19392276, 0.03760603, 0.007292665, 0.0014142134, 2.742482e-4, 5.3182965e-5, 1.0313385e-5];
    let llama3 =
        [1.0, 0.07940301, 0.004700754, 9.1158313e-4, 1.7677668e-4, 3.4281024e-5, 6.6478706e-6, 1.2891732e-6];
    close(rope(&changed("llama", &json!({})).unwrap()), &llama3);
    close(rope(&changed("llama", &json!({"rope_scaling": null})).unwrap()), &default);
    let linear = changed("llama", &json!({"rope_scaling": {"type": "linear", "factor": 4.0}})).unwrap();
    close(rope(&linear), &default.map(|f| f / 4.0));
    let both = json!({"rope_theta": 1.5, "rope_scaling": null,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}});
    close(rope(&changed("llama", &both).unwrap()), &default);
}

#[test]
fn activations_are_mapped() {
    for (name, expected) in [
        ("silu", Activation::Silu),
        ("gelu", Activation::GeluErf),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("relu", Activation::Relu),
    ] {
        let graph = changed("llama", &json!({"hidden_act": name})).unwrap();
        assert!(
            graph.blocks[0]
                .ops
                .iter()
                .any(|op| matches!(op, Op::GatedActivate { f, .. } if *f == Gate::By(expected)))
        );
    }
}

#[test]
fn absurd_and_unsupported_configurations_are_refused() {
    for (patch, expected) in [
        (json!({"model_type": "gpt9"}), "unknown model_type `gpt9` (known: bert, "),
        (json!({"model_type": null}), "unknown model_type ``"),
        (json!({"model_type": 3}), "model_type: expected a text, found 3"),
        (json!({"hidden_size": 0}), "hidden_size: expected a whole number from 1 to 131072, found 0"),
        (json!({"hidden_size": -64}), "hidden_size: expected a whole number from 1 to 131072, found -64"),
        (json!({"hidden_size": 64.5}), "found 64.5"),
        (json!({"hidden_size": 1_u64 << 40}), "hidden_size: expected"),
        (json!({"hidden_size": "64"}), "found \"64\""),
        (
            json!({"hidden_size": null}),
            "hidden_size: expected a whole number from 1 to 131072, found nothing",
        ),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers: expected"),
        (json!({"num_hidden_layers": 4_000_000_000_u32}), "num_hidden_layers: expected"),
        (json!({"num_attention_heads": 0}), "num_attention_heads: expected"),
        (
            json!({"num_key_value_heads": 3}),
            "num_key_value_heads: expected a divisor of 4 attention heads, found 3",
        ),
        (json!({"num_key_value_heads": 0}), "num_key_value_heads: expected"),
        (json!({"head_dim": 0}), "head_dim: expected"),
        (json!({"head_dim": 15}), "head_dim: expected even heads"),
        (
            json!({"head_dim": null, "hidden_size": 66}),
            "hidden_size: expected a multiple of 4 attention heads",
        ),
        (json!({"vocab_size": 0}), "vocab_size: expected"),
        (json!({"vocab_size": u64::MAX}), "vocab_size: expected"),
        (json!({"intermediate_size": 0}), "intermediate_size: expected"),
        (json!({"max_position_embeddings": 0}), "max_position_embeddings: expected"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps: expected a number from 0 to 1, found -1.0"),
        (json!({"rope_theta": 0}), "rope_theta: expected"),
        (json!({"rope_theta": "10000"}), "rope_theta: expected"),
        (
            json!({"hidden_act": "mish"}),
            "hidden_act: expected silu, gelu, gelu_pytorch_tanh, relu or tanh, found",
        ),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings: expected true or false, found 1"),
        (json!({"rope_scaling": 8}), "rope_scaling: expected an object, found 8"),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4}}),
            "rope_scaling.original_max_position_embeddings: expected",
        ),
        (
            json!({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}),
            "rope_scaling.short_factor: expected 8 numbers above 0",
        ),
        (
            json!({"rope_scaling": {"type": "longrope"}}),
            "rope_scaling.original_max_position_embeddings: expected",
        ),
        (json!({"rope_parameters": {"rope_type": "dynamic"}}), "rope_parameters.rope_type: expected"),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor: expected"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "rope_scaling.factor: expected"),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                "high_freq_factor": 4, "original_max_position_embeddings": 64}}),
            "rope_scaling.high_freq_factor: expected more than low_freq_factor",
        ),
        (json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor: expected a number from 0 to 1"),
        (
            json!({"partial_rotary_factor": 0.2}),
            "partial_rotary_factor: expected an even number of the head's 16 elements, not 3",
        ),
    ] {
        let error = changed("llama", &patch).expect_err(&patch.to_string());
        assert!(error.contains(expected), "{patch}: {error}");
    }
    let zero = changed("mistral", &json!({"sliding_window": 0})).unwrap_err();
    assert!(zero.contains("sliding_window: expected"), "{zero}");
}
