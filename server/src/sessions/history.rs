//! The conversation that a session holds, and which of its tokens stand for a new rendering of it.

use std::sync::Arc;

use mainstay_engine::store::Turn;
use mainstay_models::tokenizer::{AddSpecial, ShowSpecial, Tokenizer};
use serde_json::Value;

use super::record::TurnRecord;
use crate::error::ApiError;
use crate::output::Output;
use crate::prompt::{ChatInput, Ending};
use crate::registry::Model;

/// Tokens before a seam with which it is checked: enough for spaces and for characters of several tokens.
const SEAM_TOKENS: usize = 6;

/// Why earlier tokens were given up.
const REWROTE: &str = "template_rewrote_history";
const RETOKENIZED: &str = "retokenized";

/// The turns of a session, oldest first.
pub(crate) struct History {
    turns: Vec<(Arc<Turn>, TurnRecord)>,
}

/// A conversation as tokens: those of a session's first turns, then new ones.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fit {
    /// Turns of the session that stay.
    pub(crate) kept: usize,
    /// All tokens of the prompt.
    pub(crate) tokens: Vec<u32>,
    /// How many of them are new.
    pub(crate) sent_len: usize,
    /// Bytes of the session's text that stand, and the text after them.
    pub(crate) text_kept: usize,
    pub(crate) text: String,
    /// Why not all turns stay.
    pub(crate) reason: Option<&'static str>,
}

/// What stays of a session, and the text to be encoded after it.
struct Seam {
    kept: usize,
    text_kept: usize,
    /// Where the rendering goes on after the text that stands.
    suffix: String,
}

impl History {
    pub(crate) fn of(turns: Vec<Arc<Turn>>) -> Self {
        let with_record = |turn: Arc<Turn>| {
            let record = TurnRecord::read(&turn.meta);
            (turn, record)
        };
        Self { turns: turns.into_iter().map(with_record).collect() }
    }

    pub(crate) fn len(&self) -> usize {
        self.turns.len()
    }

    pub(crate) fn truncate(&mut self, turns: usize) {
        self.turns.truncate(turns);
    }

    pub(crate) fn last(&self) -> Option<&(Arc<Turn>, TurnRecord)> {
        self.turns.last()
    }

    /// The messages after the first `turns` turns.
    pub(crate) fn messages(&self, turns: usize) -> Vec<Value> {
        self.turns.iter().skip(turns).flat_map(|(_, record)| record.all_messages()).collect()
    }

    /// The messages of the first `turns` turns that set the rules.
    pub(crate) fn rules(&self, turns: usize) -> Vec<Value> {
        let messages = self.turns.iter().take(turns).flat_map(|(_, record)| record.all_messages());
        messages.filter(|message| matches!(message["role"].as_str(), Some("system" | "developer"))).collect()
    }

    /// How many turns `messages` begin with, and how many messages these are.
    pub(crate) fn common(&self, messages: &[Value]) -> (usize, usize) {
        let mut at = 0;
        for (turns, (_, record)) in self.turns.iter().enumerate() {
            let own = record.all_messages();
            let sent = messages.get(at..at + own.len());
            if !sent.is_some_and(|sent| sent.iter().zip(&own).all(|(sent, own)| is_same(own, sent))) {
                return (turns, at);
            }
            at += own.len();
        }
        (self.turns.len(), at)
    }

    /// The tokens of the first `turns` turns.
    pub(crate) fn tokens(&self, turns: usize) -> Vec<u32> {
        self.turns.iter().take(turns).flat_map(|(turn, _)| turn.tokens.iter().copied()).collect()
    }

    /// The text that the tokens stand for, `None` where a record does not fit the ones before it.
    fn text(&self) -> Option<String> {
        self.turns.iter().try_fold(String::new(), |mut text, (turn, record)| {
            if turn.meta.is_empty() {
                return None;
            }
            let kept = text.get(..record.text_kept)?.len();
            text.truncate(kept);
            Some(text + &record.text)
        })
    }

    /// The most turns whose text `rendered` begins with, and the length of that text.
    fn standing(&self, rendered: &str) -> (usize, usize) {
        let (mut text, mut best) = (String::new(), (0, 0));
        // Bytes of the text that agree with the rendering.
        let mut agree = 0;
        for (at, (turn, record)) in self.turns.iter().enumerate() {
            if turn.meta.is_empty() {
                // A turn that a fork or a rollback cut: nobody knows any longer what its tokens stood for.
                break;
            }
            let Some(kept) = text.get(..record.text_kept).map(str::len) else { break };
            text.truncate(kept);
            agree = agree.min(kept);
            text += &record.text;
            if agree == kept {
                let pairs =
                    text.as_bytes()[kept..].iter().zip(&rendered.as_bytes()[kept.min(rendered.len())..]);
                agree += pairs.take_while(|(own, other)| own == other).count();
            }
            if agree == text.len() {
                best = (at + 1, text.len());
            }
        }
        best
    }

    /// Makes a conversation tokens again, keeping as many of this history's as stand for its rendering. `input` holds
    /// the messages of all turns, and then the new ones.
    pub(crate) fn fit(&self, model: &Model, input: &ChatInput) -> Result<Fit, ApiError> {
        let rendered = input.render(model)?;
        let (kept, text_kept) = self.standing(&rendered);
        let seam = if kept == self.len() { None } else { self.seam_after_answer(model, input, &rendered) };
        let seam = match seam {
            Some(seam) => seam,
            None => Seam { kept, text_kept, suffix: rendered[text_kept..].to_owned() },
        };
        let tokens = self.tokens(seam.kept);
        let Some(sent) = encode_after(model, &tokens, &seam.suffix, input)? else {
            return whole(model, input, rendered, Some(RETOKENIZED));
        };
        Ok(Fit {
            kept: seam.kept,
            sent_len: sent.len(),
            tokens: [tokens, sent].concat(),
            text_kept: seam.text_kept,
            text: rendered[seam.text_kept..].to_owned(),
            reason: (seam.kept < self.len()).then_some(REWROTE),
        })
    }

    /// Where the template shows the last answer otherwise than its tokens read (it trims it, or special tokens inside it
    /// are not part of the message), they stand for it all the same: the message is the one that was answered. Then
    /// only what the template writes after an answer is missing.
    fn seam_after_answer(&self, model: &Model, input: &ChatInput, rendered: &str) -> Option<Seam> {
        let (turn, record) = self.last()?;
        let text = self.text()?;
        let sampled = record.text.get(record.text_sent..)?;
        let text_kept = text.len() - sampled.len();
        let shown = input.with(self.messages(0), Ending::Nothing).render(model).ok()?;
        let rest = rendered.strip_prefix(&shown)?;
        let (text_kept, after_prompt) = after_prompt(&shown, &text[..text_kept], record)?;
        let tokenizer = &model.served.tokenizer;
        let last = *turn.tokens.last()?;
        let content = record.answer["content"].as_str().unwrap_or_default();
        let is_text = record.answer["tool_calls"].is_null() && record.answer["reasoning_content"].is_null();
        if !is_text {
            // How the template shows it is another form: only its end is known.
            let is_ended = turn.tokens.len() > record.sent_len && tokenizer.is_special(last);
            let end = tokenizer.decode(&[last], ShowSpecial::Yes);
            let (_, closing) = after_prompt.rsplit_once(end.as_str()).filter(|_| is_ended)?;
            return Some(Seam { kept: self.len(), text_kept, suffix: closing.to_owned() + rest });
        }
        let trimmed = content.trim();
        let start = after_prompt.find(trimmed).filter(|start| after_prompt[..*start].trim().is_empty())?;
        let closing = &after_prompt[start + trimmed.len()..];
        let spaces = &content[content.trim_end().len()..];
        let closing = closing.strip_prefix(spaces).unwrap_or(closing);
        let missing = if turn.tokens.len() > record.sent_len && tokenizer.is_special(last) {
            // The token that ended the answer is the beginning of what follows it.
            closing.strip_prefix(tokenizer.decode(&[last], ShowSpecial::Yes).as_str())?.to_owned()
        } else {
            let unsaid = content.trim_end().strip_prefix(sampled).unwrap_or_default();
            format!("{unsaid}{closing}")
        };
        Some(Seam { kept: self.len(), text_kept, suffix: missing + rest })
    }
}

/// The rendering of a history after its last prompt, and the length of that prompt in it. A first tag of reasoning that
/// the template has written at the end of the prompt may be gone when the answer is history.
fn after_prompt<'a>(shown: &'a str, prompt: &str, record: &TurnRecord) -> Option<(usize, &'a str)> {
    let opened = || {
        let output = Output::of_json(&record.options["output"])?;
        prompt.trim_end().strip_suffix(output.opened_with()?)
    };
    let begins = |prompt: &str| shown.strip_prefix(prompt).map(|after| (prompt.len(), after));
    begins(prompt).or_else(|| begins(opened()?))
}

/// Encodes a whole conversation, keeping nothing.
pub(crate) fn whole(
    model: &Model,
    input: &ChatInput,
    rendered: String,
    reason: Option<&'static str>,
) -> Result<Fit, ApiError> {
    let tokens = input.encode(model, &rendered)?;
    Ok(Fit { kept: 0, sent_len: tokens.len(), tokens, text_kept: 0, text: rendered, reason })
}

/// Whether a message is the one that is stored: the same role, text and calls.
fn is_same(stored: &Value, sent: &Value) -> bool {
    // An answer without text may come back as null or as nothing.
    let text = |message: &Value| message["content"].as_str().unwrap_or_default().to_owned();
    let calls = |message: &Value| message["tool_calls"].as_array().cloned().unwrap_or_default();
    let (stored_calls, sent_calls) = (calls(stored), calls(sent));
    stored["role"] == sent["role"]
        && text(stored) == text(sent)
        && stored_calls.len() == sent_calls.len()
        && stored_calls.iter().zip(&sent_calls).all(|(stored, sent)| is_same_call(stored, sent))
}

/// The arguments are equal as values: clients read them and write them again.
fn is_same_call(stored: &Value, sent: &Value) -> bool {
    let (function, other) = (&stored["function"], &sent["function"]);
    stored["id"] == sent["id"]
        && function["name"] == other["name"]
        && function["arguments"] == other["arguments"]
}

/// The tokens of `suffix` after `kept`, `None` where the tokenizer cannot say it there.
fn encode_after(
    model: &Model,
    kept: &[u32],
    suffix: &str,
    input: &ChatInput,
) -> Result<Option<Vec<u32>>, ApiError> {
    if kept.is_empty() {
        return input.encode(model, suffix).map(Some);
    }
    let plain = input.clone().with_special(AddSpecial::No);
    tokens_after(&model.served.tokenizer, kept, suffix, |text| plain.encode(model, text))
}

fn tokens_after<E>(
    tokenizer: &Tokenizer,
    kept: &[u32],
    suffix: &str,
    encode: impl Fn(&str) -> Result<Vec<u32>, E>,
) -> Result<Option<Vec<u32>>, E> {
    if suffix.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let before = &kept[kept.len().saturating_sub(SEAM_TOKENS)..];
    let expected = tokenizer.decode(before, ShowSpecial::Yes) + suffix;
    let fits = |tokens: &[u32]| tokenizer.decode(&[before, tokens].concat(), ShowSpecial::Yes) == expected;
    let alone = encode(suffix)?;
    if fits(&alone) {
        return Ok(Some(alone));
    }
    // Some tokenizers put a space before the first word of a text, but not after a special token.
    let last = &kept[kept.len().saturating_sub(1)..];
    let anchored = encode(&(tokenizer.decode(last, ShowSpecial::Yes) + suffix))?;
    Ok(anchored.strip_prefix(last).filter(|tokens| fits(tokens)).map(<[u32]>::to_vec))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;

    fn tokenizer(name: &str) -> Arc<Tokenizer> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("tokenizer.json");
        Arc::new(Tokenizer::from_bytes(&path, &std::fs::read(&path).unwrap()).unwrap())
    }

    #[test]
    fn a_suffix_is_encoded_as_it_reads_behind_the_tokens_before_it() {
        let plain = |tokenizer: &Tokenizer, text: &str| {
            tokenizer.encode(text, AddSpecial::No).map_err(|e| e.to_string())
        };
        for name in ["llama", "mistral", "qwen2", "qwen3"] {
            let tokenizer = tokenizer(&format!("tests/fixtures/{name}"));
            for (before, suffix) in [
                ("Hello", " world"),
                ("Hello", "world"),
                ("a\n", "b c"),
                ("", "x"),
                ("x", ""),
                ("日", "本"),
                ("one ", " two"),
            ] {
                let kept = plain(&tokenizer, before).unwrap();
                let Some(tokens) =
                    tokens_after(&tokenizer, &kept, suffix, |text| plain(&tokenizer, text)).unwrap()
                else {
                    // Then the whole is encoded anew; byte-level tokenizers say everything.
                    assert!(["llama", "mistral"].contains(&name), "{name}: {suffix:?} after {before:?}");
                    continue;
                };
                let whole = tokenizer.decode(&[kept.clone(), tokens].concat(), ShowSpecial::Yes);
                assert_eq!(whole, tokenizer.decode(&kept, ShowSpecial::Yes) + suffix, "{name}");
            }
        }
    }
}
