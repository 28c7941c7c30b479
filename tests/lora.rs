//! Adapters on every backend: against PEFT, against each other in one step, and on a backend with room for them.

#[path = "harness/mod.rs"]
#[expect(dead_code, reason = "no pages are copied or moved here")]
mod harness;

use std::path::{Path, PathBuf};

use harness::{Rig, Rows, Sequence};
use mainstay_backend_api::{AdapterId, Backend, KvDType};
use mainstay_backend_candle::CandleBackend;
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_models::{AdapterWeights, Model};
use safetensors::SafeTensors;

const NAMES: [&str; 3] = ["attention", "all", "mlp"];

/// f32 logits of a deviation of 5 or so; PEFT's own adapter and its merged weights differ by 5e-5.
const TOLERANCE: f32 = 5e-4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn model() -> Model {
    Model::open(&fixtures().join("llama")).unwrap()
}

fn cpu(threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(threads), isa: None }).unwrap()
}

/// A rig that has all adapters, `NAMES[i]` as number `i`.
fn rig(backend: &dyn Backend, model: &Model) -> Rig {
    let mut rig = Rig::new(backend, &model.graph, &model.weights, KvDType::F32);
    for (id, name) in (0..).zip(NAMES) {
        let weights = AdapterWeights::open(&fixtures().join("lora").join(name), &model.graph).unwrap();
        rig.executor.set_adapter(AdapterId(id), Some(&weights)).expect("the backend takes adapters");
    }
    rig
}

fn open(rig: &Rig, adapter: Option<usize>) -> Sequence {
    let mut sequence = rig.open();
    sequence.adapter = adapter.map(|at| AdapterId(at as u32));
    sequence
}

fn alone(rig: &mut Rig, adapter: Option<usize>, tokens: &[u32]) -> Rows {
    let mut sequence = open(rig, adapter);
    let rows = rig.prefill(&mut sequence, tokens, tokens.len());
    rig.close(sequence);
    rows
}

/// The prompts of the fixture, and what PEFT computed of each, by adapter; the last is without one.
struct Expected {
    prompts: Vec<Vec<u32>>,
    logits: Vec<Vec<Vec<f32>>>,
}

fn expected() -> Expected {
    let bytes = std::fs::read(fixtures().join("lora/expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec();
    let prompts = [0, 1].map(|i| words(&format!("prompt.{i}")).into_iter().map(u32::from_le_bytes).collect());
    let of = |name: &str| {
        let rows = |i: usize| words(&format!("{name}.{i}")).into_iter().map(f32::from_le_bytes).collect();
        [0, 1].map(rows).to_vec()
    };
    Expected {
        prompts: prompts.to_vec(),
        logits: NAMES.iter().chain(&["base"]).map(|name| of(name)).collect(),
    }
}

#[test]
fn every_backend_gives_what_peft_gives() {
    let (model, expected) = (model(), expected());
    let backends: [(&str, Box<dyn Backend>); 2] =
        [("candle", Box::new(CandleBackend::cpu())), ("cpu", Box::new(cpu(2).with_adapters()))];
    for (backend_name, backend) in backends {
        let mut rig = rig(&*backend, &model);
        for (adapter, logits) in expected.logits.iter().enumerate() {
            let adapter = Some(adapter).filter(|at| *at < NAMES.len());
            for (prompt, logits) in expected.prompts.iter().zip(logits) {
                let found = alone(&mut rig, adapter, prompt).logits.concat();
                assert_eq!(found.len(), logits.len());
                let apart = found.iter().zip(logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart <= TOLERANCE, "{backend_name}, {adapter:?}: {apart}");
            }
        }
    }
}

#[test]
fn three_adapters_and_none_in_one_batch_have_the_bits_of_each_alone() {
    let model = model();
    let texts: Vec<Vec<u32>> =
        (0..8u32).map(|text| (0..20 + text * 9).map(|i| (i * i + 31 * text) % 500).collect()).collect();
    let adapter_of = |text: usize| Some(text % 4).filter(|at| *at < NAMES.len());
    let mut lone = rig(&cpu(1).with_adapters(), &model);
    let wanted: Vec<Rows> =
        texts.iter().enumerate().map(|(text, tokens)| alone(&mut lone, adapter_of(text), tokens)).collect();
    for threads in [1, 2, 3] {
        let mut rig = rig(&cpu(threads).with_adapters(), &model);
        for piece in [1, 7, 64] {
            let mut sequences: Vec<Sequence> =
                (0..texts.len()).map(|text| open(&rig, adapter_of(text))).collect();
            let mut found = vec![Rows::default(); texts.len()];
            loop {
                let (mut chunks, mut who) = (Vec::new(), Vec::new());
                for (text, sequence) in sequences.iter_mut().enumerate() {
                    let left = &texts[text][sequence.computed..];
                    let take = (piece + text % 3).min(left.len());
                    if take > 0 {
                        chunks.push((sequence, &left[..take]));
                        who.push(text);
                    }
                }
                if chunks.is_empty() {
                    break;
                }
                for (text, rows) in who.into_iter().zip(rig.step(&mut chunks)) {
                    found[text].extend(rows);
                }
            }
            sequences.into_iter().for_each(|sequence| rig.close(sequence));
            for (text, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                let is_same = found
                    .logits
                    .concat()
                    .iter()
                    .zip(wanted.logits.concat())
                    .all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(
                    is_same,
                    "text {text} under {:?}, {threads} threads, pieces of {piece}",
                    adapter_of(text)
                );
            }
        }
    }
}

#[test]
fn room_for_adapters_changes_no_bit_without_one() {
    let model = model();
    let tokens: Vec<u32> = (0..50).map(|i| (i * 7 + 3) % 500).collect();
    let mut plain = Rig::new(&cpu(2), &model.graph, &model.weights, KvDType::F32);
    let mut roomy = rig(&cpu(2).with_adapters(), &model);
    assert_eq!(plain.numeric_class(), roomy.numeric_class());
    let (found, wanted) = (alone(&mut roomy, None, &tokens), alone(&mut plain, None, &tokens));
    assert!(
        found.logits.concat().iter().zip(wanted.logits.concat()).all(|(a, b)| a.to_bits() == b.to_bits())
    );
}

#[test]
fn a_backend_without_room_refuses_adapters() {
    let model = model();
    let limits = mainstay_backend_api::Limits {
        context: 64,
        tokens_per_step: 64,
        chunks: 1,
        output_rows: 1,
        pages: vec![4],
        kv_dtype: KvDType::F32,
    };
    let mut executor = cpu(1).load(&model.graph, &model.weights, &limits).unwrap();
    let weights = AdapterWeights::open(&fixtures().join("lora/mlp"), &model.graph).unwrap();
    let error = executor.set_adapter(AdapterId(0), Some(&weights)).unwrap_err().to_string();
    assert!(error.contains("without room"), "{error}");
}
