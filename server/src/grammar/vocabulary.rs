//! A model's vocabulary as a tree of bytes, which grammars are matched against.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie,
};
use mainstay_models::tokenizer::Tokenizer;

use super::compile::limits;

/// The tree, and what is derived from it once. Made when a model sees its first constraint.
pub(crate) struct Vocabulary {
    pub(crate) factory: ParserFactory,
    /// Special tokens by their text.
    special: Vec<(String, u32)>,
}

impl Vocabulary {
    /// Of a model that draws token ids below `len`.
    pub(crate) fn of(tokenizer: &Tokenizer, len: usize) -> Result<Self, String> {
        let known = u32::try_from(len).map_err(|_| format!("a vocabulary of {len} tokens is too large"))?;
        let words: Vec<Vec<u8>> = (0..known).map(|id| word(tokenizer, id)).collect();
        let special = (0..known).filter(|id| tokenizer.is_special(*id)).filter_map(|id| {
            let text = String::from_utf8(tokenizer.token_bytes(id)?).ok()?;
            Some((text, id))
        });
        // The text's end is no word of the grammar: the masker adds the tokens that end it.
        let info = TokRxInfo::new(known, INVALID_TOKEN);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| error.to_string())?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory, special: special.collect() })
    }

    /// The special token of this text.
    pub(crate) fn special(&self, text: &str) -> Option<u32> {
        self.special.iter().find(|(name, _)| name == text).map(|(_, id)| *id)
    }
}

/// The bytes of a token; none where no text may hold it.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    // This byte is part of no character, and marks special tokens, which are part of no text either.
    const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    if tokenizer.is_special(id) {
        return [&[MARKER], &bytes[..]].concat();
    }
    if bytes.contains(&MARKER) { Vec::new() } else { bytes }
}
