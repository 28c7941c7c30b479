//! When conversations begin.

use crate::shape::Random;

/// How load comes.
#[derive(Clone, Debug, PartialEq)]
pub enum Arrivals {
    /// So many clients, each of which begins its next conversation when its last is over.
    Closed {
        /// Clients.
        clients: usize,
    },
    /// A Poisson process: times between arrivals are independent and exponential.
    Poisson {
        /// Conversations per second, on average.
        rate: f64,
    },
    /// As recorded.
    Trace {
        /// Seconds from the beginning, one for each conversation.
        seconds: Vec<f64>,
    },
}

impl Arrivals {
    /// When each of `count` conversations begins, seconds; `None` where it waits for others.
    pub(crate) fn times(&self, count: usize, seed: u64) -> Option<Vec<f64>> {
        match self {
            Arrivals::Closed { .. } => None,
            Arrivals::Trace { seconds } => Some(seconds.iter().copied().take(count).collect()),
            Arrivals::Poisson { rate } => {
                let mut random = Random(seed | 1);
                let mut at = 0.0;
                let next = |_| {
                    let now = at;
                    at -= (1.0 - unit(&mut random)).ln() / rate;
                    now
                };
                Some((0..count).map(next).collect())
            }
        }
    }

    /// Conversations per second, where that was asked for.
    pub fn rate(&self) -> Option<f64> {
        if let Arrivals::Poisson { rate } = self { Some(*rate) } else { None }
    }

    /// Its name in tables.
    pub(crate) fn describe(&self) -> String {
        match self {
            Arrivals::Closed { clients } => format!("{clients} clients"),
            Arrivals::Poisson { rate } => format!("{rate}/s Poisson"),
            Arrivals::Trace { .. } => "trace".to_owned(),
        }
    }
}

/// From 0 to below 1.
pub(crate) fn unit(random: &mut Random) -> f64 {
    (random.next() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_of_a_poisson_process_have_its_mean_and_its_spread() {
        let count = 20_000;
        let times = Arrivals::Poisson { rate: 4.0 }.times(count, 3).unwrap();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
        assert!((variance.sqrt() - 0.25).abs() < 0.01, "{variance}");
        assert_eq!(times[0], 0.0);
        assert_eq!(times, Arrivals::Poisson { rate: 4.0 }.times(count, 3).unwrap());
    }
}
