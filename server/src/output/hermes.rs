//! Calls as Hermes and Qwen write them: `<tool_call>{"name": .., "arguments": ..}</tool_call>`.

use super::call_object::{Accepts, CallObject, Progress};
use super::part::Sink;
use super::scan::{Begins, Next, Scan};

pub(super) const OPEN: &str = "<tool_call>";
pub(super) const CLOSE: &str = "</tool_call>";

#[derive(Clone, Debug)]
enum State {
    Text,
    /// Between the tags, with what is text if no call comes.
    Inside(String, CallObject),
    /// After a call, before the last tag.
    After,
}

#[derive(Clone, Debug)]
pub(super) struct Hermes {
    scan: Scan,
    state: State,
}

impl Hermes {
    pub(super) fn new() -> Self {
        Self { scan: Scan::default(), state: State::Text }
    }

    pub(super) fn push(&mut self, text: &str, sink: &mut Sink) {
        self.scan.push(text);
        while !self.scan.as_str().is_empty() {
            match &mut self.state {
                State::Text => match self.scan.next(&[OPEN]) {
                    Next::Text(text) => return sink.text(&text),
                    Next::Marker(text, _) => {
                        sink.text(&text);
                        self.open(OPEN.to_owned());
                    }
                },
                State::Inside(opening, object) => {
                    let Some(c) = self.scan.peek() else { return };
                    match object.push(c, sink) {
                        Progress::More => drop(self.scan.take(c.len_utf8())),
                        Progress::Done => {
                            self.scan.take(c.len_utf8());
                            self.state = State::After;
                        }
                        Progress::Not => {
                            if !object.is_begun() {
                                sink.text(&(std::mem::take(opening) + &object.take_raw()));
                            }
                            self.state = State::Text;
                        }
                    }
                }
                State::After => {
                    if !self.after() {
                        return;
                    }
                }
            }
        }
    }

    fn open(&mut self, opening: String) {
        self.state = State::Inside(opening, CallObject::new(Accepts::Marked));
    }

    /// Whether there is enough to go on.
    fn after(&mut self) -> bool {
        let text = self.scan.as_str();
        self.scan.take(text.len() - text.trim_start().len());
        match (self.scan.begins(CLOSE), self.scan.peek()) {
            (Begins::Yes, _) => {
                self.scan.take(CLOSE.len());
                self.state = State::Text;
            }
            (Begins::Maybe, _) => return false,
            // Several calls between two tags.
            (Begins::No, Some('{')) => self.open(String::new()),
            (Begins::No, _) => self.state = State::Text,
        }
        true
    }

    pub(super) fn finish(&mut self, sink: &mut Sink) {
        if let State::Inside(opening, object) = &mut self.state {
            let opening = std::mem::take(opening);
            if !object.is_begun() {
                sink.text(&(opening + &object.take_raw()));
            }
        }
        sink.text(&self.scan.take_all());
    }
}
