//! Sequences that become one row: encoders and decoders, candle against plain f64, the cpu against candle, and each
//! exact backend against itself when sequences stand in one step, are cut, or are computed by other threads.

use mainstay_backend_api::KvDType;
use mainstay_kernels_cpu::Isa;
use mainstay_models::Weights;
use mainstay_models::graph::{Graph, PoolKind};
use mainstay_models::weights::DType;

use crate::harness::{Named, Rig, Rule, assert_same, backends, cpu};
use crate::random::{Random, weights};
use crate::{scalar, tiny, tolerance};

const ENCODERS: u64 = 16;

/// An encoder and texts of many lengths, some of them pairs.
struct Case {
    name: String,
    graph: Graph,
    weights: Weights,
    texts: Vec<(Vec<u32>, Option<usize>)>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let graph = tiny::encoder(&mut random);
        let weights = weights(&graph, random.pick(&[DType::F32, DType::BF16]), &mut random);
        let lens = [1, 2, 31, 32, 33, 1 + random.below(16), 60 + random.below(80)];
        let texts = lens.map(|len| {
            let second = if random.coin() { Some(random.below(len)) } else { None };
            (random.tokens(graph.vocab, len), second)
        });
        Self { name: format!("encoder {seed}"), graph, weights, texts: texts.into() }
    }

    fn rig(&self, named: &Named) -> Rig {
        Rig::new(&*named.backend, &self.graph, &self.weights, KvDType::F32)
    }

    /// The rows of these texts, all of them in one step.
    fn pool(&self, rig: &mut Rig, which: &[usize]) -> Vec<Vec<f32>> {
        let mut sequences: Vec<_> = which
            .iter()
            .map(|&i| {
                let mut sequence = rig.open();
                sequence.second = self.texts[i].1;
                sequence
            })
            .collect();
        let tokens = which.iter().map(|&i| &self.texts[i].0[..]);
        let rows = rig.pool(&mut sequences.iter_mut().zip(tokens).collect::<Vec<_>>());
        sequences.into_iter().for_each(|sequence| rig.close(sequence));
        rows
    }

    fn alone(&self, rig: &mut Rig) -> Vec<Vec<f32>> {
        (0..self.texts.len()).map(|i| self.pool(rig, &[i]).remove(0)).collect()
    }
}

#[test]
fn encoders_on_candle_are_what_the_ops_mean_and_every_backend_equals_candle() {
    let backends = backends();
    for case in (0..ENCODERS).map(Case::new) {
        let texts = case.texts.iter();
        let meant: Vec<Vec<f32>> = texts
            .map(|(tokens, second)| scalar::pooled(&case.graph, &case.weights, tokens, *second))
            .collect();
        let within = Rule::Within(tolerance(KvDType::F32, &meant));
        let candle = case.alone(&mut case.rig(&backends[0]));
        assert_same(&candle, &meant, within, &format!("{}, candle against f64", case.name));
        for named in &backends[1..] {
            let found = case.alone(&mut case.rig(named));
            assert_same(&found, &candle, within, &format!("{}, {} against candle", case.name, named.name));
        }
    }
}

#[test]
fn a_row_among_others_equals_the_row_alone() {
    for seed in 0..ENCODERS {
        let case = Case::new(seed);
        for named in backends() {
            let mut rig = case.rig(&named);
            let expected = case.alone(&mut rig);
            let rule = Rule::of(&rig, tolerance(KvDType::F32, &expected));
            let mut random = Random::new(seed);
            for round in 0..4 {
                let mut order: Vec<usize> = (0..case.texts.len()).collect();
                random.shuffle(&mut order);
                order.truncate(2 + random.below(order.len() - 1));
                let wanted: Vec<Vec<f32>> = order.iter().map(|&i| expected[i].clone()).collect();
                let found = case.pool(&mut rig, &order);
                assert_same(&found, &wanted, rule, &format!("{}, {}, round {round}", case.name, named.name));
            }
        }
    }
}

#[test]
fn threads_and_instruction_sets_change_no_row() {
    for case in (0..ENCODERS / 2).map(Case::new) {
        let all: Vec<usize> = (0..case.texts.len()).collect();
        let expected = case.pool(&mut case.rig(&cpu(Isa::Scalar, 1)), &all);
        for isa in Isa::supported() {
            for threads in [1, 2, 3] {
                let named = cpu(isa, threads);
                let found = case.pool(&mut case.rig(&named), &all);
                assert_same(&found, &expected, Rule::Bits, &format!("{}, {}", case.name, named.name));
            }
        }
    }
}

#[test]
fn a_second_text_and_every_token_are_seen() {
    for seed in 0..ENCODERS {
        let mut case = Case::new(seed);
        case.texts.truncate(0);
        let tokens: Vec<u32> = (0..40).map(|i| i % case.graph.vocab as u32).collect();
        for second in [None, Some(20), Some(21)] {
            case.texts.push((tokens.clone(), second));
        }
        // Also one that comes after all others.
        let mut last = tokens;
        last[39] = (last[39] + 1) % case.graph.vocab as u32;
        case.texts.push((last, None));
        let rows = case.alone(&mut case.rig(&cpu(Isa::best(), 2)));
        for i in 1..rows.len() {
            assert_ne!(rows[0], rows[i], "{}: text {i}", case.name);
        }
    }
}

#[test]
fn the_last_row_of_a_decoder_is_the_same_however_its_text_is_cut() {
    for seed in 0..ENCODERS {
        let mut random = Random::new(seed);
        let graph = tiny::model_that_pools(&mut random);
        let weights = weights(&graph, DType::F32, &mut random);
        let tokens = random.tokens(graph.vocab, 70);
        let meant = vec![scalar::pooled(&graph, &weights, &tokens, None)];
        let within = tolerance(KvDType::F32, &meant);
        for named in backends() {
            let mut rig = Rig::new(&*named.backend, &graph, &weights, KvDType::F32);
            let mut whole = rig.open();
            let expected = rig.pool(&mut [(&mut whole, &tokens)]);
            rig.close(whole);
            let what = format!("model {seed}, {}", named.name);
            assert_same(&expected, &meant, Rule::Within(within), &what);
            for cut in [1, 32, 33, 69] {
                let mut sequence = rig.open();
                rig.prefill(&mut sequence, &tokens[..cut], cut);
                let found = rig.pool(&mut [(&mut sequence, &tokens[cut..])]);
                rig.close(sequence);
                assert_same(&found, &expected, Rule::of(&rig, within), &format!("{what}, cut at {cut}"));
            }
        }
    }
}

#[test]
fn rows_that_come_in_pieces_are_pooled_by_the_last_only() {
    let mut random = Random::new(3);
    let mut graph = tiny::model_that_pools(&mut random);
    let weights = weights(&graph, DType::F32, &mut random);
    graph.check(&weights).unwrap();
    tiny::repool(&mut graph, PoolKind::Mean);
    let refused = graph.check(&weights).unwrap_err().to_string();
    assert!(refused.contains("expected the last row") && refused.contains("found Mean"), "{refused}");
}
