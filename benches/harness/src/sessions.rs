//! What a session costs and saves: resumed from memory, disk, a killed process and another directory, against
//! computing everything again.

mod child;
mod decode;
mod direct;
mod fork;
mod recovery;
mod report;
#[cfg(test)]
mod restoring;
mod resume;
mod stats;
#[cfg(test)]
mod tests;
mod verdict;
mod world;

use std::path::PathBuf;
use std::process::Command;
use std::{fs, io};

use mainstay_backend_api::StepError;
use mainstay_engine::RequestError;
use mainstay_engine::store::StoreError;
use mainstay_models::LoadError;

pub use child::{CHILD_ENV, FirstTurn, Task, child};
pub use decode::{Decode, WriteBehind};
pub use direct::DirectRate;
pub use fork::Forks;
pub use recovery::Recovery;
pub use report::{json, table};
pub use resume::{Case, Move, Restore, Resume};
pub use verdict::{Verdict, verdicts};
pub use world::Subject;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Tokens of a session before its second turn.
    pub contexts: Vec<usize>,
    /// Tokens of each answer.
    pub answer: usize,
    /// Tokens that the second turn sends.
    pub new: usize,
    /// Runs of each case.
    pub repeats: usize,
    /// Of these, such that also compute everything again.
    pub cold_repeats: usize,
    /// Tokens of the answers that show what writing costs.
    pub decode: usize,
    /// Pairs of these answers.
    pub pairs: usize,
    /// Sessions in the store that is killed and opened again.
    pub sessions: usize,
    /// A directory that does not exist; it is made, and removed at the end.
    pub dir: PathBuf,
}

impl Plan {
    /// Tokens of the longest sequence at this length of session.
    pub(crate) fn room(&self, context: usize) -> usize {
        context + self.new + self.answer
    }

    /// What the first turn sends, so that the session has `context` tokens after its answer.
    pub(crate) fn first(&self, subject: &Subject<'_>, context: usize) -> Vec<u32> {
        subject.tokens(context - self.answer, context as u64)
    }

    fn check(&self, subject: &Subject<'_>) -> Result<(), SessionsError> {
        let counts = [self.answer, self.new, self.repeats, self.cold_repeats, self.pairs, self.sessions];
        if counts.contains(&0) || self.contexts.is_empty() || self.decode < 2 {
            let what = "contexts, answer, new, repeat, cold repeat, pairs, sessions: expected at least one each (two \
                        tokens to decode), found none";
            return Err(SessionsError::Plan(what.into()));
        }
        for &context in &self.contexts {
            if context <= self.answer || self.room(context) > subject.context() {
                return Err(SessionsError::Plan(format!(
                    "a session of {context} tokens: expected more than the answer's {}, and with the second turn's {} \
                     at most {}, what the model was made for",
                    self.answer,
                    self.new + self.answer,
                    subject.context()
                )));
            }
        }
        Ok(())
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum SessionsError {
    /// The plan asks for what the model does not have.
    #[error("{0}")]
    Plan(String),
    /// The backend did not take the model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The engine refused a request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Something did not do what it must.
    #[error("{0}")]
    Broken(String),
}

/// Everything that was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// The plan.
    pub plan: Plan,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// First turns, in the processes that were killed, by tokens of the session.
    pub firsts: Vec<(usize, FirstTurn)>,
    /// Second turns.
    pub resumes: Vec<Resume>,
    /// Restores beside the disk's rate.
    pub restores: Vec<Restore>,
    /// Moves.
    pub moves: Vec<Move>,
    /// Forks, by tokens of the session.
    pub forks: Vec<Forks>,
    /// Storing pages beside dropping them.
    pub write_behind: WriteBehind,
    /// A start after a kill.
    pub recovery: Recovery,
}

/// What all measurements share.
pub(crate) struct Bench<'a> {
    pub(crate) subject: &'a Subject<'a>,
    pub(crate) plan: &'a Plan,
    /// Gives a command that comes to [`child`] when [`CHILD_ENV`] is set.
    pub(crate) child: &'a dyn Fn() -> io::Result<Command>,
}

/// Removes the scratch directory, also where a measurement fails.
struct Scratch<'a>(&'a Plan);

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        // What cannot be removed stays, in a directory that says whose it is.
        let _ = fs::remove_dir_all(&self.0.dir);
    }
}

/// Measures everything; `tell` hears what is going on. `command` gives a command that comes to [`child`] when
/// [`CHILD_ENV`] is set in its environment.
///
/// # Errors
/// [`SessionsError`].
pub fn sessions(
    subject: &Subject<'_>,
    plan: &Plan,
    command: &dyn Fn() -> io::Result<Command>,
    mut tell: impl FnMut(&str),
) -> Result<Figures, SessionsError> {
    plan.check(subject)?;
    fs::create_dir_all(plan.dir.parent().unwrap_or(&plan.dir))?;
    fs::create_dir(&plan.dir)?;
    let _scratch = Scratch(plan);
    let bench = Bench { subject, plan, child: command };
    tell(&format!("recovery of {} sessions", plan.sessions));
    let recovery = recovery::recovery(&bench)?;
    let write_behind = decode::write_behind(&bench, &mut tell)?;
    let mut found = resume::Lengths::default();
    resume::lengths(&bench, &mut tell, &mut found)?;
    let resume::Lengths { firsts, resumes, restores, moves, forks } = found;
    let (plan, page_bytes) = (plan.clone(), subject.page_bytes());
    Ok(Figures { plan, page_bytes, firsts, resumes, restores, moves, forks, write_behind, recovery })
}
