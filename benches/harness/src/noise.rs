//! How much of the machine other programs used while something was measured.

use std::fs;

/// Ticks since start of the machine and of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticks {
    all: u64,
    busy: u64,
    own: u64,
}

/// Looks at the machine from now on.
#[derive(Clone, Copy, Debug)]
pub struct Watch(Option<Ticks>);

impl Watch {
    /// Begins.
    pub fn start() -> Self {
        Self(ticks())
    }

    /// The part of all processor time that other programs took since then, 0 to 1; `None` where the system does not tell
    /// or too little time passed.
    pub fn foreign(&self) -> Option<f64> {
        foreign(self.0, ticks())
    }
}

/// `None` where the system does not tell (other systems than Linux).
pub(crate) fn ticks() -> Option<Ticks> {
    parse(&fs::read_to_string("/proc/stat").ok()?, &fs::read_to_string("/proc/self/stat").ok()?)
}

/// Ticks are coarse (100 a second on each core); a span of fewer says nothing about shares.
const TICKS_MIN: u64 = 40;

/// The part of all processor time that went to others between two readings, 0 to 1; stolen time counts as theirs.
pub(crate) fn foreign(before: Option<Ticks>, after: Option<Ticks>) -> Option<f64> {
    let (before, after) = (before?, after?);
    let all = after.all.checked_sub(before.all)?;
    let others = (after.busy - before.busy).saturating_sub(after.own - before.own);
    (all >= TICKS_MIN).then(|| others as f64 / all as f64)
}

/// proc_stat(5): `cpu user nice system idle iowait irq softirq steal ...`; proc_pid_stat(5): utime and stime are
/// fields 14 and 15, counted behind the command's closing parenthesis.
fn parse(machine: &str, own: &str) -> Option<Ticks> {
    let line = machine.lines().find_map(|l| l.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().filter_map(|f| f.parse().ok()).collect();
    let all: u64 = fields.get(..8)?.iter().sum();
    let rest: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
    let own = rest.get(11)?.parse::<u64>().ok()? + rest.get(12)?.parse::<u64>().ok()?;
    Some(Ticks { all, busy: all - fields[3] - fields[4], own })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_time_is_what_is_neither_idle_nor_ours() {
        let own = |u: u64| format!("7 (a (b) c) R 1 2 3 4 5 6 7 8 9 10 {u} 5 0 0\n");
        let before = parse("cpu  10 0 10 100 0 0 0 0 0 0\ncpu0 1\n", &own(10));
        let after = parse("cpu  60 0 20 130 0 0 0 10 0 0\ncpu0 1\n", &own(60));
        // 100 ticks passed, 70 busy, 50 ours
        assert_eq!(foreign(before, after), Some(0.2));
        assert_eq!(foreign(None, after), None);
        assert_eq!(foreign(before, before), None);
    }
}
