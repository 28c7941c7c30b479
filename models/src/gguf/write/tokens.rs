//! A tokenizer as GGUF's metadata, where llama.cpp has one that gives the same tokens.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::Entries;
use crate::LoadError;
use crate::config::Config;
use crate::file;
use crate::gguf::pre;
use crate::model::special_token;
use crate::tokenizer::{AddSpecial, Tokenizer};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What transformers' ByteLevel cuts by where no pattern is given.
const BYTE_LEVEL: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

struct Files<'a> {
    path: std::path::PathBuf,
    json: Value,
    tokens: Vec<String>,
    kinds: Vec<i32>,
    config: Config,
    of_model: &'a Config,
}

/// Writes `tokenizer.ggml.*` and `tokenizer.chat_template`.
pub(super) fn write(
    entries: &mut Entries,
    dir: &Path,
    config: &Config,
    vocab: usize,
) -> Result<(), LoadError> {
    let path = dir.join("tokenizer.json");
    let bytes = file::read(&path, file::TOKENIZER_BYTES_MAX)?;
    let tokenizer = Tokenizer::from_bytes(&path, &bytes)?;
    let json = serde_json::from_slice(&bytes)
        .map_err(|e| LoadError::format(&path, format!("expected a JSON object, found: {e}")))?;
    let of_tokens = dir.join("tokenizer_config.json");
    let of_tokens_bytes = file::read_optional(&of_tokens, file::CONFIG_BYTES_MAX)?;
    let tokens_config = Config::from_bytes(&of_tokens, of_tokens_bytes.as_deref().unwrap_or(b"{}"))?;
    let mut files =
        Files { path, json, tokens: Vec::new(), kinds: Vec::new(), config: tokens_config, of_model: config };
    files.list(vocab)?;
    match files.json["model"]["type"].as_str().unwrap_or("BPE") {
        "WordPiece" => files.word_piece(entries),
        "BPE" if files.is_byte_level() => files.byte_level(entries)?,
        "BPE" => files.sentence_piece(entries)?,
        _ => return Err(files.wrong("a tokenizer of kind BPE or WordPiece")),
    }
    entries.texts("tokenizer.ggml.tokens", &files.tokens);
    entries.wholes("tokenizer.ggml.token_type", &files.kinds);
    files.special(entries, dir, &tokenizer)
}

impl Files<'_> {
    fn wrong(&self, expected: &str) -> LoadError {
        LoadError::format(&self.path, format!("expected {expected}, since GGUF has no other"))
    }

    /// All tokens in the order of their ids, filled up to the model's vocabulary.
    fn list(&mut self, vocab: usize) -> Result<(), LoadError> {
        self.tokens = (0..vocab).map(|id| format!("[PAD{id}]")).collect();
        self.kinds = vec![UNUSED; vocab];
        let unknown = self.json["model"]["unk_token"].as_str().map(str::to_owned);
        let empty = Map::new();
        let of_model = self.json["model"]["vocab"].as_object().unwrap_or(&empty);
        let mut found: Vec<(u64, String, i32)> = Vec::with_capacity(of_model.len());
        for (token, id) in of_model {
            let byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            let kind = if byte { BYTE } else { NORMAL };
            found.push((id.as_u64().unwrap_or(u64::MAX), token.clone(), kind));
        }
        let none = Vec::new();
        for added in self.json["added_tokens"].as_array().unwrap_or(&none) {
            let token = added["content"].as_str().unwrap_or_default().to_owned();
            let kind = match added["special"].as_bool() {
                _ if Some(&token) == unknown.as_ref() => UNKNOWN,
                Some(true) => CONTROL,
                _ => USER_DEFINED,
            };
            found.push((added["id"].as_u64().unwrap_or(u64::MAX), token, kind));
        }
        for (id, token, kind) in found {
            let at = usize::try_from(id).ok().filter(|&id| id < vocab);
            let Some(at) = at else {
                let what = format!("token `{token}`: expected an id below {vocab}, found {id}");
                return Err(LoadError::format(&self.path, what));
            };
            self.tokens[at] = token;
            self.kinds[at] = kind;
        }
        Ok(())
    }

    /// The parts of a pre-tokenizer, whether it is a sequence or one.
    fn cuts(&self) -> Vec<&Value> {
        let pre = &self.json["pre_tokenizer"];
        match pre["pretokenizers"].as_array() {
            Some(list) => list.iter().collect(),
            None if pre.is_object() => vec![pre],
            None => Vec::new(),
        }
    }

    fn is_byte_level(&self) -> bool {
        self.cuts().iter().any(|cut| cut["type"] == "ByteLevel")
    }

    fn merges(&self) -> Vec<(String, String)> {
        let none = Vec::new();
        let list = self.json["model"]["merges"].as_array().unwrap_or(&none).iter();
        let pair = |merge: &Value| match merge {
            Value::String(text) => text.split_once(' ').map(|(l, r)| (l.to_owned(), r.to_owned())),
            other => Some((other[0].as_str()?.to_owned(), other[1].as_str()?.to_owned())),
        };
        list.filter_map(pair).collect()
    }

    fn byte_level(&self, entries: &mut Entries) -> Result<(), LoadError> {
        let mut patterns = Vec::new();
        for cut in self.cuts() {
            match cut["type"].as_str().unwrap_or_default() {
                "Split" => patterns.extend(cut["pattern"]["Regex"].as_str()),
                "Digits" if cut["individual_digits"] == true => patterns.push(r"\p{N}"),
                "ByteLevel" if cut["add_prefix_space"] == true => {
                    return Err(self.wrong("`add_prefix_space` to be false"));
                }
                "ByteLevel" if cut["use_regex"] != false => patterns.push(BYTE_LEVEL),
                "ByteLevel" => {}
                other => return Err(self.wrong(&format!("a pre-tokenizer without `{other}`"))),
            }
        }
        let whole = self.json["model"]["ignore_merges"] == true;
        let name = pre::name(&patterns, whole);
        let name = name.ok_or_else(|| self.wrong("a pre-tokenizer that has a name (docs/models.md)"))?;
        entries.text("tokenizer.ggml.model", "gpt2");
        entries.text("tokenizer.ggml.pre", name);
        let merges: Vec<String> = self.merges().into_iter().map(|(l, r)| format!("{l} {r}")).collect();
        entries.texts("tokenizer.ggml.merges", &merges);
        Ok(())
    }

    /// Merges become scores: a token's is the better the earlier it can be made.
    fn sentence_piece(&self, entries: &mut Entries) -> Result<(), LoadError> {
        if self.json["model"]["byte_fallback"] != true {
            return Err(self.wrong("bytes to be tokens (`byte_fallback`)"));
        }
        let mut made: HashMap<String, usize> = HashMap::new();
        let merges = self.merges();
        for (rank, (left, right)) in merges.iter().enumerate() {
            made.entry(format!("{left}{right}")).or_insert(rank);
        }
        let mut scores = Vec::with_capacity(self.tokens.len());
        for (id, (token, kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            let rank = made.get(token).copied().unwrap_or(merges.len() + id);
            scores.push(if matches!(*kind, NORMAL | UNUSED) { -(rank as f32) } else { 0.0 });
        }
        let text = self.json["normalizer"].to_string() + &self.json["pre_tokenizer"].to_string();
        let prefix = text.contains("\"Prepend\"")
            || text.contains("\"prepend_scheme\":\"first\"")
            || text.contains("\"prepend_scheme\":\"always\"");
        entries.text("tokenizer.ggml.model", "llama");
        entries.text("tokenizer.ggml.pre", "default");
        entries.numbers("tokenizer.ggml.scores", &scores);
        entries.flag("tokenizer.ggml.add_space_prefix", prefix);
        Ok(())
    }

    /// Words begin with a space there, and nothing marks what continues one.
    fn word_piece(&mut self, entries: &mut Entries) {
        for (token, kind) in self.tokens.iter_mut().zip(&self.kinds) {
            if *kind == NORMAL {
                *token = match token.strip_prefix("##") {
                    Some(rest) => rest.to_owned(),
                    None => format!("\u{2581}{token}"),
                };
            }
        }
        entries.text("tokenizer.ggml.model", "bert");
        entries.text("tokenizer.ggml.pre", "default");
    }

    fn special(&self, entries: &mut Entries, dir: &Path, tokenizer: &Tokenizer) -> Result<(), LoadError> {
        let vocab = self.tokens.len();
        let id = |name: &str| {
            let text = self.config.get(name).and_then(special_token)?;
            tokenizer.id(text)
        };
        let of_model = |key: &str| Ok::<_, LoadError>(self.of_model.token_ids(key, vocab)?.first().copied());
        let bos = id("bos_token").or(of_model("bos_token_id")?);
        let eos = id("eos_token").or(of_model("eos_token_id")?);
        let unknown = self.json["model"]["unk_token"].as_str().and_then(|t| tokenizer.id(t));
        for (key, id) in [
            ("bos_token_id", bos),
            ("eos_token_id", eos),
            ("unknown_token_id", id("unk_token").or(unknown)),
            ("padding_token_id", id("pad_token")),
            ("cls_token_id", id("cls_token")),
            ("seperator_token_id", id("sep_token")),
            ("mask_token_id", id("mask_token")),
            ("eot_token_id", self.other_end(dir, eos, vocab)?),
        ] {
            if let Some(id) = id {
                entries.whole(&format!("tokenizer.ggml.{key}"), id as usize);
            }
        }
        let empty = tokenizer.encode("", AddSpecial::Yes).unwrap_or_default();
        let first = empty.first().copied();
        entries.flag("tokenizer.ggml.add_bos_token", first.is_some() && first == bos.or(id("cls_token")));
        let last = empty.last().copied().filter(|_| eos.is_some());
        entries.flag(
            "tokenizer.ggml.add_eos_token",
            last.is_some() && last == eos && empty.len() > usize::from(bos == eos),
        );
        let template = match file::read_optional(&dir.join("chat_template.jinja"), file::CONFIG_BYTES_MAX)? {
            Some(bytes) => String::from_utf8(bytes).ok(),
            None => None,
        };
        match (template, self.config.get("chat_template")) {
            (Some(text), _) => entries.text("tokenizer.chat_template", &text),
            (None, Some(Value::String(text))) => entries.text("tokenizer.chat_template", text),
            (None, Some(Value::Array(list))) => {
                for one in list {
                    let key = match one["name"].as_str().unwrap_or_default() {
                        "default" => "tokenizer.chat_template".to_owned(),
                        name => format!("tokenizer.chat_template.{name}"),
                    };
                    entries.text(&key, one["template"].as_str().unwrap_or_default());
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A second token that ends an answer, of those that generation_config.json lists.
    fn other_end(&self, dir: &Path, eos: Option<u32>, vocab: usize) -> Result<Option<u32>, LoadError> {
        let path = dir.join("generation_config.json");
        let Some(bytes) = file::read_optional(&path, file::CONFIG_BYTES_MAX)? else { return Ok(None) };
        let ends = Config::from_bytes(&path, &bytes)?.token_ids("eos_token_id", vocab)?;
        Ok(ends.into_iter().find(|id| Some(*id) != eos))
    }
}
