//! What was found against what was aimed at; a missed target says so.

use super::resume::{Case, Restore, Resume};
use super::stats::median;
use super::{Figures, Forks};

/// The length of session that the resume targets name.
const TARGET_CONTEXT: usize = 8192;
const TTFT_SHARE_MAX: f64 = 0.05;
const RESTORE_SHARE_MIN: f64 = 0.90;
/// A restore of less shows how long one read takes, not how many go at a time.
const RESTORE_BYTES_MIN: u64 = 64 << 20;
const SLOWED_MAX: f64 = 0.02;
const P99_MORE_MAX: f64 = 0.05;
const FORK_MS_MAX: f64 = 1.0;
const STORED_SHARE_MAX: f64 = 0.25;
const READY_MS_MAX: f64 = 2000.0;

/// One target.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What was measured, and what is aimed at.
    pub target: String,
    /// What was found.
    pub found: String,
    /// Whether that is enough; `None` where it was not measured.
    pub met: Option<bool>,
}

impl Verdict {
    /// `met`, `MISSED` or `not measured`.
    pub fn word(&self) -> &'static str {
        match self.met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        }
    }
}

/// All targets, in order.
pub fn verdicts(figures: &Figures) -> Vec<Verdict> {
    let mut all = vec![same_tokens(figures)];
    all.extend([Case::Disk, Case::Killed, Case::Moved].map(|case| resume(figures, case)));
    all.extend(restores(figures));
    all.extend(write_behind(figures));
    all.extend(figures.forks.iter().max_by_key(|forks| forks.context).into_iter().flat_map(forks));
    let recovery = &figures.recovery;
    let whole = recovery.sessions.0 == recovery.sessions.1 && recovery.pages.0 == recovery.pages.1;
    all.push(Verdict {
        target: format!("ready after a kill with {} sessions, at most 2 s", recovery.sessions.0),
        found: format!(
            "{:.0} ms, {} sessions and {} pages found",
            recovery.open_ms, recovery.sessions.1, recovery.pages.1
        ),
        met: Some(whole && recovery.open_ms <= READY_MS_MAX),
    });
    all
}

/// The middle time to the first token of a case.
pub(crate) fn ttft_ms(figures: &Figures, case: Case, context: usize) -> f64 {
    let of = |run: &&Resume| run.case == case && run.context == context;
    median(&figures.resumes.iter().filter(of).map(|run| run.ttft_ms).collect::<Vec<_>>())
}

/// Whether a run drew what computing everything drew.
pub(crate) fn is_same(figures: &Figures, run: &Resume) -> bool {
    let cold = figures.resumes.iter().find(|r| r.case == Case::Cold && r.context == run.context);
    cold.is_some_and(|cold| cold.tokens == run.tokens)
}

fn same_tokens(figures: &Figures) -> Verdict {
    let (all, same) =
        (figures.resumes.len(), figures.resumes.iter().filter(|run| is_same(figures, run)).count());
    let target = "second turns have the tokens of computing everything, all of them".to_owned();
    Verdict { target, found: format!("{same} of {all}"), met: Some(same == all) }
}

fn resume(figures: &Figures, case: Case) -> Verdict {
    let share = ttft_ms(figures, case, TARGET_CONTEXT) / ttft_ms(figures, Case::Cold, TARGET_CONTEXT);
    let percent = 100.0 * share;
    Verdict {
        target: format!(
            "{}: first token at {TARGET_CONTEXT} tokens, at most 5 % of computing everything",
            case.name()
        ),
        found: if share.is_nan() { "-".to_owned() } else { format!("{percent:.2} %") },
        met: (!share.is_nan()).then_some(share <= TTFT_SHARE_MAX),
    }
}

fn restores(figures: &Figures) -> Vec<Verdict> {
    let of = |&context: &usize| {
        let runs = figures.restores.iter().filter(|run| run.context == context);
        let runs: Vec<&Restore> = runs.collect();
        let share = median(&runs.iter().map(|run| run.share()).collect::<Vec<_>>());
        let says_something = runs.iter().all(|run| run.bytes >= RESTORE_BYTES_MIN);
        Verdict {
            target: format!("restore of {context} tokens, at least 90 % of the disk's O_DIRECT rate"),
            found: format!("{:.0} %", 100.0 * share),
            met: says_something.then_some(share >= RESTORE_SHARE_MIN),
        }
    };
    figures.plan.contexts.iter().map(of).collect()
}

fn write_behind(figures: &Figures) -> [Verdict; 2] {
    let slowed = 1.0 - figures.write_behind.ratio();
    let (stored, dropped) = figures.write_behind.p99_ms();
    let more = stored / dropped - 1.0;
    [
        Verdict {
            target: "decode slowed by storing pages, at most 2 %".to_owned(),
            found: format!("{:.1} %", 100.0 * slowed),
            met: Some(slowed <= SLOWED_MAX),
        },
        Verdict {
            target: "99th percentile between tokens, at most 5 % more".to_owned(),
            found: format!("{:+.1} % ({stored:.1} ms, {dropped:.1} ms)", 100.0 * more),
            met: Some(more <= P99_MORE_MAX),
        },
    ]
}

fn forks(forks: &Forks) -> [Verdict; 2] {
    [
        Verdict {
            target: format!("fork of {} tokens, below 1 ms and no page", forks.context),
            found: format!("{:.4} ms, {} bytes", forks.fork_ms, forks.fork_bytes),
            met: Some(forks.fork_ms < FORK_MS_MAX && forks.fork_bytes == 0),
        },
        Verdict {
            target: format!(
                "{} forks of {} tokens, at most 0.25 of as many copies",
                forks.continued, forks.context
            ),
            found: format!("{:.3}", forks.ratio()),
            met: Some(forks.ratio() <= STORED_SHARE_MAX),
        },
    ]
}
