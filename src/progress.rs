//! Progress of long work on stderr: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::size;

/// Plain lines tell every tenth of the work.
const PLAIN_PARTS: u64 = 10;

/// One piece of work counted in bytes. Dropping it takes the bar away.
pub(crate) struct Progress {
    what: String,
    total_bytes: u64,
    done_bytes: u64,
    told_part: u64,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Begins; a total of 0 means that it is not known.
    pub(crate) fn start(what: impl Into<String>, total_bytes: u64) -> Self {
        let what = what.into();
        let bar = stderr().is_terminal().then(|| bar(&what, total_bytes));
        if bar.is_none() {
            match total_bytes {
                0 => eprintln!("{what} ..."),
                n => eprintln!("{what}: {} ...", size::show(n)),
            }
        }
        Self { what, total_bytes, done_bytes: 0, told_part: 0, bar }
    }

    /// Counts bytes that are done.
    pub(crate) fn advance(&mut self, bytes: u64) {
        self.done_bytes += bytes;
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
            return;
        }
        let part = (self.done_bytes * PLAIN_PARTS).checked_div(self.total_bytes).unwrap_or(0);
        if part > self.told_part && part < PLAIN_PARTS {
            self.told_part = part;
            eprintln!("{}: {} of {}", self.what, size::show(self.done_bytes), size::show(self.total_bytes));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// One piece of work counted in steps. Dropping it takes the bar away.
pub(crate) struct Counter(Option<ProgressBar>);

impl Counter {
    /// Begins.
    pub(crate) fn start(what: &str, total: u64) -> Self {
        if !stderr().is_terminal() {
            eprintln!("{what}: {total} ...");
            return Self(None);
        }
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {elapsed} {eta}");
        bar.set_style(style.expect("the template is a constant that parses").progress_chars("=> "));
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(Some(bar))
    }

    /// So many are done.
    pub(crate) fn set(&mut self, done: u64) {
        if let Some(bar) = &self.0 {
            bar.set_position(done);
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &str, total_bytes: u64) -> ProgressBar {
    let bar = if total_bytes == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total_bytes) };
    let template = match total_bytes {
        0 => "{msg} {spinner} {elapsed}",
        _ => "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
    };
    let style = ProgressStyle::with_template(template).expect("the template is a constant that parses");
    bar.set_style(style.progress_chars("=> "));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
