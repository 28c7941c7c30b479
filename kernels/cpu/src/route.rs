//! Routing of a row to experts: which of them it goes to and how much each counts, by one sequence of roundings.

use crate::Kernels;
use crate::math::Function;

/// What makes weights of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// exp(x) over the sum of all, added up in order
    Softmax,
    /// 1 / (1 + exp(-x))
    Sigmoid,
}

/// Which scores the function sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// All; experts are chosen by its results.
    Scored,
    /// Those of the chosen experts; they are chosen by the scores themselves.
    Raw,
}

/// How a row is routed.
#[derive(Clone, Copy, Debug)]
pub struct Router<'a> {
    /// The function.
    pub scoring: Scoring,
    /// What it sees.
    pub choice: Choice,
    /// Added to what the choice is made by, one for each expert.
    pub bias: Option<&'a [f32]>,
    /// Groups of neighbouring experts, and how many of them are chosen from: those whose two best together are best.
    pub groups: Option<(usize, usize)>,
    /// Experts of a row.
    pub top_k: usize,
    /// Whether weights are divided by their sum, plus 1e-20.
    pub renormalise: bool,
    /// Multiplies weights in the end.
    pub scale: f32,
}

/// Keeps the sum of weights from being 0.
const SUM_MIN: f32 = 1e-20;

/// Floats of scratch that routing to `experts` experts needs.
pub fn route_scratch_len(experts: usize) -> usize {
    3 * experts
}

impl Kernels {
    /// Routes one row by its scores, one for each expert: `out[..top_k]` are the chosen experts' ids, ascending,
    /// `out[top_k..]` their weights in the same order. Of equal experts the one of lower id is chosen.
    ///
    /// # Panics
    /// If the lengths do not fit together, or there are not as many experts to choose.
    pub fn route(&self, router: &Router<'_>, scores: &[f32], scratch: &mut [f32], out: &mut [f32]) {
        let (count, top_k) = (scores.len(), router.top_k);
        assert_eq!(out.len(), 2 * top_k, "ids and weights of {top_k} experts");
        let (values, rest) = scratch[..route_scratch_len(count)].split_at_mut(count);
        let (merits, groups) = rest.split_at_mut(count);
        values.copy_from_slice(scores);
        if router.choice == Choice::Scored {
            self.score(router.scoring, values);
        }
        merits.copy_from_slice(values);
        if let Some(bias) = router.bias {
            merits.iter_mut().zip(&bias[..count]).for_each(|(m, b)| *m += b);
        }
        // From here on, NaN marks what is not to be chosen.
        merits.iter_mut().filter(|m| m.is_nan()).for_each(|m| *m = f32::NEG_INFINITY);
        if let Some((number, kept)) = router.groups {
            drop_groups(merits, &mut groups[..number], kept);
        }
        let (ids, weights) = out.split_at_mut(top_k);
        for id in ids.iter_mut() {
            *id = take_best(merits) as f32;
        }
        ids.sort_unstable_by(f32::total_cmp);
        weights.iter_mut().zip(ids).for_each(|(w, id)| *w = values[*id as usize]);
        if router.choice == Choice::Raw {
            self.score(router.scoring, weights);
        }
        if router.renormalise {
            let sum = weights.iter().fold(0.0, |sum, w| sum + w) + SUM_MIN;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= router.scale);
    }

    fn score(&self, scoring: Scoring, values: &mut [f32]) {
        match scoring {
            Scoring::Sigmoid => self.activate(Function::Sigmoid, values),
            Scoring::Softmax => {
                let largest = values.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
                values.iter_mut().for_each(|v| *v -= largest);
                self.activate(Function::Exp, values);
                let sum = values.iter().fold(0.0, |sum, v| sum + v);
                values.iter_mut().for_each(|v| *v /= sum);
            }
        }
    }
}

/// Marks the experts of all groups but the `kept` best.
fn drop_groups(merits: &mut [f32], groups: &mut [f32], kept: usize) {
    let size = merits.len() / groups.len();
    for (group, merits) in groups.iter_mut().zip(merits.chunks_exact(size)) {
        let mut best = [f32::NEG_INFINITY; 2];
        for &merit in merits {
            if merit > best[0] {
                best = [merit, best[0]];
            } else if merit > best[1] {
                best[1] = merit;
            }
        }
        *group = if size == 1 { best[0] } else { best[0] + best[1] };
    }
    for _ in 0..kept {
        take_best(groups);
    }
    for (_, merits) in groups.iter().zip(merits.chunks_exact_mut(size)).filter(|(group, _)| !group.is_nan()) {
        merits.fill(f32::NAN);
    }
}

/// The index of the largest number, which becomes NaN.
///
/// # Panics
/// If all are NaN.
fn take_best(numbers: &mut [f32]) -> usize {
    let mut best: Option<usize> = None;
    for (i, number) in numbers.iter().enumerate() {
        if !number.is_nan() && best.is_none_or(|b| *number > numbers[b]) {
            best = Some(i);
        }
    }
    let best = best.unwrap_or_else(|| panic!("nothing left to choose of {}", numbers.len()));
    numbers[best] = f32::NAN;
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    const PLAIN: Router<'static> = Router {
        scoring: Scoring::Softmax,
        choice: Choice::Scored,
        bias: None,
        groups: None,
        top_k: 2,
        renormalise: false,
        scale: 1.0,
    };

    /// The same bits on every instruction set.
    fn route(router: &Router<'_>, scores: &[f32]) -> (Vec<usize>, Vec<f32>) {
        let mut results = Isa::supported().map(|isa| {
            let mut out = vec![f32::NAN; 2 * router.top_k];
            let mut scratch = vec![f32::NAN; route_scratch_len(scores.len())];
            Kernels::new(isa).unwrap().route(router, scores, &mut scratch, &mut out);
            out
        });
        let first = results.next().unwrap();
        let bits = |out: &[f32]| out.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        results.for_each(|other| assert_eq!(bits(&other), bits(&first)));
        let ids = first[..router.top_k].iter().map(|&id| id as usize).collect();
        (ids, first[router.top_k..].to_vec())
    }

    fn assert_close(found: &[f32], wanted: &[f64]) {
        for (f, w) in found.iter().zip(wanted) {
            assert!((f64::from(*f) - w).abs() < 1e-6, "{found:?}, expected {wanted:?}");
        }
    }

    #[test]
    fn softmax_before_and_after_the_choice() {
        let scores = [0.5f32, -1.0, 2.0, 1.5, 0.0];
        let powers = scores.map(|s| f64::from(s).exp());
        let (all, two) = (powers.iter().sum::<f64>(), powers[2] + powers[3]);
        let (ids, weights) = route(&PLAIN, &scores);
        assert_eq!(ids, [2, 3]);
        assert_close(&weights, &[powers[2] / all, powers[3] / all]);
        let (ids, weights) = route(&Router { renormalise: true, scale: 2.5, ..PLAIN }, &scores);
        assert_eq!(ids, [2, 3]);
        assert_close(&weights, &[2.5 * powers[2] / two, 2.5 * powers[3] / two]);
        let (ids, weights) = route(&Router { choice: Choice::Raw, ..PLAIN }, &scores);
        assert_eq!(ids, [2, 3]);
        assert_close(&weights, &[powers[2] / two, powers[3] / two]);
    }

    #[test]
    fn a_bias_moves_the_choice_and_not_the_weights() {
        let scores = [0.5f32, -1.0, 2.0, 1.5];
        let router = Router { scoring: Scoring::Sigmoid, bias: Some(&[0.0, 1.0, 0.0, -1.0]), ..PLAIN };
        let (ids, weights) = route(&router, &scores);
        assert_eq!(ids, [1, 2]);
        assert_close(&weights, &[1.0 / (1.0 + 1f64.exp()), 1.0 / (1.0 + (-2f64).exp())]);
    }

    #[test]
    fn groups_are_as_good_as_their_two_best() {
        // The best expert is alone in its group; the two groups behind it are better together.
        let scores = [3.0f32, -9.0, 1.9, 1.8, 2.0, 1.0];
        let plain = Router { choice: Choice::Raw, ..PLAIN };
        let router = Router { groups: Some((3, 2)), ..plain };
        assert_eq!(route(&router, &scores).0, [2, 4]);
        let all = Router { groups: Some((3, 3)), ..plain };
        assert_eq!(route(&all, &scores).0, [0, 4]);
        let alone = Router { groups: Some((6, 2)), ..plain };
        assert_eq!(route(&alone, &scores).0, [0, 4]);
    }

    #[test]
    fn equal_and_impossible_scores_still_choose_different_experts() {
        assert_eq!(route(&PLAIN, &[1.0; 5]).0, [0, 1]);
        assert_eq!(route(&PLAIN, &[f32::NAN; 5]).0, [0, 1]);
        assert_eq!(
            route(&Router { choice: Choice::Raw, ..PLAIN }, &[f32::NEG_INFINITY, f32::NAN, 0.0]).0,
            [0, 2]
        );
        assert_eq!(route(&Router { top_k: 3, ..PLAIN }, &[0.0, 1.0, 2.0]).0, [0, 1, 2]);
    }
}
