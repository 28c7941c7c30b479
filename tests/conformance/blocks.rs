//! Weights of every block format: the CPU computes with their integers, candle with the numbers that they stand for.

use std::path::Path;

use mainstay_backend_api::KvDType;
use mainstay_backend_candle::CandleBackend;
use mainstay_kernels_cpu::Isa;
use mainstay_models::config::Config;
use mainstay_models::families;
use mainstay_models::graph::{Activation, Block, Gate, Graph, Value};
use mainstay_models::quant::BLOCK_LEN_MAX;
use mainstay_models::weights::DType;

use crate::harness::{Named, Rows, Rule, cpu};
use crate::mixture::{Latent, Mixture};
use crate::random::{FLOATS, Random, weights};
use crate::{Case, backends, tiny};

/// Root mean square of the difference over the standard deviation of the logits: what 8-bit activations may cost.
const APART_MAX: f64 = 0.02;

/// Columns that blocks of every format divide.
const WIDTH: usize = BLOCK_LEN_MAX;

/// A decoder, and single ops with several products.
fn cases(dtype: DType) -> Vec<Case> {
    let mut random = Random::new(9);
    let mut graphs = vec![("decoder", decoder())];
    for f in [Gate::By(Activation::Silu), Gate::Clamped { alpha: 1.702, limit: 0.8 }] {
        let mixture = Mixture::of_blocks(&mut random, f);
        graphs.push(("experts", tiny::one(WIDTH, |b, x| _ = mixture.push(b, x, WIDTH))));
    }
    let latent = Latent::of_blocks(&mut random);
    graphs.push(("latent rows", tiny::one(WIDTH, |b, x| _ = latent.push(b, x, WIDTH))));
    graphs.push(("chain", tiny::one(WIDTH, chain)));
    let case = |(name, graph): (&str, Graph)| {
        let weights = weights(&graph, dtype, &mut random);
        let texts = [1, 35, 90].map(|len| random.tokens(graph.vocab, len));
        Case { name: format!("{name} of {dtype:?}"), graph, weights, kv: KvDType::F32, texts: texts.into() }
    };
    graphs.into_iter().map(case).collect()
}

/// A product of floats whose result takes the place of what was packed before.
fn chain(b: &mut Block, mut rows: Value) {
    for name in ["a", "b", &format!("c{FLOATS}"), "d"] {
        rows = tiny::linear(b, rows, name, WIDTH, WIDTH);
    }
}

fn decoder() -> Graph {
    let config = serde_json::json!({
        "model_type": "qwen3", "hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 300,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "attention_bias": false
    });
    let config = Config::from_bytes(Path::new("blocks"), config.to_string().as_bytes()).expect("an object");
    families::graph(&config).unwrap_or_else(|e| panic!("{e}"))
}

/// How far rows are apart.
fn apart(found: &[Rows], expected: &[Rows]) -> f64 {
    let flat = |rows: &[Rows]| -> Vec<f64> {
        rows.iter().flat_map(|r| r.logits.iter().flatten()).map(|x| f64::from(*x)).collect()
    };
    let (found, expected) = (flat(found), flat(expected));
    let mean = expected.iter().sum::<f64>() / expected.len() as f64;
    let spread: f64 = expected.iter().map(|x| (x - mean).powi(2)).sum();
    let error: f64 = found.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum();
    (error / spread).sqrt()
}

/// Prints what docs/models.md says of each format.
#[test]
#[expect(clippy::print_stdout, reason = "what was measured is shown with --nocapture")]
fn blocks_are_close_to_their_numbers() {
    for case in DType::BLOCKS.into_iter().flat_map(cases) {
        let expected = case.alone(&mut case.rig(&CandleBackend::cpu()));
        let found = case.alone(&mut case.rig(&*cpu(Isa::best(), 2).backend));
        let apart = apart(&found, &expected);
        println!("{}: {apart:.4} apart", case.name);
        // Random latent rows go through a softmax that stretches errors as trained ones do not.
        let most = if case.name.starts_with("latent rows") { 1.5 * APART_MAX } else { APART_MAX };
        // Not the same numbers either: the integers were used.
        assert!(apart < most && apart > 1e-4, "{}: {apart} of a standard deviation apart", case.name);
    }
}

#[test]
fn instruction_sets_batches_and_chunks_change_nothing() {
    for case in [DType::Q8_0, DType::Q4K, DType::Q6K, DType::Mxfp4].into_iter().flat_map(cases) {
        let expected = case.alone(&mut case.rig(&*cpu(Isa::Scalar, 1).backend));
        for Named { name, backend } in backends().into_iter().skip(1) {
            let mut rig = case.rig(&*backend);
            let mut random = Random::new(3);
            let alone = case.alone(&mut rig);
            case.assert_all(&alone, &expected, |_| Rule::Bits, &name);
            let one_by_one = case.together(&mut rig, |_| 1);
            case.assert_all(&one_by_one, &expected, |_| Rule::Bits, &format!("{name}, one by one"));
            let mixed = case.together(&mut rig, |left| if left > 0 { 1 + random.below(left) } else { 0 });
            case.assert_all(&mixed, &expected, |_| Rule::Bits, &format!("{name}, mixed"));
        }
    }
}
