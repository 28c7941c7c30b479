//! Drawing a token from logits: the one reference that every backend is held to.
//!
//! Everything here is plain f32 and f64 arithmetic in one fixed order with an own exponential, so equal logits give
//! equal tokens on every machine. Nothing is allocated once [`SampleScratch`] has seen the vocabulary.

use crate::StepError;
use crate::step::{OutputRow, Sampling, Step, StepOutput, Want};

/// Memory that [`sample`] reuses between rows; one per thread.
#[derive(Debug, Default)]
pub struct SampleScratch {
    /// Logits after mask, bias and penalties, `[vocab]`.
    adjusted: Vec<f32>,
    /// Unnormalised probabilities after temperature, `[vocab]`.
    weights: Vec<f32>,
    /// What the history holds of each token, `[vocab]`: all 0 between calls.
    seen: Vec<u32>,
    /// Candidates in the order of [`key`].
    keys: Vec<u64>,
}

impl SampleScratch {
    /// Memory for a vocabulary.
    pub fn new(vocab: usize) -> Self {
        Self {
            adjusted: Vec::with_capacity(vocab),
            weights: Vec::with_capacity(vocab),
            seen: vec![0; vocab],
            keys: Vec::with_capacity(vocab.max(KEYS_MIN)),
        }
    }
}

/// What became of one output row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// The drawn token, or the scored one.
    pub token: u32,
    /// As [`StepOutput::logprobs`].
    pub logprob: f32,
}

/// Turns the logits `[vocab]` of one row into a token as [`Sampling`] says, and overwrites `top` with the most
/// probable tokens that [`OutputRow::top_logprobs`] asks for, most probable first (fewer where fewer are possible).
///
/// A NaN counts as an impossible token. Ids outside the vocabulary in biases and history have no effect.
///
/// # Errors
/// [`StepError::Device`] if a logit is infinite, none is finite, or mask and bias leave no token.
///
/// # Panics
/// If the token to score is outside the vocabulary.
pub fn sample(
    logits: &[f32],
    row: &OutputRow,
    step: &Step,
    scratch: &mut SampleScratch,
    top: &mut Vec<(u32, f32)>,
) -> Result<Drawn, StepError> {
    top.clear();
    let max = largest_finite(logits)?;
    let scored = matches!(row.want, Want::Score(_));
    let probability = if scored || row.top_logprobs.is_some() {
        Some(LogSoftmax::of(logits, max, &mut scratch.weights))
    } else {
        None
    };
    if let (Some(count), Some(p)) = (row.top_logprobs, &probability) {
        select_largest(logits, count.min(logits.len()), &mut scratch.keys);
        top.extend(scratch.keys.iter().map(|&k| (id_of(k), p.at(logits[id_of(k) as usize]))));
    }
    let token = match &row.want {
        Want::Score(token) => *token,
        Want::Sample(sampling) => draw(logits, max, &Draw { sampling, row, step }, scratch)?,
    };
    assert!((token as usize) < logits.len(), "token {token} is outside a vocabulary of {}", logits.len());
    Ok(Drawn { token, logprob: probability.map_or(0.0, |p| p.at(logits[token as usize])) })
}

/// [`sample`] for all output rows of a step in order, from logits `[outputs, vocab]`; overwrites `out`.
///
/// # Errors
/// As [`sample`].
pub fn sample_rows(
    logits: &[f32],
    step: &Step,
    scratch: &mut SampleScratch,
    out: &mut StepOutput,
) -> Result<(), StepError> {
    out.reset(step.outputs.len());
    if step.outputs.is_empty() {
        return Ok(());
    }
    let vocab = logits.len() / step.outputs.len();
    for (i, (row, logits)) in step.outputs.iter().zip(logits.chunks_exact(vocab)).enumerate() {
        let drawn = sample(logits, row, step, scratch, &mut out.top_logprobs[i])?;
        out.tokens[i] = drawn.token;
        out.logprobs[i] = drawn.logprob;
    }
    if step.return_logits {
        out.logits.extend_from_slice(logits);
    }
    Ok(())
}

/// A number in [0, 1) that is a function of its arguments alone: each is folded in by one round of the SplitMix64
/// finaliser (Steele, Lea, Flood 2014). `draw` numbers the draws at one position; the first is 0.
pub fn uniform(seed: u64, choice: u32, position: usize, draw: u32) -> f64 {
    let fold = |h: u64, x: u64| {
        let mut z = (h ^ x).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let h = fold(fold(fold(0, seed), u64::from(choice) << 32 | u64::from(draw)), position as u64);
    (h >> 11) as f64 / (1u64 << 53) as f64
}

/// What a draw depends on besides the logits.
struct Draw<'a> {
    sampling: &'a Sampling,
    row: &'a OutputRow,
    step: &'a Step,
}

fn draw(logits: &[f32], max: f32, what: &Draw, scratch: &mut SampleScratch) -> Result<u32, StepError> {
    let SampleScratch { adjusted, weights, seen, keys } = scratch;
    let s = what.sampling;
    let penalised = s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
    let (logits, max) = if penalised || !s.bias.is_empty() || s.mask.is_some() {
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        if let Some(mask) = s.mask.clone() {
            forbid(adjusted, &what.step.masks[mask]);
        }
        for &(id, bias) in &what.step.biases[s.bias.clone()] {
            if let Some(l) = adjusted.get_mut(id as usize) {
                *l += bias;
            }
        }
        if penalised {
            seen.resize(adjusted.len(), 0);
            penalise(adjusted, s, &what.step.history[s.history.clone()], seen);
        }
        (&adjusted[..], largest_finite(adjusted)?)
    } else {
        (logits, max)
    };
    // An unusable temperature is greedy too: NaN fails this comparison.
    let at_random = s.temperature > 0.0 && s.top_k != 1;
    if !at_random {
        // A chunk is searched without a branch for each logit.
        let here = |chunk: &[f32]| chunk.iter().fold(false, |found, &l| found | (l == max));
        let chunk = logits.chunks(64).position(here).expect("the largest logit is one of them");
        let first = logits[chunk * 64..].iter().take_while(|&&l| l != max).count();
        return Ok((chunk * 64 + first) as u32);
    }
    let random = uniform(s.seed, s.choice, what.row.position, 0);
    if s.top_k == 0 && s.top_p >= 1.0 {
        return Ok(draw_from_all(logits, max, s, random, weights));
    }
    keep_top(logits, max, s, weights, keys);
    let weight = |&k: &u64| f64::from(exp((logits[id_of(k) as usize] - max) / s.temperature));
    let total: f64 = keys.iter().map(weight).sum();
    let index = pick(keys.iter().map(weight), random * total).expect("the most probable token is kept");
    Ok(id_of(keys[index]))
}

/// Makes what is not in the mask impossible: no bias and no penalty brings it back.
fn forbid(logits: &mut [f32], mask: &[u32]) {
    let words = mask.iter().copied().chain(std::iter::repeat(0));
    for (logits, word) in logits.chunks_mut(u32::BITS as usize).zip(words) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Repetition counts the whole history, presence and frequency what comes after the prompt.
fn penalise(logits: &mut [f32], s: &Sampling, history: &[u32], seen: &mut [u32]) {
    const SEEN: u32 = 1 << 31;
    for (i, &id) in history.iter().enumerate() {
        if let Some(entry) = seen.get_mut(id as usize) {
            *entry |= SEEN;
            *entry += u32::from(i >= s.prompt_len);
        }
    }
    for &id in history {
        let Some(entry) = seen.get_mut(id as usize).map(std::mem::take).filter(|&e| e != 0) else { continue };
        let generated = entry & !SEEN;
        let l = &mut logits[id as usize];
        *l = if *l > 0.0 { *l / s.repetition_penalty } else { *l * s.repetition_penalty };
        if generated > 0 {
            *l -= s.frequency_penalty * generated as f32 + s.presence_penalty;
        }
    }
}

/// Draws in order of ids; min-p needs no order, because the most probable token's weight is 1.
fn draw_from_all(logits: &[f32], max: f32, s: &Sampling, random: f64, weights: &mut Vec<f32>) -> u32 {
    fill_weights(logits, max, s.temperature, weights);
    if s.min_p > 0.0 {
        let least = s.min_p.min(1.0);
        weights.iter_mut().for_each(|w| *w = if *w >= least { *w } else { 0.0 });
    }
    let index = pick(weights.iter().map(|&w| f64::from(w)), random * sum(weights));
    index.expect("the most probable token has weight 1") as u32
}

/// Leaves in `keys`, most probable first, the tokens that top-k, top-p and min-p keep.
fn keep_top(logits: &[f32], max: f32, s: &Sampling, weights: &mut Vec<f32>, keys: &mut Vec<u64>) {
    let weight = |k: u64| f64::from(exp((logits[id_of(k) as usize] - max) / s.temperature));
    let top_k = if s.top_k == 0 { logits.len() } else { s.top_k.min(logits.len()) };
    let mut total = None;
    if s.top_k == 0 {
        fill_weights(logits, max, s.temperature, weights);
        total = Some(sum(weights));
    }
    // The mass that top-p asks for usually lies in few tokens, so look at few first.
    let mut count = if s.top_k == 0 { top_k.min(64) } else { top_k };
    loop {
        select_largest(logits, count, keys);
        let total = total.unwrap_or_else(|| keys.iter().map(|&k| weight(k)).sum());
        let (wanted, mut mass) = (f64::from(s.top_p) * total, 0.0);
        let reached = keys.iter().position(|&k| {
            mass += weight(k);
            mass >= wanted
        });
        if s.top_p < 1.0
            && let Some(last) = reached
        {
            keys.truncate(last + 1);
            break;
        }
        if count == top_k {
            break;
        }
        count = (count * 8).min(top_k);
    }
    let least = f64::from(s.min_p.min(1.0));
    keys.retain(|&k| weight(k) >= least);
}

/// The index at which the running sum of the weights passes `target`; the last possible index if rounding keeps it
/// from passing, and `None` if all weights are 0.
fn pick(weights: impl Iterator<Item = f64>, target: f64) -> Option<usize> {
    let (mut mass, mut last) = (0.0, None);
    for (i, w) in weights.enumerate().filter(|&(_, w)| w > 0.0) {
        mass += w;
        last = Some(i);
        if mass > target {
            break;
        }
    }
    last
}

/// The natural-log probabilities of one row.
struct LogSoftmax {
    max: f32,
    log_sum: f64,
}

impl LogSoftmax {
    fn of(logits: &[f32], max: f32, weights: &mut Vec<f32>) -> Self {
        fill_weights(logits, max, 1.0, weights);
        Self { max, log_sum: sum(weights).ln() }
    }

    /// One expression for the chosen token and for lists, so that both show the same bits.
    fn at(&self, logit: f32) -> f32 {
        let logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit };
        ((f64::from(logit) - f64::from(self.max)) - self.log_sum) as f32
    }
}

fn largest_finite(logits: &[f32]) -> Result<f32, StepError> {
    // A comparison with NaN is false, so NaN never wins.
    let larger = |m: f32, l: f32| if l > m { l } else { m };
    // In lanes, so that a comparison does not wait for the one before.
    let mut lanes = [f32::NEG_INFINITY; 32];
    let (chunks, rest) = logits.as_chunks::<32>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(m, &l)| *m = larger(*m, l));
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &l| larger(m, l));
    if max.is_finite() {
        Ok(max)
    } else {
        Err(StepError::Device { device: "sampling", what: format!("logits are not finite (largest: {max})") })
    }
}

fn fill_weights(logits: &[f32], max: f32, temperature: f32, weights: &mut Vec<f32>) {
    weights.clear();
    weights.extend(logits.iter().map(|&l| exp((l - max) / temperature)));
}

/// In eight lanes, then over the lanes: one order for every length, and short dependency chains.
fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    for chunk in weights.chunks(8) {
        for (lane, &w) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(w);
        }
    }
    lanes.iter().sum()
}

/// e^x for x <= 0 within 2 ulp, 0 below the normal numbers and for NaN. The polynomial is that of Cephes' `expf`
/// (Moshier 1992) on [-ln 2 / 2, ln 2 / 2].
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let inside = x >= -87.0;
    let x = if inside { x } else { 0.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        p = p * r + c;
    }
    // The low bits of `shifted` are n, so moving them into the exponent of 1 gives 2^n.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()));
    if inside { (p * r * r + r + 1.0) * scale } else { 0.0 }
}

/// Room that [`select_largest`] keeps for candidates at least.
const KEYS_MIN: usize = 256;

/// Larger for larger logits and, among equals, for lower ids.
fn key(id: usize, logit: f32) -> u64 {
    // Adding 0 makes -0 and 0 equal; flipping makes the order of the bits that of the numbers.
    let bits = (logit + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!(id as u32))
}

fn id_of(key: u64) -> u32 {
    !(key as u32)
}

/// Leaves the keys of the `count` largest possible logits in `keys`, descending. One pass: a key enters only if it
/// beats the `count`-th best so far, which is brought up to date whenever the room is full.
fn select_largest(logits: &[f32], count: usize, keys: &mut Vec<u64>) {
    keys.clear();
    if count == 0 {
        return;
    }
    let room = (count * 2).max(KEYS_MIN).min(logits.len());
    let (mut least, mut least_logit) = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        // Impossible tokens (-inf and NaN) fail the second comparison.
        if logit >= least_logit && logit > f32::NEG_INFINITY && key(id, logit) > least {
            if keys.len() == room {
                keys.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
                keys.truncate(count);
                least = keys[count - 1];
                least_logit = logits[id_of(least) as usize];
            }
            if key(id, logit) > least {
                keys.push(key(id, logit));
            }
        }
    }
    keys.sort_unstable_by(|a, b| b.cmp(a));
    keys.truncate(count);
}

#[cfg(test)]
mod tests;
