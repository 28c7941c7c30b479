//! What writing pages behind costs an answer that is being made.

use std::fs;

use mainstay_engine::RestorePolicy;
use mainstay_engine::store::Durability;

use super::stats::{median, percentile};
use super::world::{Answer, Ask, World};
use super::{Bench, SessionsError};

/// Tokens of the prompt: two pages.
const PROMPT: usize = 64;

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Decode {
    /// Tokens per second, from the first token to the last.
    pub tokens_per_s: f64,
    /// Between tokens, milliseconds.
    pub gaps_ms: Vec<f64>,
    /// Part of the processors' time that other programs took.
    pub foreign: Option<f64>,
    /// Bytes of pages written until it had settled.
    pub written_bytes: u64,
    /// The engine's thread copying pages from the device, milliseconds.
    pub copy_ms: f64,
}

/// Answers whose pages were stored beside such whose pages were not, turn about.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WriteBehind {
    /// Level `async`.
    pub stored: Vec<Decode>,
    /// Level `ephemeral`.
    pub dropped: Vec<Decode>,
}

impl WriteBehind {
    /// The middle of the pairs' ratios of speed, stored over dropped.
    pub fn ratio(&self) -> f64 {
        let pairs = self.stored.iter().zip(&self.dropped);
        let ratios: Vec<f64> = pairs.map(|(s, d)| s.tokens_per_s / d.tokens_per_s).collect();
        median(&ratios)
    }

    /// The 99th percentile of the time between tokens over all answers, milliseconds: stored, dropped.
    pub fn p99_ms(&self) -> (f64, f64) {
        let of = |runs: &[Decode]| {
            let gaps: Vec<f64> = runs.iter().flat_map(|run| run.gaps_ms.iter().copied()).collect();
            percentile(&gaps, 0.99)
        };
        (of(&self.stored), of(&self.dropped))
    }
}

/// Measures the plan's pairs; one answer before them is not counted.
pub(crate) fn write_behind(
    bench: &Bench<'_>,
    tell: &mut dyn FnMut(&str),
) -> Result<WriteBehind, SessionsError> {
    let (dir, plan) = (bench.plan.dir.join("decode"), bench.plan);
    let world = World::open(bench.subject, &dir, PROMPT + plan.decode + 1, RestorePolicy::Never)?;
    let prompt = bench.subject.tokens(PROMPT, 3_000_003);
    let mut found = WriteBehind::default();
    decode(&world, (&prompt, plan.decode), Durability::Async, 1)?;
    for pair in 0..plan.pairs {
        tell(&format!("decoding, pair {} of {}", pair + 1, plan.pairs));
        let salt = 2 + 2 * pair as u64;
        found.stored.push(decode(&world, (&prompt, plan.decode), Durability::Async, salt)?);
        found.dropped.push(decode(&world, (&prompt, plan.decode), Durability::Ephemeral, salt + 1)?);
    }
    world.close()?;
    fs::remove_dir_all(dir)?;
    Ok(found)
}

/// One answer. Its salt is its own, so that nothing of an earlier one is found.
fn decode(
    world: &World,
    (prompt, count): (&[u32], usize),
    durability: Durability,
    salt: u64,
) -> Result<Decode, SessionsError> {
    let before = world.written_bytes();
    world.copies.take_ms();
    let Answer { at, foreign, .. } = world.ask(&Ask { prompt, count, durability, salt })?;
    // What is still being written must not slow the next answer.
    world.settle()?;
    world.store.flush()?;
    let gaps_ms: Vec<f64> = at.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
    Ok(Decode {
        tokens_per_s: gaps_ms.len() as f64 / (gaps_ms.iter().sum::<f64>() / 1e3).max(1e-9),
        gaps_ms,
        foreign,
        written_bytes: world.written_bytes() - before,
        copy_ms: world.copies.take_ms().1,
    })
}
