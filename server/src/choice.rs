//! The text of one choice as its tokens come in, and how it ends.

use std::time::Duration;

use mainstay_engine::FinishReason;
use tokio::time::Instant;

use crate::detokenize::{Decoder, Detokenizer};
use crate::metrics::Outcome;
use crate::openai::options::{GenerationOptions, ShowStop};
use crate::output::{Parser, Part};
use crate::stop::{StopMatcher, StopOutcome};

/// Why a choice ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The limit of tokens, or the context.
    #[default]
    Length,
    /// A token that ends a text of this model.
    EndOfText,
    /// A stop token of the client's.
    Token(u32),
    /// A stop string of the client's.
    String(String),
}

impl Ending {
    pub(crate) fn outcome(&self) -> Outcome {
        if *self == Self::Length { Outcome::Length } else { Outcome::Stop }
    }
}

/// What a token adds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Grown {
    /// The text as the model wrote it.
    pub(crate) text: String,
    /// What is certain of its parts.
    pub(crate) parts: Vec<Part>,
    pub(crate) ending: Option<Ending>,
}

#[derive(Clone, Debug)]
pub(crate) struct ChoiceText {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    parser: Parser,
    generated: usize,
    /// Characters detokenized, given out or held back, after those of an echoed prompt.
    offset: usize,
    last_token_at: Option<Instant>,
    ending: Option<Ending>,
}

impl ChoiceText {
    pub(crate) fn new(detokenizer: Detokenizer, stop_strings: Vec<String>, parser: Parser) -> Self {
        Self {
            detokenizer,
            stops: StopMatcher::new(stop_strings),
            parser,
            generated: 0,
            offset: 0,
            last_token_at: None,
            ending: None,
        }
    }

    pub(crate) fn ended(&self) -> bool {
        self.ending.is_some()
    }

    pub(crate) fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// Tokens so far.
    pub(crate) fn generated(&self) -> usize {
        self.generated
    }

    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// Whether the token that comes next is thought of as reasoning.
    pub(crate) fn is_reasoning(&self) -> bool {
        self.parser.is_reasoning()
    }

    /// Counts characters of an echoed prompt.
    pub(crate) fn skip(&mut self, characters: usize) {
        self.offset += characters;
    }

    /// Time since the token before, if there was one; call it once per token.
    pub(crate) fn interval(&mut self) -> Option<Duration> {
        let now = Instant::now();
        self.last_token_at.replace(now).map(|before| now - before)
    }

    /// Takes the next token. If a stop string is complete with it, the choice has ended.
    pub(crate) fn push(&mut self, decoder: Decoder<'_>, options: &GenerationOptions, id: u32) -> Grown {
        self.generated += 1;
        if options.stop_tokens.contains(&id) && options.show_stop == ShowStop::No {
            // Whatever it decodes to is not part of the text; the engine ends the choice with it.
            return Grown::default();
        }
        let piece = self.detokenizer.push(decoder, id);
        let grown = self.piece(&piece, options);
        self.parsed(grown)
    }

    /// The engine has ended the choice: gives out what was held back.
    pub(crate) fn finish(
        &mut self,
        decoder: Decoder<'_>,
        options: &GenerationOptions,
        reason: FinishReason,
    ) -> Grown {
        let piece = self.detokenizer.finish(decoder);
        let mut grown = self.piece(&piece, options);
        if grown.ending.is_none() {
            grown.text += &self.stops.finish();
            grown.ending = Some(match reason {
                FinishReason::Length => Ending::Length,
                FinishReason::Stop(token) if options.own_stop_tokens.contains(&token) => Ending::Token(token),
                FinishReason::Stop(_) | FinishReason::Stopped | FinishReason::Complete => Ending::EndOfText,
            });
        }
        self.ending.clone_from(&grown.ending);
        self.parsed(grown)
    }

    fn parsed(&mut self, mut grown: Grown) -> Grown {
        grown.parts = self.parser.push(&grown.text);
        if grown.ending.is_some() {
            grown.parts.extend(self.parser.finish());
        }
        grown
    }

    fn piece(&mut self, piece: &str, options: &GenerationOptions) -> Grown {
        self.offset += piece.chars().count();
        if self.generated < options.min_tokens {
            return Grown { text: piece.to_owned(), ..Grown::default() };
        }
        match self.stops.push(piece) {
            StopOutcome::Text(text) => Grown { text, ..Grown::default() },
            StopOutcome::Stopped { mut text, stop } => {
                let stop = self.stops.get(stop).to_owned();
                if options.show_stop == ShowStop::Yes {
                    text += &stop;
                }
                self.ending = Some(Ending::String(stop));
                Grown { text, ending: self.ending.clone(), ..Grown::default() }
            }
        }
    }
}
