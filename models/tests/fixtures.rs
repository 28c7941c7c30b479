//! The reference checkpoints of tests/fixtures: everything that transformers says of their text, to the letter.

use std::path::{Path, PathBuf};

use mainstay_models::Model;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
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
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
        let model = Model::open(&fixtures().join(family)).unwrap();
        assert_eq!(model.name, family);
        assert_eq!(model.graph.family, family);
    }
}
