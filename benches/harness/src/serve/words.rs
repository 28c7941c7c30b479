//! Text of about as many tokens as are wanted, for servers whose tokenizer is not known.

use crate::shape::Random;

/// Short words that most vocabularies have as one token.
const WORDS: [&str; 64] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "number", "night", "point", "home", "water", "room",
    "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job",
    "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father", "power",
    "hour", "game", "line", "end", "member", "law", "car",
];

/// Makes texts, each from a seed of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Words {
    /// Tokens of a word, as the server counts them.
    pub tokens_each: f64,
    /// Tokens of a request without any word.
    pub tokens_around: f64,
}

impl Words {
    /// Every word once, and every word twice: their lengths as the server counts them tell what a word is on average, and
    /// what stands around a text.
    pub fn probes() -> [String; 2] {
        let once = WORDS.join(" ");
        [once.clone(), format!("{once} {once}")]
    }

    /// What the server's counts of [`Words::probes`] say; `None` where they make no sense.
    pub fn counted(short: usize, long: usize) -> Option<Self> {
        let tokens_each = (long.checked_sub(short)? as f64) / WORDS.len() as f64;
        let tokens_around = (short as f64 - tokens_each * WORDS.len() as f64).max(0.0);
        (tokens_each > 0.0).then_some(Self { tokens_each, tokens_around })
    }

    /// A text of about `tokens` tokens; the same seed gives the same text, and a longer one goes on where a shorter ends.
    pub fn text(&self, seed: u64, tokens: usize) -> String {
        let count = (tokens as f64 / self.tokens_each).round().max(1.0) as usize;
        // seeds that lie side by side give unlike texts, and none may be 0
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut text = String::new();
        for i in 0..count {
            if i > 0 {
                text.push(' ');
            }
            text.push_str(WORDS[(random.next() >> 58) as usize]);
        }
        text
    }

    /// The same for a whole prompt, of which `around` stands around the words already.
    pub fn prompt(&self, seed: u64, tokens: usize) -> String {
        self.text(seed, (tokens as f64 - self.tokens_around).max(1.0) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_follow_what_was_counted() {
        let count = |text: &str| 10 + 3 * text.split(' ').count();
        let [short, long] = Words::probes().map(|text| count(&text));
        let words = Words::counted(short, long).unwrap();
        assert_eq!(words, Words { tokens_each: 3.0, tokens_around: 10.0 });
        assert_eq!(count(&words.prompt(7, 310)), 310);
        assert_eq!(Words::counted(5, 5), None);
    }

    #[test]
    fn a_text_is_its_seed_s_own_and_goes_on() {
        let words = Words { tokens_each: 1.0, tokens_around: 0.0 };
        assert!(words.text(3, 50).starts_with(&words.text(3, 20)));
        assert_ne!(words.text(3, 20), words.text(4, 20));
    }
}
