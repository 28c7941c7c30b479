//! Calls as JSON objects, alone, in an array or one after another: with a marker before them or instead of a text.

use std::sync::Arc;

use super::call_object::{Accepts, CallObject, Covers, Extent, Progress};
use super::part::Sink;
use super::pythonic;
use super::scan::{Begins, Next, Scan};

pub(super) const PYTHON_TAG: &str = "<|python_tag|>";
pub(super) const TOOL_CALLS: &str = "[TOOL_CALLS]";
pub(super) const ARGS: &str = "[ARGS]";
pub(super) const CALL_ID: &str = "[CALL_ID]";
pub(super) const TOOL_CODE: &str = "```tool_code";

/// The longest line that may begin a fenced block.
const FENCE_LEN_MAX: usize = 20;

/// What is told apart.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// Says that calls follow.
    pub(super) marker: Option<&'static str>,
    /// Calls may stand without it where the answer begins with them.
    pub(super) is_markless: bool,
    /// After the marker, a name may stand before its arguments, [`ARGS`] between them.
    pub(super) has_named: bool,
    /// After the marker, calls in Python's notation may stand up to the end of a fenced block.
    pub(super) has_python: bool,
    /// The functions that the request offers.
    pub(super) names: Arc<[String]>,
}

#[derive(Clone, Debug)]
enum State {
    Text,
    /// Calls may begin.
    Before,
    Object(CallObject),
    /// After a call.
    Between,
    /// The name before arguments.
    Name,
    /// Arguments after a name.
    Arguments(Extent),
    /// A fenced block up to its end.
    Block,
}

#[derive(Clone, Debug)]
pub(super) struct Objects {
    rules: Rules,
    scan: Scan,
    state: State,
    /// What is text if no call comes.
    raw: String,
    is_marked: bool,
    in_array: bool,
    in_fence: bool,
}

impl Objects {
    pub(super) fn new(rules: Rules) -> Self {
        let state = if rules.is_markless { State::Before } else { State::Text };
        Self {
            rules,
            scan: Scan::default(),
            state,
            raw: String::new(),
            is_marked: false,
            in_array: false,
            in_fence: false,
        }
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink) {
        self.scan.push(text);
        while !self.scan.as_str().is_empty() && self.step(sink) {}
    }

    /// Whether there is enough to go on.
    fn step(&mut self, sink: &mut Sink) -> bool {
        match self.state {
            State::Text => self.text(sink),
            State::Before => self.before(sink),
            State::Object(_) => self.object(sink),
            State::Between => self.between(sink),
            State::Name => self.name(sink),
            State::Arguments(_) => self.arguments(sink),
            State::Block => self.block(sink),
        }
    }

    fn text(&mut self, sink: &mut Sink) -> bool {
        let Some(marker) = self.rules.marker else {
            sink.text(&self.scan.take_all());
            return false;
        };
        match self.scan.next(&[marker]) {
            Next::Text(text) => {
                sink.text(&text);
                false
            }
            Next::Marker(text, _) => {
                sink.text(&text);
                self.marked(marker);
                true
            }
        }
    }

    fn marked(&mut self, marker: &str) {
        self.raw = marker.to_owned();
        self.is_marked = true;
        (self.in_array, self.in_fence) = (false, false);
        self.state = if self.rules.has_python { State::Block } else { State::Before };
    }

    /// Gives out what was held for a call, and goes on with text.
    fn give_up(&mut self, sink: &mut Sink) -> bool {
        sink.text(&std::mem::take(&mut self.raw));
        self.state = State::Text;
        true
    }

    fn take_raw(&mut self, len: usize) {
        self.raw += &self.scan.take(len);
    }

    fn before(&mut self, sink: &mut Sink) -> bool {
        match self.marker_here() {
            Some(Begins::Maybe) => return false,
            Some(Begins::Yes) => {
                sink.text(&std::mem::take(&mut self.raw));
                return self.text(sink);
            }
            Some(Begins::No) | None => {}
        }
        match self.scan.peek() {
            None => return false,
            Some(c) if c.is_whitespace() => self.take_raw(c.len_utf8()),
            Some('[') if !self.in_array => {
                self.in_array = true;
                self.take_raw(1);
            }
            Some('{') => self.open(),
            Some('`') if !self.in_fence && !self.is_marked => return self.fence(sink),
            Some(c) if self.is_marked && self.rules.has_named && !self.in_array && is_name(c) => {
                self.state = State::Name;
            }
            Some(_) => return self.give_up(sink),
        }
        true
    }

    /// Whether the marker stands here, while it has not stood before.
    fn marker_here(&self) -> Option<Begins> {
        let marker = self.rules.marker.filter(|_| !self.is_marked && !self.in_array && !self.in_fence)?;
        Some(self.scan.begins(marker))
    }

    fn open(&mut self) {
        let names = Arc::clone(&self.rules.names);
        let accepts = if self.is_marked { Accepts::Marked } else { Accepts::Named(names) };
        self.state = State::Object(CallObject::new(accepts));
    }

    /// The first line of a fenced block: of JSON, or it is text.
    fn fence(&mut self, sink: &mut Sink) -> bool {
        let text = self.scan.as_str();
        match text.find('\n') {
            Some(end) if matches!(text[..end].trim_end(), "```" | "```json") => {
                self.take_raw(end + 1);
                self.in_fence = true;
                true
            }
            None if text.len() <= FENCE_LEN_MAX => false,
            _ => self.give_up(sink),
        }
    }

    fn object(&mut self, sink: &mut Sink) -> bool {
        let (State::Object(object), Some(c)) = (&mut self.state, self.scan.peek()) else { return false };
        match object.push(c, sink) {
            Progress::More => drop(self.scan.take(c.len_utf8())),
            Progress::Done => {
                self.scan.take(c.len_utf8());
                self.called();
            }
            Progress::Not => {
                let held = std::mem::take(&mut self.raw);
                self.raw = if object.is_begun() { object.take_raw() } else { held + &object.take_raw() };
                return self.give_up(sink);
            }
        }
        true
    }

    fn called(&mut self) {
        self.raw.clear();
        self.state = State::Between;
    }

    fn between(&mut self, sink: &mut Sink) -> bool {
        if let Some(marker) = self.rules.marker {
            match self.scan.begins(marker) {
                Begins::Yes => {
                    self.scan.take(marker.len());
                    self.marked(marker);
                    return true;
                }
                Begins::Maybe => return false,
                Begins::No => {}
            }
        }
        if self.in_fence {
            match self.scan.begins("```") {
                Begins::Yes => {
                    self.scan.take(3);
                    self.in_fence = false;
                    self.raw.clear();
                    return true;
                }
                Begins::Maybe => return false,
                Begins::No => {}
            }
        }
        match self.scan.peek() {
            None => return false,
            Some(c) if c.is_whitespace() || matches!(c, ',' | ';') => self.take_raw(c.len_utf8()),
            Some(']') if self.in_array => {
                self.scan.take(1);
                self.in_array = false;
                self.raw.clear();
            }
            Some('{') => self.open(),
            Some(_) => return self.give_up(sink),
        }
        true
    }

    fn name(&mut self, sink: &mut Sink) -> bool {
        let text = self.scan.as_str();
        let end = text.find(['[', '{']);
        let name = text[..end.unwrap_or(text.len())].trim().to_owned();
        if name.contains(|c: char| !is_name(c)) || !Accepts::Marked.name(&name) {
            return self.give_up(sink);
        }
        let Some(end) = end else { return false };
        let after = &text[end..];
        // The form with an id has it between the name and the arguments; ours takes its place.
        let arguments = match after.strip_prefix(CALL_ID) {
            Some(id) => id.find(ARGS).map(|at| end + CALL_ID.len() + at + ARGS.len()),
            None if after.starts_with(ARGS) => Some(end + ARGS.len()),
            None if after.starts_with('{') => Some(end),
            None if ARGS.starts_with(after) || CALL_ID.starts_with(after) => None,
            None => return self.give_up(sink),
        };
        let Some(arguments) = arguments else { return false };
        match text[arguments..].trim_start().chars().next() {
            None => false,
            Some('{') => {
                let space = text[arguments..].len() - text[arguments..].trim_start().len();
                self.scan.take(arguments + space);
                self.raw.clear();
                sink.begin(&name);
                self.state = State::Arguments(Extent::default());
                true
            }
            Some(_) => self.give_up(sink),
        }
    }

    fn arguments(&mut self, sink: &mut Sink) -> bool {
        let (State::Arguments(extent), Some(c)) = (&mut self.state, self.scan.peek()) else { return false };
        let covers = extent.push(c);
        sink.arguments(&self.scan.take(c.len_utf8()));
        if covers == Covers::Last {
            self.called();
        }
        true
    }

    fn block(&mut self, sink: &mut Sink) -> bool {
        match self.scan.next(&["```"]) {
            Next::Text(text) => {
                self.raw += &text;
                false
            }
            Next::Marker(text, _) => {
                self.raw += &text;
                self.close_block("```", sink);
                true
            }
        }
    }

    /// Takes calls from a block that is here as a whole.
    fn close_block(&mut self, end: &str, sink: &mut Sink) {
        let block = std::mem::take(&mut self.raw);
        let inside = block.strip_prefix(TOOL_CODE).unwrap_or(&block);
        match pythonic::calls(inside) {
            Some(calls) => {
                for (name, arguments) in calls {
                    sink.begin(&name);
                    sink.arguments(&arguments);
                }
                self.state = State::Between;
            }
            None => {
                sink.text(&(block + end));
                self.state = State::Text;
            }
        }
    }

    pub(super) fn finish(&mut self, sink: &mut Sink) {
        match &mut self.state {
            State::Object(object) if !object.is_begun() => {
                let held = std::mem::take(&mut self.raw) + &object.take_raw();
                sink.text(&held);
            }
            State::Block => {
                self.raw += &self.scan.take_all();
                self.close_block("", sink);
            }
            State::Before | State::Name => sink.text(&std::mem::take(&mut self.raw)),
            State::Text | State::Object(_) | State::Between | State::Arguments(_) => {}
        }
        sink.text(&self.scan.take_all());
    }
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.')
}
