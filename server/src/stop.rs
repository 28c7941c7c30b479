//! Stop strings: found across token borders, cut at character borders.

/// Looks for stop strings in text that arrives in pieces.
///
/// The string that is complete first wins, and of several complete at the same character the longest, so the result
/// does not depend on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text so far, if a stop string may begin in it.
    held: String,
}

/// What became of a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StopOutcome {
    /// This text is out of reach of any stop string.
    Text(String),
    /// A stop string was found; this is the text before it that was not yet given out.
    Stopped {
        /// The last text.
        text: String,
        /// The stop string, an index into the list.
        stop: usize,
    },
}

impl StopMatcher {
    /// Empty strings are no stop strings.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        assert!(stops.iter().all(|stop| !stop.is_empty()), "a stop string is empty");
        Self { stops, held: String::new() }
    }

    pub(crate) fn get(&self, stop: usize) -> &str {
        &self.stops[stop]
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, piece: &str) -> StopOutcome {
        if self.stops.is_empty() {
            return StopOutcome::Text(piece.to_owned());
        }
        self.held.push_str(piece);
        let found = self.stops.iter().enumerate().filter_map(|(stop, text)| {
            let start = self.held.find(text.as_str())?;
            Some((start + text.len(), start, stop))
        });
        if let Some((_, start, stop)) = found.min() {
            self.held.truncate(start);
            return StopOutcome::Stopped { text: std::mem::take(&mut self.held), stop };
        }
        let kept = self.held.split_off(self.safe_len());
        StopOutcome::Text(std::mem::replace(&mut self.held, kept))
    }

    /// The text still held back, when no more will come.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the held text in which no stop string can begin.
    fn safe_len(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let first = self.held.len().saturating_sub(longest);
        let starts = self.held.char_indices().map(|(at, _)| at).filter(|at| *at >= first);
        starts.into_iter().find(begins).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text and stop string of a text that arrives in pieces.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = String::new();
        for piece in pieces {
            match matcher.push(piece) {
                StopOutcome::Text(text) => out += &text,
                StopOutcome::Stopped { text, stop } => {
                    return (out + &text, Some(matcher.get(stop).to_owned()));
                }
            }
        }
        (out + &matcher.finish(), None)
    }

    #[test]
    fn every_split_gives_the_same_text() {
        let cases: [(&[&str], &str, &str, Option<&str>); 8] = [
            (&["STOP"], "alphaSTOPomega", "alpha", Some("STOP")),
            (&["STOP"], "alphaSTOomega", "alphaSTOomega", None),
            (&["aab"], "aaaab!", "aa", Some("aab")),
            (&["é日"], "xé日y", "x", Some("é日")),
            (&["é日"], "xéé月", "xéé月", None),
            (&["abcd", "bc"], "xabcd", "xa", Some("bc")),
            (&["bc", "abc"], "xabcd", "x", Some("abc")),
            (&["🦀"], "日🦀", "日", Some("🦀")),
        ];
        for (stops, text, expected, stop) in cases {
            let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            for &i in &borders {
                for &j in borders.iter().filter(|j| **j >= i) {
                    let found = run(stops, &[&text[..i], &text[i..j], &text[j..]]);
                    assert_eq!(
                        found,
                        (expected.to_owned(), stop.map(str::to_owned)),
                        "{text:?} cut at {i}, {j}"
                    );
                }
            }
        }
    }

    #[test]
    fn text_is_held_back_only_while_a_stop_string_may_begin_in_it() {
        let mut matcher = StopMatcher::new(vec!["END".to_owned()]);
        assert_eq!(matcher.push("the E"), StopOutcome::Text("the ".to_owned()));
        assert_eq!(matcher.push("N"), StopOutcome::Text(String::new()));
        assert_eq!(matcher.push("x"), StopOutcome::Text("ENx".to_owned()));
    }
}
