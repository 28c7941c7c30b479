//! Reasoning between tags at the beginning of an answer.

use super::part::Sink;
use super::scan::{Begins, Next, Scan};

/// The tags around reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tags {
    pub(super) open: &'static str,
    pub(super) close: &'static str,
}

/// `<think>` and `</think>`.
pub(super) const THINK: Tags = Tags { open: "<think>", close: "</think>" };

/// `[THINK]` and `[/THINK]`.
pub(super) const MISTRAL: Tags = Tags { open: "[THINK]", close: "[/THINK]" };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first tag may come.
    Before,
    /// After the first tag, before the first word.
    Begun,
    Inside,
    /// After the last tag, before the first word of the answer.
    After,
    Over,
}

/// Takes reasoning from the beginning of an answer. Space around the tags is left out.
#[derive(Clone, Debug)]
pub(super) struct Think {
    tags: Tags,
    state: State,
    scan: Scan,
    /// Space before the first tag, or at the end of the reasoning so far.
    space: String,
}

impl Think {
    /// `is_open` where the prompt ends with the first tag.
    pub(super) fn new(tags: Tags, is_open: bool) -> Self {
        let state = if is_open { State::Begun } else { State::Before };
        Self { tags, state, scan: Scan::default(), space: String::new() }
    }

    pub(super) fn is_inside(&self) -> bool {
        matches!(self.state, State::Begun | State::Inside)
    }

    /// Takes more text; returns what is no reasoning.
    pub(super) fn push(&mut self, text: &str, sink: &mut Sink) -> String {
        if self.state == State::Over {
            return text.to_owned();
        }
        self.scan.push(text);
        loop {
            match self.state {
                State::Before => {
                    self.skip_space(true);
                    match self.scan.begins(self.tags.open) {
                        Begins::Yes => {
                            self.scan.take(self.tags.open.len());
                            self.space.clear();
                            self.state = State::Begun;
                        }
                        Begins::Maybe => return String::new(),
                        Begins::No => return self.over(),
                    }
                }
                State::Begun => {
                    self.skip_space(false);
                    // The prompt may have opened what the model opens once more.
                    match self.scan.begins(self.tags.open) {
                        Begins::Yes => drop(self.scan.take(self.tags.open.len())),
                        Begins::Maybe => return String::new(),
                        Begins::No => self.state = State::Inside,
                    }
                }
                State::Inside => match self.scan.next(&[self.tags.close]) {
                    Next::Text(text) => {
                        self.think(&text, sink);
                        return String::new();
                    }
                    Next::Marker(text, _) => {
                        self.think(&text, sink);
                        self.space.clear();
                        self.state = State::After;
                    }
                },
                State::After => {
                    self.skip_space(false);
                    if self.scan.as_str().is_empty() {
                        return String::new();
                    }
                    return self.over();
                }
                State::Over => return self.scan.take_all(),
            }
        }
    }

    /// The rest that is no reasoning, when no more will come.
    pub(super) fn finish(&mut self, sink: &mut Sink) -> String {
        match self.state {
            State::Before => self.over(),
            State::Begun | State::Inside => {
                let rest = std::mem::take(&mut self.space) + &self.scan.take_all();
                sink.reasoning(&rest);
                String::new()
            }
            State::After | State::Over => self.scan.take_all(),
        }
    }

    fn over(&mut self) -> String {
        self.state = State::Over;
        std::mem::take(&mut self.space) + &self.scan.take_all()
    }

    fn skip_space(&mut self, is_kept: bool) {
        let text = self.scan.as_str();
        let len = text.len() - text.trim_start().len();
        let space = self.scan.take(len);
        if is_kept {
            self.space += &space;
        }
    }

    fn think(&mut self, text: &str, sink: &mut Sink) {
        let kept = text.trim_end().len();
        if kept > 0 {
            sink.reasoning(&(std::mem::take(&mut self.space) + &text[..kept]));
        }
        self.space += &text[kept..];
    }
}
