//! The state of one answer under its constraint, and the masks that follow from it.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::TokenParser;
use llguidance::api::StopReason;
use mainstay_engine::{Grammar, Masker};

use super::source::Wanted;

/// Longest message of the library that a client sees.
const MESSAGE_LEN: usize = 300;

/// A constraint, ready for any number of answers.
pub(crate) struct Compiled {
    wanted: Wanted,
    /// At its beginning. Nothing but copies of it moves on, so that what an answer costs is gone with the answer.
    start: Mutex<TokenParser>,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Compiled").field(&self.wanted).finish()
    }
}

impl Compiled {
    pub(crate) fn new(wanted: Wanted, start: TokenParser) -> Self {
        Self { wanted, start: Mutex::new(start) }
    }

    pub(crate) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// For the engine. `ends` are the tokens that end a text; there may be none.
    pub(crate) fn grammar(self: &Arc<Self>, ends: Vec<u32>) -> Arc<dyn Grammar> {
        Arc::new(Ruled { compiled: Arc::clone(self), ends: ends.into() })
    }
}

/// A constraint with the tokens that may end its texts.
#[derive(Debug)]
struct Ruled {
    compiled: Arc<Compiled>,
    ends: Arc<[u32]>,
}

impl Grammar for Ruled {
    fn start(&self) -> Box<dyn Masker> {
        let parser = self.compiled.start.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Box::new(Answer { parser, ends: Arc::clone(&self.ends) })
    }
}

/// One answer.
struct Answer {
    parser: TokenParser,
    ends: Arc<[u32]>,
}

impl Masker for Answer {
    fn advance(&mut self, drawn: &[u32], mask: &mut Vec<u32>) -> Result<(), String> {
        mask.clear();
        for &token in drawn {
            if self.parser.stopped() {
                return Err(format!("token {token} follows the end of the text"));
            }
            self.parser.consume_token(token).map_err(shown)?;
            self.parser.check_stop().map_err(shown)?;
        }
        let may_end = self.fill(mask)?;
        if may_end {
            self.allow_ends(mask);
        }
        Ok(())
    }
}

impl Answer {
    /// Fills the mask with the tokens that go on with the text; whether it may end here.
    fn fill(&mut self, mask: &mut Vec<u32>) -> Result<bool, String> {
        if self.parser.stopped() {
            return Ok(true);
        }
        let may_end = self.parser.is_accepting();
        match self.parser.compute_mask() {
            Ok(tokens) => mask.extend_from_slice(tokens.as_slice()),
            Err(_) if self.parser.stop_reason() == StopReason::NoExtensionBias && may_end => {}
            Err(_) if self.parser.stop_reason() == StopReason::NoExtensionBias => {
                return Err("the model's vocabulary cannot spell what must follow".to_owned());
            }
            Err(error) => return Err(shown(error)),
        }
        Ok(may_end)
    }

    fn allow_ends(&self, mask: &mut Vec<u32>) {
        for &id in &*self.ends {
            let word = id as usize / 32;
            if mask.len() <= word {
                mask.resize(word + 1, 0);
            }
            mask[word] |= 1 << (id % 32);
        }
    }
}

/// What the library says, for a client: its first line, without states and traces. One that only announces takes the last
/// line along, after a drawing of the place.
pub(crate) fn shown(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut line = lines.next().unwrap_or("no reason is known").to_owned();
    if line.ends_with(':')
        && let Some(last) = lines.next_back()
    {
        line = format!("{line} {last}");
    }
    line.chars().take(MESSAGE_LEN).collect()
}
