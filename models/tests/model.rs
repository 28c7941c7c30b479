//! Opening checkpoints: defaults, and where chat templates and special tokens are found.

use std::path::{Path, PathBuf};

use mainstay_models::Model;
use mainstay_models::template::Conversation;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

/// A copy of the llama fixture with files replaced or added, removed at the end.
struct Checkpoint(PathBuf);

impl Checkpoint {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama");
        let dir = std::env::temp_dir().join(format!("mainstay-model-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
            std::fs::copy(fixture.join(file), dir.join(file)).unwrap();
        }
        for (file, text) in files {
            let path = dir.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self(dir)
    }

    fn open(&self) -> Model {
        Model::open(&self.0).unwrap()
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The text of one message, with and without tools.
fn texts(model: &Model) -> [String; 2] {
    let template = model.template.as_ref().unwrap();
    let messages = [json!({"role": "user", "content": "Hi"})];
    let tools: [Value; 0] = [];
    [None, Some(&tools[..])].map(|tools| {
        let conversation = Conversation { messages: &messages, tools, ..Default::default() };
        template.render(&conversation).unwrap_or_else(|e| e.0)
    })
}

/// The Gemma 3 fixture as it lies inside a checkpoint that also sees, its tensors named by `inside`.
fn nested(inside: &str) -> Vec<u8> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gemma3_text");
    let bytes = std::fs::read(fixture.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let named = |name: &str| format!("{inside}{}", name.strip_prefix("model.").unwrap());
    let mut tensors: Vec<(String, TensorView<'_>)> =
        file.tensors().into_iter().map(|(name, view)| (named(&name), view)).collect();
    let seen = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    tensors.push(("vision_tower.vision_model.weight".to_owned(), seen));
    safetensors::serialize(tensors, None).unwrap()
}

#[test]
fn the_text_model_of_one_that_sees_opens_as_if_it_stood_alone() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gemma3_text");
    let text: Value = serde_json::from_slice(&std::fs::read(fixture.join("config.json")).unwrap()).unwrap();
    let config = json!({"model_type": "gemma3", "text_config": text, "vision_config": {}}).to_string();
    let alone = Model::open(&fixture).unwrap();
    for (name, inside) in [("hub", "language_model.model."), ("new", "model.language_model.")] {
        let checkpoint = Checkpoint::new(name, &[("config.json", &config)]);
        std::fs::write(checkpoint.0.join("model.safetensors"), nested(inside)).unwrap();
        let model = checkpoint.open();
        assert_eq!(format!("{:?}", model.graph.blocks), format!("{:?}", alone.graph.blocks));
        let norm = |model: &Model| {
            let mut numbers = vec![0.0; 64];
            model.weights.tensor("model.layers.3.input_layernorm.weight").unwrap().read_f32(&mut numbers);
            numbers
        };
        assert_eq!(norm(&model), norm(&alone));
    }
    let twice = [nested("language_model.model."), nested("model.language_model.")];
    let dir = Checkpoint::new("twice", &[("config.json", &config)]);
    std::fs::remove_file(dir.0.join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (i, bytes) in twice.iter().enumerate() {
        let shard = format!("{i}.safetensors");
        let names = SafeTensors::deserialize(bytes).unwrap();
        let own = names.names().into_iter().filter(|name| i == 0 || !name.starts_with("vision"));
        let kept: Vec<_> = own.map(|name| (name.to_owned(), names.tensor(name).unwrap())).collect();
        map.extend(kept.iter().map(|(name, _)| (name.clone(), json!(shard))));
        std::fs::write(dir.0.join(&shard), safetensors::serialize(kept, None).unwrap()).unwrap();
    }
    std::fs::write(dir.0.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string())
        .unwrap();
    let error = Model::open(&dir.0).err().unwrap().to_string();
    assert!(error.contains("expected once, found twice"), "{error}");
}

#[test]
fn defaults_come_from_generation_config_then_config_then_tokenizer() {
    let generation = Checkpoint::new("defaults", &[]).open().generation;
    assert_eq!(generation.eos, [506, 509, 510]);
    assert_eq!(
        (generation.temperature, generation.top_k, generation.top_p),
        (Some(0.7), Some(40), Some(0.9))
    );
    assert_eq!((generation.min_p, generation.repetition_penalty), (None, None));

    let greedy = r#"{"eos_token_id": 509, "do_sample": false, "temperature": 0.7}"#;
    let generation = Checkpoint::new("greedy", &[("generation_config.json", greedy)]).open().generation;
    assert_eq!((generation.eos, generation.temperature), (vec![509], Some(0.0)));

    let checkpoint = Checkpoint::new("silent", &[("generation_config.json", "{}")]);
    assert_eq!(checkpoint.open().generation.eos, [506, 509, 510]);
    let config = std::fs::read(checkpoint.0.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config.as_object_mut().unwrap().remove("eos_token_id");
    std::fs::write(checkpoint.0.join("config.json"), config.to_string()).unwrap();
    std::fs::write(checkpoint.0.join("tokenizer_config.json"), r#"{"eos_token": {"content": "<|eot_id|>"}}"#)
        .unwrap();
    let model = checkpoint.open();
    assert_eq!(model.generation.eos, [model.tokenizer.id("<|eot_id|>").unwrap()]);
}

#[test]
fn a_checkpoint_needs_no_template_and_no_defaults() {
    let checkpoint = Checkpoint::new("bare", &[]);
    std::fs::remove_file(checkpoint.0.join("generation_config.json")).unwrap();
    let model = checkpoint.open();
    assert!(model.template.is_none());
    assert_eq!(model.generation.temperature, None);
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let one = r#"{"chat_template": "one {{ eos_token }}{{ pad_token }}{{ add_bos_token is defined }}",
        "add_bos_token": true, "eos_token": {"content": "<e>", "special": true}, "pad_token": null}"#;
    let list = r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"},
        {"name": "rag", "template": "{{ broken"}]}"#;
    let rag = r#"{"chat_template": [{"name": "rag", "template": "R"}]}"#;
    let config = "tokenizer_config.json";
    let file = ("chat_template.jinja", "F");
    let tool_file = ("additional_chat_templates/tool_use.jinja", "TF");
    for (name, files, expected) in [
        ("text", &[(config, one)][..], ["one <e>False", "one <e>False"]),
        ("list", &[(config, list)], ["D", "T"]),
        ("file", &[(config, list), file], ["F", "F"]),
        ("files", &[(config, one), file, tool_file], ["F", "TF"]),
    ] {
        assert_eq!(texts(&Checkpoint::new(name, files).open()), expected, "{name}");
    }
    assert!(Checkpoint::new("rag", &[(config, rag)]).open().template.is_none());
    let only_tools = texts(&Checkpoint::new("only-tools", &[tool_file]).open());
    assert_eq!(only_tools[1], "TF");
    assert!(only_tools[0].contains("no default"), "{}", only_tools[0]);
}

#[test]
fn the_name_is_the_directorys() {
    let checkpoint = Checkpoint::new("name", &[]);
    let expected = checkpoint.0.file_name().unwrap().to_str().unwrap();
    assert_eq!(checkpoint.open().name, expected);
    assert_eq!(Model::open(&checkpoint.0.join(".")).unwrap().name, expected);
    assert_eq!(Model::open(&checkpoint.0.join("../").join(expected)).unwrap().name, expected);
}

#[test]
fn a_vocabulary_larger_than_the_models_is_refused() {
    let checkpoint = Checkpoint::new("vocab", &[]);
    let path = checkpoint.0.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let added = json!({"id": 512, "content": "<more>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let error = Model::open(&checkpoint.0).err().unwrap().to_string();
    assert!(
        error.contains("tokenizer.json: expected token ids below the model's vocab_size 512, found"),
        "{error}"
    );
}
