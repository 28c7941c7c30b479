//! Text to tokens and back, by the checkpoint's `tokenizer.json`.

use std::path::Path;

use crate::LoadError;

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

/// A loaded tokenizer. Truncation and padding that a `tokenizer.json` may carry are ignored.
pub struct Tokenizer {}

impl Tokenizer {
    /// Parses the bytes of a `tokenizer.json`; `origin` stands for its path in messages.
    pub fn from_bytes(_origin: &Path, _json: &[u8]) -> Result<Self, LoadError> {
        unimplemented!()
    }

    /// Token ids of a text. Special tokens written out in the text are recognised, as in transformers.
    pub fn encode(&self, _text: &str, _special: AddSpecial) -> Vec<u32> {
        unimplemented!()
    }

    /// The text of token ids; bytes that form no character become U+FFFD.
    pub fn decode(&self, _ids: &[u32], _special: ShowSpecial) -> String {
        unimplemented!()
    }

    /// The bytes that a token stands for in running text (a lone byte of a character for byte-level tokens), `None`
    /// for an id outside the vocabulary.
    pub fn token_bytes(&self, _id: u32) -> Option<Vec<u8>> {
        unimplemented!()
    }

    /// Whether the id is a special token.
    pub fn is_special(&self, _id: u32) -> bool {
        unimplemented!()
    }

    /// The id of a token given as in the vocabulary.
    pub fn id(&self, _token: &str) -> Option<u32> {
        unimplemented!()
    }

    /// One more than the largest id.
    pub fn vocab_len(&self) -> usize {
        unimplemented!()
    }
}
