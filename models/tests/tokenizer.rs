//! The tokenizer beyond the reference texts: bytes of tokens, settings that are ignored, damaged files.

use std::path::{Path, PathBuf};

use mainstay_models::tokenizer::{AddSpecial, ShowSpecial, Tokenizer};
use serde_json::{Value, json};

const TEXTS: [&str; 5] = [
    "Hello, world!  It's 12345.",
    "naïve 日本語 🙂👩‍👩‍👧🏽\n\ttabs",
    "\u{0}\u{1}\u{7f}",
    "   lead and trail  ",
    "▁ ß Ġ",
];

fn path(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(family).join("tokenizer.json")
}

fn raw(family: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path(family)).unwrap()).unwrap()
}

fn parse(json: &Value) -> Tokenizer {
    Tokenizer::from_bytes(Path::new("tokenizer.json"), json.to_string().as_bytes()).unwrap()
}

fn bytes(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap()).collect()
}

#[test]
fn bytes_of_byte_level_tokens_are_the_text() {
    for family in ["llama", "qwen2", "qwen3"] {
        let tokenizer = parse(&raw(family));
        for text in TEXTS {
            let ids = tokenizer.encode(text, AddSpecial::No).unwrap();
            // Qwen's normaliser composes characters; these texts are composed already.
            assert_eq!(String::from_utf8_lossy(&bytes(&tokenizer, &ids)), text, "{family}");
        }
    }
}

#[test]
fn every_byte_has_one_byte_level_token() {
    let tokenizer = parse(&raw("llama"));
    let ids = (0..tokenizer.vocab_len() as u32).filter_map(|id| tokenizer.token_bytes(id));
    let mut single: Vec<u8> = ids.filter(|b| b.len() == 1).flatten().collect();
    single.sort_unstable();
    assert_eq!(single, (0..=255).collect::<Vec<u8>>());
}

#[test]
fn bytes_of_sentencepiece_tokens_are_the_text_after_a_space() {
    let tokenizer = parse(&raw("mistral"));
    for text in ["Hello, world!", "naïve 日本語 🙂", "a\n\tb \u{0}"] {
        let ids = tokenizer.encode(text, AddSpecial::No).unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes(&tokenizer, &ids)), format!(" {text}"));
    }
    assert_eq!(tokenizer.token_bytes(tokenizer.id("<0xE2>").unwrap()), Some(vec![0xE2]));
}

#[test]
fn bytes_of_wordpiece_tokens_begin_words_with_a_space() {
    let tokenizer = parse(&json!({
        "version": "1.0", "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "play": 1, "##ing": 2}}
    }));
    let ids = tokenizer.encode("playing", AddSpecial::No).unwrap();
    assert_eq!(ids, [1, 2]);
    assert_eq!(bytes(&tokenizer, &ids), b" playing");
}

#[test]
fn special_and_unknown_ids() {
    let tokenizer = parse(&raw("llama"));
    let id = tokenizer.id("<|eot_id|>").unwrap();
    assert!(tokenizer.is_special(id) && !tokenizer.is_special(0));
    assert_eq!(tokenizer.token_bytes(id).unwrap(), b"<|eot_id|>");
    assert_eq!(tokenizer.decode(&[39, id], ShowSpecial::No), "H");
    assert_eq!(tokenizer.decode(&[39, id], ShowSpecial::Yes), "H<|eot_id|>");
    assert!(tokenizer.vocab_len() > id as usize);
    assert_eq!(tokenizer.token_bytes(u32::MAX), None);
    assert_eq!(tokenizer.decode(&[39, u32::MAX], ShowSpecial::Yes), "H");
    assert_eq!(tokenizer.id("no such token"), None);
    let lone = tokenizer.encode("é", AddSpecial::No).unwrap();
    assert_eq!(tokenizer.decode(&lone[..1], ShowSpecial::Yes), "\u{FFFD}");
}

#[test]
fn baked_in_truncation_and_padding_are_ignored() {
    let plain = raw("llama");
    let mut baked = plain.clone();
    baked["truncation"] =
        json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    baked["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let text = "a text of more than four tokens";
    let (plain, baked) = (parse(&plain), parse(&baked));
    assert_eq!(baked.encode(text, AddSpecial::Yes), plain.encode(text, AddSpecial::Yes));
    assert_eq!(baked.encode("a", AddSpecial::Yes), plain.encode("a", AddSpecial::Yes));
}

#[test]
fn a_text_without_tokens_is_an_error() {
    let tokenizer = parse(&json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": null, "model": {"type": "WordLevel", "unk_token": "[gone]", "vocab": {"a": 0}}
    }));
    assert_eq!(tokenizer.encode("a", AddSpecial::No), Ok(vec![0]));
    assert!(tokenizer.encode("b", AddSpecial::No).is_err());
}

/// Damage that leaves valid JSON, so that the reader is reached: a value is replaced, dropped or swapped in.
#[test]
fn damaged_files_are_refused_or_read() {
    let values =
        [json!(null), json!(-1), json!(u64::MAX), json!(1e300), json!(""), json!([]), json!({}), json!("[(")];
    let mut original = raw("llama");
    // Short enough to try every place.
    original["model"]["vocab"] = json!({"a": 0, "b": 1, "ab": 2});
    original["model"]["merges"] = json!([["a", "b"]]);
    let places = places(&original, String::new());
    assert!(places.len() > 60, "{}", places.len());
    for place in places {
        for value in &values {
            let mut damaged = original.clone();
            *damaged.pointer_mut(&place).unwrap() = value.clone();
            let read = Tokenizer::from_bytes(Path::new("t"), damaged.to_string().as_bytes());
            if let Ok(tokenizer) = read {
                let ids = tokenizer.encode("ab <|eot_id|> ba", AddSpecial::Yes).unwrap_or_default();
                tokenizer.decode(&ids, ShowSpecial::Yes);
                tokenizer.token_bytes(0);
            }
        }
    }
    let text = raw("mistral").to_string();
    for len in (0..text.len()).step_by(997) {
        assert!(Tokenizer::from_bytes(Path::new("t"), &text.as_bytes()[..len]).is_err());
    }
}

/// JSON pointers of every value.
fn places(value: &Value, at: String) -> Vec<String> {
    let key = |k: &str| k.replace('~', "~0").replace('/', "~1");
    let inner: Vec<String> = match value {
        Value::Object(map) => map.iter().flat_map(|(k, v)| places(v, format!("{at}/{}", key(k)))).collect(),
        Value::Array(list) => {
            list.iter().enumerate().flat_map(|(i, v)| places(v, format!("{at}/{i}"))).collect()
        }
        _ => Vec::new(),
    };
    [at].into_iter().chain(inner).collect()
}
