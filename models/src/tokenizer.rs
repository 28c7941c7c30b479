//! Text to tokens and back, by the checkpoint's `tokenizer.json`.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use tokenizers::{DecoderWrapper, PostProcessor, TruncationDirection};

use crate::LoadError;
use crate::gguf;

/// Whether encoding adds the special tokens of the tokenizer's post-processor (such as a leading `<s>`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddSpecial {
    /// As for a plain prompt.
    Yes,
    /// As for a rendered chat template, which writes its own.
    No,
}

/// Whether decoding shows special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShowSpecial {
    /// Their text appears.
    Yes,
    /// They decode to nothing.
    No,
}

/// A text that the vocabulary cannot express (a character it has no token for, and no token for the unknown).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the text cannot be tokenized: {0}")]
pub struct TokenizerError(pub String);

/// A text, or a pair of texts, as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens of all of it.
    pub tokens: Vec<u32>,
    /// Where the second text begins, special tokens of its own included.
    pub second: Option<usize>,
}

/// A loaded tokenizer. Truncation and padding that a `tokenizer.json` may carry are ignored.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    added: HashSet<u32>,
    special: HashSet<u32>,
    spelling: Spelling,
    vocab_len: usize,
}

/// How the vocabulary spells bytes.
#[derive(Debug, Default, PartialEq)]
struct Spelling {
    /// Every byte is a character of GPT-2's alphabet.
    byte_level: bool,
    /// `<0xAB>` is a byte.
    byte_fallback: bool,
    /// This character is a space (SentencePiece).
    space: Option<char>,
    /// Tokens without this prefix begin a word (WordPiece).
    inside_word: Option<String>,
}

impl Tokenizer {
    /// Parses the bytes of a `tokenizer.json`; `origin` stands for its path in messages.
    ///
    /// # Errors
    /// [`LoadError::Format`].
    pub fn from_bytes(origin: &Path, json: &[u8]) -> Result<Self, LoadError> {
        let wrong = |what: String| LoadError::format(origin, what);
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(json))
            .map_err(|e| wrong(format!("expected a tokenizer, found: {e}")))?;
        inner.with_truncation(None).map_err(|e| wrong(format!("truncation cannot be turned off: {e}")))?;
        inner.with_padding(None);
        let decoder = inner.get_added_tokens_decoder();
        let mut spelling = Spelling::default();
        if let Some(decoder) = inner.get_decoder() {
            spelling.learn(decoder);
        }
        let largest = inner.get_vocab(true).into_values().max();
        let vocab_len = largest.map_or(0, |id| id as usize + 1);
        let tokenizer = Self {
            added: decoder.keys().copied().collect(),
            special: decoder.iter().filter(|(_, t)| t.special).map(|(id, _)| *id).collect(),
            inner,
            spelling,
            vocab_len,
        };
        // The library finds some contradictions of a file only in use: find them now.
        match guarded(|| tokenizer.inner.encode_fast("", true)) {
            Ok(_) => Ok(tokenizer),
            Err(e) => Err(wrong(format!("expected a tokenizer, found one that fails on an empty text: {e}"))),
        }
    }

    /// The tokenizer in the metadata of a GGUF file, whether it has tensors or not.
    ///
    /// # Errors
    /// [`LoadError::Io`], [`LoadError::Format`].
    pub fn from_gguf(path: &Path) -> Result<Self, LoadError> {
        Self::from_bytes(path, &gguf::tokenizer(path)?)
    }

    /// Token ids of a text. Special tokens written out in the text are recognised, as in transformers.
    ///
    /// # Errors
    /// [`TokenizerError`]; never for vocabularies that hold all bytes, which are those of all current families.
    pub fn encode(&self, text: &str, special: AddSpecial) -> Result<Vec<u32>, TokenizerError> {
        let encoding = guarded(|| self.inner.encode_fast(text, special == AddSpecial::Yes));
        Ok(encoding.map_err(TokenizerError)?.get_ids().to_vec())
    }

    /// Token ids of a text, or of a pair of texts, with special tokens, cut to at most `most` tokens: a lone text at its
    /// end, a pair at the end of the second.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_within(
        &self,
        text: &str,
        second: Option<&str>,
        most: Option<usize>,
    ) -> Result<Encoded, TokenizerError> {
        let encoding = guarded(|| {
            let mut first = self.inner.encode_fast(text, false)?;
            let mut second = second.map(|text| self.inner.encode_fast(text, false)).transpose()?;
            if let Some(second) = &mut second {
                second.set_type_ids(vec![1; second.len()]);
            }
            if let Some(most) = most {
                let special = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(second.is_some()));
                let most = most.saturating_sub(special);
                match &mut second {
                    None => first.truncate(most, 0, TruncationDirection::Right),
                    Some(second) => {
                        second.truncate(most.saturating_sub(first.len()), 0, TruncationDirection::Right);
                    }
                }
            }
            self.inner.post_process(first, second, true)
        });
        let encoding = encoding.map_err(TokenizerError)?;
        let second = encoding.get_type_ids().iter().position(|&id| id == 1).filter(|_| second.is_some());
        Ok(Encoded { tokens: encoding.get_ids().to_vec(), second })
    }

    /// The text of token ids; bytes that form no character become U+FFFD, ids outside the vocabulary nothing.
    pub fn decode(&self, ids: &[u32], special: ShowSpecial) -> String {
        guarded(|| self.inner.decode(ids, special == ShowSpecial::No)).unwrap_or_else(|_| {
            // A decoder that fails leaves the tokens as they are spelled.
            let bytes = ids.iter().filter_map(|&id| self.token_bytes(id)).flatten().collect::<Vec<_>>();
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }

    /// The bytes that a token stands for in running text (a lone byte of a character for byte-level tokens), `None`
    /// for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        if self.added.contains(&id) {
            return Some(token.into_bytes());
        }
        Some(self.spelling.bytes(&token))
    }

    /// Whether the id is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The id of a token given as in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the largest id.
    pub fn vocab_len(&self) -> usize {
        self.vocab_len
    }
}

/// Runs the library, which asserts some properties of a file instead of checking them when it is read. It leaves
/// nothing half-done behind: what it mutates is a cache.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer contradicts itself".to_owned()),
    }
}

impl Spelling {
    /// What a decoder, or the parts of a sequence of decoders, tell.
    fn learn(&mut self, decoder: &DecoderWrapper) {
        const SENTENCEPIECE_SPACE: char = '\u{2581}';
        match decoder {
            DecoderWrapper::ByteLevel(_) => self.byte_level = true,
            DecoderWrapper::ByteFallback(_) => self.byte_fallback = true,
            DecoderWrapper::Metaspace(m) => self.space = Some(m.get_replacement()),
            // What it replaces is private to the library; in published tokenizers it is this character.
            DecoderWrapper::Replace(r) if r.content == " " => self.space = Some(SENTENCEPIECE_SPACE),
            DecoderWrapper::WordPiece(w) => self.inside_word = Some(w.prefix.clone()),
            DecoderWrapper::Sequence(s) => s.get_decoders().iter().for_each(|d| self.learn(d)),
            _ => {}
        }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        if self.byte_level {
            // A character outside the alphabet stands for itself, as in the library's decoder.
            if let Some(bytes) = token.chars().map(alphabet_byte).collect() {
                return bytes;
            }
            return token.as_bytes().to_vec();
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(token)
        {
            return vec![byte];
        }
        if let Some(prefix) = &self.inside_word {
            return match token.strip_prefix(prefix.as_str()) {
                Some(rest) => rest.as_bytes().to_vec(),
                None => format!(" {token}").into_bytes(),
            };
        }
        match self.space {
            Some(space) => token.replace(space, " ").into_bytes(),
            None => token.as_bytes().to_vec(),
        }
    }
}

/// The byte of `<0xAB>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// The byte of a character of GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on.
fn alphabet_byte(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u8::try_from(u32::from(c)) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => (0..=255).filter(|&b| !printable(b)).nth((u32::from(c) - 256) as usize),
    }
}
