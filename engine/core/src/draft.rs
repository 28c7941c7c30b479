//! Guesses of a sequence's next tokens, so that one step draws several: what followed the same words before.
//!
//! A guess never changes a token. Each guessed position is drawn from the model with the random number of its own
//! position, and guesses are kept while they are what was drawn; the rest of them was computed in vain. So whether to
//! guess is a question of time alone, and is answered from steps measured here: prompt lookup after A. Saxena, "Prompt
//! Lookup Decoding" (2023).

use std::time::Duration;

/// Most tokens guessed at a time.
pub(crate) const DRAFT_LEN_MAX: usize = 8;
/// Fewer equal tokens before a place say too little about what follows it.
const MATCH_LEN_MIN: usize = 2;
/// So many say enough: the search ends.
const MATCH_LEN_ENOUGH: usize = 8;
/// Tokens looked through, from the last one back: what a search takes stays below a hundredth of a step.
const REACH: usize = 16_384;

/// Whether tokens are guessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftPolicy {
    /// Where that is faster, on a backend whose bits do not depend on it.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// Appends what followed the last tokens where they stood before: after the longest match, the latest of equals. Past
/// the end it goes on with what it has guessed, as text does that repeats itself.
pub(crate) fn look_up(tokens: &[u32], len: usize, draft: &mut Vec<u32>) {
    let Some((&last, before)) = tokens.split_last() else { return };
    let first = before.len().saturating_sub(REACH);
    let (mut best, mut place) = (MATCH_LEN_MIN - 1, None);
    for at in (first..before.len()).rev() {
        if tokens[at] != last {
            continue;
        }
        let pairs = tokens[..=at].iter().rev().zip(tokens.iter().rev());
        let matched = pairs.take(MATCH_LEN_ENOUGH).take_while(|(a, b)| a == b).count();
        if matched > best {
            (best, place) = (matched, Some(at + 1));
            if matched == MATCH_LEN_ENOUGH {
                break;
            }
        }
    }
    let Some(place) = place else { return };
    let period = tokens.len() - place;
    draft.extend((0..len).map(|i| tokens[place + i % period]));
}

/// How well the guesses of one sequence have come true.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Luck {
    /// The share of first guesses, and of those after a true one, that were true: newer ones count more.
    rate: f64,
}

/// Weight of a new guess.
const WEIGHT: f64 = 0.2;
/// No luck is certain.
const RATE_MAX: f64 = 0.98;
/// What a sequence is believed to be like before it was tried.
const RATE_BELIEVED: f64 = 0.5;
/// What a place where nothing was guessed adds, so that bad luck does not last for ever.
const HOPE: f64 = 0.005;

impl Default for Luck {
    fn default() -> Self {
        Self { rate: RATE_BELIEVED }
    }
}

impl Luck {
    /// Takes in how many of so many guesses were true.
    pub(crate) fn has_drawn(&mut self, guessed: usize, kept: usize) {
        (0..guessed.min(kept + 1)).for_each(|i| {
            let found = if i < kept { 1.0 } else { 0.0 };
            self.rate = (self.rate + (found - self.rate) * WEIGHT).min(RATE_MAX);
        });
    }

    /// Takes in that a guess was not worth its time.
    pub(crate) fn has_passed(&mut self) {
        self.rate += (RATE_BELIEVED - self.rate).max(0.0) * HOPE;
    }
}

/// How long steps take, by their rows: a line through those measured, newer ones counting more.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    weight: f64,
    rows: f64,
    seconds: f64,
    rows_rows: f64,
    rows_seconds: f64,
    /// What a guess of the smaller model takes.
    guess_seconds: f64,
}

/// What is left of a measurement when the next comes.
const MEMORY: f64 = 0.98;
/// Before steps of several rows were measured, a row is believed to add this part of a step.
const ROW_BELIEVED: f64 = 0.1;
/// Steps of more rows are prompts.
const ROWS_MAX: usize = 64;

impl Default for Pace {
    fn default() -> Self {
        Self { weight: 0.0, rows: 0.0, seconds: 0.0, rows_rows: 0.0, rows_seconds: 0.0, guess_seconds: 0.0 }
    }
}

impl Pace {
    /// Takes in how long a step of so many tokens took.
    pub(crate) fn has_computed(&mut self, rows: usize, elapsed: Duration) {
        if rows > ROWS_MAX {
            return;
        }
        let (x, y) = (rows as f64, elapsed.as_secs_f64());
        let sums = [
            (&mut self.weight, 1.0),
            (&mut self.rows, x),
            (&mut self.seconds, y),
            (&mut self.rows_rows, x * x),
            (&mut self.rows_seconds, x * y),
        ];
        sums.into_iter().for_each(|(sum, new)| *sum = *sum * MEMORY + new);
    }

    /// Takes in how long the smaller model took for so many guesses.
    pub(crate) fn has_guessed(&mut self, guesses: usize, elapsed: Duration) {
        if guesses > 0 {
            let seconds = elapsed.as_secs_f64() / guesses as f64;
            self.guess_seconds += (seconds - self.guess_seconds) * WEIGHT;
        }
    }

    /// How long a step of `rows` takes and what one row more adds to that, both in the same unit.
    fn step_and_row(&self, rows: usize) -> (f64, f64) {
        let spread = self.weight * self.rows_rows - self.rows * self.rows;
        let mean = if self.weight > 0.0 { self.seconds / self.weight } else { 1.0 };
        if self.weight < 1.0 || spread < 0.01 * self.weight * self.weight {
            return (mean, ROW_BELIEVED * mean);
        }
        let slope = (self.weight * self.rows_seconds - self.rows * self.seconds) / spread;
        let step = (self.seconds - slope * self.rows) / self.weight + slope * rows as f64;
        if step > 0.0 { (step, slope.max(0.0)) } else { (mean, ROW_BELIEVED * mean) }
    }

    /// How many of `guesses` are worth their time in a step that draws one token for each of `sequences`: as long as a
    /// guess adds a greater part to the tokens drawn than to the time. `from` tells what making one takes.
    pub(crate) fn worth(&self, luck: Luck, guesses: usize, (sequences, from): (usize, Source)) -> usize {
        let (step, row) = self.step_and_row(sequences);
        let guess = if from == Source::Model { self.guess_seconds } else { 0.0 };
        let share = (row + guess) / step * sequences as f64;
        (1..=guesses as i32).take_while(|&i| luck.rate.powi(i) > share).count()
    }
}

/// Where guesses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The sequence's own tokens.
    LookUp,
    /// A smaller model.
    Model,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tokens: &[u32], len: usize) -> Vec<u32> {
        let mut draft = Vec::new();
        look_up(tokens, len, &mut draft);
        draft
    }

    #[test]
    fn the_longest_match_is_followed_and_the_latest_of_equals() {
        assert_eq!(found(&[1, 2, 3, 4, 9, 1, 2], 5), [3, 4, 9, 1, 2]);
        assert_eq!(found(&[1, 2, 3, 4, 9, 1, 2], 7), [3, 4, 9, 1, 2, 3, 4]);
        assert_eq!(found(&[1, 2, 3, 4, 9, 1, 2], 2), [3, 4]);
        assert_eq!(found(&[1, 2, 5, 1, 2, 6, 1, 2], 1), [6]);
        assert_eq!(found(&[7, 1, 2, 5, 1, 2, 6, 7, 1, 2], 1), [5]);
        assert_eq!(found(&[4, 4, 4, 4], 3), [4, 4, 4]);
        for nothing in [&[][..], &[1], &[1, 2, 3], &[9, 2, 8, 2]] {
            assert_eq!(found(nothing, 8), [0; 0], "{nothing:?}");
        }
        let far: Vec<u32> = [1, 2, 3].into_iter().chain(10..20_000).chain([1, 2]).collect();
        assert_eq!(found(&far, 8), [0; 0], "beyond reach");
    }

    fn pace(base_ms: f64, row_ms: f64) -> Pace {
        let mut pace = Pace::default();
        for rows in (1..=4).cycle().take(100) {
            pace.has_computed(rows, Duration::from_secs_f64((base_ms + row_ms * rows as f64) / 1e3));
        }
        pace
    }

    fn after(guessed: usize, kept: usize) -> Luck {
        let mut luck = Luck::default();
        (0..50).for_each(|_| luck.has_drawn(guessed, kept));
        luck
    }

    const ALONE: (usize, Source) = (1, Source::LookUp);

    #[test]
    fn guesses_that_come_true_are_made_and_others_are_not() {
        let (cheap, dear) = (pace(19.0, 1.0), pace(0.0, 10.0));
        assert_eq!(cheap.worth(after(8, 8), 8, ALONE), 8);
        assert_eq!(cheap.worth(after(8, 0), 8, ALONE), 0);
        assert_eq!(dear.worth(after(8, 8), 8, ALONE), 0, "a row that costs a step");
        assert_eq!(
            dear.worth(after(8, 8), 8, (64, Source::LookUp)),
            0,
            "where all rows cost alike, none is free"
        );
        let half = Luck { rate: 0.5 };
        let (few, many) = (cheap.worth(half, 8, ALONE), cheap.worth(half, 8, (8, Source::LookUp)));
        assert!(many < few, "{many} beside others, {few} alone");
    }

    #[test]
    fn a_model_that_takes_long_has_to_be_right_more_often() {
        let (mut pace, half) = (pace(19.0, 1.0), Luck { rate: 0.5 });
        let free = pace.worth(half, 8, (1, Source::Model));
        (0..50).for_each(|_| pace.has_guessed(4, Duration::from_millis(16)));
        let costly = pace.worth(half, 8, (1, Source::Model));
        assert!(0 < costly && costly < free, "{costly} of {free}");
        assert_eq!(pace.worth(half, 8, ALONE), free, "looking up is free");
        (0..50).for_each(|_| pace.has_guessed(4, Duration::from_millis(60)));
        assert_eq!(pace.worth(half, 8, (1, Source::Model)), 0);
    }

    #[test]
    fn bad_luck_does_not_last_for_ever() {
        let (pace, mut luck) = (pace(19.0, 1.0), after(8, 0));
        let passed = (0..).take_while(|_| {
            luck.has_passed();
            pace.worth(luck, 8, ALONE) == 0
        });
        assert!((10..200).contains(&passed.count()));
    }

    #[test]
    fn without_measurements_a_guess_is_tried() {
        assert!(Pace::default().worth(Luck::default(), 8, ALONE) > 0);
    }
}
