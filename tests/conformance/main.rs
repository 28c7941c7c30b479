//! Seeded random ops and tiny models: candle against plain f64, every other backend against candle, and each
//! backend against itself when the same tokens are batched, cut, moved or copied otherwise.

mod blocks;
#[path = "../harness/mod.rs"]
mod harness;
mod mixture;
mod pooled;
mod random;
mod scalar;
mod tiny;

use harness::{Named, Rig, Rows, Rule, Sequence, assert_same, backends, cpu};
use mainstay_backend_api::{Backend, KvDType};
use mainstay_kernels_cpu::Isa;
use mainstay_models::Weights;
use mainstay_models::graph::{Graph, Op};
use mainstay_models::weights::DType;
use random::{Random, weights};

/// How far results may lie from the expected ones, as a fraction of the expected logits' root mean square. Weights
/// of every type are widened exactly and computed in f32; keys and values in bf16 keep
/// 8 bits, in f16 11, and in q8 1/127 of a row's largest.
const TOLERANCES: [(KvDType, f32); 4] =
    [(KvDType::F32, 5e-5), (KvDType::BF16, 4e-2), (KvDType::F16, 5e-3), (KvDType::Q8, 8e-2)];

const MODELS: u64 = 24;

fn tolerance(kv: KvDType, expected: &[Vec<f32>]) -> f32 {
    let fraction = TOLERANCES.iter().find(|t| t.0 == kv).expect("every type is in the table").1;
    let count = expected.iter().map(Vec::len).sum::<usize>().max(1);
    let squares: f32 = expected.iter().flatten().map(|l| l * l).sum();
    fraction * (squares / count as f32).sqrt()
}

/// A graph, its weights, and sequences to run through it.
struct Case {
    name: String,
    graph: Graph,
    weights: Weights,
    kv: KvDType,
    /// Tokens of each sequence.
    texts: Vec<Vec<u32>>,
}

impl Case {
    fn of_op(name: String, graph: Graph, random: &mut Random) -> Self {
        let weights = weights(&graph, DType::F32, random);
        let texts = [1, 37, 70].map(|len| random.tokens(graph.vocab, len));
        Self { name, graph, weights, kv: KvDType::F32, texts: texts.into() }
    }

    fn of_model(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let graph = tiny::model(&mut random);
        let dtype = random.pick(&[DType::F32, DType::BF16, DType::F16]);
        let weights = weights(&graph, dtype, &mut random);
        let kv = random.pick(&[KvDType::F32, KvDType::F32, KvDType::BF16, KvDType::F16, KvDType::Q8]);
        // Where a rounding to bf16 falls on the other side, a row may go to another expert.
        let routed = graph.blocks.iter().flat_map(|b| &b.ops).any(|op| matches!(op, Op::Experts(_)));
        let kv = if routed { KvDType::F32 } else { kv };
        let lens = [1 + random.below(8), 30 + random.below(6), 60 + random.below(80), 1 + random.below(100)];
        let texts = lens.map(|len| random.tokens(graph.vocab, len));
        Self { name: format!("model {seed} ({dtype:?})"), graph, weights, kv, texts: texts.into() }
    }

    fn rig(&self, backend: &dyn Backend) -> Rig {
        Rig::new(backend, &self.graph, &self.weights, self.kv)
    }

    fn open(&self, rig: &Rig, text: usize) -> Sequence {
        rig.open_for(self.texts[text].len())
    }

    /// Every text by itself in one step.
    fn alone(&self, rig: &mut Rig) -> Vec<Rows> {
        let one = |(i, tokens): (usize, &Vec<u32>)| {
            let mut sequence = self.open(rig, i);
            let rows = rig.prefill(&mut sequence, tokens, tokens.len());
            rig.close(sequence);
            rows
        };
        self.texts.iter().enumerate().map(one).collect()
    }

    /// All texts together, a few tokens of each in every step: `cut` says how many of those left.
    fn together(&self, rig: &mut Rig, mut cut: impl FnMut(usize) -> usize) -> Vec<Rows> {
        let mut sequences: Vec<Sequence> = (0..self.texts.len()).map(|i| self.open(rig, i)).collect();
        let mut rows = vec![Rows::default(); self.texts.len()];
        loop {
            let (mut chunks, mut who) = (Vec::new(), Vec::new());
            for (i, sequence) in sequences.iter_mut().enumerate() {
                let left = &self.texts[i][sequence.computed..];
                let take = cut(left.len()).min(left.len());
                if take > 0 {
                    chunks.push((sequence, &left[..take]));
                    who.push(i);
                }
            }
            if chunks.is_empty() {
                break;
            }
            for (i, found) in who.into_iter().zip(rig.step(&mut chunks)) {
                rows[i].extend(found);
            }
        }
        sequences.into_iter().for_each(|s| rig.close(s));
        rows
    }

    /// Bits where promised, else the table.
    fn rule(&self, rig: &Rig, expected: &[Vec<f32>]) -> Rule {
        Rule::of(rig, tolerance(self.kv, expected))
    }

    fn assert_all(&self, found: &[Rows], expected: &[Rows], rule: impl Fn(&[Vec<f32>]) -> Rule, what: &str) {
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let what = format!("{}, {:?}, text {i}, {what}", self.name, self.kv);
            assert_same(&found.logits, &expected.logits, rule(&expected.logits), &what);
        }
    }
}

fn op_cases() -> Vec<Case> {
    let mut random = Random::new(1);
    let graphs = tiny::single_ops(&mut random);
    graphs.into_iter().map(|(name, graph)| Case::of_op(name, graph, &mut random)).collect()
}

/// The reference, and the others.
fn reference_and_rest() -> (Box<dyn Backend>, Vec<Named>) {
    let mut all = backends();
    (all.remove(0).backend, all)
}

#[test]
fn candle_computes_what_the_ops_mean() {
    let (candle, _) = reference_and_rest();
    let mut cases = op_cases();
    cases.extend((0..MODELS).map(Case::of_model));
    for case in cases.iter_mut() {
        // Against f64 the stored type would only add its own rounding.
        case.kv = KvDType::F32;
        let expected: Vec<Rows> = case
            .texts
            .iter()
            .map(|tokens| Rows {
                logits: scalar::logits(&case.graph, &case.weights, tokens),
                tokens: Vec::new(),
            })
            .collect();
        let found = case.alone(&mut case.rig(&*candle));
        case.assert_all(&found, &expected, |e| Rule::Within(tolerance(case.kv, e)), "candle against f64");
    }
}

#[test]
fn every_op_equals_candles() {
    let (candle, rest) = reference_and_rest();
    for case in op_cases() {
        let expected = case.alone(&mut case.rig(&*candle));
        for Named { name, backend } in &rest {
            let mut rig = case.rig(&**backend);
            let what = format!("{} against candle", name);
            let alone = case.alone(&mut rig);
            case.assert_all(&alone, &expected, |e| Rule::Within(tolerance(case.kv, e)), &what);
            let one_by_one = case.together(&mut rig, |_| 1);
            case.assert_all(&one_by_one, &alone, |e| case.rule(&rig, e), &format!("{what}, one by one"));
        }
    }
}

#[test]
fn every_model_equals_candles() {
    let (candle, rest) = reference_and_rest();
    for case in (0..MODELS).map(Case::of_model) {
        let expected = case.alone(&mut case.rig(&*candle));
        for Named { name, backend } in &rest {
            let found = case.alone(&mut case.rig(&**backend));
            let what = format!("{} against candle", name);
            case.assert_all(&found, &expected, |e| Rule::Within(tolerance(case.kv, e)), &what);
        }
    }
}

#[test]
fn batch_chunks_and_page_numbers_change_nothing() {
    for seed in 0..MODELS {
        let case = Case::of_model(seed);
        for Named { name, backend } in backends() {
            let (mut rig, mut random) = (case.rig(&*backend), Random::new(seed));
            let expected = case.alone(&mut rig);
            let batched = case.together(&mut rig, |left| left);
            case.assert_all(&batched, &expected, |e| case.rule(&rig, e), &format!("{name}: batched"));
            rig.shuffle_pages(|pages| random.shuffle(pages));
            let one_by_one = case.together(&mut rig, |_| 1);
            case.assert_all(&one_by_one, &expected, |e| case.rule(&rig, e), &format!("{name}: one by one"));
            rig.shuffle_pages(|pages| random.shuffle(pages));
            let mixed = case.together(&mut rig, |left| if left > 0 { 1 + random.below(left) } else { 0 });
            case.assert_all(&mixed, &expected, |e| case.rule(&rig, e), &format!("{name}: mixed"));
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for seed in 0..MODELS / 3 {
        let case = Case::of_model(seed);
        for isa in Isa::supported() {
            let one = &mut case.rig(&*cpu(isa, 1).backend);
            let expected = case.together(one, |left| left);
            for Named { name, backend } in [cpu(isa, 2), cpu(isa, 3)] {
                let mut rig = case.rig(&*backend);
                assert_eq!(rig.numeric_class(), one.numeric_class());
                let found = case.together(&mut rig, |left| left);
                case.assert_all(&found, &expected, |_| Rule::Bits, &name);
            }
        }
    }
}

#[test]
fn a_fork_continues_as_its_parent_and_leaves_it_alone() {
    for seed in 0..MODELS {
        let case = Case::of_model(seed);
        for Named { name, backend } in backends() {
            let mut rig = case.rig(&*backend);
            let what = format!("{}, {}", case.name, name);
            let text = &case.texts[2];
            let (start, end) = text.split_at(45);
            let mut parent = case.open(&rig, 2);
            rig.prefill(&mut parent, start, start.len());
            // The fork goes another way first: its pages must be its own.
            let (astray, _) = rig.fork_and_step(&parent, &case.texts[1]);
            let (mut child, mut forked) = rig.fork_and_step(&parent, &end[..1]);
            forked.extend(rig.step(&mut [(&mut child, &end[1..])]).remove(0));
            let mut expected = rig.step(&mut [(&mut parent, &end[..1])]).remove(0);
            expected.extend(rig.step(&mut [(&mut parent, &end[1..])]).remove(0));
            // The same chunks on equal pages: candle too gives the same bits here.
            assert_same(&forked.logits, &expected.logits, Rule::Bits, &what);
            [parent, child, astray].into_iter().for_each(|s| rig.close(s));
        }
    }
}

#[test]
fn pages_that_were_read_and_written_elsewhere_continue_the_sequence() {
    for seed in 0..MODELS {
        let case = Case::of_model(seed);
        for Named { name, backend } in backends() {
            let (mut rig, mut random) = (case.rig(&*backend), Random::new(seed));
            let what = format!("{}, {}", case.name, name);
            let text = &case.texts[2];
            let (start, end) = text.split_at(40);
            let mut unbroken = case.open(&rig, 2);
            rig.prefill(&mut unbroken, start, start.len());
            let (bytes, table) = (rig.read(&unbroken), unbroken.rope_table);
            rig.shuffle_pages(|pages| random.shuffle(pages));
            let mut restored = rig.restore(start.len(), table, bytes.clone());
            assert_eq!(rig.read(&restored), bytes, "{what}: the same bytes come back");
            let expected = rig.step(&mut [(&mut unbroken, end)]).remove(0);
            let found = rig.step(&mut [(&mut restored, end)]).remove(0);
            assert_same(&found.logits, &expected.logits, Rule::Bits, &what);
            [unbroken, restored].into_iter().for_each(|s| rig.close(s));
            // An executor of the same class on the same model takes them as well.
            let mut other = case.rig(&*backend);
            let mut moved = other.restore(start.len(), table, bytes);
            let found = other.step(&mut [(&mut moved, end)]).remove(0);
            assert_same(&found.logits, &expected.logits, Rule::Bits, &format!("{what}, moved"));
        }
    }
}
