//! What was measured of each request, and what all of them say together.

use std::fmt;
use std::str::FromStr;

/// What came of a request; times are seconds since it was sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// When the first piece of the answer came.
    pub first_s: Option<f64>,
    /// Between pieces of the answer, each of which is one token or a few.
    pub gaps_s: Vec<f64>,
    /// When the answer ended.
    pub total_s: f64,
    /// Tokens of the prompt, as the server counts them.
    pub input_tokens: usize,
    /// Tokens of the answer, as the server counts them.
    pub output_tokens: usize,
    /// Tokens of the prompt that were not computed again; `None` where the server does not tell.
    pub cached_tokens: Option<usize>,
    /// The answer.
    pub text: String,
    /// Why there is none.
    pub error: Option<String>,
}

/// A request and where it stands in the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its conversation.
    pub conversation: usize,
    /// Its turn in it, from 0.
    pub turn: usize,
    /// When it was sent, seconds since the beginning.
    pub start_s: f64,
    /// How long it had waited for a free client before.
    pub queue_s: f64,
    /// What came of it.
    pub outcome: Outcome,
}

impl Record {
    /// Seconds for each token after the first; `None` of fewer than two.
    pub(crate) fn tpot_s(&self) -> Option<f64> {
        let after = self.outcome.output_tokens.checked_sub(1).filter(|&n| n > 0)?;
        Some((self.outcome.total_s - self.outcome.first_s?) / after as f64)
    }
}

/// A bound that a request has to keep to be of use, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slo {
    /// Time to the first token.
    Ttft(f64),
    /// Time for each token after it.
    Tpot(f64),
    /// Time of all of it.
    E2el(f64),
}

impl Slo {
    fn is_met(self, record: &Record) -> bool {
        match self {
            Slo::Ttft(ms) => record.outcome.first_s.is_some_and(|s| s * 1e3 <= ms),
            // an answer of one token has no time between tokens
            Slo::Tpot(ms) => record.tpot_s().unwrap_or(0.0) * 1e3 <= ms,
            Slo::E2el(ms) => record.outcome.total_s * 1e3 <= ms,
        }
    }
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slo::Ttft(ms) => write!(f, "ttft:{ms}"),
            Slo::Tpot(ms) => write!(f, "tpot:{ms}"),
            Slo::E2el(ms) => write!(f, "e2el:{ms}"),
        }
    }
}

/// A text that is no bound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected ttft:MS, tpot:MS or e2el:MS, found `{0}`")]
pub struct UnknownSlo(String);

impl FromStr for Slo {
    type Err = UnknownSlo;

    fn from_str(text: &str) -> Result<Self, UnknownSlo> {
        let read = || {
            let (name, ms) = text.split_once(':')?;
            let ms = ms.parse().ok().filter(|&ms: &f64| ms >= 0.0)?;
            match name {
                "ttft" => Some(Slo::Ttft(ms)),
                "tpot" => Some(Slo::Tpot(ms)),
                "e2el" => Some(Slo::E2el(ms)),
                _ => None,
            }
        };
        read().ok_or_else(|| UnknownSlo(text.to_owned()))
    }
}

/// Times of many requests, milliseconds; all 0 of none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distribution {
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard deviation of all of them.
    pub std: f64,
    /// Half are below.
    pub p50: f64,
    /// Nine of ten are below.
    pub p90: f64,
    /// 99 of 100 are below.
    pub p99: f64,
}

impl Distribution {
    /// Of seconds.
    pub fn of(seconds: &[f64]) -> Self {
        if seconds.is_empty() {
            return Self::default();
        }
        let mut ms: Vec<f64> = seconds.iter().map(|s| s * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let mean = ms.iter().sum::<f64>() / ms.len() as f64;
        let variance = ms.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / ms.len() as f64;
        let at = |share| between(&ms, share);
        Self { mean, std: variance.sqrt(), p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

/// Linear between the two values on both sides of the rank, as numpy has it, so that figures compare.
fn between(sorted: &[f64], share: f64) -> f64 {
    let rank = share * (sorted.len() - 1) as f64;
    let (low, high) = (rank.floor() as usize, rank.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (rank - low as f64)
}

/// A whole run in figures.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// From the first request to the last answer, seconds.
    pub duration_s: f64,
    /// Requests that were answered.
    pub completed: usize,
    /// Requests that were not.
    pub failed: usize,
    /// Tokens of the prompts of those that were.
    pub input_tokens: usize,
    /// Tokens of their answers.
    pub output_tokens: usize,
    /// Answered requests that met every bound; `None` without bounds.
    pub good: Option<usize>,
    /// Most requests at a time.
    pub concurrent_max: usize,
    /// Most tokens within a second.
    pub output_tokens_per_s_max: usize,
    /// Time to the first token.
    pub ttft: Distribution,
    /// Time for each token after it.
    pub tpot: Distribution,
    /// Time between pieces.
    pub itl: Distribution,
    /// Time of all of it.
    pub e2el: Distribution,
}

impl Summary {
    /// Of a run's requests.
    pub fn of(records: &[Record], duration_s: f64, slos: &[Slo]) -> Self {
        let done: Vec<&Record> = records.iter().filter(|r| r.outcome.error.is_none()).collect();
        let times = |of: fn(&Record) -> Option<f64>| {
            Distribution::of(&done.iter().filter_map(|r| of(r)).collect::<Vec<_>>())
        };
        let gaps: Vec<f64> = done.iter().flat_map(|r| r.outcome.gaps_s.iter().copied()).collect();
        let is_good = |r: &&&Record| slos.iter().all(|slo| slo.is_met(r));
        Self {
            duration_s,
            completed: done.len(),
            failed: records.len() - done.len(),
            input_tokens: done.iter().map(|r| r.outcome.input_tokens).sum(),
            output_tokens: done.iter().map(|r| r.outcome.output_tokens).sum(),
            good: (!slos.is_empty()).then(|| done.iter().filter(is_good).count()),
            concurrent_max: concurrent_max(&done),
            output_tokens_per_s_max: busiest_second(&done),
            ttft: times(|r| r.outcome.first_s),
            tpot: times(Record::tpot_s),
            itl: Distribution::of(&gaps),
            e2el: times(|r| Some(r.outcome.total_s)),
        }
    }

    /// A count by the run's time.
    pub(crate) fn per_s(&self, count: usize) -> f64 {
        count as f64 / self.duration_s
    }
}

/// Of half-open spans: a request that ends when another begins is not beside it.
fn concurrent_max(done: &[&Record]) -> usize {
    let ends = done.iter().map(|r| (r.start_s + r.outcome.total_s, -1));
    let mut changes: Vec<(f64, i64)> = done.iter().map(|r| (r.start_s, 1)).chain(ends).collect();
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut now, mut most) = (0, 0);
    for (_, change) in changes {
        now += change;
        most = most.max(now);
    }
    usize::try_from(most).unwrap_or(0)
}

fn busiest_second(done: &[&Record]) -> usize {
    let mut seconds = std::collections::HashMap::new();
    for record in done {
        let Some(first) = record.outcome.first_s else { continue };
        let mut at = record.start_s + first;
        *seconds.entry(at as u64).or_insert(0) += 1;
        for gap in &record.outcome.gaps_s {
            at += gap;
            *seconds.entry(at as u64).or_insert(0) += 1;
        }
    }
    seconds.into_values().max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(start_s: f64, first_s: f64, gaps_s: &[f64], output_tokens: usize) -> Record {
        let total_s = first_s + gaps_s.iter().sum::<f64>();
        let outcome = Outcome {
            first_s: Some(first_s),
            gaps_s: gaps_s.to_vec(),
            total_s,
            input_tokens: 10,
            output_tokens,
            ..Outcome::default()
        };
        Record { conversation: 0, turn: 0, start_s, queue_s: 0.0, outcome }
    }

    #[test]
    fn percentiles_are_numpy_s() {
        // numpy.percentile([1, 2, 3, 4], [50, 90, 99]) and .std()
        let found = Distribution::of(&[0.004, 0.001, 0.003, 0.002]);
        let expected = [2.5, 1.118_033_988_749_895, 2.5, 3.7, 3.97];
        for (found, expected) in
            [found.mean, found.std, found.p50, found.p90, found.p99].into_iter().zip(expected)
        {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
        assert_eq!(Distribution::of(&[]), Distribution::default());
    }

    #[test]
    fn a_run_adds_up() {
        let mut failed = record(0.0, 9.0, &[], 1);
        failed.outcome.error = Some("no".into());
        // 5 tokens in 4 pieces: time for a token is not time between pieces
        let records = [
            record(0.4, 0.1, &[0.2, 0.2, 0.4], 5),
            record(0.5, 0.3, &[], 1),
            record(0.9, 0.1, &[0.2], 2),
            failed,
        ];
        let slos = [Slo::Ttft(350.0), Slo::Tpot(201.0)];
        let found = Summary::of(&records, 2.0, &slos);
        assert_eq!(
            (found.completed, found.failed, found.good),
            (3, 1, Some(3)),
            "one token has no time between tokens"
        );
        assert_eq!((found.input_tokens, found.output_tokens), (30, 8));
        assert!((found.tpot.mean - 200.0).abs() < 1e-9, "{:?}", found.tpot);
        assert!((found.itl.mean - 250.0).abs() < 1e-9, "{:?}", found.itl);
        assert!((found.ttft.mean - 500.0 / 3.0).abs() < 1e-9, "{:?}", found.ttft);
        assert_eq!(found.concurrent_max, 2, "the second ends before the third begins");
        assert_eq!(found.output_tokens_per_s_max, 4, "all pieces of the first two but the last");
        assert_eq!(found.per_s(8), 4.0);
        assert_eq!(Summary::of(&records, 2.0, &[]).good, None);
        assert_eq!(Summary::of(&records, 2.0, &[Slo::E2el(450.0)]).good, Some(2));
    }

    #[test]
    fn bounds_are_read_back() {
        for slo in [Slo::Ttft(200.0), Slo::Tpot(12.5), Slo::E2el(0.0)] {
            assert_eq!(slo.to_string().parse(), Ok(slo));
        }
        for wrong in ["", "ttft", "ttft:-1", "itl:5", "ttft:x"] {
            assert!(wrong.parse::<Slo>().is_err(), "{wrong}");
        }
    }
}
