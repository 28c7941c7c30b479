//! Text that arrives in pieces, in which markers are looked for.

/// Text that is not yet taken.
#[derive(Clone, Debug, Default)]
pub(super) struct Scan {
    held: String,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Text in which no marker begins; empty where more must come first.
    Text(String),
    /// Text and, behind it, a marker: an index into the list.
    Marker(String, usize),
}

/// Whether text begins with a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begins {
    Yes,
    No,
    /// As far as it goes.
    Maybe,
}

impl Scan {
    pub(super) fn push(&mut self, text: &str) {
        self.held.push_str(text);
    }

    /// Takes the text up to the first of the markers, and it. Of several that begin at one place the longest counts;
    /// none may be the beginning of another unless both are told apart by what the caller does with them.
    pub(super) fn next(&mut self, markers: &[&str]) -> Next {
        let places = markers.iter().enumerate().filter_map(|(marker, text)| {
            self.held.find(text).map(|start| (start, std::cmp::Reverse(text.len()), marker))
        });
        if let Some((start, _, marker)) = places.min() {
            let rest = self.held.split_off(start + markers[marker].len());
            self.held.truncate(start);
            return Next::Marker(std::mem::replace(&mut self.held, rest), marker);
        }
        let longest = markers.iter().map(|marker| marker.len()).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        let starts = self.held.char_indices().map(|(at, _)| at).filter(|at| *at >= first);
        let may_begin = |at: &usize| markers.iter().any(|marker| marker.starts_with(&self.held[*at..]));
        let safe = starts.into_iter().find(may_begin).unwrap_or(self.held.len());
        let rest = self.held.split_off(safe);
        Next::Text(std::mem::replace(&mut self.held, rest))
    }

    /// Whether what comes next is the marker.
    pub(super) fn begins(&self, marker: &str) -> Begins {
        if self.held.starts_with(marker) {
            Begins::Yes
        } else if marker.starts_with(&self.held) {
            Begins::Maybe
        } else {
            Begins::No
        }
    }

    /// The next character, which stays.
    pub(super) fn peek(&self) -> Option<char> {
        self.held.chars().next()
    }

    /// Takes bytes up to a border of characters.
    pub(super) fn take(&mut self, len: usize) -> String {
        let rest = self.held.split_off(len);
        std::mem::replace(&mut self.held, rest)
    }

    /// All that is not taken.
    pub(super) fn as_str(&self) -> &str {
        &self.held
    }

    pub(super) fn take_all(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
