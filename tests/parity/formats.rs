//! Every family with its matrices in blocks: the cpu backend, which computes with the integers of blocks and rounds rows
//! to 8 bits, beside candle, which computes with the numbers that the blocks stand for.

use mainstay_backend_api::KvDType;
use mainstay_backend_candle::CandleBackend;
use mainstay_kernels_cpu::Isa;
use mainstay_models::quant::{can_encode, encode_row};
use mainstay_models::weights::{AtLoad, DType};
use mainstay_models::{Model, Weights};

use crate::harness::{Rig, Rows, cpu};
use crate::reference::{Prompt, fixture, prompts};
use crate::{BLOCKS_MARGIN, FAMILIES, open};

/// What rounding rows to 8 bits may do to logits: root mean square over their standard deviation.
const APART_MAX: f64 = 0.04;
/// Where a row goes to another expert for it, its result is another: random experts agree in nothing.
const ROUTED: [&str; 3] = ["deepseek_v3", "gpt_oss", "qwen3_moe"];
const APART_MAX_ROUTED: f64 = 0.3;
/// The least share of equal greedy tokens: those of random weights are narrow decisions.
const EQUAL_MIN: f64 = 0.9;

/// Puts the matrices of a model into blocks.
fn in_blocks(weights: &mut Weights, dtype: DType) -> usize {
    let is_matrix = |name: &&str| weights.type_at_load(name, AtLoad::Q8).is_some();
    let names: Vec<String> = weights.names().filter(is_matrix).map(str::to_owned).collect();
    for name in &names {
        let view = weights.tensor(name).unwrap_or_else(|e| panic!("{e}"));
        let row_bytes = dtype.row_bytes(view.cols()).expect("rows of whole blocks");
        let mut bytes = vec![0; row_bytes * view.rows()];
        let mut row = vec![0.0; view.cols()];
        for (at, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
            view.read_row(at, &mut row);
            encode_row(dtype, &row, out);
        }
        weights.replace(name, dtype, bytes);
    }
    names.len()
}

/// The prompt and what candle says after it, and the rows of all these tokens but the last.
fn told(rig: &mut Rig, prompt: &Prompt) -> (Vec<u32>, Rows) {
    let mut fed = prompt.ids.clone();
    let mut sequence = rig.open_for(fed.len() + prompt.greedy.len());
    let mut rows = rig.step(&mut [(&mut sequence, &prompt.ids)]).remove(0);
    while fed.len() < prompt.ids.len() + prompt.greedy.len() - 1 {
        let next = *rows.tokens.last().expect("a row");
        fed.push(next);
        rows.extend(rig.step(&mut [(&mut sequence, &[next])]).remove(0));
    }
    rig.close(sequence);
    (fed, rows)
}

fn heard(rig: &mut Rig, fed: &[u32], len: usize) -> Rows {
    let mut sequence = rig.open_for(len);
    let rows = rig.prefill(&mut sequence, fed, 40);
    rig.close(sequence);
    rows
}

/// How much the largest exceeds all others.
fn margin(logits: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; 2];
    for &x in logits {
        best = if x > best[0] { [x, best[0]] } else { [best[0], best[1].max(x)] };
    }
    best[0] - best[1]
}

#[derive(Default)]
struct Found {
    error: f64,
    spread: f64,
    equal: usize,
    all: usize,
    clear: usize,
    clear_and_other: usize,
}

impl Found {
    /// Counts the predicted tokens from the end of the prompt on, and the distances of all logits.
    fn add(&mut self, prompt: &Prompt, expected: &Rows, found: &Rows) {
        for (expected, found) in expected.logits.iter().zip(&found.logits) {
            let mean = expected.iter().map(|x| f64::from(*x)).sum::<f64>() / expected.len() as f64;
            self.spread += expected.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
            self.error += expected.iter().zip(found).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        }
        for at in prompt.ids.len() - 1..expected.tokens.len() {
            let is_equal = found.tokens[at] == expected.tokens[at];
            let margin = margin(&expected.logits[at]);
            self.equal += usize::from(is_equal);
            self.clear += usize::from(margin >= BLOCKS_MARGIN);
            self.clear_and_other += usize::from(margin >= BLOCKS_MARGIN && !is_equal);
            self.all += 1;
        }
    }
}

/// Prints the rows of the table in docs/models.md.
#[test]
#[expect(clippy::print_stdout, reason = "what was measured is shown with --nocapture")]
fn every_family_runs_from_every_format_that_its_rows_fill() {
    for family in FAMILIES {
        let dir = fixture(family);
        let prompts = prompts(&dir);
        for dtype in DType::BLOCKS.into_iter().filter(|dtype| can_encode(*dtype)) {
            if dtype.format().is_none_or(|format| format.block_len > 32) {
                continue;
            }
            let Model { graph, mut weights, .. } = open(&dir);
            assert!(in_blocks(&mut weights, dtype) > 4, "{family}: few matrices");
            let what = format!("{family} in {dtype:?}");
            let mut candle = Rig::new(&CandleBackend::cpu(), &graph, &weights, KvDType::F32);
            let mut own = Rig::new(&*cpu(Isa::best(), 2).backend, &graph, &weights, KvDType::F32);
            let mut sum = Found::default();
            for prompt in &prompts {
                let (fed, expected) = told(&mut candle, prompt);
                let found = heard(&mut own, &fed, prompt.ids.len() + prompt.greedy.len());
                sum.add(prompt, &expected, &found);
            }
            let apart = (sum.error / sum.spread).sqrt();
            let Found { equal, all, clear, clear_and_other, .. } = sum;
            println!("{what}: {apart:.4} apart, {equal} of {all} equal, {clear} of them clear");
            let share = equal as f64 / all as f64;
            let most = if ROUTED.contains(&family) { APART_MAX_ROUTED } else { APART_MAX };
            // Not the same numbers either: the integers were used.
            assert!(apart < most && apart > 1e-4, "{what}: {apart} of a standard deviation apart");
            assert!(share > EQUAL_MIN, "{what}: {equal} of {all} tokens are equal");
            let is_clear = clear_and_other == 0 || ROUTED.contains(&family);
            assert!(is_clear, "{what}: tokens differ whose margin exceeds {BLOCKS_MARGIN}");
        }
    }
}
