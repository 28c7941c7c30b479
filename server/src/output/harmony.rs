//! OpenAI's Harmony format: messages with a channel and, where they call a function, a recipient.

use super::part::Sink;
use super::scan::{Next, Scan};

pub(super) const START: &str = "<|start|>";
pub(super) const CHANNEL: &str = "<|channel|>";
pub(super) const MESSAGE: &str = "<|message|>";
pub(super) const CONSTRAIN: &str = "<|constrain|>";
pub(super) const END: &str = "<|end|>";
pub(super) const CALL: &str = "<|call|>";
pub(super) const RETURN: &str = "<|return|>";

/// Longest header of a message.
const HEADER_LEN_MAX: usize = 512;
const FUNCTIONS: &str = "functions.";

/// What a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Reasoning,
    Call,
}

#[derive(Clone, Debug)]
enum State {
    /// The prompt has begun a message; its header goes on, or a text without one comes.
    Before,
    /// Between the beginning of a message and its text.
    Header,
    Body(Kind),
    /// After a message.
    Between,
}

/// Which messages are more than text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) takes_reasoning: bool,
    pub(super) takes_calls: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Harmony {
    rules: Rules,
    scan: Scan,
    state: State,
    header: String,
    /// Something of the call's arguments has come.
    has_arguments: bool,
    /// A message of the kind has come, from which the next one is to stand apart.
    has_text: bool,
    has_reasoning: bool,
}

impl Harmony {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            scan: Scan::default(),
            state: State::Before,
            header: String::new(),
            has_arguments: false,
            has_text: false,
            has_reasoning: false,
        }
    }

    pub(super) fn is_reasoning(&self) -> bool {
        matches!(self.state, State::Body(Kind::Reasoning))
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink) {
        self.scan.push(text);
        while !self.scan.as_str().is_empty() && self.step(sink) {}
    }

    /// Whether there is enough to go on.
    fn step(&mut self, sink: &mut Sink) -> bool {
        match self.state {
            State::Before => self.before(),
            State::Header => self.header(sink),
            State::Body(kind) => match self.scan.next(&[END, CALL, RETURN, START, CHANNEL]) {
                Next::Text(text) => {
                    self.body(kind, &text, sink);
                    false
                }
                Next::Marker(text, marker) => {
                    self.body(kind, &text, sink);
                    self.end_body(sink);
                    self.state = if marker < 3 { State::Between } else { State::Header };
                    if marker == 4 {
                        self.header = CHANNEL.to_owned();
                    }
                    true
                }
            },
            State::Between => match self.scan.next(&[START, CHANNEL]) {
                // Between messages there is nothing; what is there all the same is shown.
                Next::Text(text) => {
                    sink.text(&text);
                    false
                }
                Next::Marker(text, marker) => {
                    sink.text(&text);
                    self.header = if marker == 1 { CHANNEL.to_owned() } else { String::new() };
                    self.state = State::Header;
                    true
                }
            },
        }
    }

    fn before(&mut self) -> bool {
        const OPENINGS: [&str; 4] = [CHANNEL, MESSAGE, START, " to="];
        let text = self.scan.as_str();
        if OPENINGS.iter().any(|opening| text.starts_with(opening)) {
            self.state = State::Header;
        } else if OPENINGS.iter().any(|opening| opening.starts_with(text)) {
            return false;
        } else {
            self.state = State::Body(Kind::Text);
        }
        true
    }

    fn header(&mut self, sink: &mut Sink) -> bool {
        match self.scan.next(&[MESSAGE, START]) {
            Next::Marker(text, marker) => {
                let header = std::mem::take(&mut self.header) + &text;
                let is_header = header.len() <= HEADER_LEN_MAX;
                if marker == 0 {
                    let kind = if is_header { self.kind(&header, sink) } else { Kind::Text };
                    self.state = State::Body(kind);
                }
                if !is_header {
                    sink.text(&header);
                    sink.text(if marker == 0 { MESSAGE } else { "" });
                }
                true
            }
            Next::Text(text) => {
                self.header += &text;
                if self.header.len() <= HEADER_LEN_MAX {
                    return false;
                }
                sink.text(&std::mem::take(&mut self.header));
                self.state = State::Body(Kind::Text);
                true
            }
        }
    }

    /// Begins the message that a header announces, such as `assistant<|channel|>commentary to=functions.f `.
    fn kind(&mut self, header: &str, sink: &mut Sink) -> Kind {
        let channel = header.split(CHANNEL).nth(1).unwrap_or_default();
        let channel: String = channel.chars().take_while(|c| c.is_ascii_alphanumeric()).collect();
        let is_end = |c: char| c.is_whitespace() || c == '<';
        let recipient = header.split("to=").nth(1).and_then(|rest| rest.split(is_end).next());
        if self.rules.takes_calls
            && let Some(name) = recipient.and_then(|recipient| recipient.strip_prefix(FUNCTIONS))
            && !name.is_empty()
        {
            sink.begin(name);
            self.has_arguments = false;
            return Kind::Call;
        }
        if channel == "analysis" && self.rules.takes_reasoning {
            if std::mem::replace(&mut self.has_reasoning, true) {
                sink.reasoning("\n\n");
            }
            return Kind::Reasoning;
        }
        if std::mem::replace(&mut self.has_text, true) {
            sink.text("\n\n");
        }
        Kind::Text
    }

    fn body(&mut self, kind: Kind, text: &str, sink: &mut Sink) {
        match kind {
            Kind::Text => sink.text(text),
            Kind::Reasoning => sink.reasoning(text),
            Kind::Call if text.is_empty() => {}
            Kind::Call => {
                self.has_arguments = true;
                sink.arguments(text);
            }
        }
    }

    fn end_body(&mut self, sink: &mut Sink) {
        if matches!(self.state, State::Body(Kind::Call)) && !self.has_arguments {
            sink.arguments("{}");
        }
    }

    pub(super) fn finish(&mut self, sink: &mut Sink) {
        let rest = self.scan.take_all();
        match self.state {
            State::Body(kind) => {
                self.body(kind, &rest, sink);
                self.end_body(sink);
            }
            // An answer that was cut inside a header has no more text.
            State::Header => {}
            State::Before | State::Between => sink.text(&rest),
        }
    }
}
