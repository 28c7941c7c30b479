//! The process that is killed: it makes a session, says so, and waits for its end.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::str::FromStr;

use mainstay_engine::RestorePolicy;
use serde_json::{Value, json};

use super::world::{Subject, World};
use super::{Plan, SessionsError};

/// The variable that makes a process of the same command line the child.
pub const CHILD_ENV: &str = "MAINSTAY_BENCH_CHILD";
/// Before what the child says: a test's runner writes to the same stream.
const MARK: &str = "mainstay-bench-child ";

/// What a child is to do, as it stands in [`CHILD_ENV`]: `CONTEXT:DIR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Tokens of the session.
    pub context: usize,
    /// Where.
    pub dir: PathBuf,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.context, self.dir.display())
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected CONTEXT:DIR, found `{text}`");
        let (context, dir) = text.split_once(':').ok_or_else(wrong)?;
        Ok(Self { context: context.parse().map_err(|_| wrong())?, dir: dir.into() })
    }
}

/// What the child measured before it was killed.
#[derive(Clone, Debug, PartialEq)]
pub struct FirstTurn {
    /// From the submission of the first turn to its first token, milliseconds.
    pub ttft_ms: f64,
    /// Tokens of it that were found in the store, from an earlier run in the same directory.
    pub restored_tokens: usize,
    /// Bytes of pages that it wrote.
    pub written_bytes: u64,
    /// Part of the processors' time that other programs took.
    pub foreign: Option<f64>,
}

/// Makes a session of `task.context` tokens, waits until it is with the system, says so on `out`, and holds still until
/// it is killed, or whoever started it is gone.
///
/// # Errors
/// [`SessionsError`].
pub fn child(
    subject: &Subject<'_>,
    plan: &Plan,
    task: &Task,
    out: &mut dyn Write,
) -> Result<(), SessionsError> {
    let world = World::open(subject, &task.dir, plan.room(task.context), RestorePolicy::Always)?;
    let session = world.create()?;
    let first = world.turn(session, &plan.first(subject, task.context), plan.answer)?;
    world.settle()?;
    let said = json!({
        "ttft_ms": first.ttft_ms(),
        "restored_tokens": first.kv.restored_tokens,
        "written_bytes": world.written_bytes(),
        "foreign": first.foreign,
    });
    writeln!(out, "{MARK}{said}")?;
    out.flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Starts a child, hears what it says, and kills it.
pub(crate) fn run_and_kill(mut command: Command, task: &Task) -> Result<FirstTurn, SessionsError> {
    command.env(CHILD_ENV, task.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = command.spawn()?;
    // It ends when this end of its input is closed: also if this process is killed itself.
    let input = process.stdin.take();
    let said = process.stdout.take().map(hear);
    // On Unix this is SIGKILL.
    let killed = process.kill();
    let status = process.wait()?;
    drop(input);
    killed?;
    let said = said.unwrap_or(Ok(None))?;
    said.ok_or_else(|| SessionsError::Broken(format!("the child ended early: {status}")))
}

fn hear(out: impl Read) -> io::Result<Option<FirstTurn>> {
    for line in BufReader::new(out).lines() {
        if let Some((_, said)) = line?.split_once(MARK) {
            return Ok(parse(&serde_json::from_str(said)?));
        }
    }
    Ok(None)
}

fn parse(said: &Value) -> Option<FirstTurn> {
    Some(FirstTurn {
        ttft_ms: said["ttft_ms"].as_f64()?,
        restored_tokens: said["restored_tokens"].as_u64()? as usize,
        written_bytes: said["written_bytes"].as_u64()?,
        foreign: said["foreign"].as_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_read_back() {
        let task = Task { context: 2048, dir: "/a:b/c".into() };
        assert_eq!(task.to_string().parse(), Ok(task));
        assert!("2048".parse::<Task>().is_err() && "x:/a".parse::<Task>().is_err());
    }

    #[test]
    fn what_a_child_says_is_heard_behind_other_output() {
        let line = json!({"ttft_ms": 1.5, "restored_tokens": 3, "written_bytes": 4, "foreign": null});
        let out = format!("running 1 test\ntest x ... {MARK}{line}\n");
        let expected = FirstTurn { ttft_ms: 1.5, restored_tokens: 3, written_bytes: 4, foreign: None };
        assert_eq!(hear(out.as_bytes()).unwrap(), Some(expected));
        assert_eq!(hear(&b"nothing\n"[..]).unwrap(), None);
    }
}
