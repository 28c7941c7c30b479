//! Parts of an answer, in the order in which they come, and where parsers put them.

use std::sync::Arc;

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// More of the text for the reader.
    Text(String),
    /// More of what the model thinks before it answers.
    Reasoning(String),
    /// The model begins to call a function. Calls of one answer are numbered from 0, without gaps.
    CallBegin { index: usize, id: String, name: String },
    /// More of the JSON text of a call's arguments; `index` is that of the last [`Part::CallBegin`].
    CallArguments { index: usize, text: String },
}

/// Makes the ids of an answer's calls. They follow from the seed, so that an answer that is read again has the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct CallIds {
    seed: Arc<str>,
    choice: usize,
}

impl CallIds {
    pub(crate) fn new(seed: Arc<str>, choice: usize) -> Self {
        Self { seed, choice }
    }

    fn id(&self, index: usize) -> String {
        let hash = blake3::hash(format!("{} {} {index}", self.seed, self.choice).as_bytes()).to_hex();
        format!("call_{}", &hash.as_str()[..24])
    }
}

/// Takes what parsers find.
///
/// Space between text and a call, or between two calls, belongs to neither. So space at the end of the text is held
/// back until it is known what follows, where `holds_space`.
#[derive(Clone, Debug, Default)]
pub(super) struct Sink {
    parts: Vec<Part>,
    space: String,
    holds_space: bool,
    shows_reasoning: bool,
    calls: usize,
    ids: CallIds,
}

impl Sink {
    pub(super) fn new(ids: CallIds, holds_space: bool, shows_reasoning: bool) -> Self {
        Self { ids, holds_space, shows_reasoning, ..Self::default() }
    }

    pub(super) fn text(&mut self, text: &str) {
        let kept = if self.holds_space { text.trim_end().len() } else { text.len() };
        if kept > 0 {
            let mut shown = std::mem::take(&mut self.space);
            shown += &text[..kept];
            match self.parts.last_mut() {
                Some(Part::Text(last)) => last.push_str(&shown),
                _ => self.parts.push(Part::Text(shown)),
            }
        }
        self.space += &text[kept..];
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        if text.is_empty() || !self.shows_reasoning {
            return;
        }
        match self.parts.last_mut() {
            Some(Part::Reasoning(last)) => last.push_str(text),
            _ => self.parts.push(Part::Reasoning(text.to_owned())),
        }
    }

    pub(super) fn begin(&mut self, name: &str) {
        self.space.clear();
        let (index, name) = (self.calls, name.to_owned());
        self.parts.push(Part::CallBegin { index, id: self.ids.id(index), name });
        self.calls += 1;
    }

    /// More arguments of the call that was begun last.
    pub(super) fn arguments(&mut self, text: &str) {
        let index = self.calls.checked_sub(1).expect("arguments follow the beginning of their call");
        match self.parts.last_mut() {
            Some(Part::CallArguments { text: last, .. }) => last.push_str(text),
            _ => self.parts.push(Part::CallArguments { index, text: text.to_owned() }),
        }
    }

    /// Nothing follows: space behind the last call is none of the text's.
    pub(super) fn finish(&mut self) {
        let space = std::mem::take(&mut self.space);
        if self.calls == 0 && !space.is_empty() {
            self.holds_space = false;
            self.text(&space);
        }
    }

    pub(super) fn take(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.parts)
    }
}
