//! BERT: configurations, the names of its weights, and the files of sentence-transformers beside them.

use std::path::{Path, PathBuf};

use mainstay_models::config::Config;
use mainstay_models::graph::{Activation, Graph, Op, PoolKind, PooledKind};
use mainstay_models::tokenizer::AddSpecial;
use mainstay_models::{Model, families};
use serde_json::{Value, json};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/bert")
}

fn read(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture().join(name)).unwrap()).unwrap()
}

fn changed(patch: Value) -> Result<Graph, String> {
    let mut config = read("config.json");
    config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    let config = Config::from_bytes(Path::new("config.json"), config.to_string().as_bytes()).unwrap();
    families::graph(&config).map_err(|e| e.to_string())
}

fn pool_kind(graph: &Graph) -> PoolKind {
    let ops = &graph.pooled.as_ref().unwrap().block.ops;
    ops.iter().find_map(|op| if let Op::Pool { kind, .. } = op { Some(*kind) } else { None }).unwrap()
}

/// A copy of the fixture with files replaced, or removed where the text is empty.
struct Checkpoint(PathBuf);

impl Checkpoint {
    fn new(name: &str, files: &[(&str, String)]) -> Self {
        let dir = std::env::temp_dir().join(format!("mainstay-bert-{}-{name}", std::process::id()));
        std::fs::create_dir_all(dir.join("1_Pooling")).unwrap();
        for file in
            ["config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling/config.json"]
        {
            std::fs::copy(fixture().join(file), dir.join(file)).unwrap();
        }
        for (file, text) in files {
            if text.is_empty() {
                std::fs::remove_file(dir.join(file)).unwrap();
            } else {
                std::fs::write(dir.join(file), text).unwrap();
            }
        }
        Self(dir)
    }

    fn open(&self) -> Result<Model, String> {
        Model::open(&self.0).map_err(|e| e.to_string())
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn both_layouts_of_a_configuration_give_one_encoder() {
    let (hub, new) = (changed(json!({})).unwrap(), changed(read("config.v5.json")).unwrap());
    assert_eq!(format!("{hub:?}"), format!("{new:?}"));
    assert!(hub.is_whole() && !hub.generates() && hub.kv.is_empty());
    assert_eq!((hub.context, hub.hidden, hub.vocab, hub.layers.len()), (128, 64, 512, 2));
    assert_eq!(hub.layers[1].prefix, "encoder.layer.1.");
    let pooled = hub.pooled.as_ref().unwrap();
    assert_eq!((pooled.kind, pooled.width, pool_kind(&hub)), (PooledKind::Embedding, 64, PoolKind::Mean));
}

#[test]
fn a_classifier_of_one_label_is_a_cross_encoder() {
    let one = json!({"0": "LABEL_0"});
    let cross = |patch: Value| {
        let mut all = json!({"architectures": ["BertForSequenceClassification"], "id2label": one});
        all.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        changed(all)
    };
    let last = |graph: &Graph| graph.pooled.as_ref().unwrap().block.ops.last().unwrap().clone();
    let graph = cross(json!({})).unwrap();
    let pooled = graph.pooled.as_ref().unwrap();
    assert_eq!((pooled.kind, pooled.width, pool_kind(&graph)), (PooledKind::Score, 1, PoolKind::First));
    assert!(matches!(last(&graph), Op::Activate { f: Activation::Sigmoid, .. }));
    assert_eq!(graph.layers[0].prefix, "bert.encoder.layer.0.");
    for key in ["sbert_ce_default_activation_function", "sentence_transformers"] {
        let name = "torch.nn.modules.linear.Identity";
        let value = if key == "sentence_transformers" { json!({"activation_fn": name}) } else { json!(name) };
        let graph = cross(json!({key: value})).unwrap();
        assert!(matches!(last(&graph), Op::Linear { .. }), "{key}");
    }
    let refused = cross(json!({"sbert_ce_default_activation_function": "torch.nn.ReLU"})).unwrap_err();
    assert!(refused.contains("sbert_ce_default_activation_function: expected"), "{refused}");
    let refused = cross(json!({"id2label": {"0": "no", "1": "yes"}})).unwrap_err();
    assert!(refused.contains("id2label: expected one label"), "{refused}");
    let refused = cross(json!({"type_vocab_size": 1})).unwrap_err();
    assert!(refused.contains("type_vocab_size: expected"), "{refused}");
}

#[test]
fn what_is_not_supported_is_refused_by_key() {
    for (patch, wanted) in [
        (json!({"architectures": ["BertForTokenClassification"]}), "architectures: expected BertModel"),
        (json!({"architectures": "BertModel"}), "architectures: expected a list"),
        (json!({"position_embedding_type": "relative_key"}), "position_embedding_type: expected absolute"),
        (json!({"is_decoder": true}), "is_decoder: expected false"),
        (json!({"num_attention_heads": 5}), "num_attention_heads: expected a divisor of hidden_size 64"),
        (json!({"hidden_size": 0}), "hidden_size: expected a whole number"),
        (json!({"layer_norm_eps": "small"}), "layer_norm_eps: expected a number"),
        (json!({"hidden_act": "mish"}), "hidden_act: expected"),
        (json!({"max_position_embeddings": 0}), "max_position_embeddings: expected"),
    ] {
        let refused = changed(patch).unwrap_err();
        assert!(refused.contains(wanted), "{refused}, not {wanted}");
    }
}

#[test]
fn the_files_of_sentence_transformers_say_how_to_pool_and_how_long_a_text_may_be() {
    let pooling = |key: &str| ("1_Pooling/config.json", json!({key: true}).to_string());
    let opened = |name: &str, files: &[(&str, String)]| {
        let model = Checkpoint::new(name, files).open().unwrap_or_else(|e| panic!("{e}"));
        (pool_kind(&model.graph), model.graph.context)
    };
    assert_eq!(opened("plain", &[]), (PoolKind::Mean, 128));
    assert_eq!(opened("none", &[("modules.json", String::new())]), (PoolKind::Mean, 128));
    assert_eq!(opened("cls", &[pooling("pooling_mode_cls_token")]), (PoolKind::First, 128));
    assert_eq!(opened("last", &[pooling("pooling_mode_lasttoken")]), (PoolKind::Last, 128));
    let most = |len: Value| ("sentence_bert_config.json", json!({"max_seq_length": len}).to_string());
    assert_eq!(opened("short", &[most(json!(77))]), (PoolKind::Mean, 77));
    assert_eq!(opened("long", &[most(json!(4096))]), (PoolKind::Mean, 128));
    assert_eq!(opened("null", &[most(json!(null))]), (PoolKind::Mean, 128));

    let modules = |path: &str, kind: &str| {
        let list = json!([{"idx": 0, "name": "0", "path": path, "type": format!("sentence_transformers.models.{kind}")}]);
        ("modules.json", list.to_string())
    };
    for (name, file, wanted) in [
        ("max", pooling("pooling_mode_max_tokens"), "pooling_mode_max_tokens: expected false"),
        ("no-mode", ("1_Pooling/config.json", "{}".to_owned()), "to be true, found 0"),
        ("dense", modules("2_Dense", "Dense"), "found `sentence_transformers.models.Dense`"),
        ("outside", modules("../../etc", "Pooling"), "inside the directory, found \"../../etc\""),
        ("absolute", modules("/etc", "Pooling"), "inside the directory, found \"/etc\""),
        ("object", ("modules.json", "{}".to_owned()), "expected a list of modules"),
        ("zero", most(json!(0)), "max_seq_length: expected"),
    ] {
        let refused = Checkpoint::new(name, &[file]).open().err().expect(name);
        assert!(refused.contains(wanted), "{refused}, not {wanted}");
    }
}

#[test]
fn texts_and_pairs_get_their_special_tokens_and_are_cut_inside_of_them() {
    let model = Model::open(&fixture()).unwrap();
    let tokenizer = &model.tokenizer;
    let (query, text) = ("hello world", "the water is cold");
    let plain = |text| tokenizer.encode(text, AddSpecial::No).unwrap();
    let (cls, sep) = (tokenizer.id("[CLS]").unwrap(), tokenizer.id("[SEP]").unwrap());
    let lone = tokenizer.encode_within(text, None, None).unwrap();
    assert_eq!(lone.tokens, tokenizer.encode(text, AddSpecial::Yes).unwrap());
    assert_eq!(lone.second, None);
    let pair = tokenizer.encode_within(query, Some(text), None).unwrap();
    let expected = |text: &[u32]| [&[cls][..], &plain(query), &[sep], text, &[sep]].concat();
    assert_eq!(pair.tokens, expected(&plain(text)));
    assert_eq!(pair.second, Some(plain(query).len() + 2));

    let cut = tokenizer.encode_within(text, None, Some(4)).unwrap();
    assert_eq!(cut.tokens, [&[cls][..], &plain(text)[..2], &[sep]].concat());
    let most = pair.tokens.len() - 2;
    let cut = tokenizer.encode_within(query, Some(text), Some(most)).unwrap();
    assert_eq!(cut.tokens, expected(&plain(text)[..plain(text).len() - 2]));
    assert_eq!(cut.second, pair.second);
    // What is long enough is not cut.
    assert_eq!(tokenizer.encode_within(text, None, Some(lone.tokens.len())).unwrap(), lone);
    let empty = tokenizer.encode_within("", None, None).unwrap();
    assert_eq!(empty.tokens, [cls, sep]);
}
