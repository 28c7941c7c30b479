//! Configurations and the graphs that they become.

use std::path::Path;

use mainstay_models::config::Config;
use mainstay_models::families;
use mainstay_models::graph::{Activation, Attend, Gate, Graph, Mask, Op, Rope};
use serde_json::{Value, json};

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
    let found = graph.blocks[0].ops.iter().find_map(|op| match op {
        Op::Rope { rope, .. } => Some(rope),
        _ => None,
    });
    found.unwrap()
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
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
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
        (
            json!({"model_type": "gpt9"}),
            "unknown model_type `gpt9` (known: bert, llama, mistral, qwen2, qwen3)",
        ),
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
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4}}), "rope_scaling.rope_type: expected"),
        (json!({"rope_scaling": {"type": "longrope"}}), "found \"longrope\""),
        (json!({"rope_parameters": {"rope_type": "dynamic"}}), "rope_parameters.rope_type: expected"),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor: expected"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "rope_scaling.factor: expected"),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                "high_freq_factor": 4, "original_max_position_embeddings": 64}}),
            "rope_scaling.high_freq_factor: expected more than low_freq_factor",
        ),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor: expected 1"),
        (json!({"quantization_config": {"quant_method": "awq"}}), "quant_method: expected no quantization"),
    ] {
        let error = changed("llama", &patch).expect_err(&patch.to_string());
        assert!(error.contains(expected), "{patch}: {error}");
    }
    let zero = changed("mistral", &json!({"sliding_window": 0})).unwrap_err();
    assert!(zero.contains("sliding_window: expected"), "{zero}");
}
