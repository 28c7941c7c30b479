//! The reference checkpoints of tests/fixtures: everything that transformers says of their text, to the letter.

use std::path::{Path, PathBuf};

use mainstay_models::Model;
use mainstay_models::template::{ChatTemplate, Conversation};
use mainstay_models::tokenizer::{AddSpecial, ShowSpecial, Tokenizer};
use serde_json::{Map, Value};

const FAMILIES: [&str; 13] = include!("../../tests/fixtures/families.rs");

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// Data beyond the repository's own: `MAINSTAY_SHARED`, or `shared` beside the checkout.
fn shared(part: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let root = std::env::var_os("MAINSTAY_SHARED").map_or_else(beside, PathBuf::from);
    Some(root.join(part)).filter(|p| p.is_dir())
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Every tokenization and decoding of an expected.json.
fn check_tokenizations(dir: &Path) -> usize {
    let path = dir.join("tokenizer.json");
    let tokenizer = Tokenizer::from_bytes(&path, &std::fs::read(&path).unwrap()).unwrap();
    let expected = json(&dir.join("expected.json"));
    let cases = expected["tokenizations"].as_array().unwrap();
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let plain = ids(&case["ids_plain"]);
        assert_eq!(tokenizer.encode(text, AddSpecial::Yes).unwrap(), ids(&case["ids"]), "{dir:?} {text:?}");
        assert_eq!(tokenizer.encode(text, AddSpecial::No).unwrap(), plain, "{dir:?} {text:?}");
        let shown = tokenizer.decode(&plain, ShowSpecial::Yes);
        assert_eq!(shown, case["decoded_plain"].as_str().unwrap(), "{dir:?} {text:?}");
        let hidden = tokenizer.decode(&ids(&case["ids"]), ShowSpecial::No);
        assert_eq!(hidden, case["decoded_skip_special"].as_str().unwrap(), "{dir:?} {text:?}");
    }
    cases.len()
}

/// Every chat rendering of an expected.json, refusals and token ids included.
fn check_chats(dir: &Path) -> usize {
    let path = dir.join("tokenizer.json");
    let tokenizer = Tokenizer::from_bytes(&path, &std::fs::read(&path).unwrap()).unwrap();
    let template = template(&dir.join("tokenizer_config.json"));
    let expected = json(&dir.join("expected.json"));
    let cases = expected["chats"].as_array().unwrap();
    for case in cases {
        let name = format!("{dir:?} {}", case["case"]);
        let rendered = template.render(&Conversation {
            messages: case["messages"].as_array().unwrap(),
            tools: case["tools"].as_array().map(Vec::as_slice),
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            kwargs: case["kwargs"].as_object(),
        });
        match (rendered, case["rendered"].as_str()) {
            (Ok(found), Some(expected)) => {
                assert_eq!(found, expected, "{name}");
                assert_eq!(tokenizer.encode(&found, AddSpecial::No).unwrap(), ids(&case["ids"]), "{name}");
            }
            (Err(found), None) => {
                // The words of raise_exception are the template's; those of other errors are each library's own.
                let error = case["error"].as_str().unwrap();
                let raised = error.strip_prefix("TemplateError: ").unwrap_or(&found.0);
                assert_eq!(found.0, raised, "{name}");
            }
            (found, expected) => panic!("{name}: expected {expected:?}, found {found:?}"),
        }
    }
    cases.len()
}

/// The template of a tokenizer_config.json with its special tokens, by the public constructor.
fn template(path: &Path) -> ChatTemplate {
    let config = json(path);
    let tokens = config.as_object().unwrap().iter().filter(|(k, v)| k.ends_with("_token") && v.is_string());
    let tokens: Map<String, Value> = tokens.map(|(k, v)| (k.clone(), v.clone())).collect();
    ChatTemplate::new(config["chat_template"].as_str().unwrap(), tokens).unwrap()
}

#[test]
fn the_embedded_model_opens() {
    let model = Model::embedded().unwrap();
    assert_eq!(model.name, "mainstay-default");
    assert!(model.template.is_some());
    assert!(!model.generation.eos.is_empty());
}

#[test]
fn all_families_open() {
    for family in FAMILIES {
        let model = Model::open(&fixtures().join(family)).unwrap();
        assert_eq!(model.name, family);
        assert_eq!(model.graph.family, family.trim_end_matches("_longrope"));
    }
}

#[test]
fn tokenizations_equal_the_reference() {
    for family in FAMILIES {
        assert_eq!(check_tokenizations(&fixtures().join(family)), 45);
    }
}

#[test]
fn chats_equal_the_reference() {
    for family in FAMILIES {
        assert_eq!(check_chats(&fixtures().join(family)), 32);
    }
}

/// Families that have no graph yet already have their text.
#[test]
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn text_of_all_reference_families() {
    let Some(reference) = shared("reference") else {
        println!("skipped: no reference directory (MAINSTAY_SHARED)");
        return;
    };
    for entry in std::fs::read_dir(reference).unwrap() {
        let dir = entry.unwrap().path();
        if dir.join("tokenizer.json").exists() {
            assert_eq!(check_tokenizations(&dir), 45);
            if json(&dir.join("tokenizer_config.json"))["chat_template"].is_string() {
                assert_eq!(check_chats(&dir), 32);
            }
        }
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn a_trained_checkpoint_opens() {
    let Some(dir) = shared("real/stories260K/hf") else {
        println!("skipped: no stories260K (MAINSTAY_SHARED)");
        return;
    };
    let model = Model::open(&dir).unwrap();
    assert_eq!((model.graph.layers.len(), model.graph.vocab, model.graph.context), (5, 512, 512));
    assert!(model.template.is_none());
    let text = "Once upon a time, there was a little girl named Lily.";
    let ids = model.tokenizer.encode(text, AddSpecial::Yes).unwrap();
    assert_eq!(model.tokenizer.decode(&ids, ShowSpecial::No), text);
}
