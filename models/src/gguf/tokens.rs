//! The tokenizer of a GGUF file, as the `tokenizer.json` and `tokenizer_config.json` that it amounts to.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::metadata::{Metadata, Value as Stored};
use super::pre;
use crate::LoadError;

/// What a token is (`tokenizer.ggml.token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Texts that end an answer wherever a vocabulary has them as control tokens: writers of files often name one `eos` only.
const ENDS: [&str; 12] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
];
/// In vocabularies with these two, `<|end|>` ends a part of an answer.
const HARMONY: [&str; 2] = ["<|return|>", "<|call|>"];

/// Longer tokens are whole texts of their own; looking for what they could be merged from would take long.
const MERGED_BYTES_MAX: usize = 256;

const SPACE: char = '\u{2581}';

/// The files that a GGUF file's tokenizer stands for.
pub(super) struct Tokenizer {
    pub(super) tokenizer: Value,
    pub(super) config: Map<String, Value>,
    /// Tokens that end a text.
    pub(super) ends: Vec<u32>,
}

struct Vocabulary<'a> {
    metadata: &'a Metadata,
    tokens: &'a [String],
    kinds: Vec<Kind>,
}

/// Reads `tokenizer.ggml.*` and `tokenizer.chat_template`.
pub(super) fn read(metadata: &Metadata) -> Result<Tokenizer, LoadError> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let tokens = metadata.texts(TOKENS)?.filter(|t| !t.is_empty());
    let tokens = tokens.ok_or_else(|| metadata.wrong(TOKENS, "a list of texts"))?;
    let kinds = kinds(metadata, tokens.len())?;
    let vocabulary = Vocabulary { metadata, tokens, kinds };
    let model = metadata.text("tokenizer.ggml.model")?.unwrap_or_default();
    let tokenizer = match model {
        "llama" => vocabulary.sentence_piece()?,
        "gpt2" => vocabulary.byte_level()?,
        "bert" => vocabulary.word_piece()?,
        _ => return Err(metadata.wrong("tokenizer.ggml.model", "llama, gpt2 or bert")),
    };
    Ok(Tokenizer { tokenizer, config: vocabulary.config()?, ends: vocabulary.ends()? })
}

fn kinds(metadata: &Metadata, count: usize) -> Result<Vec<Kind>, LoadError> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let kind = |value: &Stored| match value {
        Stored::Whole(1) => Some(Kind::Normal),
        Stored::Whole(2) => Some(Kind::Unknown),
        Stored::Whole(3) => Some(Kind::Control),
        Stored::Whole(4) => Some(Kind::UserDefined),
        Stored::Whole(0 | 5) => Some(Kind::Unused),
        Stored::Whole(6) => Some(Kind::Byte),
        _ => None,
    };
    let expected = format!("{count} numbers from 0 to 6, one for each token");
    match metadata.list(KEY, &expected, kind)? {
        None => Ok(vec![Kind::Normal; count]),
        Some(kinds) if kinds.len() == count => Ok(kinds),
        Some(_) => Err(metadata.wrong(KEY, &expected)),
    }
}

impl Vocabulary<'_> {
    /// The id at a key, which must be one of a token.
    fn id(&self, key: &str) -> Result<Option<u32>, LoadError> {
        let key = format!("tokenizer.ggml.{key}");
        let Some(id) = self.metadata.count(&key)? else { return Ok(None) };
        let count = self.tokens.len();
        match u32::try_from(id).ok().filter(|&id| (id as usize) < count) {
            Some(id) => Ok(Some(id)),
            None => Err(self.metadata.wrong(&key, &format!("a token id below {count}"))),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, LoadError> {
        Ok(self.metadata.flag(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default))
    }

    fn text(&self, id: u32) -> &str {
        &self.tokens[id as usize]
    }

    /// Token and id; of tokens of equal text the first.
    fn vocab(&self, spell: impl Fn(&str, Kind) -> String) -> Map<String, Value> {
        let mut vocab = Map::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            vocab.entry(spell(token, *kind)).or_insert_with(|| id.into());
        }
        vocab
    }

    /// Tokens that are found in a text before all else.
    fn added(&self) -> Vec<Value> {
        let mut seen = std::collections::HashSet::new();
        let entries = self.tokens.iter().zip(&self.kinds).enumerate();
        let added = entries.filter(|(_, (token, kind))| {
            matches!(kind, Kind::Unknown | Kind::Control | Kind::UserDefined)
                && !token.is_empty()
                && seen.insert(token.as_str())
        });
        let entry = |(id, (token, kind)): (usize, (&String, &Kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind != Kind::UserDefined,
            })
        };
        added.map(entry).collect()
    }

    /// What stands before and after a text, and between two.
    fn template(&self, first: Option<u32>, last: Option<u32>) -> Value {
        let special = |id: Option<u32>, segment: u32| {
            id.map(|id| json!({"SpecialToken": {"id": self.text(id), "type_id": segment}}))
        };
        let text = |name: &str, segment: u32| Some(json!({"Sequence": {"id": name, "type_id": segment}}));
        let single: Vec<Value> =
            [special(first, 0), text("A", 0), special(last, 0)].into_iter().flatten().collect();
        // without a last token nothing parts the two texts, but the first of the second
        let between = if last.is_some() { None } else { special(first, 1) };
        let pair: Vec<Value> = single
            .iter()
            .cloned()
            .chain([between, text("B", 1), special(last, 1)].into_iter().flatten())
            .collect();
        let tokens: Map<String, Value> = [first, last]
            .into_iter()
            .flatten()
            .map(|id| {
                let token = self.text(id);
                (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}))
            })
            .collect();
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
    }

    fn ends_of_text(&self, bos: bool) -> Result<(Option<u32>, Option<u32>), LoadError> {
        let first = if self.flag("add_bos_token", bos)? { self.id("bos_token_id")? } else { None };
        let last = if self.flag("add_eos_token", false)? { self.id("eos_token_id")? } else { None };
        Ok((first, last))
    }

    /// Llama's SentencePiece: merges by the score of what they make, bytes where no token is found.
    fn sentence_piece(&self) -> Result<Value, LoadError> {
        const SCORES: &str = "tokenizer.ggml.scores";
        let count = self.tokens.len();
        let expected = format!("{count} numbers, one for each token");
        let score = |value: &Stored| match value {
            Stored::Number(n) if !n.is_nan() => Some(*n),
            _ => None,
        };
        let scores = self.metadata.list(SCORES, &expected, score)?.filter(|s| s.len() == count);
        let scores = scores.ok_or_else(|| self.metadata.wrong(SCORES, &expected))?;
        let unknown = self.id("unknown_token_id")?.unwrap_or(0);
        let (first, last) = self.ends_of_text(true)?;
        let prefix = self.flag("add_space_prefix", true)?;
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "version": "1.0",
            "added_tokens": self.added(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.template(first, last),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "unk_token": self.text(unknown), "fuse_unk": true,
                "byte_fallback": self.kinds.contains(&Kind::Byte),
                "vocab": self.vocab(|token, _| token.to_owned()), "merges": self.merges(&scores),
            },
        }))
    }

    /// SentencePiece joins the pair whose token has the highest score; as ranks: all pairs that make a token, by its score.
    fn merges(&self, scores: &[f64]) -> Vec<Value> {
        let ids: HashMap<&str, usize> =
            self.tokens.iter().enumerate().rev().map(|(id, t)| (t.as_str(), id)).collect();
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let first = ids[token.as_str()] == id;
            if self.kinds[id] != Kind::Normal || !first || token.len() > MERGED_BYTES_MAX {
                continue;
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                    merges.push((id, l, r));
                }
            }
        }
        let len = |id: &usize| self.tokens[*id].chars().count();
        merges.sort_by(|a, b| {
            let by_score = scores[b.0].total_cmp(&scores[a.0]);
            by_score
                .then_with(|| len(&b.1).cmp(&len(&a.1)))
                .then_with(|| (a.0, a.1, a.2).cmp(&(b.0, b.1, b.2)))
        });
        merges.into_iter().map(|(_, l, r)| json!([self.tokens[l], self.tokens[r]])).collect()
    }

    /// GPT-2's: a text is cut by patterns, then bytes are merged by rank.
    fn byte_level(&self) -> Result<Value, LoadError> {
        const PRE: &str = "tokenizer.ggml.pre";
        const MERGES: &str = "tokenizer.ggml.merges";
        let name = self.metadata.text(PRE)?.unwrap_or("default");
        let pre = pre::named(name)
            .ok_or_else(|| self.metadata.wrong(PRE, "the name of a known pre-tokenizer (docs/models.md)"))?;
        let merges =
            self.metadata.texts(MERGES)?.ok_or_else(|| self.metadata.wrong(MERGES, "a list of texts"))?;
        let pair = |text: &String| {
            let space = text.char_indices().skip(1).find(|(_, c)| *c == ' ')?.0;
            Some(json!([text[..space], text[space + 1..]]))
        };
        let merges: Option<Vec<Value>> = merges.iter().map(pair).collect();
        let merges =
            merges.ok_or_else(|| self.metadata.wrong(MERGES, "pairs of tokens parted by a space"))?;
        let (first, last) = self.ends_of_text(pre.bos)?;
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        });
        let cuts: Vec<Value> = pre.patterns.iter().map(split).chain([bytes.clone()]).collect();
        Ok(json!({
            "version": "1.0",
            "added_tokens": self.added(),
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
            "post_processor": self.template(first, last),
            "decoder": bytes,
            "model": {
                "type": "BPE", "unk_token": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": pre.whole_tokens,
                "vocab": self.vocab(|token, _| token.to_owned()), "merges": merges,
            },
        }))
    }

    /// BERT's: words, cut into the longest pieces that are known.
    fn word_piece(&self) -> Result<Value, LoadError> {
        let named = |key: &str, other: &str| Ok::<_, LoadError>(self.id(key)?.or(self.id(other)?));
        let first = named("cls_token_id", "bos_token_id")?.or(self.find("[CLS]"));
        let last = named("seperator_token_id", "eos_token_id")?.or(self.find("[SEP]"));
        let first = first.filter(|_| self.flag("add_bos_token", true).unwrap_or(true));
        let unknown = self.id("unknown_token_id")?.or(self.find("[UNK]"));
        let unknown =
            unknown.ok_or_else(|| self.metadata.wrong("tokenizer.ggml.unknown_token_id", "a token id"))?;
        let spell = |token: &str, kind: Kind| match (kind, token.strip_prefix(SPACE)) {
            (Kind::Control | Kind::Unknown, _) => token.to_owned(),
            (_, Some(word)) => word.to_owned(),
            (_, None) if token.starts_with('[') && token.ends_with(']') && token.len() > 2 => {
                token.to_owned()
            }
            (_, None) => format!("##{token}"),
        };
        Ok(json!({
            "version": "1.0",
            "added_tokens": self.added(),
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": true, "lowercase": true,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": self.template(first, last),
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {
                "type": "WordPiece", "unk_token": self.text(unknown), "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": self.vocab(spell),
            },
        }))
    }

    fn find(&self, text: &str) -> Option<u32> {
        self.tokens.iter().position(|t| t == text).map(|id| id as u32)
    }

    fn config(&self) -> Result<Map<String, Value>, LoadError> {
        let mut config = Map::new();
        for (key, name) in [
            ("bos_token_id", "bos_token"),
            ("eos_token_id", "eos_token"),
            ("unknown_token_id", "unk_token"),
            ("padding_token_id", "pad_token"),
            ("cls_token_id", "cls_token"),
            ("seperator_token_id", "sep_token"),
            ("mask_token_id", "mask_token"),
        ] {
            if let Some(id) = self.id(key)? {
                config.insert(name.to_owned(), self.text(id).into());
            }
        }
        let default = self.metadata.text("tokenizer.chat_template")?;
        let tools = self.metadata.text("tokenizer.chat_template.tool_use")?;
        let template = match (default, tools) {
            (Some(default), Some(tools)) => json!([
                {"name": "default", "template": default}, {"name": "tool_use", "template": tools},
            ]),
            (Some(one), None) | (None, Some(one)) => one.into(),
            (None, None) => return Ok(config),
        };
        config.insert("chat_template".to_owned(), template);
        Ok(config)
    }

    fn ends(&self) -> Result<Vec<u32>, LoadError> {
        let mut ends = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            ends.extend(self.id(key)?);
        }
        let control = |text: &str| {
            let id = self.find(text)?;
            (self.kinds[id as usize] == Kind::Control).then_some(id)
        };
        let harmony = HARMONY.iter().all(|text| control(text).is_some());
        let texts = ENDS.iter().filter(|text| !(harmony && **text == "<|end|>"));
        ends.extend(texts.filter_map(|text| control(text)));
        let mut seen = std::collections::HashSet::new();
        ends.retain(|id| seen.insert(*id));
        Ok(ends)
    }
}
