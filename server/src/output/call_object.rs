//! A JSON object that may be a call, `{"name": .., "arguments": {..}}`, read character by character.

use std::sync::Arc;

use serde_json::Value;

use super::part::Sink;

/// Longest name of a function that is believed to be one.
const NAME_LEN_MAX: usize = 128;

/// Which objects are calls.
#[derive(Clone, Debug)]
pub(super) enum Accepts {
    /// All with a name: a marker has said that it is a call.
    Marked,
    /// Those with arguments and one of these names: without a marker it may be an answer in JSON.
    Named(Arc<[String]>),
}

impl Accepts {
    pub(super) fn name(&self, name: &str) -> bool {
        match self {
            Self::Marked => {
                let is_letter = |c: char| !c.is_whitespace() && !c.is_control();
                (1..=NAME_LEN_MAX).contains(&name.len()) && name.chars().all(is_letter)
            }
            Self::Named(names) => names.iter().any(|known| known == name),
        }
    }
}

/// What a character did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    More,
    /// The call ends with it.
    Done,
    /// It cannot be read as a call with this character, which is not taken. What [`CallObject::take_raw`] has is text.
    Not,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Before,
    /// A key or the end.
    Key,
    InKey,
    Colon,
    Value,
    InValue,
    /// A comma or the end.
    After,
}

/// An object under way.
#[derive(Clone, Debug)]
pub(super) struct CallObject {
    accepts: Accepts,
    state: State,
    /// All of it, while it is not known to be a call.
    raw: String,
    key: String,
    extent: Extent,
    /// The value under way, but for arguments that are given out.
    value: String,
    name: Option<String>,
    /// Arguments that came before the name.
    early: Option<String>,
    is_begun: bool,
    /// The value under way is given out as it comes.
    is_streaming: bool,
}

impl CallObject {
    pub(super) fn new(accepts: Accepts) -> Self {
        Self {
            accepts,
            state: State::Before,
            raw: String::new(),
            key: String::new(),
            extent: Extent::default(),
            value: String::new(),
            name: None,
            early: None,
            is_begun: false,
            is_streaming: false,
        }
    }

    /// Whether it is known to be a call.
    pub(super) fn is_begun(&self) -> bool {
        self.is_begun
    }

    /// What was taken and is no part of a call.
    pub(super) fn take_raw(&mut self) -> String {
        std::mem::take(&mut self.raw)
    }

    pub(super) fn push(&mut self, c: char, sink: &mut Sink) -> Progress {
        let progress = self.step(c, sink);
        if self.is_begun {
            self.raw.clear();
        } else if progress != Progress::Not {
            self.raw.push(c);
        }
        progress
    }

    fn step(&mut self, c: char, sink: &mut Sink) -> Progress {
        match self.state {
            State::InKey => {
                self.key.push(c);
                if self.extent.push(c) == Covers::Last {
                    self.state = State::Colon;
                }
            }
            State::InValue => return self.in_value(c, sink),
            _ if c.is_ascii_whitespace() => {}
            State::Before if c == '{' => self.state = State::Key,
            State::Key if c == '"' => {
                self.key = c.to_string();
                self.extent = Extent::default();
                self.extent.push(c);
                self.state = State::InKey;
            }
            State::Colon if c == ':' => self.state = State::Value,
            State::Value => return self.begin_value(c, sink),
            State::After if c == ',' => self.state = State::Key,
            State::Key | State::After if c == '}' => return self.close(sink),
            State::Before | State::Key | State::Colon | State::After => return Progress::Not,
        }
        Progress::More
    }

    fn begin_value(&mut self, c: char, sink: &mut Sink) -> Progress {
        self.key = serde_json::from_str(&self.key).unwrap_or_default();
        self.value.clear();
        self.extent = Extent::default();
        self.is_streaming = false;
        self.state = State::InValue;
        if self.is_arguments()
            && c == '{'
            && !self.is_begun
            && let Some(name) = &self.name
        {
            sink.begin(name);
            self.is_begun = true;
            self.is_streaming = true;
        }
        self.in_value(c, sink)
    }

    fn in_value(&mut self, c: char, sink: &mut Sink) -> Progress {
        let covers = self.extent.push(c);
        if covers == Covers::Not {
            if !self.end_value(sink) {
                return Progress::Not;
            }
            return self.step(c, sink);
        }
        if self.is_streaming {
            let mut bytes = [0; 4];
            sink.arguments(c.encode_utf8(&mut bytes));
        } else {
            self.value.push(c);
        }
        if covers == Covers::Last && !self.end_value(sink) {
            return Progress::Not;
        }
        Progress::More
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    /// Whether it can still be a call.
    fn end_value(&mut self, sink: &mut Sink) -> bool {
        self.state = State::After;
        if self.is_begun {
            return true;
        }
        if self.key == "name" && self.name.is_none() {
            let name = serde_json::from_str::<String>(&self.value).ok();
            let Some(name) = name.filter(|name| self.accepts.name(name)) else { return false };
            if let Some(arguments) = self.early.take() {
                self.call(&name, &arguments, sink);
            }
            self.name = Some(name);
        } else if self.is_arguments() {
            let Some(arguments) = arguments(&self.value) else { return false };
            match self.name.clone() {
                Some(name) => self.call(&name, &arguments, sink),
                None => self.early = Some(arguments),
            }
        }
        true
    }

    fn close(&mut self, sink: &mut Sink) -> Progress {
        match self.name.clone() {
            _ if self.is_begun => Progress::Done,
            Some(name) if matches!(self.accepts, Accepts::Marked) => {
                self.call(&name, "{}", sink);
                Progress::Done
            }
            _ => Progress::Not,
        }
    }

    fn call(&mut self, name: &str, arguments: &str, sink: &mut Sink) {
        sink.begin(name);
        sink.arguments(arguments);
        self.is_begun = true;
    }
}

/// The JSON text of a call's arguments: an object, an object inside a string, or none.
pub(super) fn arguments(value: &str) -> Option<String> {
    match value.as_bytes().first() {
        Some(b'{') => Some(value.to_owned()),
        Some(b'"') => {
            let inner: String = serde_json::from_str(value).ok()?;
            if inner.trim().is_empty() {
                return Some("{}".to_owned());
            }
            serde_json::from_str::<Value>(&inner).ok().filter(Value::is_object).map(|_| inner)
        }
        _ => (value == "null").then(|| "{}".to_owned()),
    }
}

/// Where a JSON value ends, told by brackets and quotes alone.
#[derive(Clone, Debug, Default)]
pub(super) struct Extent {
    depth: usize,
    is_begun: bool,
    in_string: bool,
    is_escaped: bool,
}

/// Whether a character is part of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Covers {
    Yes,
    /// And the value ends with it.
    Last,
    /// The value, a number or word, has ended before it.
    Not,
}

impl Extent {
    pub(super) fn push(&mut self, c: char) -> Covers {
        let is_first = !std::mem::replace(&mut self.is_begun, true);
        if self.in_string {
            match c {
                _ if self.is_escaped => self.is_escaped = false,
                '\\' => self.is_escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return if self.depth == 0 && !self.in_string { Covers::Last } else { Covers::Yes };
        }
        match c {
            '"' if self.depth > 0 || is_first => self.in_string = true,
            '{' | '[' if self.depth > 0 || is_first => self.depth += 1,
            '}' | ']' if self.depth > 0 => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Covers::Last;
                }
            }
            _ if self.depth > 0 => {}
            ',' | '}' | ']' => return Covers::Not,
            _ if c.is_ascii_whitespace() => return Covers::Not,
            _ => {}
        }
        Covers::Yes
    }
}
