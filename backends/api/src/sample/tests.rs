//! Draws against naive references, and the promises of [`super::sample`] one by one.

use super::*;

/// A small generator for test data.
struct Seeded(u64);

impl Seeded {
    fn unit(&mut self) -> f32 {
        self.0 += 1;
        uniform(self.0, 7, 0, 0) as f32
    }

    fn logits(&mut self, len: usize, spread: f32) -> Vec<f32> {
        (0..len).map(|_| (self.unit() + self.unit() + self.unit() - 1.5) * spread).collect()
    }
}

fn sampling(edit: impl FnOnce(&mut Sampling)) -> Sampling {
    let mut s = Sampling { temperature: 1.0, ..Sampling::greedy() };
    edit(&mut s);
    s
}

fn row(sampling: Sampling) -> OutputRow {
    OutputRow { row: 0, position: 5, want: Want::Sample(sampling), top_logprobs: None }
}

fn run(logits: &[f32], row: &OutputRow, step: &Step) -> (Drawn, Vec<(u32, f32)>) {
    let mut top = Vec::new();
    let drawn = sample(logits, row, step, &mut SampleScratch::new(logits.len()), &mut top);
    (drawn.expect("finite logits"), top)
}

fn token(logits: &[f32], s: Sampling) -> u32 {
    run(logits, &row(s), &Step::default()).0.token
}

/// Tempered, filtered probabilities the plain way: f64, a full sort, no shortcuts.
fn naive_probabilities(logits: &[f32], s: &Sampling) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut p: Vec<f64> =
        logits.iter().map(|&l| (f64::from(l - max) / f64::from(s.temperature)).exp()).collect();
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if s.top_k > 0 {
        order.iter().skip(s.top_k).for_each(|&i| p[i] = 0.0);
    }
    let total: f64 = p.iter().sum();
    let mut mass = 0.0;
    for &i in &order {
        if s.top_p < 1.0 && mass >= f64::from(s.top_p) * total {
            p[i] = 0.0;
        }
        mass += p[i];
    }
    let best = p[order[0]];
    p.iter_mut().filter(|p| **p < f64::from(s.min_p) * best).for_each(|p| *p = 0.0);
    let total: f64 = p.iter().sum();
    p.iter().map(|p| p / total).collect()
}

/// Pearson's statistic of 40,000 seeded draws; tokens of tiny probability are pooled.
fn chi_square_per_degree(logits: &[f32], s: &Sampling) -> f64 {
    const DRAWS: u64 = 40_000;
    let expected = naive_probabilities(logits, s);
    let mut counts = vec![0f64; logits.len()];
    let (mut scratch, mut top, step) = (SampleScratch::new(logits.len()), Vec::new(), Step::default());
    for seed in 0..DRAWS {
        let row = row(Sampling { seed, ..s.clone() });
        let drawn = sample(logits, &row, &step, &mut scratch, &mut top).expect("finite logits");
        assert!(expected[drawn.token as usize] > 0.0, "token {} should have been dropped", drawn.token);
        counts[drawn.token as usize] += 1.0;
    }
    let (mut statistic, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
    for (&p, &count) in expected.iter().zip(&counts) {
        let expected = p * DRAWS as f64;
        if expected < 20.0 {
            rest = (rest.0 + expected, rest.1 + count);
        } else {
            statistic += (count - expected).powi(2) / expected;
            cells += 1.0;
        }
    }
    if rest.0 > 5.0 {
        statistic += (rest.1 - rest.0).powi(2) / rest.0;
        cells += 1.0;
    }
    if cells < 2.0 { 0.0 } else { statistic / (cells - 1.0) }
}

#[test]
fn draws_follow_the_filtered_distribution() {
    let logits = Seeded(1).logits(300, 3.0);
    let cases = [
        sampling(|_| {}),
        sampling(|s| s.temperature = 0.5),
        sampling(|s| s.temperature = 3.0),
        sampling(|s| s.top_k = 17),
        sampling(|s| s.top_p = 0.8),
        sampling(|s| s.min_p = 0.1),
        sampling(|s| (s.top_k, s.top_p, s.min_p, s.temperature) = (40, 0.7, 0.2, 1.5)),
        // More than the 64 tokens that the first look takes.
        sampling(|s| (s.top_p, s.temperature) = (0.95, 4.0)),
    ];
    for s in cases {
        let found = chi_square_per_degree(&logits, &s);
        assert!(found < 1.9, "chi-square per degree of freedom {found} for {s:?}");
    }
}

#[test]
fn a_draw_is_a_function_of_seed_choice_and_position() {
    let logits = Seeded(2).logits(500, 1.0);
    let at = |seed, choice, position| {
        let s = sampling(|s| (s.seed, s.choice) = (seed, choice));
        run(&logits, &OutputRow { position, ..row(s) }, &Step::default()).0.token
    };
    for i in 0..20 {
        assert_eq!(at(i, 0, 9), at(i, 0, 9));
    }
    let differ = |f: &dyn Fn(u64) -> (u32, u32)| (0..50).filter(|&i| f(i).0 != f(i).1).count();
    assert!(differ(&|i| (at(i, 0, 9), at(i + 1, 0, 9))) > 40);
    assert!(differ(&|i| (at(i, 0, 9), at(i, 1, 9))) > 40);
    assert!(differ(&|i| (at(i, 0, 9), at(i, 0, 10))) > 40);
}

#[test]
fn uniform_numbers_are_pinned() {
    // Stored sequences are continued with these numbers: changing them changes every seeded text.
    assert_eq!(uniform(0, 0, 0, 0).to_bits(), 0x3fc1_c13a_de1c_7e5c);
    assert_eq!(uniform(42, 1, 1000, 0).to_bits(), 0x3fe5_ac8b_35c3_3bf2);
    let mean: f64 = (0..10_000).map(|p| uniform(3, 0, p, 0)).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
    assert_ne!(uniform(1, 0, 5, 0), uniform(1, 0, 5, 1));
}

#[test]
fn greedy_takes_the_largest_logit_and_the_lowest_id_among_equals() {
    let mut logits = Seeded(3).logits(1000, 2.0);
    (logits[700], logits[300], logits[900]) = (9.0, 9.0, 9.0);
    assert_eq!(token(&logits, Sampling::greedy()), 300);
    assert_eq!(token(&logits, sampling(|s| (s.top_k, s.temperature) = (1, 2.0))), 300);
    assert_eq!(token(&logits, sampling(|s| s.top_p = 1e-6)), 300);
    assert_eq!(token(&[-0.0, 0.0], Sampling::greedy()), 0);
    let (_, top) =
        run(&logits, &OutputRow { top_logprobs: Some(3), ..row(Sampling::greedy()) }, &Step::default());
    assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [300, 700, 900]);
}

#[test]
fn greedy_finds_the_first_of_the_largest_wherever_it_is() {
    for len in [1, 31, 64, 200] {
        for place in 0..len {
            let mut logits: Vec<f32> = (0..len).map(|i| if i % 5 == 0 { f32::NAN } else { -2.0 }).collect();
            logits[place] = -1.0;
            logits[(place + 70).min(len - 1)] = -1.0;
            assert_eq!(token(&logits, Sampling::greedy()) as usize, place, "{place} of {len}");
        }
    }
}

#[test]
fn a_tiny_temperature_is_greedy_and_a_huge_one_uniform() {
    let logits = [1.0, 3.0, 2.0, f32::NEG_INFINITY];
    for seed in 0..200 {
        assert_eq!(token(&logits, sampling(|s| (s.temperature, s.seed) = (1e-38, seed))), 1);
        assert_ne!(token(&logits, sampling(|s| (s.temperature, s.seed) = (f32::INFINITY, seed))), 3);
    }
    let twos = (0..3000)
        .filter(|&seed| token(&logits, sampling(|s| (s.temperature, s.seed) = (f32::INFINITY, seed))) == 2);
    let count = twos.count();
    assert!((900..1100).contains(&count), "{count} of 3000");
}

#[test]
fn nan_never_wins_and_no_finite_logit_is_an_error() {
    let logits = [f32::NAN, 1.0, f32::NAN, 0.5];
    assert_eq!(token(&logits, Sampling::greedy()), 1);
    for seed in 0..100 {
        let one = token(&logits, sampling(|s| s.seed = seed));
        let two = token(&logits, sampling(|s| (s.seed, s.top_k) = (seed, 3)));
        assert!([1, 3].contains(&one) && [1, 3].contains(&two));
    }
    let listed = OutputRow { top_logprobs: Some(4), ..row(Sampling::greedy()) };
    assert_eq!(run(&logits, &listed, &Step::default()).1.len(), 2);
    for bad in [[f32::NAN; 3], [f32::NEG_INFINITY; 3], [0.0, f32::INFINITY, 1.0]] {
        let found = sample(
            &bad,
            &row(Sampling::greedy()),
            &Step::default(),
            &mut SampleScratch::new(3),
            &mut Vec::new(),
        );
        assert!(found.expect_err("no logit can win").to_string().contains("logits are not finite"));
    }
}

#[test]
fn biases_force_ban_and_add_up() {
    let logits = Seeded(4).logits(200, 3.0);
    let best = token(&logits, Sampling::greedy());
    let step = Step {
        biases: vec![(9, 100.0), (best, f32::NEG_INFINITY), (7, 60.0), (7, 60.0), (5000, 100.0)],
        ..Step::default()
    };
    let with = |temperature, bias: std::ops::Range<usize>, seed| {
        run(&logits, &row(Sampling { temperature, bias, seed, ..Sampling::greedy() }), &step).0.token
    };
    for seed in 0..100 {
        assert_eq!(with(1.0, 0..1, seed), 9);
        assert_ne!(with(5.0, 1..2, seed), best);
        assert_eq!(with(1.0, 0..5, seed), 7);
    }
    assert_ne!(with(0.0, 1..2, 0), best);
    assert_eq!(with(0.0, 4..5, 0), best);
}

#[test]
fn penalties_equal_the_plain_formulas() {
    let mut seeded = Seeded(5);
    for _ in 0..50 {
        let logits = seeded.logits(40, 2.0);
        let history: Vec<u32> = (0..30).map(|_| (seeded.unit() * 40.0) as u32).collect();
        let prompt_len = (seeded.unit() * 30.0) as usize;
        let s = Sampling {
            repetition_penalty: 1.0 + seeded.unit(),
            presence_penalty: seeded.unit() * 2.0 - 1.0,
            frequency_penalty: seeded.unit() - 0.5,
            history: 0..30,
            prompt_len,
            ..Sampling::greedy()
        };
        let mut expected = logits.clone();
        for (id, l) in expected.iter_mut().enumerate() {
            if history.contains(&(id as u32)) {
                *l = if *l > 0.0 { *l / s.repetition_penalty } else { *l * s.repetition_penalty };
            }
            let generated = history[prompt_len..].iter().filter(|&&t| t == id as u32).count();
            if generated > 0 {
                *l -= s.frequency_penalty * generated as f32 + s.presence_penalty;
            }
        }
        let mut found = logits.clone();
        let mut seen = vec![0; 40];
        penalise(&mut found, &s, &history, &mut seen);
        assert_eq!(found, expected);
        assert!(seen.iter().all(|&n| n == 0));
        let step = Step { history, ..Step::default() };
        assert_eq!(run(&logits, &row(s), &step).0.token, token(&expected, Sampling::greedy()));
    }
}

#[test]
fn logprobs_are_of_the_raw_logits_and_the_same_bits_everywhere() {
    let logits = Seeded(6).logits(1000, 4.0);
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = logits.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln();
    let expected = |id: u32| f64::from(logits[id as usize]) - f64::from(max) - log_sum;
    let step = Step { biases: vec![(3, 100.0)], ..Step::default() };
    for count in [0, 1, 5, 20, 300, 2000] {
        let s = sampling(|s| (s.bias, s.temperature, s.seed) = (0..1, 2.0, count as u64));
        let (drawn, top) = run(&logits, &OutputRow { top_logprobs: Some(count), ..row(s) }, &step);
        assert_eq!(drawn.token, 3);
        assert!((f64::from(drawn.logprob) - expected(3)).abs() < 2e-6);
        assert_eq!(top.len(), count.min(1000));
        assert!(top.windows(2).all(|w| w[0].1 >= w[1].1));
        for &(id, logprob) in &top {
            assert!((f64::from(logprob) - expected(id)).abs() < 2e-6);
            let score = OutputRow { want: Want::Score(id), ..row(Sampling::greedy()) };
            let (scored, none) = run(&logits, &score, &step);
            assert_eq!((scored.token, scored.logprob.to_bits()), (id, logprob.to_bits()));
            assert!(none.is_empty());
        }
    }
}

#[test]
fn selecting_equals_sorting() {
    let mut seeded = Seeded(7);
    let mut keys = Vec::new();
    for len in [1, 5, 255, 256, 257, 3000] {
        // Rounded, so that there are many ties; adding 0 leaves no -0, which `total_cmp` would order below 0.
        let mut logits: Vec<f32> = seeded.logits(len, 20.0).iter().map(|l| l.round() + 0.0).collect();
        logits[len / 2] = f32::NAN;
        let mut order: Vec<usize> = (0..len).filter(|&i| !logits[i].is_nan()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        for count in [0, 1, 2, 100, 256, len] {
            let count = count.min(len);
            select_largest(&logits, count, &mut keys);
            let found: Vec<usize> = keys.iter().map(|&k| id_of(k) as usize).collect();
            assert_eq!(found, order[..count.min(order.len())], "{count} of {len}");
        }
    }
}

#[test]
fn the_exponential_is_accurate_and_monotone() {
    let mut last = 0.0;
    for i in (0..87_000).rev() {
        let x = -(i as f32) / 1000.0;
        let (found, expected) = (exp(x), f64::from(x).exp());
        assert!((f64::from(found) - expected).abs() <= expected * 1.8e-7, "e^{x}: {found}, not {expected}");
        assert!(found >= last);
        last = found;
    }
    assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY), exp(f32::NAN)), (1.0, 0.0, 0.0, 0.0));
}

#[test]
fn nothing_grows_after_the_first_rows() {
    let logits = Seeded(8).logits(5000, 0.1);
    let mut scratch = SampleScratch::new(5000);
    let sizes = |s: &SampleScratch| {
        (s.adjusted.capacity(), s.weights.capacity(), s.seen.capacity(), s.keys.capacity())
    };
    let before = sizes(&scratch);
    let step = Step { biases: vec![(1, 1.0)], history: vec![2; 10], ..Step::default() };
    let s = sampling(|s| {
        (s.top_p, s.repetition_penalty, s.bias, s.history) = (0.99, 1.5, 0..1, 0..10);
    });
    let row = OutputRow { top_logprobs: Some(5000), ..row(s) };
    sample(&logits, &row, &step, &mut scratch, &mut Vec::new()).expect("finite logits");
    assert_eq!(sizes(&scratch), before);
}

#[test]
fn rows_fill_an_output() {
    let logits = [0.0, 1.0, 2.0, 3.0, 2.0, 1.0];
    let outputs = vec![
        row(Sampling::greedy()),
        OutputRow { top_logprobs: Some(2), want: Want::Score(1), ..row(Sampling::greedy()) },
    ];
    let step = Step { outputs, return_logits: true, ..Step::default() };
    let mut out = StepOutput::default();
    for _ in 0..2 {
        sample_rows(&logits, &step, &mut SampleScratch::new(3), &mut out).expect("finite logits");
        assert_eq!(out.tokens, [2, 1]);
        assert_eq!(out.logprobs[0], 0.0);
        assert!(out.top_logprobs[0].is_empty());
        assert_eq!(out.top_logprobs[1].iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(out.logprobs[1].to_bits(), out.top_logprobs[1][1].1.to_bits());
        assert_eq!(out.logits, logits);
    }
}

#[test]
fn what_a_mask_lacks_is_never_drawn_and_its_probability_is_told() {
    let logits: Vec<f32> = (0..70).map(|id| (id * 37 % 70) as f32 / 9.0).collect();
    let mask = vec![1 << 3 | 1 << 31, 1 << 2];
    let biases = vec![(3, -5.0), (50, 100.0)];
    let step = Step { masks: mask, biases, history: vec![3, 3, 34], ..Step::default() };
    let mut seen = [0; 70];
    for seed in 0..400 {
        let s = Sampling {
            temperature: 1.5,
            seed,
            mask: Some(0..2),
            bias: 0..2,
            history: 0..3,
            frequency_penalty: 0.5,
            ..Sampling::greedy()
        };
        let mut row = row(s.clone());
        row.top_logprobs = Some(70);
        let (drawn, top) = run(&logits, &row, &step);
        seen[drawn.token as usize] += 1;
        assert!(top.contains(&(drawn.token, drawn.logprob)) && top.len() == 70);
        row.want = Want::Sample(Sampling { top_k: 2, top_p: 0.9, ..s.clone() });
        assert!([3, 31, 34].contains(&run(&logits, &row, &step).0.token));
        row.want = Want::Sample(Sampling { mask: Some(1..2), ..s });
        assert_eq!(run(&logits, &row, &step).0.token, 2, "the second word alone begins at token 0");
    }
    assert_eq!(seen.iter().sum::<i32>(), seen[3] + seen[31] + seen[34], "{seen:?}");
    assert!(seen[31] > 0 && seen[34] > 0, "{seen:?}");
    let nothing = row(Sampling { mask: Some(0..0), ..Sampling::greedy() });
    let mut scratch = SampleScratch::new(70);
    assert!(sample(&logits, &nothing, &step, &mut scratch, &mut Vec::new()).is_err());
}
