//! Embeddings against those of transformers: the seeded fixture, and a trained model where one is installed.

use std::path::{Path, PathBuf};

use mainstay_backend_api::KvDType;
use mainstay_models::Model;
use mainstay_models::graph::{Op, PoolKind};
use mainstay_models::tokenizer::Encoded;
use safetensors::SafeTensors;

use crate::harness::{Named, Rig, Rule, assert_same, backends};
use crate::open;
use crate::reference::fixture;

/// Largest difference of a number of a vector of length 1 from transformers' f32, whose own noise is 1e-6.
const SEEDED: f32 = 2e-5;
/// The same for the trained model, whose vectors are six times as wide.
const TRAINED: f32 = 1e-5;

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&bytes(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn encode(model: &Model, text: &str) -> Vec<u32> {
    model.tokenizer.encode_within(text, None, Some(model.graph.context)).unwrap().tokens
}

/// The rows of texts, first each alone, then all in one step.
fn rows(rig: &mut Rig, texts: &[Vec<u32>]) -> [Vec<Vec<f32>>; 2] {
    let mut pool = |texts: &[Vec<u32>]| {
        let mut sequences: Vec<_> = texts.iter().map(|_| rig.open()).collect();
        let tokens = texts.iter().map(Vec::as_slice);
        let rows = rig.pool(&mut sequences.iter_mut().zip(tokens).collect::<Vec<_>>());
        sequences.into_iter().for_each(|sequence| rig.close(sequence));
        rows
    };
    let alone = texts.iter().flat_map(|text| pool(std::slice::from_ref(text))).collect();
    [alone, pool(texts)]
}

/// Compares the rows of texts with the expected ones on every backend, and those of a batch with those alone.
fn compare(model: &Model, texts: &[Vec<u32>], expected: &[Vec<f32>], within: f32, what: &str) {
    for Named { name, backend } in backends() {
        let mut rig = Rig::new(&*backend, &model.graph, &model.weights, KvDType::F32);
        let [alone, together] = rows(&mut rig, texts);
        assert_same(&alone, expected, Rule::Within(within), &format!("{what} on {name}"));
        assert_same(&together, &alone, Rule::of(&rig, within), &format!("{what} on {name}, in one step"));
    }
}

#[test]
fn the_seeded_encoder_agrees() {
    let dir = fixture("bert");
    let mut model = open(&dir);
    let file = bytes(&dir.join("expected.safetensors"));
    let file = SafeTensors::deserialize(&file).unwrap();
    let prompts = json(&dir.join("expected.json"))["prompts"].clone();
    let prompts: Vec<&str> = prompts.as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    let texts: Vec<Vec<u32>> = prompts.iter().map(|text| encode(&model, text)).collect();
    for (i, text) in texts.iter().enumerate() {
        let ids = file.tensor(&format!("prompt{i}.input_ids")).unwrap();
        let ids = ids.data().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
        assert!(ids.eq(text.iter().copied()), "tokens of prompt {i}");
    }
    for (kind, name) in [(PoolKind::Mean, "mean_normalised"), (PoolKind::First, "cls_normalised")] {
        for op in &mut model.graph.pooled.as_mut().unwrap().block.ops {
            if let Op::Pool { kind: found, .. } = op {
                *found = kind;
            }
        }
        let expected: Vec<Vec<f32>> =
            (0..texts.len()).map(|i| floats(&file, &format!("prompt{i}.{name}"))).collect();
        compare(&model, &texts, &expected, SEEDED, name);
    }
}

#[test]
fn the_seeded_cross_encoder_agrees() {
    let dir = fixture("bert_cross");
    let mut model = open(&dir);
    let expected = json(&dir.join("expected.json"));
    let expected = expected.as_array().unwrap();
    let pairs: Vec<Encoded> = expected
        .iter()
        .map(|entry| {
            let text = |name: &str| entry[name].as_str().unwrap();
            let pair = model.tokenizer.encode_within(text("query"), Some(text("document")), None).unwrap();
            assert_eq!(serde_json::json!(pair.tokens), entry["ids"]);
            assert_eq!(serde_json::json!(pair.second), entry["second"]);
            pair
        })
        .collect();
    for name in ["score", "logit"] {
        let wanted: Vec<Vec<f32>> =
            expected.iter().map(|entry| vec![entry[name].as_f64().unwrap() as f32]).collect();
        for Named { name: backend_name, backend } in backends() {
            let mut rig = Rig::new(&*backend, &model.graph, &model.weights, KvDType::F32);
            let mut sequences: Vec<_> = pairs.iter().map(|_| rig.open()).collect();
            sequences.iter_mut().zip(&pairs).for_each(|(sequence, pair)| sequence.second = pair.second);
            let tokens = pairs.iter().map(|pair| &pair.tokens[..]);
            let found = rig.pool(&mut sequences.iter_mut().zip(tokens).collect::<Vec<_>>());
            assert_same(&found, &wanted, Rule::Within(SEEDED), &format!("{name} on {backend_name}"));
        }
        // What the sigmoid is made of.
        model.graph.pooled.as_mut().unwrap().block.ops.pop();
    }
}

/// The directory of all-MiniLM-L6-v2, which is too large to be part of the repository.
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn minilm() -> Option<PathBuf> {
    let found = std::env::var_os("MAINSTAY_MINILM").map(PathBuf::from);
    if found.is_none() {
        eprintln!(
            "skipped: MAINSTAY_MINILM names no directory with all-MiniLM-L6-v2 (tests/clients/minilm.sh)"
        );
    }
    found
}

#[test]
fn a_trained_encoder_agrees() {
    let Some(dir) = minilm() else { return };
    let (model, stored) = (open(&dir), fixture("minilm"));
    assert_eq!(model.graph.context, 256, "as sentence_bert_config.json says");
    let reference = json(&stored.join("reference.json"));
    let published = reference["texts"].as_array().unwrap();
    let texts: Vec<Vec<u32>> = published
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let tokens = encode(&model, text["text"].as_str().unwrap());
            assert_eq!(serde_json::json!(tokens), text["ids"], "tokens of text {i}");
            tokens
        })
        .collect();
    let file = bytes(&stored.join("reference.safetensors"));
    let file = SafeTensors::deserialize(&file).unwrap();
    let all = floats(&file, "embeddings");
    let expected: Vec<Vec<f32>> = all.chunks(all.len() / texts.len()).map(<[f32]>::to_vec).collect();
    compare(&model, &texts, &expected, TRAINED, "all-MiniLM-L6-v2");
}
