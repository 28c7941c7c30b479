//! Tokens to text, one token at a time, without ever showing half a character.

use mainstay_models::tokenizer::{ShowSpecial, Tokenizer};

/// How many tokens of the past are decoded with the next one, so that spaces between words come out right.
const CONTEXT_TOKENS: usize = 6;

/// Most tokens that may be held back. Only text that never becomes valid UTF-8 gets there; cutting it bounds the
/// work per token.
const PENDING_TOKENS_MAX: usize = 64;

const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// The tokens `<0x00>` to `<0xFF>` of a tokenizer that spells unknown characters byte by byte.
///
/// A run of them decodes as a whole: if any part of the run is no UTF-8, every byte of it becomes U+FFFD. So its
/// text is known only when the run is over.
#[derive(Debug, Default)]
pub(crate) struct ByteTokens {
    ids: Vec<u32>,
}

impl ByteTokens {
    pub(crate) fn of(tokenizer: &Tokenizer) -> Self {
        let id = |byte: u8| tokenizer.id(&format!("<0x{byte:02X}>"));
        // A tokenizer may hold such a string as ordinary text; then it decodes to itself.
        let spells_bytes = id(b'A').is_some_and(|id| tokenizer.decode(&[id], ShowSpecial::Yes) == "A");
        let mut ids: Vec<u32> = if spells_bytes { (0..=255).filter_map(id).collect() } else { Vec::new() };
        ids.sort_unstable();
        Self { ids }
    }

    fn contains(&self, id: u32) -> bool {
        self.ids.binary_search(&id).is_ok()
    }
}

/// What decoding needs to know of a model and a request.
#[derive(Clone, Copy)]
pub(crate) struct Decoder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) byte_tokens: &'a ByteTokens,
    pub(crate) show: ShowSpecial,
    /// Special tokens that are shown in any case.
    pub(crate) markers: &'a [u32],
}

impl Decoder<'_> {
    /// The text of tokens by themselves.
    pub(crate) fn text(&self, ids: &[u32]) -> String {
        if self.show == ShowSpecial::Yes || self.markers.is_empty() {
            return self.tokenizer.decode(ids, self.show);
        }
        let shown: Vec<u32> = ids.iter().copied().filter(|id| !self.hides(*id)).collect();
        self.tokenizer.decode(&shown, ShowSpecial::Yes)
    }

    fn hides(&self, id: u32) -> bool {
        self.show == ShowSpecial::No && self.tokenizer.is_special(id) && !self.markers.contains(&id)
    }
}

/// The text of one growing list of tokens. The pieces that it returns, joined, are the decoding of the whole list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Detokenizer {
    /// Tokens whose text is not yet all out, after some whose text is: `settled` of them.
    ids: Vec<u32>,
    settled: usize,
    /// Text of the settled tokens alone.
    settled_text: String,
    /// Bytes already out of the text after the settled tokens.
    out_len: usize,
    /// Whether the last token with text is one of [`ByteTokens`].
    in_byte_run: bool,
}

impl Detokenizer {
    /// For text that continues a prompt: the space before its first word is shown, and bytes that complete a
    /// character of the prompt come out as that character.
    pub(crate) fn after(decoder: Decoder<'_>, prompt: &[u32]) -> Self {
        let tail = &prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..];
        let mut settled_text = decoder.text(tail);
        settled_text.truncate(settled_text.trim_end_matches(REPLACEMENT).len());
        Self { ids: tail.to_vec(), settled: tail.len(), settled_text, out_len: 0, in_byte_run: false }
    }

    /// Takes the next token; returns the text that is certain now, often that token's, sometimes none.
    pub(crate) fn push(&mut self, decoder: Decoder<'_>, id: u32) -> String {
        self.ids.push(id);
        let pending_len = self.ids.len() - self.settled;
        let forced = pending_len >= PENDING_TOKENS_MAX;
        if !decoder.hides(id) {
            self.in_byte_run = decoder.byte_tokens.contains(id);
        }
        if self.in_byte_run && !forced {
            return String::new();
        }
        let text = self.pending_text(decoder);
        let certain_len = match text.strip_suffix(REPLACEMENT) {
            // The last character may be the beginning of one that the next token completes.
            Some(rest) if !forced => rest.len(),
            _ => text.len(),
        };
        let piece = text.get(self.out_len..certain_len).unwrap_or_default().to_owned();
        self.out_len = self.out_len.max(certain_len);
        if text.is_empty() && forced {
            // Nothing but hidden tokens: forget them and keep the past that has text.
            self.ids.truncate(self.settled);
        } else if certain_len == text.len() && !text.is_empty() {
            self.settle(decoder);
        }
        piece
    }

    /// The text still held back, at the end of the list.
    pub(crate) fn finish(&mut self, decoder: Decoder<'_>) -> String {
        let text = self.pending_text(decoder);
        let piece = text.get(self.out_len..).unwrap_or_default().to_owned();
        self.out_len = text.len();
        piece
    }

    /// Text of the tokens after the settled ones.
    fn pending_text(&self, decoder: Decoder<'_>) -> String {
        let mut all = decoder.text(&self.ids);
        // Equal but for damaged bytes at the seam, which may decode otherwise beside their neighbours.
        let shared = all.chars().zip(self.settled_text.chars()).take_while(|(a, b)| a == b);
        let shared_len = shared.map(|(a, _)| a.len_utf8()).sum();
        all.split_off(shared_len)
    }

    /// All text is out: the pending tokens become the past of the next ones.
    fn settle(&mut self, decoder: Decoder<'_>) {
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.settled_text = decoder.text(&self.ids);
        self.out_len = 0;
    }
}

/// The text of one token by itself: as in running text, or `bytes:\x..` where it is no whole character.
pub(crate) fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            error.as_bytes().iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer(name: &str) -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("tokenizer.json");
        Tokenizer::from_bytes(&path, &std::fs::read(&path).unwrap()).unwrap()
    }

    const ALL: [&str; 5] = [
        "tests/fixtures/llama",
        "tests/fixtures/mistral",
        "tests/fixtures/qwen2",
        "tests/fixtures/qwen3",
        "models/default",
    ];

    /// SplitMix64 (Steele, Lea, Flood 2014).
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % bound as u64) as usize
        }
    }

    fn pieces(decoder: Decoder<'_>, ids: &[u32]) -> Vec<String> {
        let mut text = Detokenizer::default();
        let mut pieces: Vec<String> = ids.iter().map(|id| text.push(decoder, *id)).collect();
        pieces.push(text.finish(decoder));
        pieces
    }

    #[test]
    fn pieces_of_random_tokens_join_to_their_decoding() {
        let mut random = Random(1);
        for name in ALL {
            let tokenizer = tokenizer(name);
            let byte_tokens = ByteTokens::of(&tokenizer);
            for show in [ShowSpecial::Yes, ShowSpecial::No] {
                let decoder =
                    Decoder { tokenizer: &tokenizer, byte_tokens: &byte_tokens, show, markers: &[] };
                for _ in 0..300 {
                    let len = 1 + random.below(40);
                    let ids: Vec<u32> =
                        (0..len).map(|_| random.below(tokenizer.vocab_len()) as u32).collect();
                    assert_eq!(pieces(decoder, &ids).concat(), decoder.text(&ids), "{name} {show:?} {ids:?}");
                }
            }
        }
    }

    #[test]
    fn real_text_comes_whole_and_at_once() {
        let text = "naïve 日本語 🦀🏽 ü — \u{FFFD} done\n\n  two  spaces";
        for name in ALL {
            let tokenizer = tokenizer(name);
            let byte_tokens = ByteTokens::of(&tokenizer);
            let decoder = Decoder {
                tokenizer: &tokenizer,
                byte_tokens: &byte_tokens,
                show: ShowSpecial::No,
                markers: &[],
            };
            let ids = tokenizer.encode(text, mainstay_models::tokenizer::AddSpecial::No).unwrap();
            let pieces = pieces(decoder, &ids);
            assert_eq!(pieces.concat(), text, "{name}");
            // Only the one that is in the text.
            assert_eq!(pieces.concat().matches(REPLACEMENT).count(), 1, "{name}");
            assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 10, "{name}: {pieces:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_character_come_out_at_the_end() {
        let tokenizer = tokenizer("models/default");
        let byte_tokens = ByteTokens::of(&tokenizer);
        let decoder =
            Decoder { tokenizer: &tokenizer, byte_tokens: &byte_tokens, show: ShowSpecial::No, markers: &[] };
        let crab = tokenizer.encode("🦀", mainstay_models::tokenizer::AddSpecial::No).unwrap();
        assert!(crab.len() > 1, "this test needs a character of several tokens");
        let cut = &crab[..crab.len() - 1];
        let pieces = pieces(decoder, cut);
        assert!(pieces[..cut.len()].iter().all(String::is_empty), "{pieces:?}");
        assert_eq!(pieces[cut.len()], "\u{FFFD}");
    }

    #[test]
    fn a_continuation_keeps_the_space_and_leaks_no_prompt() {
        for name in ALL {
            let tokenizer = tokenizer(name);
            let byte_tokens = ByteTokens::of(&tokenizer);
            let decoder = Decoder {
                tokenizer: &tokenizer,
                byte_tokens: &byte_tokens,
                show: ShowSpecial::No,
                markers: &[],
            };
            let encode = |text| tokenizer.encode(text, mainstay_models::tokenizer::AddSpecial::Yes).unwrap();
            let all = encode("one two 日本 three");
            for cut in 1..all.len() {
                let mut text = Detokenizer::after(decoder, &all[..cut]);
                let mut rest: String = all[cut..].iter().map(|id| text.push(decoder, *id)).collect();
                rest += &text.finish(decoder);
                let prompt = decoder.text(&all[..cut]);
                let whole = prompt.trim_end_matches(REPLACEMENT).to_owned() + &rest;
                assert_eq!(whole, decoder.text(&all), "{name} cut at {cut}");
            }
        }
    }

    #[test]
    fn work_per_token_is_bounded() {
        for name in ALL {
            let tokenizer = tokenizer(name);
            let byte_tokens = ByteTokens::of(&tokenizer);
            let decoder = Decoder {
                tokenizer: &tokenizer,
                byte_tokens: &byte_tokens,
                show: ShowSpecial::No,
                markers: &[],
            };
            for id in 0..tokenizer.vocab_len() as u32 {
                let mut text = Detokenizer::default();
                for _ in 0..3 * PENDING_TOKENS_MAX {
                    text.push(decoder, id);
                    assert!(text.ids.len() <= 2 * PENDING_TOKENS_MAX, "{name}: {id} repeated");
                }
            }
        }
    }
}
